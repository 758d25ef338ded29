//! The far end of the wire.

use netback::offload::checksum;
use netback::uplink::{GsoType, HeaderFlags, NetHeader, Offers};
use netfront::Meta;
use netif::mac::MacAddr;
use netif::offload::{Checksum, Gso, IpVersion};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::time;

use super::Uplink;
use super::card::{Inbound, SimCard, WIRE};
use crate::frames::Frames;
use crate::wire::Wire;

/// The largest frame that the far end sends, unless it is to be cut.
const FRAME: usize = 1514;
/// The largest that it sends then: what IPv4 can say.
const LARGEST: usize = 65_535;
/// Bytes of Ethernet and IPv4,
const IP: usize = 34;
/// and of TCP without options.
const HEADERS: usize = 54;
/// TCP's flag on the last segment of what was sent at once.
const PSH: u8 = 0x08;

/// What whoever sits at the far end puts together again: numbered frames that came in segments.
#[derive(Debug, Default)]
pub(super) struct Gathering {
    whole: Vec<u8>,
    /// The sequence number of what is to come next, if anything is.
    next: Option<u32>,
}

fn get<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..)?.first_chunk().copied()
}

impl Gathering {
    /// Takes a segment; `true` if the whole is complete, and `frame` is the whole now.
    fn take(&mut self, frame: &mut Vec<u8>) -> bool {
        let sequence = get(frame, IP + 4).map_or(0, u32::from_be_bytes);
        let last = get(frame, IP + 13).is_none_or(|[flags]: [u8; 1]| flags & PSH != 0);
        let payload = frame.get(HEADERS..).unwrap_or_default();
        let next = sequence.wrapping_add(payload.len() as u32);
        match self.next.take() {
            None if last => return true,
            Some(expected) if expected == sequence => self.whole.extend_from_slice(payload),
            // The beginning of one, be it that the end of another was lost.
            Some(_) | None => {
                self.whole.clear();
                self.whole.extend_from_slice(frame);
            }
        }
        if !last {
            self.next = Some(next);
            return false;
        }
        std::mem::swap(&mut self.whole, frame);
        let len = (frame.len() - 14) as u16;
        if let Some(field) = frame.get_mut(16..18) {
            field.copy_from_slice(&len.to_be_bytes());
        }
        true
    }
}

impl Uplink {
    /// The next frame that the card sends and that is a whole one; it is in the card's buffer then. What is to be cut is not cut,
    /// as it would be put together again at once.
    fn transmit(&mut self) -> bool {
        let Some(port) = &mut self.port else { return false };
        let card = port.card_mut();
        while card.transmit().is_some() {
            let is_ip = get(&card.buffer, 12) == Some([8, 0]);
            let is_tcp = is_ip && get(&card.buffer, 23) == Some([6]);
            self.bad_sums += u64::from(is_tcp && !checksum::is_valid(&card.buffer));
            let is_numbered = is_tcp && Frames::is_frame(&card.buffer);
            if !is_numbered || self.gathering.take(&mut card.buffer) {
                return true;
            }
        }
        false
    }

    fn offers(&self) -> Offers {
        self.port
            .as_ref()
            .map_or(Offers::empty(), |port| netback::uplink::Card::offers(port.card()))
    }

    /// Whether the card takes what is yet to be cut.
    fn takes_segments(&self) -> bool {
        self.offers().contains(Offers::RX_CSUM | Offers::RX_TSO4)
    }

    /// The card, if it takes one more frame from the wire.
    fn card(&mut self) -> Option<&mut SimCard> {
        let card = self.port.as_mut()?.card_mut();
        (card.inbound.len() < WIRE).then_some(card)
    }
}

/// The far end of the wire.
pub(crate) struct Outside<'a> {
    pub(crate) nic: &'a mut Uplink,
    pub(crate) mac: MacAddr,
}

/// A frame that came over the wire.
pub(crate) struct Arrived(Vec<u8>);

/// Room for a frame on the wire.
pub(crate) struct Sender<'a>(&'a mut SimCard);

impl phy::RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl Sender<'_> {
    fn put<R>(self, header: NetHeader, len: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut frame = self.0.spare.pop().unwrap_or_default();
        frame.clear();
        frame.resize(len, 0);
        let result = f(&mut frame);
        self.0.inbound.push_back(Inbound { header, frame });
        result
    }
}

impl phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        // Its checksum is right, and a card that may say so does.
        let agreed = netback::uplink::Card::offers(self.0).contains(Offers::RX_CSUM);
        let flags = if agreed { HeaderFlags::DATA_VALID } else { HeaderFlags::empty() };
        self.put(NetHeader { flags, ..NetHeader::default() }, len, f)
    }
}

impl Device for Outside<'_> {
    type RxToken<'a>
        = Arrived
    where
        Self: 'a;
    type TxToken<'a>
        = Sender<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: time::Instant) -> Option<(Arrived, Sender<'_>)> {
        self.nic.card()?;
        if !self.nic.transmit() {
            return None;
        }
        let card = self.nic.card()?;
        Some((Arrived(std::mem::take(&mut card.buffer)), Sender(card)))
    }

    fn transmit(&mut self, _: time::Instant) -> Option<Sender<'_>> {
        self.nic.card().map(Sender)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        capabilities
    }
}

impl Wire for Outside<'_> {
    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn max_frame(&self) -> usize {
        if self.nic.takes_segments() { LARGEST } else { FRAME }
    }

    fn segments(&self) -> bool {
        self.nic.takes_segments()
    }

    fn send(&mut self, _: u16, frame: &[u8], meta: Meta) -> bool {
        let Some(card) = self.nic.card() else { return false };
        let header = if meta.checksum == Checksum::Blank {
            NetHeader {
                flags: HeaderFlags::NEEDS_CSUM,
                gso_type: match meta.gso {
                    None => GsoType::NONE,
                    Some(Gso { version: IpVersion::V4, .. }) => GsoType::TCPV4,
                    Some(Gso { version: IpVersion::V6, .. }) => GsoType::TCPV6,
                },
                hdr_len: HEADERS as u16,
                gso_size: meta.gso.map_or(0, |gso| gso.size.get()),
                csum_start: IP as u16,
                csum_offset: 16,
                num_buffers: 0,
            }
        } else {
            NetHeader::default()
        };
        Sender(card).put(header, frame.len(), |to| {
            to.copy_from_slice(frame);
            // What is left blank has the pseudo-header's sum.
            meta.checksum != Checksum::Blank || checksum::blank(to)
        })
    }
}

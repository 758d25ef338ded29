//! smoltcp's [`phy::Device`], with checksums and TCP segmentation left to whoever needs them.
//!
//! [`NetDevice`] owns a [`Frontend`] and is to be driven as one: events and [`Frontend::poll`] through
//! [`frontend_mut`](NetDevice::frontend_mut). What smoltcp sends in one `Interface::poll` is shown to the backend, with at
//! most one notification for each channel, by the `Frontend::poll` after it.
//!
//! An `Interface` asks once, when it is made, what its device can do. So the answer does not depend on the backend of the
//! hour: TCP packets over IPv4 are always taken whole and checksums always blank, and what the backend does not offer is
//! done here. Only the MTU is the store's ([`Frontend::mtu`]); after [`Notice::Mtu`](crate::Notice::Mtu) make a new
//! `Interface`.
//!
//! Over IPv6, smoltcp 0.14 drops what is longer than its MTU before it gets here, so no segmentation is offered to it; large
//! packets from the backend are taken over both.
//!
//! A page that a backend can write must never be a `&mut [u8]`. So smoltcp writes into a private buffer, and that is copied
//! into the granted pages; the other way round alike. Those are the only copies, and nothing is allocated for them once the
//! buffers have grown.

use alloc::vec::Vec;
use core::num::{NonZeroU16, NonZeroUsize};

use hypercall::Hypervisor;
use netif::headers::{self, Headers, Protocol, Transport};
use netif::keys::Features;
use netif::offload::{Checksum, ETHERNET_HEADER, Gso, IpVersion};
use smoltcp::phy::{self, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time;
use smoltcp::wire::{IPV4_HEADER_LEN, Ipv4Packet, TCP_HEADER_LEN, TcpPacket, UdpPacket, checksum};

use crate::{Frontend, Meta};

/// Bytes of the longest frame: what the protocol's 16 bits can say.
const MAX_FRAME: usize = u16::MAX as usize;
/// Bytes of payload where the store does not say (`mtu`).
const DEFAULT_MTU: u16 = 1500;
/// What an MTU is held to: every host takes the least, and the most is a frame's.
const MTUS: (u16, u16) = (576, u16::MAX - ETHERNET_HEADER);
/// Packets that one may be cut into here, at most: what room is kept for. 64 KiB take 46 of 1,448 bytes.
const MAX_SEGMENTS: usize = 64;
/// Bytes at the start of a frame that are wiped before it is written, since a stack may skip reserved fields.
const WIPED: usize = 2048;

/// A [`Frontend`] as smoltcp's device.
pub struct NetDevice<H: Hypervisor> {
    nic: Frontend<H>,
    /// What smoltcp writes a frame into, and one segment of it.
    tx: Vec<u8>,
    segment: Vec<u8>,
    /// A received frame.
    rx: Vec<u8>,
    /// There is one, and nobody has taken it.
    held: bool,
    /// The queue to look at first for the next.
    next: usize,
}

impl<H: Hypervisor> NetDevice<H> {
    /// Takes the interface over.
    #[must_use]
    pub fn new(nic: Frontend<H>) -> Self {
        let (tx, segment, rx) = (Vec::new(), Vec::new(), Vec::new());
        Self { nic, tx, segment, rx, held: false, next: 0 }
    }

    /// The interface.
    #[must_use]
    pub fn frontend(&self) -> &Frontend<H> {
        &self.nic
    }

    /// The interface, to be driven.
    pub fn frontend_mut(&mut self) -> &mut Frontend<H> {
        &mut self.nic
    }

    /// Gives the interface back. A received frame that nobody has taken is lost.
    #[must_use]
    pub fn into_frontend(self) -> Frontend<H> {
        self.nic
    }

    /// Whether whatever smoltcp sends next finds room.
    fn has_room(&mut self) -> bool {
        let whole = self.nic.features().contains(Features::GSO_TCPV4 | Features::SG);
        self.nic.has_room(if whole { 1 } else { MAX_SEGMENTS })
    }

    /// The next good packet of the queues, in turn.
    fn fetch(&mut self) -> bool {
        let queues = self.nic.queues();
        for _ in 0..queues {
            let queue = self.next % queues;
            while let Some(meta) = self.nic.receive(queue, &mut self.rx) {
                if meta.checksum != Checksum::Unverified || is_valid(&self.rx) {
                    return true;
                }
                self.nic.count_bad_checksum();
            }
            self.next = queue + 1;
        }
        false
    }
}

impl<H: Hypervisor> phy::Device for NetDevice<H> {
    type RxToken<'a>
        = RxToken<'a>
    where
        H: 'a;
    type TxToken<'a>
        = TxToken<'a, H>
    where
        H: 'a;

    fn receive(&mut self, _: time::Instant) -> Option<(RxToken<'_>, TxToken<'_, H>)> {
        if !self.has_room() {
            return None;
        }
        self.held = self.held || self.fetch();
        if !self.held {
            return None;
        }
        let Self { nic, tx, segment, rx, held, .. } = self;
        Some((RxToken { frame: rx, held }, TxToken { nic, frame: tx, segment, size: None }))
    }

    fn transmit(&mut self, _: time::Instant) -> Option<TxToken<'_, H>> {
        if !self.has_room() {
            return None;
        }
        let Self { nic, tx, segment, .. } = self;
        Some(TxToken { nic, frame: tx, segment, size: None })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let (least, most) = MTUS;
        let mtu = self.nic.mtu().unwrap_or(DEFAULT_MTU).clamp(least, most);
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = usize::from(mtu) + usize::from(ETHERNET_HEADER);
        // Sums are made by whoever needs them, and seen to in `fetch`.
        capabilities.checksum.tcp = phy::Checksum::None;
        capabilities.checksum.udp = phy::Checksum::None;
        capabilities.segmentation.tcpv4 = NonZeroUsize::new(whole_segments(mtu));
        capabilities
    }
}

/// Bytes of the longest frame that is made of full segments: then none in the midst of a stream is short.
fn whole_segments(mtu: u16) -> usize {
    let headers = usize::from(ETHERNET_HEADER) + IPV4_HEADER_LEN + TCP_HEADER_LEN;
    let segment = usize::from(mtu) + usize::from(ETHERNET_HEADER) - headers;
    MAX_FRAME - (MAX_FRAME - headers) % segment
}

/// A received frame. Dropped without being consumed, it is the next to be received again.
#[derive(Debug)]
pub struct RxToken<'a> {
    frame: &'a [u8],
    held: &'a mut bool,
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        *self.held = false;
        f(self.frame)
    }
}

/// Room for a frame of any length, on whichever queue it belongs. Dropped without being consumed, the room is what it was.
pub struct TxToken<'a, H: Hypervisor> {
    nic: &'a mut Frontend<H>,
    frame: &'a mut Vec<u8>,
    segment: &'a mut Vec<u8>,
    /// Payload bytes of the segments that it is to be cut into.
    size: Option<NonZeroU16>,
}

impl<H: Hypervisor> phy::TxToken for TxToken<'_, H> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(mut self, len: usize, f: F) -> R {
        if self.frame.len() < len {
            self.frame.resize(len, 0);
        }
        let (frame, _) = self.frame.split_at_mut(len);
        frame.iter_mut().take(WIPED).for_each(|byte| *byte = 0);
        let result = f(frame);
        self.send(len);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.size = meta.segmentation_offload_size;
    }
}

impl<H: Hypervisor> TxToken<'_, H> {
    /// Sends what was written, and does to it before what the backend does not do. What cannot be sent is lost, as on any
    /// wire.
    fn send(&mut self, len: usize) {
        let Some(frame) = self.frame.get_mut(..len) else { return };
        let features = self.nic.features();
        let queue = self.nic.queue_for(frame);
        let found = headers::parse(frame).and_then(|headers| Some((headers, headers.transport?)));
        let Some((headers, transport)) = found else {
            // Neither TCP nor UDP, or a fragment, whose sum smoltcp leaves out.
            let _ = self.nic.send(queue, frame, Meta::default());
            return;
        };
        let (gso_offered, sum_offered) = match headers.version {
            IpVersion::V4 => (Features::GSO_TCPV4, Features::IPV4_CSUM),
            IpVersion::V6 => (Features::GSO_TCPV6, Features::IPV6_CSUM),
        };
        let blank = features.contains(sum_offered);
        let checksum = if blank { Checksum::Blank } else { Checksum::Unverified };
        let whole = features.contains(gso_offered | Features::SG);
        match self.size.filter(|size| transport.end - transport.payload > size.get().into()) {
            Some(size) if !whole => {
                let meta = Meta { checksum, gso: None };
                for index in 0.. {
                    let headers = (headers, transport);
                    if cut(frame, headers, size, index, self.segment).is_none() {
                        return;
                    }
                    if let Some(headers) = headers::parse(self.segment) {
                        fill(self.segment, &headers, transport.protocol, blank);
                    }
                    let _ = self.nic.send(queue, self.segment, meta);
                }
            }
            size => {
                let gso = size.map(|size| Gso { size, version: headers.version });
                let checksum = if gso.is_some() { Checksum::Blank } else { checksum };
                fill(frame, &headers, transport.protocol, blank || gso.is_some());
                let _ = self.nic.send(queue, frame, Meta { checksum, gso });
            }
        }
    }
}

/// Writes segment `index` of a TCP packet into `to`, all but TCP's checksum. `None`: there is no such segment.
fn cut(
    frame: &[u8],
    (headers, transport): (Headers, Transport),
    size: NonZeroU16,
    index: usize,
    to: &mut Vec<u8>,
) -> Option<()> {
    let start = index.checked_mul(size.get().into())?;
    let payload = frame.get(transport.payload..transport.end)?;
    let (rest, last) = match payload.get(start..)?.split_at_checked(size.get().into()) {
        Some((part, after)) => (part, after.is_empty()),
        None => (payload.get(start..)?, true),
    };
    if rest.is_empty() {
        return None;
    }
    to.clear();
    to.extend_from_slice(frame.get(..transport.payload)?);
    to.extend_from_slice(rest);
    let len = to.len() - headers.network;
    match headers.version {
        IpVersion::V4 => {
            let mut ip = Ipv4Packet::new_unchecked(to.get_mut(headers.network..)?);
            ip.set_total_len(u16::try_from(len).ok()?);
            ip.set_ident(ip.ident().wrapping_add(index as u16));
            ip.fill_checksum();
        }
        // Its length does not count its own header.
        IpVersion::V6 => {
            let len = u16::try_from(len.checked_sub(40)?).ok()?;
            to.get_mut(headers.network + 4..)?
                .first_chunk_mut()
                .map(|at| *at = len.to_be_bytes())?;
        }
    }
    let mut tcp = TcpPacket::new_checked(to.get_mut(transport.offset..)?).ok()?;
    tcp.set_seq_number(tcp.seq_number() + start);
    tcp.set_fin(tcp.fin() && last);
    tcp.set_psh(tcp.psh() && last);
    Some(())
}

/// The sum over the pseudo-header, and where the transport packet is.
fn pseudo(frame: &[u8], headers: &Headers) -> Option<(Transport, u16)> {
    let transport = headers.transport?;
    let (first, length) = match headers.version {
        IpVersion::V4 => (12, 8),
        IpVersion::V6 => (8, 32),
    };
    let addresses = frame.get(headers.network + first..)?.get(..length)?;
    let len = u16::try_from(transport.len()).ok()?;
    let protocol = u16::from(transport.protocol.number());
    Some((transport, checksum::combine(&[checksum::data(addresses), protocol, len])))
}

/// Fills in the checksum, or the sum over the pseudo-header that stands for a blank one.
fn fill(frame: &mut [u8], headers: &Headers, protocol: Protocol, blank: bool) {
    let Some((transport, pseudo)) = pseudo(frame, headers) else { return };
    let Some(packet) = frame.get_mut(transport.offset..transport.end) else { return };
    let at = protocol.checksum_offset();
    let set = |packet: &mut [u8], sum: u16| {
        if let Some(field) = packet.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
            *field = sum.to_be_bytes();
        }
    };
    if blank {
        return set(packet, pseudo);
    }
    set(packet, 0);
    let sum = !checksum::combine(&[pseudo, checksum::data(packet)]);
    // RFC 768: zero would mean that there is none.
    set(packet, if sum == 0 && protocol == Protocol::Udp { !0 } else { sum });
}

/// Whether a frame that nobody vouches for has a good transport checksum, or need not have one.
fn is_valid(frame: &[u8]) -> bool {
    let Some(headers) = headers::parse(frame) else { return true };
    let Some((transport, pseudo)) = pseudo(frame, &headers) else { return true };
    let Some(packet) = frame.get(transport.offset..transport.end) else { return true };
    if transport.protocol == Protocol::Udp
        && UdpPacket::new_checked(packet).is_ok_and(|udp| udp.checksum() == 0)
    {
        return headers.version == IpVersion::V4;
    }
    checksum::combine(&[pseudo, checksum::data(packet)]) == !0
}

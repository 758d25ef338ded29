//! Domain 0's network card, and the wire behind it.

use std::collections::VecDeque;

use hypercall::Instant;
use netback::{Backend, Packet};
use netif::mac::MacAddr;
use netif::offload::Checksum;
use sim::SimHv;
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::time;

use crate::wire::Wire;

/// Descriptors of each of the card's rings.
const RING: usize = 256;
/// The largest frame on the wire.
const FRAME: usize = 1514;

/// A network card: packets of the switch's local port go out, what comes in goes to the switch.
#[derive(Debug, Default)]
pub struct Nic {
    /// Given to the card, and not sent yet.
    sending: VecDeque<Packet<SimHv>>,
    received: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    /// The frame that is being received at the far end.
    buffer: Vec<u8>,
    /// Packets that the card still sends in this turn.
    budget: usize,
    /// Packets that found no place in the card's ring.
    pub(crate) overruns: u64,
}

impl Nic {
    /// Domain 0's driver: takes what is to go out, and hands in what came. Answers whether there was anything.
    pub(crate) fn drive(&mut self, backend: &mut Backend<SimHv>, now: Instant) -> bool {
        let mut some = false;
        while let Some(mut packet) = backend.receive_local() {
            some = true;
            if packet.make_whole(backend.pools()) && self.sending.len() < RING {
                self.sending.push_back(packet);
            } else {
                self.overruns += 1;
            }
        }
        while let Some(frame) = self.received.pop_front() {
            let Some(mut packet) = backend.packet(frame.len(), now) else {
                self.received.push_front(frame);
                break;
            };
            packet.bytes_mut().copy_from_slice(&frame);
            packet.checksum = Checksum::Unverified;
            backend.send_local(packet, now);
            self.spare.push(frame);
            some = true;
        }
        some
    }

    /// The card gets so far and no further in this turn: the rest stays in its hands.
    pub(crate) fn turn(&mut self, budget: usize) {
        self.budget = budget;
    }

    /// Whether there is something that the card has not sent.
    pub(crate) fn is_busy(&self) -> bool {
        !self.sending.is_empty()
    }

    /// The backend is gone, and all packets with it.
    pub(crate) fn reset(&mut self) {
        self.sending.clear();
    }
}

/// The far end of the wire.
pub(crate) struct Outside<'a> {
    pub(crate) nic: &'a mut Nic,
    pub(crate) mac: MacAddr,
}

/// A frame that came over the wire.
pub(crate) struct Received<'a>(&'a [u8]);

/// Room for a frame on the wire.
pub(crate) struct Sender<'a> {
    received: &'a mut VecDeque<Vec<u8>>,
    spare: &'a mut Vec<Vec<u8>>,
}

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = self.spare.pop().unwrap_or_default();
        frame.clear();
        frame.resize(len, 0);
        let result = f(&mut frame);
        self.received.push_back(frame);
        result
    }
}

impl Device for Outside<'_> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Sender<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: time::Instant) -> Option<(Received<'_>, Sender<'_>)> {
        let Nic { sending, received, spare, budget, buffer, .. } = &mut *self.nic;
        if received.len() >= RING {
            return None;
        }
        *budget = budget.checked_sub(1)?;
        let packet = sending.pop_front()?;
        buffer.clear();
        buffer.extend_from_slice(packet.bytes());
        drop(packet);
        Some((Received(buffer), Sender { received, spare }))
    }

    fn transmit(&mut self, _: time::Instant) -> Option<Sender<'_>> {
        let Nic { received, spare, .. } = &mut *self.nic;
        (received.len() < RING).then_some(Sender { received, spare })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        // Sums that guests left blank are the card's to fill in, and packets that they left whole are its to cut. What is
        // behind the wire takes both as they are; the streams have sums of their own.
        capabilities.checksum.tcp = phy::Checksum::Tx;
        capabilities
    }
}

impl Wire for Outside<'_> {
    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn max_frame(&self) -> usize {
        FRAME
    }

    fn send(&mut self, _: u16, frame: &[u8]) -> bool {
        let Nic { received, spare, .. } = &mut *self.nic;
        if received.len() >= RING {
            return false;
        }
        let sender = Sender { received, spare };
        phy::TxToken::consume(sender, frame.len(), |to| to.copy_from_slice(frame));
        true
    }
}

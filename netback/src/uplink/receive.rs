//! From the card to the switch.

use hypercall::{Hypervisor, Instant, PAGE_SIZE};

use super::card::{Buffer, Card, Offers, Received};
use super::counters::UplinkCounters;
use super::header::NetHeader;
use super::translate::{self, Meaning};
use crate::backend::Backend;
use crate::packet::Packet;

/// The largest packet that there is: a guest is told lengths in 16 bits.
const MAX_LEN: usize = 65_535;
/// Bytes of a large buffer.
const LARGE: usize = 16 * PAGE_SIZE;
/// Buffers that a frame may take up: as many as a large buffer has pages, and one for a header that takes up a part.
const MAX_BUFFERS: usize = LARGE / PAGE_SIZE + 1;
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

/// A frame of which not all buffers have come yet.
struct Merging<H: Hypervisor> {
    /// Where it is put together; `None`: it is dropped.
    packet: Option<Packet<H>>,
    header: NetHeader,
    filled: usize,
    /// Buffers still to come.
    left: u16,
}

/// The receiving half of the port.
pub(super) struct Receiver<H: Hypervisor> {
    /// Buffers that the card has.
    posted: usize,
    merging: Option<Merging<H>>,
}

impl<H: Hypervisor> Receiver<H> {
    pub(super) const fn new() -> Self {
        Self { posted: 0, merging: None }
    }

    /// The card has nothing any more.
    pub(super) fn lose(&mut self) {
        *self = Self::new();
    }

    /// Gives the card buffers to receive into, up to `wanted`. Answers whether it gave any, and whether there was none to give.
    pub(super) fn post(
        &mut self,
        card: &mut impl Card<H>,
        backend: &Backend<H>,
        wanted: usize,
        now: Instant,
    ) -> (bool, bool) {
        let offers = card.offers();
        let segments = offers.intersects(Offers::RX_TSO4 | Offers::RX_TSO6);
        let size = if segments && !offers.contains(Offers::MERGE) { LARGE } else { PAGE_SIZE };
        let Some(rule) = backend.own_rule() else { return (false, false) };
        let before = self.posted;
        while self.posted < wanted {
            let Some(packet) = backend.packet(size, now) else {
                return (self.posted > before, true);
            };
            let located = packet.dma_own(rule).all(|piece| piece.is_some());
            if !located || card.post(Buffer { packet, rule }).is_err() {
                break;
            }
            self.posted += 1;
        }
        (self.posted > before, false)
    }

    /// Takes a buffer that the card has written to. Answers the packet that it was the last of.
    pub(super) fn take(
        &mut self,
        received: Received<H>,
        offers: Offers,
        backend: &Backend<H>,
        now: Instant,
        counters: &mut UplinkCounters,
    ) -> Option<Packet<H>> {
        self.posted = self.posted.saturating_sub(1);
        let Received { header, len, buffer: Buffer { mut packet, .. } } = received;
        // It has been with the card since long ago, and a guest is not given what has waited too long.
        packet.arrived = now;
        let fits = len <= packet.len();
        if let Some(mut merging) = self.merging.take() {
            merging.left = merging.left.saturating_sub(1);
            if !fits {
                merging.give_up(&mut counters.receive_drops.bad_length);
            } else {
                merging.add(packet.bytes().get(..len).unwrap_or_default(), counters);
            }
            if merging.left > 0 {
                self.merging = Some(merging);
                return None;
            }
            let Merging { packet, header, filled, .. } = merging;
            let packet = finish(packet?, filled, header, offers, counters)?;
            counters.arrived.merged += 1;
            return Some(packet);
        }
        let buffers = if offers.contains(Offers::MERGE) { header.num_buffers } else { 1 };
        // More than the longest frame takes: there is no telling where the next one begins, but for trying.
        if buffers == 0 || usize::from(buffers) > MAX_BUFFERS {
            counters.receive_drops.bad_header += 1;
            return None;
        }
        if buffers == 1 {
            if !fits {
                counters.receive_drops.bad_length += 1;
                return None;
            }
            return finish(packet, len, header, offers, counters);
        }
        let mut merging = Merging { packet: None, header, filled: 0, left: buffers - 1 };
        if !fits {
            counters.receive_drops.bad_length += 1;
        } else {
            merging.packet = backend.packet(LARGE, now);
            counters.receive_drops.no_buffer += u64::from(merging.packet.is_none());
            merging.add(packet.bytes().get(..len).unwrap_or_default(), counters);
        }
        self.merging = Some(merging);
        None
    }
}

impl<H: Hypervisor> Merging<H> {
    /// Drops the frame, if that has not been done yet.
    fn give_up(&mut self, why: &mut u64) {
        *why += u64::from(self.packet.take().is_some());
    }

    fn add(&mut self, bytes: &[u8], counters: &mut UplinkCounters) {
        let Some(packet) = &mut self.packet else { return };
        let end = self.filled + bytes.len();
        match packet.bytes_mut().get_mut(self.filled..end) {
            Some(to) => {
                to.copy_from_slice(bytes);
                self.filled = end;
            }
            None => self.give_up(&mut counters.receive_drops.too_big),
        }
    }
}

/// Judges a frame that is all there.
fn finish<H: Hypervisor>(
    mut packet: Packet<H>,
    len: usize,
    header: NetHeader,
    offers: Offers,
    counters: &mut UplinkCounters,
) -> Option<Packet<H>> {
    if !(ETHERNET..=MAX_LEN).contains(&len) {
        let drops = &mut counters.receive_drops;
        *if len > MAX_LEN { &mut drops.too_big } else { &mut drops.bad_length } += 1;
        return None;
    }
    packet.set_len(len);
    let Ok(meaning) = translate::read(header, offers, packet.bytes_mut()) else {
        counters.receive_drops.bad_header += 1;
        return None;
    };
    let Meaning { checksum, gso, completed } = meaning;
    (packet.checksum, packet.gso) = (checksum, gso);
    let arrived = &mut counters.arrived;
    arrived.frames += 1;
    arrived.bytes += len as u64;
    arrived.blank += u64::from(checksum == netif::offload::Checksum::Blank);
    arrived.checksums += u64::from(completed);
    arrived.segmented += u64::from(gso.is_some());
    Some(packet)
}

//! From the switch to the card.

use alloc::sync::Arc;

use hypercall::{Hypervisor, Instant};

use super::UplinkConfig;
use super::card::Card;
use super::counters::{Carried, UplinkCounters};
use super::flight::Flight;
use super::outgoing::{Outgoing, Source};
use super::prepare::{Preparing, Spares, Unready};
use crate::backend::Backend;
use crate::datapath::Datapath;
use crate::packet::Packet;

/// Packets that are taken from the switch at a time.
const BUDGET: usize = 256;
/// Nanoseconds after which it is tried again to get a buffer.
pub(super) const BUFFER_WAIT: u64 = 1_000_000;

/// A packet of which the card has not taken all frames yet.
struct Current<H: Hypervisor> {
    source: Arc<Source<H>>,
    /// The frame that is next.
    next: usize,
}

/// Why sending stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stopped {
    /// There is nothing more.
    Empty,
    /// The card takes no more now.
    Full,
    /// There is no buffer.
    NoBuffer,
    /// It is somebody else's turn.
    Budget,
}

/// The sending half of the port.
pub(super) struct Sender<H: Hypervisor> {
    current: Option<Current<H>>,
    /// Waits for a buffer.
    waiting: Option<Packet<H>>,
    spares: Spares<H>,
    pub(super) flight: Flight,
}

impl<H: Hypervisor> Sender<H> {
    pub(super) fn new() -> Self {
        Self { current: None, waiting: None, spares: Spares::new(), flight: Flight::default() }
    }

    /// Takes back what the card is done with.
    pub(super) fn take_back(&mut self, card: &mut impl Card<H>, now: Instant) {
        while let Some(Outgoing { source, generation, .. }) = card.sent() {
            self.flight.came_back(generation, now);
            self.spares.release(source);
        }
    }

    /// Since when pages of a guest's have been mapped for a packet that the card has nothing of.
    pub(super) fn holds_since(&self) -> Option<Instant> {
        let current = self.current.as_ref().filter(|current| current.next == 0);
        let packet = current.and_then(|current| current.source.packet.as_ref());
        Some(packet.or(self.waiting.as_ref())?.lent_by()?.1)
    }

    /// Gives a guest its pages back that the card takes too long to take: the packet is copied, or dropped if there is no buffer
    /// for that.
    pub(super) fn let_go(&mut self, backend: &Backend<H>, counters: &mut UplinkCounters) {
        if let Some(mut current) = self.current.take_if(|current| current.next == 0) {
            self.waiting = Arc::get_mut(&mut current.source).and_then(|it| it.packet.take());
            self.spares.release(current.source);
        }
        let Some(mut packet) = self.waiting.take() else { return };
        if packet.make_whole(backend.pools()) {
            counters.copied.overdue += 1;
            self.waiting = Some(packet);
        } else {
            counters.send_drops.no_buffer += 1;
        }
    }

    /// Gives the card what there is, and answers whether it took anything, and why it does not take more.
    pub(super) fn send(
        &mut self,
        card: &mut impl Card<H>,
        backend: &mut Backend<H>,
        config: &UplinkConfig,
        counters: &mut UplinkCounters,
        now: Instant,
    ) -> (bool, Stopped) {
        let mut any = false;
        for _ in 0..BUDGET {
            let current = match self.current.take() {
                Some(current) => current,
                None if card.room() == 0 => return (any, Stopped::Full),
                None => {
                    let packet = self.waiting.take().or_else(|| backend.receive_uplink());
                    let Some(packet) = packet else { return (any, Stopped::Empty) };
                    let preparing = Preparing {
                        backend,
                        offers: card.offers(),
                        card,
                        max_frame: config.max_frame.into(),
                        spares: &mut self.spares,
                        counters,
                    };
                    match preparing.prepare(packet) {
                        Ok(source) => Current { source, next: 0 },
                        Err(Unready::Dropped) => continue,
                        Err(Unready::Wait(packet)) => {
                            self.waiting = Some(packet);
                            return (any, Stopped::NoBuffer);
                        }
                    }
                }
            };
            let (took, refused) = self.push(card, current, counters, now);
            any |= took;
            if refused {
                return (any, Stopped::Full);
            }
        }
        (any, Stopped::Budget)
    }

    /// Gives the card what it takes of one packet. Answers whether it took anything, and whether there is a rest.
    fn push(
        &mut self,
        card: &mut impl Card<H>,
        mut current: Current<H>,
        counters: &mut UplinkCounters,
        now: Instant,
    ) -> (bool, bool) {
        let (first, count) = (current.next, current.source.count());
        let packet = current.source.packet.as_ref();
        let path = packet.filter(|it| it.is_lent()).map_or(Datapath::Copy, Packet::path);
        let mut carried = Carried { packets: u64::from(first == 0), ..Carried::default() };
        while current.next < count {
            let source = Arc::clone(&current.source);
            let out = Outgoing { source, index: current.next, generation: self.flight.next() };
            let len = out.len() as u64;
            if let Err(_refused) = card.send(out) {
                break;
            }
            self.flight.left(now);
            current.next += 1;
            carried.frames += 1;
            carried.bytes += len;
        }
        let took = current.next > first;
        if took {
            counters.count_sent(path, carried);
        }
        let rest = current.next < count;
        if rest && self.flight.len() > 0 {
            self.current = Some(current);
            return (took, true);
        }
        // What an idle card does not take it never will.
        counters.send_drops.refused += u64::from(rest);
        self.spares.release(current.source);
        (took, false)
    }
}

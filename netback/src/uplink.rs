//! The switch's port to the world: a network card that reads and writes memory by bus address.
//!
//! The port decides how each packet goes out; the [`Card`] carries it. A packet whose pages are mapped goes by reference if the DMA
//! rule of this moment has an address for each of them, and is copied otherwise. What the card cannot do is done here: checksums are
//! filled in, and large TCP packets are cut into frames of which each has headers of its own and shares the payload.
//!
//! Headers are always read, checked and sent from memory of ours. A guest's page stays mapped until the card is done with it,
//! whatever becomes of the guest; a card that does not get done is reset.

mod card;
mod counters;
mod flight;
mod header;
mod outgoing;
mod prepare;
mod receive;
mod send;
mod translate;

use core::fmt;

use hypercall::{Hypervisor, Instant};

use crate::backend::Backend;
use receive::Receiver;
use send::{BUFFER_WAIT, Sender, Stopped};

pub use card::{Buffer, Card, Offers, Received};
pub use counters::{
    Arrived, Carried, Copied, Hardware, Offloads, ReceiveDrops, SendDrops, UplinkCounters,
};
pub use header::{GsoType, HeaderFlags, NetHeader};
pub use outgoing::Outgoing;

/// Buffers that are taken from the card at a time.
const BUDGET: usize = 256;

/// How a port is set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UplinkConfig {
    /// Buffers that wait for frames from the wire, of 4 KiB or, for a card that needs them, of 64 KiB.
    pub buffers: u16,
    /// Bytes of the longest frame that goes out: an Ethernet header, tags, and what the network takes.
    pub max_frame: u16,
    /// Nanoseconds after which a card that has not sent what it was given is reset; noticed after twice that at the latest.
    pub patience: u64,
}

impl Default for UplinkConfig {
    fn default() -> Self {
        Self { buffers: 128, max_frame: 1522, patience: 5_000_000_000 }
    }
}

/// The port of the switch that a network card is at.
pub struct Uplink<H: Hypervisor, C: Card<H>> {
    card: C,
    config: UplinkConfig,
    sender: Sender<H>,
    receiver: Receiver<H>,
    counters: UplinkCounters,
    /// The card has had something since then for longer than pages may be held, and that is counted.
    late: Option<Instant>,
    /// The card does not stop: when that is tried again.
    stuck: Option<Instant>,
    /// When to look again though no interrupt comes.
    deadline: Option<Instant>,
}

impl<H: Hypervisor, C: Card<H>> Uplink<H, C> {
    /// A port that has `card` to itself.
    #[must_use]
    pub fn new(card: C, config: UplinkConfig) -> Self {
        Self {
            card,
            config,
            sender: Sender::new(),
            receiver: Receiver::new(),
            counters: UplinkCounters::default(),
            late: None,
            stuck: None,
            deadline: None,
        }
    }

    /// Carries packets both ways. Answers whether there is more to do at once, here or in the backend: what came is to be
    /// delivered there, and what has gone out to be answered.
    pub fn poll(&mut self, backend: &mut Backend<H>, now: Instant) -> bool {
        let had = self.in_flight();
        if !self.is_well(backend, now) {
            self.deadline = self.stuck;
            return false;
        }
        let Self { card, config, sender, receiver, counters, .. } = self;
        sender.take_back(card, now);
        let answered = sender.flight.len() < had;
        let hold = backend.config.policy.hold;
        if sender.holds_since().is_some_and(|since| now >= since.after(hold)) {
            sender.let_go(backend, counters);
        }
        let (sent, stopped) = sender.send(card, backend, config, counters, now);
        let offers = card.offers();
        let mut left = BUDGET;
        while left > 0
            && let Some(received) = card.received()
        {
            left -= 1;
            if let Some(packet) = receiver.take(received, offers, backend, now, counters) {
                backend.send_uplink(packet, now);
            }
        }
        let more = stopped == Stopped::Budget || answered || left < BUDGET;
        let (posted, starved) = receiver.post(card, backend, config.buffers.into(), now);
        if sent || posted {
            card.publish();
        }
        let waits = stopped == Stopped::NoBuffer || starved;
        let waits = waits.then(|| now.after(BUFFER_WAIT));
        let held = sender.holds_since().map(|since| since.after(hold));
        let watched = sender.flight.since().map(|since| match self.late {
            Some(late) if late == since => since.after(config.patience),
            _ => since.after(hold.min(config.patience)),
        });
        self.deadline = [waits, held, watched].into_iter().flatten().min();
        more
    }

    /// Watches over the card. Answers whether it can be used.
    fn is_well(&mut self, backend: &Backend<H>, now: Instant) -> bool {
        if self.stuck.is_some_and(|retry| now < retry) {
            return false;
        }
        let broken = self.stuck.is_some() || self.card.is_broken();
        if !broken {
            // What is done counts, however late it is heard of.
            self.sender.take_back(&mut self.card, now);
        }
        let Some(since) = self.sender.flight.since().filter(|_| !broken) else {
            return !broken || self.reset(now);
        };
        if now >= since.after(self.config.patience) {
            return self.reset(now);
        }
        if now >= since.after(backend.config.policy.hold) && self.late != Some(since) {
            self.late = Some(since);
            self.counters.hardware.late += 1;
        }
        true
    }

    fn reset(&mut self, now: Instant) -> bool {
        if !self.card.reset() {
            if self.stuck.is_none() {
                log::error!("netback: the network card does not stop");
            }
            self.counters.hardware.stuck += 1;
            self.stuck = Some(now.after(self.config.patience));
            return false;
        }
        self.stuck = None;
        self.late = None;
        let lost = self.sender.flight.lose();
        self.receiver.lose();
        self.counters.hardware.resets += 1;
        self.counters.hardware.lost += lost as u64;
        log::warn!("netback: the network card was reset; {lost} frames were lost");
        true
    }

    /// When [`poll`](Self::poll) is to be called though no interrupt comes.
    #[must_use]
    pub const fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Frames that the card has and has not sent yet.
    #[must_use]
    pub const fn in_flight(&self) -> usize {
        self.sender.flight.len()
    }

    /// What the port has done.
    #[must_use]
    pub const fn counters(&self) -> &UplinkCounters {
        &self.counters
    }

    /// The card.
    #[must_use]
    pub const fn card(&self) -> &C {
        &self.card
    }

    /// The card, for its interrupts.
    pub const fn card_mut(&mut self) -> &mut C {
        &mut self.card
    }
}

impl<H: Hypervisor, C: Card<H>> fmt::Debug for Uplink<H, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Uplink({}, {} in flight)", self.card.mac(), self.in_flight())
    }
}

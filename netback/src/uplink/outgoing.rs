//! A frame on its way through the card.

use alloc::sync::Arc;
use core::fmt;

use hypercall::Hypervisor;

use super::header::NetHeader;
use crate::dma::DmaPiece;
use crate::packet::Packet;

/// Pieces of one packet at most: its private pages or what is private of a mapped one, and a piece of each slot.
const MAX_PIECES: usize = 20;

/// What a card needs of one packet, all frames made of it.
pub(super) struct Source<H: Hypervisor> {
    /// Kept until no frame of it is under way.
    pub(super) packet: Option<Packet<H>>,
    pub(super) header: NetHeader,
    pub(super) pieces: heapless::Vec<DmaPiece, MAX_PIECES>,
}

/// One frame for the wire, or one TCP packet that the card is to cut. While it lives, the card finds its bytes where it was told.
pub struct Outgoing<H: Hypervisor> {
    pub(super) source: Arc<Source<H>>,
}

impl<H: Hypervisor> Outgoing<H> {
    /// What the card is to do to it.
    #[must_use]
    pub fn header(&self) -> NetHeader {
        self.source.header
    }

    /// Its bytes, in order. The headers are in memory of ours; what a guest can still change is payload.
    pub fn pieces(&self) -> impl Iterator<Item = DmaPiece> {
        self.source.pieces.iter().copied()
    }
}

impl<H: Hypervisor> fmt::Debug for Outgoing<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Outgoing({:?})", self.source.packet)
    }
}

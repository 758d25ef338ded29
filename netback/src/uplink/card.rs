//! What the port asks of a network card's driver.

use core::fmt;

use bitflags::bitflags;
use hypercall::Hypervisor;
use netif::mac::MacAddr;

use super::header::NetHeader;
use super::outgoing::Outgoing;
use crate::dma::{DmaPiece, OwnRule};
use crate::packet::Packet;

bitflags! {
    /// What a card and its driver have agreed on (virtio 1.2, 5.1.3).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct Offers: u8 {
        /// It fills in checksums of what is sent (`VIRTIO_NET_F_CSUM`).
        const CSUM = 1;
        /// It cuts TCP over IPv4 (`VIRTIO_NET_F_HOST_TSO4`).
        const TSO4 = 1 << 1;
        /// It cuts TCP over IPv6 (`VIRTIO_NET_F_HOST_TSO6`).
        const TSO6 = 1 << 2;
        /// What is received may lack its checksum, or have been found right (`VIRTIO_NET_F_GUEST_CSUM`).
        const RX_CSUM = 1 << 3;
        /// What is received may be TCP over IPv4 that is yet to be cut (`VIRTIO_NET_F_GUEST_TSO4`).
        const RX_TSO4 = 1 << 4;
        /// What is received may be TCP over IPv6 that is yet to be cut (`VIRTIO_NET_F_GUEST_TSO6`).
        const RX_TSO6 = 1 << 5;
        /// What is received may be spread over several buffers (`VIRTIO_NET_F_MRG_RXBUF`).
        const MERGE = 1 << 6;
    }
}

/// A buffer to receive into: a packet of netback's that nobody else has, and where the card finds it.
pub struct Buffer<H: Hypervisor> {
    pub(super) packet: Packet<H>,
    /// By which each of its pages is somewhere.
    pub(super) rule: OwnRule,
}

impl<H: Hypervisor> Buffer<H> {
    /// Where it is, in order.
    pub fn pieces(&self) -> impl Iterator<Item = DmaPiece> {
        self.packet.dma_own(self.rule).flatten()
    }
}

impl<H: Hypervisor> fmt::Debug for Buffer<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.packet.len())
    }
}

/// A buffer that the card has written to.
#[derive(Debug)]
pub struct Received<H: Hypervisor> {
    /// What the device says of the frame. Of one in several buffers (`num_buffers`, with [`Offers::MERGE`]), that of the first
    /// counts; the others follow at once.
    pub header: NetHeader,
    /// Bytes of the frame in this buffer, from its first on, the header not among them.
    pub len: usize,
    /// The buffer.
    pub buffer: Buffer<H>,
}

impl<H: Hypervisor> Received<H> {
    /// What there is of the frame in this buffer; nothing, if there is less room in it than the card says.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.buffer.packet.bytes().get(..self.len).unwrap_or_default()
    }
}

/// A network card and its driver.
///
/// Each piece that it is given says what is to be done before the device looks:
/// [`Hypercall`](crate::dma::Maintenance::Hypercall) has been done by whoever gave it, and
/// [`Identity`](crate::dma::Maintenance::Identity) by [`clean_identity`](Self::clean_identity) before; what is to be done to memory of
/// ours is left to the card. A card that is not coherent also has the processor see what the device wrote to a buffer before it
/// gives that back.
pub trait Card<H: Hypervisor> {
    /// What was agreed on.
    fn offers(&self) -> Offers;

    /// Its address.
    fn mac(&self) -> MacAddr;

    /// Descriptors free for sending. A frame takes one for each of its pieces and one for its header.
    fn room(&self) -> usize;

    /// Writes back what the processor's caches hold of those pieces that ask for [`Identity`](crate::dma::Maintenance::Identity).
    /// `false` if one of them is not to be found at its machine address: then the packet is copied.
    #[must_use]
    fn clean_identity(&mut self, pieces: &[DmaPiece]) -> bool;

    /// Queues a frame; the device learns of it by [`publish`](Self::publish).
    ///
    /// # Errors
    /// There is no room for it now.
    fn send(&mut self, out: Outgoing<H>) -> Result<(), Outgoing<H>>;

    /// A frame that the device is done with.
    fn sent(&mut self) -> Option<Outgoing<H>>;

    /// Queues a buffer to receive into; the device learns of it by [`publish`](Self::publish).
    ///
    /// # Errors
    /// There is no room for it now.
    fn post(&mut self, buffer: Buffer<H>) -> Result<(), Buffer<H>>;

    /// A buffer that the device has written to.
    fn received(&mut self) -> Option<Received<H>>;

    /// Shows the device all that was queued since the last time: one store of an index, and at most one notification, of each
    /// ring that something was queued on.
    fn publish(&mut self);

    /// Whether what the device says makes no sense, or it says itself that it has failed: nothing comes of it until it has been
    /// [reset](Self::reset).
    fn is_broken(&self) -> bool;

    /// Stops the device, drops everything that it was given, and starts it anew, with the same [`offers`](Self::offers). `false` if
    /// it does not stop: then it may still read and write, and the card keeps all that it has.
    #[must_use]
    fn reset(&mut self) -> bool;
}

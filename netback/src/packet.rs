//! A packet on its way through the backend: private bytes in one piece, and what is still to be done to them.

use core::fmt;
use core::num::NonZeroUsize;

use grant::{Frame, FramePool};
use hypercall::{Hypervisor, Instant, PAGE_SIZE};
use netif::offload::{Checksum, Gso};

/// Pages in a large buffer: the largest packet the protocol can describe, 65,535 bytes.
const LARGE: NonZeroUsize = NonZeroUsize::MIN.saturating_add(15);

/// Which flow a packet belongs to, as far as order matters: packets of one flow have the same number. It is the number
/// of the queue that the packet came from, whose sender keeps each flow in one queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flow(pub u16);

/// A packet in memory that no peer can see.
pub struct Packet<H: Hypervisor> {
    frame: Frame<H>,
    len: usize,
    /// The state of its checksum.
    pub checksum: Checksum,
    /// Whether and how it is to be segmented.
    pub gso: Option<Gso>,
    /// Its flow.
    pub flow: Flow,
    /// When it came.
    pub arrived: Instant,
}

impl<H: Hypervisor> Packet<H> {
    /// Its bytes: an Ethernet frame without trailer.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.frame.bytes().get(..self.len).unwrap_or_default()
    }

    /// Its bytes, to change.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.frame.bytes_mut().get_mut(..self.len).unwrap_or_default()
    }

    /// How many bytes it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether its buffer is one of 64 KiB.
    pub(crate) fn is_large(&self) -> bool {
        self.frame.size() > PAGE_SIZE
    }

    pub(crate) fn frame(&self) -> &Frame<H> {
        &self.frame
    }

    pub(crate) fn frame_mut(&mut self) -> &mut Frame<H> {
        &mut self.frame
    }

    /// Makes it shorter, or as long as its buffer allows.
    pub(crate) fn set_len(&mut self, len: usize) {
        self.len = len.min(self.frame.size());
    }
}

impl<H: Hypervisor> fmt::Debug for Packet<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packet({} bytes, {:?}, {:?})", self.len, self.checksum, self.gso)
    }
}

/// The buffers that all packets live in. Fixed in number: when all are out, senders wait.
#[derive(Clone, Debug)]
pub struct Pools<H: Hypervisor> {
    small: FramePool<H>,
    large: FramePool<H>,
}

/// How many of a pool's buffers are free, of how many.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolUse {
    /// Not in use.
    pub free: usize,
    /// In all.
    pub total: usize,
}

impl<H: Hypervisor> Pools<H> {
    /// `small` buffers of 4 KiB and `large` ones of 64 KiB, or as many as there is memory for.
    #[must_use]
    pub fn new(hv: &H, small: NonZeroUsize, large: NonZeroUsize) -> Self {
        Self {
            small: FramePool::new(hv, small, NonZeroUsize::MIN),
            large: FramePool::new(hv, large, LARGE),
        }
    }

    /// An empty packet of `len` bytes, whose bytes are whatever the buffer held last. `None` when no buffer of the right
    /// size is free.
    #[must_use]
    pub fn packet(&self, len: usize, now: Instant) -> Option<Packet<H>> {
        let pool = if len <= PAGE_SIZE { &self.small } else { &self.large };
        let frame = pool.take()?;
        let len = len.min(frame.size());
        Some(Packet {
            frame,
            len,
            checksum: Checksum::default(),
            gso: None,
            flow: Flow::default(),
            arrived: now,
        })
    }

    /// A packet of its own with the same contents.
    #[must_use]
    pub fn duplicate(&self, packet: &Packet<H>) -> Option<Packet<H>> {
        let mut copy = self.packet(packet.len(), packet.arrived)?;
        for (to, from) in copy.bytes_mut().iter_mut().zip(packet.bytes()) {
            *to = *from;
        }
        (copy.checksum, copy.gso, copy.flow) = (packet.checksum, packet.gso, packet.flow);
        Some(copy)
    }

    /// How many buffers of the packet's size are free.
    pub(crate) fn free_like(&self, packet: &Packet<H>) -> usize {
        if packet.is_large() { self.large.free() } else { self.small.free() }
    }

    /// Use of the 4 KiB buffers.
    #[must_use]
    pub fn small(&self) -> PoolUse {
        PoolUse { free: self.small.free(), total: self.small.total() }
    }

    /// Use of the 64 KiB buffers.
    #[must_use]
    pub fn large(&self) -> PoolUse {
        PoolUse { free: self.large.free(), total: self.large.total() }
    }
}

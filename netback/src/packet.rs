//! A packet on its way through the backend: private bytes in one piece, and what is still to be done to them.

use core::fmt;
use core::mem;
use core::num::NonZeroUsize;
use core::ops::{Deref, DerefMut};

use grant::{BufferSize, Frame, FramePool, SharedMemory, SpanMut};
use hypercall::{Gfn, Hypervisor, Instant, PAGE_SIZE};
use netif::offload::{Checksum, Gso};
use netif::tx::PacketHash;

use crate::datapath::Datapath;
use crate::dma::{DmaPiece, DmaRule, OwnRule};
use crate::lent::{LentPage, Loan, Origin, Token};

/// Pages in a large buffer: the largest packet the protocol can describe, 65,535 bytes.
const LARGE: BufferSize = BufferSize::Pages(NonZeroUsize::MIN.saturating_add(15));

/// Which flow a packet belongs to, as far as order matters: packets of one flow have the same number. It is the number
/// of the queue that the packet came from, whose sender keeps each flow in one queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flow(pub u16);

/// Bytes of a packet that are always in memory of ours, as far as it has as many: every header that matters.
pub(crate) const HEADER: usize = 128;

/// Where the bytes are that are not in memory of ours.
pub(crate) enum Rest<H: Hypervisor> {
    /// There are none.
    None,
    /// In pages that nobody has looked into.
    Taken(Token<H>),
    /// In pages that are mapped.
    Lent(Loan<H>),
}

/// A packet: its headers, and often all of it, in memory that no peer can see. Packets are moved about a lot, so what is
/// known of one stays with its buffer, and this is one pointer to both.
pub struct Packet<H: Hypervisor>(Frame<H, Label<H>>);

/// What is known of a packet.
pub struct Label<H: Hypervisor> {
    /// Bytes in the frame.
    private: u32,
    len: u32,
    pub(crate) rest: Rest<H>,
    /// How its bytes are carried.
    pub(crate) path: Datapath,
    /// While its rest is [taken](Rest::Taken): how many pieces its sender's are in, with the private bytes; 0 if they are not to be
    /// kept as they are.
    pub(crate) pieces: u8,
    /// The queue of the vif that it goes to.
    pub(crate) to_queue: u16,
    /// The state of its checksum.
    pub checksum: Checksum,
    /// Whether and how it is to be segmented.
    pub gso: Option<Gso>,
    /// Its hash, where the frontend that gets it asked for one.
    pub hash: Option<PacketHash>,
    /// Its flow.
    pub flow: Flow,
    /// When it came.
    pub arrived: Instant,
}

impl<H: Hypervisor> Label<H> {
    /// Forgets the packet before, which has left nothing in `rest`.
    fn begin(&mut self, len: usize, now: Instant) {
        (self.private, self.len) = (small(len), small(len));
        (self.path, self.pieces) = (Datapath::Copy, 0);
        (self.to_queue, self.flow) = (0, Flow::default());
        (self.checksum, self.gso, self.hash) = (Checksum::default(), None, None);
        self.arrived = now;
    }
}

impl<H: Hypervisor> Default for Label<H> {
    fn default() -> Self {
        Self {
            private: 0,
            len: 0,
            rest: Rest::None,
            path: Datapath::Copy,
            pieces: 0,
            to_queue: 0,
            checksum: Checksum::default(),
            gso: None,
            hash: None,
            flow: Flow::default(),
            arrived: Instant::default(),
        }
    }
}

impl<H: Hypervisor> Deref for Packet<H> {
    type Target = Label<H>;

    fn deref(&self) -> &Label<H> {
        self.0.label()
    }
}

impl<H: Hypervisor> DerefMut for Packet<H> {
    fn deref_mut(&mut self) -> &mut Label<H> {
        self.0.label_mut()
    }
}

impl<H: Hypervisor> Drop for Packet<H> {
    fn drop(&mut self) {
        // The label stays with the buffer, and what it holds may be wanted elsewhere.
        let rest = &mut self.rest;
        if !matches!(rest, Rest::None) {
            *rest = Rest::None;
        }
    }
}

impl<H: Hypervisor> Packet<H> {
    /// The bytes that are in memory of ours: an Ethernet frame without trailer. All of them, unless the packet is
    /// [mapped](Self::is_lent) or goes from guest to guest: then the first 128.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.bytes().get(..self.private()).unwrap_or_default()
    }

    /// Its private bytes, to change.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let private = self.private();
        self.0.bytes_mut().get_mut(..private).unwrap_or_default()
    }

    fn private(&self) -> usize {
        self.private as usize
    }

    /// How many bytes it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether [`bytes`](Self::bytes) are all.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.private == self.len
    }

    /// Whether some of it is in pages that its sender granted and we have mapped.
    #[must_use]
    pub fn is_lent(&self) -> bool {
        matches!(self.rest, Rest::Lent(_))
    }

    /// How its bytes were carried.
    #[must_use]
    pub fn path(&self) -> Datapath {
        self.path
    }

    /// Whether its buffer is one of 64 KiB.
    pub(crate) fn is_large(&self) -> bool {
        self.0.size() > PAGE_SIZE
    }

    pub(crate) fn frame(&self) -> &Frame<H, Label<H>> {
        &self.0
    }

    pub(crate) fn frame_mut(&mut self) -> &mut Frame<H, Label<H>> {
        &mut self.0
    }

    /// Makes it shorter, or as long as its buffer allows.
    pub(crate) fn set_len(&mut self, len: usize) {
        self.len = small(len.min(self.0.size()));
        self.private = self.len;
    }

    /// Says that the bytes of the frame are but the first of `len`.
    pub(crate) fn set_total(&mut self, len: usize) {
        self.len = small(len).max(self.private);
    }

    /// Moves what is private to a buffer that has room for all of it; `None`, and nothing changed, if none is free. Answers
    /// what is still to be filled in: everything from the first byte that it returns.
    pub(crate) fn grow(&mut self, pools: &Pools<H>) -> Option<usize> {
        let filled = self.private();
        if self.0.size() < self.len() {
            let mut frame = pools.frame(self.len())?;
            for (to, from) in frame.bytes_mut().iter_mut().zip(self.bytes()) {
                *to = *from;
            }
            mem::swap(frame.label_mut(), self);
            self.0 = frame;
        }
        Some(filled)
    }

    /// All of it is in the frame now.
    pub(crate) fn is_filled(&mut self) {
        self.private = self.len;
        self.rest = Rest::None;
    }

    /// Copies what is mapped into memory of ours, and gives the pages back; `false`, and nothing changed, if no buffer is
    /// free, or if this is not a packet that [`Backend::receive_local`](crate::Backend::receive_local) or
    /// [`receive_uplink`](crate::Backend::receive_uplink) gave.
    pub fn make_whole(&mut self, pools: &Pools<H>) -> bool {
        if self.is_whole() {
            return true;
        }
        if !self.is_lent() {
            return false;
        }
        let Some(at) = self.grow(pools) else { return false };
        let (bytes, label) = self.0.parts_mut();
        let Rest::Lent(loan) = &label.rest else { return false };
        let Some(to) = bytes.get_mut(at..label.len as usize) else { return false };
        if !read_lent(loan.pages(), 0, to) {
            return false;
        }
        self.is_filled();
        true
    }

    /// Reads its bytes from `at` on, wherever they are; `false`, and `to` holds anything, if it has not as many or nobody may
    /// look at them. What is [mapped](Self::is_lent) its sender can change between two readings.
    #[must_use]
    pub fn read(&self, at: usize, to: &mut [u8]) -> bool {
        let private = self.bytes().get(at..).unwrap_or_default();
        let (first, rest) = to.split_at_mut(private.len().min(to.len()));
        for (to, from) in first.iter_mut().zip(private) {
            *to = *from;
        }
        match &self.rest {
            _ if rest.is_empty() => true,
            Rest::Lent(loan) => read_lent(loan.pages(), at.saturating_sub(self.private()), rest),
            Rest::None | Rest::Taken(_) => false,
        }
    }

    /// The mapped part, for a device that reads by bus address; it follows the [private](Self::bytes) bytes. Of a packet
    /// that is not mapped there is none. `None` if the rule has no address for a page: one that cleans by the identity
    /// mapping has none for a packet that was mapped without.
    pub fn dma(&self, rule: DmaRule) -> impl Iterator<Item = Option<DmaPiece>> {
        let pages = match &self.rest {
            Rest::Lent(loan) => loan.pages(),
            Rest::None | Rest::Taken(_) => &[],
        };
        let holds = !rule.needs_identity() || self.path == Datapath::MapIdentity;
        let rule = holds.then_some(rule);
        pages.iter().map(move |lent| DmaPiece::of(rule?, &lent.page, lent.offset, lent.len))
    }

    /// The [private](Self::bytes) part, for a device that reads or writes by bus address, a page at a time. `None` for a page
    /// that is not within reach of any address.
    pub fn dma_own(&self, rule: OwnRule) -> impl Iterator<Item = Option<DmaPiece>> {
        let (Gfn(first), offset) = (self.0.gfn(), self.0.offset());
        // Only a buffer within one page begins behind the start of its page.
        (0..self.private().div_ceil(PAGE_SIZE)).map(move |index| {
            let left = self.private().checked_sub(index.checked_mul(PAGE_SIZE)?)?;
            let len = u16::try_from(left.min(PAGE_SIZE)).ok()?;
            let frame = first.checked_add(u64::try_from(index).ok()?)?;
            Some(DmaPiece::own(rule, Gfn(frame), offset, len))
        })
    }

    /// Who lent it pages, and when.
    pub(crate) fn lent_by(&self) -> Option<(Origin, Instant)> {
        match &self.rest {
            Rest::Lent(loan) => loan.origin().zip(loan.since()),
            Rest::None | Rest::Taken(_) => None,
        }
    }

    /// The part of the frame that is still to be filled, and what says with what. `None` if there is nothing to fill.
    pub(crate) fn unfilled(&mut self) -> Option<(SpanMut<'_>, &Token<H>)> {
        let (whole, label) = self.0.split_mut();
        let Rest::Taken(token) = &label.rest else { return None };
        let whole = whole.split_at(label.len as usize).0;
        Some((whole.split_at(label.private as usize).1, token))
    }

    /// The duty to answer for it, if it is open.
    pub(crate) fn take_token(&mut self) -> Option<Token<H>> {
        let rest = &mut self.rest;
        if !matches!(rest, Rest::Taken(_)) {
            return None;
        }
        match mem::replace(rest, Rest::None) {
            Rest::Taken(token) => Some(token),
            Rest::None | Rest::Lent(_) => None,
        }
    }
}

impl<H: Hypervisor> fmt::Debug for Packet<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packet({} bytes, {:?}, {:?})", self.len, self.checksum, self.gso)
    }
}

/// A length of bytes as it is kept: buffers have 64 KiB at most.
fn small(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Reads bytes of mapped pages, behind the first `skip`; `false` if there are not as many.
fn read_lent<H: Hypervisor>(pages: &[LentPage<H>], mut skip: usize, mut to: &mut [u8]) -> bool {
    for lent in pages {
        let len = usize::from(lent.len);
        let passed = skip.min(len);
        skip -= passed;
        let (part, rest) = to.split_at_mut((len - passed).min(to.len()));
        lent.page.read_bytes(usize::from(lent.offset) + passed, part);
        to = rest;
    }
    to.is_empty()
}

/// The buffers that all packets live in. Fixed in number: when all of a size are out, senders wait.
#[derive(Clone, Debug)]
pub struct Pools<H: Hypervisor> {
    tiny: FramePool<H, Label<H>>,
    small: FramePool<H, Label<H>>,
    large: FramePool<H, Label<H>>,
}

/// How many of a pool's buffers are free, of how many.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PoolUse {
    /// Not in use.
    pub free: usize,
    /// In all.
    pub total: usize,
}

impl PoolUse {
    fn of<H: Hypervisor>(pool: &FramePool<H, Label<H>>) -> Self {
        Self { free: pool.free(), total: pool.total() }
    }

    /// In use.
    #[must_use]
    pub fn out(&self) -> usize {
        self.total - self.free
    }
}

impl<H: Hypervisor> Pools<H> {
    /// `small` buffers of 4 KiB, as many of 256 bytes, and `large` ones of 64 KiB, or as many as there is memory for.
    #[must_use]
    pub fn new(hv: &H, small: NonZeroUsize, large: NonZeroUsize) -> Self {
        Self {
            tiny: FramePool::labelled(hv, small, BufferSize::Part),
            small: FramePool::labelled(hv, small, BufferSize::PAGE),
            large: FramePool::labelled(hv, large, LARGE),
        }
    }

    /// An empty packet of `len` bytes, whose bytes are whatever the buffer held last. `None` when no buffer of the right
    /// size is free.
    #[must_use]
    pub fn packet(&self, len: usize, now: Instant) -> Option<Packet<H>> {
        let mut frame = self.frame(len)?;
        let len = len.min(frame.size());
        frame.label_mut().begin(len, now);
        Some(Packet(frame))
    }

    fn frame(&self, len: usize) -> Option<Frame<H, Label<H>>> {
        self.pool(len).take()
    }

    /// The pool of the smallest buffers that so many bytes fit into.
    fn pool(&self, len: usize) -> &FramePool<H, Label<H>> {
        if len <= BufferSize::PART {
            &self.tiny
        } else if len <= PAGE_SIZE {
            &self.small
        } else {
            &self.large
        }
    }

    /// A packet of its own with the same contents. `None` if there is no buffer, or not all of it is in memory of ours.
    #[must_use]
    pub fn duplicate(&self, packet: &Packet<H>) -> Option<Packet<H>> {
        if !packet.is_whole() {
            return None;
        }
        let mut copy = self.packet(packet.len(), packet.arrived)?;
        for (to, from) in copy.bytes_mut().iter_mut().zip(packet.bytes()) {
            *to = *from;
        }
        (copy.checksum, copy.gso) = (packet.checksum, packet.gso);
        (copy.flow, copy.path) = (packet.flow, packet.path);
        Some(copy)
    }

    /// How many buffers of the packet's size are free.
    pub(crate) fn free_like(&self, packet: &Packet<H>) -> usize {
        self.pool(packet.0.size()).free()
    }

    /// Whether enough buffers of the packet's size are free for it to wait: the last eighth is for packets that go on at once.
    pub(crate) fn can_spare(&self, packet: &Packet<H>) -> bool {
        let pool = self.pool(packet.0.size());
        pool.free() >= pool.total() / 8
    }

    /// Whether there is one of each size.
    pub(crate) fn any_of_each(&self) -> bool {
        [&self.tiny, &self.small, &self.large].into_iter().all(|pool| pool.free() > 0)
    }

    /// Use of the buffers of 256 bytes.
    #[must_use]
    pub fn tiny(&self) -> PoolUse {
        PoolUse::of(&self.tiny)
    }

    /// Use of the 4 KiB buffers.
    #[must_use]
    pub fn small(&self) -> PoolUse {
        PoolUse::of(&self.small)
    }

    /// Use of the 64 KiB buffers.
    #[must_use]
    pub fn large(&self) -> PoolUse {
        PoolUse::of(&self.large)
    }

    /// Use of all buffers.
    #[must_use]
    pub fn all(&self) -> PoolUse {
        let each = [self.tiny(), self.small(), self.large()];
        each.into_iter().fold(PoolUse::default(), |sum, pool| PoolUse {
            free: sum.free + pool.free,
            total: sum.total + pool.total,
        })
    }
}

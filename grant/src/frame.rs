//! Private buffers that no peer can see, and a pool of them.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::fmt;
use core::num::NonZeroUsize;
use core::ptr::NonNull;
use core::slice;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hypercall::{Gfn, Hypervisor, PAGE_SIZE, PageOffset};

use crate::span::{Extent, Page, Span, SpanMut};

/// How large a pool's buffers are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BufferSize {
    /// [`PART`](Self::PART) bytes, several in a page: Xen looks a page of ours up once for all copies of a hypercall that follow
    /// one another and touch it.
    Part,
    /// So many adjacent pages.
    Pages(NonZeroUsize),
}

impl BufferSize {
    /// A whole page.
    pub const PAGE: Self = Self::Pages(NonZeroUsize::MIN);
    /// How many bytes a part of a page has.
    pub const PART: usize = 256;

    fn bytes(self) -> usize {
        match self {
            Self::Part => Self::PART,
            Self::Pages(count) => count.get().saturating_mul(PAGE_SIZE),
        }
    }

    /// How many pages are allocated at once.
    fn pages(self) -> NonZeroUsize {
        match self {
            Self::Part => NonZeroUsize::MIN,
            Self::Pages(count) => count,
        }
    }
}

/// Where the stack of free buffers ends.
const BOTTOM: u32 = 0xffff;
/// Buffers of a pool at most: each has a number that is not [`BOTTOM`], and all of them and the pool can be counted in as many bits.
const MAX: usize = 0xfffe;
/// One more that is out.
const OUT: u64 = 1 << 16;
/// One more change.
const CHANGE: u64 = 1 << 32;

/// The number of the buffer on top.
const fn top(head: u64) -> u32 {
    head as u32 & 0xffff
}

/// How many are out: frames, and the pool while it has a handle.
const fn out(head: u64) -> u64 {
    (head / OUT) & 0xffff
}

const fn with_top(head: u64, top: u32) -> u64 {
    (head & !0xffff) | top as u64
}

/// A buffer, and what its holder notes with it.
struct Slot<H: Hypervisor, T> {
    place: Extent,
    number: u32,
    /// The number of the free buffer below this one.
    below: AtomicU32,
    pool: NonNull<Shared<H, T>>,
    label: UnsafeCell<T>,
}

/// A pool's buffers; the free ones are a stack, so that what is handed out is what was used last and is in the caches.
///
/// Its head is one number: how often it changed, how many are out, and the number of the buffer on top. Without the first,
/// a buffer that was taken and came back between another's look and its exchange would look as if it had never gone. Who makes
/// the second 0 is the last to know of the pool, and frees it.
struct Shared<H: Hypervisor, T> {
    hv: H,
    head: AtomicU64,
    slots: Vec<Slot<H, T>>,
    size: BufferSize,
}

impl<H: Hypervisor, T> Shared<H, T> {
    fn take(&self) -> Option<NonNull<Slot<H, T>>> {
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let slot = self.slots.get(top(head) as usize)?;
            let next = with_top(head, slot.below.load(Ordering::Relaxed));
            let next = next.wrapping_add(CHANGE + OUT);
            // Acquire: what its last holder did with it is done.
            match self.head.compare_exchange_weak(head, next, Ordering::Acquire, Ordering::Acquire)
            {
                Ok(_) => return Some(NonNull::from(slot)),
                Err(now) => head = now,
            }
        }
    }

    /// # Safety
    /// Nobody else knows of the pool any more, and all its buffers came back.
    unsafe fn free(shared: NonNull<Self>) {
        // SAFETY: it was made of a box, and the caller is the last that has it.
        let shared = unsafe { Box::from_raw(shared.as_ptr()) };
        for Slot { place, .. } in &shared.slots {
            if place.offset() == PageOffset::ZERO {
                // SAFETY: allocated by this count in `FramePool::labelled`, and no frame is out.
                unsafe { shared.hv.free_pages(place.first().base, shared.size.pages()) };
            }
        }
    }
}

/// A buffer comes back. True for whoever is the last to know of the pool: anybody else may find it gone afterwards, so this is
/// given no more of it than numbers.
fn give_back(shared: &AtomicU64, number: u32, below: &AtomicU32) -> bool {
    let mut head = shared.load(Ordering::Relaxed);
    loop {
        below.store(top(head), Ordering::Relaxed);
        let next = with_top(head, number).wrapping_add(CHANGE - OUT);
        // Release: what was done with it is done for who takes it next; acquire, for who frees it.
        match shared.compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return out(next) == 0,
            Err(now) => head = now,
        }
    }
}

/// The handles of a pool.
struct Handle<H: Hypervisor, T>(NonNull<Shared<H, T>>);

// SAFETY: what is shared of a pool is its head and the numbers, which are atomic, and a label is its frame's; a pool that
// goes takes its labels with it.
unsafe impl<H: Hypervisor, T: Send> Send for Handle<H, T> {}
// SAFETY: as above.
unsafe impl<H: Hypervisor, T: Send> Sync for Handle<H, T> {}

impl<H: Hypervisor, T> Handle<H, T> {
    fn shared(&self) -> &Shared<H, T> {
        // SAFETY: a pool with a handle is not freed.
        unsafe { self.0.as_ref() }
    }
}

impl<H: Hypervisor, T> Drop for Handle<H, T> {
    fn drop(&mut self) {
        // The top stays, so no look at it is made wrong by this.
        let before = self.shared().head.fetch_sub(OUT, Ordering::AcqRel);
        if out(before) == 1 {
            // SAFETY: no frame is out, and no handle is left to take one.
            unsafe { Shared::free(self.0) };
        }
    }
}

/// A fixed number of private buffers, handed out as [`Frame`]s; never grows. With each goes a `T`, in which its
/// holder notes what belongs to it: what is moved about is then small.
pub struct FramePool<H: Hypervisor, T = ()>(Arc<Handle<H, T>>);

impl<H: Hypervisor, T> Clone for FramePool<H, T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<H: Hypervisor> FramePool<H> {
    /// `count` buffers (65,534 at most) of this size, or as many as there is memory for: see [`total`](Self::total).
    #[must_use]
    pub fn new(hv: &H, count: NonZeroUsize, size: BufferSize) -> Self {
        Self::labelled(hv, count, size)
    }
}

impl<H: Hypervisor, T: Default> FramePool<H, T> {
    /// As [`new`](FramePool::new), with a label for each.
    #[must_use]
    pub fn labelled(hv: &H, count: NonZeroUsize, size: BufferSize) -> Self {
        let count = count.get().min(MAX);
        let shared = Shared { hv: hv.clone(), head: AtomicU64::new(0), slots: Vec::new(), size };
        let mut pool = NonNull::from(Box::leak(Box::new(shared)));
        let mut slots = Vec::with_capacity(count);
        let mut top = BOTTOM;
        let mut left = None;
        for number in (0..).take(count) {
            let place = left.filter(|left: &Extent| left.len() >= size.bytes()).or_else(|| {
                let base = hv.alloc_pages(size.pages())?;
                let first = Page { base, gfn: hv.virt_to_gfn(base) };
                Some(Extent::whole(first, size.pages().get().saturating_mul(PAGE_SIZE)))
            });
            let Some((place, rest)) = place.map(|place| place.split_at(size.bytes())) else {
                break;
            };
            left = Some(rest);
            slots.push(Slot {
                place,
                number,
                below: AtomicU32::new(top),
                pool,
                label: UnsafeCell::default(),
            });
            top = number;
        }
        // SAFETY: made above, and nobody else knows of it yet.
        let shared = unsafe { pool.as_mut() };
        shared.slots = slots;
        // The pool itself is out.
        shared.head = AtomicU64::new(with_top(OUT, top));
        Self(Arc::new(Handle(pool)))
    }
}

impl<H: Hypervisor, T> FramePool<H, T> {
    /// A frame, with whatever its last user left in it and in its label. `None` when all are out.
    #[must_use]
    pub fn take(&self) -> Option<Frame<H, T>> {
        self.0.shared().take().map(Frame)
    }

    /// Frames not handed out.
    #[must_use]
    pub fn free(&self) -> usize {
        let out = out(self.0.shared().head.load(Ordering::Relaxed)) as usize;
        (self.total() + 1).saturating_sub(out)
    }

    /// Frames there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.0.shared().slots.len()
    }
}

impl<H: Hypervisor, T> fmt::Debug for FramePool<H, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FramePool({} of {} free)", self.free(), self.total())
    }
}

/// A private buffer and its label; goes back to its pool when dropped. It is one pointer, so moving it costs
/// nothing.
pub struct Frame<H: Hypervisor, T = ()>(NonNull<Slot<H, T>>);

// SAFETY: a frame is the only one of its slot, so sending it sends the buffer and the label.
unsafe impl<H: Hypervisor, T: Send> Send for Frame<H, T> {}
// SAFETY: who shares a frame can read the buffer, and the label as `&T`.
unsafe impl<H: Hypervisor, T: Sync> Sync for Frame<H, T> {}

impl<H: Hypervisor, T> Frame<H, T> {
    fn slot(&self) -> &Slot<H, T> {
        // SAFETY: a pool of which a frame is out is not freed.
        unsafe { self.0.as_ref() }
    }

    /// How many bytes it has.
    #[must_use]
    pub fn size(&self) -> usize {
        self.slot().place.len()
    }

    /// The first of its frames; the others follow.
    #[must_use]
    pub fn gfn(&self) -> Gfn {
        self.slot().place.first().gfn
    }

    /// Where in the first it begins.
    #[must_use]
    pub fn offset(&self) -> PageOffset {
        self.slot().place.offset()
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: these pages are ours, were zeroed when allocated, and are never granted; Xen writes them only
        // in `CopyBatch::submit`, which holds a unique borrow.
        unsafe { slice::from_raw_parts(self.slot().place.as_ptr(), self.size()) }
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { slice::from_raw_parts_mut(self.slot().place.as_ptr(), self.size()) }
    }

    /// What was noted with it.
    #[must_use]
    pub fn label(&self) -> &T {
        // SAFETY: of a slot that is out there is one frame, and this borrows it.
        unsafe { &*self.slot().label.get() }
    }

    /// What was noted with it, to change.
    pub fn label_mut(&mut self) -> &mut T {
        // SAFETY: as above, and the borrow is unique.
        unsafe { &mut *self.slot().label.get() }
    }

    /// The buffer as something to copy out of.
    #[must_use]
    pub fn span(&self) -> Span<'_> {
        Span::new(self.slot().place)
    }

    /// The buffer as something to copy into.
    pub fn span_mut(&mut self) -> SpanMut<'_> {
        self.split_mut().0
    }

    /// The buffer as something to copy into, and what was noted with it.
    pub fn split_mut(&mut self) -> (SpanMut<'_>, &mut T) {
        let slot = self.slot();
        // SAFETY: as in `label_mut`. The buffer is no part of the label.
        let label = unsafe { &mut *slot.label.get() };
        (SpanMut::new(slot.place), label)
    }

    /// Its bytes and what was noted with it, to change.
    pub fn parts_mut(&mut self) -> (&mut [u8], &mut T) {
        let slot = self.slot();
        // SAFETY: as in `bytes_mut` and `label_mut`. The buffer is no part of the label.
        unsafe {
            let bytes = slice::from_raw_parts_mut(slot.place.as_ptr(), slot.place.len());
            (bytes, &mut *slot.label.get())
        }
    }
}

impl<H: Hypervisor, T> Drop for Frame<H, T> {
    fn drop(&mut self) {
        let slot = self.slot();
        let pool = slot.pool;
        // SAFETY: a pool of which a frame is out is not freed.
        let head = unsafe { &pool.as_ref().head };
        if give_back(head, slot.number, &slot.below) {
            // SAFETY: no other frame is out, and there is no handle to take one.
            unsafe { Shared::free(pool) };
        }
    }
}

impl<H: Hypervisor, T> fmt::Debug for Frame<H, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({} + {})", self.gfn(), self.offset().get())
    }
}

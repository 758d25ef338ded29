//! Private pages: packet buffers that no peer can see, and a pool of them.

use alloc::sync::Arc;
use core::fmt;
use core::marker::PhantomData;
use core::num::NonZeroUsize;
use core::ptr::NonNull;
use core::slice;

use crossbeam_queue::ArrayQueue;
use hypercall::{Gfn, Hypervisor, PAGE_SIZE};

const ONE: NonZeroUsize = NonZeroUsize::MIN;

#[derive(Clone, Copy)]
struct Page {
    base: NonNull<u8>,
    gfn: Gfn,
}

// SAFETY: a `Page` stands for its memory, which has one owner at a time: the pool or a `Frame`.
unsafe impl Send for Page {}

struct Shared<H: Hypervisor> {
    hv: H,
    free: ArrayQueue<Page>,
    total: usize,
}

impl<H: Hypervisor> Drop for Shared<H> {
    fn drop(&mut self) {
        while let Some(page) = self.free.pop() {
            // SAFETY: allocated one by one in `FramePool::new`; each frame holds the pool, so none is out.
            unsafe { self.hv.free_pages(page.base, ONE) };
        }
    }
}

/// A fixed number of private pages, handed out as [`Frame`]s; never grows.
pub struct FramePool<H: Hypervisor>(Arc<Shared<H>>);

impl<H: Hypervisor> Clone for FramePool<H> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<H: Hypervisor> FramePool<H> {
    /// `count` pages, or as many as there is memory for: see [`total`](Self::total).
    #[must_use]
    pub fn new(hv: &H, count: NonZeroUsize) -> Self {
        let free = ArrayQueue::new(count.get());
        let mut total = 0;
        while total < count.get() {
            let Some(base) = hv.alloc_pages(ONE) else { break };
            let page = Page { base, gfn: hv.virt_to_gfn(base) };
            if free.push(page).is_err() {
                break;
            }
            total += 1;
        }
        Self(Arc::new(Shared { hv: hv.clone(), free, total }))
    }

    /// A frame, with whatever its last user left in it. `None` when all are out.
    #[must_use]
    pub fn take(&self) -> Option<Frame<H>> {
        self.0.free.pop().map(|page| Frame { page, pool: Arc::clone(&self.0) })
    }

    /// Frames not handed out.
    #[must_use]
    pub fn free(&self) -> usize {
        self.0.free.len()
    }

    /// Frames there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.0.total
    }
}

impl<H: Hypervisor> fmt::Debug for FramePool<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FramePool({} of {} free)", self.free(), self.total())
    }
}

/// A private page; goes back to its pool when dropped.
pub struct Frame<H: Hypervisor> {
    page: Page,
    pool: Arc<Shared<H>>,
}

impl<H: Hypervisor> Frame<H> {
    /// Its bytes, [`PAGE_SIZE`] of them.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the page is ours, was zeroed when allocated, and is never granted; Xen writes it only in
        // `CopyBatch::submit`, which holds a unique borrow.
        unsafe { slice::from_raw_parts(self.page.base.as_ptr(), PAGE_SIZE) }
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { slice::from_raw_parts_mut(self.page.base.as_ptr(), PAGE_SIZE) }
    }

    /// The page as something to copy out of.
    #[must_use]
    pub fn span(&self) -> Span<'_> {
        Span { gfn: self.page.gfn, offset: 0, len: PAGE_SIZE as u16, borrow: PhantomData }
    }

    /// The page as something to copy into.
    pub fn span_mut(&mut self) -> SpanMut<'_> {
        SpanMut { gfn: self.page.gfn, offset: 0, len: PAGE_SIZE as u16, borrow: PhantomData }
    }
}

impl<H: Hypervisor> Drop for Frame<H> {
    fn drop(&mut self) {
        // The queue was made as large as the number of pages, so there is room.
        let _ = self.pool.free.push(self.page);
    }
}

impl<H: Hypervisor> fmt::Debug for Frame<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({})", self.page.gfn)
    }
}

/// Part of a private page, to copy out of; borrows the frame for as long as Xen may read it.
#[derive(Clone, Copy, Debug)]
pub struct Span<'f> {
    gfn: Gfn,
    offset: u16,
    len: u16,
    borrow: PhantomData<&'f [u8]>,
}

/// Part of a private page, to copy into; borrows the frame for as long as Xen may write it.
#[derive(Debug)]
pub struct SpanMut<'f> {
    gfn: Gfn,
    offset: u16,
    len: u16,
    borrow: PhantomData<&'f mut [u8]>,
}

/// Where the part begins once `at` bytes are taken off a part of `len`, and how long both are.
fn split(offset: u16, len: u16, at: usize) -> (u16, u16, u16) {
    let first = u16::try_from(at).unwrap_or(len).min(len);
    (first, offset.saturating_add(first), len.saturating_sub(first))
}

impl<'f> Span<'f> {
    /// The first `at` bytes (or all there are), and the rest.
    #[must_use]
    pub fn split_at(self, at: usize) -> (Span<'f>, Span<'f>) {
        let (first, offset, len) = split(self.offset, self.len, at);
        (Span { len: first, ..self }, Span { offset, len, ..self })
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len.into()
    }

    /// Whether nothing is left of it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn place(&self) -> (Gfn, u16, u16) {
        (self.gfn, self.offset, self.len)
    }
}

impl<'f> SpanMut<'f> {
    /// The first `at` bytes (or all there are), and the rest.
    #[must_use]
    pub fn split_at(self, at: usize) -> (SpanMut<'f>, SpanMut<'f>) {
        let (first, offset, len) = split(self.offset, self.len, at);
        let Self { gfn, offset: start, borrow, .. } = self;
        (SpanMut { gfn, offset: start, len: first, borrow }, SpanMut { gfn, offset, len, borrow })
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len.into()
    }

    /// Whether nothing is left of it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn place(&self) -> (Gfn, u16, u16) {
        (self.gfn, self.offset, self.len)
    }
}

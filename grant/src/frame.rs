//! Private pages: packet buffers that no peer can see, and a pool of them.

use alloc::sync::Arc;
use core::fmt;
use core::marker::PhantomData;
use core::num::NonZeroUsize;
use core::ptr::NonNull;
use core::slice;

use crossbeam_queue::ArrayQueue;
use hypercall::{Gfn, Hypervisor, PAGE_SIZE};

/// A private page, or the first of several: where we see it, and where Xen does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    pub(crate) base: NonNull<u8>,
    pub(crate) gfn: Gfn,
}

// SAFETY: a `Page` stands for its memory, which has one owner at a time, the pool or a `Frame`; only under a borrow of
// the frame is it looked at.
unsafe impl Send for Page {}
// SAFETY: as above; whoever shares a frame can only read it.
unsafe impl Sync for Page {}

struct Shared<H: Hypervisor> {
    hv: H,
    free: ArrayQueue<Page>,
    pages: NonZeroUsize,
    total: usize,
}

impl<H: Hypervisor> Drop for Shared<H> {
    fn drop(&mut self) {
        while let Some(page) = self.free.pop() {
            // SAFETY: allocated by this count in `FramePool::new`; each frame holds the pool, so none is out.
            unsafe { self.hv.free_pages(page.base, self.pages) };
        }
    }
}

/// A fixed number of private buffers of a page or more, handed out as [`Frame`]s; never grows.
pub struct FramePool<H: Hypervisor>(Arc<Shared<H>>);

impl<H: Hypervisor> Clone for FramePool<H> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<H: Hypervisor> FramePool<H> {
    /// `count` buffers of `pages` adjacent pages, or as many as there is memory for: see [`total`](Self::total).
    #[must_use]
    pub fn new(hv: &H, count: NonZeroUsize, pages: NonZeroUsize) -> Self {
        let free = ArrayQueue::new(count.get());
        let mut total = 0;
        while total < count.get() {
            let Some(base) = hv.alloc_pages(pages) else { break };
            let page = Page { base, gfn: hv.virt_to_gfn(base) };
            if free.push(page).is_err() {
                break;
            }
            total += 1;
        }
        Self(Arc::new(Shared { hv: hv.clone(), free, pages, total }))
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

/// A private buffer of whole pages; goes back to its pool when dropped.
pub struct Frame<H: Hypervisor> {
    page: Page,
    pool: Arc<Shared<H>>,
}

impl<H: Hypervisor> Frame<H> {
    /// How many bytes it has.
    #[must_use]
    pub fn size(&self) -> usize {
        self.pool.pages.get().saturating_mul(PAGE_SIZE)
    }

    /// The first of its frames; the others follow.
    #[must_use]
    pub fn gfn(&self) -> Gfn {
        self.page.gfn
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: these pages are ours, were zeroed when allocated, and are never granted; Xen writes them only
        // in `CopyBatch::submit`, which holds a unique borrow.
        unsafe { slice::from_raw_parts(self.page.base.as_ptr(), self.size()) }
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { slice::from_raw_parts_mut(self.page.base.as_ptr(), self.size()) }
    }

    /// The buffer as something to copy out of.
    #[must_use]
    pub fn span(&self) -> Span<'_> {
        Span(Extent { first: self.page, offset: 0, len: self.size() }, PhantomData)
    }

    /// The buffer as something to copy into.
    pub fn span_mut(&mut self) -> SpanMut<'_> {
        SpanMut(Extent { first: self.page, offset: 0, len: self.size() }, PhantomData)
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

/// Bytes within adjacent private pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// The first page of the buffer.
    first: Page,
    offset: usize,
    len: usize,
}

impl Extent {
    fn split_at(self, at: usize) -> (Self, Self) {
        let at = at.min(self.len);
        (Self { len: at, ..self }, Self { offset: self.offset + at, len: self.len - at, ..self })
    }

    /// Takes off what lies in the first page: that page, where in there, and how many bytes. `None` when empty.
    pub(crate) fn next_page(&mut self) -> Option<(Page, u16, u16)> {
        let within = self.offset % PAGE_SIZE;
        let (head, rest) = self.split_at(PAGE_SIZE - within);
        if head.len == 0 {
            return None;
        }
        *self = rest;
        let index = head.offset / PAGE_SIZE;
        // SAFETY: an extent is part of its buffer, and this one has bytes, so the page that they begin in is too.
        let base = unsafe { self.first.base.add(index * PAGE_SIZE) };
        let page = Page { base, gfn: Gfn(self.first.gfn.0 + index as u64) };
        Some((page, within as u16, head.len as u16))
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// How many pages it touches.
    pub(crate) fn pages(&self) -> usize {
        if self.len == 0 { 0 } else { (self.offset % PAGE_SIZE + self.len).div_ceil(PAGE_SIZE) }
    }
}

/// Part of a private buffer, to copy out of; borrows it for as long as Xen may read it.
#[derive(Clone, Copy, Debug)]
pub struct Span<'f>(pub(crate) Extent, PhantomData<&'f [u8]>);

/// Part of a private buffer, to copy into; borrows it for as long as Xen may write it.
#[derive(Debug)]
pub struct SpanMut<'f>(pub(crate) Extent, PhantomData<&'f mut [u8]>);

impl<'f> Span<'f> {
    /// The first `at` bytes (or all there are), and the rest.
    #[must_use]
    pub fn split_at(self, at: usize) -> (Span<'f>, Span<'f>) {
        let (head, rest) = self.0.split_at(at);
        (Span(head, PhantomData), Span(rest, PhantomData))
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is left of it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'f> SpanMut<'f> {
    /// The first `at` bytes (or all there are), and the rest.
    #[must_use]
    pub fn split_at(self, at: usize) -> (SpanMut<'f>, SpanMut<'f>) {
        let (head, rest) = self.0.split_at(at);
        (SpanMut(head, PhantomData), SpanMut(rest, PhantomData))
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is left of it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

//! Private pages, and parts of them to copy out of or into.

use core::marker::PhantomData;
use core::ptr::NonNull;

use hypercall::{Gfn, PAGE_SIZE, PageOffset};

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

/// Bytes within adjacent private pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// The first page of the buffer.
    first: Page,
    offset: usize,
    len: usize,
}

impl Extent {
    /// A whole buffer.
    pub(crate) const fn whole(first: Page, len: usize) -> Self {
        Self { first, offset: 0, len }
    }

    /// Where it begins, for us.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        // SAFETY: an extent is part of its buffer.
        unsafe { self.first.base.add(self.offset) }.as_ptr()
    }

    /// The page that its buffer begins in.
    pub(crate) fn first(&self) -> Page {
        self.first
    }

    /// Where in its page it begins.
    pub(crate) fn offset(&self) -> PageOffset {
        PageOffset::new((self.offset % PAGE_SIZE) as u16).unwrap_or(PageOffset::ZERO)
    }

    pub(crate) fn split_at(self, at: usize) -> (Self, Self) {
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

    /// If it begins in its first page and ends there, and is not empty: that page, where in there, and how many bytes.
    #[inline]
    pub(crate) fn in_one_page(&self) -> Option<(Page, u16, u16)> {
        let inside = self.len > 0 && self.offset + self.len <= PAGE_SIZE;
        inside.then_some((self.first, self.offset as u16, self.len as u16))
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
    pub(crate) const fn new(extent: Extent) -> Self {
        Self(extent, PhantomData)
    }

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
    pub(crate) const fn new(extent: Extent) -> Self {
        Self(extent, PhantomData)
    }

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

//! Memory that somebody else can write at any moment.
//!
//! It is never a `&T` or a `&[u8]`: a reference promises the compiler that nobody else writes, and a compiler that
//! believes it may read twice. Here each read is one atomic load into a private value.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering, fence};

use hypercall::PAGE_SIZE;

/// A page shared with a peer: 1,024 words, each read or written atomically.
///
/// Byte offsets are taken modulo the page, and word offsets rounded down to a word, so that no offset can reach outside:
/// a peer's number that slipped through would read the wrong word of the peer's own page, nothing else. A trait, so
/// that the ring's algorithm runs unchanged under a model checker.
pub trait SharedMemory {
    /// One 32-bit word, in the machine's byte order.
    fn load_u32(&self, offset: usize, order: Ordering) -> u32;
    /// Writes one 32-bit word.
    fn store_u32(&self, offset: usize, value: u32, order: Ordering);
    /// `fence(SeqCst)`: what was stored before is visible before what is loaded after.
    fn fence(&self);
    /// Copies bytes out, each read once; stops at the end of the page.
    fn read_bytes(&self, offset: usize, to: &mut [u8]);
    /// Copies bytes in, each written once; stops at the end of the page.
    fn write_bytes(&self, offset: usize, from: &[u8]);
}

/// Atomic access to a page that somebody else can write. Does not own the page: its owner (a mapping, or a granted
/// page) lends it out.
#[derive(Debug)]
pub struct SharedPage {
    base: NonNull<u8>,
}

// SAFETY: every access is atomic, so it may come from any thread.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// # Safety
    /// `base` is aligned to a page and valid for atomic reads and writes of a page for as long as the value lives (for
    /// reads alone, if nothing is ever stored through it), and no reference to the page exists meanwhile.
    pub(crate) const unsafe fn new(base: NonNull<u8>) -> Self {
        Self { base }
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: the offset is within the page and a multiple of 4, the page is aligned and lives as long as `self`;
        // an `AtomicU32` may be written by others at any time.
        unsafe { self.base.add((offset % PAGE_SIZE) & !3).cast().as_ref() }
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: the offset is within the page, which lives as long as `self`; an `AtomicU8` may be written by others
        // at any time.
        unsafe { self.base.add(offset % PAGE_SIZE).cast().as_ref() }
    }

    fn room(offset: usize) -> usize {
        PAGE_SIZE.saturating_sub(offset)
    }
}

impl SharedMemory for SharedPage {
    #[inline]
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.word(offset).load(order)
    }

    #[inline]
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.word(offset).store(value, order);
    }

    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        for (at, to) in to.iter_mut().take(Self::room(offset)).enumerate() {
            *to = self.byte(offset + at).load(Ordering::Relaxed);
        }
    }

    fn write_bytes(&self, offset: usize, from: &[u8]) {
        for (at, &byte) in from.iter().take(Self::room(offset)).enumerate() {
            self.byte(offset + at).store(byte, Ordering::Relaxed);
        }
    }
}

impl<M: SharedMemory + ?Sized> SharedMemory for &M {
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        (**self).load_u32(offset, order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        (**self).store_u32(offset, value, order);
    }
    fn fence(&self) {
        (**self).fence();
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        (**self).read_bytes(offset, to);
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        (**self).write_bytes(offset, from);
    }
}

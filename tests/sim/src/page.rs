//! A page of the host's memory, as the machine and its domains access it.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use hypercall::PAGE_SIZE;

/// A page of the host, accessed through atomics alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    base: NonNull<u8>,
}

// SAFETY: every access is atomic, and the page outlives the machine's last handle.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// # Safety
    /// At `base` is a page, aligned to its size, that is accessed through atomics alone for as long as a handle to the machine
    /// lives.
    pub(crate) unsafe fn new(base: NonNull<u8>) -> Self {
        Self { base }
    }

    pub(crate) fn base(self) -> NonNull<u8> {
        self.base
    }

    fn at<T>(self, offset: usize) -> NonNull<T> {
        let within = (offset % PAGE_SIZE) & !(size_of::<T>() - 1);
        // SAFETY: rounded down to a multiple of the size, so a `T` there ends within the page.
        unsafe { self.base.add(within) }.cast()
    }

    pub(crate) fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: within the page, which is valid for as long as a handle to the machine lives.
        unsafe { self.at(offset).as_ref() }
    }

    pub(crate) fn half(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as above, and aligned by `at`.
        unsafe { self.at(offset).as_ref() }
    }

    pub(crate) fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as above, and aligned by `at`.
        unsafe { self.at(offset).as_ref() }
    }

    pub(crate) fn long(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as above, and aligned by `at`.
        unsafe { self.at(offset).as_ref() }
    }

    /// Copies bytes out, as many as there are up to the end of the page.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) {
        let len = to.len().min(PAGE_SIZE.saturating_sub(offset));
        let to = to.get_mut(..len).unwrap_or_default();
        let (head, rest) = to.split_at_mut((offset.wrapping_neg() % 8).min(len));
        let mut at = offset;
        for byte in head {
            *byte = self.byte(at).load(Ordering::Relaxed);
            at += 1;
        }
        let mut longs = rest.chunks_exact_mut(8);
        for long in &mut longs {
            long.copy_from_slice(&self.long(at).load(Ordering::Relaxed).to_ne_bytes());
            at += 8;
        }
        for byte in longs.into_remainder() {
            *byte = self.byte(at).load(Ordering::Relaxed);
            at += 1;
        }
    }

    /// Copies bytes in, as many as there is room for up to the end of the page.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        let len = from.len().min(PAGE_SIZE.saturating_sub(offset));
        let from = from.get(..len).unwrap_or_default();
        let (head, rest) = from.split_at((offset.wrapping_neg() % 8).min(len));
        let mut at = offset;
        for byte in head {
            self.byte(at).store(*byte, Ordering::Relaxed);
            at += 1;
        }
        let (longs, tail) = rest.as_chunks::<8>();
        for long in longs {
            self.long(at).store(u64::from_ne_bytes(*long), Ordering::Relaxed);
            at += 8;
        }
        for byte in tail {
            self.byte(at).store(*byte, Ordering::Relaxed);
            at += 1;
        }
    }

    pub(crate) fn fill(&self, byte: u8) {
        let long = u64::from_ne_bytes([byte; 8]);
        for at in (0..PAGE_SIZE).step_by(8) {
            self.long(at).store(long, Ordering::Relaxed);
        }
    }
}

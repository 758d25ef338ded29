//! Whole pages of this domain's own memory.

use core::num::NonZeroUsize;
use core::ops::Range;
use core::ptr::NonNull;
use core::slice;

use heapless::Vec;
use hypercall::PAGE_SIZE;

use crate::ranges;

/// Memory in one piece. A bit for each page, set while it is free, at the start of the memory itself.
struct Region {
    base: NonNull<u8>,
    pages: usize,
    free: &'static mut [u64],
    /// No page below this one is free.
    hint: usize,
}

// SAFETY: the pointer is to memory that belongs to the region, as if it were a box.
unsafe impl Send for Region {}

impl Region {
    /// `None` if there is no room for a page besides the bits.
    ///
    /// # Safety
    /// The memory is mapped, writable, used by nobody else, and stays so for good.
    unsafe fn new(range: &Range<u64>) -> Option<Self> {
        let page = PAGE_SIZE as u64;
        let start = usize::try_from(range.start.next_multiple_of(page)).ok()?;
        let end = usize::try_from(range.end / page * page).ok()?;
        let pages = end.checked_sub(start)? / PAGE_SIZE;
        let words = pages.div_ceil(64);
        let bookkeeping = (words * 8).div_ceil(PAGE_SIZE);
        if pages <= bookkeeping {
            return None;
        }
        let base = NonNull::new(core::ptr::with_exposed_provenance_mut::<u8>(start))?;
        // SAFETY: `words` words fit into the first `bookkeeping` pages, which nothing else uses: they are never marked
        // free. A page is aligned to more than a word, and zeroes are words.
        let free = unsafe {
            base.write_bytes(0, words * 8);
            slice::from_raw_parts_mut(base.cast::<u64>().as_ptr(), words)
        };
        let mut region = Self { base, pages, free, hint: bookkeeping };
        region.mark(bookkeeping..pages, true);
        Some(region)
    }

    fn mark(&mut self, pages: Range<usize>, free: bool) {
        for page in pages {
            if let Some(word) = self.free.get_mut(page / 64) {
                let bit = 1 << (page % 64);
                if free { *word |= bit } else { *word &= !bit }
            }
        }
    }

    /// The first of `count` adjacent free pages.
    fn find(&self, count: usize) -> Option<usize> {
        let (mut page, mut run) = (self.hint, 0);
        while page < self.pages {
            let word = self.free.get(page / 64)? >> (page % 64);
            if word & 1 == 0 {
                run = 0;
                page += (word.trailing_zeros() as usize).min(64 - page % 64);
                continue;
            }
            let ones = word.trailing_ones() as usize;
            (page, run) = (page + ones, run + ones);
            if run >= count {
                return Some(page - run);
            }
        }
        None
    }

    fn alloc(&mut self, count: usize) -> Option<NonNull<u8>> {
        let first = self.find(count)?;
        self.mark(first..first + count, false);
        if count == 1 || first == self.hint {
            self.hint = first + count;
        }
        // SAFETY: the page is within the region.
        Some(unsafe { self.base.add(first * PAGE_SIZE) })
    }

    /// `None` if these are not allocated pages of this region.
    fn free(&mut self, address: NonNull<u8>, count: usize) -> Option<()> {
        let offset = address.addr().get().checked_sub(self.base.addr().get())?;
        let first = offset / PAGE_SIZE;
        let pages = first..first.checked_add(count)?;
        let taken =
            |page: usize| self.free.get(page / 64).is_some_and(|word| word >> (page % 64) & 1 == 0);
        if !offset.is_multiple_of(PAGE_SIZE) || pages.end > self.pages || !pages.clone().all(taken)
        {
            return None;
        }
        self.hint = self.hint.min(first);
        self.mark(pages, true);
        Some(())
    }
}

/// All of this domain's memory that is not in use by the image.
pub struct Pages {
    regions: Vec<Region, { ranges::MAX }>,
    total: usize,
    free: usize,
}

impl Pages {
    pub const fn new() -> Self {
        Self { regions: Vec::new(), total: 0, free: 0 }
    }

    /// Adds memory. Pieces too small to be of use are left out.
    ///
    /// # Safety
    /// The memory is mapped, writable, used by nobody else, and stays so for good.
    pub unsafe fn add(&mut self, range: &Range<u64>) {
        // SAFETY: the caller's promise is the same.
        if let Some(region) = unsafe { Region::new(range) } {
            let (pages, usable) = (region.pages, region.pages - region.hint);
            if self.regions.push(region).is_ok() {
                self.total += pages;
                self.free += usable;
            }
        }
    }

    /// `count` adjacent pages, of any content.
    pub fn alloc(&mut self, count: NonZeroUsize) -> Option<NonNull<u8>> {
        let pages = self.regions.iter_mut().find_map(|region| region.alloc(count.get()))?;
        self.free -= count.get();
        Some(pages)
    }

    /// Takes pages back. `false` if they were not allocated.
    pub fn free(&mut self, address: NonNull<u8>, count: NonZeroUsize) -> bool {
        let found =
            self.regions.iter_mut().any(|region| region.free(address, count.get()).is_some());
        if found {
            self.free += count.get();
        }
        found
    }

    /// Pages under management: all, and those free.
    pub fn stats(&self) -> (usize, usize) {
        (self.total, self.free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn pages(count: usize) -> Pages {
        let memory = std::vec![0u8; (count + 1) * PAGE_SIZE].leak();
        let start = memory.as_mut_ptr().expose_provenance().next_multiple_of(PAGE_SIZE) as u64;
        let mut pages = Pages::new();
        // SAFETY: leaked memory is ours for good.
        unsafe { pages.add(&(start..start + (count * PAGE_SIZE) as u64)) };
        pages
    }

    fn n(count: usize) -> NonZeroUsize {
        NonZeroUsize::new(count).unwrap()
    }

    #[test]
    fn all_pages_but_the_bookkeeping_are_handed_out_once() {
        let mut pages = pages(200);
        assert_eq!(pages.stats(), (200, 199));
        let mut all: std::vec::Vec<_> = core::iter::from_fn(|| pages.alloc(n(1))).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 199);
        assert!(pages.free(all[3], n(1)));
        assert!(!pages.free(all[3], n(1)), "freed twice");
        assert_eq!(pages.alloc(n(1)), Some(all[3]));
        assert_eq!(pages.stats(), (200, 0));
    }

    #[test]
    fn runs_cross_words_and_go_where_they_fit() {
        let mut pages = pages(300);
        let long = pages.alloc(n(130)).unwrap();
        let next = pages.alloc(n(100)).unwrap();
        assert_eq!(next.addr().get(), long.addr().get() + 130 * PAGE_SIZE);
        assert_eq!(pages.alloc(n(100)), None);
        assert!(pages.free(long, n(130)));
        assert_eq!(pages.alloc(n(100)), Some(long));
    }

    #[test]
    fn random_use_never_overlaps_and_all_comes_back() {
        let mut pages = pages(257);
        let mut held: BTreeMap<usize, (NonNull<u8>, usize)> = BTreeMap::new();
        let mut seed: u64 = 1;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (count, drop) = ((seed >> 33) as usize % 9 + 1, seed >> 63 == 0);
            if drop {
                if let Some((_, (address, count))) = held.pop_first() {
                    assert!(pages.free(address, n(count)));
                }
            } else if let Some(address) = pages.alloc(n(count)) {
                let at = address.addr().get();
                if let Some((below, (_, size))) = held.range(..=at).next_back() {
                    assert!(below + size * PAGE_SIZE <= at);
                }
                if let Some((above, _)) = held.range(at..).next() {
                    assert!(at + count * PAGE_SIZE <= *above);
                }
                held.insert(at, (address, count));
            }
        }
        for (_, (address, count)) in held {
            assert!(pages.free(address, n(count)));
        }
        assert_eq!(pages.stats(), (257, 256));
        assert!(pages.alloc(n(256)).is_some());
    }
}

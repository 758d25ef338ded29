//! The global allocator: small pieces cut from runs of pages, which it takes as it grows and keeps.

use core::alloc::Layout;
use core::num::NonZeroUsize;

use hypercall::PAGE_SIZE;
use talc::TalcLock;
use talc::base::Talc;
use talc::base::binning::Binning;
use talc::source::Source;

use crate::machine::PAGES;

/// Pages taken at a time, if there are so many in a row.
const GROWTH: usize = 64;

#[cfg_attr(target_os = "none", global_allocator)]
static HEAP: TalcLock<spin::Mutex<()>, PageSource> = TalcLock::new(PageSource);

/// How much of this domain's memory is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeapStats {
    /// Bytes in use: allocations, pages handed out, and the bookkeeping of both.
    pub used: usize,
    /// Bytes there are, the image and the device tree not included.
    pub total: usize,
}

/// How much memory is in use now. What the heap has taken but not handed out counts as free.
#[must_use]
pub fn heap_stats() -> HeapStats {
    let spare = HEAP.lock().counters().available_bytes;
    let (total, free) = PAGES.lock().stats();
    HeapStats { used: ((total - free) * PAGE_SIZE).saturating_sub(spare), total: total * PAGE_SIZE }
}

/// Feeds the heap with pages.
#[derive(Debug)]
struct PageSource;

// SAFETY: allocates from `PAGES` alone, which never allocates from the heap.
unsafe impl Source for PageSource {
    fn acquire<B: Binning>(talc: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        // Besides the piece and its alignment, room for the heap's own marks, and for its lists in the first run.
        let lists = if talc.is_metadata_established() { 0 } else { 1 };
        let least = (layout.size() + layout.align()).div_ceil(PAGE_SIZE) + 1 + lists;
        let (base, count) = [least.max(GROWTH), least]
            .into_iter()
            .filter_map(NonZeroUsize::new)
            .find_map(|count| Some((PAGES.lock().alloc(count)?, count)))
            .ok_or(())?;
        // SAFETY: the pages are ours alone and never go back.
        unsafe { talc.claim(base.as_ptr(), count.get() * PAGE_SIZE) }.map(|_| ()).ok_or(())
    }
}

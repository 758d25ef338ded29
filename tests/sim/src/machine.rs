//! Machine memory.
//!
//! Every page stays where it is in the host until the last handle to the simulated machine is gone, so no pointer that the
//! machine ever gave out dangles, whatever the domains do wrong.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;

use hypercall::{BusAddr, DomId, Gfn, PAGE_SIZE};

use crate::cache::Dram;
use crate::page::Page;
use crate::strict::Strict;

/// The first machine frame: no frame number is ever mistaken for a small integer.
const FIRST_MFN: u64 = 0x4_0000;
/// What a freed page holds, so that who still reads it notices.
pub(crate) const POISON: u8 = 0xdb;
/// Pages that are taken from the host at once: at first, and at most unless more are asked for.
const CHUNK: usize = 64;
const MAX_CHUNK: usize = 4096;

/// A machine frame number, which only Xen and the bus know.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Mfn(pub(crate) u64);

impl Mfn {
    pub(crate) fn bus(self) -> BusAddr {
        BusAddr(Gfn(self.0).address())
    }

    pub(crate) fn of_bus(address: BusAddr) -> Self {
        Self(Gfn::of_address(address.0).0)
    }
}

#[derive(Debug)]
struct MachinePage {
    page: Page,
    owner: DomId,
    /// Where its owner has it.
    gfn: Gfn,
    /// Mappings of it by anyone but its owner.
    uses: u32,
    /// Its owner's kernel has it in its allocator.
    free: bool,
    /// What devices see that do not look into caches.
    dram: Option<Box<Dram>>,
}

/// Cache maintenance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Maintenance {
    /// What the CPUs changed goes to DRAM.
    Clean,
    /// Whole lines that the CPUs have are thrown away.
    Invalidate,
    /// One after the other.
    CleanInvalidate,
}

/// What the host's allocator gave, and how to give it back.
type Heap = (NonNull<u8>, Layout);

/// Memory taken from the host at once.
#[derive(Debug)]
struct Chunk {
    /// The frame number of its first page.
    first: Mfn,
    pages: usize,
    /// How to give it back, unless it is of the file.
    heap: Option<Heap>,
}

/// Zeroed pages from the host's allocator, and how to give them back.
fn from_heap(pages: usize) -> Option<(NonNull<u8>, Heap)> {
    // With a small alignment the allocator can take it from the system as it is: zeroed, and not there until used.
    let bytes = pages.checked_add(1)?.checked_mul(PAGE_SIZE)?;
    let layout = Layout::from_size_align(bytes, align_of::<u128>()).ok()?;
    // SAFETY: the size is not 0.
    let from = NonNull::new(unsafe { alloc_zeroed(layout) })?;
    let skip = from.addr().get().wrapping_neg() % PAGE_SIZE;
    // SAFETY: less than a page, and there is one page more than asked for.
    Some((unsafe { from.add(skip) }, (from, layout)))
}

/// All memory there is.
#[derive(Debug)]
pub(crate) struct Machine {
    /// By frame number; `None` are holes, so that one past the end of an allocation is nobody's.
    pages: Vec<Option<MachinePage>>,
    /// By where they are in the host; all but the last are used up.
    chunks: BTreeMap<usize, Chunk>,
    /// Where the next page is, and how many there are before more has to be taken.
    next: Option<Page>,
    left: usize,
    /// How many pages of each domain others have mapped.
    in_use: HashMap<DomId, usize>,
    /// Windows have addresses of their own.
    strict: Option<Strict>,
}

// SAFETY: the pointers of a chunk are used by its machine alone, to give the chunk back.
unsafe impl Send for Machine {}

impl Machine {
    pub(crate) fn new(strict: Option<Strict>) -> Self {
        Self {
            pages: Vec::new(),
            chunks: BTreeMap::new(),
            next: None,
            left: 0,
            in_use: HashMap::new(),
            strict,
        }
    }

    /// Takes a chunk from the host in which `count` pages fit, and leaves what is left of the last one.
    fn extend(&mut self, count: usize) -> Option<()> {
        let pages = (CHUNK << self.chunks.len().min(6)).min(MAX_CHUNK).max(count);
        self.pages.resize_with(self.pages.len() + self.left, || None);
        let index = self.pages.len() as u64;
        let (base, heap) = match &mut self.strict {
            Some(strict) => (strict.chunk(index, pages).ok()?, None),
            None => {
                let (base, heap) = from_heap(pages)?;
                (base, Some(heap))
            }
        };
        let first = Mfn(FIRST_MFN + index);
        self.chunks.insert(base.addr().get(), Chunk { first, pages, heap });
        // SAFETY: aligned and zeroed memory, given back only with the machine.
        self.next = Some(unsafe { Page::new(base) });
        self.left = pages;
        Some(())
    }

    /// Zeroed pages, adjacent in the host's memory and in frame numbers.
    pub(crate) fn allocate(&mut self, owner: DomId, count: NonZeroUsize) -> Option<(Mfn, Page)> {
        let with_hole = count.get().checked_add(1)?;
        if self.left < with_hole {
            self.extend(with_hole)?;
        }
        let base = self.next?;
        let first = Mfn(FIRST_MFN + self.pages.len() as u64);
        for at in 0..count.get() {
            // SAFETY: so many pages are left in the chunk, and nobody has them yet.
            let page = unsafe { Page::new(base.base().add(at * PAGE_SIZE)) };
            self.pages.push(Some(MachinePage {
                page,
                owner,
                gfn: Gfn::INVALID,
                uses: 0,
                free: false,
                dram: None,
            }));
        }
        self.pages.push(None);
        self.left -= with_hole;
        // SAFETY: at most one past the last page of the chunk, which `left` says then.
        self.next = Some(unsafe { Page::new(base.base().add(with_hole * PAGE_SIZE)) });
        Some((first, base))
    }

    fn get(&self, mfn: Mfn) -> Option<&MachinePage> {
        self.pages.get(usize::try_from(mfn.0.checked_sub(FIRST_MFN)?).ok()?)?.as_ref()
    }

    fn get_mut(&mut self, mfn: Mfn) -> Option<&mut MachinePage> {
        self.pages.get_mut(usize::try_from(mfn.0.checked_sub(FIRST_MFN)?).ok()?)?.as_mut()
    }

    /// The frame of the page that an address of the host is in.
    pub(crate) fn frame_at(&self, address: usize) -> Option<Mfn> {
        let (base, chunk) = self.chunks.range(..=address).next_back()?;
        let index = (address - base) / PAGE_SIZE;
        (index < chunk.pages).then_some(Mfn(chunk.first.0 + index as u64))
    }

    pub(crate) fn page(&self, mfn: Mfn) -> Option<Page> {
        self.get(mfn).map(|found| found.page)
    }

    pub(crate) fn owner(&self, mfn: Mfn) -> Option<DomId> {
        self.get(mfn).map(|found| found.owner)
    }

    /// Where its owner has a page.
    pub(crate) fn gfn(&self, mfn: Mfn) -> Option<Gfn> {
        self.get(mfn).map(|found| found.gfn)
    }

    /// Notes where its owner has a page.
    pub(crate) fn entered(&mut self, mfn: Mfn, gfn: Gfn) {
        if let Some(found) = self.get_mut(mfn) {
            found.gfn = gfn;
        }
    }

    pub(crate) fn uses(&self, mfn: Mfn) -> u32 {
        self.get(mfn).map_or(0, |found| found.uses)
    }

    /// One more mapping of the page.
    pub(crate) fn hold(&mut self, mfn: Mfn) {
        let Some(found) = self.get_mut(mfn) else { return };
        found.uses += 1;
        if found.uses == 1 {
            let owner = found.owner;
            *self.in_use.entry(owner).or_default() += 1;
        }
    }

    /// One mapping of the page less.
    pub(crate) fn let_go(&mut self, mfn: Mfn) {
        let Some(found) = self.get_mut(mfn).filter(|found| found.uses != 0) else { return };
        found.uses -= 1;
        if found.uses == 0 {
            let owner = found.owner;
            let pages = self.in_use.entry(owner).or_default();
            *pages = pages.saturating_sub(1);
        }
    }

    /// Where a domain sees its window number `index` of `count`, if windows have addresses of their own.
    ///
    /// # Panics
    /// When the host has no addresses left.
    #[expect(clippy::expect_used, reason = "the host itself is out of addresses")]
    pub(crate) fn window(&mut self, id: DomId, index: usize, count: usize) -> Option<NonNull<u8>> {
        let strict = self.strict.as_mut()?;
        Some(strict.window(id, index, count).expect("addresses for windows"))
    }

    /// Has a window's address, if it has one, show a page, or nothing.
    ///
    /// # Panics
    /// When the host allows no more mappings.
    #[expect(clippy::expect_used, reason = "the host itself allows no more mappings")]
    pub(crate) fn set_window(&self, window: Option<NonNull<u8>>, page: Option<(Mfn, bool)>) {
        let (Some(strict), Some(window)) = (&self.strict, window) else { return };
        let set = match page {
            Some((mfn, read_only)) => strict.show(window, mfn.0 - FIRST_MFN, read_only),
            None => Strict::hide(window),
        };
        set.expect("one more mapping");
    }

    /// Its owner's kernel has put a page back into its allocator, or taken it out again. What devices see of it is nobody's any
    /// more.
    pub(crate) fn set_free(&mut self, mfn: Mfn, free: bool) {
        if let Some(found) = self.get_mut(mfn) {
            found.free = free;
            found.dram = None;
        }
    }

    pub(crate) fn is_free(&self, mfn: Mfn) -> bool {
        self.get(mfn).is_some_and(|found| found.free)
    }

    /// Cache maintenance on a part of a page.
    pub(crate) fn maintain(&mut self, mfn: Mfn, range: Range<usize>, what: Maintenance) {
        let Some(found) = self.get_mut(mfn) else { return };
        let dram = found.dram.get_or_insert_with(Dram::new);
        match what {
            Maintenance::Clean => dram.clean(found.page, range),
            Maintenance::Invalidate => dram.invalidate(found.page, range, true),
            Maintenance::CleanInvalidate => dram.invalidate(found.page, range, false),
        }
    }

    /// A device reads from a page; answers how many lines were newer in the cache.
    pub(crate) fn dma_read(
        &mut self,
        mfn: Mfn,
        offset: usize,
        to: &mut [u8],
        coherent: bool,
    ) -> u64 {
        let Some(found) = self.get_mut(mfn) else { return 0 };
        if coherent {
            found.page.read(offset, to);
            return 0;
        }
        found.dram.get_or_insert_with(Dram::new).read(found.page, offset, to)
    }

    /// A device writes to a page; answers how many dirty cache lines that touched.
    pub(crate) fn dma_write(
        &mut self,
        mfn: Mfn,
        offset: usize,
        from: &[u8],
        coherent: bool,
    ) -> u64 {
        let Some(found) = self.get_mut(mfn) else { return 0 };
        if coherent {
            found.page.write(offset, from);
            return 0;
        }
        found.dram.get_or_insert_with(Dram::new).write(found.page, offset, from)
    }

    /// The mappings of the page count no longer.
    pub(crate) fn let_all_go(&mut self, mfn: Mfn) {
        while self.uses(mfn) != 0 {
            self.let_go(mfn);
        }
    }

    /// How many pages of `owner` others have mapped.
    pub(crate) fn in_use(&self, owner: DomId) -> usize {
        self.in_use.get(&owner).copied().unwrap_or(0)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for (from, layout) in self.chunks.values().filter_map(|chunk| chunk.heap) {
            // SAFETY: allocated with this layout; the machine goes with its last handle, so nobody can reach the pages.
            unsafe { dealloc(from.as_ptr(), layout) };
        }
    }
}

//! Page tables: everything at its own address, with no more rights than it needs.

use core::arch::x86_64::__cpuid;
use core::cell::UnsafeCell;
use core::ops::Range;

use hypercall::PAGE_SIZE;
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::mapper::Translate;
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, PageSize, PageTable, PageTableFlags, PhysFrame,
    Size1GiB, Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

/// How a range may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Code.
    Execute,
    /// Constants.
    Read,
    /// Memory.
    Write,
}

impl Use {
    const fn flags(self) -> PageTableFlags {
        let rights = match self {
            Self::Execute => PageTableFlags::empty(),
            Self::Read => PageTableFlags::NO_EXECUTE,
            Self::Write => PageTableFlags::NO_EXECUTE.union(PageTableFlags::WRITABLE),
        };
        rights.union(PageTableFlags::PRESENT)
    }
}

/// What a table that leads to pages lets through: the pages say what may be done with them.
const PARENT: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE);

/// Enough for the image, the windows, memory in a dozen odd pieces, and 32 GiB of it where the processor has no pages of
/// 1 GiB.
const TABLES: usize = 64;

struct Pool(UnsafeCell<[PageTable; TABLES]>);

// SAFETY: the tables are reached only through `Tables`, of which there is one.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool(UnsafeCell::new([const { PageTable::new() }; TABLES]));

/// The tables; the first is the root. There is one `Tables`, which says how many are in use.
#[derive(Debug)]
pub struct Tables {
    unused: Range<usize>,
    gigabyte_pages: bool,
}

/// Hands out tables of the pool, each once.
struct Unused<'a>(&'a mut Range<usize>);

// SAFETY: each frame is a table that nobody uses: an index comes out of the range once.
unsafe impl FrameAllocator<Size4KiB> for Unused<'_> {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        table(self.0.next()?).map(PhysFrame::containing_address)
    }
}

/// Where a table of the pool is: the image is at its own address.
fn table(index: usize) -> Option<PhysAddr> {
    let address = POOL.0.get().expose_provenance() + index * size_of::<PageTable>();
    PhysAddr::try_new(address as u64).ok()
}

impl Tables {
    /// Empty tables.
    ///
    /// # Safety
    /// Called once.
    pub unsafe fn new() -> Self {
        // A leaf beyond those there are answers with what another has: 0x80000001 is in every processor of 64 bits.
        let gigabyte_pages = __cpuid(0x8000_0001).edx & 1 << 26 != 0;
        Self { unused: 1..TABLES, gigabyte_pages }
    }

    /// Maps a range of whole pages at its own address. `None` if the tables do not suffice, or if part of the range is
    /// mapped already.
    pub fn map(&mut self, range: &Range<u64>, how: Use) -> Option<()> {
        let mut at = range.start;
        while at < range.end {
            let room = range.end - at;
            let fits = |size: u64| at.is_multiple_of(size) && room >= size;
            at += if self.gigabyte_pages && fits(Size1GiB::SIZE) {
                self.map_one::<Size1GiB>(at, how)?
            } else if fits(Size2MiB::SIZE) {
                self.map_one::<Size2MiB>(at, how)?
            } else {
                self.map_one::<Size4KiB>(at, how)?
            };
        }
        Some(())
    }

    fn map_one<S: PageSize>(&mut self, at: u64, how: Use) -> Option<u64>
    where
        for<'a> OffsetPageTable<'a>: Mapper<S>,
    {
        let frame = PhysFrame::<S>::from_start_address(PhysAddr::try_new(at).ok()?).ok()?;
        let (mut root, unused) = self.root();
        let page =
            x86_64::structures::paging::Page::<S>::from_start_address(VirtAddr::try_new(at).ok()?)
                .ok()?;
        // SAFETY: what is mapped is at its own address and nowhere else, so that nothing gets a second name; that it is
        // used within its rights is for those to see to who use it.
        let flush = unsafe {
            root.map_to_with_table_flags(page, frame, how.flags(), PARENT, &mut Unused(unused))
        };
        flush.ok()?.flush();
        Some(S::SIZE)
    }

    /// Whether a page is mapped.
    pub fn maps(&mut self, page: u64) -> bool {
        VirtAddr::try_new(page).is_ok_and(|page| self.root().0.translate_addr(page).is_some())
    }

    fn root(&mut self) -> (OffsetPageTable<'_>, &mut Range<usize>) {
        // SAFETY: the pool is reached through `self` alone, which is borrowed, and through the table that is made here; it
        // lies at its own address, as do all tables in it.
        let root = unsafe {
            OffsetPageTable::new(&mut *POOL.0.get().cast::<PageTable>(), VirtAddr::zero())
        };
        (root, &mut self.unused)
    }

    /// Has the processor use these tables from here on.
    ///
    /// # Safety
    /// They map all that is in use, at its own address, with the rights that it is used with.
    pub unsafe fn enable(&self) {
        if let Some(root) = table(0) {
            // SAFETY: the caller's promise.
            unsafe { Cr3::write(PhysFrame::containing_address(root), Cr3Flags::empty()) };
        }
    }
}

/// How many bits of guest-physical address there are: 0x80000008 is in every processor of 64 bits.
pub fn address_bits() -> u32 {
    __cpuid(0x8000_0008).eax & 0xff
}

/// The pages that a range touches.
pub fn pages_of(range: &Range<u64>) -> Range<u64> {
    let page = PAGE_SIZE as u64;
    range.start / page * page..range.end.next_multiple_of(page)
}

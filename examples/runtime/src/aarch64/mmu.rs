//! Stage 1 of address translation: everything at its own address, with no more rights than it needs; and, for a direct-mapped
//! domain with a device, whatever of other domains' Xen lets it see at the machine's addresses, a second time, to be read alone.
//!
//! Memory that Xen reads or writes on our behalf (hypercall structures, buffers, the windows) has to be normal
//! write-back memory: Xen finds it through these tables and accesses it through its own cached mapping.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::ops::Range;

use aarch64_cpu::asm::barrier;
use aarch64_cpu::registers::{
    ID_AA64MMFR0_EL1, MAIR_EL1, ReadWriteable, Readable, SCTLR_EL1, TCR_EL1, Writeable,
};

/// How a range may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Code.
    Execute,
    /// Constants.
    Read,
    /// Memory.
    Write,
    /// Device registers.
    Device,
}

const VALID: u64 = 1;
/// A table at levels 0 to 2, a page at level 3; without it, a block.
const TABLE_OR_PAGE: u64 = 1 << 1;
const READ_ONLY: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 3 << 8;
const ACCESSED: u64 = 1 << 10;
const NO_EXECUTE: u64 = 3 << 53;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// Indices into MAIR_EL1.
const NORMAL: u64 = 0 << 2;
const DEVICE: u64 = 1 << 2;

impl Use {
    const fn attributes(self) -> u64 {
        let rights = match self {
            Self::Execute => READ_ONLY | NORMAL | INNER_SHAREABLE,
            Self::Read => READ_ONLY | NO_EXECUTE | NORMAL | INNER_SHAREABLE,
            Self::Write => NO_EXECUTE | NORMAL | INNER_SHAREABLE,
            Self::Device => NO_EXECUTE | DEVICE,
        };
        rights | ACCESSED | VALID
    }
}

#[repr(C, align(4096))]
struct Table([u64; 512]);

/// The tables of the boot code, which writes them before it uses them: they are never looked at here.
#[repr(transparent)]
pub struct First(UnsafeCell<[Table; 3]>);

// SAFETY: nothing in Rust reads or writes it.
unsafe impl Sync for First {}

/// See [`First`].
pub static FIRST: First = First(UnsafeCell::new([const { Table([0; 512]) }; 3]));

/// What TCR_EL1 says of the boot code's tables, beside the size of addresses (IPS): the same as [`enable`] says of all others.
pub const TRANSLATION: u64 = {
    let (t0sz, inner, outer, shareable, no_ttbr1) = (16, 1 << 8, 1 << 10, 3 << 12, 1 << 23);
    t0sz | inner | outer | shareable | no_ttbr1
};

/// Enough for the image, the interrupt controller, the windows, and memory in a dozen odd pieces.
const TABLES: usize = 48;

struct Pool(UnsafeCell<[Table; TABLES]>);

// SAFETY: the tables are reached only through `Tables`, of which there is one.
unsafe impl Sync for Pool {}

/// The processor reads the tables at any time: there is never a reference to one, and each access is volatile.
static POOL: Pool = Pool(UnsafeCell::new([const { Table([0; 512]) }; TABLES]));

/// The tables; the first is the root. There is one `Tables`, which says how many are in use.
pub struct Tables {
    used: usize,
}

impl Tables {
    /// Empty tables.
    ///
    /// # Safety
    /// Called once.
    pub const unsafe fn new() -> Self {
        Self { used: 1 }
    }

    /// Entry `index` of table `table`.
    fn entry(&self, table: usize, index: usize) -> *mut u64 {
        debug_assert!(table < TABLES && index < 512);
        // SAFETY: both are in bounds: `table` is below `used`, `index` nine bits of an address.
        unsafe { POOL.0.get().cast::<u64>().add(table * 512 + index) }
    }

    /// Maps a range of whole pages at its own address. `None` if the tables do not suffice, or if part of the range
    /// is mapped already.
    pub fn map(&mut self, range: &Range<u64>, how: Use) -> Option<()> {
        self.map_moved(range, 0, how)
    }

    /// The same, so much above its own address.
    pub fn map_moved(&mut self, range: &Range<u64>, above: u64, how: Use) -> Option<()> {
        let mut at = range.start;
        while at < range.end {
            at += self.map_one(at, above, range.end - at, how)?;
        }
        // The walk of a later access sees the entries.
        barrier::dsb(barrier::ISHST);
        barrier::isb(barrier::SY);
        Some(())
    }

    /// Maps the largest block that starts here and fits, so much above, and says how large it is.
    fn map_one(&mut self, at: u64, above: u64, room: u64, how: Use) -> Option<u64> {
        let mut table = 0;
        let seen = at + above;
        for level in 0..=3 {
            let shift = 39 - 9 * level;
            let entry = self.entry(table, (seen >> shift) as usize & 511);
            // SAFETY: in bounds by `entry`; only this code writes it, the processor merely reads.
            let present = unsafe { entry.read_volatile() };
            let size = 1 << shift;
            if level > 0 && (at | seen).is_multiple_of(size) && room >= size && present == 0 {
                let page = if level == 3 { TABLE_OR_PAGE } else { 0 };
                // SAFETY: as above. A single store: the processor sees the entry whole or not at all.
                unsafe { entry.write_volatile(at | how.attributes() | page) };
                return Some(size);
            }
            table = match present & (VALID | TABLE_OR_PAGE) {
                0 if level < 3 => {
                    let next = self.used;
                    if next == TABLES {
                        return None;
                    }
                    self.used += 1;
                    let address = self.entry(next, 0).expose_provenance() as u64;
                    // The table is zeroes, and was so since boot.
                    // SAFETY: as above.
                    unsafe { entry.write_volatile(address | VALID | TABLE_OR_PAGE) };
                    next
                }
                3 if level < 3 => {
                    let base = self.entry(0, 0).addr() as u64;
                    ((present & ADDRESS) - base) as usize / size_of::<Table>()
                }
                _ => return None,
            };
        }
        None
    }
}

/// How many bits of guest-physical address this processor has, at most 48.
pub fn address_bits() -> u32 {
    match ID_AA64MMFR0_EL1.read(ID_AA64MMFR0_EL1::PARange) {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        _ => 48,
    }
}

/// Turns to these tables, and caches on.
///
/// # Safety
/// Caches are off, and everything is at its own address, as the boot code has it. The tables map all that is in use, at its own
/// address; `image` is all that was written since boot.
pub unsafe fn enable(tables: &Tables, image: &Range<u64>) {
    MAIR_EL1.write(
        MAIR_EL1::Attr0_Normal_Outer::WriteBack_NonTransient_ReadWriteAlloc
            + MAIR_EL1::Attr0_Normal_Inner::WriteBack_NonTransient_ReadWriteAlloc
            + MAIR_EL1::Attr1_Device::nonGathering_nonReordering_EarlyWriteAck,
    );
    TCR_EL1.write(
        TCR_EL1::T0SZ.val(16)
            + TCR_EL1::TG0::KiB_4
            + TCR_EL1::SH0::Inner
            + TCR_EL1::ORGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable
            + TCR_EL1::IRGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable
            + TCR_EL1::EPD1::DisableTTBR1Walks
            + TCR_EL1::IPS.val(ID_AA64MMFR0_EL1.read(ID_AA64MMFR0_EL1::PARange).min(5)),
    );
    // SAFETY: while caches were off, writes went past them, and lines from when Xen copied the image may still be there:
    // they are thrown away, and none of them is dirty, because Xen cleans what it copies. That is done by the first tables,
    // which let all be written. The loop itself writes no memory. 16 bytes is the smallest cache line there can be. After
    // that nothing changes but that the same addresses are translated to themselves by other tables, in another address
    // space: the caller's promise.
    unsafe {
        asm!(
            "2: dc ivac, {at}",
            "add {at}, {at}, #16",
            "cmp {at}, {end}",
            "b.lo 2b",
            "dsb sy",
            "msr ttbr0_el1, {tables}",
            "isb",
            "tlbi vmalle1",
            "ic iallu",
            "dsb sy",
            "isb",
            at = inout(reg) image.start => _,
            end = in(reg) image.end,
            tables = in(reg) tables.entry(0, 0).expose_provenance() as u64,
            options(nostack),
        );
    }
    SCTLR_EL1.modify(
        SCTLR_EL1::M::Enable
            + SCTLR_EL1::C::Cacheable
            + SCTLR_EL1::I::Cacheable
            + SCTLR_EL1::A::Disable
            + SCTLR_EL1::WXN::Enable,
    );
    barrier::isb(barrier::SY);
}

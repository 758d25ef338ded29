//! What Xen tells a PVH guest at its start.

use core::ops::Range;

use hypercall::abi::{HVM_MEMMAP_RAM, HVM_START_MAGIC, HvmMemmapEntry, HvmStartInfo};

use crate::ranges::Ranges;

/// Why a start cannot be made with what was found.
pub type Missing = &'static str;

/// The memory map.
#[derive(Debug)]
pub struct Map {
    /// This domain's memory.
    pub memory: Ranges,
    /// Nothing that the map names, memory or other, is here or above.
    pub end: u64,
}

/// Where the memory map's entries are.
pub fn entries(info: &HvmStartInfo) -> Result<Range<u64>, Missing> {
    if info.magic != HVM_START_MAGIC {
        return Err("start info in ebx");
    }
    if info.version < 1 || info.memmap_entries == 0 {
        return Err("a memory map in the start info");
    }
    let size = u64::from(info.memmap_entries) * size_of::<HvmMemmapEntry>() as u64;
    let end = info.memmap_paddr.checked_add(size).ok_or("a memory map in memory")?;
    Ok(info.memmap_paddr..end)
}

/// Reads the memory map.
pub fn map(entries: impl Iterator<Item = HvmMemmapEntry>) -> Result<Map, Missing> {
    let mut map = Map { memory: Ranges::default(), end: 0 };
    for entry in entries {
        let end = entry.addr.checked_add(entry.size).ok_or("a memory map that does not wrap")?;
        if entry.kind == HVM_MEMMAP_RAM {
            map.memory.add(entry.addr..end).ok_or("memory in fewer pieces")?;
        }
        map.end = map.end.max(end);
    }
    Ok(map)
}

/// Guest-physical space where nothing is: what is shown to this domain has its place in here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Of the shared info page.
    pub shared_info: u64,
    /// Of the grant table's frames, [`GRANT_TABLE_BYTES`].
    pub grant_table: u64,
    /// Of the windows.
    pub windows: u64,
    /// Behind the last window.
    pub end: u64,
}

/// 256 frames of the grant table: Xen allows a guest 64 unless told otherwise.
pub const GRANT_TABLE_BYTES: u64 = 256 << 12;

/// Finds space of `windows` bytes and the rest, above all that the map names and above 4 GiB, below which devices are.
/// What comes first is in use always: a domain is saved page by page up to the last one in use.
pub fn space(map_end: u64, windows: u64, address_bits: u32) -> Option<Space> {
    const GIB: u64 = 1 << 30;
    const LARGE_PAGE: u64 = 2 << 20;
    let shared_info = map_end.max(4 * GIB).checked_next_multiple_of(LARGE_PAGE)?;
    let windows_at = shared_info.checked_add(LARGE_PAGE)?;
    let end = windows_at.checked_add(windows)?;
    let limit = 1u64.checked_shl(address_bits).unwrap_or(u64::MAX);
    (end <= limit).then_some(Space {
        shared_info,
        grant_table: shared_info + 0x1000,
        windows: windows_at,
        end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn info() -> HvmStartInfo {
        HvmStartInfo {
            magic: HVM_START_MAGIC,
            version: 1,
            memmap_paddr: 0x50_0000,
            memmap_entries: 3,
            ..HvmStartInfo::default()
        }
    }

    fn entry(addr: u64, size: u64, kind: u32) -> HvmMemmapEntry {
        HvmMemmapEntry { addr, size, kind, reserved: 0 }
    }

    #[test]
    fn a_start_info_without_a_map_is_refused() {
        assert_eq!(entries(&info()), Ok(0x50_0000..0x50_0048));
        assert!(entries(&HvmStartInfo { magic: 0, ..info() }).is_err());
        assert!(entries(&HvmStartInfo { version: 0, ..info() }).is_err());
        assert!(entries(&HvmStartInfo { memmap_entries: 0, ..info() }).is_err());
        assert!(entries(&HvmStartInfo { memmap_paddr: u64::MAX - 9, ..info() }).is_err());
    }

    /// What xl gives a guest of 64 MiB, in another order.
    #[test]
    fn memory_is_what_the_map_says_and_the_end_is_behind_all_else() {
        let xl =
            [entry(0, 64 << 20, 1), entry(0xfc00_0000, 0xb000, 3), entry(0xfeff_8000, 0x8000, 2)];
        let map = map(xl.into_iter()).unwrap();
        let memory: Vec<_> = map.memory.iter().map(|range| (range.start, range.end)).collect();
        assert_eq!(memory, [(0, 64 << 20)]);
        assert_eq!(map.end, 0xff00_0000);
        assert!(super::map([entry(1 << 63, 1 << 63, 1)].into_iter()).is_err());
        assert!(super::map((0..99).map(|n| entry(n << 20, 4096, 1))).is_err());
    }

    #[test]
    fn space_is_above_four_gibibytes_and_all_memory_and_within_reach() {
        const GIB: u64 = 1 << 30;
        let low = space(0xff00_0000, 16 << 20, 40).unwrap();
        assert_eq!((low.shared_info, low.grant_table), (4 * GIB, 4 * GIB + 0x1000));
        assert_eq!(low.end - low.windows, 16 << 20);
        assert!(low.grant_table + GRANT_TABLE_BYTES <= low.windows);
        assert!(low.windows.is_multiple_of(2 << 20));
        assert_eq!(space(9 * GIB + 1, 16 << 20, 40).unwrap().shared_info, 9 * GIB + (2 << 20));
        assert_eq!(space(1 << 36, 16 << 20, 36), None);
        assert_eq!(space(u64::MAX, 16 << 20, 48), None);
    }
}

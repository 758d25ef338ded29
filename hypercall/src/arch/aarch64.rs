//! Hypercalls and layouts of 64-bit Arm (arch-arm.h).

use core::arch::asm;

/// Issues a hypercall. Arguments that a hypercall does not have are ignored by Xen.
///
/// # Safety
/// The call must be one whose effects the caller answers for; pointers among the arguments must be valid for what Xen
/// reads and writes there.
#[inline]
pub unsafe fn hypercall5(number: u64, args: [u64; 5]) -> i64 {
    let [a0, a1, a2, a3, a4] = args;
    let result: i64;
    // SAFETY: arch-arm.h: number in x16, arguments in x0 to x4, result in x0, all else preserved; `hvc #0xEA1` traps
    // to Xen. A debug build of Xen poisons the argument registers, so all are clobbers. The caller answers for the
    // call's meaning. Memory is not marked untouched, so the compiler assumes Xen wrote what it could reach.
    unsafe {
        asm!(
            "hvc #0xEA1",
            in("x16") number,
            inlateout("x0") a0 => result,
            inlateout("x1") a1 => _,
            inlateout("x2") a2 => _,
            inlateout("x3") a3 => _,
            inlateout("x4") a4 => _,
            options(nostack),
        );
    }
    result
}

/// Blocks from which on [`copy_blocks`] is faster than a loop.
pub const BULK_BLOCKS: usize = 8;

/// What both places of [`copy_blocks`] have to be aligned to: a kernel may have unaligned accesses fault.
pub const BULK_ALIGN: usize = 8;

/// Copies `count` blocks of 64 bytes, each byte read once and written once, in any order. Where the two places overlap
/// anything may come of it.
///
/// # Safety
/// `from` is valid for reads and `to` for writes of as many bytes, and no reference says that nobody writes at `from`, or that
/// nobody but its holder looks at `to`. Others may be at either meanwhile: by atomics, or from another domain. Both are
/// aligned to [`BULK_ALIGN`].
#[inline]
pub unsafe fn copy_blocks(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: the caller answers for the memory; the loop ends with the last block, and does not begin where there is none. It
    // takes general registers, as a kernel may not have others, and changes no flag. Memory is not marked untouched, so what was
    // written before is in its place, and nothing is taken to be as it was.
    unsafe {
        asm!(
            "cbz {count}, 3f",
            "2:",
            "ldp {a}, {b}, [{from}]",
            "ldp {c}, {d}, [{from}, #16]",
            "ldp {e}, {f}, [{from}, #32]",
            "ldp {g}, {h}, [{from}, #48]",
            "add {from}, {from}, #64",
            "sub {count}, {count}, #1",
            "stp {a}, {b}, [{to}]",
            "stp {c}, {d}, [{to}, #16]",
            "stp {e}, {f}, [{to}, #32]",
            "stp {g}, {h}, [{to}, #48]",
            "add {to}, {to}, #64",
            "cbnz {count}, 2b",
            "3:",
            count = inout(reg) count => _,
            from = inout(reg) from => _,
            to = inout(reg) to => _,
            a = out(reg) _, b = out(reg) _, c = out(reg) _, d = out(reg) _,
            e = out(reg) _, f = out(reg) _, g = out(reg) _, h = out(reg) _,
            options(nostack, preserves_flags),
        );
    }
}

/// Byte offsets in the shared info page (`struct shared_info`, xen.h): one legacy vCPU of 48 bytes.
pub mod shared_info {
    /// Bytes in `struct vcpu_info`.
    pub const VCPU_INFO_SIZE: usize = 48;
    /// vCPUs whose `struct vcpu_info` is in this page (`XEN_LEGACY_MAX_VCPUS`).
    pub const VCPUS: u32 = 1;
    /// Of `evtchn_upcall_pending` in `struct vcpu_info`, one byte.
    pub const UPCALL_PENDING: usize = 0;
    /// Of `evtchn_pending_sel` in `struct vcpu_info`, eight bytes.
    pub const PENDING_SEL: usize = 8;
    /// Of `time` in `struct vcpu_info`, a [`VcpuTimeInfo`](crate::abi::VcpuTimeInfo).
    pub const TIME: usize = 16;
    /// Of `evtchn_pending`, 64 words of eight bytes.
    pub const PENDING: usize = 48;
    /// Of `evtchn_mask`, 64 words of eight bytes.
    pub const MASK: usize = PENDING + 512;
}

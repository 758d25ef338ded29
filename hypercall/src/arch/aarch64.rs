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

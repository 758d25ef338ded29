//! Hypercalls and layouts of 64-bit x86 (arch-x86/xen-x86_64.h).

use core::arch::asm;
use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicU8, Ordering};

const UNKNOWN: u8 = 0;
const VMCALL: u8 = 1;
const VMMCALL: u8 = 2;

/// Which instruction calls the hypervisor on this processor. `CPUID` itself traps to Xen: it is asked once.
#[inline]
fn instruction() -> u8 {
    static KNOWN: AtomicU8 = AtomicU8::new(UNKNOWN);
    let known = KNOWN.load(Ordering::Relaxed);
    if known != UNKNOWN {
        return known;
    }
    // AMD ("AuthenticAMD", "HygonGenuine") has vmmcall, Intel vmcall; each faults on the other.
    let found = if matches!(__cpuid(0).ebx, 0x6874_7541 | 0x6f67_7948) { VMMCALL } else { VMCALL };
    KNOWN.store(found, Ordering::Relaxed);
    found
}

/// Issues a hypercall. Arguments that a hypercall does not have are ignored by Xen.
///
/// # Safety
/// The call must be one whose effects the caller answers for; pointers among the arguments must be valid for what Xen
/// reads and writes there. The caller must be an HVM or PVH domain under Xen.
#[inline]
pub unsafe fn hypercall5(number: u64, args: [u64; 5]) -> i64 {
    let [a0, a1, a2, a3, a4] = args;
    let result: i64;
    if instruction() == VMMCALL {
        // SAFETY: arch-x86/xen-x86_64.h: number in rax, arguments in rdi, rsi, rdx, r10, r8, result in rax; the
        // argument registers may be overwritten. The caller answers for the call's meaning. Memory is not marked
        // untouched, so the compiler assumes Xen wrote what it could reach.
        unsafe {
            asm!("vmmcall", inlateout("rax") number => result, inlateout("rdi") a0 => _, inlateout("rsi") a1 => _,
                inlateout("rdx") a2 => _, inlateout("r10") a3 => _, inlateout("r8") a4 => _, options(nostack));
        }
    } else {
        // SAFETY: as above; the instruction alone differs.
        unsafe {
            asm!("vmcall", inlateout("rax") number => result, inlateout("rdi") a0 => _, inlateout("rsi") a1 => _,
                inlateout("rdx") a2 => _, inlateout("r10") a3 => _, inlateout("r8") a4 => _, options(nostack));
        }
    }
    result
}

/// Blocks from which on [`copy_blocks`] is faster than a loop: it takes a while to begin, the longer the less aligned.
pub const BULK_BLOCKS: usize = 16;

/// What both places of [`copy_blocks`] have to be aligned to.
pub const BULK_ALIGN: usize = 1;

/// Copies `count` blocks of 64 bytes, each byte read once and written once, in any order. Where the two places overlap
/// anything may come of it.
///
/// # Safety
/// `from` is valid for reads and `to` for writes of as many bytes, and no reference says that nobody writes at `from`, or that
/// nobody but its holder looks at `to`. Others may be at either meanwhile: by atomics, or from another domain.
#[inline]
pub unsafe fn copy_blocks(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: the caller answers for the memory. The direction is upwards whenever assembly begins, and no flag is changed.
    // Memory is not marked untouched, so what was written before is in its place, and nothing is taken to be as it was.
    unsafe {
        asm!("rep movsq", inout("rcx") count * 8 => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
}

/// Byte offsets in the shared info page (`struct shared_info`, xen.h): 32 legacy vCPUs of 64 bytes.
pub mod shared_info {
    /// Bytes in `struct vcpu_info`.
    pub const VCPU_INFO_SIZE: usize = 64;
    /// vCPUs whose `struct vcpu_info` is in this page (`XEN_LEGACY_MAX_VCPUS`).
    pub const VCPUS: u32 = 32;
    /// Of `evtchn_upcall_pending` in `struct vcpu_info`, one byte.
    pub const UPCALL_PENDING: usize = 0;
    /// Of `evtchn_pending_sel` in `struct vcpu_info`, eight bytes.
    pub const PENDING_SEL: usize = 8;
    /// Of `time` in `struct vcpu_info`, a [`VcpuTimeInfo`](crate::abi::VcpuTimeInfo).
    pub const TIME: usize = 32;
    /// Of `evtchn_pending`, 64 words of eight bytes.
    pub const PENDING: usize = 2048;
    /// Of `evtchn_mask`, 64 words of eight bytes.
    pub const MASK: usize = PENDING + 512;
}

//! The clock, its alarm, and the wait for an interrupt.

use core::arch::x86_64::{_mm_lfence, _rdtsc};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use evtchn::{Binder, Channel};
use hypercall::abi::VcpuTimeInfo;
use hypercall::arch::shared_info;
use hypercall::{Errno, Hypervisor, Instant, VcpuId, Virq};

use super::faults::halt;
use crate::machine::{HV, Hv};
use crate::pv_clock::{Monotonic, system_time};

static CLOCK: Monotonic = Monotonic::new();

const VCPU: VcpuId = VcpuId(0);

/// Nanoseconds of Xen's system time, without those that the domain was not there. Never goes back.
#[must_use]
pub fn now() -> Instant {
    CLOCK.at(system())
}

/// Goes on where the clock stood before the domain was suspended.
pub fn resume() {
    CLOCK.resume(system());
}

/// Xen's system time (`struct vcpu_time_info`, xen.h).
fn system() -> u64 {
    // SAFETY: the shared info page is mapped for good, and this is within it.
    let at = unsafe { HV.shared_info().add(shared_info::TIME) };
    macro_rules! field {
        ($atomic:ty, $field:ident) => {
            // SAFETY: a field of the structure, aligned as it is there; Xen changes it with single stores.
            unsafe {
                at.add(core::mem::offset_of!(VcpuTimeInfo, $field)).cast::<$atomic>().as_ref()
            }
            .load(Ordering::Relaxed)
        };
    }
    loop {
        let version = field!(AtomicU32, version);
        fence(Ordering::Acquire);
        let info = VcpuTimeInfo {
            version,
            tsc_timestamp: field!(AtomicU64, tsc_timestamp),
            system_time: field!(AtomicU64, system_time),
            tsc_to_system_mul: field!(AtomicU32, tsc_to_system_mul),
            tsc_shift: field!(AtomicU8, tsc_shift) as i8,
            ..VcpuTimeInfo::default()
        };
        let tsc = counter();
        fence(Ordering::Acquire);
        // Odd: Xen is writing. Another one: it has written meanwhile, and the domain may be on another processor.
        if version & 1 == 0 && version == field!(AtomicU32, version) {
            return system_time(&info, tsc);
        }
    }
}

fn counter() -> u64 {
    // SAFETY: changes nothing; every processor of 64 bits has both. Without the fence the counter may be read before what
    // is in front of it is done.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}

/// The clock's alarm is an event channel's.
pub fn bind_timer(binder: &Binder<Hv>) -> Result<Option<Channel<Hv>>, Errno> {
    let timer = binder.bind_virq(Virq::TIMER, VCPU)?;
    // A domain of this kind begins without, but for one that came from elsewhere that is no promise.
    HV.stop_ticks(VCPU)?;
    Ok(Some(timer))
}

/// Nothing is to be taken note of: an interrupt is what Xen makes of the pending flag, and no device has one.
pub fn acknowledge() -> bool {
    false
}

/// Waits for an interrupt, until the deadline at most. Uses no processor time meanwhile.
///
/// Interrupts are masked all the time but for one instruction, `HLT`, so that no handler runs between two instructions of
/// the program. No event is missed: one that was raised after the look at the flag finds interrupts masked and waits. With a
/// callback by vector the flag itself is the interrupt (`hvm_vcpu_has_pending_irq`): there is nothing in between to be lost.
/// If it is taken before `HLT`, its handler returns behind that; if `HLT` comes first, it traps to Xen, which marks the vCPU
/// blocked and looks at the flag after that (`vcpu_block`). The alarm is an event like others; one that is past when it is
/// set is raised at once.
pub fn wait(until: Option<Instant>) {
    if let Some(deadline) = until
        && let Err(error) = HV.set_alarm(VCPU, CLOCK.system(deadline))
    {
        // No sleep without an alarm: the caller looks at the clock again.
        log::error!("no alarm: {error}");
        return;
    }
    halt();
}

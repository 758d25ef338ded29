//! System time by Xen's account of the processor's time stamp counter (`struct vcpu_time_info`, xen.h).

use core::sync::atomic::{AtomicU64, Ordering};

use hypercall::Instant;
use hypercall::abi::VcpuTimeInfo;

/// Nanoseconds of system time when the counter reads `tsc`.
pub fn system_time(info: &VcpuTimeInfo, tsc: u64) -> u64 {
    // On another processor than the account was made for, the counter may be a little behind.
    let ticks = u128::from(tsc.saturating_sub(info.tsc_timestamp));
    let shift = u32::from(info.tsc_shift.unsigned_abs()).min(63);
    let ticks = if info.tsc_shift < 0 { ticks >> shift } else { ticks << shift };
    // Below 2^127: a counter of 2^63 at the most, and no processor needs more than a few places of shift.
    let nanos = ticks.saturating_mul(info.tsc_to_system_mul.into()) >> 32;
    info.system_time.saturating_add(nanos as u64)
}

/// A clock that never goes back, whatever system time does: not when the account is renewed, and not when the domain
/// goes on elsewhere, where system time is another one.
#[derive(Debug)]
pub struct Monotonic {
    /// What is added to system time; wraps.
    offset: AtomicU64,
    /// What was last read.
    last: AtomicU64,
}

impl Monotonic {
    pub const fn new() -> Self {
        Self { offset: AtomicU64::new(0), last: AtomicU64::new(0) }
    }

    /// The time, when system time is `system`.
    pub fn at(&self, system: u64) -> Instant {
        let time = system.wrapping_add(self.offset.load(Ordering::Relaxed));
        Instant(self.last.fetch_max(time, Ordering::Relaxed).max(time))
    }

    /// System time at an instant.
    pub fn system(&self, instant: Instant) -> u64 {
        // An instant before system time began is past.
        let offset = self.offset.load(Ordering::Relaxed);
        let system = instant.0.wrapping_sub(offset);
        let began_later = (offset as i64) > 0 && instant.0 < offset;
        if began_later { 0 } else { system }
    }

    /// Goes on from the time last read, now that system time is `system`.
    pub fn resume(&self, system: u64) {
        let last = self.last.load(Ordering::Relaxed);
        self.offset.store(last.wrapping_sub(system), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A counter of `hertz`, as Xen describes it: `mul / 2^32 * 2^shift` nanoseconds a tick.
    fn account(mul: u32, shift: i8) -> VcpuTimeInfo {
        VcpuTimeInfo {
            tsc_timestamp: 1_000,
            system_time: 5_000_000_000,
            tsc_to_system_mul: mul,
            tsc_shift: shift,
            ..VcpuTimeInfo::default()
        }
    }

    #[test]
    fn ticks_are_scaled_both_ways_and_for_years() {
        // 2 GHz: half a nanosecond a tick.
        let fast = account(1 << 31, 0);
        assert_eq!(system_time(&fast, 1_000), 5_000_000_000);
        assert_eq!(system_time(&fast, 1_000 + 2_000_000_000), 6_000_000_000);
        let years = 10 * 365 * 86_400;
        let elapsed = years * 2_000_000_000;
        assert_eq!(system_time(&fast, 1_000 + elapsed), (years + 5) * 1_000_000_000);
        assert_eq!(system_time(&account(1 << 31, -1), 1_000 + 4_000), 5_000_001_000);
        assert_eq!(system_time(&account(1 << 31, 3), 1_000 + 1_000), 5_000_004_000);
    }

    #[test]
    fn nonsense_is_survived() {
        assert_eq!(system_time(&account(1 << 31, 0), 0), 5_000_000_000);
        for shift in [i8::MIN, i8::MAX] {
            let _ = system_time(&account(u32::MAX, shift), u64::MAX);
        }
    }

    #[test]
    fn time_never_goes_back_not_even_across_a_suspend() {
        let clock = Monotonic::new();
        assert_eq!(clock.at(100), Instant(100));
        assert_eq!(clock.at(90), Instant(100));
        assert_eq!(clock.system(Instant(150)), 150);
        // To a machine that was started later,
        clock.resume(7);
        assert_eq!(clock.at(7), Instant(100));
        assert_eq!(clock.at(17), Instant(110));
        assert_eq!(clock.system(Instant(120)), 27);
        assert_eq!(clock.system(Instant(50)), 0);
        // and to one that has been up for longer.
        clock.resume(1_000_000);
        assert_eq!(clock.at(1_000_001), Instant(111));
        assert_eq!(clock.system(Instant(112)), 1_000_002);
        assert_eq!(clock.system(Instant(0)), 1_000_000 - 110);
    }
}

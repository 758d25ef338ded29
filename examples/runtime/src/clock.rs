//! A counter's ticks as nanoseconds, and back.

use hypercall::Instant;

const NANOS: u64 = 1_000_000_000;

/// When the counter reads `ticks`, at `hertz` ticks a second. Exact to the nanosecond, rounding down; reaches the end
/// of time after 584 years.
#[must_use]
pub fn instant(ticks: u64, hertz: u64) -> Instant {
    let hertz = hertz.max(1);
    let (seconds, rest) = (ticks / hertz, ticks % hertz);
    // Below NANOS * hertz: no counter ticks 2^34 times a second.
    Instant(seconds.saturating_mul(NANOS).saturating_add(rest.saturating_mul(NANOS) / hertz))
}

/// What the counter reads at `instant` or just after, so that a timer set to it is never early.
#[must_use]
pub fn ticks(instant: Instant, hertz: u64) -> u64 {
    let (seconds, rest) = (instant.0 / NANOS, instant.0 % NANOS);
    seconds.saturating_mul(hertz).saturating_add(rest.saturating_mul(hertz).div_ceil(NANOS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_years_of_ticks_do_not_overflow() {
        let (hertz, years) = (62_500_000, 10 * 365 * 86_400);
        assert_eq!(instant(years * hertz, hertz), Instant(years * NANOS));
        assert_eq!(instant(1, hertz), Instant(16));
        assert_eq!(instant(u64::MAX, 1), Instant(u64::MAX));
    }

    #[test]
    fn a_timer_is_never_early() {
        for hertz in [1, 62_500_000, 54_000_000, 1_000_000_000, 24_000_001] {
            for nanos in [0, 1, 17, 999_999_999, 1_000_000_000, 123_456_789_012_345] {
                let deadline = Instant(nanos);
                let at = instant(ticks(deadline, hertz), hertz);
                // Reading the clock rounds down, by less than one nanosecond.
                assert!(at.0 + 1 >= deadline.0, "{hertz} Hz: {at:?} is before {deadline:?}");
                if NANOS.is_multiple_of(hertz) {
                    assert!(at >= deadline);
                }
            }
        }
    }
}

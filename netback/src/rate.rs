//! The credit-based limit on what a guest may send: so many bytes per interval (the store key `rate`).

use hypercall::Instant;

/// `rate` as the toolstack writes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RateLimit {
    /// Credit added per interval, in bytes.
    bytes: u64,
    /// The interval, in nanoseconds.
    period: u64,
}

impl RateLimit {
    /// Nothing is held back: what holds without the key, or with one that cannot be read (Linux xen-netback/xenbus.c,
    /// `xen_net_read_rate`).
    pub const UNLIMITED: Self = Self { bytes: u64::MAX, period: 0 };

    /// Reads `BYTES,USECS`: two decimal numbers, each of digits only and within 64 bits. An interval of 0, or all ones
    /// bytes, is no limit. 0 bytes per interval lets nothing through, as in Linux.
    #[must_use]
    pub fn parse(value: &[u8]) -> Option<Self> {
        let comma = value.iter().position(|byte| *byte == b',')?;
        let (bytes, usecs) = value.split_at_checked(comma)?;
        let (bytes, usecs) = (number(bytes)?, number(usecs.strip_prefix(b",")?)?);
        Some(match usecs.saturating_mul(1_000) {
            0 => Self::UNLIMITED,
            period => Self { bytes, period },
        })
    }

    /// Whether this holds nothing back.
    #[must_use]
    pub const fn is_unlimited(self) -> bool {
        self.period == 0 || self.bytes == u64::MAX
    }

    /// The most credit that can be saved: enough for any packet, or an interface with a small allowance would seize up
    /// (Linux xen-netback/netback.c, `tx_add_credit`: a jumbo packet of up to 128 KiB).
    const fn burst(self) -> u64 {
        if self.bytes > MIN_BURST { self.bytes } else { MIN_BURST }
    }
}

const MIN_BURST: u64 = 131_072;

fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |sum, digit| {
        let value = char::from(*digit).to_digit(10)?;
        sum.checked_mul(10)?.checked_add(u64::from(value))
    })
}

/// What one queue may still send.
///
/// As in Linux (xen-netback/netback.c, `tx_credit_exceeded`), idle time is worth one interval's credit however long it
/// was, while a packet that waits gathers each interval's until there is enough for it. Unlike there, a late wake-up
/// loses no credit, and the interval is exact rather than cut to whole milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Credit {
    limit: RateLimit,
    /// Bytes that may pass.
    remaining: u64,
    /// When credit was last added.
    window: Instant,
    /// A packet was refused since, and nothing has passed.
    waiting: bool,
}

impl Credit {
    /// One interval's credit, from `now` on.
    #[must_use]
    pub const fn new(limit: RateLimit, now: Instant) -> Self {
        Self { limit, remaining: limit.bytes, window: now, waiting: false }
    }

    /// Takes a new limit; credit above what the new one gives per interval is lost (`xen_net_rate_changed`). A packet
    /// that was told to wait may be tried again at once.
    pub fn set_limit(&mut self, limit: RateLimit) {
        self.limit = limit;
        self.remaining = self.remaining.min(limit.bytes);
    }

    /// Whether a packet of `size` bytes may pass now; if so, it is paid for.
    ///
    /// # Errors
    /// When to ask again: always later than `now`, unless that is the end of time. A packet that is larger than all
    /// that can be saved passes once everything is.
    pub fn allow(&mut self, size: usize, now: Instant) -> Result<(), Instant> {
        if self.limit.is_unlimited() {
            return Ok(());
        }
        let need = u64::try_from(size).unwrap_or(u64::MAX).min(self.limit.burst());
        if need > self.remaining {
            self.replenish(now);
        }
        match self.remaining.checked_sub(need) {
            Some(rest) => {
                self.remaining = rest;
                self.waiting = false;
                Ok(())
            }
            None => {
                self.waiting = true;
                // An allowance of 0 never suffices; it is looked at again every interval, should it change.
                let missing = need.saturating_sub(self.remaining);
                let periods = match self.limit.bytes {
                    0 => 1,
                    bytes => missing.div_ceil(bytes),
                };
                Err(self.window.after(self.limit.period.saturating_mul(periods)))
            }
        }
    }

    fn replenish(&mut self, now: Instant) {
        let Some(periods @ 1..) = now.since(self.window).checked_div(self.limit.period) else {
            return;
        };
        let periods = match self.waiting {
            true => {
                self.window = self.window.after(self.limit.period.saturating_mul(periods));
                periods
            }
            false => {
                self.window = now;
                1
            }
        };
        let gained = self.limit.bytes.saturating_mul(periods);
        self.remaining = self.remaining.saturating_add(gained).min(self.limit.burst());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn limit(bytes: u64, usecs: u64) -> RateLimit {
        RateLimit { bytes, period: usecs * 1_000 }
    }

    #[test]
    fn the_key_is_read_strictly() {
        assert_eq!(RateLimit::parse(b"62500,50000"), Some(limit(62_500, 50_000)));
        assert_eq!(RateLimit::parse(b"0,50000"), Some(limit(0, 50_000)));
        assert_eq!(RateLimit::parse(b"62500,0"), Some(RateLimit::UNLIMITED));
        let all_ones = RateLimit::parse(b"18446744073709551615,18446744073709551615").unwrap();
        assert!(all_ones.is_unlimited());
        assert!(!limit(0, 1).is_unlimited());
        for bad in [
            "",
            ",",
            "1",
            "1,",
            ",1",
            "1,2,",
            "1,2,3",
            " 1,2",
            "1 ,2",
            "1, 2",
            "1,2 ",
            "1,2\n",
            "1,2\0",
            "+1,2",
            "-1,2",
            "0x10,2",
            "1,2k",
            "18446744073709551616,1",
            "1,18446744073709551616",
            "1;2",
        ] {
            assert_eq!(RateLimit::parse(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn without_a_limit_everything_passes() {
        for limit in [RateLimit::UNLIMITED, limit(u64::MAX, 10), limit(5, 0)] {
            let mut credit = Credit::new(limit, Instant(0));
            for _ in 0..100 {
                assert_eq!(credit.allow(65_535, Instant(0)), Ok(()));
            }
        }
    }

    #[test]
    fn credit_is_used_up_and_comes_back() {
        let mut credit = Credit::new(limit(3000, 50_000), Instant(0));
        assert_eq!(credit.allow(1500, Instant(0)), Ok(()));
        assert_eq!(credit.allow(1500, Instant(0)), Ok(()));
        assert_eq!(credit.allow(1500, Instant(MS)), Err(Instant(50 * MS)));
        assert_eq!(credit.allow(1, Instant(49 * MS)), Err(Instant(50 * MS)));
        assert_eq!(credit.allow(1500, Instant(50 * MS)), Ok(()));
        // The last look was late by half an interval; the rhythm is kept.
        assert_eq!(credit.allow(1501, Instant(75 * MS)), Err(Instant(100 * MS)));
        assert_eq!(credit.allow(1501, Instant(125 * MS)), Ok(()));
        assert_eq!(credit.allow(3000, Instant(125 * MS)), Err(Instant(150 * MS)));
    }

    #[test]
    fn idle_time_is_worth_one_interval() {
        let mut credit = Credit::new(limit(3000, 50_000), Instant(0));
        assert_eq!(credit.allow(3000, Instant(0)), Ok(()));
        let later = Instant(10_000 * MS);
        assert_eq!(credit.allow(3000, later), Ok(()));
        assert_eq!(credit.allow(1, later), Err(Instant(10_050 * MS)));
    }

    #[test]
    fn a_large_packet_gathers_what_it_needs() {
        let mut credit = Credit::new(limit(1000, 50_000), Instant(0));
        assert_eq!(credit.allow(65_535, Instant(0)), Err(Instant(65 * 50 * MS)));
        assert_eq!(credit.allow(65_535, Instant(10 * 50 * MS)), Err(Instant(65 * 50 * MS)));
        assert_eq!(credit.allow(65_535, Instant(65 * 50 * MS)), Ok(()));
        assert_eq!(credit.allow(500, Instant(65 * 50 * MS)), Err(Instant(66 * 50 * MS)));
    }

    #[test]
    fn a_packet_above_the_burst_passes_when_credit_is_full() {
        let mut credit = Credit::new(limit(1000, 1000), Instant(0));
        let when = credit.allow(1 << 20, Instant(0)).unwrap_err();
        assert_eq!(when, Instant(131 * MS));
        assert_eq!(credit.allow(1 << 20, Instant(130 * MS)), Err(when));
        assert_eq!(credit.allow(1 << 20, when), Ok(()));
        assert_eq!(credit.allow(1, when), Err(when.after(MS)));
    }

    #[test]
    fn nothing_allowed_is_asked_about_again() {
        let mut credit = Credit::new(limit(0, 1000), Instant(0));
        assert_eq!(credit.allow(1, Instant(0)), Err(Instant(MS)));
        assert_eq!(credit.allow(1, Instant(5 * MS)), Err(Instant(6 * MS)));
        assert_eq!(credit.allow(0, Instant(5 * MS)), Ok(()));
    }

    #[test]
    fn a_new_limit_holds_at_once() {
        let mut credit = Credit::new(RateLimit::UNLIMITED, Instant(0));
        credit.set_limit(limit(1000, 50_000));
        assert_eq!(credit.allow(1000, Instant(MS)), Ok(()));
        assert_eq!(credit.allow(1000, Instant(MS)), Err(Instant(50 * MS)));
        credit.set_limit(RateLimit::UNLIMITED);
        assert_eq!(credit.allow(1000, Instant(MS)), Ok(()));
    }

    proptest! {
        /// Over any run the rate holds, to within what may be saved; the answer is later than now; and it is true.
        #[test]
        fn the_rate_holds(
            bytes in 1_u64..300_000,
            period in 1_u64..1_000,
            sizes in prop::collection::vec((0_usize..65_536, 0_u64..2_000, any::<bool>()), 1..200),
        ) {
            let mut credit = Credit::new(limit(bytes, period), Instant(0));
            let (mut now, mut passed) = (Instant(0), 0);
            for (size, pause, obey) in sizes {
                now = now.after(pause * 1_000);
                if let Err(when) = credit.allow(size, now) {
                    prop_assert!(when > now);
                    let mut probe = credit;
                    prop_assert!(probe.allow(size, Instant(when.0 - 1)).is_err());
                    now = if obey { when } else { now };
                    if credit.allow(size, now).is_err() {
                        prop_assert!(!obey);
                        continue;
                    }
                }
                passed += size as u64;
                let most = bytes * (1 + now.0 / (period * 1_000));
                prop_assert!(passed <= most, "{passed} > {most}");
            }
        }
    }
}

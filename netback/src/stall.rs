//! Noticing that a guest takes no packets, to stop keeping them for it.

use hypercall::Instant;

/// Nanoseconds that a guest may leave packets waiting (`rx_stall_timeout_msecs` of Linux's netback).
pub const STALL_TIME: u64 = 60_000_000_000;

/// Whether a queue's guest still posts pages. A queue that stalls is worth no packet: what comes for it is dropped at once,
/// and the vif's carrier goes off, until the guest posts pages again.
///
/// Unlike in Linux (xen-netback/rx.c, `xenvif_rx_queue_stalled`), that the packets which waited have meanwhile expired does
/// not make the queue a good one again; only pages do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stall {
    since: Option<Instant>,
    stalled: bool,
}

impl Stall {
    /// Packets wait and the guest has not posted pages enough for the first. Answers whether the queue is stalled.
    pub fn starved(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        self.stalled = now.since(since) >= STALL_TIME;
        self.stalled
    }

    /// The guest has posted pages enough, be it that nothing waits for them.
    pub fn served(&mut self) {
        *self = Self::default();
    }

    /// As last found.
    #[must_use]
    pub const fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// When [`starved`](Self::starved), if nothing happens before, will first answer that it is.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.since.filter(|_| !self.stalled).map(|since| since.after(STALL_TIME))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_36_a_minute_without_pages_is_a_stall() {
        let mut stall = Stall::default();
        assert_eq!(stall.deadline(), None);
        assert!(!stall.starved(Instant(5)));
        let end = Instant(5 + STALL_TIME);
        assert_eq!(stall.deadline(), Some(end));
        assert!(!stall.starved(Instant(end.0 - 1)));
        assert!(stall.starved(end) && stall.is_stalled());
        assert_eq!(stall.deadline(), None);
        assert!(stall.starved(end.after(1)));
        stall.served();
        assert!(!stall.is_stalled());
        // Time begins anew.
        assert!(!stall.starved(end.after(2)));
        assert_eq!(stall.deadline(), Some(end.after(2 + STALL_TIME)));
        stall.served();
        assert_eq!(stall, Stall::default());
    }
}

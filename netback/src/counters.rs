//! What a vif has done and put up with. Directions are named from the frontend: TX comes from the guest.

use core::ops::AddAssign;

use crate::datapath::{Datapath, Fallback};

netif::counters! {
    /// Packets that did not get where they were going, by reason.
    Drops {
        /// More slots than a packet may have.
        too_many_slots,
        /// Slots that hold more than the packet.
        slots_too_long,
        /// Shorter than an Ethernet header.
        short,
        /// The peer's grant could not be used.
        grant,
        /// Xen refused the whole batch.
        hypercall,
        /// Asked to be segmented, and cannot be.
        not_segmentable,
        /// Larger than the destination takes.
        too_big,
        /// The destination's queue was full.
        queue_full,
        /// The destination did not take it in time.
        expired,
        /// The destination has long taken nothing at all.
        stalled,
        /// No buffer was free.
        no_buffer,
        /// The destination is not connected, or went away.
        unreachable,
        /// A group that the destination has not asked for.
        filtered,
        /// The sender claimed an address that is not its to claim.
        spoofed,
    }
}

netif::counters! {
    /// One direction of a vif, or of one of its queues.
    Direction {
        /// Packets carried.
        packets,
        /// Their bytes.
        bytes,
        /// Packets that stood for several, by segmentation offload.
        gso_packets,
        /// Packets whose missing checksum mark was put right.
        fixed_up,
        /// Notifications sent.
        notifications,
        /// Times responses were published.
        publishes,
        /// Events that announced nothing.
        spurious,
    }
}

netif::counters! {
    /// What one way to carry bytes has done.
    PathCounters {
        /// Packets carried.
        packets,
        /// Their bytes.
        bytes,
        /// Hypercalls that had a part in it. One that serves several vifs counts for each.
        hypercalls,
        /// Copies,
        copies,
        /// pages mapped,
        maps,
        /// and pages unmapped.
        unmaps,
    }
}

netif::counters! {
    /// Packets that were copied though another way was wanted, by reason.
    Fallbacks {
        /// The way was withdrawn, or is not possible.
        withdrawn,
        /// The destination had not posted pages enough.
        not_ready,
        /// The packet had to be changed.
        changed,
        /// It went to several ports.
        many,
        /// As many packets were mapped as may be.
        no_room,
        /// Xen would not map.
        map_refused,
        /// It was mapped for too long.
        overdue,
    }
}

impl Fallbacks {
    pub(crate) fn count(&mut self, why: Fallback) {
        *match why {
            Fallback::Withdrawn => &mut self.withdrawn,
            Fallback::NotReady => &mut self.not_ready,
            Fallback::Changed => &mut self.changed,
            Fallback::Many => &mut self.many,
            Fallback::NoRoom => &mut self.no_room,
        } += 1;
    }
}

/// Copies of a batch, by way.
#[derive(Clone, Copy, Default)]
pub(crate) struct CopyCount([u32; Datapath::ALL.len()]);

impl CopyCount {
    #[inline]
    pub(crate) fn add(&mut self, path: Datapath, copies: usize) {
        if let Some(sum) = self.0.get_mut(path.index()) {
            *sum += copies as u32;
        }
    }
}

/// Counters of each way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Paths([PathCounters; Datapath::ALL.len()]);

impl Paths {
    /// Of one way.
    #[must_use]
    pub fn of(&self, path: Datapath) -> PathCounters {
        self.0.get(path.index()).copied().unwrap_or_default()
    }

    /// All of them together.
    #[must_use]
    pub fn total(&self) -> PathCounters {
        let mut sum = PathCounters::default();
        for counters in self.0 {
            sum += counters;
        }
        sum
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = (Datapath, PathCounters)> {
        Datapath::ALL.into_iter().zip(self.0)
    }

    /// A batch of copies was done in one hypercall, for each way that some of them were of.
    pub(crate) fn count_hypercalls(&mut self, CopyCount(sums): CopyCount) {
        for (counters, copies) in self.0.iter_mut().zip(sums) {
            counters.hypercalls += u64::from(copies > 0);
            counters.copies += u64::from(copies);
        }
    }

    pub(crate) fn count(&mut self, path: Datapath, change: impl FnOnce(&mut PathCounters)) {
        if let Some(counters) = self.0.get_mut(path.index()) {
            change(counters);
        }
    }
}

impl AddAssign for Paths {
    fn add_assign(&mut self, other: Self) {
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum += more;
        }
    }
}

/// All counters of a vif, or of one of its queues.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// From the guest.
    pub tx: Direction,
    /// To the guest.
    pub rx: Direction,
    /// Packets from the guest that were dropped before they reached the switch.
    pub tx_drops: Drops,
    /// Packets to the guest that were dropped after they left the switch.
    pub rx_drops: Drops,
    /// How packets from the guest were carried.
    pub tx_paths: Paths,
    /// How packets to the guest were carried.
    pub rx_paths: Paths,
    /// Packets from the guest that did not go the way they might have.
    pub fallbacks: Fallbacks,
}

impl AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.tx += other.tx;
        self.rx += other.rx;
        self.tx_drops += other.tx_drops;
        self.rx_drops += other.rx_drops;
        self.tx_paths += other.tx_paths;
        self.rx_paths += other.rx_paths;
        self.fallbacks += other.fallbacks;
    }
}

//! What an interface has done and put up with.

use core::ops::AddAssign;

netif::counters! {
    /// To the backend.
    TxCounters {
        /// Packets put on the ring.
        packets,
        /// Their bytes.
        bytes,
        /// Slots with data that the backend answered well,
        completed,
        /// that it could not use or dropped,
        failed,
        /// and that it answered with a status that means nothing.
        unknown,
        /// Slots that were in flight when the connection ended: whether they arrived is not known.
        lost,
        /// Packets refused for want of room.
        full,
        /// Times requests were published.
        publishes,
        /// Notifications sent.
        notifications,
    }
}

netif::counters! {
    /// From the backend.
    RxCounters {
        /// Packets handed out.
        packets,
        /// Their bytes.
        bytes,
        /// Packets that the backend says it failed to deliver.
        failed,
        /// Packets whose description broke the rules.
        malformed,
        /// Packets whose checksum the device found to be wrong.
        checksum,
        /// Times no page could be had to post.
        no_memory,
        /// Times requests were published.
        publishes,
        /// Notifications sent.
        notifications,
    }
}

/// All counters of an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// To the backend.
    pub tx: TxCounters,
    /// From the backend.
    pub rx: RxCounters,
    /// Events that announced nothing.
    pub spurious: u64,
}

impl AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.tx += other.tx;
        self.rx += other.rx;
        self.spurious = self.spurious.wrapping_add(other.spurious);
    }
}

//! What a vif has done and put up with. Directions are named from the frontend: TX comes from the guest.

use core::ops::AddAssign;

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
        /// No buffer was free.
        no_buffer,
        /// The destination is not connected, or went away.
        unreachable,
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
        /// Copy hypercalls,
        hypercalls,
        /// and the copies in them.
        copies,
        /// Notifications sent.
        notifications,
        /// Times responses were published.
        publishes,
        /// Events that announced nothing.
        spurious,
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
}

impl AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.tx += other.tx;
        self.rx += other.rx;
        self.tx_drops += other.tx_drops;
        self.rx_drops += other.rx_drops;
    }
}

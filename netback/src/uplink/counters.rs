//! What the port has done and put up with.

use crate::datapath::Datapath;

netif::counters! {
    /// What went one way.
    Carried {
        /// Packets of the switch's.
        packets,
        /// Frames that they became, or stayed, for the card.
        frames,
        /// Bytes of those frames.
        bytes,
    }
}

netif::counters! {
    /// What was done to packets on their way out.
    Offloads {
        /// Frames that were cut here,
        segments,
        /// and checksums filled in here, those of segments not among them.
        checksums,
        /// Packets that the card is to cut,
        card_segmented,
        /// and frames whose checksums the card is to fill in.
        card_checksums,
    }
}

netif::counters! {
    /// Packets that came mapped and went out copied, by reason.
    Copied {
        /// The rules of that moment had no address for a page.
        no_address,
        /// Xen would not clean the caches, or a page was not at the machine address by which they are cleaned.
        not_cleaned,
        /// The card took none for too long.
        overdue,
    }
}

netif::counters! {
    /// Pieces of mapped pages that were written back from the caches before the card looked, by who did it.
    Cleaned {
        /// Xen: one operation of `GNTTABOP_cache_flush` each, up to 16 of a packet's in one hypercall.
        by_xen,
        /// This domain, at the machine address.
        at_machine_address,
    }
}

netif::counters! {
    /// Packets that were dropped on their way out, by reason. Of one that was cut, what was left of it.
    SendDrops {
        /// Nobody may look at all of it.
        unreadable,
        /// It asked to be segmented, and cannot be.
        not_segmentable,
        /// It, or a segment of it, is longer than a frame may be, or it would be cut into too many.
        too_big,
        /// There is no address for memory of ours: the backend was not told of a card.
        no_address,
        /// No buffer was free for too long.
        no_buffer,
        /// The card had nothing to do and did not take it.
        refused,
    }
}

netif::counters! {
    /// What came in.
    Arrived {
        /// Frames.
        frames,
        /// Their bytes.
        bytes,
        /// Frames that came in several buffers, and were copied into one.
        merged,
        /// Frames without checksum, which whoever gets them is told,
        blank,
        /// and those that were filled in here, since only the card knows where they belong.
        checksums,
        /// TCP packets that are yet to be cut.
        segmented,
    }
}

netif::counters! {
    /// Frames that were dropped on their way in, by reason.
    ReceiveDrops {
        /// What the card says of the frame makes no sense, or was never agreed on.
        bad_header,
        /// The card says that there are more bytes than the buffer has, or fewer than a header.
        bad_length,
        /// Longer than a packet may be.
        too_big,
        /// No buffer was free to put the pieces together in.
        no_buffer,
    }
}

netif::counters! {
    /// How the card did.
    Hardware {
        /// Times it kept something for longer than pages may be held.
        late,
        /// Times it was reset,
        resets,
        /// did not stop when it was to be reset,
        stuck,
        /// and frames that it had and that were lost with a reset.
        lost,
    }
}

/// All counters of a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UplinkCounters {
    sent: [Carried; Datapath::ALL.len()],
    /// Offloads on the way out.
    pub offloads: Offloads,
    /// Packets that came mapped and were copied.
    pub copied: Copied,
    /// What was written back from the caches.
    pub cleaned: Cleaned,
    /// What did not get out.
    pub send_drops: SendDrops,
    /// What came in.
    pub arrived: Arrived,
    /// What did not get in.
    pub receive_drops: ReceiveDrops,
    /// How the card did.
    pub hardware: Hardware,
}

impl UplinkCounters {
    /// What was given to the card by one way: [`Copy`](Datapath::Copy) is all that lay in memory of ours.
    #[must_use]
    pub fn sent(&self, path: Datapath) -> Carried {
        self.sent.get(path.index()).copied().unwrap_or_default()
    }

    pub(super) fn count_sent(&mut self, path: Datapath, carried: Carried) {
        if let Some(counters) = self.sent.get_mut(path.index()) {
            *counters += carried;
        }
    }
}

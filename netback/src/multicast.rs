//! Which groups a frontend wants to hear (io/netif.h, `feature-multicast-control`).

use heapless::Vec;
use netif::mac::MacAddr;
use netif::slot::TxStatus;
use netif::tx::MulticastChange;

/// Addresses in a filter at most (`XEN_NETBK_MCAST_MAX` of Linux's netback).
pub const MAX_GROUPS: usize = 64;

/// The multicast filter of a vif. It may be amended at any time, and holds only while the frontend asks for it.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// The frontend's `request-multicast-control`.
    pub requested: bool,
    /// Ascending.
    groups: Vec<MacAddr, MAX_GROUPS>,
}

impl Filter {
    /// An empty one.
    #[must_use]
    pub const fn new(requested: bool) -> Self {
        Self { requested, groups: Vec::new() }
    }

    /// Amends the filter. What is there is not added again, and what is not there is removed all the same.
    pub fn apply(&mut self, change: MulticastChange) -> TxStatus {
        match change {
            MulticastChange::Add(group) => match self.groups.binary_search(&group) {
                Ok(_) => TxStatus::OKAY,
                Err(at) => match self.groups.insert(at, group) {
                    Ok(()) => TxStatus::OKAY,
                    Err(_full) => TxStatus::ERROR,
                },
            },
            MulticastChange::Remove(group) => {
                if let Ok(at) = self.groups.binary_search(&group) {
                    self.groups.remove(at);
                }
                TxStatus::OKAY
            }
        }
    }

    /// Whether a packet to `dst` is for the frontend. Broadcast always is.
    #[must_use]
    pub fn passes(&self, dst: MacAddr) -> bool {
        !self.requested
            || !dst.is_multicast()
            || dst == MacAddr::BROADCAST
            || self.groups.binary_search(&dst).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(number: u8) -> MacAddr {
        MacAddr([1, 0, 0x5e, 0, 0, number])
    }

    #[test]
    fn only_named_groups_pass_once_it_is_asked_for() {
        let mut filter = Filter::default();
        assert!(filter.passes(group(1)));
        assert_eq!(filter.apply(MulticastChange::Add(group(2))), TxStatus::OKAY);
        assert!(filter.passes(group(1)));
        filter.requested = true;
        assert!(!filter.passes(group(1)) && filter.passes(group(2)));
        assert!(filter.passes(MacAddr::BROADCAST) && filter.passes(MacAddr([2, 0, 0, 0, 0, 1])));
        assert_eq!(filter.apply(MulticastChange::Remove(group(2))), TxStatus::OKAY);
        assert_eq!(filter.apply(MulticastChange::Remove(group(2))), TxStatus::OKAY);
        assert!(!filter.passes(group(2)));
    }

    #[test]
    fn hostile_23_the_filter_is_bounded() {
        let mut filter = Filter { requested: true, ..Filter::default() };
        // Added downwards, so that the order is ours.
        for number in (0..64).rev() {
            assert_eq!(filter.apply(MulticastChange::Add(group(number))), TxStatus::OKAY);
        }
        assert_eq!(filter.apply(MulticastChange::Add(group(64))), TxStatus::ERROR);
        assert_eq!(filter.apply(MulticastChange::Add(group(7))), TxStatus::OKAY);
        assert!((0..64).all(|number| filter.passes(group(number))));
        assert!(!filter.passes(group(64)));
        assert_eq!(filter.apply(MulticastChange::Remove(group(7))), TxStatus::OKAY);
        assert_eq!(filter.apply(MulticastChange::Add(group(64))), TxStatus::OKAY);
        assert!(!filter.passes(group(7)) && filter.passes(group(64)));
    }
}

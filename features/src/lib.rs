#![no_std]
#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

use core::fmt;
#[cfg(not(loom))]
use core::sync::atomic::{AtomicU64, Ordering};
#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};

use bitflags::bitflags;
use hypercall::{Errno, Hypervisor};

bitflags! {
    /// What Xen may offer the calling domain (`XENFEAT_*`, features.h, submap 0). It says nothing of any peer.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct XenFeatures: u32 {
        /// The guest may write its own page tables.
        const WRITABLE_PAGE_TABLES = 1 << 0;
        /// The guest may write its own descriptor tables.
        const WRITABLE_DESCRIPTOR_TABLES = 1 << 1;
        /// Frame numbers are guest-physical: Xen translates. A map's `host_addr` is then a guest-physical address.
        const AUTO_TRANSLATED_PHYSMAP = 1 << 2;
        /// The guest runs in the most privileged mode of the processor.
        const SUPERVISOR_MODE_KERNEL = 1 << 3;
        /// Page directories may lie above 4 GiB.
        const PAE_PGDIR_ABOVE_4GB = 1 << 4;
        /// MMU updates can keep accessed and dirty bits.
        const MMU_PT_UPDATE_PRESERVE_AD = 1 << 5;
        /// Helpers for high memory.
        const HIGHMEM_ASSIST = 1 << 6;
        /// Maps can set the available bits of page table entries.
        const GNTTAB_MAP_AVAIL_BITS = 1 << 7;
        /// Events can come by a vector of their own.
        const HVM_CALLBACK_VECTOR = 1 << 8;
        /// The clock page is safe to use.
        const HVM_SAFE_PVCLOCK = 1 << 9;
        /// Physical interrupts can come by event channel.
        const HVM_PIRQS = 1 << 10;
        /// This is the initial domain.
        const DOM0 = 1 << 11;
        /// A map of a direct-mapped domain also appears at gfn == machine frame. Advertised by 4.5.0-rc1 alone.
        const GRANT_MAP_IDENTITY = 1 << 12;
        /// Memory operations take a virtual NUMA node.
        const MEMORY_OP_VNODE_SUPPORTED = 1 << 13;
        /// Arm: firmware calls by SMCCC work.
        const ARM_SMCCC_SUPPORTED = 1 << 14;
        /// x86: the ACPI root may lie anywhere.
        const LINUX_RSDP_UNRESTRICTED = 1 << 15;
        /// Guest-physical addresses are not machine addresses. Since 4.16.
        const NOT_DIRECT_MAPPED = 1 << 16;
        /// Guest-physical addresses are machine addresses. Since 4.16.
        const DIRECT_MAPPED = 1 << 17;
        const _ = !0;
    }
}

/// Counts changes: two snapshots with the same epoch are the same snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u32);

/// What was on offer at one moment; never changes. Take a new one to learn what is on offer now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    epoch: Epoch,
    bits: XenFeatures,
}

impl Snapshot {
    /// Which moment this is of.
    #[must_use]
    pub const fn epoch(self) -> Epoch {
        self.epoch
    }

    /// What may be used: what Xen advertises, less what was withdrawn.
    #[must_use]
    pub const fn bits(self) -> XenFeatures {
        self.bits
    }

    /// Whether all of these may be used.
    #[must_use]
    pub const fn has(self, bits: XenFeatures) -> bool {
        self.bits.contains(bits)
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} (epoch {})", self.bits.bits(), self.epoch.0)
    }
}

/// The features of this domain, which may come and go while it runs.
///
/// Xen gives no notice of a change. [`refresh`](Self::refresh) reads the bits again: at start, on every resume,
/// before every connect, and whenever there is reason to doubt them. [`withdraw`](Self::withdraw) and [`restore`](Self::restore) are the operator's word. Any thread may
/// take a [`snapshot`](Self::snapshot), at the cost of one load.
#[derive(Debug)]
pub struct Features {
    /// Epoch and usable bits, so that one load sees both.
    now: AtomicU64,
    /// Withdrawn and advertised bits.
    sources: AtomicU64,
}

const fn pack(high: u32, low: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

const fn unpack(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

impl Features {
    /// Reads what Xen advertises now.
    ///
    /// # Errors
    /// As Xen answers.
    pub fn read(hv: &impl Hypervisor) -> Result<Self, Errno> {
        let bits = hv.features(0)?;
        Ok(Self { now: AtomicU64::new(pack(0, bits)), sources: AtomicU64::new(pack(0, bits)) })
    }

    /// What may be used now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let (epoch, bits) = unpack(self.now.load(Ordering::Acquire));
        Snapshot { epoch: Epoch(epoch), bits: XenFeatures::from_bits_retain(bits) }
    }

    /// What is withdrawn by the operator's word.
    #[must_use]
    pub fn withdrawn(&self) -> XenFeatures {
        XenFeatures::from_bits_retain(unpack(self.sources.load(Ordering::Acquire)).0)
    }

    /// Reads the bits again. Answers the snapshot that holds from now on, with a new epoch if anything changed.
    ///
    /// # Errors
    /// As Xen answers; the old snapshot then still holds.
    pub fn refresh(&self, hv: &impl Hypervisor) -> Result<Snapshot, Errno> {
        let bits = hv.features(0)?;
        Ok(self.change(|withdrawn, _| (withdrawn, bits)))
    }

    /// Treats `bits` as not advertised, whatever Xen says, until they are restored.
    pub fn withdraw(&self, bits: XenFeatures) -> Snapshot {
        self.change(|withdrawn, advertised| (withdrawn | bits.bits(), advertised))
    }

    /// Takes a withdrawal back. Only what Xen advertises comes back.
    pub fn restore(&self, bits: XenFeatures) -> Snapshot {
        self.change(|withdrawn, advertised| (withdrawn & !bits.bits(), advertised))
    }

    fn change(&self, to: impl Fn(u32, u32) -> (u32, u32)) -> Snapshot {
        // Both closures always answer `Some`, so neither update can fail.
        let update = |word| {
            let (withdrawn, advertised) = unpack(word);
            let (withdrawn, advertised) = to(withdrawn, advertised);
            Some(pack(withdrawn, advertised))
        };
        let _ = self.sources.fetch_update(Ordering::AcqRel, Ordering::Acquire, update);
        loop {
            let mut sources = 0;
            let publish = |word| {
                let (epoch, bits) = unpack(word);
                // After `now`, so that what another thread published since makes us look again.
                sources = self.sources.load(Ordering::Acquire);
                let (withdrawn, advertised) = unpack(sources);
                let usable = advertised & !withdrawn;
                let epoch = if usable == bits { epoch } else { epoch.wrapping_add(1) };
                Some(pack(epoch, usable))
            };
            let _ = self.now.fetch_update(Ordering::AcqRel, Ordering::Acquire, publish);
            // It may also have changed the sources and found nothing new to publish; then what we published is out of
            // date. Its update of `now` comes before ours, so we see its sources here.
            if self.sources.load(Ordering::Acquire) == sources {
                break;
            }
        }
        self.snapshot()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(bits: u32) -> Features {
        Features { now: AtomicU64::new(pack(0, bits)), sources: AtomicU64::new(pack(0, bits)) }
    }

    #[test]
    fn withdrawal_changes_the_epoch_once_and_restoring_brings_back_only_what_is_advertised() {
        let features = with(XenFeatures::DOM0.bits());
        let before = features.snapshot();
        let after = features.withdraw(XenFeatures::DOM0 | XenFeatures::GRANT_MAP_IDENTITY);
        assert!(!after.has(XenFeatures::DOM0));
        assert_eq!(after.epoch(), Epoch(before.epoch().0 + 1));
        assert_eq!(features.withdraw(XenFeatures::DOM0), after, "nothing new was withdrawn");
        let back = features.restore(XenFeatures::all());
        assert!(back.has(XenFeatures::DOM0));
        assert!(!back.has(XenFeatures::GRANT_MAP_IDENTITY), "never advertised");
        assert_eq!(back.epoch(), Epoch(2));
    }

    #[test]
    fn bits_are_those_of_features_h() {
        assert_eq!(XenFeatures::GRANT_MAP_IDENTITY.bits(), 0x1000);
        let dom0_on_arm = XenFeatures::from_bits_retain(0x26805);
        assert!(dom0_on_arm.contains(XenFeatures::DIRECT_MAPPED | XenFeatures::DOM0));
        assert!(!dom0_on_arm.contains(XenFeatures::NOT_DIRECT_MAPPED));
    }
}

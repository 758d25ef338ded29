//! Being wrong on purpose about where a card finds what a guest lent.

use features::XenFeatures;
use netback::datapath::Arch;

use crate::world::Config;

/// What a backend must not believe. A run in which it does shows that it would be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misrule {
    /// The card is given the guest-physical address at which the page was mapped.
    MappedAddress,
    /// It is given the machine address.
    MachineAddress,
    /// Nobody cleans the caches of what it is to read: Xen says that it has, and has not.
    NoCleaning,
    /// They are cleaned at the guest-physical address that equals the machine address, as if the page were there. So did Linux 3.15.
    CleaningElsewhere,
}

impl Misrule {
    /// Has a machine's backend go by it: what it is told of the machine is no longer what the machine is.
    #[must_use]
    pub fn over(self, config: Config) -> Config {
        let mut config = Config { misrule: Some(self), ..config };
        let (domain, facts) = (&mut config.domain, &mut config.backend.facts);
        let (direct, other) =
            (XenFeatures::DIRECT_MAPPED.bits(), XenFeatures::NOT_DIRECT_MAPPED.bits());
        match self {
            Self::MappedAddress => {
                domain.features = domain.features & !direct | other;
                (facts.arch, facts.iommu_maps) = (Arch::X86, true);
            }
            Self::MachineAddress => domain.features = domain.features & !other | direct,
            Self::NoCleaning | Self::CleaningElsewhere => {
                (domain.cache_flush, domain.flushes_nothing) = (true, true);
                facts.cache_flush = true;
            }
        }
        config
    }
}

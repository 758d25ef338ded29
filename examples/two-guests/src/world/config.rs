//! What a machine is like.

use std::num::NonZeroUsize;

use features::XenFeatures;
use netback::Hotplug;
use netback::datapath::{Arch, Facts, Nic, Policy};
use netback::switch::{Seed, SwitchLimits};
use sim::{DmaConfig, DomainConfig};

use crate::misrule::Misrule;
use crate::uplink::CardConfig;

/// How a machine is made.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The same seed gives the same run.
    pub seed: u64,
    /// The backend.
    pub backend: netback::Config,
    /// The domain that the backend is in.
    pub domain: DomainConfig,
    /// How its network card gets at memory,
    pub card: DmaConfig,
    /// and what else it can do.
    pub nic: CardConfig,
    /// What the backend is wrong about.
    pub misrule: Option<Misrule>,
    /// Whether that is a domain of its own, which can die. Else it is domain 0.
    pub driver_domain: bool,
    /// Nanoseconds that pass while each domain has a turn.
    pub tick: u64,
}

impl Default for Config {
    fn default() -> Self {
        let buffers = |count| NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN);
        Self {
            seed: 0,
            backend: netback::Config {
                max_queues: 4,
                small_buffers: buffers(1024),
                large_buffers: buffers(32),
                hotplug: Hotplug::Script,
                max_vifs: 16,
                switch: SwitchLimits::default(),
                seed: Seed(1, 2),
                facts: Board::Arm.facts(),
                policy: Policy::default(),
            },
            domain: Board::Arm.domain(),
            card: Board::Arm.card(),
            nic: CardConfig::default(),
            misrule: None,
            driver_domain: false,
            tick: 10_000,
        }
    }
}

impl Config {
    /// A machine that is quickly made, for those who make many: few packet buffers.
    #[must_use]
    pub fn small(seed: u64) -> Self {
        let mut config = Self { seed, ..Self::default() };
        let buffers = |count| NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN);
        config.backend.small_buffers = buffers(512);
        config.backend.large_buffers = buffers(16);
        config
    }
}

/// What the machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Board {
    /// An Arm board whose network card sees no caches. Xen cleans them.
    Arm,
    /// One of 2014: Xen does not clean them, but has XENFEAT bit 12, grant_map_identity.
    Arm2014,
    /// A PVH domain 0 on a server, where an IOMMU gives the card the same addresses as the domain.
    Server,
}

impl Board {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Self); 3] =
        [("arm", Self::Arm), ("arm-2014", Self::Arm2014), ("server", Self::Server)];

    /// The backend's domain.
    #[must_use]
    pub fn domain(self) -> DomainConfig {
        let dom0 = DomainConfig::dom0();
        let identity = XenFeatures::GRANT_MAP_IDENTITY.bits();
        match self {
            Self::Arm => dom0,
            Self::Arm2014 => {
                DomainConfig { cache_flush: false, features: dom0.features | identity, ..dom0 }
            }
            Self::Server => {
                let direct = XenFeatures::DIRECT_MAPPED.bits();
                let features = dom0.features & !direct | XenFeatures::NOT_DIRECT_MAPPED.bits();
                DomainConfig { direct_mapped: false, features, cache_flush: false, ..dom0 }
            }
        }
    }

    /// Its network card.
    #[must_use]
    pub const fn card(self) -> DmaConfig {
        match self {
            Self::Arm | Self::Arm2014 => DmaConfig::BARE,
            Self::Server => DmaConfig::SERVER,
        }
    }

    /// What the backend finds out about both.
    #[must_use]
    pub fn facts(self) -> Facts {
        let server = self == Self::Server;
        Facts {
            arch: if server { Arch::X86 } else { Arch::Arm },
            grant_copy: true,
            cache_flush: self == Self::Arm,
            iommu_maps: server,
            uplink: Some(Nic { coherent: self.card().coherent }),
        }
    }
}

impl Config {
    /// A machine of this kind.
    #[must_use]
    pub fn on(self, board: Board) -> Self {
        let backend = netback::Config { facts: board.facts(), ..self.backend };
        Self { domain: board.domain(), card: board.card(), backend, ..self }
    }
}

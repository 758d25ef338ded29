//! The port to the world, on a simulated card that reads and writes memory by bus address.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod allocation;
mod card;
mod combinations;
mod frames;
mod hang;
mod receive;
mod send;

use card::TestCard;
use common::{MS, Machine};
use features::XenFeatures;
use hypercall::Handle;
use netback::datapath::{Arch, Facts, Nic, Policy};
use netback::uplink::{NetHeader, Offers, Uplink, UplinkConfig};
use netfront::Meta;
use sim::{DmaConfig, DmaCounts, DomainConfig, Iommu, Item};

use frames::OUTSIDE;

/// A domain 0, its card, and what the backend is told of both.
#[derive(Clone, Copy, Debug)]
struct Board {
    domain: DomainConfig,
    card: DmaConfig,
    facts: Facts,
}

impl Board {
    /// Arm: the card sees what the processors have in their caches, or Xen cleans them, or there is bit 12, or none of it.
    fn arm(coherent: bool, cache_flush: bool, identity: bool) -> Self {
        let domain = DomainConfig::dom0();
        let bit = if identity { XenFeatures::GRANT_MAP_IDENTITY.bits() } else { 0 };
        let domain = DomainConfig { cache_flush, features: domain.features | bit, ..domain };
        let facts = Facts {
            arch: Arch::Arm,
            grant_copy: true,
            cache_flush,
            iommu_maps: false,
            uplink: Some(Nic { coherent }),
        };
        Self { domain, card: DmaConfig { coherent, iommu: Iommu::Machine }, facts }
    }

    /// A PVH domain 0 behind an IOMMU, which knows of what is mapped or does not.
    fn server(grants: bool) -> Self {
        let dom0 = DomainConfig::dom0();
        let direct = XenFeatures::DIRECT_MAPPED.bits();
        let features = dom0.features & !direct | XenFeatures::NOT_DIRECT_MAPPED.bits();
        let facts = Facts {
            arch: Arch::X86,
            grant_copy: true,
            cache_flush: false,
            iommu_maps: grants,
            uplink: Some(Nic { coherent: true }),
        };
        Self {
            domain: DomainConfig { direct_mapped: false, features, cache_flush: false, ..dom0 },
            card: DmaConfig { coherent: true, iommu: Iommu::Guest { grants } },
            facts,
        }
    }

    fn plain() -> Self {
        Self::arm(true, true, false)
    }
}

struct World {
    machine: Machine,
    uplink: Uplink<sim::SimHv, TestCard>,
    /// Pages of the guest's that are mapped while it is connected.
    rings: usize,
}

impl World {
    fn new(board: Board, offers: Offers) -> Self {
        Self::with(board, offers, UplinkConfig { buffers: 32, ..UplinkConfig::default() })
    }

    /// One guest, and somebody outside whom the switch knows.
    fn with(board: Board, offers: Offers, config: UplinkConfig) -> Self {
        let policy = Policy { map_from: 256, settle: MS, ..Policy::default() };
        let backend = netback::Config { facts: board.facts, policy, ..common::config() };
        let mut machine = Machine::in_domain(board.domain, backend);
        let card = TestCard::new(&machine.sim, &machine.hv, board.card, offers);
        machine
            .guest(netfront::Config { static_grants: false, ..netfront::Config::new(Handle(0)) });
        let mut world = Self { machine, uplink: Uplink::new(card, config), rings: 0 };
        world.rings = world.lent();
        world.settle();
        let hello = common::frame([0xff; 6], OUTSIDE, 60, 1);
        assert!(world.card().deliver(NetHeader::default(), &hello));
        world.settle();
        assert_eq!(world.machine.guests[0].take().len(), 1);
        // The guest is known, too.
        world.send(&common::frame(OUTSIDE, world.guest(), 60, 1), Meta::default());
        world.settle();
        assert_eq!(world.take_wire().len(), 1);
        // The local stack was greeted, too.
        assert_eq!(world.machine.take_local().len(), 1);
        world
    }

    fn guest(&self) -> [u8; 6] {
        self.machine.guests[0].mac()
    }

    fn card(&mut self) -> &mut TestCard {
        self.uplink.card_mut()
    }

    fn send(&mut self, frame: &[u8], meta: Meta) {
        self.machine.guests[0].frontend().send(0, frame, meta).unwrap();
    }

    /// Until nothing happens any more, while time stands still.
    fn settle(&mut self) {
        for _ in 0..1000 {
            self.machine.settle();
            let before = (self.uplink.in_flight(), *self.uplink.counters());
            let more = self.uplink.poll(&mut self.machine.backend, self.machine.now);
            let ran = self.uplink.card_mut().run();
            if !more && !ran && before == (self.uplink.in_flight(), *self.uplink.counters()) {
                self.machine.settle();
                return;
            }
        }
        panic!("no end to it");
    }

    /// Lets time pass, in steps of `step`.
    fn pass(&mut self, nanos: u64, step: u64) {
        let end = self.machine.now.after(nanos);
        while self.machine.now < end {
            self.machine.now = self.machine.now.after(step).min(end);
            self.settle();
        }
    }

    /// Frames as they went over the wire.
    fn take_wire(&mut self) -> Vec<Vec<u8>> {
        let wire = std::mem::take(&mut self.card().wire);
        wire.into_iter().flat_map(|(header, bytes)| frames::sent(header, &bytes)).collect()
    }

    /// Pages of guests' packets that domain 0 has mapped; rings are not among them.
    fn lent(&self) -> usize {
        let ledger = self.machine.sim.ledger();
        let mapped = |(_, item): &(_, Item)| matches!(item, Item::Mapping { .. });
        ledger.entries().filter(mapped).count() - self.rings
    }

    /// All that the card did was right, and nobody holds anything.
    fn assert_right(&mut self) {
        let counts = self.card().device.counts();
        let expected =
            DmaCounts { reads: counts.reads, writes: counts.writes, ..DmaCounts::default() };
        assert_eq!(counts, expected);
        assert_eq!(self.machine.sim.violations(), Vec::<String>::new());
        assert_eq!((self.uplink.in_flight(), self.machine.backend.open()), (0, 0));
        assert!(self.lent() == 0 || self.machine.guests[0].frontend.is_none());
        let posted = self.card().posted();
        assert_eq!(self.machine.backend.pools().all().out(), posted);
    }
}

//! The network card reads by itself what guests lent, by bus address, and sees no caches. What it sends is what the guest wrote,
//! whatever Xen advertises; and a driver that goes by a wrong rule sends something else, and is noticed.
//!
//! In 2014 Linux 3.15's netback went over to mapping, and dom0s of Arm boards sent garbage. Xen 4.5.0-rc1 advertised
//! XENFEAT_grant_map_identity (bit 12) to put that right; the release took it away again.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use features::XenFeatures;
use hypercall::Handle;
use netback::counters::{Fallbacks, Paths};
use netback::datapath::{Arch, Datapath, Datapaths, Facts, Nic, Policy};
use sim::{DmaConfig, DmaCounts, DomainConfig, Iommu};
use two_guests::{Board, Config, GuestConfig, Misrule, Place, SECOND, Sizes, Tally, World};

const MS: u64 = SECOND / 1000;
const LARGEST: usize = 65_535;
const TRANSLATED: XenFeatures = XenFeatures::AUTO_TRANSLATED_PHYSMAP;
const IDENTITY: XenFeatures = XenFeatures::GRANT_MAP_IDENTITY;
const DIRECT: XenFeatures = XenFeatures::DIRECT_MAPPED;
const NOT_DIRECT: XenFeatures = XenFeatures::NOT_DIRECT_MAPPED;

/// One guest that sends frames of all sizes out of the card, and a little that comes in.
fn machine(config: Config) -> World {
    let mut config = Config { domain: config.domain, ..config };
    config.backend.policy = Policy { map_from: 256, settle: 20_000, ..Policy::default() };
    let mut world = World::new(config);
    let frontend =
        netfront::Config { static_grants: false, posted: 64, ..netfront::Config::new(Handle(0)) };
    let guest = GuestConfig { frontend, max_frame: LARGEST, ..GuestConfig::default() };
    world.add_guest(guest).unwrap();
    let (guest, outside) = (Place::Guest(0), Place::Outside);
    world.flow(guest, outside, Sizes::Spread(LARGEST), 4);
    world.flow(guest, outside, Sizes::Segmented(LARGEST), 4);
    world.flow(outside, guest, Sizes::Fixed(64), 1);
    world.connect().unwrap();
    world
}

fn paths(world: &World) -> Paths {
    world.vif(0).unwrap().counters.tx_paths
}

fn by(world: &World, path: Datapath) -> u64 {
    paths(world).of(path).packets
}

fn fallbacks(world: &World) -> Fallbacks {
    // Before the card's address is known, packets go to everybody.
    let mut fallbacks = world.vif(0).unwrap().counters.fallbacks;
    fallbacks.many = 0;
    fallbacks
}

/// Everything came as it was sent, and the card never read what it had better not.
fn assert_right(mut world: World) {
    let tally = world.finish();
    assert!(tally.is_clean(), "{tally}\n{}", world.drops());
    let dma = world.uplink().dma();
    let expected = DmaCounts { reads: dma.reads, writes: dma.writes, ..DmaCounts::default() };
    assert_eq!(dma, expected);
    assert_eq!(world.uplink().bad_sums(), 0);
    assert_eq!(world.sim.violations(), Vec::<String>::new());
}

/// The design's rule, sentence by sentence.
fn expected(bits: XenFeatures, facts: &Facts) -> Datapath {
    let Some(Nic { coherent }) = facts.uplink else { return Datapath::Map };
    let has = |bit| bits.contains(bit);
    let arm = facts.arch == Arch::Arm;
    // Direct-mapped: bit 17, or a dom0 on Arm where neither 16 nor 17 is set.
    let direct = has(DIRECT) || (arm && !has(NOT_DIRECT));
    let iommu = !arm && facts.iommu_maps;
    if !has(TRANSLATED) || !(direct || iommu) {
        Datapath::Copy
    } else if coherent || !arm || facts.cache_flush {
        Datapath::Map
    } else if direct && has(IDENTITY) {
        Datapath::MapIdentity
    } else {
        Datapath::Copy
    }
}

/// A machine as these bits and facts say, in truth.
fn truth(bits: XenFeatures, facts: Facts, seed: u64) -> Config {
    let Some(Nic { coherent }) = facts.uplink else { panic!("a card") };
    let arm = facts.arch == Arch::Arm;
    let direct_mapped = bits.contains(DIRECT) || (arm && !bits.contains(NOT_DIRECT));
    let iommu = match (arm, direct_mapped) {
        (true, true) if seed.is_multiple_of(2) => Iommu::None,
        (_, true) => Iommu::Machine,
        (_, false) => Iommu::Guest { grants: facts.iommu_maps },
    };
    let mut config = Config { seed, ..Config::small(seed) };
    let others = XenFeatures::from_bits_retain(config.domain.features)
        - (TRANSLATED | IDENTITY | DIRECT | NOT_DIRECT);
    config.domain = DomainConfig {
        direct_mapped,
        features: (others | bits).bits(),
        cache_flush: facts.cache_flush,
        ..config.domain
    };
    // On x86 devices see what is in the caches, whatever they are.
    config.card = DmaConfig { coherent: coherent || !arm, iommu };
    config.backend.facts = facts;
    config
}

#[test]
fn whatever_xen_offers_the_card_sends_what_the_guest_wrote() {
    let mut seen = [0; Datapath::ALL.len()];
    let bools = [false, true];
    let mut seed = 0;
    for set in 0..16 {
        let bits = [TRANSLATED, IDENTITY, NOT_DIRECT, DIRECT].into_iter().enumerate();
        let bits = bits.filter(|(at, _)| set >> at & 1 != 0).map(|(_, bit)| bit).collect();
        for (arch, iommu_maps) in [(Arch::Arm, false), (Arch::X86, false), (Arch::X86, true)] {
            for (cache_flush, coherent) in bools.into_iter().flat_map(|f| bools.map(|c| (f, c))) {
                let uplink = Some(Nic { coherent });
                let facts = Facts { arch, grant_copy: true, cache_flush, iommu_maps, uplink };
                seed += 1;
                let mut world = machine(truth(bits, facts, seed));
                let hv = &world.backend().unwrap().hv;
                assert_eq!(Facts::probe(hv, arch, iommu_maps, uplink), facts);
                world.run_for(MS / 2);
                let path = expected(bits, &facts);
                seen[path.index()] += 1;
                let carried = by(&world, path);
                assert!(carried > 5, "{carried} by {path}: {bits:?} {facts:?}");
                for other in [Datapath::Map, Datapath::MapIdentity] {
                    let expected = other == path;
                    assert_eq!(by(&world, other) > 0, expected, "{other}: {bits:?} {facts:?}");
                }
                if path != Datapath::Copy {
                    assert_eq!(fallbacks(&world), Fallbacks::default());
                    assert!(world.uplink().dma().reads > 5);
                }
                assert_right(world);
            }
        }
    }
    // Each of the three was right somewhere.
    assert_eq!(seed, 192);
    assert!(
        [Datapath::Copy, Datapath::Map, Datapath::MapIdentity]
            .into_iter()
            .all(|path| seen[path.index()] >= 3),
        "{seen:?}"
    );
}

/// Says what Xen advertises from now on, and tells nobody.
fn advertise(world: &World, bits: XenFeatures) {
    world.sim.set_features(world.backend().unwrap().hv.id(), bits.bits());
}

#[test]
fn xen_4_5_takes_the_identity_mapping_away_in_mid_traffic_and_nobody_is_told() {
    let board = Board::Arm2014;
    let mut world = machine(Config::small(1).on(board));
    let bits = XenFeatures::from_bits_retain(board.domain().features);
    let up = |world: &World| world.backend().unwrap().backend.datapaths().uplink;
    let (mut before, mut refused) = (0, 0);
    for turn in 0..50 {
        // The release candidate: large packets are mapped, at their machine addresses too, and cleaned there.
        world.run_for(MS / 4);
        let mapped = by(&world, Datapath::MapIdentity);
        assert!(mapped > before, "turn {turn}\n{}", world.drops());
        assert_eq!(fallbacks(&world).map_refused, refused);
        // The release. What the card has not sent yet is still at both addresses.
        let stuck = turn % 3 == 0;
        world.uplink_mut().hold(stuck, turn % 3 == 1);
        advertise(&world, bits - IDENTITY);
        world.run_for(MS / 4);
        world.uplink_mut().hold(false, false);
        world.run_for(MS / 4);
        // The first that were mapped after it were unmapped again and copied: they were at one address only. Where the card took
        // nothing, nothing was mapped for so long that the bits may have been read before, as they are once a second.
        let before_it = std::mem::replace(&mut refused, fallbacks(&world).map_refused);
        assert!(refused > before_it || stuck, "turn {turn}");
        assert_eq!(up(&world), Datapaths::COPY | Datapaths::STATIC);
        before = by(&world, Datapath::MapIdentity);
        world.run_for(MS / 4);
        assert_eq!(by(&world, Datapath::MapIdentity), before, "copied from then on");
        assert_eq!(fallbacks(&world).map_refused, refused, "and not tried any more");
        // Back to the candidate; that, too, is seen when somebody looks.
        advertise(&world, bits);
        world.backend_mut().unwrap().backend.refresh_features().unwrap();
    }
    assert_right(world);
}

/// What becomes of a machine's packets if its backend goes by this rule: with the right one all is well.
fn misled(config: Config, misrule: Misrule) -> (World, Tally) {
    let mut world = machine(misrule.over(config));
    world.run_for(5 * MS);
    let tally = world.tally();
    (world, tally)
}

/// The card has sent something else than the guest wrote, and that was noticed.
fn assert_garbage((world, tally): &(World, Tally)) {
    assert!(by(world, Datapath::Map) > 0, "{:?}", paths(world));
    assert!(tally.corrupt > 0, "{tally}");
}

fn coherent(mut config: Config) -> Config {
    config.card.coherent = true;
    config.backend.facts.uplink = Some(Nic { coherent: true });
    config
}

#[test]
fn a_card_that_is_given_the_guest_physical_address_of_a_direct_mapped_domain_sends_garbage() {
    let config = || coherent(Config::small(2).on(Board::Arm));
    let mut world = machine(config());
    world.run_for(5 * MS);
    assert!(by(&world, Datapath::Map) > 100);
    assert_right(world);
    let outcome = misled(config(), Misrule::MappedAddress);
    assert_garbage(&outcome);
}

#[test]
fn a_card_behind_an_iommu_that_is_given_the_machine_address_sends_garbage() {
    let config = || Config::small(3).on(Board::Server);
    let mut world = machine(config());
    world.run_for(5 * MS);
    assert!(by(&world, Datapath::Map) > 100);
    assert_right(world);
    let outcome = misled(config(), Misrule::MachineAddress);
    assert_garbage(&outcome);
    let dma = outcome.0.uplink().dma();
    assert!(dma.faults + dma.stray > 0, "{dma:?}");
}

#[test]
fn a_card_that_sees_no_caches_sends_garbage_unless_they_are_cleaned() {
    let config = || Config::small(4).on(Board::Arm);
    let mut world = machine(config());
    world.run_for(5 * MS);
    assert!(by(&world, Datapath::Map) > 100);
    assert_right(world);
    let outcome = misled(config(), Misrule::NoCleaning);
    assert_garbage(&outcome);
    assert!(outcome.0.uplink().dma().stale > 0);
}

#[test]
fn linux_3_15_cleaned_where_the_page_was_not_and_sent_garbage() {
    // Neither bit 12 nor the hypercall: the right rule copies.
    let mut config = Config::small(5).on(Board::Arm2014);
    config.domain.features &= !IDENTITY.bits();
    let mut world = machine(config);
    world.run_for(5 * MS);
    assert_eq!(by(&world, Datapath::Map) + by(&world, Datapath::MapIdentity), 0);
    assert_right(world);
    // That netback mapped all the same, and the driver took the machine address for one of its own.
    let outcome = misled(config, Misrule::CleaningElsewhere);
    assert_garbage(&outcome);
    let world = &outcome.0;
    assert!(world.uplink().dma().stale > 0);
    assert!(!world.sim.violations().is_empty(), "nothing was there to clean");
    // With bit 12 the page is there, and the very same driver is right.
    let config = Config::small(5).on(Board::Arm2014);
    let (mut world, _) = misled(config, Misrule::CleaningElsewhere);
    assert!(by(&world, Datapath::Map) > 100);
    assert!(world.finish().is_clean());
    assert_eq!(world.sim.violations(), Vec::<String>::new());
}

//! Whatever a card can do by itself, what goes out is what the guests wrote and what comes in is what the outside wrote: while ways
//! and bits go and come in mid-transfer, and when a guest dies whose pages the card has.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::num::NonZeroUsize;

use hypercall::Handle;
use netback::datapath::{Datapath, Policy};
use netback::uplink::Offers;
use sim::Item;
use two_guests::{Board, CardConfig, Config, GuestConfig, Lever, Place, SECOND, Sizes, World};

const MS: u64 = SECOND / 1000;
const LARGEST: usize = 65_535;

/// All that a card may offer: segments only with checksums (virtio 1.2, 5.1.3.1).
fn all_offers() -> Vec<Offers> {
    let ways = |sums: Offers, v4: Offers, v6: Offers| {
        [Offers::empty(), sums, sums | v4, sums | v6, sums | v4 | v6]
    };
    let out = ways(Offers::CSUM, Offers::TSO4, Offers::TSO6);
    let back = ways(Offers::RX_CSUM, Offers::RX_TSO4, Offers::RX_TSO6);
    let both = out.into_iter().flat_map(|out| back.map(|back| out | back));
    both.flat_map(|both| [both, both | Offers::MERGE]).collect()
}

/// Two guests whose pages are lent anew for each packet, and both ways of the card under load.
fn machine(seed: u64, offers: Offers, board: Board) -> World {
    let mut config = Config::small(seed).on(board);
    config.nic = CardConfig { offers, buffers: 16 };
    config.backend.large_buffers = NonZeroUsize::new(48).unwrap();
    config.backend.policy = Policy { map_from: 256, settle: 20_000, ..Policy::default() };
    let mut world = World::new(config);
    for _ in 0..2 {
        let frontend = netfront::Config {
            static_grants: false,
            posted: 64,
            ..netfront::Config::new(Handle(0))
        };
        world
            .add_guest(GuestConfig { frontend, max_frame: LARGEST, ..GuestConfig::default() })
            .unwrap();
    }
    for guest in [Place::Guest(0), Place::Guest(1)] {
        world.flow(guest, Place::Outside, Sizes::Segmented(LARGEST), 3);
        world.flow(guest, Place::Outside, Sizes::Spread(9000), 2);
        world.flow(Place::Outside, guest, Sizes::Segmented(20_000), 2);
    }
    world.connect().unwrap();
    world
}

/// What is withdrawn under way, by one lever after another.
fn levers(board: Board) -> [Lever; 2] {
    use features::XenFeatures as Bits;
    match board {
        Board::Arm | Board::Server => {
            [Lever::Bits(Bits::AUTO_TRANSLATED_PHYSMAP), Lever::Path(Datapath::Map)]
        }
        Board::Arm2014 => {
            [Lever::Bits(Bits::GRANT_MAP_IDENTITY), Lever::Path(Datapath::MapIdentity)]
        }
    }
}

/// Packets that went to the card where their guests had them.
fn mapped(world: &World) -> u64 {
    let counters = world.uplink().counters();
    [Datapath::Map, Datapath::MapIdentity].map(|path| counters.sent(path).packets).iter().sum()
}

fn copied(world: &World) -> u64 {
    world.uplink().counters().sent(Datapath::Copy).packets
}

/// Nothing was wrong on the wire, and the card has read nothing that it had no business with.
fn assert_right(world: &mut World, what: &str) {
    let tally = world.finish();
    assert!(tally.is_clean(), "{what}: {tally}\n{}", world.drops());
    let dma = world.uplink().dma();
    assert_eq!((dma.faults, dma.stray, dma.stale, dma.dirty), (0, 0, 0, 0), "{what}");
    assert_eq!(world.uplink().bad_sums(), 0, "{what}");
    assert_eq!(world.uplink().in_flight(), 0, "{what}");
    assert_eq!(world.sim.violations(), Vec::<String>::new(), "{what}");
    let out = world.backend().unwrap().backend.pools().all().out();
    assert_eq!(out, world.uplink().posted(), "{what}");
}

/// That a card with these offers did its part, and the port the rest.
fn assert_shared_out(world: &World, offers: Offers) {
    let counters = world.uplink().counters();
    let done = counters.offloads;
    // The guests send TCP over IPv4.
    let (sums, cuts) = (offers.contains(Offers::CSUM), offers.contains(Offers::TSO4));
    assert_eq!((done.card_segmented > 0, done.segments > 0), (cuts, !cuts), "{offers:?} {done:?}");
    assert_eq!((done.card_checksums > 0, done.checksums > 0), (sums, !sums), "{offers:?} {done:?}");
    let comes_whole = offers.contains(Offers::RX_TSO4);
    assert_eq!(counters.arrived.segmented > 0, comes_whole, "{offers:?}");
    let merges = comes_whole && offers.contains(Offers::MERGE);
    assert_eq!(counters.arrived.merged > 0, merges, "{offers:?}");
}

#[test]
fn ways_go_and_come_in_mid_transfer_whatever_the_card_can_do() {
    for (seed, offers) in (0..).zip(all_offers()) {
        let board = Board::ALL[seed as usize % 3].1;
        let what = format!("{offers:?} on {board:?}");
        let mut world = machine(seed, offers, board);
        world.run_for(MS);
        for lever in levers(board) {
            let (lent, came) = (mapped(&world), copied(&world));
            world.run_for(MS);
            assert!(mapped(&world) > lent, "{what}");
            // The card has some, and the switch, when it goes.
            world.uplink_mut().hold(seed % 2 == 0, true);
            world.run_for(MS / 10);
            world.withdraw(lever);
            world.run_for(MS / 10);
            world.uplink_mut().hold(false, false);
            world.run_for(MS / 2);
            let lent = mapped(&world);
            world.run_for(MS);
            assert_eq!(mapped(&world), lent, "{what}: all is copied without {lever}");
            assert!(copied(&world) > came, "{what}");
            world.restore(lever);
        }
        let lent = mapped(&world);
        world.run_for(MS);
        assert!(mapped(&world) > lent, "{what}: it has come back");
        assert_shared_out(&world, offers);
        assert_right(&mut world, &what);
    }
}

#[test]
fn a_guest_dies_while_the_card_has_its_pages_whatever_the_card_can_do() {
    for (seed, offers) in (0..).zip(all_offers()) {
        let board = Board::ALL[seed as usize % 3].1;
        let what = format!("{offers:?} on {board:?}");
        let mut world = machine(seed, offers, board);
        world.run_for(MS);
        let dead = world.guest(0).unwrap().id();
        let of_dead = |world: &World| {
            let ledger = world.ledger();
            let its = |item: &Item| matches!(item, Item::Mapping { of, .. } if *of == dead);
            ledger.entries().filter(|(_, item)| its(item)).count()
        };
        let rings = 2 * world.vif(0).unwrap().queues + 1;
        world.uplink_mut().hold(false, true);
        world.run_for(MS);
        assert!(world.uplink().in_flight() > 0 && of_dead(&world) > rings, "{what}");
        world.kill_guest(0);
        world.run_for(MS);
        // What the card has stays where it is told to be.
        assert!(of_dead(&world) > 0, "{what}");
        world.uplink_mut().hold(false, false);
        world.run_for(5 * MS);
        assert_eq!(of_dead(&world), 0, "{what}\n{}", world.ledger().concerning(dead));
        // The other has gone on, and whoever comes in the dead one's place is served.
        world.start_guest(0).unwrap();
        world.connect().unwrap();
        world.run_for(2 * MS);
        assert_right(&mut world, &what);
    }
}

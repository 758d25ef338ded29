//! The machine itself: that it runs, that it is the same for the same seed, and that it notices what it is there to notice.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Instant;

use two_guests::{Config, GuestConfig, Misdeed, Place, SECOND, Sizes, Tally, World};

const MS: u64 = SECOND / 1000;
const PLACES: [Place; 3] = [Place::Guest(0), Place::Guest(1), Place::Outside];

/// Two guests and the outside, each of which sends frames of all sizes to the others.
fn frames(config: Config) -> World {
    let mut world = World::new(config);
    for _ in 0..2 {
        world.add_guest(GuestConfig::small()).unwrap();
    }
    for from in PLACES {
        for to in PLACES.into_iter().filter(|to| *to != from) {
            world.flow(from, to, Sizes::Mixed(1514), 16);
            world.flow(from, to, Sizes::Fixed(64), 16);
        }
    }
    world
}

fn assert_clean(world: &World, tally: Tally) {
    assert!(tally.is_clean(), "{tally}\n{}", world.drops());
    assert_eq!(world.sim.violations(), Vec::<String>::new());
}

#[test]
fn frames_arrive_once_and_in_order() {
    for seed in 0..3 {
        let mut world = frames(Config::small(seed));
        world.connect().unwrap();
        world.run_for(MS);
        let tally = world.finish();
        assert!(tally.received > 1000, "{tally:?}");
        assert_eq!(tally.excused, 0);
        assert_clean(&world, tally);
    }
}

#[test]
fn streams_arrive_whole() {
    let mut world = World::new(Config::small(3));
    for _ in 0..2 {
        world.add_guest(GuestConfig::default()).unwrap();
    }
    world.connect().unwrap();
    for server in PLACES {
        for client in PLACES.into_iter().filter(|client| *client != server) {
            world.stream(server, client);
        }
    }
    world.run_for(MS);
    let pulled = |world: &World| -> u64 {
        let hosts = world.guests().map(|guest| &guest.host).chain([world.outside()]);
        hosts.filter_map(|host| Some(host.tcp.as_ref()?.bytes())).sum()
    };
    let before = pulled(&world);
    assert!(before > 200_000, "{before}");
    let tally = world.finish();
    assert!(pulled(&world) > before, "the blocks that were on their way arrived");
    assert_clean(&world, tally);
}

#[test]
fn the_same_seed_is_the_same_run() {
    let run = |seed| {
        let mut world = frames(Config::small(seed));
        world.connect().unwrap();
        let connected = (world.steps(), world.now);
        world.run_for(MS / 2);
        let tally = world.finish();
        (connected, world.steps(), world.now, tally, world.sim.hypercalls(hypercall::DomId(0)))
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}

/// What a run comes to in which somebody does `misdeed` between guest 0 and its interface.
fn sabotaged(misdeed: Misdeed) -> Tally {
    let mut world = frames(Config::small(9));
    world.connect().unwrap();
    world.guest_mut(0).unwrap().host.sabotage(misdeed, 4);
    world.run_for(MS);
    world.finish()
}

#[test]
fn a_frame_that_vanishes_is_noticed() {
    let tally = sabotaged(Misdeed::Drop);
    assert!(tally.lost > 0, "{tally}");
    assert_eq!((tally.duplicated, tally.reordered, tally.corrupt), (0, 0, 0));
}

#[test]
fn a_frame_that_comes_twice_is_noticed() {
    let tally = sabotaged(Misdeed::Duplicate);
    assert!(tally.duplicated > 0, "{tally}");
    assert_eq!((tally.lost, tally.reordered, tally.corrupt), (0, 0, 0));
}

#[test]
fn a_frame_that_is_overtaken_is_noticed() {
    let tally = sabotaged(Misdeed::Reorder);
    assert!(tally.reordered > 0, "{tally}");
    assert_eq!((tally.duplicated, tally.corrupt), (0, 0));
}

#[test]
fn a_bit_that_flips_is_noticed() {
    let tally = sabotaged(Misdeed::Corrupt);
    assert!(tally.corrupt > 0, "{tally}");
    assert!(tally.lost >= tally.corrupt, "and what was in its place is missing: {tally}");
    assert_eq!((tally.duplicated, tally.reordered), (0, 0));
}

#[test]
fn a_bit_that_flips_in_a_stream_is_noticed() {
    let mut world = World::new(Config::small(4));
    for _ in 0..2 {
        world.add_guest(GuestConfig::default()).unwrap();
    }
    world.connect().unwrap();
    world.stream(Place::Guest(0), Place::Guest(1));
    world.guest_mut(1).unwrap().host.sabotage(Misdeed::Corrupt, 4);
    world.run_for(MS);
    assert!(world.finish().corrupt > 0);
}

#[test]
fn a_guest_that_dies_takes_nothing_with_it() {
    for seed in 0..8 {
        let mut world = frames(Config::small(seed));
        let mut random = two_guests::Random::new(seed);
        for _ in 0..random.below(600) {
            world.step();
        }
        let id = world.guest(0).unwrap().id();
        world.kill_guest(0);
        world.run_for(MS);
        let held = world.ledger().concerning(id);
        assert_eq!(held.to_string(), "", "seed {seed}");
        world.start_guest(0).unwrap();
        world.connect().unwrap();
        world.run_for(MS / 2);
        let tally = world.finish();
        assert_clean(&world, tally);
        assert!(tally.received > 300);
    }
}

#[test]
fn a_driver_domain_that_dies_is_replaced() {
    for seed in 0..3 {
        let domain = sim::DomainConfig { privileged: false, ..sim::DomainConfig::dom0() };
        let config = Config { driver_domain: true, domain, ..Config::small(seed) };
        let mut world = frames(config);
        world.connect().unwrap();
        world.run_for(MS);
        let id = world.backend().unwrap().hv.id();
        assert!(world.kill_backend());
        world.run_for(MS);
        world.start_backend();
        if world.connect().is_err() {
            let mut all = String::new();
            for guest in world.guests() {
                all += &format!("{:?} {:?}\n", guest.nic.frontend(), guest.notices);
            }
            panic!("{all}{:?}", world.backend().unwrap().notices);
        }
        assert_eq!(world.ledger().held_by(id).to_string(), "", "seed {seed}");
        world.run_for(MS / 2);
        let tally = world.finish();
        assert!(tally.received > 300, "{tally:?}");
        assert_eq!((tally.duplicated, tally.reordered, tally.corrupt), (0, 0, 0));
    }
}

/// Heavy tests make tens of thousands of machines. Time is for people to read: what takes it is counted.
#[test]
fn a_machine_is_cheap() {
    let mut best = u128::MAX;
    for seed in 0..20 {
        let start = Instant::now();
        let mut world = frames(Config::small(seed));
        let pages: usize = world.ledger().entries().map(|(_, item)| pages(item)).sum();
        world.connect().unwrap();
        best = best.min(start.elapsed().as_micros());
        assert!(pages < 1000, "{pages} pages");
        assert!(world.steps() < 1000, "{} turns", world.steps());
    }
    println!("made and connected in {best} µs at best");
}

fn pages(item: sim::Item) -> usize {
    match item {
        sim::Item::Pages { count, .. } => count.get(),
        _ => 0,
    }
}

//! Somebody dies, at any moment and in any way: what was theirs is taken back, the others go on, and whoever comes in their place
//! is served.
//!
//! `DEATH_SEED=n cargo test -p two-guests --test death` runs the one life of that seed, and says what happens in it;
//! `DEATH_SEEDS=n` runs so many.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod trace;

use hypercall::{DomId, Instant, ShutdownReason};
use trace::{MS, came, for_each, levers, machine, of_connections};
use two_guests::{Actor, Board, Place, Random, World};
use xenbus::client::Change;

/// Lives that are lived.
const SEEDS: u64 = 10_000;
/// Turns of the trace, after which all die who have not.
const TURNS: usize = 1300;
/// Turns at which something is taken away, given back, closed and opened.
const MARKS: [usize; 4] = [500, 650, 850, 1000];
/// Nanoseconds of a round, once somebody is dead: what waits, waits for thousands of times the work that there is.
const ROUND: u64 = MS;

/// How somebody leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// The domain is gone at once.
    Destroyed,
    /// It crashes, is there for a while and does nothing, and is destroyed then.
    Crashed,
    /// It hangs, and is destroyed when nobody has heard of it for a while.
    Frozen,
    /// It hangs, and goes on as if nothing had been.
    Asleep,
    /// The toolstack takes the device away, and the domain with it later.
    NodesRemoved,
    /// Its state is Closed all of a sudden, and nothing else was done.
    StateClosed,
}

const HOWS: [How; 6] =
    [How::Destroyed, How::Crashed, How::Frozen, How::Asleep, How::NodesRemoved, How::StateClosed];

/// What happens in one life.
#[derive(Clone, Copy, Debug)]
struct Life {
    board: Board,
    /// The backend is in a domain of its own.
    driver: bool,
    first_index: u32,
    victim: Actor,
    how: How,
    /// Turns before it.
    turns: usize,
    /// Milliseconds after it until somebody comes in the victim's place.
    gap: usize,
}

impl Life {
    fn of(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let driver = random.once_in(2);
        let victim = match random.below(2 + usize::from(driver)) {
            2 => Actor::Backend,
            guest => Actor::Guest(guest),
        };
        Self {
            board: [Board::Arm, Board::Arm2014, Board::Server][random.below(3)],
            driver,
            // Rings wrap after as many packets, or never in such a short life.
            first_index: if random.once_in(2) { 0 } else { 0_u32.wrapping_sub(60) },
            victim,
            how: HOWS[random.below(HOWS.len())],
            turns: random.below(TURNS),
            gap: random.below(6),
        }
    }
}

/// All have a turn, so many times.
fn rounds(world: &mut World, count: usize) {
    for _ in 0..count {
        let now = world.now.after(ROUND);
        world.round(now);
    }
}

/// All have turns until it is so, for up to so many rounds.
fn until(world: &mut World, most: usize, is_so: impl Fn(&World) -> bool) -> bool {
    for _ in 0..most {
        if is_so(world) {
            return true;
        }
        rounds(world, 1);
    }
    is_so(world)
}

fn prelude(world: &mut World, life: Life) {
    for turn in 0..life.turns {
        if turn == MARKS[0] {
            levers(life.board).into_iter().for_each(|lever| world.withdraw(lever));
        } else if turn == MARKS[1] {
            levers(life.board).into_iter().for_each(|lever| world.restore(lever));
        } else if turn == MARKS[2] {
            let now = world.now;
            world.guest_mut(0).unwrap().close(now);
        } else if turn == MARKS[3] {
            world.guest_mut(0).unwrap().open();
        }
        world.step();
    }
}

fn id_of(world: &World, actor: Actor) -> DomId {
    match actor {
        Actor::Guest(index) => world.guest(index).unwrap().id(),
        Actor::Backend => world.backend().unwrap().hv.id(),
        Actor::Toolstack | Actor::Outside => panic!("they do not die"),
    }
}

fn kill(world: &mut World, actor: Actor) {
    match actor {
        Actor::Guest(index) => world.kill_guest(index),
        _ => assert!(world.kill_backend()),
    }
}

/// The directories of both ends of each interface that the victim has a part in, its own first.
fn directories(world: &World, victim: Actor) -> Vec<[String; 2]> {
    let backend = id_of(world, Actor::Backend);
    let guests: Vec<_> = match victim {
        Actor::Guest(_) => vec![id_of(world, victim)],
        _ => world.guests().map(two_guests::Guest::id).collect(),
    };
    let pair = |guest: DomId| {
        let front = format!("/local/domain/{guest}/device/vif/0");
        let back = format!("/local/domain/{backend}/backend/vif/{guest}/0");
        if victim == Actor::Backend { [back, front] } else { [front, back] }
    };
    guests.into_iter().map(pair).collect()
}

/// Somebody leaves, in this way; answers whether it is to be replaced.
fn leave(world: &mut World, life: Life) -> bool {
    let Life { victim, how, gap, .. } = life;
    match how {
        How::Destroyed => kill(world, victim),
        How::Crashed => {
            let id = id_of(world, victim);
            world.sim.shut_down(id, ShutdownReason::Crash);
            world.freeze(victim);
            rounds(world, 1 + gap);
            kill(world, victim);
            world.thaw(victim);
        }
        How::Frozen => {
            world.freeze(victim);
            rounds(world, 20);
            kill(world, victim);
            world.thaw(victim);
        }
        How::Asleep => {
            world.freeze(victim);
            rounds(world, 1 + 20 * gap);
            world.thaw(victim);
            return false;
        }
        How::NodesRemoved => {
            // A guest whose own directory is gone has no interface any more.
            let ends = if victim == Actor::Backend { 1 } else { 2 };
            let all = directories(world, victim).into_iter();
            let all = all.flat_map(|pair| pair.into_iter().take(ends));
            world.toolstack(all.map(|path| Change::Rm { path }).collect::<Vec<_>>());
            rounds(world, 1 + gap);
            kill(world, victim);
        }
        How::StateClosed => {
            let own = directories(world, victim).into_iter().map(|[own, _]| own);
            let closed = |own| Change::Update { path: format!("{own}/state"), value: b"6".into() };
            world.toolstack(own.map(closed).collect::<Vec<_>>());
            rounds(world, 1 + gap);
            kill(world, victim);
        }
    }
    true
}

fn live(seed: u64, verbose: bool) {
    let life = Life::of(seed);
    if verbose {
        println!("{life:#?}");
    }
    let mut world = machine(seed, life.board, life.driver, life.first_index);
    prelude(&mut world, life);
    let victim = id_of(&world, life.victim);
    let survivors: Vec<_> = world.guests().map(two_guests::Guest::id).collect();
    let replaced = leave(&mut world, life);
    if replaced {
        // The other guest and the outside go on meanwhile.
        if let Actor::Guest(dead) = life.victim {
            let other = Place::Guest(1 - dead);
            // It may just have closed its interface.
            world.guest_mut(1 - dead).unwrap().open();
            let reached = |world: &World| world.guest(1 - dead).unwrap().host.frames.counts().came;
            let there =
                until(&mut world, 2000, |world| world.guest(1 - dead).unwrap().is_connected());
            assert!(there, "{life:?}: {other:?} is not connected");
            let before = reached(&world);
            let goes_on = until(&mut world, 300, |world| reached(world) >= before + 4);
            assert!(goes_on, "{life:?}: nothing reaches {other:?}\n{}", state(&world));
        } else {
            rounds(&mut world, 4);
        }
        // All that was the victim's is gone.
        let none = |world: &World| world.ledger().concerning(victim).is_empty();
        let gone = until(&mut world, 30, none) || until(&mut world, 3000, none);
        assert!(gone, "{life:?}: left\n{}{}", world.ledger().concerning(victim), state(&world));
        assert!(!world.sim.domains().contains(&victim), "{life:?}: a zombie");
        rounds(&mut world, life.gap);
        match life.victim {
            Actor::Guest(index) => world.start_guest(index).unwrap(),
            _ => world.start_backend(),
        }
    }
    for index in 0..2 {
        world.guest_mut(index).unwrap().open();
    }
    assert!(until(&mut world, 4000, World::is_connected), "{life:?}: stuck\n{}", state(&world));
    let before = came(&world);
    let flows = until(&mut world, 300, |world| {
        came(world).iter().zip(&before).all(|(now, before)| now.saturating_sub(*before) >= 6)
    });
    assert!(flows, "{life:?}: no traffic\n{}", state(&world));

    let tally = world.finish();
    assert_eq!((tally.duplicated, tally.reordered, tally.corrupt), (0, 0, 0), "{life:?}: {tally}");
    assert_eq!(world.sim.violations(), Vec::<String>::new(), "{life:?}");
    assert_eq!(world.backend().unwrap().mapper.parked(), 0, "{life:?}");

    // And in the end everything is taken down.
    let now: Instant = world.now;
    (0..2).for_each(|index| world.guest_mut(index).unwrap().close(now));
    let closed = |world: &World| {
        let parked: usize = world.guests().map(|guest| guest.table.parked()).sum();
        of_connections(&world.ledger()) == (0, parked, 0)
    };
    assert!(
        until(&mut world, 40, closed) || until(&mut world, 3000, closed),
        "{life:?}: left of {survivors:?}\n{}",
        state(&world)
    );
    assert_eq!(world.backend().unwrap().backend.open(), 0, "{life:?}: chains");
}

/// What there is to say of a machine that is not as it should be.
fn state(world: &World) -> String {
    let mut text = format!("at {:?}, idle {}\n", world.now, world.is_idle());
    for guest in world.guests() {
        let last: Vec<_> = guest.notices.iter().rev().take(4).collect();
        text += &format!("{:?}, {:?}, {last:?}\n", guest.nic.frontend(), guest.table);
    }
    if let Some(domain) = world.backend() {
        for vif in domain.backend.vifs() {
            text += &format!("{} {:?} {} queues\n", vif.id, vif.state, vif.queues);
        }
        let last: Vec<_> = domain.notices.iter().rev().take(8).collect();
        text += &format!("{last:?}\n");
    }
    text
}

#[test]
fn whoever_dies_at_whatever_moment_the_others_go_on() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    if let Some(seed) = number("DEATH_SEED") {
        return live(seed, true);
    }
    let start = std::time::Instant::now();
    let seeds = number("DEATH_SEEDS").unwrap_or(SEEDS);
    for_each(seeds, |seed| {
        let lived = std::panic::catch_unwind(|| live(seed, false));
        if let Err(panic) = lived {
            eprintln!("that was DEATH_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    });
    println!("{seeds} lives in {:?}", start.elapsed());
}

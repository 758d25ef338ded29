//! Everything that is asked of Xen in a connection's life fails once, and the store is lost at every moment of it: all must
//! recover, and nothing must be left.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod trace;

use std::sync::{Arc, Mutex};

use grant::MapOps;
use hypercall::{DomId, Errno, GrantStatus};
use netback::datapath::Datapath;
use sim::{Fault, FaultPlan, Item, Kind};
use trace::{MS, came, for_each, levers, machine, of_connections};
use two_guests::{Actor, Board, SECOND, World};

/// Of these many, each ring wraps in the middle of the traffic.
const BEFORE_WRAP: u32 = 0_u32.wrapping_sub(60);

/// Whose calls fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Backend,
    Guest(usize),
}

/// What is tried.
#[derive(Clone, Copy, Debug)]
struct Case {
    board: Board,
    first_index: u32,
    victim: Victim,
    fault: Option<FaultPlan>,
}

impl Victim {
    fn id(self, world: &World) -> DomId {
        match self {
            Self::Backend => world.backend().unwrap().hv.id(),
            Self::Guest(index) => world.guest(index).unwrap().id(),
        }
    }
}

/// Traffic for a while, if there is any: until all have had `frames` more, or for so long.
fn traffic(world: &mut World, nanos: u64, frames: u64) -> bool {
    let before = came(world);
    let more = |world: &World| {
        let came = came(world);
        // A connection that was made anew counts from the start.
        came.iter().zip(&before).all(|(now, before)| match now.checked_sub(*before) {
            Some(more) => more >= frames,
            None => *now >= frames,
        })
    };
    world.run_until(nanos, more).is_ok()
}

fn close_now(world: &mut World) {
    let now = world.now;
    for index in 0..2 {
        world.guest_mut(index).unwrap().close(now);
    }
}

fn close(world: &mut World) {
    close_now(world);
    let closed = |world: &World| {
        (0..2).all(|index| {
            !world.guest(index).unwrap().is_connected()
                && world.vif(index).is_none_or(|vif| vif.queues == 0)
        }) && world.is_idle()
    };
    let _ = world.run_until(20 * SECOND, closed);
}

fn open(world: &mut World) {
    for index in 0..2 {
        world.guest_mut(index).unwrap().open();
    }
}

/// The reference trace, in which whatever it is may fail.
fn life(world: &mut World, board: Board) {
    let _ = world.run_until(4 * SECOND, World::is_connected);
    traffic(world, 4 * MS, 12);
    levers(board).into_iter().for_each(|lever| world.withdraw(lever));
    traffic(world, 2 * MS, 4);
    levers(board).into_iter().for_each(|lever| world.restore(lever));
    traffic(world, 4 * MS, 12);
    close(world);
}

/// How many ways have carried packets.
fn ways(world: &World) -> usize {
    let vifs: Vec<_> = (0..2).map(|guest| world.vif(guest).unwrap().counters).collect();
    let used = |path: &Datapath| {
        vifs.iter().any(|of| of.tx_paths.of(*path).packets + of.rx_paths.of(*path).packets > 0)
    };
    Datapath::ALL.iter().filter(|path| used(path)).count()
}

/// Pages that everybody holds.
fn pages(world: &World) -> usize {
    let entries: Vec<_> = world.ledger().entries().collect();
    let pages = entries.iter().filter_map(|(_, item)| match item {
        Item::Pages { count, .. } => Some(count.get()),
        _ => None,
    });
    pages.sum()
}

/// What the trace took when nothing failed.
#[derive(Clone, Debug)]
struct Took {
    /// Steps, operations and calls of the victim.
    steps: u64,
    ops: u64,
    calls: u64,
    /// By which step, and which call, it closed a port. Up to its fault a run is the same.
    closes: Vec<(u64, u64)>,
    /// Pages that were held after it.
    pages: usize,
}

impl Took {
    /// Whether the call that fails is to close a port. Xen refuses that only for what is no port of the caller's, so nobody
    /// tries again.
    fn is_close(&self, plan: FaultPlan) -> bool {
        self.closes.iter().any(|(step, call)| match plan.fault {
            Fault::Natural => *step == plan.after,
            Fault::Errno(_) | Fault::Partial(..) => *call == plan.after,
            Fault::Status(_) | Fault::Untouched => false,
        })
    }
}

fn run(case: Case, usual: Option<&Took>) -> Took {
    // A seed by which all have their events through queues, so that growing those fails too.
    let mut world = machine(0xf, case.board, false, case.first_index);
    let victim = case.victim.id(&world);
    let before = world.sim.hypercalls(victim).unwrap();
    let closes = Arc::new(Mutex::new(Vec::new()));
    if let Some(plan) = case.fault {
        world.sim.inject(victim, plan);
    } else {
        let (hv, closes) = (world.sim.handle(victim).unwrap(), Arc::clone(&closes));
        world.sim.handle(victim).unwrap().before(Kind::Close, move || {
            // The call is counted already.
            let now = hv.hypercalls() - before;
            closes.lock().unwrap().push((now.steps() - 1, now.all_calls() - 1));
        });
    }
    life(&mut world, case.board);
    world.sim.clear_faults(victim);
    let took = world.sim.hypercalls(victim).unwrap() - before;
    let closes = closes.lock().unwrap().clone();
    if case.fault.is_none() {
        assert_eq!(ways(&world), Datapath::ALL.len() - 1, "one of the two ways to map");
    }

    // They begin again, and all is as if nothing had been.
    open(&mut world);
    assert!(world.connect().is_ok(), "{case:?}: no connection\n{}", state(&world));
    assert!(traffic(&mut world, 20 * MS, 6), "{case:?}: no traffic\n{}", state(&world));
    close(&mut world);
    assert_eq!(world.sim.violations(), Vec::<String>::new(), "{case:?}");

    // What could not be let go of then is counted.
    let (mappings, grants, ports) = of_connections(&world.ledger());
    let mapper = world.backend().unwrap().mapper.clone();
    assert_eq!(world.backend().unwrap().backend.open(), 0, "{case:?}: chains");
    let parked: usize = world.guests().map(|guest| guest.table.parked()).sum();
    assert_eq!(mappings, mapper.parked(), "{case:?}: mappings\n{}", world.ledger());
    assert_eq!(grants, parked, "{case:?}: references\n{}", state(&world));
    let is_close = |plan| usual.is_some_and(|usual| usual.is_close(plan));
    let open = usize::from(case.fault.is_some_and(is_close));
    assert_eq!(ports, open, "{case:?}: ports\n{}", state(&world));

    // And can be let go of now.
    if mappings + parked > 0 {
        assert!(case.fault.is_some(), "{mappings} mappings and {parked} references parked");
        mapper.retry_parked(&mut MapOps::new(64));
        assert_eq!(mapper.parked(), 0, "{case:?}");
        let none = |world: &World| world.guests().all(|guest| guest.table.parked() == 0);
        let _ = world.run_until(200 * SECOND, none);
        let (mappings, grants, _) = of_connections(&world.ledger());
        assert_eq!((mappings, grants), (0, 0), "{case:?}: still parked\n{}", state(&world));
    }
    let pages = pages(&world);
    if let Some(usual) = usual {
        assert!(pages <= usual.pages, "{case:?}: {pages} pages, usually {}", usual.pages);
    }
    Took { steps: took.steps(), ops: took.all_ops(), calls: took.all_calls(), closes, pages }
}

/// What there is to say of a machine that is not as it should be.
fn state(world: &World) -> String {
    let mut text = format!("at {:?}, idle {}\n", world.now, world.is_idle());
    for guest in world.guests() {
        let last: Vec<_> = guest.notices.iter().rev().take(4).collect();
        text += &format!("{:?}, {:?}, {last:?}\n", guest.nic.frontend(), guest.table);
    }
    let domain = world.backend().unwrap();
    for vif in domain.backend.vifs() {
        text += &format!("{} {:?} {} queues\n", vif.id, vif.state, vif.queues);
    }
    let last: Vec<_> = domain.notices.iter().rev().take(8).collect();
    let ledger = world.ledger();
    let held: Vec<_> = ledger
        .entries()
        .filter(|(_, item)| !matches!(item, Item::Pages { .. } | Item::Window { .. }))
        .take(24)
        .map(|(id, item)| format!("d{id}: {item}\n"))
        .collect();
    text + &format!("{last:?}\n{}", held.concat())
}

/// How operations of a batch fail besides in the way that is natural for them, in turn.
const STATUSES: [Fault; 7] = [
    Fault::Status(GrantStatus::BAD_PAGE),
    Fault::Status(GrantStatus::EAGAIN),
    Fault::Untouched,
    Fault::Status(GrantStatus::BAD_GNTREF),
    Fault::Status(GrantStatus(1)),
    Fault::Status(GrantStatus::NO_SPACE),
    Fault::Status(GrantStatus(-77)),
];

/// How calls fail.
const ERRNOS: [Fault; 4] = [
    Fault::Errno(Errno::NOMEM),
    Fault::Partial(1, Errno::FAULT),
    Fault::Errno(Errno::NOSYS),
    Fault::Partial(0, Errno::INVAL),
];

fn each_step_fails(board: Board, first_index: u32, victim: Victim) {
    let usual = Case { board, first_index, victim, fault: None };
    let took = run(usual, None);
    assert!(took.steps > 50, "{took:?}");
    println!("{usual:?}: {took:?}");
    let cases = took.steps + took.ops + took.calls;
    for_each(cases, |number| {
        let plan = if let Some(after) = number.checked_sub(took.steps + took.ops) {
            FaultPlan::any(after, ERRNOS[after as usize % ERRNOS.len()])
        } else if let Some(after) = number.checked_sub(took.steps) {
            FaultPlan::any(after, STATUSES[after as usize % STATUSES.len()])
        } else {
            FaultPlan::step(number)
        };
        run(Case { fault: Some(plan), ..usual }, Some(&took));
    });
}

#[test]
fn whatever_fails_in_the_backend_once_all_recover() {
    each_step_fails(Board::Arm, 0, Victim::Backend);
}

#[test]
fn whatever_fails_in_the_backend_of_2014_once_all_recover_from_below_the_wrap() {
    each_step_fails(Board::Arm2014, BEFORE_WRAP, Victim::Backend);
}

#[test]
fn whatever_fails_in_a_guest_once_all_recover() {
    each_step_fails(Board::Arm, 0, Victim::Guest(0));
}

#[test]
fn whatever_fails_in_a_guest_with_static_pages_once_all_recover() {
    each_step_fails(Board::Arm, BEFORE_WRAP, Victim::Guest(1));
}

/// Turns in which a connection comes about, carries packets and ends.
const TURNS: u64 = 900;

#[test]
fn whenever_somebody_loses_the_store_all_recover() {
    for_each(TURNS, |number| {
        let actor = [Actor::Backend, Actor::Guest(0), Actor::Guest(1)][number as usize % 3];
        let mut world = machine(number, Board::Arm, false, 0);
        let mut was_connected = false;
        for turn in 0..TURNS {
            if turn == number {
                was_connected = world.is_connected();
                world.lose_store(actor);
            } else if turn == TURNS - 150 {
                close_now(&mut world);
            }
            world.step();
        }
        // Where it did not matter nobody noticed.
        let again = |notices: &[netfront::Notice]| {
            let connected = |notice: &&_| matches!(*notice, netfront::Notice::Connected { .. });
            notices.iter().filter(connected).count() > 1
        };
        let noticed = world.guests().any(|guest| again(&guest.notices));
        assert!(!(was_connected && noticed), "{number}, {actor:?}: {}", state(&world));
        open(&mut world);
        assert!(world.connect().is_ok(), "{number}, {actor:?}: no connection\n{}", state(&world));
        assert!(traffic(&mut world, 20 * MS, 6), "{number}, {actor:?}: no traffic");
        close(&mut world);
        // What a backend let go of a little later than it was asked for is looked at again.
        let parked = |world: &World| world.guests().map(|guest| guest.table.parked()).sum();
        let left = of_connections(&world.ledger());
        assert_eq!(left, (0, parked(&world), 0), "{number}, {actor:?}: {}", state(&world));
        let _ = world.run_until(4 * SECOND, |world| parked(world) == 0);
        assert_eq!(parked(&world), 0, "{number}, {actor:?}: {}", state(&world));
        assert_eq!(world.sim.violations(), Vec::<String>::new(), "{number}, {actor:?}");
    });
}

//! Two ways to run domains: one thread in an order that a seed decides, and real threads.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::cell::{Cell, RefCell};
use std::time::Duration;

use common::take_upcall;
use hypercall::{Hypervisor, Instant, Port};
use sim::schedule::{Rng, Schedule, Stop, Turn};
use sim::{DomainConfig, Sim, SimHv};

/// Two domains with a channel between them: each one's handle and port.
fn pair() -> (Sim, (SimHv, Port), (SimHv, Port)) {
    let sim = Sim::new();
    let (one, two) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    let theirs = two.alloc_unbound(one.id()).unwrap();
    let ours = one.bind_interdomain(two.id(), theirs).unwrap();
    take_upcall(&one);
    (sim, (one, ours), (two, theirs))
}

/// Who had which turn and when, over 200 turns of three actors.
fn order(seed: u64) -> Vec<(usize, u64)> {
    let turns = RefCell::new(Vec::new());
    let mut schedule = Schedule::new(seed);
    for name in 0..3 {
        let turns = &turns;
        schedule.polled("one of three", move |now: Instant| {
            turns.borrow_mut().push((name, now.0));
            Turn::Ran
        });
    }
    assert_eq!(schedule.run(200), Stop::Turns);
    assert_eq!(schedule.turns(), 200);
    drop(schedule);
    turns.into_inner()
}

#[test]
fn a_seed_decides_the_order_and_the_time() {
    let first = order(1);
    assert_eq!(first, order(1));
    assert!((2..20).all(|seed| order(seed) != first));
    assert!(first.is_sorted_by(|one, other| one.1 < other.1), "time passes with each turn");
    for name in 0..3 {
        assert!(first.iter().any(|(who, _)| *who == name), "nobody starves");
    }
    let orders: Vec<Vec<_>> =
        (0..50).map(|seed| order(seed).iter().take(4).map(|(who, _)| *who).collect()).collect();
    let distinct: std::collections::BTreeSet<_> = orders.iter().collect();
    assert!(distinct.len() > 20, "seeds try different orders: {}", distinct.len());
}

#[test]
fn the_numbers_are_splitmix64() {
    let mut rng = Rng::new(0);
    assert_eq!([rng.bits(), rng.bits()], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    let mut counts = [0; 10];
    for _ in 0..10_000 {
        counts[rng.below(10) as usize] += 1;
    }
    assert!(counts.iter().all(|count| (800..1200).contains(count)), "{counts:?}");
    assert_eq!((rng.below(0), rng.below(1), rng.choose::<u8>(&[])), (0, 0, None));
    let mut bytes = [0; 13];
    rng.fill(&mut bytes);
    assert!(bytes.iter().any(|byte| *byte != 0) && bytes[8..] != [0; 5]);
    let mut fork = rng.fork();
    assert_ne!(fork.bits(), rng.bits());
}

#[test]
fn who_sleeps_is_woken_by_an_upcall_and_by_nothing_else() {
    for seed in 0..50 {
        let (_sim, (one, ours), (two, theirs)) = pair();
        let (to_send, received) = (Cell::new(5), Cell::new(0));
        let tells = Cell::new(true);
        let mut schedule = Schedule::new(seed);
        schedule.polled("sender", |_| {
            if to_send.get() == 0 {
                return Turn::Idle;
            }
            to_send.set(to_send.get() - 1);
            if tells.get() {
                one.notify(ours).unwrap();
            }
            Turn::Ran
        });
        schedule.woken("receiver", &two, |_| {
            if take_upcall(&two).contains(&theirs) {
                received.set(received.get() + 1);
            }
            Turn::Idle
        });
        assert_eq!(schedule.run(1000), Stop::Quiet);
        assert!((1..=5).contains(&received.get()), "edges may fall together");
        // Something to do, but nobody says so: the receiver sleeps on.
        let before = received.get();
        tells.set(false);
        to_send.set(5);
        let mut stirs = true;
        schedule.polled(
            "another",
            move |_| {
                if std::mem::take(&mut stirs) { Turn::Ran } else { Turn::Idle }
            },
        );
        assert_eq!(schedule.run(1000), Stop::Quiet);
        assert_eq!((to_send.get(), received.get()), (0, before));
    }
}

#[test]
fn time_passes_to_when_somebody_wants_to_look_again() {
    let looked = RefCell::new(Vec::new());
    let mut schedule = Schedule::new(7);
    let clock = schedule.clock();
    for period in [300_000, 1_000_000] {
        let looked = &looked;
        schedule.polled("timer", move |now: Instant| {
            looked.borrow_mut().push((period, now.0));
            if now.0 > 3_000_000 { Turn::Done } else { Turn::IdleUntil(now.after(period)) }
        });
    }
    assert_eq!(schedule.run(10_000), Stop::Quiet);
    assert!(clock.now().0 > 3_000_000);
    drop(schedule);
    let looked = looked.into_inner();
    let times = |period| looked.iter().filter(|(of, _)| *of == period).count();
    assert!((11..=13).contains(&times(300_000)), "{looked:?}");
    assert!((4..=6).contains(&times(1_000_000)), "{looked:?}");
    assert!(looked.len() < 20, "not in between");
}

#[test]
fn a_run_ends_when_it_is_told_to_and_says_how_it_went() {
    let count = Cell::new(0);
    let mut schedule = Schedule::new(0x5eed);
    schedule.polled("counter", |_| {
        count.set(count.get() + 1);
        Turn::Ran
    });
    assert_eq!(schedule.run_until(100, || count.get() == 10), Stop::Met);
    assert_eq!(count.get(), 10);
    assert_eq!(schedule.run_until(0, || count.get() == 10), Stop::Met);
    assert_eq!(schedule.run(7), Stop::Turns);
    assert_eq!(count.get(), 17);
    let text = format!("{schedule:?}");
    assert!(text.starts_with("seed 0x5eed, ") && text.contains("after 17 turns"), "{text}");
    assert_eq!(text.matches("counter").count(), 16, "{text}");
}

#[test]
fn threads_of_two_domains_pass_events_to_and_fro() {
    const ROUNDS: u32 = 5_000;
    let (sim, one, two) = pair();
    let play = |(hv, port): &(SimHv, Port), serves: bool| {
        if serves {
            hv.notify(*port).unwrap();
        }
        let mut taken = 0;
        while taken < ROUNDS {
            assert!(hv.wait_for_upcall(Duration::from_secs(60)), "lost after {taken}");
            let raised = take_upcall(hv);
            assert!(raised.is_empty() || raised == [*port]);
            if !raised.is_empty() {
                taken += 1;
                hv.notify(*port).unwrap();
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| play(&one, true));
        scope.spawn(|| play(&two, false));
    });
    let sent = [&one, &two].map(|(hv, _)| hv.hypercalls().calls(sim::Kind::Notify));
    assert_eq!(sent, [u64::from(ROUNDS) + 1, u64::from(ROUNDS)]);
    assert!(sim.violations().is_empty());
}

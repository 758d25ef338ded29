//! Features that come and go, on a simulated Xen.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicU32, Ordering};

use features::{Epoch, Features, XenFeatures};
use hypercall::Errno;
use sim::{DomainConfig, Fault, FaultPlan, Kind, Sim, SimHv};

fn domain(bits: XenFeatures) -> (Sim, SimHv) {
    let sim = Sim::new();
    let hv = sim.create(DomainConfig { features: bits.bits(), ..DomainConfig::dom0() });
    (sim, hv)
}

const IDENTITY: XenFeatures = XenFeatures::GRANT_MAP_IDENTITY;
const DIRECT: XenFeatures = XenFeatures::DIRECT_MAPPED;

#[test]
fn a_change_is_seen_by_the_next_refresh_and_not_before() {
    let (sim, hv) = domain(IDENTITY | DIRECT);
    let features = Features::read(&hv).unwrap();
    let first = features.snapshot();
    assert!(first.has(IDENTITY | DIRECT));
    sim.set_features(hv.id(), DIRECT.bits());
    assert_eq!(features.snapshot(), first, "Xen gives no notice");
    let second = features.refresh(&hv).unwrap();
    assert!(!second.has(IDENTITY) && second.has(DIRECT));
    assert_eq!(second.epoch(), Epoch(1));
    assert_eq!(features.refresh(&hv).unwrap(), second, "nothing new, no new epoch");
    sim.set_features(hv.id(), (IDENTITY | DIRECT).bits());
    let third = features.refresh(&hv).unwrap();
    assert_eq!((third.bits(), third.epoch()), (first.bits(), Epoch(2)));
    assert_ne!(third, first, "the same bits at another time");
}

#[test]
fn what_is_withdrawn_stays_withdrawn_whatever_xen_says() {
    let (sim, hv) = domain(DIRECT);
    let features = Features::read(&hv).unwrap();
    features.withdraw(IDENTITY);
    sim.set_features(hv.id(), (IDENTITY | DIRECT).bits());
    assert!(!features.refresh(&hv).unwrap().has(IDENTITY));
    assert!(features.withdrawn().contains(IDENTITY));
    assert!(features.restore(IDENTITY).has(IDENTITY | DIRECT));
    sim.set_features(hv.id(), 0);
    assert!(features.refresh(&hv).unwrap().bits().is_empty());
    assert!(features.restore(XenFeatures::all()).bits().is_empty(), "not advertised");
}

#[test]
fn a_failed_read_changes_nothing() {
    let (sim, hv) = domain(DIRECT);
    let features = Features::read(&hv).unwrap();
    let before = features.snapshot();
    sim.set_features(hv.id(), 0);
    sim.inject(hv.id(), FaultPlan::next(Kind::Features, Fault::Errno(Errno::NOSYS)));
    assert_eq!(features.refresh(&hv), Err(Errno::NOSYS));
    assert_eq!(features.snapshot(), before);
    sim.inject(hv.id(), FaultPlan::next(Kind::Features, Fault::Errno(Errno::NOSYS)));
    assert_eq!(Features::read(&hv).err(), Some(Errno::NOSYS));
}

#[test]
fn the_last_word_holds_when_threads_disagree() {
    const ROUNDS: u32 = 20_000;
    let (_, hv) = domain(IDENTITY | DIRECT);
    let features = Features::read(&hv).unwrap();
    // Both threads speak once in each round; the first of them then compares what holds with what was said.
    let spoken = AtomicU32::new(0);
    let meet = |count: u32| {
        spoken.fetch_add(1, Ordering::AcqRel);
        while spoken.load(Ordering::Acquire) < count {
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS {
                features.withdraw(IDENTITY);
                meet(4 * round + 2);
                meet(4 * round + 4);
            }
        });
        for round in 0..ROUNDS {
            features.restore(IDENTITY);
            meet(4 * round + 2);
            let withdrawn = features.withdrawn().contains(IDENTITY);
            assert_eq!(features.snapshot().has(IDENTITY), !withdrawn);
            meet(4 * round + 4);
        }
    });
}

//! What is particular to delivery through queues: where it cannot be had, growth, and ports that change while they are queued.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use evtchn::{Channel, Delivery, Eoi, Upcalls, Work};
use hypercall::{Errno, Hypervisor, Instant, Port, VcpuId};
use sim::{DomainConfig, Fault, FaultPlan, Kind, PortState, Sim, SimHv};

const NOW: Instant = Instant(0);

struct World {
    sim: Sim,
    us: SimHv,
    peer: SimHv,
}

fn world() -> World {
    let sim = Sim::new();
    let us = sim.create(DomainConfig { max_port: 1 << 16, ..DomainConfig::guest() });
    let peer = sim.create(DomainConfig { max_port: 1 << 16, ..DomainConfig::guest() });
    World { sim, us, peer }
}

impl World {
    fn upcalls(&self) -> Upcalls<SimHv> {
        Upcalls::new(&self.us, VcpuId(0))
    }

    fn fails(&self, kind: Kind, errno: Errno) {
        self.sim.inject(self.us.id(), FaultPlan::next(kind, Fault::Errno(errno)));
    }

    /// A channel of ours, and the peer's port to it.
    fn joined(&self, upcalls: &Upcalls<SimHv>) -> (Channel<SimHv>, Port) {
        let ours = upcalls.binder().alloc_unbound(self.peer.id()).unwrap();
        let theirs = self.peer.bind_interdomain(self.us.id(), ours.port()).unwrap();
        (ours, theirs)
    }

    fn pages(&self) -> usize {
        self.sim.ledger().held_by(self.us.id()).len()
    }
}

fn scan(upcalls: &mut Upcalls<SimHv>) -> Vec<Port> {
    let mut got = Vec::new();
    upcalls.scan(usize::MAX, |port| got.push(port));
    got
}

#[test]
fn where_xen_refuses_delivery_is_by_bits() {
    for errno in [Errno::NOSYS, Errno::PERM, Errno::INVAL, Errno::NOMEM] {
        let w = world();
        w.fails(Kind::InitControl, errno);
        let mut upcalls = w.upcalls();
        assert_eq!(upcalls.delivery(), Delivery::TwoLevel);
        assert_eq!(w.pages(), 0, "nothing is kept for what was refused");
        let (ours, theirs) = w.joined(&upcalls);
        w.peer.notify(theirs).unwrap();
        assert_eq!(scan(&mut upcalls), [ours.port()]);
        assert_eq!(w.us.hypercalls().calls(Kind::ExpandArray), 0);
    }
    let w = world();
    w.fails(Kind::AllocPages, Errno::NOMEM);
    assert_eq!(w.upcalls().delivery(), Delivery::TwoLevel);
}

#[test]
fn a_port_that_gets_no_word_is_closed_and_the_next_try_is_a_new_one() {
    for (kind, errno) in [(Kind::ExpandArray, Errno::BUSY), (Kind::AllocPages, Errno::NOMEM)] {
        let w = world();
        let mut upcalls = w.upcalls();
        w.fails(kind, errno);
        assert_eq!(upcalls.binder().alloc_unbound(w.peer.id()).err(), Some(errno));
        assert_eq!((w.sim.port(w.us.id(), Port(1)), upcalls.bound()), (PortState::Free, 0));
        let (ours, theirs) = w.joined(&upcalls);
        w.peer.notify(theirs).unwrap();
        assert_eq!(scan(&mut upcalls), [ours.port()]);
        assert_eq!(
            w.us.hypercalls().calls(Kind::ExpandArray),
            1 + u64::from(kind != Kind::AllocPages)
        );
    }
}

#[test]
fn a_page_that_xen_did_not_take_is_given_back() {
    let w = world();
    let upcalls = w.upcalls();
    w.sim.inject(w.us.id(), FaultPlan::every(Kind::ExpandArray, Fault::Errno(Errno::NOMEM)));
    for _ in 0..3 {
        assert_eq!(upcalls.binder().alloc_unbound(w.peer.id()).err(), Some(Errno::NOMEM));
        assert_eq!(w.pages(), 1, "kept for the next try");
    }
    drop(upcalls);
    assert_eq!(w.pages(), 0);
    assert_eq!(w.sim.violations(), Vec::<String>::new());
}

#[test]
fn a_port_that_the_toolstack_bound_and_raised_is_heard_once_it_is_taken_up() {
    let w = world();
    let early = w.us.alloc_unbound(w.peer.id()).unwrap();
    let theirs = w.peer.bind_interdomain(w.us.id(), early).unwrap();
    w.peer.notify(theirs).unwrap();
    let mut upcalls = w.upcalls();
    assert_eq!(scan(&mut upcalls), []);
    let channel = upcalls.binder().adopt(early).unwrap();
    assert_eq!(scan(&mut upcalls), [early]);
    drop(channel);
    assert_eq!(w.sim.port(w.us.id(), early), PortState::Free);
}

#[test]
fn there_are_more_ports_than_bits() {
    let w = world();
    let mut upcalls = w.upcalls();
    // The peer has as many.
    let _theirs = Upcalls::new(&w.peer, VcpuId(0));
    let channels: Vec<_> = (0..5000).map(|_| w.joined(&upcalls)).collect();
    assert_eq!(w.us.hypercalls().calls(Kind::ExpandArray), 5);
    for (_, theirs) in channels.iter().rev() {
        w.peer.notify(*theirs).unwrap();
    }
    let expected: Vec<_> = channels.iter().rev().map(|(ours, _)| ours.port()).collect();
    let mut got = Vec::new();
    while upcalls.is_pending() {
        assert!(upcalls.scan(64, |port| got.push(port)) > 0, "a scan with nothing left to do");
    }
    assert_eq!(got, expected, "first come, first served");
}

#[test]
fn a_port_that_is_closed_in_its_queue_is_passed_over_and_not_used_again_before() {
    let w = world();
    let mut upcalls = w.upcalls();
    let [(first, to_first), (middle, to_middle), (last, to_last)] =
        [(); 3].map(|()| w.joined(&upcalls));
    for port in [to_first, to_middle, to_last] {
        w.peer.notify(port).unwrap();
    }
    let closed = middle.port();
    drop(middle);
    let (other, to_other) = w.joined(&upcalls);
    assert_ne!(other.port(), closed, "it is in the queue still");
    w.peer.notify(to_other).unwrap();
    assert_eq!(scan(&mut upcalls), [first.port(), last.port(), other.port()]);
    let (again, to_again) = w.joined(&upcalls);
    assert_eq!(again.port(), closed);
    w.peer.notify(to_again).unwrap();
    assert_eq!(scan(&mut upcalls), [closed]);
}

#[test]
fn an_event_ends_without_a_call_unless_another_came_meanwhile() {
    let w = world();
    let mut upcalls = w.upcalls();
    let (mut ours, theirs) = w.joined(&upcalls);
    for (meanwhile, calls) in [(false, 0), (true, 1)] {
        w.peer.notify(theirs).unwrap();
        assert_eq!(scan(&mut upcalls), [ours.port()]);
        let before = w.us.hypercalls();
        if meanwhile {
            w.peer.notify(theirs).unwrap();
        }
        assert_eq!(ours.eoi(Work::Done, NOW), Eoi::Open);
        assert_eq!((w.us.hypercalls() - before).calls(Kind::Unmask), calls);
        assert_eq!(upcalls.is_pending(), meanwhile);
    }
}

#[test]
fn a_port_that_cannot_be_opened_is_opened_later() {
    let w = world();
    let mut upcalls = w.upcalls();
    let (mut ours, theirs) = w.joined(&upcalls);
    w.peer.notify(theirs).unwrap();
    assert_eq!(scan(&mut upcalls), [ours.port()]);
    w.peer.notify(theirs).unwrap();
    w.fails(Kind::Unmask, Errno::INVAL);
    let Eoi::Throttled(until) = ours.eoi(Work::Done, NOW) else { panic!("it cannot be open") };
    assert_eq!(scan(&mut upcalls), []);
    ours.open_if_due(until);
    assert_eq!(ours.throttled_until(), None);
    assert_eq!(scan(&mut upcalls), [ours.port()]);
}

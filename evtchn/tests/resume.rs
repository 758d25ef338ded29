//! A domain goes on elsewhere, where Xen knows none of its ports, and may deliver in another way.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use evtchn::{Channel, Delivery, Eoi, Upcalls, Work};
use hypercall::{Errno, Hypervisor, Instant, Port, VcpuId};
use sim::{DomainConfig, Kind, PortState, Sim, SimHv};

const FEATURES: u32 = 0x1_6005;
/// To whom each port is offered: more than one page of words.
const PORTS: usize = 1500;

struct World {
    sim: Sim,
    us: SimHv,
    peer: SimHv,
    upcalls: Upcalls<SimHv>,
}

impl World {
    fn new(fifo: bool) -> Self {
        let sim = Sim::new();
        let us = sim.create(DomainConfig { fifo, ..DomainConfig::guest() });
        let peer = sim.create(DomainConfig::guest());
        let upcalls = Upcalls::new(&us, VcpuId(0));
        Self { sim, us, peer, upcalls }
    }

    /// Channels of ours, with the peer's port to each.
    fn joined(&self, count: usize) -> Vec<(Channel<SimHv>, Port)> {
        let binder = self.upcalls.binder();
        let one = || {
            let ours = binder.alloc_unbound(self.peer.id()).unwrap();
            let theirs = self.peer.bind_interdomain(self.us.id(), ours.port()).unwrap();
            (ours, theirs)
        };
        (0..count).map(|_| one()).collect()
    }

    /// Binds so many ports, and lets go of them.
    fn binds(&self, count: usize) {
        let binder = self.upcalls.binder();
        let one = |_| binder.alloc_unbound(self.peer.id()).unwrap();
        drop((0..count).map(one).collect::<Vec<_>>());
    }

    fn scan(&mut self) -> Vec<Port> {
        let mut got = Vec::new();
        self.upcalls.scan(usize::MAX, |port| got.push(port));
        got.sort_unstable();
        got
    }

    /// To a Xen with or without queues.
    fn moves(&mut self, fifo: bool) {
        assert!(self.sim.suspend(self.us.id()));
        self.sim.set_fifo(self.us.id(), fifo);
        assert!(self.sim.resume(self.us.id(), FEATURES));
        self.upcalls.resumed();
        let expected = if fifo { Delivery::Fifo } else { Delivery::TwoLevel };
        assert_eq!(self.upcalls.delivery(), expected);
    }
}

fn moving(from: bool, to: bool) {
    let mut w = World::new(from);
    let count = if from { PORTS } else { 100 };
    let mut old = w.joined(count);
    // Some are queued when it happens, some are masked, and of a half-done scan something is left.
    for (_, theirs) in &old[..60] {
        w.peer.notify(*theirs).unwrap();
    }
    assert_eq!(w.upcalls.scan(20, |_| ()), 20);
    w.moves(to);
    assert_eq!((w.scan(), w.upcalls.bound()), (vec![], 0), "nothing of before is left");

    // The binder goes on, and the numbers come again.
    let mut new = w.joined(count.min(1200));
    assert_eq!(new[0].0.port(), old[0].0.port());
    for (_, theirs) in &new {
        w.peer.notify(*theirs).unwrap();
    }
    let ports: Vec<_> = new.iter().map(|(channel, _)| channel.port()).collect();
    assert_eq!(w.scan(), ports);
    assert!(
        new.iter_mut().all(|(channel, _)| channel.port().0 != 3
            || channel.eoi(Work::Done, Instant(0)) == Eoi::Open)
    );

    // Channels of before are void.
    let before = w.us.hypercalls();
    assert_eq!(old[1].0.notify(), Err(Errno::INVAL));
    assert_eq!(old[1].0.eoi(Work::Done, Instant(0)), Eoi::Open);
    old[1].0.open_if_due(Instant(u64::MAX));
    let masked = |w: &World, port| w.sim.port_bits(w.us.id(), port).unwrap().1;
    assert!(masked(&w, ports[1]), "its event is not over");
    drop(old);
    assert!(!masked(&w, Port(3)), "nothing was masked");
    assert_eq!((w.us.hypercalls() - before).all_calls(), 0);
    assert_eq!(w.upcalls.bound(), new.len());
    for port in &ports {
        assert!(matches!(w.sim.port(w.us.id(), *port), PortState::Interdomain(..)));
    }
    for (channel, theirs) in &mut new {
        assert_eq!(channel.eoi(Work::Done, Instant(0)), Eoi::Open);
        w.peer.notify(*theirs).unwrap();
    }
    assert_eq!(w.scan(), ports);
    drop(new);
    assert_eq!(w.upcalls.bound(), 0);
    assert_eq!(w.sim.violations(), Vec::<String>::new());
}

#[test]
fn from_queues_to_queues() {
    moving(true, true);
}

#[test]
fn from_queues_to_bits() {
    moving(true, false);
}

#[test]
fn from_bits_to_queues() {
    moving(false, true);
}

#[test]
fn from_bits_to_bits() {
    moving(false, false);
}

#[test]
fn moving_about_takes_no_more_memory() {
    let mut w = World::new(true);
    w.binds(PORTS);
    for _ in 0..20 {
        let allocated = w.us.hypercalls();
        w.moves(true);
        w.binds(PORTS);
        assert_eq!((w.us.hypercalls() - allocated).calls(Kind::AllocPages), 0);
    }
    // Where there are no queues the pages are kept, for the next Xen that has them.
    w.moves(false);
    w.binds(100);
    w.moves(true);
    w.binds(PORTS);
    let pages = w.us.hypercalls().calls(Kind::AllocPages);
    assert_eq!(
        pages,
        1 + 2 + 1,
        "and a control block, since the old one is not trusted to be ours"
    );
}

#[test]
fn after_a_suspend_that_was_cancelled_all_goes_on() {
    for fifo in [true, false] {
        let mut w = World::new(fifo);
        let mut channels = w.joined(3);
        w.peer.notify(channels[0].1).unwrap();
        assert!(w.sim.suspend(w.us.id()));
        w.peer.notify(channels[2].1).unwrap();
        assert!(w.sim.cancel_suspend(w.us.id()));
        let ports = [channels[0].0.port(), channels[2].0.port()];
        assert_eq!(w.scan(), ports);
        for at in [0, 2] {
            assert_eq!(channels[at].0.eoi(Work::Done, Instant(0)), Eoi::Open);
            w.peer.notify(channels[at].1).unwrap();
        }
        assert_eq!(w.scan(), ports);
        assert_eq!(w.upcalls.bound(), 3);
    }
}

/// What is only for a resume does no harm when it is done without one, but that the domain is deaf then.
#[test]
fn resuming_where_nothing_was_restored_frees_nothing_that_xen_uses() {
    let mut w = World::new(true);
    let channels = w.joined(3);
    w.upcalls.resumed();
    assert_eq!(w.upcalls.delivery(), Delivery::TwoLevel);
    for (_, theirs) in &channels {
        w.peer.notify(*theirs).unwrap();
    }
    drop(w.upcalls);
    drop(channels);
    assert_eq!(w.sim.violations(), Vec::<String>::new());
}

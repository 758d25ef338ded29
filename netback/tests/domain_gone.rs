//! A guest's domain ends, whatever was under way.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::{Machine, SECOND, frame};
use hypercall::DomId;
use netback::Notice;

/// Packets to and from guest 1, both queued and on the rings.
fn busy() -> Machine {
    let mut machine = Machine::two();
    machine.plain_guest();
    machine.assert_carries(0, 1);
    machine.assert_carries(0, 2);
    machine.guests[1].receives = false;
    let (zero, one) = (machine.guests[0].mac(), machine.guests[1].mac());
    for _ in 0..3 {
        for _ in 0..150 {
            machine.guests[0].send(&frame(one, zero, 300, 1));
        }
        machine.settle();
    }
    for size in [100, 9000, 65_535] {
        machine.guests[1].send(&frame(zero, one, size, 1));
    }
    // Seen by the backend's end of the ring, not by the backend.
    let guest = &mut machine.guests[1];
    guest.frontend.as_mut().unwrap().poll(&mut guest.client, machine.now);
    assert!(machine.status(1).unwrap().counters.rx.packets >= 256);
    machine
}

fn assert_gone(machine: &mut Machine) {
    machine.assert_let_go(1);
    assert!(machine.status(1).is_none());
    assert!(!machine.sim.domains().contains(&machine.guests[1].id), "it lingers as a zombie");
    machine.assert_carries(0, 2);
    machine.pass(SECOND);
    machine.assert_let_go(1);
    machine.assert_no_buffer_out();
}

#[test]
fn destroyed_with_packets_in_flight() {
    let mut machine = busy();
    machine.destroy(1);
    let notices = machine.take_notices(1);
    assert!(matches!(notices[..], [.., Notice::Disconnected(_), Notice::Removed(_)]));
    assert_gone(&mut machine);
}

#[test]
fn destroyed_between_any_two_turns_of_the_handshake() {
    for turns in 0..30 {
        let mut machine = Machine::two();
        let guest = machine.bare_guest();
        let config = netfront::Config::new(hypercall::Handle(0));
        let it = &mut machine.guests[guest];
        let binder = it.upcalls.binder();
        it.frontend =
            Some(netfront::Frontend::new(it.table.clone(), binder, &mut it.client, config));
        for _ in 0..turns {
            machine.turn();
        }
        machine.destroy(guest);
        machine.assert_let_go(guest);
        assert!(machine.status(guest).is_none(), "{turns}");
        assert!(!machine.sim.domains().contains(&machine.guests[guest].id), "{turns}");
        machine.assert_carries(0, 1);
    }
}

/// The domain is gone and the backend works on before it is told.
#[test]
fn destroyed_and_only_later_said_to_be() {
    let mut machine = busy();
    let id = machine.guests[1].id;
    machine.sim.destroy(id);
    machine.guests[1].runs = false;
    assert!(machine.sim.domains().contains(&id), "its rings are mapped");
    let (zero, one) = (machine.guests[0].mac(), machine.guests[1].mac());
    for _ in 0..10 {
        machine.guests[0].send(&frame(one, zero, 300, 1));
        machine.settle();
        machine.assert_carries(0, 2);
    }
    machine.pass(SECOND);
    machine.destroy(1);
    assert_gone(&mut machine);
}

#[test]
fn a_domain_that_never_was_is_none_of_our_business() {
    let mut machine = Machine::two();
    machine.backend.domain_gone(&mut machine.client, DomId(77), machine.now);
    machine.settle();
    machine.assert_carries(0, 1);
}

/// The same address on a new domain, right after.
#[test]
fn its_successor_takes_its_place() {
    let mut machine = Machine::two();
    machine.assert_carries(0, 1);
    machine.destroy(1);
    let next = machine.plain_guest();
    machine.assert_carries(0, next);
    assert_eq!(machine.backend.vifs().count(), 2);
}

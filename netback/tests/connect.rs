//! The handshake over the store, and every way it ends.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeSet;

use common::raw::Raw;
use common::{MS, Machine, SECOND, back, front, home};
use hypercall::Handle;
use netback::{Notice, OFFERED, Refusal};
use netif::keys::Features;
use xenbus::client::Change;
use xenbus::device::State;

/// What is offered to whoever asks for it.
fn on_request() -> Features {
    Features::MULTICAST_CONTROL
        | Features::DYNAMIC_MULTICAST
        | Features::CTRL_RING
        | Features::XDP_HEADROOM
}

#[test]
fn two_guests_connect_and_carry() {
    let mut machine = Machine::two();
    machine.assert_carries(0, 1);
    for guest in [0, 1] {
        assert_eq!(machine.states(guest), (State::Connected, State::Connected));
        let status = machine.status(guest).unwrap();
        let features = status.features - on_request();
        assert_eq!(features, OFFERED - Features::MULTI_QUEUE - on_request());
        assert_eq!(status.mac.map(|mac| mac.0), Some(machine.guests[guest].mac()));
        let (mac, front) = (machine.guests[guest].mac(), machine.guests[guest].frontend());
        assert_eq!((front.mac().map(|mac| mac.0), front.mtu()), (Some(mac), Some(1500)));
        assert_eq!(front.features(), OFFERED | Features::MULTI_QUEUE);
    }
    machine.assert_no_buffer_out();
}

#[test]
fn features_are_what_both_ends_say() {
    let all = netfront::Config::new(Handle(0));
    for features in [Features::empty(), Features::SG, Features::IPV4_CSUM, all.features] {
        for (split, queues) in [(false, 1), (true, 1), (false, 3), (true, 9)] {
            let mut machine = Machine::new();
            let guest = machine.guest(netfront::Config { features, split, queues, ..all });
            let status = machine.status(guest).unwrap();
            let mut expected = features | Features::RX_COPY;
            expected.set(Features::SPLIT, split);
            expected.set(Features::MULTI_QUEUE, queues > 1);
            assert_eq!(status.features - on_request(), expected);
            assert_eq!(status.queues, usize::from(queues.min(4)));
            assert_eq!(machine.guests[guest].frontend().queues(), status.queues);
        }
    }
}

#[test]
fn the_link_waits_for_hotplug_status() {
    let mut machine = Machine::new();
    machine.hotplug = false;
    let guest = machine.bare_guest();
    machine.start(guest, netfront::Config::new(Handle(0)));
    assert_eq!(machine.states(guest), (State::Connected, State::InitWait));
    assert!(!machine.guests[guest].frontend().is_connected());
    machine.assert_let_go(guest);
    let path = format!("{}/hotplug-status", back(machine.guests[guest].id));
    machine.write(&path, "connecting");
    assert!(!machine.is_connected(guest));
    machine.write(&path, "connected");
    assert!(machine.is_connected(guest) && machine.guests[guest].frontend().is_connected());
}

#[test]
fn closing_and_connecting_again_leaves_nothing_behind() {
    let mut machine = Machine::two();
    let mut closed = None;
    for _ in 0..10 {
        machine.assert_carries(0, 1);
        let now = machine.now;
        let guest = &mut machine.guests[1];
        guest.frontend.as_mut().unwrap().close(&mut guest.client, now);
        machine.settle();
        assert_eq!(machine.states(1), (State::Closed, State::Closed));
        machine.assert_let_go(1);
        let ledger = machine.ledger_of(1);
        assert_eq!(ledger.since(closed.get_or_insert(ledger.clone())).to_string(), "");
        let guest = &mut machine.guests[1];
        assert_eq!(guest.table.granted() + guest.table.parked(), 0);
        guest.frontend.as_mut().unwrap().open(&mut guest.client);
        machine.settle();
        assert!(machine.is_connected(1));
    }
    machine.assert_carries(0, 1);
    machine.assert_no_buffer_out();
}

#[test]
fn windows_closes_through_5_6_1() {
    let mut machine = Machine::two();
    let guest = machine.bare_guest();
    for _ in 0..3 {
        let raw = Raw::new(&machine.guests[guest], 0);
        machine.offer(guest, &raw.keys(), "4");
        assert!(machine.is_connected(guest));
        machine.set_state(guest, "5");
        assert_eq!(machine.states(guest).1, State::Closing);
        machine.assert_let_go(guest);
        machine.set_state(guest, "6");
        assert_eq!(machine.states(guest).1, State::Closed);
        machine.set_state(guest, "1");
        assert_eq!(machine.states(guest).1, State::InitWait);
        machine.assert_let_go(guest);
    }
    machine.assert_carries(0, 1);
}

#[test]
fn a_frontend_that_closes_first_or_all_at_once_is_followed() {
    let mut machine = Machine::two();
    let (guest, raw) = machine.raw();
    machine.set_state(guest, "6");
    assert_eq!(machine.states(guest).1, State::Closed);
    machine.assert_let_go(guest);
    drop(raw);
    // Straight to the start, without having been closed.
    let (other, raw) = machine.raw();
    machine.set_state(other, "1");
    assert_eq!(machine.states(other).1, State::InitWait);
    machine.assert_let_go(other);
    drop(raw);
    machine.assert_carries(0, 1);
}

/// Hostile 71: states that make no sense where they come.
#[test]
fn hostile_71_states_out_of_order() {
    for (first, then) in [("4", "2"), ("4", "8"), ("1", "7"), ("1", "3"), ("4", "4"), ("6", "4")] {
        let mut machine = Machine::two();
        let guest = machine.bare_guest();
        let raw = Raw::new(&machine.guests[guest], 0);
        machine.offer(guest, &raw.keys(), first);
        machine.set_state(guest, then);
        match (first, then) {
            ("4", "4") => assert!(machine.is_connected(guest)),
            ("4", _) => {
                assert_eq!(machine.states(guest).1, State::Closing);
                machine.assert_let_go(guest);
            }
            _ => assert!(!machine.is_connected(guest), "{first} {then}"),
        }
        machine.set_state(guest, "6");
        machine.set_state(guest, "1");
        assert_eq!(machine.states(guest).1, State::InitWait, "{first} {then}");
        machine.assert_let_go(guest);
        machine.assert_carries(0, 1);
    }
}

/// Hostile 70: a state that is none counts as none at all.
#[test]
fn hostile_70_states_that_are_none() {
    for state in ["x", "9", "", " 4", "4294967300", "-1", "04x"] {
        let mut machine = Machine::two();
        let (guest, _raw) = machine.raw();
        machine.set_state(guest, state);
        machine.assert_let_go(guest);
        assert!(machine.status(guest).is_none(), "{state:?}");
        machine.assert_carries(0, 1);
    }
}

/// Hostile 72: a storm of states costs neither memory nor the peace of others.
#[test]
fn hostile_72_a_hundred_thousand_flips() {
    let mut machine = Machine::two();
    let guest = machine.bare_guest();
    let raw = Raw::new(&machine.guests[guest], 0);
    machine.offer(guest, &raw.keys(), "1");
    let path = format!("{}/state", front(machine.guests[guest].id));
    let mut waiting = 0;
    for flip in 0..100_000 {
        let value = ["1", "4", "5", "6"][flip % 4];
        machine.guests[guest].commit([Change::Write { path: path.clone(), value: value.into() }]);
        if flip % 8 == 7 {
            machine.turn();
        }
        if flip % 64 == 63 {
            // The store reads no faster; the backend is never further behind than this.
            while !machine.guests[guest].client.pending_output().is_empty() {
                machine.turn();
            }
            waiting = waiting.max(machine.client.pending_output().len());
        }
    }
    machine.settle();
    assert!(waiting < 16 << 10, "{waiting} bytes");
    machine.set_state(guest, "6");
    machine.set_state(guest, "1");
    assert_eq!(machine.states(guest).1, State::InitWait);
    machine.assert_let_go(guest);
    machine.assert_carries(0, 1);
}

/// Hostile 73: keys or directories go at each step of the handshake.
#[test]
fn hostile_73_nodes_deleted_at_each_step() {
    let mut machine = Machine::two();
    let mut steps = |turns: usize, path: &dyn Fn(hypercall::DomId) -> String| {
        let guest = machine.bare_guest();
        let raw = Raw::new(&machine.guests[guest], 0);
        let dir = front(machine.guests[guest].id);
        let changes = raw.keys().into_iter().chain([("state", "4".into())]);
        machine.guests[guest].commit(changes.map(|(key, value): (&str, String)| Change::Write {
            path: format!("{dir}/{key}"),
            value: value.into(),
        }));
        for _ in 0..turns {
            machine.turn();
        }
        machine.client.commit([Change::Rm { path: path(machine.guests[guest].id) }]);
        machine.settle();
        let connected = machine.is_connected(guest);
        // Once connected, keys are not looked at again.
        if !connected {
            machine.assert_let_go(guest);
        }
        machine.remove(&home(machine.guests[guest].id));
        machine.remove(&format!("/local/domain/0/backend/vif/{}", machine.guests[guest].id));
        machine.assert_let_go(guest);
        assert!(machine.status(guest).is_none());
        machine.assert_carries(0, 1);
        machine.guests.truncate(2);
        connected
    };
    let paths: [&dyn Fn(hypercall::DomId) -> String; 6] = [
        &|id| front(id),
        &|id| back(id),
        &|id| format!("{}/state", front(id)),
        &|id| format!("{}/state", back(id)),
        &|id| format!("{}/tx-ring-ref", front(id)),
        &|id| format!("{}/event-channel", front(id)),
    ];
    for (index, path) in paths.into_iter().enumerate() {
        let outcomes: BTreeSet<_> = (0..16).map(|turns| steps(turns, path)).collect();
        // Directories and states end it whenever they go; other keys only before they are read.
        let expected = if index < 4 { vec![false] } else { vec![false, true] };
        assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), expected, "path {index}");
    }
}

/// Hostile 63 to 66, and 69: what a frontend asks for is had in whole or not at all.
#[test]
fn hostile_63_to_69_bad_values_are_refused() {
    let long = "1".repeat(2000);
    let replaced = |key: &'static str, value: &str| {
        let value = value.to_string();
        move |keys: &mut Vec<(&'static str, String)>| {
            keys.retain(|(name, _)| *name != key);
            keys.push((key, value.clone()));
        }
    };
    type Edit = Box<dyn Fn(&mut Vec<(&'static str, String)>)>;
    let mut edits: Vec<(String, Edit)> = Vec::new();
    for key in ["tx-ring-ref", "rx-ring-ref", "event-channel"] {
        edits.push((
            format!("no {key}"),
            Box::new(move |keys| keys.retain(|(name, _)| *name != key)),
        ));
        for value in
            ["12abc", " 12", "+1", "0x10", "", "1\0", "99999999999", "4294967296", "-1", &long]
        {
            edits.push((format!("{key}={value:?}"), Box::new(replaced(key, value))));
        }
    }
    for count in ["0", "5", "65537", "4294967295", "x"] {
        let edit = replaced("multi-queue-num-queues", count);
        edits.push((format!("{count} queues"), Box::new(edit)));
    }
    edits.push(("queues without keys".into(), Box::new(replaced("multi-queue-num-queues", "2"))));
    edits.push(("flipping".into(), Box::new(replaced("request-rx-copy", "0"))));
    let mut machine = Machine::two();
    for (what, edit) in edits {
        let guest = machine.bare_guest();
        let raw = Raw::new(&machine.guests[guest], 0);
        let mut keys = raw.keys();
        edit(&mut keys);
        machine.offer(guest, &keys, "4");
        let notices = machine.take_notices(guest);
        assert!(matches!(notices.last(), Some(Notice::Refused(..))), "{what}: {notices:?}");
        assert_eq!(machine.states(guest).1, State::Closing, "{what}");
        machine.assert_let_go(guest);
        let id = machine.guests[guest].id;
        let error = format!("/local/domain/0/error/backend/vif/{id}/0/error");
        assert!(machine.read(&error).is_some(), "{what}: no error node");
        machine.destroy(guest);
    }
    machine.assert_carries(0, 1);
}

#[test]
fn hostile_65_two_queues_of_which_one_is_missing() {
    let mut machine = Machine::two();
    let guest = machine.bare_guest();
    let (first, second) =
        (Raw::new(&machine.guests[guest], 0), Raw::new(&machine.guests[guest], 0));
    let of = |raw: &Raw, queue: usize| {
        let keys = raw.keys().into_iter().take(3);
        keys.map(|(key, value)| (format!("queue-{queue}/{key}"), value)).collect::<Vec<_>>()
    };
    let mut keys = of(&first, 0);
    keys.extend(of(&second, 1).into_iter().take(2));
    keys.push(("multi-queue-num-queues".into(), "2".into()));
    let keys: Vec<_> = keys.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    machine.offer(guest, &keys, "4");
    let notices = machine.take_notices(guest);
    let refusal = Refusal::Missing("event-channel");
    assert!(notices.iter().any(|n| matches!(n, Notice::Refused(_, r) if *r == refusal)));
    machine.assert_let_go(guest);
    machine.assert_carries(0, 1);
}

/// Hostile 78 and 79: what a frontend writes while it is connected changes nothing.
#[test]
fn hostile_78_79_keys_changed_while_connected_are_ignored() {
    let mut machine = Machine::two();
    let (guest, _raw) = machine.raw();
    let before = machine.status(guest).unwrap();
    for (key, value) in
        [("feature-sg", "0"), ("tx-ring-ref", "x"), ("mac", "00:16:3e:00:00:01"), ("bridge", "x")]
    {
        machine.offer(guest, &[(key, value.into())], "4");
    }
    let after = machine.status(guest).unwrap();
    assert!(machine.is_connected(guest));
    assert_eq!((after.features, after.mac), (before.features, before.mac));
    machine.assert_carries(0, 1);
}

#[test]
fn an_interface_that_is_taken_offline_is_forgotten_once_closed() {
    let mut machine = Machine::two();
    let guest = machine.plain_guest();
    let id = machine.guests[guest].id;
    let dir = back(id);
    // What libxl does to detach: all at once.
    machine.toolstack([
        Change::Write { path: format!("{dir}/online"), value: "0".into() },
        Change::Write { path: format!("{dir}/state"), value: "5".into() },
    ]);
    let now = machine.now;
    let it = &mut machine.guests[guest];
    it.frontend.as_mut().unwrap().close(&mut it.client, now);
    machine.settle();
    assert!(machine.status(guest).is_none());
    assert_eq!(machine.states(guest), (State::Closed, State::Closed));
    machine.assert_let_go(guest);
    machine.toolstack([Change::Rm { path: dir }, Change::Rm { path: front(id) }]);
    assert!(machine.guests[guest].notices.contains(&netfront::Notice::Removed));
    machine.assert_carries(0, 1);
}

/// Hostile 74: our own directory goes.
#[test]
fn hostile_74_the_backends_directory_is_deleted() {
    let mut machine = Machine::two();
    let guest = machine.plain_guest();
    machine.remove(&back(machine.guests[guest].id));
    assert!(machine.status(guest).is_none());
    machine.assert_let_go(guest);
    assert_eq!(machine.states(guest), (State::Closed, State::Unknown));
    assert_eq!(machine.guests[guest].table.parked(), 0);
    machine.assert_carries(0, 1);
}

#[test]
fn a_frontend_that_was_refused_waits_before_it_is_let_in_again() {
    let mut machine = Machine::two();
    let guest = machine.bare_guest();
    machine.set_state(guest, "4");
    assert_eq!(machine.states(guest).1, State::Closing);
    machine.set_state(guest, "6");
    machine.set_state(guest, "1");
    assert_eq!(machine.states(guest).1, State::Closed, "too early");
    machine.pass(SECOND);
    assert_eq!(machine.states(guest).1, State::InitWait);
    let raw = Raw::new(&machine.guests[guest], 0);
    machine.offer(guest, &raw.keys(), "4");
    assert!(machine.is_connected(guest));
    machine.pass(100 * MS);
    machine.assert_carries(0, 1);
}

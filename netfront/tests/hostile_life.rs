//! Backends that die, lie in the store or hold on to pages; a store that fails. Each test: what comes of it, that the
//! interface beside it did not notice, and that nothing is held afterwards.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{BACK, FRONT, Rings, World, connected, directory, okay, write};
use hypercall::abi::GrantEntryV1;
use hypercall::{DomId, GrantRef, Handle};
use netfront::{Config, Frontend, Meta, Notice, Refusal, SendError};
use netif::keys::Features;
use sim::{Fault, FaultPlan, Kind};
use xenbus::client::Change;
use xenbus::device::State;
use xenbus::wire::{Access, Perm};

fn config() -> Config {
    Config { split: false, posted: 32, ..Config::new(Handle(0)) }
}

fn fresh() -> World {
    World::plain(config()).with_neighbour()
}

/// Offers, connects, and carries a packet each way.
fn assert_connects(mut world: World) {
    world.pass(60_000_000_000);
    world.set(&[("state", "2")]);
    let rings = world.attach();
    world.notices.clear();
    world.assert_carried_on(rings);
}

/// A backend's end of everything, by what it does to the store.
fn dies(how: impl Fn(&mut World)) {
    for holds in [false, true] {
        let (mut world, rings) = connected();
        world.send(5);
        let kept = holds.then(|| {
            let tx = world.keys()["tx-ring-ref"];
            world.map(tx)
        });
        drop(rings);
        how(&mut world);
        assert_eq!(world.nic.state(), State::Closed);
        assert!(world.notices.contains(&Notice::Disconnected));
        assert_eq!(world.nic.counters().tx.lost, 5);
        assert_eq!(world.grants(), (0, usize::from(holds)));
        assert_eq!(world.notices.contains(&Notice::Parked(1)), holds);
        world.assert_unmoved();
        drop(kept);
        world.pass(1_000_000_000);
        assert_eq!(world.grants(), (0, 0), "freed once it is let go of");
        world.dom0.1.commit(directory(BACK, 0, 1));
        world.set(&[("online", "1"), ("feature-rx-copy", "1")]);
        assert_connects(world);
    }
}

#[test]
fn hostile_58_the_backend_dies() {
    dies(|world| world.remove(BACK));
    dies(|world| world.set(&[("state", "6")]));
    dies(|world| world.set(&[("state", "0")]));
}

#[test]
fn hostile_58_and_is_not_seen_again() {
    let (mut world, rings) = connected();
    world.send(5);
    drop(rings);
    world.remove(BACK);
    (0..100).for_each(|_| world.pass(10_000_000_000));
    assert_eq!(world.nic.state(), State::Closed);
    world.assert_clean();
    world.assert_unmoved();
}

#[test]
fn hostile_59_the_backend_is_replaced_by_another() {
    let (mut world, rings) = connected();
    world.send(2);
    let other = "/local/domain/0/backend/vif/1/7";
    world.dom0.1.commit(directory(other, 0, 1));
    world.dom0.1.commit([
        write(format!("{other}/feature-rx-copy"), "1"),
        write(format!("{other}/state"), "2"),
    ]);
    drop(rings);
    world.settle();
    world.dom0.1.commit([write(format!("{FRONT}/backend"), other)]);
    world.settle();
    assert!(world.notices.contains(&Notice::Disconnected));
    assert_eq!((world.nic.counters().tx.lost, world.table.parked()), (2, 0));
    assert_eq!(world.nic.state(), State::Connected, "published anew");
    world.set(&[("state", "4")]);
    assert!(!world.nic.is_connected(), "the old one has no say any more");
    world.dom0.1.commit([write(format!("{other}/state"), "4")]);
    world.settle();
    assert!(world.nic.is_connected());
    world.assert_unmoved();
}

#[test]
fn hostile_59_another_domain_serves() {
    let (mut world, rings) = connected();
    drop(rings);
    world.set_at(FRONT, &[("backend-id", "5")]);
    // The path is of the old domain, so it never gets anywhere; what it grants now is for the new one.
    world.set(&[("state", "2")]);
    let tx = GrantRef(world.keys()["tx-ring-ref"]);
    assert_eq!(world.sim.grant_entry(DomId(1), tx).unwrap().domid, DomId(5));
    world.assert_unmoved();
}

#[test]
fn hostile_62_every_end_at_every_step() {
    // Nothing is freed twice or leaked, whatever ends first.
    for step in 0..6 {
        for end in 0..4 {
            let mut world = fresh();
            let mut rings: Option<Rings> = None;
            if step > 0 {
                world.set(&[("feature-rx-copy", "1")]);
            }
            if step > 1 {
                world.set(&[("state", "2")]);
            }
            if step > 2 {
                rings = Some(world.attach());
            }
            if step > 3 {
                world.send(10);
            }
            if step > 4 {
                let now = world.now;
                world.nic.close(&mut world.guest.1, now);
            }
            drop(rings.take());
            match end {
                0 => world.remove(FRONT),
                1 => world.remove(BACK),
                2 => world.backend_closes(()),
                _ => world.set(&[("state", "9")]),
            }
            world.settle();
            world.assert_clean();
            world.assert_unmoved();
        }
    }
}

fn refused(keys: &[(&str, &str)], refusal: Refusal) {
    let mut world = fresh();
    world.set(&[("feature-rx-copy", "1"), ("feature-sg", "1")]);
    world.set(keys);
    world.set(&[("state", "2")]);
    assert!(world.notices.contains(&Notice::Refused(refusal)), "{:?}", world.notices);
    assert_eq!(world.nic.state(), State::Closing);
    let error = String::from("/local/domain/1/error/device/vif/0/error");
    assert_eq!(world.read(&[error]), [Some(refusal.to_string())]);
    world.assert_clean();
    world.assert_unmoved();
    // Not before it has started over, and not at once.
    world.set(&[("state", "6")]);
    world.set(&[("state", "6")]);
    assert_eq!(world.nic.state(), State::Closed);
    world.set(&[("feature-rx-copy", "1"), ("feature-sg", "1"), ("multi-queue-max-queues", "1")]);
    world.set(&[("feature-split-event-channels", "0")]);
    assert_connects(world);
}

#[test]
fn hostile_63_what_is_needed_is_missing() {
    refused(&[("feature-rx-copy", "0")], Refusal::NoCopy);
    // Without a backend there is nobody to refuse.
    for key in ["backend", "backend-id"] {
        let mut world = fresh();
        world.remove(&format!("{FRONT}/{key}"));
        world.offer(&[]);
        assert_eq!(world.nic.state(), State::Initialising);
        world.assert_clean();
        world.assert_unmoved();
    }
}

#[test]
fn hostile_64_numbers_that_are_none() {
    for bad in ["12abc", " 12", "+1", "0x10", "", "1\0", "00000000001", "4294967296", "-1"] {
        refused(&[("feature-sg", bad)], Refusal::BadValue("feature-sg"));
    }
    let key = "multi-queue-max-queues";
    refused(&[(key, "1 ")], Refusal::BadValue(key));
    for bad in ["abc", "65536", "-1", ""] {
        let mut world = fresh();
        world.set_at(FRONT, &[("backend-id", bad)]);
        world.offer(&[]);
        assert_eq!(world.nic.state(), State::Initialising, "nobody to talk to");
        world.assert_clean();
        world.assert_unmoved();
    }
}

#[test]
fn hostile_65_numbers_of_queues() {
    for (offered, used) in [("0", 1), ("1", 1), ("3", 3), ("16", 4), ("4294967295", 4)] {
        let mut world = World::plain(Config { queues: 4, ..config() }).with_neighbour();
        world.offer(&[("multi-queue-max-queues", offered)]);
        let path = format!("{FRONT}/multi-queue-num-queues");
        assert_eq!(world.read(&[path]), [Some(used.to_string())], "{offered}");
        assert_eq!(world.nic.queues(), used);
        world.assert_closes(());
    }
}

#[test]
fn hostile_69_values_that_are_too_long() {
    refused(&[("feature-sg", &"1".repeat(4000))], Refusal::BadValue("feature-sg"));
    let mut world = fresh();
    world.set_at(FRONT, &[("mac", &"0".repeat(4000)), ("mtu", &"9".repeat(4000))]);
    world.offer(&[]);
    assert_eq!((world.nic.mac(), world.nic.mtu()), (None, None));
    let rings = world.attach();
    world.assert_carried_on(rings);
}

#[test]
fn hostile_70_states_that_are_none() {
    for state in ["", "abc", "9", "99999999999", "-1", "4 "] {
        let (mut world, rings) = connected();
        drop(rings);
        world.set(&[("state", state)]);
        assert_eq!(world.nic.state(), State::Closed, "{state:?}");
        world.assert_clean();
        world.assert_unmoved();
        assert_connects(world);
    }
}

#[test]
fn hostile_71_states_in_no_order() {
    // What the backend says, and where that leaves a frontend that was initialising, or connected.
    let table = [
        ("1", State::Initialising, State::Connected),
        ("3", State::Initialising, State::Connected),
        ("4", State::Initialising, State::Connected),
        ("6", State::Initialising, State::Closed),
        ("7", State::Initialising, State::Connected),
        ("8", State::Initialising, State::Connected),
    ];
    for (state, initialising, was_connected) in table {
        for repeat in 1..3 {
            let mut world = fresh();
            (0..repeat).for_each(|_| world.set(&[("state", state)]));
            assert_eq!(world.nic.state(), initialising, "{state}");
            assert!(!world.nic.is_connected());
            world.assert_clean();
            world.set(&[("feature-rx-copy", "1")]);
            assert_connects(world);

            let (mut world, rings) = connected();
            drop(rings);
            (0..repeat).for_each(|_| world.set(&[("state", state)]));
            assert_eq!(world.nic.state(), was_connected, "{state}");
            world.assert_unmoved();
            world.backend_closes(());
            assert_eq!(world.nic.state(), State::Closed);
            world.assert_clean();
            assert_connects(world);
        }
    }
}

#[test]
fn hostile_72_states_that_flip_without_end() {
    let (mut world, rings) = connected();
    drop(rings);
    let written = |world: &World| world.guest.1.pending_output().len();
    for round in 0..1000_usize {
        let states = ["4", "2", "1", "6", "5", "0", "8", "7", "3", "x"];
        // In one transaction, of which each change is an event of its own.
        let flips = states.iter().cycle().skip(round).take(100);
        world.dom0.1.commit(flips.map(|state| write(format!("{BACK}/state"), state)));
        while world.turn() {}
        assert!(written(&world) < 4096);
        assert!(world.table.granted() < 1024 && world.table.parked() == 0);
        world.notices.truncate(64);
    }
    world.settle();
    world.set(&[("state", "6")]);
    world.set(&[("state", "6")]);
    world.assert_clean();
    world.assert_unmoved();
    assert_connects(world);
}

#[test]
fn hostile_73_the_backend_is_deleted_at_each_step() {
    for step in 0..200 {
        let mut world = fresh();
        world.dom0.1.commit([
            write(format!("{BACK}/feature-rx-copy"), "1"),
            write(format!("{BACK}/state"), "2"),
        ]);
        (0..step / 2).for_each(|_| _ = world.turn());
        // The whole of it, or what it is watched by.
        world.remove(if step % 2 == 0 { BACK } else { "/local/domain/0/backend/vif/1/0/state" });
        if world.nic.state() == State::Connected {
            panic!("{step}: connected to nobody");
        }
        world.assert_clean();
        world.assert_unmoved();
        if step / 2 > 60 {
            return;
        }
    }
}

#[test]
fn hostile_74_our_own_directory_is_deleted() {
    for step in 0..3 {
        let mut world = fresh();
        let mut rings = None;
        if step > 0 {
            world.offer(&[]);
        }
        if step > 1 {
            rings = Some(world.attach());
            world.send(3);
        }
        drop(rings);
        world.remove(FRONT);
        assert!(world.notices.contains(&Notice::Removed));
        assert_eq!(world.nic.state(), State::Unknown);
        assert_eq!(world.nic.send(0, &[7; 100], Meta::default()), Err(SendError::NotConnected));
        world.assert_clean();
        world.assert_unmoved();
        assert_eq!(world.read(&[format!("{FRONT}/state")]), [None], "nor does it come back");
    }
}

#[test]
fn hostile_75_the_store_refuses_what_is_written() {
    let mut world = fresh();
    let perms = |owner| {
        let perms = [Perm::new(Access::None, DomId(owner)), Perm::new(Access::Read, DomId(1))];
        Change::SetPerms { path: FRONT.into(), perms: perms.into() }
    };
    // Our directory is another's, so that no key can be made in it.
    world.dom0.1.commit([perms(0)]);
    world.offer(&[]);
    assert!(!world.nic.is_connected());
    world.assert_clean();
    world.assert_unmoved();
    world.dom0.1.commit([perms(1)]);
    world.backend_closes(());
    assert_connects(world);
}

#[test]
fn hostile_76_the_store_speaks_nonsense() {
    let (mut world, mut rings) = connected();
    assert!(world.guest.1.receive(&[0xff; 64]).is_err());
    assert!(world.guest.1.is_dead());
    // Packets go on.
    for _ in 0..100 {
        world.nic.send(0, &[7; 100], Meta::default()).unwrap();
        world.nic.poll(&mut world.guest.1, world.now);
        rings.tx.poll().unwrap();
        let request = rings.tx.take().unwrap();
        rings.tx.push(okay(request.id.0)).unwrap();
        let _ = rings.tx.publish();
    }
    assert!(world.nic.is_connected());
    let conn = world.guest.0;
    world.server.disconnect(conn);
    world.guest.0 = world.server.introduce(DomId(1));
    world.guest.1.reconnect();
    world.settle();
    assert!(world.nic.is_connected());
    world.assert_carried_on(rings);
}

#[test]
fn hostile_76_a_store_that_forgot_what_was_written() {
    // The connection dies with our state on the way.
    let (mut world, rings) = connected();
    let now = world.now;
    world.nic.close(&mut world.guest.1, now);
    world.guest.1.receive(&[0xff; 64]).unwrap_err();
    let conn = world.guest.0;
    world.server.disconnect(conn);
    world.guest.0 = world.server.introduce(DomId(1));
    world.guest.1.reconnect();
    world.settle();
    assert_eq!(world.nic.state(), State::Closing);
    assert_eq!(world.read(&[format!("{FRONT}/state")]), [Some("5".into())]);
    world.backend_closes(rings);
    world.assert_clean();
    world.assert_unmoved();
}

#[test]
fn hostile_77_an_event_of_no_watch() {
    let (mut world, rings) = connected();
    let body = b"device/vif/0\x00999999\x00";
    let header = [15, 0, 0, body.len() as u32].map(u32::to_le_bytes);
    let unknown = world.guest.1.stats();
    world.guest.1.receive(header.as_flattened()).unwrap();
    world.guest.1.receive(body).unwrap();
    assert_ne!(world.guest.1.stats(), unknown);
    world.assert_carried_on(rings);
}

#[test]
fn hostile_78_features_change_while_connected() {
    let (mut world, rings) = connected();
    let before = world.nic.features();
    world.set(&[("feature-sg", "0"), ("feature-gso-tcpv4", "1"), ("feature-rx-copy", "0")]);
    world.set(&[("multi-queue-max-queues", "abc"), ("feature-ctrl-ring", "1")]);
    assert_eq!((world.nic.features(), world.nic.queues()), (before, 1));
    assert!(before.contains(Features::SG));
    world.nic.send(0, &[7; 5000], Meta::default()).unwrap();
    world.assert_carried_on(rings);
    world.set(&[("multi-queue-max-queues", "1"), ("feature-rx-copy", "1"), ("state", "2")]);
    world.nic.open(&mut world.guest.1);
    world.settle();
    let rings = world.attach();
    assert!(world.nic.features().contains(Features::GSO_TCPV4 | Features::CTRL_RING));
    assert_eq!(world.nic.send(0, &[7; 5000], Meta::default()), Err(SendError::TooLong));
    drop(rings);
}

#[test]
fn hostile_89_an_entry_that_changes_all_the_time() {
    let (mut world, rings) = connected();
    world.send(20);
    let gref = GrantRef(world.keys()["tx-ring-ref"]);
    let (sim, stop) = (world.sim.clone(), Arc::new(AtomicBool::new(false)));
    drop(rings);
    let entry = sim.grant_entry(DomId(1), gref).unwrap();
    let stopped = Arc::clone(&stop);
    let mutator = std::thread::spawn(move || {
        let mut flags = 0;
        while !stopped.load(Ordering::Relaxed) {
            // Bits that mean nothing, and at times that it is being read.
            flags = (flags + 1) % 64;
            let reading = if flags % 3 == 0 { 8 } else { 0 };
            sim.set_grant_entry(
                DomId(1),
                gref,
                GrantEntryV1 { flags: entry.flags | flags << 8 | reading, ..entry },
            );
        }
    });
    world.set(&[("state", "6")]);
    assert_eq!(world.nic.state(), State::Closed);
    assert_eq!(world.grants().0, 0);
    let parked = world.table.parked();
    stop.store(true, Ordering::Relaxed);
    mutator.join().unwrap();
    if parked > 0 {
        world.sim.set_grant_entry(DomId(1), gref, entry);
        world.pass(2_000_000_000);
    }
    world.sim.set_grant_entry(DomId(1), gref, GrantEntryV1::default());
    assert_eq!(world.grants(), (0, 0));
    world.assert_clean();
    world.assert_unmoved();
}

#[test]
fn hostile_90_references_are_not_used_again_at_once() {
    let (mut world, rings) = connected();
    world.send(5);
    let old: Vec<_> = world.sim.ledger().held_by(DomId(1)).entries().collect();
    let grefs = |entries: &[(DomId, sim::Item)]| -> Vec<GrantRef> {
        let grefs = entries.iter().filter_map(|(_, item)| match item {
            sim::Item::Grant { gref, .. } => Some(*gref),
            _ => None,
        });
        grefs.collect()
    };
    let stay = grefs(&world.before.held_by(DomId(1)).entries().collect::<Vec<_>>());
    let old: Vec<_> = grefs(&old).into_iter().filter(|gref| !stay.contains(gref)).collect();
    assert!(old.len() > 256);
    world.backend_closes(rings);
    world.pass(1_000_000_000);
    world.set(&[("state", "2")]);
    let rings = world.attach();
    let new = grefs(&world.sim.ledger().held_by(DomId(1)).entries().collect::<Vec<_>>());
    let again = new.iter().filter(|gref| old.contains(gref)).count();
    // 512 in the table's first frame, of which most were just given back: the rest come first.
    assert!(again < 200, "{again}");
    assert!(!old.contains(&GrantRef(world.keys()["tx-ring-ref"])));
    world.assert_carried_on(rings);
}

#[test]
fn hostile_93_ports_are_short() {
    let none = Fault::Errno(hypercall::Errno::NOSPC);
    for (ports, connects) in [(0, false), (1, true)] {
        let mut world = World::plain(Config::new(Handle(0))).with_neighbour();
        world.set(&[("feature-split-event-channels", "1"), ("feature-rx-copy", "1")]);
        let plan = FaultPlan { after: ports, ..FaultPlan::every(Kind::AllocUnbound, none) };
        world.sim.inject(DomId(1), plan);
        world.set(&[("state", "2")]);
        world.sim.clear_faults(DomId(1));
        if connects {
            // One for both rings.
            let rings = world.attach();
            world.assert_carried_on(rings);
        } else {
            assert!(matches!(world.notices[..], [Notice::Refused(Refusal::Port(_))]));
            world.assert_clean();
            world.assert_unmoved();
        }
    }
}

#[test]
fn no_memory_at_any_point_of_connecting() {
    for kind in [Kind::AllocPages, Kind::TableFrame, Kind::AllocUnbound] {
        for after in 0..6 {
            let mut world = World::plain(Config { queues: 2, ..config() });
            world.set(&[("feature-rx-copy", "1"), ("multi-queue-max-queues", "2")]);
            world.set(&[("feature-ctrl-ring", "1")]);
            let fault = Fault::Errno(hypercall::Errno::NOMEM);
            let plan = FaultPlan { after, ..FaultPlan::every(kind, fault) };
            world.sim.inject(DomId(1), plan);
            world.set(&[("state", "2")]);
            world.sim.clear_faults(DomId(1));
            if world.nic.state() != State::Connected {
                assert_eq!(world.nic.state(), State::Closing);
                world.assert_clean();
            } else {
                world.assert_closes(());
            }
        }
    }
}

#[test]
fn what_an_earlier_kernel_left_is_ended_first() {
    let mut world = fresh();
    world.offer(&[]);
    let rings = world.attach();
    // Another kernel in the same domain, which knows nothing of all this.
    let (binder, client) = (world.upcalls.binder(), &mut world.guest.1);
    let next = Frontend::new(world.table.clone(), binder, client, config());
    std::mem::forget(std::mem::replace(&mut world.nic, next));
    world.settle();
    assert_eq!(world.nic.state(), State::Initialising);
    assert_eq!(world.keys()["state"], 1, "and the backend is told");
    world.backend_closes(rings);
    world.pass(1_000_000_000);
    world.set(&[("state", "2")]);
    world.attach();
}

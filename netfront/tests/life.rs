//! What an interface lives through with a backend that keeps to the rules.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::{BACK, FRONT, Rings, World, connected, directory, okay, rx, write};
use evtchn::Delivery;
use hypercall::abi::GrantEntryV1;
use hypercall::{DomId, Handle, Hypervisor, PageOffset};
use netfront::{Config, JoinError, MAX_MULTICAST, Meta, Notice, SendError};
use netif::mac::MacAddr;
use netif::slot::{ExtraInfo, RxFlags, TxResponse, TxStatus};
use netif::tx::{MulticastChange, Verdict, assemble};
use sim::{Item, PortState};
use xenbus::device::State;

fn config() -> Config {
    Config { split: false, ..Config::new(Handle(0)) }
}

fn offered(config: Config, offer: &[(&str, &str)]) -> (World, Rings) {
    let mut world = World::plain(config).with_neighbour();
    world.offer(offer);
    let rings = world.attach();
    (world, rings)
}

#[test]
fn indices_wrap() {
    let (mut world, mut rings) =
        offered(Config { first_index: 1000_u32.wrapping_neg(), ..config() }, &[]);
    for at in 0..3000_u16 {
        world.send(1);
        rings.tx.poll().unwrap();
        let request = rings.tx.take().unwrap();
        rings.tx.push(okay(request.id.0)).unwrap();
        // The indices begin within a ring.
        let slot = (at + (1000_u32.wrapping_neg() % 256) as u16) % 256;
        world.answer_rx(&mut rings, &[rx(slot, 0, RxFlags::empty(), 60)]);
    }
    assert_eq!((world.received.len(), world.nic.counters().tx.completed), (3000, 3000));
    world.assert_carried_on(rings);
}

#[test]
fn pages_of_a_backend_that_is_not_trusted_hold_nothing_but_their_packet() {
    for (trusted, by_toolstack) in [(true, ""), (false, "0"), (false, ""), (true, "1")] {
        let mut world =
            World::plain(Config { trusted: trusted || by_toolstack == "0", ..config() });
        if !by_toolstack.is_empty() {
            world.set_at(FRONT, &[("trusted", by_toolstack)]);
        }
        world.offer(&[("feature-sg", "1")]);
        let mut rings = world.attach();
        let lengths = [4096, 60, 1500, 14, 9000, 100, 1024, 1025, 64, 4095];
        let mut leftovers = false;
        for (round, len) in lengths.iter().cycle().take(200).enumerate() {
            world.nic.send(0, &vec![round as u8 | 1; *len], Meta::default()).unwrap();
            world.settle();
            rings.tx.poll().unwrap();
            let Verdict::Packet(packet) = assemble(&mut rings.tx.requests()).unwrap().unwrap()
            else {
                panic!("a packet");
            };
            for slot in &packet.slots {
                let page = world.peek(slot.gref, 0, 4096);
                let range = usize::from(slot.offset)..usize::from(slot.offset + slot.size);
                assert!(page[range.clone()].iter().all(|byte| *byte == round as u8 | 1));
                let outside = page[..range.start].iter().chain(&page[range.end..]);
                leftovers |= { outside }.any(|byte| *byte != 0);
            }
            for response in packet.answers.responses(TxStatus::OKAY) {
                rings.tx.push(response).unwrap();
            }
            world.kick(&mut rings);
        }
        assert_eq!(leftovers, trusted && by_toolstack != "0");
    }
}

#[test]
fn a_cancelled_suspension_changes_nothing() {
    let (mut world, mut rings) = connected();
    world.send(3);
    world.nic.suspended();
    assert_eq!(world.nic.send(0, &[7; 100], Meta::default()), Err(SendError::NotConnected));
    rings.tx.poll().unwrap();
    for id in 0..3 {
        rings.tx.take().unwrap();
        rings.tx.push(okay(id)).unwrap();
    }
    world.kick(&mut rings);
    assert_eq!(world.nic.counters().tx.completed, 0, "nothing is touched");
    assert_eq!(world.nic.deadline(), None);
    world.nic.resumed(&mut world.guest.1, true);
    world.settle();
    assert_eq!(world.nic.counters().tx.completed, 3);
    assert_eq!(world.notices.iter().filter(|it| **it == Notice::Disconnected).count(), 0);
    world.assert_carried_on(rings);
}

/// The domain goes on elsewhere: nothing is granted there, no port is bound, and the store is another.
fn move_away(world: &mut World, rings: Rings) {
    world.nic.suspended();
    drop(rings);
    let guest = world.sim.handle(DomId(1)).unwrap();
    let before = world.before.clone();
    let held = world.sim.ledger().since(&before).came;
    for (_, item) in held.held_by(DomId(1)).entries() {
        match item {
            Item::Grant { gref, .. } => {
                assert!(world.sim.set_grant_entry(DomId(1), gref, GrantEntryV1::default()));
            }
            Item::Port { port, .. } => guest.close(port).unwrap(),
            _ => {}
        }
    }
    plug_in_again(world);
    world.table.resumed().unwrap();
}

/// What the toolstack does where the domain goes on.
fn plug_in_again(world: &mut World) {
    world.dom0.1.commit([xenbus::client::Change::Rm { path: BACK.into() }]);
    world.dom0.1.commit(directory(BACK, 0, 1));
    world.dom0.1.commit([
        write(format!("{BACK}/online"), "1"),
        write(format!("{BACK}/state"), "1"),
        write(format!("{FRONT}/state"), "1"),
    ]);
}

#[test]
fn a_resumed_domain_starts_over() {
    for _ in 0..3 {
        let (mut world, rings) = connected();
        world.send(3);
        move_away(&mut world, rings);
        world.nic.resumed(&mut world.guest.1, false);
        assert_eq!(world.grants(), (0, 0), "at once, as numbers of before mean nothing here");
        world.settle();
        assert_eq!(world.nic.state(), State::Initialising);
        assert!(world.notices.contains(&Notice::Disconnected));
        assert_eq!(world.nic.counters().tx.lost, 3);
        world.assert_clean();
        world.assert_unmoved();
        world.offer(&[("feature-sg", "1")]);
        let rings = world.attach();
        world.assert_carried_on(rings);
    }
}

#[test]
fn a_domain_that_is_restored_starts_over_however_its_events_come() {
    for (from, to) in [(true, true), (true, false), (false, true)] {
        let mut world = World::plain(config());
        let mut is_fifo = true;
        for fifo in [from, to, to] {
            world.offer(&[("feature-sg", "1")]);
            let rings = world.attach();
            world.send(3);
            world.nic.suspended();
            drop(rings);
            assert!(world.sim.suspend(DomId(1)));
            world.sim.set_fifo(DomId(1), fifo);
            assert!(world.sim.resume(DomId(1), 0x1_6005));
            assert_eq!(world.upcalls.delivery() == Delivery::Fifo, is_fifo);
            world.upcalls.resumed();
            world.table.resumed().unwrap();
            // Somebody is quicker, and has a port with the number of one that the interface had.
            let early = world.upcalls.binder().alloc_unbound(DomId(0)).unwrap();
            plug_in_again(&mut world);
            world.nic.resumed(&mut world.guest.1, false);
            let state = world.sim.port(DomId(1), early.port());
            assert_eq!(state, PortState::Unbound(DomId(0)), "it is not closed for that");
            drop(early);
            world.settle();
            assert_eq!((world.upcalls.bound(), world.grants()), (0, (0, 0)));
            if is_fifo != fifo {
                // The pages of the queues are kept, and only those that Xen uses do not count.
                is_fifo = fifo;
                world.before = world.sim.ledger();
            }
            world.assert_clean();
        }
        world.offer(&[("feature-sg", "1")]);
        let rings = world.attach();
        world.assert_carried_on(rings);
    }
}

#[test]
fn hostile_60_suspended_resumed_and_removed_in_any_order() {
    #[derive(Clone, Copy, PartialEq)]
    enum Do {
        Suspend,
        Resume,
        Cancel,
        Remove,
        Close,
    }
    use Do::*;
    let all = [Suspend, Resume, Cancel, Remove, Close];
    for number in 0..250 {
        let steps = [number / 2 % 5, number / 10 % 5, number / 50].map(|at| all[at]);
        let (mut world, rings) = offered(Config { posted: 16, ..config() }, &[]);
        world.send(2);
        drop(rings);
        for step in steps {
            let now = world.now;
            match step {
                Suspend => world.nic.suspended(),
                Resume => world.nic.resumed(&mut world.guest.1, false),
                Cancel => world.nic.resumed(&mut world.guest.1, true),
                Remove => world.remove(FRONT),
                Close => world.nic.close(&mut world.guest.1, now),
            }
            // Also without anything in between.
            if number % 2 == 0 {
                world.settle();
            }
        }
        world.nic.resumed(&mut world.guest.1, true);
        world.settle();
        world.remove(FRONT);
        assert_eq!(world.nic.state(), State::Unknown);
        assert_eq!(world.notices.iter().filter(|it| **it == Notice::Removed).count(), 1);
        world.assert_clean();
        world.assert_unmoved();
    }
}

#[test]
fn a_closed_interface_stays_so_over_a_resume() {
    let (mut world, rings) = connected();
    world.nic.close(&mut world.guest.1, world.now);
    world.settle();
    world.backend_closes(rings);
    world.set_at(FRONT, &[("state", "1")]);
    world.nic.resumed(&mut world.guest.1, false);
    world.offer(&[]);
    world.pass(60_000_000_000);
    assert!(!world.nic.is_connected());
    world.assert_clean();
    world.nic.open(&mut world.guest.1);
    world.settle();
    let rings = world.attach();
    world.assert_carried_on(rings);
}

#[test]
fn the_mtu_is_read_and_read_again() {
    let mut world = World::plain(config());
    assert_eq!(world.nic.mtu(), None);
    world.set_at(FRONT, &[("mtu", "9000")]);
    assert_eq!(world.nic.mtu(), Some(9000));
    world.offer(&[]);
    let rings = world.attach();
    world.notices.clear();
    world.set_at(FRONT, &[("mtu", "1400")]);
    world.set_at(FRONT, &[("mtu", "1400")]);
    assert_eq!(world.notices, [Notice::Mtu(Some(1400))]);
    world.set_at(FRONT, &[("mtu", "x")]);
    assert_eq!(world.notices, [Notice::Mtu(Some(1400)), Notice::Mtu(None)]);
    world.assert_carried_on(rings);
}

fn key(world: &mut World, key: &str) -> Option<String> {
    world.read(&[format!("{FRONT}/{key}")]).pop().unwrap()
}

#[test]
fn headroom_is_asked_for_and_changed() {
    let asked = Config { headroom: PageOffset::new(256).unwrap(), ..config() };
    let (mut world, _rings) = offered(asked, &[]);
    assert_eq!(key(&mut world, "xdp-headroom"), None, "not of a backend that does not offer it");

    let (mut world, mut rings) = offered(asked, &[("feature-xdp-headroom", "1")]);
    assert_eq!(key(&mut world, "xdp-headroom").as_deref(), Some("256"));
    world.nic.set_headroom(&mut world.guest.1, PageOffset::new(512).unwrap());
    world.settle();
    assert_eq!(key(&mut world, "state").as_deref(), Some("7"));
    assert_eq!(key(&mut world, "xdp-headroom").as_deref(), Some("512"));
    // Packets go on, and each says itself where it begins.
    world.send(1);
    world.answer_rx(&mut rings, &[rx(0, 256, RxFlags::empty(), 60)]);
    assert_eq!(world.received.len(), 1);
    world.set(&[("state", "8")]);
    assert_eq!(key(&mut world, "state").as_deref(), Some("4"));
    assert!(world.nic.is_connected());
    world.set(&[("state", "4")]);
    world.answer_rx(&mut rings, &[rx(1, 512, RxFlags::empty(), 60)]);
    world.nic.set_headroom(&mut world.guest.1, PageOffset::ZERO);
    world.settle();
    assert_eq!(key(&mut world, "xdp-headroom").as_deref(), Some("0"));
    // A backend that never answers that is left as any other.
    world.pass(100_000_000_000);
    assert!(world.nic.is_connected());
    assert!(!world.notices.contains(&Notice::Disconnected));
    world.assert_carried_on(rings);
}

fn group(number: u8) -> MacAddr {
    MacAddr([0x33, 0x33, 0, 0, 0, number])
}

/// What the frontend asks of the filter, each answered so.
fn changes(world: &mut World, rings: &mut Rings, status: TxStatus) -> Vec<ExtraInfo> {
    world.settle();
    let mut changes = Vec::new();
    rings.tx.poll().unwrap();
    while let Some(verdict) = assemble(&mut rings.tx.requests()).unwrap() {
        let Verdict::Multicast { change, answers } = verdict else { panic!("{verdict:?}") };
        changes.push(match change {
            MulticastChange::Add(address) => ExtraInfo::McastAdd(address),
            MulticastChange::Remove(address) => ExtraInfo::McastDel(address),
        });
        for response in answers.responses(status) {
            rings.tx.push(response).unwrap();
        }
    }
    world.kick(rings);
    changes
}

const FILTER: &[(&str, &str)] =
    &[("feature-multicast-control", "1"), ("feature-dynamic-multicast-control", "1")];

#[test]
fn multicast_is_asked_for() {
    let wanted = Config { multicast_filter: true, ..config() };
    let mut world = World::plain(wanted).with_neighbour();
    world.nic.join(group(1)).unwrap();
    world.nic.join(group(2)).unwrap();
    world.nic.join(group(2)).unwrap();
    world.nic.leave(group(1));
    world.offer(FILTER);
    assert_eq!(key(&mut world, "request-multicast-control").as_deref(), Some("1"));
    let mut rings = world.attach();
    let told = changes(&mut world, &mut rings, TxStatus::OKAY);
    assert_eq!(told, [ExtraInfo::McastAdd(group(2))]);
    for number in 3..=MAX_MULTICAST as u8 + 1 {
        world.nic.join(group(number)).unwrap();
    }
    assert_eq!(world.nic.join(group(200)), Err(JoinError::TooMany));
    let station = MacAddr([0, 0x16, 0x3e, 0, 0, 1]);
    assert_eq!(world.nic.join(station), Err(JoinError::NotMulticast(station)));
    let told = changes(&mut world, &mut rings, TxStatus::OKAY);
    assert_eq!(told.len(), MAX_MULTICAST - 1);
    // What is undone before it is told is not told.
    world.nic.leave(group(2));
    world.nic.leave(group(3));
    world.nic.join(group(3)).unwrap();
    for _ in 0..100_000 {
        world.nic.join(group(100)).unwrap();
        world.nic.leave(group(100));
    }
    let told = changes(&mut world, &mut rings, TxStatus::OKAY);
    assert_eq!(told, [ExtraInfo::McastDel(group(2))]);
    // All of it again with the next backend.
    world.backend_closes(rings);
    world.pass(1_000_000_000);
    world.set(&[("state", "2")]);
    let mut rings = world.attach();
    assert_eq!(changes(&mut world, &mut rings, TxStatus::OKAY).len(), MAX_MULTICAST - 1);
    assert_eq!(world.nic.counters().tx.completed, 0, "none of it is a packet");
    world.assert_carried_on(rings);
}

#[test]
fn a_filter_without_room_is_done_without() {
    let wanted = Config { multicast_filter: true, ..config() };
    let (mut world, mut rings) = offered(wanted, FILTER);
    world.nic.join(group(1)).unwrap();
    changes(&mut world, &mut rings, TxStatus::ERROR);
    assert!(world.notices.contains(&Notice::MulticastRefused));
    assert_eq!(key(&mut world, "request-multicast-control").as_deref(), Some("0"));
    world.nic.join(group(2)).unwrap();
    assert_eq!(changes(&mut world, &mut rings, TxStatus::OKAY), []);
    world.assert_carried_on(rings);
}

#[test]
fn without_a_filter_nothing_is_said_of_multicast() {
    for (filter, offer) in [(false, FILTER), (true, &[][..])] {
        let wanted = Config { multicast_filter: filter, ..config() };
        let (mut world, mut rings) = offered(wanted, offer);
        world.nic.join(group(1)).unwrap();
        world.nic.leave(group(1));
        assert_eq!(changes(&mut world, &mut rings, TxStatus::OKAY), []);
        assert_eq!(key(&mut world, "request-multicast-control").as_deref(), Some("0"));
        world.assert_carried_on(rings);
    }
}

#[test]
fn changes_of_the_filter_wait_for_room() {
    let wanted = Config { multicast_filter: true, ..config() };
    let (mut world, mut rings) = offered(wanted, FILTER);
    world.send(255);
    (1..4).for_each(|number| world.nic.join(group(number)).unwrap());
    world.settle();
    rings.tx.poll().unwrap();
    assert_eq!(rings.tx.available(), 255);
    for _ in 0..255 {
        let request = rings.tx.take().unwrap();
        rings.tx.push(TxResponse { id: request.id, status: TxStatus::OKAY }).unwrap();
    }
    world.kick(&mut rings);
    assert_eq!(changes(&mut world, &mut rings, TxStatus::OKAY).len(), 3);
    world.assert_carried_on(rings);
}

#[test]
fn a_toolstack_that_says_closing_for_the_backend_has_nothing_parked() {
    let mut world = World::plain(config()).with_neighbour();
    world.offer(&[("feature-sg", "1")]);
    let rings = world.attach();
    world.send(3);
    // As libxl detaches an interface: the backend hears of it by this, and has the rings still.
    world.set(&[("online", "0"), ("state", "5")]);
    assert_eq!(world.keys()["state"], 6);
    assert_eq!(world.grants().1, 0, "nothing is parked");
    drop(rings);
    world.set(&[("state", "6")]);
    world.assert_clean();
    world.assert_unmoved();
}

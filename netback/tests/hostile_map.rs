//! Packets whose pages are mapped for the local port, while their guest, Xen or the operator does something else.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::raw::Raw;
use common::{MS, Machine, SECOND, facts, frame};
use grant::SharedMemory;
use hypercall::{DomId, GrantRef, GrantStatus};
use netback::counters::Counters;
use netback::datapath::{Datapath, Datapaths, Facts, Withdrawal};
use netback::{Notice, Packet, Refusal, VifFault};
use netif::mac::MacAddr;
use netif::slot::{TxFlags, TxRequest, TxStatus};
use sim::{Fault, FaultPlan, Item, Kind, Ledger, SimHv};
use xenbus::device::State;

/// A packet of this size is mapped; so much of it is copied privately.
const SIZE: u16 = 4000;
const HEADER: usize = 128;

/// Two guests that take no part, and a frontend by hand that sends to the local port.
struct Scene {
    machine: Machine,
    before: Ledger,
    guest: usize,
    raw: Raw,
    bytes: Vec<u8>,
    /// Of the bystanders.
    counters: [Counters; 2],
}

fn scene() -> Scene {
    let mut machine = Machine::two();
    machine.assert_carries(0, 1);
    // The local port's address is known once it has sent.
    let mut packet = machine.backend.packet(60, machine.now).unwrap();
    packet.bytes_mut().copy_from_slice(&frame([0xff; 6], MacAddr::BACKEND.0, 60, 5));
    machine.backend.send_local(packet, machine.now);
    machine.settle();
    let before = machine.held();
    let (guest, raw) = machine.raw();
    let bytes = frame(MacAddr::BACKEND.0, machine.guests[guest].mac(), SIZE.into(), 9);
    raw.data.write_bytes(0, &bytes);
    let counters = [0, 1].map(|guest| machine.status(guest).unwrap().counters);
    machine.take_notices(guest);
    // Of what was flooded.
    machine.take_local();
    Scene { machine, before, guest, raw, bytes, counters }
}

impl Scene {
    fn run(&mut self) {
        self.raw.go();
        self.machine.settle();
    }

    /// Sends one packet, and answers what came of it.
    fn send(&mut self, id: u16) -> Option<Packet<SimHv>> {
        self.raw.push_plain(id, SIZE);
        self.run();
        self.machine.backend.receive_local()
    }

    /// Sends one in two slots, of which the second is of `gref`.
    fn send_two(&mut self, id: u16, gref: GrantRef) -> Option<Packet<SimHv>> {
        let head = self.raw.request(id, 0, SIZE, TxFlags::MORE_DATA);
        self.raw.push(head);
        let rest = self.raw.request(id + 1, 3000, 1000, TxFlags::empty());
        self.raw.push(TxRequest { gref, ..rest });
        self.run();
        self.machine.backend.receive_local()
    }

    fn whole(&self, packet: Option<Packet<SimHv>>) -> Vec<u8> {
        let mut packet = packet.unwrap();
        assert!(packet.make_whole(self.machine.backend.pools()));
        packet.bytes().to_vec()
    }

    fn answers(&mut self) -> Vec<(u16, TxStatus)> {
        let answers = self.raw.responses().into_iter();
        answers.map(|response| (response.id.0, response.status)).collect()
    }

    fn counters(&self) -> Counters {
        self.machine.status(self.guest).unwrap().counters
    }

    /// Pages of the guest's that are mapped, its rings aside.
    fn mapped(&self) -> usize {
        let rings = [self.raw.tx_page.gref(), self.raw.rx_page.gref()];
        let id = self.machine.guests[self.guest].id;
        let ledger = self.machine.held();
        let its = |item: &Item| matches!(item, Item::Mapping { of, gref, .. } if *of == id && !rings.contains(gref));
        ledger.entries().filter(|(_, item)| its(item)).count()
    }

    fn close(&mut self) {
        self.machine.set_state(self.guest, "6");
    }

    /// Nothing of the guest is held, and nobody else has noticed anything.
    fn assert_clean(&mut self) {
        let Self { machine, before, guest, counters, .. } = self;
        machine.assert_unnoticed(&[*guest]);
        for guest in [0, 1] {
            assert_eq!(machine.status(guest).unwrap().counters, counters[guest]);
        }
        machine.assert_let_go(*guest);
        assert_eq!(machine.held().since(before).to_string(), "");
        assert_eq!(machine.mapper.parked(), 0);
        assert_eq!(machine.backend.open(), 0);
        machine.assert_carries(0, 1);
        machine.assert_no_buffer_out();
    }

    /// The next packet is mapped, arrives and is answered; then all is closed.
    fn assert_over(mut self) {
        self.machine.settle();
        self.answers();
        self.raw.data.write_bytes(0, &self.bytes);
        let packet = self.send(999);
        assert_eq!(packet.as_ref().map(Packet::path), Some(Datapath::Map));
        assert!(self.whole(packet) == self.bytes);
        self.machine.settle();
        assert_eq!(self.answers(), [(999, TxStatus::OKAY)]);
        assert_eq!(self.machine.take_notices(self.guest), []);
        self.close();
        self.assert_clean();
    }
}

fn withdraw(machine: &mut Machine, paths: Datapaths) {
    machine.backend.set_withdrawn(&Withdrawal { paths, ..Withdrawal::default() });
    machine.settle();
}

/// What is judged is private; the rest is what is there when it is read.
#[test]
fn hostile_34_map_a_packet_that_changes_while_it_is_mapped() {
    let mut scene = scene();
    let packet = scene.send(0).unwrap();
    assert!(packet.is_lent() && packet.bytes() == &scene.bytes[..HEADER]);
    scene.raw.data.write_bytes(0, &[0xee; 4096]);
    assert!(packet.bytes() == &scene.bytes[..HEADER]);
    let whole = scene.whole(Some(packet));
    assert!(whole[..HEADER] == scene.bytes[..HEADER]);
    assert!(whole.len() == usize::from(SIZE) && whole[HEADER..].iter().all(|byte| *byte == 0xee));
    scene.assert_over();
}

/// A packet that the local port sends on is copied: its pages wait for no other guest, and bytes of other packets go
/// nowhere.
#[test]
fn hostile_41_map_a_mapped_packet_is_sent_on() {
    let mut scene = scene();
    // To guest 0, by way of the local port.
    let dst = scene.machine.guests[0].mac();
    let mut packet = scene.send(0).unwrap();
    assert!(packet.is_lent());
    packet.bytes_mut()[..6].copy_from_slice(&dst);
    packet.bytes_mut()[6..12].copy_from_slice(&MacAddr::BACKEND.0);
    scene.machine.backend.send_local(packet, scene.machine.now);
    scene.machine.settle();
    assert_eq!(scene.mapped(), 0);
    assert_eq!(scene.answers(), [(0, TxStatus::OKAY)]);
    let got = scene.machine.guests[0].take();
    assert!(got.last().unwrap().0[12..] == scene.bytes[12..], "all of its own bytes");
    scene.counters[0] = scene.machine.status(0).unwrap().counters;
    scene.assert_over();
}

#[test]
fn hostile_41_map_pages_are_not_kept_for_a_stack_that_does_not_take_them() {
    let mut scene = scene();
    scene.raw.push_plain(0, SIZE);
    scene.run();
    assert_eq!((scene.mapped(), scene.answers()), (1, vec![]));
    scene.machine.pass(SECOND + 100 * MS);
    assert_eq!((scene.mapped(), scene.answers()), (0, vec![(0, TxStatus::OKAY)]));
    assert_eq!(scene.counters().fallbacks.overdue, 1);
    let packet = scene.machine.backend.receive_local();
    assert!(scene.whole(packet) == scene.bytes);
    scene.assert_over();
}

#[test]
fn hostile_81_no_more_can_be_mapped() {
    let mut scene = scene();
    let mappings = scene.machine.held().mappings().len();
    scene.machine.sim.set_maptrack_limit(DomId(0), mappings as u32 + 1);
    let held = scene.send(0);
    let copied = scene.send(1);
    let path = |packet: &Option<Packet<SimHv>>| packet.as_ref().map(Packet::path);
    assert_eq!((path(&held), path(&copied)), (Some(Datapath::Map), Some(Datapath::Copy)));
    assert_eq!(scene.counters().fallbacks.map_refused, 1);
    assert!(scene.whole(copied) == scene.bytes);
    assert_eq!(scene.answers(), [(1, TxStatus::OKAY)]);
    assert!(scene.whole(held) == scene.bytes);
    scene.machine.settle();
    assert_eq!(scene.answers(), [(0, TxStatus::OKAY)]);
    scene.assert_over();
}

#[test]
fn hostile_82_one_page_of_a_packet_cannot_be_mapped() {
    let mut scene = scene();
    // It cannot be copied, either: the good page is given back, the packet dropped.
    for gref in [GrantRef(400), GrantRef(u32::MAX)] {
        assert!(scene.send_two(0, gref).is_none());
        assert_eq!(scene.mapped(), 0);
        assert_eq!(scene.answers(), [(0, TxStatus::ERROR), (1, TxStatus::ERROR)]);
    }
    assert_eq!(scene.counters().tx_drops.grant, 2);
    // It is Xen that does not map, whichever of the two.
    let gref = scene.raw.data.gref();
    for which in 0..2 {
        for fault in [Fault::Status(GrantStatus::BAD_PAGE), Fault::Untouched] {
            scene.machine.sim.inject(DomId(0), FaultPlan::nth(Kind::Map, which, fault));
            let packet = scene.send_two(0, gref);
            assert_eq!(packet.as_ref().map(Packet::path), Some(Datapath::Copy));
            assert_eq!(scene.mapped(), 0);
            assert!(scene.whole(packet)[..3000] == scene.bytes[..3000]);
            assert_eq!(scene.answers(), [(0, TxStatus::OKAY), (1, TxStatus::OKAY)]);
        }
    }
    assert_eq!(scene.counters().fallbacks.map_refused, 6);
    scene.assert_over();
}

#[test]
fn hostile_83_a_page_cannot_be_unmapped() {
    let mut scene = scene();
    let packet = scene.send(0);
    let plan = FaultPlan::next(Kind::Unmap, Fault::Status(GrantStatus::GENERAL_ERROR));
    scene.machine.sim.inject(DomId(0), plan);
    drop(packet);
    scene.machine.settle();
    let vif = scene.machine.status(scene.guest).unwrap().id;
    let notices = scene.machine.take_notices(scene.guest);
    assert_eq!(notices, [Notice::Faulted(vif, VifFault::Unmap), Notice::Disconnected(vif)]);
    assert_eq!(scene.machine.states(scene.guest).1, State::Closing);
    // It is parked with its window, and only it.
    assert_eq!((scene.machine.mapper.parked(), scene.mapped()), (1, 1));
    assert_eq!(scene.machine.held_of(scene.guest).lines().count(), 1);
    scene.machine.assert_unnoticed(&[scene.guest]);
    scene.machine.pass(2 * SECOND);
    scene.assert_clean();
}

/// The guest closes while its pages are in the hands of the stack.
#[test]
fn hostile_84_pages_that_are_not_given_back() {
    let mut scene = scene();
    let packet = scene.send(0);
    scene.close();
    assert_eq!(scene.machine.states(scene.guest).1, State::Connected, "it is waited for");
    scene.machine.pass(9 * SECOND);
    assert_eq!(scene.machine.states(scene.guest).1, State::Connected);
    assert_eq!(scene.mapped(), 1);
    let deadline = scene.machine.backend.deadline(scene.machine.now);
    assert!(deadline <= scene.machine.now.after(SECOND + MS));
    scene.machine.pass(SECOND + 100 * MS);
    assert_eq!(scene.machine.states(scene.guest).1, State::Closed);
    let vif = scene.machine.status(scene.guest).unwrap().id;
    assert_eq!(scene.machine.take_notices(scene.guest), [Notice::Disconnected(vif)]);
    // Nothing but that page is held, and it can still be read.
    assert_eq!((scene.mapped(), scene.machine.held_of(scene.guest).lines().count()), (1, 1));
    // The next life of the vif has nothing to do with it.
    let raw = Raw::new(&scene.machine.guests[scene.guest], 0);
    scene.machine.set_state(scene.guest, "1");
    scene.machine.offer(scene.guest, &raw.keys(), "4");
    assert!(scene.machine.is_connected(scene.guest));
    assert!(scene.whole(packet) == scene.bytes);
    scene.machine.settle();
    assert!(scene.machine.is_connected(scene.guest));
    assert_eq!(scene.mapped(), 2, "the rings of the new life");
    scene.raw = raw;
    scene.raw.data.write_bytes(0, &scene.bytes);
    scene.machine.take_notices(scene.guest);
    scene.assert_over();
}

/// What waits at the local port is not in anybody's hands: it is copied, and the guest may go at once.
#[test]
fn hostile_84_packets_that_nobody_has_taken_are_copied() {
    let mut scene = scene();
    for id in 0..5 {
        scene.raw.push_plain(id, SIZE);
    }
    scene.run();
    assert_eq!(scene.mapped(), 5);
    scene.close();
    assert_eq!(scene.machine.states(scene.guest).1, State::Closed);
    assert_eq!(scene.machine.held_of(scene.guest), "");
    let got = scene.machine.take_local();
    assert!(got.len() == 5 && got.iter().all(|bytes| *bytes == scene.bytes));
    scene.assert_clean();
}

#[test]
fn hostile_85_the_domain_is_destroyed_with_pages_mapped() {
    for gives_back_in_time in [true, false] {
        let mut scene = scene();
        let packet = scene.send(0);
        let id = scene.machine.guests[scene.guest].id;
        scene.machine.destroy(scene.guest);
        assert!(scene.machine.sim.domains().contains(&id), "its pages are mapped");
        if !gives_back_in_time {
            scene.machine.pass(11 * SECOND);
            assert!(scene.machine.status(scene.guest).is_none());
            assert_eq!(scene.machine.held_of(scene.guest).lines().count(), 1);
            // Its place goes to another, who is not taken for it.
            let next = scene.machine.plain_guest();
            scene.machine.assert_carries(0, next);
            assert!(scene.whole(packet) == scene.bytes);
            scene.machine.settle();
            scene.machine.assert_carries(0, next);
            assert_eq!(scene.machine.status(next).unwrap().counters.tx_paths.total().unmaps, 0);
            scene.machine.destroy(next);
            scene.counters = [0, 1].map(|guest| scene.machine.status(guest).unwrap().counters);
            scene.machine.take_notices(next);
        } else {
            drop(packet);
            scene.machine.settle();
        }
        assert!(scene.machine.status(scene.guest).is_none());
        assert!(!scene.machine.sim.domains().contains(&id), "it lingers as a zombie");
        scene.assert_clean();
    }
}

#[test]
fn hostile_86_withdrawn_with_pages_mapped() {
    let mut scene = scene();
    let mut sent = 0;
    let mut got = Vec::new();
    for round in 0..6 {
        // By turns it may be used, and not.
        let paths = if round % 2 == 1 { Datapaths::MAP } else { Datapaths::empty() };
        withdraw(&mut scene.machine, paths);
        scene.machine.pass(200 * MS);
        // That it is back shows with the second packet, as the first was copied whole from the beginning.
        drop(scene.send(999));
        scene.machine.settle();
        assert_eq!(scene.answers(), [(999, TxStatus::OKAY)]);
        for _ in 0..3 {
            scene.bytes[HEADER] = sent;
            // A page of its own, as the earlier ones are still looked at.
            let page = scene.machine.guests[scene.guest].page(true);
            page.write_bytes(0, &scene.bytes);
            scene.raw.push(TxRequest {
                gref: page.gref(),
                ..scene.raw.request(sent.into(), 0, SIZE, TxFlags::empty())
            });
            scene.run();
            let packet = scene.machine.backend.receive_local().unwrap();
            let expected = if round % 2 == 1 { Datapath::Copy } else { Datapath::Map };
            assert_eq!(packet.path(), expected);
            let answered =
                if round % 2 == 1 { vec![(sent.into(), TxStatus::OKAY)] } else { vec![] };
            assert_eq!(scene.answers(), answered);
            got.push((page, packet));
            sent += 1;
        }
    }
    assert_eq!(scene.mapped(), 9);
    withdraw(&mut scene.machine, Datapaths::MAP);
    for (number, (page, packet)) in (0..).zip(got) {
        let bytes = scene.whole(Some(packet));
        assert!(bytes[HEADER] == number && bytes[..HEADER] == scene.bytes[..HEADER], "in order");
        scene.machine.settle();
        drop(page);
    }
    let mapped: Vec<_> =
        (0..18).filter(|id| id / 3 % 2 == 0).map(|id| (id, TxStatus::OKAY)).collect();
    assert_eq!(scene.answers(), mapped, "each is answered once");
    let paths = scene.counters().tx_paths;
    assert_eq!(paths.of(Datapath::Map).maps, paths.of(Datapath::Map).unmaps);
    assert_eq!(paths.total().packets, 18 + 6);
    assert_eq!(scene.mapped(), 0);
    withdraw(&mut scene.machine, Datapaths::empty());
    scene.machine.pass(200 * MS);
    drop(scene.send(999));
    scene.assert_over();
}

/// What comes and goes all the time is not taken up again.
#[test]
fn hostile_87_restored_and_withdrawn_again_and_again() {
    let mut scene = scene();
    let switches = scene.machine.backend.switches();
    for flip in 0..400 {
        let paths = if flip % 2 == 0 { Datapaths::MAP } else { Datapaths::empty() };
        withdraw(&mut scene.machine, paths);
        scene.machine.pass(5 * MS);
        if flip % 10 == 0 {
            let packet = scene.send(flip);
            assert_eq!(packet.as_ref().map(Packet::path), Some(Datapath::Copy));
            assert_eq!(scene.answers(), [(flip, TxStatus::OKAY)]);
        }
    }
    assert_eq!(scene.machine.backend.switches(), switches + 1);
    let now = scene.machine.now;
    assert!(scene.machine.backend.deadline(now) <= now.after(100 * MS), "it looks again by itself");
    scene.machine.pass(90 * MS);
    assert!(!scene.machine.backend.datapaths().local.contains(Datapaths::MAP));
    scene.machine.pass(10 * MS);
    assert!(scene.machine.backend.datapaths().local.contains(Datapaths::MAP));
    assert_eq!(scene.machine.backend.switches(), switches + 2);
    drop(scene.send(999));
    scene.assert_over();
}

fn without_copies() -> Machine {
    let facts = Facts { grant_copy: false, ..facts() };
    Machine::with(netback::Config { facts, ..common::config() })
}

#[test]
fn hostile_88_there_is_no_operation_to_copy() {
    let mut machine = without_copies();
    machine.plain_guest();
    machine.plain_guest();
    machine.assert_carries(0, 1);
    let before = machine.held();
    let (guest, mut raw) = machine.raw();
    let bytes = frame(machine.guests[0].mac(), machine.guests[guest].mac(), 3000, 4);
    raw.data.write_bytes(0, &bytes);
    let bad = TxRequest { gref: GrantRef(400), ..raw.request(1, 0, 3000, TxFlags::empty()) };
    raw.push_plain(0, 3000);
    raw.push(bad);
    raw.push_plain(2, 3000);
    raw.go();
    machine.settle();
    let got = machine.guests[0].take();
    assert!(got.len() == 2 && got.iter().all(|(got, _)| *got == bytes));
    let mut statuses: Vec<_> = raw.responses().iter().map(|got| (got.id.0, got.status)).collect();
    statuses.sort_by_key(|(id, _)| *id);
    let (ok, bad) = (TxStatus::OKAY, TxStatus::ERROR);
    assert_eq!(statuses, [(0, ok), (1, bad), (2, ok)]);
    assert_eq!(machine.hv.hypercalls().calls(Kind::Copy), 0);
    assert!(!machine.backend.datapaths().local.contains(Datapaths::DIRECT));
    machine.take_notices(guest);
    machine.assert_unnoticed(&[guest]);
    machine.set_state(guest, "6");
    machine.assert_let_go(guest);
    assert_eq!(machine.held().since(&before).to_string(), "");
    machine.assert_carries(0, 1);
    machine.assert_no_buffer_out();
}

#[test]
fn hostile_88_nor_one_to_map() {
    let mut machine = without_copies();
    machine.plain_guest();
    machine.plain_guest();
    let bits = machine.backend.features().snapshot().bits().bits();
    machine.sim.set_features(DomId(0), bits & !(1 << 2));
    let guest = machine.bare_guest();
    let raw = Raw::new(&machine.guests[guest], 0);
    machine.offer(guest, &raw.keys(), "4");
    let notices = machine.take_notices(guest);
    assert!(matches!(notices.last(), Some(Notice::Refused(_, Refusal::NoDatapath))), "{notices:?}");
    assert_eq!(machine.states(guest).1, State::Closing);
    machine.assert_let_go(guest);
    machine.assert_unnoticed(&[guest]);
    machine.assert_carries(0, 1);
}

//! Which way packets go, and that they arrive whichever it is.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::{MS, Machine, SECOND, frame};
use netback::datapath::{Datapath, Datapaths, Policy, Withdrawal};
use netback::{Packet, VifStatus};
use netfront::Config;
use netif::mac::MacAddr;
use sim::{Item, Kind, SimHv};

const BROADCAST: [u8; 6] = [0xff; 6];
/// Large enough for every way there is.
const LARGE: usize = 20_000;

/// Two guests that the switch knows.
fn machine() -> Machine {
    acquainted(common::config())
}

fn acquainted(config: netback::Config) -> Machine {
    let mut machine = Machine::with(config);
    for guest in 0..2 {
        // Static pages would go before all else.
        machine.guest(Config { static_grants: false, ..Config::new(hypercall::Handle(0)) });
        let hello = frame(BROADCAST, machine.guests[guest].mac(), 60, 0);
        machine.guests[guest].send(&hello);
        machine.settle();
    }
    // The local port's address is known once it has sent.
    local_send(&mut machine, BROADCAST, 60);
    machine.settle();
    for guest in &mut machine.guests {
        guest.take();
    }
    machine.assert_no_buffer_out();
    machine
}

fn local_send(machine: &mut Machine, dst: [u8; 6], len: usize) {
    let bytes = frame(dst, MacAddr::BACKEND.0, len, 5);
    let mut packet = machine.backend.packet(len, machine.now).unwrap();
    packet.bytes_mut().copy_from_slice(&bytes);
    machine.backend.send_local(packet, machine.now);
}

fn status(machine: &Machine, guest: usize) -> VifStatus {
    machine.status(guest).unwrap()
}

/// Packets from a guest by a way.
fn sent(machine: &Machine, guest: usize, path: Datapath) -> u64 {
    status(machine, guest).counters.tx_paths.of(path).packets
}

fn withdraw(machine: &mut Machine, paths: Datapaths) {
    machine.backend.set_withdrawn(&Withdrawal { paths, ..Withdrawal::default() });
}

/// Sends one packet and answers what came out at the local port, still as it was carried.
fn to_local(machine: &mut Machine, len: usize) -> (Vec<u8>, Packet<SimHv>) {
    let bytes = frame(MacAddr::BACKEND.0, machine.guests[0].mac(), len, 7);
    machine.guests[0].send(&bytes);
    machine.settle();
    (bytes, machine.backend.receive_local().unwrap())
}

fn mappings(machine: &Machine) -> usize {
    let ledger = machine.sim.ledger();
    ledger.entries().filter(|(_, item)| matches!(item, Item::Mapping { .. })).count()
}

#[test]
fn a_large_packet_goes_from_guest_to_guest_and_only_its_headers_through_ours() {
    let mut machine = machine();
    let (from, to) = (machine.guests[0].mac(), machine.guests[1].mac());
    let before = machine.hv.hypercalls();
    let bytes = frame(to, from, LARGE, 3);
    machine.guests[0].send(&bytes);
    machine.settle();
    assert!(machine.guests[1].take().remove(0).0 == bytes);
    let calls = machine.hv.hypercalls() - before;
    assert_eq!(sent(&machine, 0, Datapath::Direct), 1);
    // The headers come and go, the rest is copied once.
    assert_eq!(calls.bytes_copied(), (LARGE + 128) as u64);
    assert_eq!(calls.calls(Kind::Copy), 2);
    assert_eq!(calls.calls(Kind::Map), 0);
    assert_eq!(machine.backend.open(), 0);
    machine.assert_no_buffer_out();
}

#[test]
fn small_packets_and_withdrawn_ways_are_copied() {
    let mut machine = machine();
    let (from, to) = (machine.guests[0].mac(), machine.guests[1].mac());
    machine.guests[0].send(&frame(to, from, 500, 3));
    machine.settle();
    assert_eq!(sent(&machine, 0, Datapath::Direct), 0);
    withdraw(&mut machine, Datapaths::DIRECT);
    machine.guests[0].send(&frame(to, from, LARGE, 4));
    machine.settle();
    assert_eq!(sent(&machine, 0, Datapath::Direct), 0);
    assert_eq!(status(&machine, 0).counters.fallbacks.withdrawn, 1);
    assert!(machine.guests[1].take()[1].0 == frame(to, from, LARGE, 4));
    // It comes back after a while, and not at once.
    withdraw(&mut machine, Datapaths::empty());
    machine.guests[0].send(&frame(to, from, LARGE, 5));
    machine.settle();
    assert_eq!(sent(&machine, 0, Datapath::Direct), 0);
    machine.pass(200 * MS);
    // The first is still copied whole, as those before it had to be: it shows that the next need not.
    for seed in [6, 7] {
        machine.guests[0].send(&frame(to, from, LARGE, seed));
        machine.settle();
    }
    assert_eq!(sent(&machine, 0, Datapath::Direct), 1);
    assert_eq!(machine.backend.switches(), 2);
}

#[test]
fn what_is_flooded_or_finds_no_pages_is_copied_and_order_is_kept() {
    let mut machine = machine();
    let (from, to) = (machine.guests[0].mac(), machine.guests[1].mac());
    // Packets of all sizes, more than the receiver has pages for at a time.
    let mut expected = Vec::new();
    for round in 0..60_u8 {
        machine.guests[1].receives = round % 15 == 0;
        machine.settle();
        for step in 0..5_usize {
            let len = [60, LARGE, 1500, 60_000, 900][(step + usize::from(round)) % 5];
            let bytes = frame(to, from, len, round.wrapping_mul(5).wrapping_add(step as u8));
            if machine.guests[0].frontend().send(0, &bytes, netfront::Meta::default()).is_ok() {
                expected.push(bytes);
            }
        }
    }
    machine.guests[1].receives = true;
    machine.settle();
    let got: Vec<_> = machine.guests[1].take().into_iter().map(|(bytes, _)| bytes).collect();
    assert_eq!(got.len(), expected.len());
    assert!(got == expected);
    let counters = status(&machine, 0).counters;
    assert!(counters.fallbacks.not_ready > 0, "{counters:?}");
    assert!(counters.tx_paths.of(Datapath::Direct).packets > 0);
    assert_eq!(machine.backend.open(), 0);
    machine.guests[0].send(&frame([0x33; 6], from, LARGE, 9));
    machine.settle();
    assert_eq!(status(&machine, 0).counters.fallbacks.many, 1);
    machine.assert_no_buffer_out();
}

#[test]
fn a_packet_for_the_local_port_is_mapped_and_answered_when_it_is_given_back() {
    let mut machine = machine();
    let before = (machine.sim.ledger(), machine.hv.hypercalls());
    let (bytes, mut packet) = to_local(&mut machine, LARGE);
    assert_eq!(packet.path(), Datapath::Map);
    assert!(packet.is_lent() && packet.bytes() == &bytes[..128]);
    assert_eq!(packet.len(), LARGE);
    // 20,000 bytes begin in the first page and lie in five.
    assert_eq!(mappings(&machine), before.0.mappings().len() - foreign(&before.0) + 5);
    assert_eq!(machine.backend.open(), 1);
    assert!(packet.make_whole(machine.backend.pools()));
    assert!(packet.bytes() == bytes);
    drop(packet);
    machine.settle();
    let calls = machine.hv.hypercalls() - before.1;
    assert_eq!((calls.calls(Kind::Map), calls.ops(Kind::Map)), (1, 5));
    assert_eq!((calls.calls(Kind::Unmap), calls.ops(Kind::Unmap)), (1, 5));
    assert_eq!(machine.sim.ledger().since(&before.0).came.mappings().len(), 0);
    assert_eq!(machine.backend.open(), 0);
}

fn foreign(ledger: &sim::Ledger) -> usize {
    ledger.entries().filter(|(_, item)| matches!(item, Item::Foreign { .. })).count()
}

#[test]
fn what_waits_too_long_at_the_local_port_is_copied_and_given_back() {
    let mut machine = machine();
    let bytes = frame(MacAddr::BACKEND.0, machine.guests[0].mac(), LARGE, 7);
    let before = machine.sim.ledger();
    machine.guests[0].send(&bytes);
    machine.settle();
    assert_eq!(machine.backend.open(), 1);
    machine.pass(2 * SECOND);
    assert_eq!(machine.backend.open(), 0);
    assert_eq!(machine.sim.ledger().since(&before).came.mappings().len(), 0);
    assert_eq!(status(&machine, 0).counters.fallbacks.overdue, 1);
    let packet = machine.backend.receive_local().unwrap();
    assert!(!packet.is_lent() && packet.bytes() == bytes);
}

#[test]
fn a_way_that_is_withdrawn_ends_as_it_began_and_new_packets_take_another() {
    let mut machine = machine();
    let (first, packet) = to_local(&mut machine, LARGE);
    withdraw(&mut machine, Datapaths::MAP);
    let (second, copied) = to_local(&mut machine, LARGE);
    assert_eq!((packet.path(), copied.path()), (Datapath::Map, Datapath::Copy));
    assert!(copied.bytes() == second);
    let mut packet = packet;
    assert!(packet.make_whole(machine.backend.pools()) && packet.bytes() == first);
    machine.settle();
    assert_eq!(machine.backend.open(), 0);
}

#[test]
fn without_the_translation_bit_nothing_is_mapped() {
    let mut machine = machine();
    let bits = 0x2_6805;
    machine.sim.set_features(hypercall::DomId(0), bits & !(1 << 2));
    // Nobody says so: it is read again when the domain resumes, or connects a frontend.
    let (_, packet) = to_local(&mut machine, LARGE);
    assert_eq!(packet.path(), Datapath::Map);
    drop(packet);
    machine.backend.refresh_features().unwrap();
    let (_, packet) = to_local(&mut machine, LARGE);
    assert_eq!(packet.path(), Datapath::Copy);
    machine.sim.set_features(hypercall::DomId(0), bits);
    machine.backend.refresh_features().unwrap();
    machine.settle();
    machine.pass(200 * MS);
    drop(to_local(&mut machine, LARGE));
    let (_, packet) = to_local(&mut machine, LARGE);
    assert_eq!(packet.path(), Datapath::Map);
}

#[test]
fn by_default_what_fits_in_a_page_is_copied() {
    let mut machine = acquainted(netback::Config { policy: Policy::default(), ..common::config() });
    let (from, to) = (machine.guests[0].mac(), machine.guests[1].mac());
    for (len, path) in [(1514, Datapath::Copy), (4095, Datapath::Copy), (4096, Datapath::Direct)] {
        let before = sent(&machine, 0, path);
        let bytes = frame(to, from, len, 1);
        machine.guests[0].send(&bytes);
        machine.settle();
        assert!(machine.guests[1].take().remove(0).0 == bytes);
        assert_eq!(sent(&machine, 0, path), before + 1, "{len}");
    }
    let mapped = to_local(&mut machine, 4096).1.path();
    assert_eq!((to_local(&mut machine, 4095).1.path(), mapped), (Datapath::Copy, Datapath::Map));
}

#[test]
fn a_packet_whose_checksum_is_left_to_the_receiver_goes_direct() {
    let mut machine = machine();
    let (from, to) = (machine.guests[0].mac(), machine.guests[1].mac());
    // UDP over IPv4, 1,400 bytes behind the Ethernet header.
    let mut bytes = frame(to, from, 1414, 9);
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14..34]
        .copy_from_slice(&[0x45, 0, 5, 0x78, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes[34..42].copy_from_slice(&[0, 7, 0, 7, 5, 0x64, 0, 0]);
    let meta = netfront::Meta { checksum: netif::offload::Checksum::Blank, gso: None };
    machine.guests[0].frontend().send(0, &bytes, meta).unwrap();
    machine.settle();
    assert!(machine.guests[1].take() == [(bytes, meta)]);
    assert_eq!(sent(&machine, 0, Datapath::Direct), 1);
    assert_eq!(status(&machine, 0).counters.fallbacks.changed, 0);
}

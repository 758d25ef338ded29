//! The switch's own two ports, the backend domain's stack and its network card: what gets there, how, and what nobody else can do
//! about it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::{MS, Machine, SECOND, config, facts, frame};
use features::XenFeatures;
use hypercall::{DomId, Handle};
use netback::Packet;
use netback::datapath::{Datapath, Datapaths, Facts, Nic, Policy, Withdrawal};
use netback::dma::{self, Maintenance};
use netfront::Config;
use netif::mac::MacAddr;
use sim::{DmaConfig, DmaCounts, DmaDevice, DomainConfig, SimHv};

const BROADCAST: [u8; 6] = [0xff; 6];
/// Of somebody behind the card.
const GATEWAY: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
/// Large enough to be mapped.
const LARGE: usize = 20_000;

/// A backend with a card that sees no caches.
fn with_card() -> netback::Config {
    let facts = Facts { uplink: Some(Nic { coherent: false }), ..facts() };
    netback::Config { facts, ..config() }
}

/// Guests that the switch knows, as it knows the local stack and somebody behind the card.
fn acquainted(mut machine: Machine, guests: usize) -> Machine {
    for guest in 0..guests {
        // Static pages would go before all else.
        machine.guest(Config { static_grants: false, ..Config::new(Handle(0)) });
        let hello = frame(BROADCAST, machine.guests[guest].mac(), 60, 0);
        machine.guests[guest].send(&hello);
        machine.settle();
    }
    local_send(&mut machine, &frame(BROADCAST, MacAddr::BACKEND.0, 60, 1));
    uplink_send(&mut machine, &frame(BROADCAST, GATEWAY, 60, 2));
    forget(&mut machine);
    machine
}

fn machine(guests: usize) -> Machine {
    acquainted(Machine::with(with_card()), guests)
}

/// Nobody has anything in hand any more.
fn forget(machine: &mut Machine) {
    machine.settle();
    for guest in &mut machine.guests {
        guest.take();
    }
    take_uplink(machine);
    machine.assert_no_buffer_out();
}

fn packet(machine: &Machine, bytes: &[u8]) -> Packet<SimHv> {
    let mut packet = machine.backend.packet(bytes.len(), machine.now).unwrap();
    packet.bytes_mut().copy_from_slice(bytes);
    packet
}

fn local_send(machine: &mut Machine, bytes: &[u8]) {
    let packet = packet(machine, bytes);
    machine.backend.send_local(packet, machine.now);
    machine.settle();
}

fn uplink_send(machine: &mut Machine, bytes: &[u8]) {
    let packet = packet(machine, bytes);
    machine.backend.send_uplink(packet, machine.now);
    machine.settle();
}

fn guest_send(machine: &mut Machine, guest: usize, bytes: &[u8]) {
    machine.guests[guest].send(bytes);
    machine.settle();
}

/// What waits for the card.
fn take_uplink(machine: &mut Machine) -> Vec<Vec<u8>> {
    let packets: Vec<_> = std::iter::from_fn(|| machine.backend.receive_uplink()).collect();
    let whole = |packet: Packet<SimHv>| {
        let mut bytes = vec![0; packet.len()];
        assert!(packet.read(0, &mut bytes));
        bytes
    };
    let bytes = packets.into_iter().map(whole).collect();
    machine.settle();
    bytes
}

/// Sends a large packet to the gateway and takes it out at the uplink.
fn to_gateway(machine: &mut Machine, guest: usize) -> (Vec<u8>, Packet<SimHv>) {
    let bytes = frame(GATEWAY, machine.guests[guest].mac(), LARGE, 7);
    guest_send(machine, guest, &bytes);
    (bytes, machine.backend.receive_uplink().unwrap())
}

/// What a card sends of a packet, reading by itself; its driver does what it was told to do first.
fn sent_by_card(machine: &Machine, device: &DmaDevice, packet: &Packet<SimHv>) -> Vec<u8> {
    let own = packet.dma_own(machine.backend.own_rule().unwrap());
    let lent = packet.dma(machine.backend.dma_rule().unwrap());
    let pieces: Vec<_> = own.chain(lent).collect::<Option<_>>().unwrap();
    dma::clean(&machine.hv, pieces.iter().copied()).unwrap();
    let mut bytes = Vec::new();
    for piece in pieces {
        if matches!(piece.maintenance, Maintenance::Own | Maintenance::Identity) {
            assert!(machine.hv.clean_cache(piece.address.bus().0, piece.len.into()));
        }
        let mut part = vec![0; piece.len.into()];
        assert!(device.read(piece.address.bus(), &mut part));
        bytes.extend(part);
    }
    bytes
}

#[test]
fn what_is_for_everybody_goes_to_the_stack_and_to_the_card_and_each_has_its_own() {
    let mut machine = machine(2);
    let unknown = [2, 0, 0, 0, 0, 9];
    for dst in [BROADCAST, unknown, [0x33, 0x33, 0, 0, 0, 1]] {
        let sent = frame(dst, machine.guests[0].mac(), 5000, 3);
        machine.guests[0].send(&sent);
        machine.settle();
        assert!(machine.guests[1].take().remove(0).0 == sent);
        assert!(machine.guests[0].take().is_empty(), "not back to where it came from");
        // Neither waits for the other with the guest's pages.
        assert_eq!(machine.backend.open(), 0);
        let mut first = machine.backend.receive_local().unwrap();
        let second = machine.backend.receive_uplink().unwrap();
        assert!(!first.is_lent() && !second.is_lent());
        first.bytes_mut()[100] ^= 1;
        assert!(second.bytes() == sent, "it is not the same memory");
        drop((first, second));

        let from_card = frame(dst, GATEWAY, 1000, 4);
        uplink_send(&mut machine, &from_card);
        assert!(
            machine.take_local() == [from_card.clone()] && take_uplink(&mut machine).is_empty()
        );
        let from_stack = frame(dst, MacAddr::BACKEND.0, 1000, 5);
        local_send(&mut machine, &from_stack);
        assert!(take_uplink(&mut machine) == [from_stack.clone()]);
        assert!(machine.take_local().is_empty());
        for guest in &mut machine.guests {
            let got: Vec<_> = guest.take().into_iter().map(|(bytes, _)| bytes).collect();
            assert!(got == [from_card.clone(), from_stack.clone()]);
        }
    }
    // What has one address goes to one port.
    let to_card = frame(GATEWAY, machine.guests[0].mac(), 100, 6);
    guest_send(&mut machine, 0, &to_card);
    assert!(take_uplink(&mut machine) == [to_card]);
    let to_guest = frame(machine.guests[0].mac(), GATEWAY, 9000, 6);
    uplink_send(&mut machine, &to_guest);
    assert!(machine.guests[0].take().remove(0).0 == to_guest);
    let to_stack = frame(MacAddr::BACKEND.0, GATEWAY, 100, 7);
    uplink_send(&mut machine, &to_stack);
    assert!(machine.take_local() == [to_stack]);
    // Those behind the card need no help of ours to talk to each other.
    let hairpins = machine.backend.switch_counters().hairpin;
    uplink_send(&mut machine, &frame(GATEWAY, [0x52, 0, 0, 0, 0, 1], 100, 8));
    assert_eq!(machine.backend.switch_counters().hairpin, hairpins + 1);
    assert!(machine.guests[1].take().is_empty() && take_uplink(&mut machine).is_empty());
    machine.assert_no_buffer_out();
}

#[test]
fn without_a_card_nothing_waits_for_one() {
    let mut machine = acquainted(Machine::new(), 1);
    let mac = machine.guests[0].mac();
    guest_send(&mut machine, 0, &frame(BROADCAST, mac, 100, 3));
    assert!(machine.backend.receive_uplink().is_none());
    assert!(machine.backend.datapaths().uplink.is_empty());
    assert_eq!((machine.backend.dma_rule(), machine.backend.own_rule()), (None, None));
    machine.assert_no_buffer_out();
}

#[test]
fn a_card_finds_all_bytes_of_a_packet_ours_and_the_guests() {
    let mut machine = machine(1);
    let device = DmaDevice::new(&machine.sim, DomId(0), DmaConfig::BARE);
    let (bytes, packet) = to_gateway(&mut machine, 0);
    assert_eq!(packet.path(), Datapath::Map);
    assert!(sent_by_card(&machine, &device, &packet) == bytes);
    drop(packet);
    machine.settle();
    assert_eq!(machine.backend.open(), 0);
    // All of it in memory of ours, over several pages.
    let paths = Datapaths::MAP;
    machine.backend.set_withdrawn(&Withdrawal { paths, ..Withdrawal::default() });
    let (bytes, packet) = to_gateway(&mut machine, 0);
    assert_eq!(packet.path(), Datapath::Copy);
    let own: Vec<_> = packet.dma_own(machine.backend.own_rule().unwrap()).flatten().collect();
    let lens: Vec<_> = own.iter().map(|piece| piece.len).collect();
    assert_eq!(lens, [4096, 4096, 4096, 4096, 3616]);
    assert!(own.iter().all(|piece| piece.maintenance == Maintenance::Own));
    assert!(sent_by_card(&machine, &device, &packet) == bytes);
    let counts = device.counts();
    assert_eq!(counts, DmaCounts { reads: counts.reads, ..DmaCounts::default() });
    assert_eq!(machine.sim.violations(), Vec::<String>::new());
}

#[test]
fn a_part_of_a_piece_is_within_it() {
    let mut machine = machine(1);
    let (_, packet) = to_gateway(&mut machine, 0);
    let piece = packet.dma(machine.backend.dma_rule().unwrap()).flatten().next().unwrap();
    let part = piece.part(10, 20).unwrap();
    assert_eq!((part.address.bus().0, part.len), (piece.address.bus().0 + 10, 20));
    assert_eq!(part.maintenance, piece.maintenance);
    assert_eq!(piece.part(0, piece.len), Some(piece));
    assert!(piece.part(piece.len, 0).is_some() && piece.part(piece.len, 1).is_none());
    assert!(piece.part(1, piece.len).is_none() && piece.part(u16::MAX, u16::MAX).is_none());
}

#[test]
fn bytes_are_read_wherever_they_are_and_no_further() {
    let mut machine = machine(1);
    let (bytes, packet) = to_gateway(&mut machine, 0);
    assert!(packet.is_lent());
    for (at, len) in [(0, LARGE), (0, 128), (100, 100), (128, 1), (5000, 9000), (LARGE, 0)] {
        let mut to = vec![0; len];
        assert!(packet.read(at, &mut to) && to == bytes[at..at + len], "{len} from {at}");
    }
    for (at, len) in [(0, LARGE + 1), (LARGE, 1), (LARGE + 1, 1), (usize::MAX, 1)] {
        assert!(!packet.read(at, &mut vec![0; len]), "{len} from {at}");
    }
}

/// An Arm board where only the identity mapping lets a card see what was mapped.
fn board_of_2014() -> Machine {
    let dom0 = DomainConfig::dom0();
    let features = dom0.features | XenFeatures::GRANT_MAP_IDENTITY.bits();
    let domain = DomainConfig { cache_flush: false, features, ..dom0 };
    let config = with_card();
    let facts = Facts { cache_flush: false, ..config.facts };
    acquainted(Machine::in_domain(domain, netback::Config { facts, ..config }), 1)
}

#[test]
fn the_card_has_a_way_of_its_own_where_the_stack_needs_none() {
    let mut machine = board_of_2014();
    let device = DmaDevice::new(&machine.sim, DomId(0), DmaConfig::BARE);
    // Both at once: one hypercall maps for both.
    let from = machine.guests[0].mac();
    let (to_stack, to_card) =
        (frame(MacAddr::BACKEND.0, from, LARGE, 1), frame(GATEWAY, from, LARGE, 2));
    machine.guests[0].send(&to_stack);
    machine.guests[0].send(&to_card);
    machine.settle();
    let (stack, card) =
        (machine.backend.receive_local().unwrap(), machine.backend.receive_uplink().unwrap());
    assert_eq!((stack.path(), card.path()), (Datapath::Map, Datapath::MapIdentity));
    assert!(sent_by_card(&machine, &device, &card) == to_card);
    // What was mapped without the alias has no address for the card.
    let rule = machine.backend.dma_rule().unwrap();
    assert!(stack.dma(rule).all(|piece| piece.is_none()));
    drop((stack, card));
    machine.settle();
    // The card's way goes, and comes back when it has stayed; the stack's is not touched.
    let identity = XenFeatures::GRANT_MAP_IDENTITY;
    machine.backend.set_withdrawn(&Withdrawal { bits: identity, ..Withdrawal::default() });
    assert_eq!(to_gateway(&mut machine, 0).1.path(), Datapath::Copy);
    assert!(machine.backend.datapaths().local.contains(Datapaths::MAP));
    // After one that was wanted whole the next is thought to be, too.
    guest_send(&mut machine, 0, &to_stack);
    machine.take_local();
    guest_send(&mut machine, 0, &to_stack);
    assert_eq!(machine.backend.receive_local().unwrap().path(), Datapath::Map);
    machine.backend.set_withdrawn(&Withdrawal::default());
    assert_eq!(to_gateway(&mut machine, 0).1.path(), Datapath::Copy);
    machine.pass(200 * MS);
    // As above.
    to_gateway(&mut machine, 0);
    assert_eq!(to_gateway(&mut machine, 0).1.path(), Datapath::MapIdentity);
    machine.assert_no_buffer_out();
}

#[test]
fn hostile_a_guest_that_takes_a_station_of_the_uplinks_has_it_until_it_is_heard_again() {
    let mut machine = machine(2);
    let mac = machine.guests[0].mac();
    let to_gateway = frame(GATEWAY, mac, 100, 1);
    // As on any switch that learns.
    guest_send(&mut machine, 1, &frame(BROADCAST, GATEWAY, 60, 1));
    forget(&mut machine);
    guest_send(&mut machine, 0, &to_gateway);
    assert!(machine.guests[1].take().remove(0).0 == to_gateway);
    assert!(take_uplink(&mut machine).is_empty());
    uplink_send(&mut machine, &frame(mac, GATEWAY, 60, 2));
    machine.guests[0].take();
    guest_send(&mut machine, 0, &to_gateway);
    assert!(take_uplink(&mut machine) == [to_gateway]);
    assert!(machine.guests[1].take().is_empty());
}

#[test]
fn hostile_nobody_takes_what_was_heard_of_the_stack_not_even_when_it_has_long_been_silent() {
    let mut machine = machine(1);
    let stack = [2, 0, 0, 0, 0, 7];
    local_send(&mut machine, &frame(BROADCAST, stack, 60, 1));
    forget(&mut machine);
    for wait in [0, 400 * SECOND] {
        machine.now = machine.now.after(wait);
        for own in [stack, MacAddr::BACKEND.0] {
            let spoofed = machine.status(0).unwrap().counters.tx_drops.spoofed;
            guest_send(&mut machine, 0, &frame(BROADCAST, own, 60, 2));
            assert_eq!(machine.status(0).unwrap().counters.tx_drops.spoofed, spoofed + 1);
            let spoofed = machine.backend.switch_counters().uplink_spoofed;
            uplink_send(&mut machine, &frame(BROADCAST, own, 60, 2));
            assert_eq!(machine.backend.switch_counters().uplink_spoofed, spoofed + 1);
            assert!(machine.take_local().is_empty() && take_uplink(&mut machine).is_empty());
            let to_stack = frame(own, machine.guests[0].mac(), 100, 3);
            guest_send(&mut machine, 0, &to_stack);
            assert!(machine.take_local() == [to_stack]);
            assert!(take_uplink(&mut machine).is_empty());
        }
    }
}

#[test]
fn hostile_a_guest_that_floods_the_card_leaves_room_for_others() {
    let mut config = with_card();
    config.small_buffers = std::num::NonZeroUsize::new(4096).unwrap();
    let mut machine = acquainted(Machine::with(config), 2);
    let [flooder, other] = [0, 1].map(|guest| machine.guests[guest].mac());
    let flood = frame(GATEWAY, flooder, 200, 1);
    for _ in 0..40 {
        for _ in 0..50 {
            machine.guests[0].send(&flood);
        }
        machine.settle();
    }
    assert_eq!(machine.backend.pools().all().out(), 256, "half of what may wait");
    let full = machine.backend.switch_counters().uplink_full;
    assert_eq!(full, 2000 - 256);
    // Others get through to the card, and to each other.
    let (from_guest, from_stack) =
        (frame(GATEWAY, other, 200, 2), frame(GATEWAY, MacAddr::BACKEND.0, 200, 3));
    guest_send(&mut machine, 1, &from_guest);
    local_send(&mut machine, &from_stack);
    machine.assert_carries(0, 1);
    assert_eq!(machine.backend.switch_counters().uplink_full, full);
    let got = take_uplink(&mut machine);
    assert_eq!(got.len(), 258);
    assert!(got.contains(&from_guest) && got.contains(&from_stack));
    // And the stack is not the card's to wait for.
    assert_eq!(machine.backend.switch_counters().local_full, 0);
    guest_send(&mut machine, 0, &flood);
    assert!(take_uplink(&mut machine) == [flood]);
    machine.assert_no_buffer_out();
}

#[test]
fn hostile_what_waits_for_a_card_leaves_buffers_to_those_who_need_none() {
    let mut config = with_card();
    // Fewer than may wait.
    config.small_buffers = std::num::NonZeroUsize::new(100).unwrap();
    let mut machine = acquainted(Machine::with(config), 3);
    for guest in [0, 2] {
        let flood = frame(GATEWAY, machine.guests[guest].mac(), 600, 1);
        for _ in 0..300 {
            machine.guests[guest].send(&flood);
            machine.settle();
        }
    }
    assert!(machine.backend.switch_counters().uplink_full > 0);
    let free = machine.backend.pools().small().free;
    assert!(free >= 100 / 8 - 1, "{free}");
    machine.assert_carries(0, 1);
    take_uplink(&mut machine);
    machine.assert_no_buffer_out();
}

#[test]
fn hostile_pages_that_wait_for_the_card_are_bounded_in_number_and_in_time() {
    let mut config = with_card();
    config.policy = Policy { max_lent: 4, ..Policy::default() };
    let mut machine = acquainted(Machine::with(config), 2);
    let before = machine.sim.ledger();
    let bytes = frame(GATEWAY, machine.guests[0].mac(), LARGE, 7);
    for _ in 0..6 {
        machine.guests[0].send(&bytes);
        machine.settle();
    }
    let counters = machine.status(0).unwrap().counters;
    assert_eq!(counters.tx_paths.of(Datapath::Map).packets, 4);
    assert_eq!((counters.fallbacks.no_room, machine.backend.open()), (2, 4));
    // One that the card has counts as well, for as long as it has it.
    let with_card = machine.backend.receive_uplink().unwrap();
    assert!(with_card.is_lent());
    machine.guests[0].send(&bytes);
    machine.settle();
    assert_eq!(machine.status(0).unwrap().counters.fallbacks.no_room, 3);
    // What only waits is copied when it has waited long enough.
    machine.pass(2 * SECOND);
    assert_eq!(machine.status(0).unwrap().counters.fallbacks.overdue, 3);
    assert_eq!(machine.backend.open(), 1);
    assert!(take_uplink(&mut machine) == vec![bytes.clone(); 6]);
    drop(with_card);
    machine.settle();
    assert_eq!(
        (machine.backend.open(), machine.sim.ledger().since(&before).came.mappings().len()),
        (0, 0)
    );
    machine.assert_no_buffer_out();
}

#[test]
fn hostile_a_guest_that_dies_while_the_card_reads_its_page_waits_for_the_card() {
    let mut machine = machine(2);
    let device = DmaDevice::new(&machine.sim, DomId(0), DmaConfig::BARE);
    let (bytes, packet) = to_gateway(&mut machine, 0);
    let waits = frame(GATEWAY, machine.guests[0].mac(), LARGE, 8);
    guest_send(&mut machine, 0, &waits);
    machine.destroy(0);
    machine.settle();
    // What only waited is a copy by now; what the card has is where it was.
    assert!(sent_by_card(&machine, &device, &packet) == bytes);
    let held = machine.held_of(0);
    assert_eq!(
        held.matches("mapping ").count(),
        5 + 2,
        "the packet's pages and the rings:\n{held}"
    );
    let second = machine.backend.receive_uplink().unwrap();
    assert!(!second.is_lent() && second.bytes() == waits);
    drop((packet, second));
    machine.settle();
    machine.assert_let_go(0);
    let counts = device.counts();
    assert_eq!(counts, DmaCounts { reads: counts.reads, ..DmaCounts::default() });
    machine.assert_no_buffer_out();
}

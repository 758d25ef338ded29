//! How packets get to the card.

use netback::datapath::{Datapath, Withdrawal};
use netback::uplink::{NetHeader, Offers, UplinkConfig};
use netfront::Meta;
use netif::offload::{Checksum, IpVersion};

use crate::common::{MS, frame};
use crate::frames::{Ip, Kind, OUTSIDE, gso};
use crate::{Board, World, XenFeatures};

/// A packet of 60,000 bytes of payload, and what it is cut into.
fn large(world: &World) -> (Vec<u8>, Meta, Vec<Vec<u8>>) {
    let ip = Ip::new(IpVersion::V4, Kind::Tcp, 60_000);
    let bytes = ip.blank(OUTSIDE, world.guest());
    let expected = ip.cut(&bytes, 1448);
    let meta = Meta { checksum: Checksum::Blank, gso: Some(gso(IpVersion::V4, 1448)) };
    (bytes, meta, expected)
}

#[test]
fn a_packet_is_cut_where_it_lies() {
    let mut world = World::new(Board::arm(false, true, false), Offers::empty());
    let (bytes, meta, expected) = large(&world);
    let (calls, pools) = (world.machine.hv.hypercalls(), world.machine.backend.pools().clone());
    let (out, small) = (pools.all().out(), pools.small().out());
    world.card().held = true;
    world.send(&bytes, meta);
    world.settle();
    // Only the first look was copied, and only headers took up buffers: 42 of 66 bytes, and those of the packet.
    let calls = world.machine.hv.hypercalls() - calls;
    assert!(calls.bytes_copied() <= 128, "{}", calls.bytes_copied());
    assert_eq!((pools.all().out() - out, pools.small().out() - small), (2, 1));
    assert_eq!((world.uplink.in_flight(), world.card().holds()), (42, 42));
    assert!(world.lent() >= 15);
    world.card().held = false;
    world.settle();
    assert!(world.take_wire() == expected);
    let sent = world.uplink.counters().sent(Datapath::Map);
    assert_eq!((sent.packets, sent.frames), (1, 42));
    assert_eq!(sent.bytes, expected.iter().map(|frame| frame.len() as u64).sum::<u64>());
    assert_eq!(world.uplink.counters().offloads.segments, 42);
    world.assert_right();
}

#[test]
fn what_came_and_what_has_gone_out_are_more_for_the_backend_to_do() {
    let mut world = World::new(Board::plain(), Offers::empty());
    let poll = |world: &mut World| world.uplink.poll(&mut world.machine.backend, world.machine.now);
    assert!(!poll(&mut world));
    let bytes = frame(world.guest(), OUTSIDE, 60, 1);
    assert!(world.card().deliver(NetHeader::default(), &bytes));
    assert!(poll(&mut world) && !poll(&mut world));
    world.card().held = true;
    world.send(&frame(OUTSIDE, world.guest(), 1514, 3), Meta::default());
    world.settle();
    assert_eq!((world.uplink.in_flight(), world.machine.backend.open()), (1, 1));
    world.card().held = false;
    assert!(world.card().run());
    // The guest's slot is answered when the backend is polled again, and not before.
    assert!(poll(&mut world) && !poll(&mut world));
    world.settle();
    world.assert_right();
}

#[test]
fn headers_go_from_memory_of_ours() {
    for offers in [Offers::empty(), Offers::CSUM | Offers::TSO4] {
        let mut world = World::new(Board::arm(false, true, false), offers);
        let (bytes, meta, expected) = large(&world);
        let plain = frame(OUTSIDE, world.guest(), 1514, 3);
        world.send(&bytes, meta);
        world.send(&plain, Meta::default());
        world.settle();
        assert!(world.take_wire() == [expected, vec![plain]].concat());
        assert_eq!(world.uplink.counters().sent(Datapath::Map).packets, 2);
        assert_eq!(world.card().exposed, 0);
    }
}

#[test]
fn a_small_ring_is_filled_again_and_again_and_order_is_kept() {
    for (capacity, backwards) in [(4, false), (7, true), (40, true)] {
        let mut world = World::new(Board::plain(), Offers::empty());
        (world.card().capacity, world.card().backwards) = (capacity, backwards);
        let (bytes, meta, expected) = large(&world);
        let mut all = Vec::new();
        for round in 0..30 {
            let small = frame(OUTSIDE, world.guest(), 60 + round * 40, round as u8);
            world.send(&small, Meta::default());
            all.push(small);
            if round % 5 == 0 {
                world.send(&bytes, meta);
                all.extend(expected.clone());
            }
            if round % 3 == 0 {
                world.settle();
            }
        }
        world.settle();
        assert!(world.take_wire() == all, "{capacity}");
        assert_eq!(world.uplink.counters().send_drops, Default::default());
        world.assert_right();
    }
}

#[test]
fn the_card_is_told_once_of_many() {
    let mut world = World::new(Board::plain(), Offers::empty());
    for round in 0..50 {
        let small = frame(OUTSIDE, world.guest(), 100, round);
        world.send(&small, Meta::default());
    }
    let before = world.card().publishes;
    world.settle();
    assert_eq!(world.take_wire().len(), 50);
    assert!(world.card().publishes - before <= 2);
}

#[test]
fn without_buffers_a_packet_waits_and_is_looked_after() {
    let mut world = World::new(Board::plain(), Offers::empty());
    let (bytes, meta, expected) = large(&world);
    world.send(&bytes, meta);
    // Takes the packet off the ring; the port has not seen it.
    world.machine.settle();
    let mut taken = Vec::new();
    while let Some(packet) = world.machine.backend.packet(1514, world.machine.now) {
        taken.push(packet);
    }
    world.settle();
    assert_eq!(world.uplink.in_flight(), 0);
    assert_eq!(world.uplink.deadline(), Some(world.machine.now.after(MS)));
    assert_eq!(world.machine.backend.open(), 1);
    taken.truncate(10);
    world.pass(2 * MS, MS);
    assert!(world.take_wire() == expected);
    drop(taken);
    world.assert_right();
}

#[test]
fn what_the_rules_no_longer_hold_for_is_copied() {
    let mut world = World::new(Board::plain(), Offers::empty());
    let (bytes, meta, expected) = large(&world);
    world.send(&bytes, meta);
    world.machine.settle();
    assert!(world.lent() > 0);
    // Between the switch's choice and the port's, what it was made by goes.
    let bits = XenFeatures::AUTO_TRANSLATED_PHYSMAP;
    world.machine.backend.set_withdrawn(&Withdrawal { bits, ..Withdrawal::default() });
    world.settle();
    assert!(world.take_wire() == expected);
    let counters = world.uplink.counters();
    assert_eq!(counters.copied.no_address, 1);
    assert_eq!(counters.sent(Datapath::Map).packets, 0);
    world.assert_right();
}

#[test]
fn what_is_not_at_its_machine_address_is_copied_and_the_bits_are_read_again() {
    let board = Board::arm(false, false, true);
    let mut world = World::new(board, Offers::empty());
    let (bytes, meta, expected) = large(&world);
    let offered = |world: &World| {
        world.machine.backend.features().snapshot().has(XenFeatures::GRANT_MAP_IDENTITY)
    };
    let sent = |world: &World| world.uplink.counters().sent(Datapath::MapIdentity).packets;
    world.send(&bytes, meta);
    world.settle();
    assert!(world.take_wire() == expected);
    assert_eq!(sent(&world), 1);
    // Xen took it away and gave it back while the page was mapped: nothing but a look at it shows that.
    world.card().misses = true;
    world.send(&bytes, meta);
    world.settle();
    assert!(world.take_wire() == expected);
    assert_eq!((sent(&world), world.uplink.counters().copied.not_cleaned), (1, 1));
    assert!(offered(&world));
    // It takes it away for good when the packet is on its way to the port.
    world.send(&bytes, meta);
    world.machine.settle();
    let (id, bits) = (world.machine.hv.id(), board.domain.features);
    world.machine.sim.set_features(id, bits & !XenFeatures::GRANT_MAP_IDENTITY.bits());
    assert!(offered(&world), "nobody said so");
    world.settle();
    assert!(world.take_wire() == expected);
    assert_eq!((sent(&world), world.uplink.counters().copied.not_cleaned), (1, 2));
    assert!(!offered(&world));
    // That it is back is seen within a second, though nobody looks for it.
    world.machine.sim.set_features(id, bits);
    world.card().misses = false;
    world.pass(1100 * MS, 100 * MS);
    assert!(offered(&world));
    world.send(&bytes, meta);
    world.settle();
    world.send(&bytes, meta);
    world.settle();
    assert!(world.take_wire() == [&expected[..]; 2].concat());
    assert!(sent(&world) >= 2);
    world.assert_right();
}

#[test]
fn withdrawal_and_return_in_mid_transfer_change_nothing_on_the_wire() {
    let mut world = World::new(Board::plain(), Offers::empty());
    let (bytes, meta, expected) = large(&world);
    for round in 0..20 {
        let bits = XenFeatures::AUTO_TRANSLATED_PHYSMAP;
        let bits = if round % 2 == 0 { XenFeatures::empty() } else { bits };
        // After one that had to be copied, the next is taken whole to begin with.
        world.send(&bytes, meta);
        world.settle();
        world.card().held = true;
        world.send(&bytes, meta);
        world.settle();
        world.machine.backend.set_withdrawn(&Withdrawal { bits, ..Withdrawal::default() });
        world.send(&bytes, meta);
        world.settle();
        world.card().held = false;
        world.settle();
        assert!(world.take_wire() == [&expected[..]; 3].concat(), "{round}");
        // Long enough for a way to be taken up again.
        world.pass(3 * MS, MS);
    }
    let sent = |path| world.uplink.counters().sent(path).packets;
    let both = (sent(Datapath::Map), sent(Datapath::Copy));
    assert!(both.0 >= 10 && both.1 >= 10, "{both:?}");
    world.assert_right();
}

#[test]
fn what_cannot_be_sent_is_dropped_and_counted() {
    let mut world = World::new(Board::plain(), Offers::empty());
    let long = frame(OUTSIDE, world.guest(), 1523, 1);
    world.send(&long, Meta::default());
    world.settle();
    assert_eq!(world.uplink.counters().send_drops.too_big, 1);
    // Segments that are longer than a frame, and far too many of them.
    for size in [1500, 100] {
        let (bytes, meta, _) = large(&world);
        world.send(&bytes, Meta { gso: Some(gso(IpVersion::V4, size)), ..meta });
        world.settle();
    }
    assert_eq!(world.uplink.counters().send_drops.too_big, 3);
    // A card that takes nothing though it has nothing.
    world.card().capacity = 1;
    let (bytes, meta, _) = large(&world);
    world.send(&bytes, meta);
    world.settle();
    assert_eq!(world.uplink.counters().send_drops.refused, 1);
    assert_eq!(world.take_wire(), Vec::<Vec<u8>>::new());
    world.assert_right();
}

#[test]
fn longer_frames_go_where_they_may() {
    let config = UplinkConfig { max_frame: 9018, ..UplinkConfig::default() };
    let mut world = World::with(Board::plain(), Offers::CSUM, config);
    let ip = Ip::new(IpVersion::V6, Kind::Tcp, 30_000);
    let bytes = ip.blank(OUTSIDE, world.guest());
    let meta = Meta { checksum: Checksum::Blank, gso: Some(gso(IpVersion::V6, 8900)) };
    world.send(&bytes, meta);
    world.settle();
    assert!(world.take_wire() == ip.cut(&bytes, 8900));
    world.assert_right();
}

//! What comes from the card.

use netback::uplink::{GsoType, HeaderFlags, NetHeader, Offers, ReceiveDrops};
use netfront::Meta;
use netif::offload::{Checksum, Gso, IpVersion};

use crate::common::{MS, SECOND, frame};
use crate::frames::{Ip, Kind, OUTSIDE, gso};
use crate::{Board, World};

fn header(flags: HeaderFlags, ip: &Ip, gso: Option<Gso>) -> NetHeader {
    let needed = flags.contains(HeaderFlags::NEEDS_CSUM);
    NetHeader {
        flags,
        gso_type: match gso.map(|gso| gso.version) {
            None => GsoType::NONE,
            Some(IpVersion::V4) => GsoType::TCPV4,
            Some(IpVersion::V6) => GsoType(GsoType::TCPV6.0 | GsoType::ECN.0),
        },
        hdr_len: 0,
        gso_size: gso.map_or(0, |gso| gso.size.get()),
        csum_start: if needed { ip.transport() as u16 } else { 0 },
        csum_offset: match ip.kind {
            _ if !needed => 0,
            Kind::Tcp => 16,
            Kind::Udp => 6,
        },
        num_buffers: 1,
    }
}

/// What comes over the wire, what it needs to have been agreed on, and what the guest is to get.
type Case = (NetHeader, Vec<u8>, Offers, Vec<u8>, Meta);

fn cases(dst: [u8; 6]) -> Vec<Case> {
    let meta = |checksum, gso| Meta { checksum, gso };
    let mut cases = Vec::new();
    for len in [14, 60, 1514, 4096] {
        let bytes = frame(dst, OUTSIDE, len, len as u8);
        let none = Offers::empty();
        cases.push((NetHeader::default(), bytes.clone(), none, bytes, Meta::default()));
    }
    for version in [IpVersion::V4, IpVersion::V6] {
        for (kind, payload, padding) in
            [(Kind::Tcp, 1000, 0), (Kind::Udp, 1, 5), (Kind::Udp, 999, 0)]
        {
            let ip = Ip { padding, ..Ip::new(version, kind, payload) };
            let blank = ip.blank(dst, OUTSIDE);
            let full = ip.complete(blank.clone());
            let needs = header(HeaderFlags::NEEDS_CSUM, &ip, None);
            let csum = Offers::RX_CSUM;
            cases.push((needs, blank.clone(), csum, blank.clone(), meta(Checksum::Blank, None)));
            let valid = header(HeaderFlags::DATA_VALID, &ip, None);
            let validated = meta(Checksum::Validated, None);
            cases.push((valid, full.clone(), csum, full, validated));
        }
        let offer = if version == IpVersion::V4 { Offers::RX_TSO4 } else { Offers::RX_TSO6 };
        for (payload, size) in [(2000, 1448), (60_000, 1000)] {
            let ip = Ip::new(version, Kind::Tcp, payload);
            let blank = ip.blank(dst, OUTSIDE);
            let full = ip.complete(blank.clone());
            let gso = Some(gso(version, size));
            let expected = meta(Checksum::Blank, gso);
            let (both, needs) = (offer | Offers::RX_CSUM, HeaderFlags::NEEDS_CSUM);
            cases.push((header(needs, &ip, gso), blank.clone(), both, blank.clone(), expected));
            // It was put together from segments that were found right: what is cut anew has a blank one.
            let valid = header(HeaderFlags::DATA_VALID, &ip, gso);
            cases.push((valid, full, both, blank, expected));
        }
        // What is no longer than a segment is none.
        let ip = Ip::new(version, Kind::Tcp, 500);
        let blank = ip.blank(dst, OUTSIDE);
        let needs = header(HeaderFlags::NEEDS_CSUM, &ip, Some(gso(version, 500)));
        let expected = meta(Checksum::Blank, None);
        cases.push((needs, blank.clone(), offer | Offers::RX_CSUM, blank, expected));
    }
    // A checksum where netif has none: filled in. The fragment's is the sum over what is there.
    let ip = Ip::new(IpVersion::V4, Kind::Udp, 800);
    let mut fragment = ip.blank(dst, OUTSIDE);
    let mut full = ip.complete(fragment.clone());
    for bytes in [&mut fragment, &mut full] {
        bytes[20] = 0x20;
    }
    let needs = header(HeaderFlags::NEEDS_CSUM, &ip, None);
    let expected = meta(Checksum::Validated, None);
    cases.push((needs, fragment, Offers::RX_CSUM, full, expected));
    cases
}

#[test]
fn whatever_was_agreed_on_arrives_and_nothing_else() {
    let boards = [Board::plain(), Board::arm(false, true, false), Board::server(true)];
    for board in boards {
        for bits in 0..16 {
            let offers = Offers::from_bits_truncate(bits << 3);
            let mut world = World::new(board, offers);
            let mut bad = 0;
            for (header, bytes, needed, expected, meta) in cases(world.guest()) {
                let large = bytes.len() > 4096;
                let taken = world.card().deliver(header, &bytes);
                assert!(taken || large && !offers.contains(needed));
                world.settle();
                let got = world.machine.guests[0].take();
                if offers.contains(needed) {
                    assert!(taken && got.len() == 1, "{offers:?} {header:?} {board:?}");
                    assert!(got[0].0 == expected, "{offers:?} {header:?} {board:?}");
                    assert_eq!(got[0].1, meta, "{offers:?} {header:?}");
                } else {
                    bad += u64::from(taken);
                    assert_eq!(got.len(), 0, "{offers:?} {header:?}");
                }
            }
            let counters = world.uplink.counters();
            assert_eq!(counters.receive_drops.bad_header, bad, "{offers:?}");
            let drops = ReceiveDrops::default();
            let mut others = counters.receive_drops;
            others.bad_header = 0;
            assert_eq!(others, drops);
            let merges = offers.contains(Offers::MERGE)
                && offers.contains(Offers::RX_CSUM)
                && offers.intersects(Offers::RX_TSO4 | Offers::RX_TSO6);
            assert_eq!(counters.arrived.merged > 0, merges);
            world.assert_right();
        }
    }
}

#[test]
fn frames_are_received_where_they_stay() {
    let mut world = World::new(Board::plain(), Offers::empty());
    let bytes = frame(world.guest(), OUTSIDE, 1514, 1);
    let calls = world.machine.hv.hypercalls();
    for _ in 0..10 {
        assert!(world.card().deliver(NetHeader::default(), &bytes));
    }
    world.settle();
    assert_eq!(world.machine.guests[0].take().len(), 10);
    // Once, into the guest's page.
    let calls = world.machine.hv.hypercalls() - calls;
    assert_eq!(calls.bytes_copied(), 10 * 1514);
    assert_eq!(world.uplink.counters().arrived.bytes, 60 + 10 * 1514);
    assert_eq!(world.card().posted(), 32);
}

#[test]
fn a_buffer_may_wait_long_for_its_frame() {
    let mut world = World::new(Board::plain(), Offers::MERGE);
    let bytes = frame(world.guest(), OUTSIDE, 1514, 1);
    // Longer than a guest's packets may wait.
    world.pass(30 * SECOND, SECOND);
    assert!(world.card().deliver(NetHeader::default(), &bytes));
    assert!(world.card().deliver(NetHeader::default(), &[&bytes[..], &bytes, &bytes].concat()));
    world.settle();
    assert_eq!(world.machine.guests[0].take().len(), 2);
}

/// What a card may say that makes no sense.
#[test]
fn bad_words_of_the_card_are_dropped_and_counted() {
    let offers = Offers::RX_CSUM | Offers::RX_TSO4 | Offers::MERGE;
    let mut world = World::new(Board::plain(), offers);
    let ip = Ip::new(IpVersion::V4, Kind::Tcp, 1000);
    let bytes = ip.blank(world.guest(), OUTSIDE);
    let good = header(HeaderFlags::NEEDS_CSUM, &ip, Some(gso(IpVersion::V4, 300)));
    let bad = [
        NetHeader { num_buffers: 0, ..good },
        NetHeader { gso_size: 0, ..good },
        NetHeader { gso_size: 7, ..good },
        NetHeader { gso_type: GsoType::TCPV6, ..good },
        NetHeader { gso_type: GsoType(3), ..good },
        NetHeader { gso_type: GsoType(5), ..good },
        NetHeader { csum_start: 35, ..good },
        NetHeader { csum_offset: 17, ..good },
        NetHeader { gso_type: GsoType::NONE, csum_start: 60_000, ..good },
        NetHeader { gso_type: GsoType::NONE, csum_offset: 65_535, ..good },
        NetHeader { gso_type: GsoType::NONE, csum_start: 65_535, csum_offset: 65_535, ..good },
        NetHeader { flags: HeaderFlags::NEEDS_CSUM | HeaderFlags::RSC_INFO, ..good },
    ];
    for (count, header) in (1..).zip(bad) {
        world.card().fill(header, &bytes, bytes.len());
        world.settle();
        assert_eq!(world.uplink.counters().receive_drops.bad_header, count, "{header:?}");
    }
    for (count, len) in (1..).zip([0, 13, 4097, usize::MAX]) {
        world.card().fill(NetHeader { num_buffers: 1, ..good }, &bytes, len);
        world.settle();
        assert_eq!(world.uplink.counters().receive_drops.bad_length, count, "{len}");
    }
    // Several buffers, of which one or all are wrong: the frame is gone, and the next one arrives.
    let three = NetHeader { num_buffers: 3, ..good };
    for lens in [[5000, 100, 100], [100, 5000, 100], [100, 100, usize::MAX]] {
        for len in lens {
            world.card().fill(three, &bytes, len);
        }
        world.settle();
    }
    assert_eq!(world.uplink.counters().receive_drops.bad_length, 7);
    for count in 13..16 {
        world.card().fill(NetHeader { num_buffers: 40, ..good }, &bytes, 4096);
        world.settle();
        assert_eq!(world.uplink.counters().receive_drops.bad_header, count);
    }
    assert_eq!(world.machine.guests[0].take().len(), 0);
    assert!(world.card().deliver(good, &bytes));
    world.settle();
    let got = world.machine.guests[0].take();
    assert!(got.len() == 1 && got[0].0 == bytes);
    world.assert_right();
}

#[test]
fn noise_does_no_harm() {
    let offers = Offers::all();
    let mut world = World::new(Board::plain(), offers);
    let mut state = 1_u64;
    let mut random = move |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for _ in 0..3000 {
        let version = if random(2) == 0 { IpVersion::V4 } else { IpVersion::V6 };
        let kind = if random(2) == 0 { Kind::Tcp } else { Kind::Udp };
        let ip = Ip::new(version, kind, random(3000) as usize);
        let mut bytes = ip.blank(world.guest(), OUTSIDE);
        for _ in 0..random(3) {
            let at = 12 + random(80) as usize;
            if let Some(byte) = bytes.get_mut(at) {
                *byte = random(256) as u8;
            }
        }
        let mut words = header(HeaderFlags::NEEDS_CSUM, &ip, Some(gso(version, 500))).to_bytes();
        words[10] = 1 + random(2) as u8;
        for _ in 0..random(4) {
            words[random(12) as usize] = random(256) as u8;
        }
        let len = if random(10) == 0 { random(70_000) as usize } else { bytes.len() };
        bytes.truncate(4096);
        if world.card().posted() == 0 {
            world.settle();
        }
        world.card().fill(NetHeader::from_bytes(words), &bytes, len);
        if random(4) == 0 {
            world.settle();
            world.machine.guests[0].take();
        }
    }
    world.settle();
    let counters = world.uplink.counters();
    let drops = counters.receive_drops;
    assert!(drops.bad_header > 100 && drops.bad_length > 100, "{counters:?}");
    assert!(counters.arrived.frames > 200, "{counters:?}");
    assert!(counters.arrived.segmented > 50);
}

#[test]
fn without_buffers_the_ring_runs_dry_and_is_filled_again() {
    let mut world = World::new(Board::plain(), Offers::empty());
    let mut taken = Vec::new();
    while let Some(packet) = world.machine.backend.packet(1514, world.machine.now) {
        taken.push(packet);
    }
    let bytes = frame(world.guest(), OUTSIDE, 500, 1);
    for _ in 0..32 {
        assert!(world.card().deliver(NetHeader::default(), &bytes));
    }
    assert!(!world.card().deliver(NetHeader::default(), &bytes));
    // The guest takes nothing: all buffers are out.
    world.machine.guests[0].runs = false;
    world.uplink.poll(&mut world.machine.backend, world.machine.now);
    assert_eq!(world.uplink.deadline(), Some(world.machine.now.after(MS)));
    world.machine.guests[0].runs = true;
    drop(taken);
    world.pass(3 * MS, MS);
    assert_eq!(world.card().posted(), 32);
    assert!(!world.machine.guests[0].take().is_empty());
    world.assert_right();
}

//! Packets between guests, the local stack and everybody.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::num::NonZeroU16;

use common::{MS, Machine, SECOND, frame};
use hypercall::Handle;
use netfront::{Config, Meta, SendError};
use netif::keys::Features;
use netif::mac::MacAddr;
use netif::offload::{Checksum, Gso, IpVersion};
use sim::Kind;

const BROADCAST: [u8; 6] = [0xff; 6];

fn with(features: Features) -> Config {
    Config { features, ..Config::new(Handle(0)) }
}

/// Both guests known to the switch, so that nothing is flooded.
fn acquainted(configs: &[Config]) -> Machine {
    let mut machine = Machine::new();
    for config in configs {
        machine.guest(*config);
    }
    for guest in 0..configs.len() {
        let hello = frame(BROADCAST, machine.guests[guest].mac(), 60, 0);
        machine.guests[guest].send(&hello);
    }
    machine.settle();
    for guest in &mut machine.guests {
        guest.take();
    }
    machine.assert_no_buffer_out();
    machine
}

fn plain(count: usize) -> Machine {
    acquainted(&vec![Config::new(Handle(0)); count])
}

/// The one's complement sum of 16-bit words, on top of `start`.
fn sum<'a>(start: usize, words: impl Iterator<Item = &'a [u8]>) -> u16 {
    let word = |word: &[u8]| (u32::from(word[0]) << 8) + u32::from(*word.get(1).unwrap_or(&0));
    let mut sum = words.fold(start as u32, |sum, bytes| sum + word(bytes));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Where the addresses of a packet begin, and where its TCP header does.
const fn places(version: IpVersion) -> (usize, usize) {
    match version {
        IpVersion::V4 => (26, 34),
        IpVersion::V6 => (22, 54),
    }
}

/// The sum over a TCP segment and its pseudo-header: 0xffff if its checksum is right.
fn tcp_sum(frame: &[u8], version: IpVersion) -> u16 {
    let (addresses, at) = places(version);
    sum(6 + frame.len() - at, frame[addresses..at].chunks(2).chain(frame[at..].chunks(2)))
}

/// A TCP packet of `payload` bytes whose checksum field holds what a sender leaves there that asks for the rest.
fn tcp(dst: [u8; 6], src: [u8; 6], version: IpVersion, payload: usize) -> Vec<u8> {
    let mut bytes = [&dst[..], &src[..]].concat();
    let length = 20 + payload as u16;
    match version {
        IpVersion::V4 => {
            bytes.extend([0x08, 0, 0x45, 0]);
            bytes.extend((length + 20).to_be_bytes());
            bytes.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            let sum = sum(0, bytes[14..34].chunks(2));
            bytes[24..26].copy_from_slice(&(!sum).to_be_bytes());
        }
        IpVersion::V6 => {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend(length.to_be_bytes());
            bytes.extend([6, 64]);
            bytes.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            bytes.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        }
    }
    let at = bytes.len();
    bytes.extend([0x12, 0x34, 0, 80, 0, 0, 0, 100, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    let pseudo = sum(6 + usize::from(length), bytes[places(version).0..at].chunks(2));
    bytes[at + 16..at + 18].copy_from_slice(&pseudo.to_be_bytes());
    bytes.extend((0..payload).map(|index| (index * 7 + index / 251) as u8));
    bytes
}

#[test]
fn every_size_arrives_byte_for_byte_both_ways() {
    let mut machine = plain(2);
    let mut sizes: Vec<usize> = (14..200).chain([1514, 65_535, 65_534, 61_440, 61_441]).collect();
    sizes.extend((1..16).flat_map(|pages| [pages * 4096 - 1, pages * 4096, pages * 4096 + 1]));
    for (index, size) in sizes.into_iter().enumerate() {
        let (from, to) = (index % 2, 1 - index % 2);
        let sent = frame(machine.guests[to].mac(), machine.guests[from].mac(), size, index as u8);
        machine.guests[from].send(&sent);
        machine.settle();
        let got = machine.guests[to].take();
        assert_eq!(got.len(), 1, "{size}");
        assert!(got[0].0 == sent, "{size} bytes differ");
        assert_eq!(got[0].1, Meta::default());
    }
    machine.assert_no_buffer_out();
    assert_eq!(machine.backend.switch_counters().flooded, 2);
}

#[test]
fn checksum_and_segmentation_are_passed_on() {
    let mut machine = plain(2);
    let (one, two) = (machine.guests[0].mac(), machine.guests[1].mac());
    for (version, size) in [(IpVersion::V4, 1448), (IpVersion::V6, 1428)] {
        let gso = Some(Gso { size: NonZeroU16::new(size).unwrap(), version });
        for meta in [
            Meta { checksum: Checksum::Validated, gso: None },
            Meta { checksum: Checksum::Blank, gso: None },
            Meta { checksum: Checksum::Blank, gso },
        ] {
            for payload in [3000, 20_000, 60_000] {
                let sent = tcp(two, one, version, payload);
                machine.guests[0].frontend().send(0, &sent, meta).unwrap();
                machine.settle();
                let got = machine.guests[1].take();
                assert!(got == [(sent, meta)], "{meta:?} {payload}");
            }
        }
    }
}

#[test]
fn a_receiver_without_segmentation_gets_segments_with_checksums() {
    let all = Config::new(Handle(0)).features;
    for features in [Features::empty(), Features::SG, all.difference(Features::SG)] {
        for (version, size) in [(IpVersion::V4, 1448), (IpVersion::V6, 1428)] {
            let mut machine = acquainted(&[Config::new(Handle(0)), with(features)]);
            let (one, two) = (machine.guests[0].mac(), machine.guests[1].mac());
            let payload = 50_000;
            let sent = tcp(two, one, version, payload);
            let headers = sent.len() - payload;
            let gso = Some(Gso { size: NonZeroU16::new(size).unwrap(), version });
            let meta = Meta { checksum: Checksum::Blank, gso };
            machine.guests[0].frontend().send(0, &sent, meta).unwrap();
            machine.settle();
            let got = machine.guests[1].take();
            assert_eq!(got.len(), payload.div_ceil(size.into()));
            let mut bytes: Vec<u8> = Vec::new();
            for (segment, meta) in &got {
                assert_eq!(meta.gso, None);
                let blank = features.contains(match version {
                    IpVersion::V4 => Features::IPV4_CSUM,
                    IpVersion::V6 => Features::IPV6_CSUM,
                });
                if blank {
                    assert_eq!(meta.checksum, Checksum::Blank);
                    let (addresses, at) = places(version);
                    let words = segment[addresses..at].chunks(2);
                    let pseudo = sum(6 + segment.len() - at, words).to_be_bytes();
                    assert_eq!(segment[at + 16..at + 18], pseudo);
                } else {
                    assert_eq!(meta.checksum, Checksum::Validated);
                    assert_eq!(tcp_sum(segment, version), 0xffff);
                }
                let sequence = headers - 20 + 4;
                let number = u32::from_be_bytes(segment[sequence..][..4].try_into().unwrap());
                assert_eq!(number as usize, 100 + bytes.len(), "in order");
                bytes.extend(&segment[headers..]);
            }
            assert!(bytes == sent[headers..], "the payload differs");
            machine.assert_no_buffer_out();
        }
    }
}

#[test]
fn a_receiver_that_takes_no_blank_checksums_gets_complete_ones() {
    for version in [IpVersion::V4, IpVersion::V6] {
        let mut machine = acquainted(&[Config::new(Handle(0)), with(Features::SG)]);
        let (one, two) = (machine.guests[0].mac(), machine.guests[1].mac());
        let sent = tcp(two, one, version, 1001);
        let meta = Meta { checksum: Checksum::Blank, gso: None };
        machine.guests[0].frontend().send(0, &sent, meta).unwrap();
        machine.settle();
        let got = machine.guests[1].take();
        assert_eq!(got[0].1.checksum, Checksum::Validated);
        assert_eq!(tcp_sum(&got[0].0, version), 0xffff);
        assert!(tcp_sum(&sent, version) != 0xffff, "the test's own packet was complete");
    }
}

#[test]
fn a_receiver_without_sg_never_gets_more_than_a_page() {
    let mut machine = acquainted(&[Config::new(Handle(0)), with(Features::empty())]);
    let (one, two) = (machine.guests[0].mac(), machine.guests[1].mac());
    for (size, arrives) in [(4096, 1), (4097, 0), (65_535, 0)] {
        machine.guests[0].send(&frame(two, one, size, 1));
        machine.settle();
        assert_eq!(machine.guests[1].take().len(), arrives, "{size}");
    }
    assert_eq!(machine.status(1).unwrap().counters.rx_drops.too_big, 2);
    machine.assert_no_buffer_out();
}

#[test]
fn two_queues_keep_the_order_of_each_flow() {
    let two = Config { queues: 2, ..Config::new(Handle(0)) };
    for receiver in [two, Config::new(Handle(0))] {
        let mut machine = acquainted(&[two, receiver]);
        let (one, other) = (machine.guests[0].mac(), machine.guests[1].mac());
        let mut sent = [0_u32; 2];
        for round in 0..50 {
            for _ in 0..20 {
                for (queue, sent) in sent.iter_mut().enumerate() {
                    let mut bytes = frame(other, one, 64 + (round * 37) % 1400, 0);
                    bytes[14] = queue as u8;
                    bytes[15..19].copy_from_slice(&sent.to_be_bytes());
                    *sent += 1;
                    let sender = machine.guests[0].frontend();
                    sender.send(queue, &bytes, Meta::default()).unwrap();
                }
            }
            machine.settle();
        }
        let received = std::mem::take(&mut machine.guests[1].received);
        let mut next = [0_u32; 2];
        let mut came_by = [None; 2];
        for (index, queue) in received.iter().enumerate() {
            for (bytes, _) in queue {
                let flow = usize::from(bytes[14]);
                assert_eq!(u32::from_be_bytes(bytes[15..19].try_into().unwrap()), next[flow]);
                next[flow] += 1;
                assert_eq!(*came_by[flow].get_or_insert(index), index, "one flow, one queue");
            }
        }
        assert_eq!(next, [1000, 1000]);
    }
}

#[test]
fn what_is_for_everybody_goes_to_all_others_and_the_local_port() {
    let mut machine = plain(4);
    let tapped = machine.tapped;
    let unknown = [2, 0, 0, 0, 0, 9];
    for (number, dst) in [BROADCAST, unknown, [0x33, 0x33, 0, 0, 0, 1]].into_iter().enumerate() {
        let sent = frame(dst, machine.guests[2].mac(), 5000, 3);
        machine.guests[2].send(&sent);
        machine.settle();
        for guest in [0, 1, 3] {
            let got = machine.guests[guest].take();
            assert_eq!(got.len(), 1);
            assert!(got[0].0 == sent);
        }
        assert!(machine.guests[2].take().is_empty(), "not back to where it came from");
        assert!(machine.take_local() == [sent]);
        assert_eq!(machine.tapped, tapped + number + 1, "the tap sees each packet once");
    }
    // To one of them: to nobody else.
    let sent = frame(machine.guests[0].mac(), machine.guests[2].mac(), 100, 4);
    machine.guests[2].send(&sent);
    machine.settle();
    assert_eq!(machine.guests[0].take().len(), 1);
    assert!(machine.guests[1].take().is_empty() && machine.take_local().is_empty());
    machine.assert_no_buffer_out();
}

#[test]
fn the_local_stack_sends_and_receives() {
    let mut machine = plain(2);
    let guest = machine.guests[1].mac();
    let sent = frame(guest, MacAddr::BACKEND.0, 9000, 5);
    let mut packet = machine.backend.packet(sent.len(), machine.now).unwrap();
    packet.bytes_mut().copy_from_slice(&sent);
    machine.backend.send_local(packet, machine.now);
    machine.settle();
    assert!(machine.guests[1].take() == [(sent, Meta::default())]);
    let answer = frame(MacAddr::BACKEND.0, guest, 9000, 6);
    machine.guests[1].send(&answer);
    machine.settle();
    assert!(machine.take_local() == [answer]);
    assert!(machine.guests[0].take().is_empty());
}

#[test]
fn a_rate_holds_the_sender_back_and_loses_nothing() {
    let mut machine = Machine::new();
    // A packet of 1,000 bytes each millisecond, and 128 KiB to begin with at most.
    let limited = machine.limited_guest(Some("100000,100000"));
    machine.start(limited, Config::new(Handle(0)));
    let other = machine.plain_guest();
    machine.assert_carries(limited, other);
    let (from, to) = (machine.guests[limited].mac(), machine.guests[other].mac());
    let begin = machine.now;
    let (mut sent, mut got, mut seen) = (0_u32, 0_u32, Vec::new());
    while got < 600 {
        while sent < 600 {
            let mut bytes = frame(to, from, 1000, 0);
            bytes[14..18].copy_from_slice(&sent.to_be_bytes());
            match machine.guests[limited].frontend().send(0, &bytes, Meta::default()) {
                Ok(()) => sent += 1,
                Err(SendError::Full) => break,
                Err(error) => panic!("{error}"),
            }
        }
        let deadline = machine.backend.deadline(machine.now).0;
        assert!(deadline > machine.now.0, "it does not spin while it waits");
        machine.pass(10 * MS);
        for (bytes, _) in machine.guests[other].take() {
            assert_eq!(u32::from_be_bytes(bytes[14..18].try_into().unwrap()), got, "in order");
            got += 1;
        }
        seen.push(got);
        assert!(machine.now < begin.after(20 * SECOND), "{seen:?}");
    }
    let took = machine.now.since(begin) / MS;
    assert!((400..=700).contains(&took), "600 kB at 1 MB/s, some of it at once: {took} ms");
}

#[test]
fn a_receiver_that_takes_nothing_holds_a_bounded_number_of_packets_for_a_while() {
    let mut machine = Machine::with(netback::Config {
        small_buffers: std::num::NonZeroUsize::new(2048).unwrap(),
        ..common::config()
    });
    machine.plain_guest();
    machine.plain_guest();
    machine.plain_guest();
    machine.assert_carries(0, 1);
    machine.assert_carries(0, 2);
    machine.take_local();
    machine.guests[1].receives = false;
    let (from, to) = (machine.guests[0].mac(), machine.guests[1].mac());
    let free = machine.backend.pools().small().free;
    for _ in 0..40 {
        for _ in 0..50 {
            machine.guests[0].send(&frame(to, from, 500, 1));
        }
        machine.settle();
    }
    let counters = machine.status(1).unwrap().counters;
    let held = free - machine.backend.pools().small().free;
    assert!(held <= 512, "{held} packets held");
    assert!(counters.rx_drops.queue_full > 1000, "{counters:?}");
    machine.assert_carries(0, 2);
    machine.pass(11 * SECOND);
    assert_eq!(machine.status(1).unwrap().counters.rx_drops.expired, held as u64);
    machine.assert_no_buffer_out();
    machine.guests[1].receives = true;
    machine.settle();
    machine.guests[1].take();
    machine.assert_carries(0, 1);
}

#[test]
fn one_copy_call_carries_64_small_packets_and_more() {
    // Pages that stay mapped would need no copies.
    let config = Config { static_grants: false, ..Config::new(Handle(0)) };
    let mut machine = acquainted(&[config; 2]);
    let (from, to) = (machine.guests[0].mac(), machine.guests[1].mac());
    let (before, counters) = (machine.hv.hypercalls(), machine.status(0).unwrap().counters.tx);
    let packets = 6400;
    for _ in 0..packets / 128 {
        for _ in 0..128 {
            machine.guests[0].send(&frame(to, from, 64, 1));
        }
        machine.settle();
        assert_eq!(machine.guests[1].take().len(), 128);
    }
    let calls = machine.hv.hypercalls() - before;
    // Once from the guest and once to the other.
    assert!(calls.calls(Kind::Copy) <= 2 * packets / 64, "{calls}");
    assert!(calls.calls(Kind::Notify) <= 2 * packets / 64, "{calls}");
    assert_eq!(calls.ops(Kind::Copy), 2 * packets);
    assert_eq!(calls.calls(Kind::Map) + calls.calls(Kind::Unmap), 0);
    let now = machine.status(0).unwrap().counters.tx;
    assert_eq!(now.packets - counters.packets, packets);
    assert!(now.publishes - counters.publishes <= packets / 64);
}

#[test]
fn a_sender_is_told_when_the_ring_is_full_and_goes_on_after() {
    let mut machine = plain(2);
    let (from, to) = (machine.guests[0].mac(), machine.guests[1].mac());
    let bytes = frame(to, from, 100, 1);
    let sender = machine.guests[0].frontend();
    let mut sent = 0;
    while sender.send(0, &bytes, Meta::default()).is_ok() {
        sent += 1;
    }
    assert_eq!(sent, 256);
    assert_eq!(sender.send(0, &bytes, Meta::default()), Err(SendError::Full));
    machine.settle();
    assert_eq!(machine.guests[1].take().len(), 256);
    machine.guests[0].send(&bytes);
    machine.settle();
    assert_eq!(machine.guests[1].take().len(), 1);
    let counters = machine.guests[0].frontend().counters();
    assert_eq!(counters.tx.completed + counters.tx.lost, counters.tx.packets);
    let idle = machine.hv.hypercalls();
    machine.settle();
    assert_eq!((machine.hv.hypercalls() - idle).to_string(), "", "nothing to do, nothing done");
}

//! What smoltcp's device does for a backend that does not: segments and checksums, byte by byte.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use core::num::NonZeroU16;

use common::{Nic, Rings, World, rx};
use grant::SharedMemory;
use hypercall::{GrantRef, Handle};
use netfront::Config;
use netfront::device::NetDevice;
use netif::offload::Checksum;
use netif::slot::{RxFlags, TxStatus};
use netif::tx::{Verdict, assemble};
use sim::SimHv;
use smoltcp::phy::{Device, PacketMeta, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{IpAddress, Ipv4Packet, TcpPacket, UdpPacket};

const SOURCE: [u8; 4] = [10, 0, 0, 1];
const TARGET: [u8; 4] = [10, 0, 0, 2];

fn world(offer: &[(&str, &str)]) -> (World<NetDevice<SimHv>>, Rings) {
    let mut world = World::new(Config { split: false, ..Config::new(Handle(0)) });
    world.offer(offer);
    let rings = world.attach();
    (world, rings)
}

/// A frame of IP around a transport packet.
fn frame(version: u8, protocol: u8, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![2; 12];
    let length = packet.len() as u16;
    if version == 4 {
        let [high, low] = (length + 20).to_be_bytes();
        frame.extend([8, 0, 0x45, 0, high, low, 0x12, 0x34, 0x40, 0, 64, protocol, 0, 0]);
        frame.extend(SOURCE.iter().chain(&TARGET));
        Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
    } else {
        let [high, low] = length.to_be_bytes();
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, high, low, protocol, 64]);
        frame.extend(addresses(6).iter().flat_map(|address| match address {
            IpAddress::Ipv6(address) => address.octets(),
            IpAddress::Ipv4(_) => panic!("six"),
        }));
    }
    frame.extend(packet);
    frame
}

fn addresses(version: u8) -> [IpAddress; 2] {
    match version {
        4 => [SOURCE, TARGET].map(|address| IpAddress::v4(address[0], address[1], 0, address[3])),
        _ => [1, 2].map(|number| IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 0, number)),
    }
}

fn tcp(payload: usize, flags: u8) -> Vec<u8> {
    let mut packet =
        vec![0, 80, 1, 0, 0xff, 0xff, 0xff, 0, 0, 0, 0, 7, 0x50, flags, 1, 0, 0, 0, 0, 0];
    packet.extend((0..payload).map(|at| (at % 251) as u8));
    packet
}

/// Has the device send it, and gives what the backend gets.
fn sent(
    (world, rings): &mut (World<NetDevice<SimHv>>, Rings),
    bytes: &[u8],
    size: Option<u16>,
) -> Vec<(Vec<u8>, Checksum)> {
    let mut token = world.nic.transmit(Instant::ZERO).unwrap();
    let mut meta = PacketMeta::default();
    meta.segmentation_offload_size = size.and_then(NonZeroU16::new);
    token.set_meta(meta);
    token.consume(bytes.len(), |to| to.copy_from_slice(bytes));
    world.turn();
    let mut frames = Vec::new();
    rings.tx.poll().unwrap();
    while let Some(verdict) = assemble(&mut rings.tx.requests()).unwrap() {
        let Verdict::Packet(packet) = verdict else { panic!("{verdict:?}") };
        assert_eq!(packet.gso, None);
        let parts = packet.slots.iter().map(|slot| world.peek(slot.gref, slot.offset, slot.size));
        frames.push((parts.flatten().collect(), packet.checksum));
        for response in packet.answers.responses(TxStatus::OKAY) {
            rings.tx.push(response).unwrap();
        }
    }
    let _ = rings.tx.publish();
    world.turn();
    frames
}

#[test]
fn segments_are_those_of_a_card() {
    const FIN_PSH_ACK: u8 = 0x19;
    for version in [4, 6] {
        let at = if version == 4 { 34 } else { 54 };
        for (size, payload) in [(1000, 2500), (1000, 3000), (1, 60), (536, 10_000), (1448, 1449)] {
            let mut world = world(&[("feature-no-csum-offload", "1")]);
            let whole = frame(version, 6, &tcp(payload, FIN_PSH_ACK));
            let segments = sent(&mut world, &whole, Some(size));
            assert_eq!(segments.len(), payload.div_ceil(size.into()));
            let mut sequence = 0xffff_ff00_u32;
            let mut gathered: Vec<u8> = Vec::new();
            for (index, (bytes, checksum)) in segments.iter().enumerate() {
                let last = index + 1 == segments.len();
                assert_eq!(*checksum, Checksum::Unverified);
                assert_eq!(bytes[..14], whole[..14]);
                if version == 4 {
                    let ip = Ipv4Packet::new_checked(&bytes[14..]).unwrap();
                    assert!(ip.verify_checksum() && ip.dont_frag());
                    assert_eq!(usize::from(ip.total_len()), bytes.len() - 14);
                    assert_eq!(ip.ident(), 0x1234 + index as u16);
                } else {
                    let length = u16::from_be_bytes([bytes[18], bytes[19]]);
                    assert_eq!(usize::from(length), bytes.len() - 54);
                }
                let tcp = TcpPacket::new_checked(&bytes[at..]).unwrap();
                let [source, target] = addresses(version);
                assert!(tcp.verify_checksum(&source, &target));
                assert_eq!(tcp.seq_number().0 as u32, sequence);
                assert_eq!((tcp.fin(), tcp.psh(), tcp.ack()), (last, last, true));
                sequence = sequence.wrapping_add(tcp.payload().len() as u32);
                gathered.extend(tcp.payload());
            }
            assert!(gathered == whole[at + 20..]);
        }
    }
}

#[test]
fn a_packet_that_is_no_longer_than_a_segment_is_not_cut() {
    let mut world = world(&[("feature-ipv6-csum-offload", "1")]);
    for version in [4, 6] {
        for size in [None, Some(1000), Some(2000)] {
            let segments = sent(&mut world, &frame(version, 6, &tcp(1000, 0x10)), size);
            assert_eq!(segments.len(), 1);
            let (bytes, checksum) = &segments[0];
            assert_eq!(*checksum, Checksum::Blank);
            let [source, target] = addresses(version);
            let tcp = TcpPacket::new_checked(&bytes[if version == 4 { 34 } else { 54 }..]).unwrap();
            assert!(tcp.verify_partial_checksum(&source, &target));
        }
    }
}

#[test]
fn what_has_no_sum_to_fill_is_sent_as_it_is() {
    let mut world = world(&[]);
    let mut fragment = frame(4, 17, &[9; 100]);
    fragment[20] = 0x20;
    let others = [vec![0xff; 60], frame(4, 1, &[8; 64]), frame(6, 58, &[8; 64]), fragment];
    for bytes in others {
        assert_eq!(sent(&mut world, &bytes, None), [(bytes, Checksum::Unverified)]);
    }
}

#[test]
fn a_datagram_never_has_a_sum_of_zero() {
    let mut world = world(&[("feature-no-csum-offload", "1")]);
    for version in [4, 6] {
        // With the sum as payload, the sum is all ones, and its complement zero.
        let datagram = |payload: [u8; 2]| {
            let [a, b] = payload;
            frame(version, 17, &[0, 5, 0, 6, 0, 10, 0, 0, a, b])
        };
        let at = if version == 4 { 34 } else { 54 };
        let first = sent(&mut world, &datagram([0, 0]), None);
        let sum = [first[0].0[at + 6], first[0].0[at + 7]];
        let second = sent(&mut world, &datagram(sum), None);
        let udp = UdpPacket::new_checked(&second[0].0[at..]).unwrap();
        assert_eq!(udp.checksum(), 0xffff);
        let [source, target] = addresses(version);
        assert!(udp.verify_checksum(&source, &target));
    }
}

#[test]
fn a_datagram_without_a_sum_comes_in_over_ipv4_alone() {
    let (mut world, mut rings) = world(&[]);
    for (version, comes) in [(4, true), (6, false)] {
        let bytes = frame(version, 17, &[0, 5, 0, 6, 0, 10, 0, 0, 1, 2]);
        rings.rx.poll().unwrap();
        let request = rings.rx.take().unwrap();
        let GrantRef(gref) = request.gref;
        world.map(gref).write_bytes(0, &bytes);
        let response = rx(request.id.0, 0, RxFlags::empty(), bytes.len() as i16);
        rings.rx.push(response).unwrap();
        let _ = rings.rx.publish();
        assert_eq!(world.nic.receive(Instant::ZERO).is_some(), comes);
        let device = &mut world.nic;
        if let Some((token, _)) = device.receive(Instant::ZERO) {
            smoltcp::phy::RxToken::consume(token, |got| assert_eq!(got, bytes));
        }
        assert_eq!(device.frontend().counters().rx.checksum, u64::from(!comes));
        world.turn();
    }
}

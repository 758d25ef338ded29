extern crate std;

use std::vec;
use std::vec::Vec;

use proptest::prelude::*;
use smoltcp::wire::{IpAddress, Ipv4Packet, Ipv6Packet, TcpPacket, TcpSeqNumber, UdpPacket};

use netif::offload::IpVersion;

use super::checksum::{Fill, blank, complete, is_valid};
use super::segment::segments;
use netif::headers::{Headers, Protocol, Transport, ethertype, parse};

/// What a frame is made of. Lengths are right unless a test spoils them; checksums are not filled in.
#[derive(Clone, Debug)]
struct Build {
    version: IpVersion,
    protocol: Protocol,
    tags: usize,
    /// Four bytes each: IPv4's options.
    ip_options: usize,
    /// Number and length of each IPv6 extension header.
    extensions: Vec<(u8, u8)>,
    tcp_options: usize,
    flags: u8,
    id: u16,
    sequence: u32,
    payload: Vec<u8>,
    padding: usize,
}

impl Build {
    fn new(version: IpVersion, protocol: Protocol, payload: Vec<u8>) -> Self {
        Self {
            version,
            protocol,
            tags: 0,
            ip_options: 0,
            extensions: vec![],
            tcp_options: 0,
            flags: 0x10,
            id: 7,
            sequence: 1000,
            payload,
            padding: 0,
        }
    }

    fn frame(&self) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for tag in 0..self.tags {
            frame.extend(if tag == 0 && self.tags == 2 {
                [0x88, 0xa8, 0, 9]
            } else {
                [0x81, 0, 0, 5]
            });
        }
        let transport = self.transport();
        match self.version {
            IpVersion::V4 => {
                let header = 20 + 4 * self.ip_options;
                frame.extend([8, 0, 0x40 | (header / 4) as u8, 0]);
                frame.extend(((header + transport.len()) as u16).to_be_bytes());
                frame.extend(self.id.to_be_bytes());
                frame.extend([0x40, 0, 64, self.protocol.number(), 0, 0]);
                frame.extend([10, 0, 0, 1, 192, 168, 255, 2]);
                frame.extend(vec![1; 4 * self.ip_options]);
                let start = frame.len() - header;
                Ipv4Packet::new_unchecked(&mut frame[start..]).fill_checksum();
            }
            IpVersion::V6 => {
                let mut extensions = vec![];
                for (at, (_, length)) in self.extensions.iter().enumerate() {
                    let next =
                        self.extensions.get(at + 1).map_or(self.protocol.number(), |next| next.0);
                    extensions.extend([next, *length, 1, 0, 0, 0, 0, 0]);
                    extensions.extend(vec![0; 8 * usize::from(*length)]);
                }
                let next = self.extensions.first().map_or(self.protocol.number(), |next| next.0);
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend(((extensions.len() + transport.len()) as u16).to_be_bytes());
                frame.extend([next, 64]);
                frame.extend([0xfd, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
                frame.extend([0xfd, 0xff, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
                frame.extend(extensions);
            }
        }
        frame.extend(transport);
        frame.extend(vec![0xa5; self.padding]);
        frame
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34, 0, 80];
        match self.protocol {
            Protocol::Tcp => {
                bytes.extend(self.sequence.to_be_bytes());
                bytes.extend([
                    0,
                    0,
                    0,
                    9,
                    ((5 + self.tcp_options) << 4) as u8,
                    self.flags,
                    0xff,
                    0xff,
                    0xbe,
                    0xef,
                    0,
                    0,
                ]);
                bytes.extend(vec![1; 4 * self.tcp_options]);
            }
            Protocol::Udp => {
                bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                bytes.extend([0xbe, 0xef]);
            }
        }
        bytes.extend(&self.payload);
        bytes
    }
}

/// The addresses as smoltcp reads them; it must agree about the headers, too.
fn addresses(frame: &[u8], headers: &Headers) -> (IpAddress, IpAddress) {
    let packet = &frame[headers.network..headers.end];
    match headers.version {
        IpVersion::V4 => {
            let packet = Ipv4Packet::new_checked(packet).unwrap();
            assert!(packet.verify_checksum());
            assert_eq!(usize::from(packet.total_len()), headers.end - headers.network);
            (packet.src_addr().into(), packet.dst_addr().into())
        }
        IpVersion::V6 => {
            let packet = Ipv6Packet::new_checked(packet).unwrap();
            assert_eq!(packet.total_len(), headers.end - headers.network);
            (packet.src_addr().into(), packet.dst_addr().into())
        }
    }
}

/// smoltcp's verdict on a complete checksum.
fn oracle_is_valid(frame: &[u8]) -> bool {
    let headers = parse(frame).unwrap();
    let transport = headers.transport.unwrap();
    let (src, dst) = addresses(frame, &headers);
    let packet = &frame[transport.offset..transport.end];
    match transport.protocol {
        Protocol::Tcp => TcpPacket::new_checked(packet).unwrap().verify_checksum(&src, &dst),
        Protocol::Udp => UdpPacket::new_checked(packet).unwrap().verify_checksum(&src, &dst),
    }
}

/// smoltcp's verdict on a blank one.
fn oracle_is_blank(frame: &[u8]) -> bool {
    let headers = parse(frame).unwrap();
    let transport = headers.transport.unwrap();
    let (src, dst) = addresses(frame, &headers);
    let packet = &frame[transport.offset..transport.end];
    match transport.protocol {
        Protocol::Tcp => {
            TcpPacket::new_checked(packet).unwrap().verify_partial_checksum(&src, &dst)
        }
        Protocol::Udp => {
            UdpPacket::new_checked(packet).unwrap().verify_partial_checksum(&src, &dst)
        }
    }
}

fn payload(longest: usize) -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..=longest.min(100)),
        (0..=longest, any::<u64>()).prop_map(|(length, seed)| {
            let mut state = seed | 1;
            let mut next = || {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            };
            (0..length).map(|_| next()).collect()
        }),
        (0..=longest).prop_map(|length| vec![0xff; length]),
    ]
}

fn build() -> impl Strategy<Value = Build> {
    let version = prop_oneof![Just(IpVersion::V4), Just(IpVersion::V6)];
    let protocol = prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)];
    let extension = (prop_oneof![Just(0_u8), Just(43), Just(60)], 0_u8..4);
    let extensions = prop::collection::vec(extension, 0..4);
    let numbers = (any::<u8>(), any::<u16>(), any::<u32>());
    let shape = (0_usize..3, 0_usize..=10, extensions, 0_usize..=10, 0_usize..50);
    (version, protocol, shape, numbers, payload(65_000)).prop_map(
        |(version, protocol, shape, numbers, payload)| {
            let (tags, ip_options, extensions, tcp_options, padding) = shape;
            let (flags, id, sequence) = numbers;
            Build {
                version,
                protocol,
                tags,
                ip_options,
                extensions,
                tcp_options,
                flags,
                id,
                sequence,
                payload,
                padding,
            }
        },
    )
}

#[test]
fn plain_headers_are_found() {
    let frame = Build::new(IpVersion::V4, Protocol::Tcp, vec![1; 10]).frame();
    let transport = Transport { protocol: Protocol::Tcp, offset: 34, payload: 54, end: 64 };
    let headers =
        Headers { version: IpVersion::V4, network: 14, end: 64, transport: Some(transport) };
    assert_eq!(parse(&frame), Some(headers));
    assert_eq!(ethertype(&frame), Some((0x0800, 14)));

    let frame =
        Build { tags: 2, padding: 9, ..Build::new(IpVersion::V6, Protocol::Udp, vec![1; 10]) }
            .frame();
    let transport = Transport { protocol: Protocol::Udp, offset: 62, payload: 70, end: 80 };
    let headers =
        Headers { version: IpVersion::V6, network: 22, end: 80, transport: Some(transport) };
    assert_eq!(parse(&frame), Some(headers));
    assert_eq!(ethertype(&frame), Some((0x86dd, 22)));
}

#[test]
fn what_is_not_an_ip_packet_has_no_headers() {
    let good = Build::new(IpVersion::V4, Protocol::Tcp, vec![]).frame();
    for (at, value) in
        [(12, 9), (13, 6), (14, 0x65), (14, 0x44), (14, 0x4f), (16, 1), (17, 19), (17, 41)]
    {
        let mut frame = good.clone();
        frame[at] = value;
        assert_eq!(parse(&frame), None, "{at} {value}");
    }
    let good = Build::new(IpVersion::V6, Protocol::Tcp, vec![]).frame();
    for (at, value) in [(12, 9), (14, 0x40), (18, 1), (19, 21)] {
        let mut frame = good.clone();
        frame[at] = value;
        assert_eq!(parse(&frame), None, "{at} {value}");
    }
}

#[test]
fn what_cannot_be_summed_has_no_transport() {
    let good = Build::new(IpVersion::V4, Protocol::Tcp, vec![1; 8]).frame();
    // First fragment, later fragment, another protocol, TCP headers too short and too long.
    for (at, value) in [(20, 0x20), (21, 1), (20, 0x1f), (23, 1), (46, 0x40), (46, 0x80)] {
        let mut frame = good.clone();
        frame[at] = value;
        assert_eq!(parse(&frame).unwrap().transport, None, "{at} {value}");
        let before = frame.clone();
        assert!(!complete(&mut frame) && !blank(&mut frame) && !is_valid(&frame));
        assert!(segments(&frame, 8).is_none());
        assert_eq!(frame, before);
    }
    // UDP's length: below its header, beyond the packet.
    for length in [0, 7, 17] {
        let mut frame = Build::new(IpVersion::V4, Protocol::Udp, vec![1; 8]).frame();
        frame[39] = length;
        assert_eq!(parse(&frame).unwrap().transport, None, "{length}");
    }
    // Extension headers: a fragment's, authentication, none; and a hop-by-hop header that is longer than the packet.
    for number in [44, 51, 59, 58] {
        let mut frame = Build::new(IpVersion::V6, Protocol::Tcp, vec![1; 8]).frame();
        frame[20] = number;
        assert_eq!(parse(&frame).unwrap().transport, None, "{number}");
    }
    let mut frame =
        Build { extensions: vec![(0, 1)], ..Build::new(IpVersion::V6, Protocol::Udp, vec![1; 8]) }
            .frame();
    assert!(parse(&frame).unwrap().transport.is_some());
    frame[55] = 255;
    assert_eq!(parse(&frame).unwrap().transport, None);
}

#[test]
fn a_route_still_to_go_hides_the_transport() {
    let mut frame =
        Build { extensions: vec![(43, 2)], ..Build::new(IpVersion::V6, Protocol::Tcp, vec![]) }
            .frame();
    assert_eq!(frame[54 + 3], 0);
    assert!(parse(&frame).unwrap().transport.is_some());
    frame[54 + 3] = 1;
    assert_eq!(parse(&frame).unwrap().transport, None);
}

#[test]
fn extension_headers_are_walked_to_a_bound() {
    let with = |count| Build {
        extensions: vec![(60, 0); count],
        ..Build::new(IpVersion::V6, Protocol::Tcp, vec![])
    };
    assert!(parse(&with(8).frame()).unwrap().transport.is_some());
    assert_eq!(parse(&with(9).frame()).unwrap().transport, None);
}

/// The example of RFC 1071, 3, and a checksum worked out by hand.
#[test]
fn sums_are_those_of_the_rfc() {
    use super::checksum::Sum;
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    assert_eq!(Sum::default().add(&bytes).fold(), [0xdd, 0xf2]);
    assert_eq!(Sum::default().add(&bytes).finish(), [0x22, 0x0d]);
    assert_eq!(Sum::default().add(&bytes[..3]).fold(), [0xf2, 0x01]);
    assert_eq!(Sum::default().add(&bytes[..2]).add(&bytes[2..]).fold(), [0xdd, 0xf2]);
    assert_eq!(Sum::default().add_u32(0x0001_f203).add(&bytes[4..]).fold(), [0xdd, 0xf2]);
    assert_eq!(Sum::default().add(&vec![0xff; 1 << 20]).fold(), [0xff, 0xff]);
}

#[test]
fn a_udp_checksum_of_zero_is_sent_as_ones() {
    for version in [IpVersion::V4, IpVersion::V6] {
        let mut build = Build::new(version, Protocol::Udp, vec![0, 0]);
        let mut frame = build.frame();
        assert!(complete(&mut frame));
        let offset = parse(&frame).unwrap().transport.unwrap().offset;
        // With the checksum as payload the sum is all ones.
        build.payload = frame[offset + 6..offset + 8].to_vec();
        let mut frame = build.frame();
        assert!(complete(&mut frame));
        assert_eq!(frame[offset + 6..offset + 8], [0xff, 0xff]);
        assert!(is_valid(&frame) && oracle_is_valid(&frame));
        frame[offset + 6..offset + 8].fill(0);
        assert_eq!(is_valid(&frame), version == IpVersion::V4);
    }
}

#[test]
fn a_packet_is_cut_only_if_it_is_worth_it() {
    let frame = |protocol| Build::new(IpVersion::V4, protocol, vec![1; 100]).frame();
    let tcp = frame(Protocol::Tcp);
    assert!(segments(&tcp, 0).is_none());
    assert!(segments(&tcp, 7).is_none());
    assert_eq!(segments(&tcp, 8).unwrap().count(), 13);
    assert_eq!(segments(&tcp, 99).unwrap().count(), 2);
    assert_eq!(segments(&tcp, 100).unwrap().count(), 1);
    assert!(segments(&tcp, 101).is_none());
    assert!(segments(&frame(Protocol::Udp), 50).is_none());
    assert!(segments(&tcp[..tcp.len() - 1], 50).is_none());
}

#[test]
fn a_segment_needs_its_room() {
    let frame = Build::new(IpVersion::V4, Protocol::Tcp, vec![1; 100]).frame();
    let cut = segments(&frame, 60).unwrap();
    let mut out = [0; 200];
    assert_eq!(cut.max_len(), 114);
    assert_eq!(cut.write(0, Fill::Complete, &mut out[..113]), None);
    assert_eq!(cut.write(0, Fill::Complete, &mut out[..114]), Some(114));
    assert_eq!(cut.write(1, Fill::Complete, &mut out), Some(94));
    assert_eq!(cut.write(2, Fill::Complete, &mut out), None);
    assert_eq!(cut.write(usize::MAX, Fill::Complete, &mut out), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn checksums_are_completed(build in build()) {
        let mut frame = build.frame();
        let before = frame.clone();
        prop_assert!(complete(&mut frame));
        prop_assert!(is_valid(&frame));
        prop_assert!(oracle_is_valid(&frame));
        let transport = parse(&frame).unwrap().transport.unwrap();
        prop_assert_eq!(&frame[transport.payload..transport.end], &build.payload[..]);
        let field = transport.offset + if build.protocol == Protocol::Tcp { 16 } else { 6 };
        prop_assert_eq!(&frame[..field], &before[..field]);
        prop_assert_eq!(&frame[field + 2..], &before[field + 2..]);
        if !build.payload.is_empty() {
            frame[transport.end - 1] ^= 0x10;
            prop_assert!(!is_valid(&frame));
        }
    }

    #[test]
    fn checksums_are_left_blank(build in build()) {
        let mut frame = build.frame();
        prop_assert!(blank(&mut frame));
        prop_assert!(oracle_is_blank(&frame));
    }

    #[test]
    fn segments_are_the_packet(
        build in build().prop_map(|build| Build { protocol: Protocol::Tcp, ..build }),
        gso_size in prop_oneof![8_u16..100, 500_u16..1500, any::<u16>()],
        kind in prop_oneof![Just(Fill::Complete), Just(Fill::Blank)],
    ) {
        let frame = build.frame();
        let whole = parse(&frame).unwrap();
        let Some(cut) = segments(&frame, gso_size) else {
            prop_assert!(gso_size < 8 || usize::from(gso_size) > build.payload.len());
            return Ok(());
        };
        let mut gathered: Vec<u8> = vec![];
        let mut out = vec![0xee; cut.max_len()];
        for index in 0..cut.count() {
            let length = cut.write(index, kind, &mut out).unwrap();
            let segment = &out[..length];
            let headers = parse(segment).unwrap();
            let transport = headers.transport.unwrap();
            prop_assert_eq!((transport.end, headers.end), (length, length));
            prop_assert_eq!(transport.payload, whole.transport.unwrap().payload);
            let is_right = match kind {
                Fill::Complete => oracle_is_valid(segment),
                Fill::Blank => oracle_is_blank(segment),
            };
            prop_assert!(is_right);

            let last = index == cut.count() - 1;
            let size = transport.end - transport.payload;
            prop_assert!(size == usize::from(gso_size) || (last && size < usize::from(gso_size) && size > 0));
            let tcp = TcpPacket::new_checked(&segment[transport.offset..]).unwrap();
            prop_assert_eq!(tcp.seq_number(), TcpSeqNumber(build.sequence as i32) + gathered.len());
            prop_assert_eq!(tcp.fin(), last && build.flags & 0x01 != 0);
            prop_assert_eq!(tcp.psh(), last && build.flags & 0x08 != 0);
            prop_assert_eq!(tcp.cwr(), index == 0 && build.flags & 0x80 != 0);
            prop_assert_eq!(segment[transport.offset + 13] & 0x76, build.flags & 0x76);
            if headers.version == IpVersion::V4 {
                let ip = Ipv4Packet::new_checked(&segment[headers.network..]).unwrap();
                prop_assert_eq!(ip.ident(), build.id.wrapping_add(index as u16));
            }
            // All else in the headers is as it was.
            let mut copy = segment[..transport.payload].to_vec();
            let t = transport.offset;
            let network = headers.network;
            let changed = match headers.version {
                IpVersion::V4 => [network + 2..network + 6, network + 10..network + 12],
                IpVersion::V6 => [network + 4..network + 6, 0..0],
            };
            for range in changed.into_iter().chain([t + 4..t + 8, t + 13..t + 14, t + 16..t + 18]) {
                copy[range.clone()].copy_from_slice(&frame[range]);
            }
            prop_assert_eq!(&copy[..], &frame[..transport.payload]);
            gathered.extend(&segment[transport.payload..]);
        }
        prop_assert_eq!(gathered, build.payload);
    }

    /// Whatever the bytes: no panic, and nothing points outside.
    #[test]
    fn spoiled_frames_do_no_harm(
        build in build(),
        spoil in prop::collection::vec((0_usize..120, any::<u8>()), 0..6),
        keep in 0_usize..200,
        cut in any::<bool>(),
        gso_size: u16,
    ) {
        let mut frame = build.frame();
        for (at, value) in spoil {
            if let Some(byte) = frame.get_mut(at) { *byte = value; }
        }
        if cut { frame.truncate(keep); }
        if let Some(headers) = parse(&frame) {
            prop_assert!(headers.network < headers.end && headers.end <= frame.len());
            if let Some(transport) = headers.transport {
                prop_assert!(headers.network < transport.offset && transport.offset < transport.payload);
                prop_assert!(transport.payload <= transport.end && transport.end <= headers.end);
            }
        }
        if let Some(cut) = segments(&frame, gso_size) {
            let mut out = vec![0; cut.max_len()];
            for index in 0..cut.count() {
                let length = cut.write(index, Fill::Complete, &mut out);
                prop_assert!(length.is_some_and(|length| is_valid(&out[..length])));
            }
        }
        let length = frame.len();
        prop_assert_eq!(complete(&mut frame), is_valid(&frame));
        prop_assert_eq!(frame.len(), length);
    }
}

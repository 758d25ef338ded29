//! Hashes against published vectors, and against the definition in io/netif.h, bit by bit.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use netif::hash::{HashInput, HashTypes, Toeplitz};
use netif::tx::PacketHash;
use proptest::prelude::*;

/// The key of Microsoft's "Verifying the RSS Hash Calculation".
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

fn frame(kind: u16, rest: &[&[u8]]) -> Vec<u8> {
    [&[2; 12][..], &kind.to_be_bytes(), &rest.concat()].concat()
}

fn v4(src: &str, dst: &str, protocol: u8, ports: (u16, u16)) -> Vec<u8> {
    let address = |text: &str| text.parse::<std::net::Ipv4Addr>().unwrap().octets();
    let fixed = [0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, protocol, 0, 0];
    let transport = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    frame(0x0800, &[&fixed, &address(src), &address(dst), &transport, &[0; 16]])
}

fn v6(src: &str, dst: &str, ports: (u16, u16)) -> Vec<u8> {
    let address = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
    let fixed = [0x60, 0, 0, 0, 0, 20, 6, 64];
    let transport = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    frame(0x86dd, &[&fixed, &address(src), &address(dst), &transport, &[0; 16]])
}

fn hash(frame: &[u8], types: HashTypes) -> Option<(u8, u32)> {
    let found = Toeplitz::new(&KEY).packet(frame, types)?;
    let PacketHash { kind, algorithm, value } = found;
    assert_eq!(algorithm, 1);
    Some((kind, value))
}

#[test]
fn published_vectors_ipv4() {
    for (dst, dst_port, src, src_port, addresses, with_ports) in [
        ("161.142.100.80", 1766, "66.9.149.187", 2794, 0x323e_8fc2, 0x51cc_c178),
        ("65.69.140.83", 4739, "199.92.111.2", 14230, 0xd718_262a, 0xc626_b0ea),
        ("12.22.207.184", 38024, "24.19.198.95", 12898, 0xd2d0_a5de, 0x5c2b_394a),
        ("209.142.163.6", 2217, "38.27.205.30", 48228, 0x8298_9176, 0xafc7_327f),
        ("202.188.127.2", 1303, "153.39.163.191", 44251, 0x5d18_09c5, 0x10e8_28a2),
    ] {
        let frame = v4(src, dst, 6, (src_port, dst_port));
        assert_eq!(hash(&frame, HashTypes::IPV4), Some((0, addresses)));
        assert_eq!(hash(&frame, HashTypes::IPV4_TCP), Some((1, with_ports)));
        assert_eq!(hash(&frame, HashTypes::all()), Some((1, with_ports)));
    }
}

#[test]
fn published_vectors_ipv6() {
    for (dst, dst_port, src, src_port, addresses, with_ports) in [
        ("3ffe:2501:200:3::1", 1766, "3ffe:2501:200:1fff::7", 2794, 0x2cc1_8cd5, 0x4020_7d3d),
        ("ff02::1", 4739, "3ffe:501:8::260:97ff:fe40:efab", 14230, 0x0f0c_461c, 0xdde5_1bbf),
        (
            "fe80::200:f8ff:fe21:67cf",
            38024,
            "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
            44251,
            0x4b61_e985,
            0x02d1_feef,
        ),
    ] {
        let frame = v6(src, dst, (src_port, dst_port));
        assert_eq!(hash(&frame, HashTypes::IPV6), Some((2, addresses)));
        assert_eq!(hash(&frame, HashTypes::IPV6_TCP), Some((3, with_ports)));
        assert_eq!(hash(&frame, HashTypes::all()), Some((3, with_ports)));
    }
}

#[test]
fn the_type_over_most_fields_counts() {
    let ports = (2794, 1766);
    let (src, dst) = ("66.9.149.187", "161.142.100.80");
    let (tcp, udp) = (v4(src, dst, 6, ports), v4(src, dst, 17, ports));
    let addresses = Some((0, 0x323e_8fc2));
    assert_eq!(hash(&udp, HashTypes::all()), addresses);
    assert_eq!(hash(&udp, HashTypes::IPV4_TCP), None);
    assert_eq!(hash(&tcp, HashTypes::IPV6 | HashTypes::IPV6_TCP), None);
    assert_eq!(hash(&tcp, HashTypes::empty()), None);
    // All fragments of a flow hash alike, and the first has ports.
    for (at, value) in [(20, 0x20), (21, 1)] {
        let mut fragment = tcp.clone();
        fragment[at] = value;
        assert_eq!(hash(&fragment, HashTypes::all()), addresses);
    }
    // Options, and a tag.
    let mut options = tcp.clone();
    options[14] = 0x46;
    options.splice(34..34, [1; 4]);
    assert_eq!(hash(&options, HashTypes::all()), Some((1, 0x51cc_c178)));
    let mut tagged = tcp.clone();
    tagged.splice(12..12, [0x81, 0, 0, 7]);
    assert_eq!(hash(&tagged, HashTypes::all()), Some((1, 0x51cc_c178)));
    // Ports that are not there, addresses that are not, and no IP.
    assert_eq!(hash(&tcp[..37], HashTypes::all()), addresses);
    assert_eq!(hash(&tcp[..33], HashTypes::all()), None);
    let mut arp = tcp;
    arp[13] = 6;
    assert_eq!(hash(&arp, HashTypes::all()), None);
}

#[test]
fn an_empty_key_hashes_to_nothing() {
    assert_eq!(Toeplitz::new(&[]).hash(&[0xff; 36]), 0);
    // A short key is one that ends in zeros.
    let short = [&KEY[..5], &[0; 35]].concat();
    assert_eq!(Toeplitz::new(&KEY[..5]).hash(&KEY[..36]), Toeplitz::new(&short).hash(&KEY[..36]));
}

/// "Value ^= left-most 32 bits of Key[]; Key[] << 1; Buffer[] << 1".
fn by_definition(key: &[u8], input: &[u8]) -> u32 {
    let bit = |bytes: &[u8], at: usize| {
        bytes.get(at / 8).is_some_and(|byte| byte & (0x80 >> (at % 8)) != 0)
    };
    let left_most =
        |from: usize| (from..from + 32).fold(0, |value, at| value << 1 | u32::from(bit(key, at)));
    (0..input.len() * 8).filter(|at| bit(input, *at)).fold(0, |value, at| value ^ left_most(at))
}

proptest! {
    #[test]
    fn the_table_is_the_definition(
        key in prop::collection::vec(any::<u8>(), 0..50),
        input in prop::collection::vec(any::<u8>(), 0..=36),
    ) {
        prop_assert_eq!(Toeplitz::new(&key).hash(&input), by_definition(&key, &input));
    }

    #[test]
    fn any_frame_is_survived(
        mut frame in prop::collection::vec(any::<u8>(), 0..128), six: bool, likely: bool, types: u32,
    ) {
        if likely && let Some(kind) = frame.get_mut(12..15) {
            kind.copy_from_slice(if six { &[0x86, 0xdd, 0x60] } else { &[8, 0, 0x45] });
        }
        let types = HashTypes::from_bits_truncate(types);
        if let Some(input) = HashInput::of(&frame, types) {
            prop_assert!(types.contains(input.kind()));
            let len = match input.kind() {
                HashTypes::IPV4 => 8,
                HashTypes::IPV4_TCP => 12,
                HashTypes::IPV6 => 32,
                HashTypes::IPV6_TCP => 36,
                other => panic!("{other:?}"),
            };
            prop_assert_eq!(input.bytes().len(), len);
        }
    }
}

//! Segmentation checks on header bytes (hostile peers 21 and 22), and the names of features and keys.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use netif::keys::{self, Features, QueueKey};
use netif::offload::{
    Checksum, FixUp, Gso, NotSegmentable, Segmentation, check_segmentation as check,
};
use netif::slot::GsoType;
use proptest::prelude::*;

fn gso(size: u16, kind: GsoType) -> Gso {
    Gso::new(size, kind).unwrap()
}

/// Ethernet, tags, IPv4 with a number of 32-bit option words, TCP with the same.
fn v4(tags: usize, options: u8) -> Vec<u8> {
    let mut header = vec![2; 12];
    for _ in 0..tags {
        header.extend([0x81, 0, 0, 7]);
    }
    header.extend([8, 0]);
    header.extend([0x45 + options, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    header.resize(header.len() + usize::from(options) * 4, 1);
    tcp(&mut header, options);
    header
}

fn tcp(header: &mut Vec<u8>, options: u8) {
    header.extend([0x12, 0x34, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50 + (options << 4), 0x10]);
    header.extend([0xff, 0xff, 0xab, 0xcd, 0, 0]);
    header.resize(header.len() + usize::from(options) * 4, 1);
}

fn v6(extensions: &[u8]) -> Vec<u8> {
    let mut header = vec![2; 12];
    header.extend([0x86, 0xdd]);
    let first = extensions.first().copied().unwrap_or(6);
    header.extend([0x60, 0, 0, 0, 0, 0, first, 64]);
    header.extend((0..32).map(|it| it * 7));
    for at in 0..extensions.len() {
        header.extend([extensions.get(at + 1).copied().unwrap_or(6), 1]);
        header.extend([0; 14]);
    }
    tcp(&mut header, 0);
    header
}

#[test]
fn finds_the_headers() {
    for (tags, options) in [(0, 0), (1, 3), (2, 10)] {
        let header = v4(tags, options);
        let options = u16::from(options) * 4;
        let network = 14 + tags as u16 * 4;
        let transport = network + 20 + options;
        let payload = transport + 20 + options;
        let expected = Segmentation { network, transport, payload, segments: 3, fix_up: None };
        let seen = check(&header, payload + 2001, gso(1000, GsoType::TCPV4), Checksum::Blank);
        assert_eq!(seen, Ok(expected));
    }
    for extensions in [&[][..], &[0], &[0, 43, 60]] {
        let header = v6(extensions);
        let transport = 54 + extensions.len() as u16 * 16;
        let seen = check(&header, 60_000, gso(1440, GsoType::TCPV6), Checksum::Blank).unwrap();
        assert_eq!((seen.transport, seen.payload), (transport, transport + 20));
    }
}

#[test]
fn hostile_21_what_cannot_be_segmented() {
    let four = gso(1000, GsoType::TCPV4);
    let judge = |header: &[u8]| check(header, 9000, four, Checksum::Blank);
    let good = v4(0, 0);
    assert!(judge(&good).is_ok());
    let changed = |at: usize, value: u8| {
        let mut header = good.clone();
        header[at] = value;
        judge(&header)
    };
    assert_eq!(changed(23, 17), Err(NotSegmentable::NotTcp)); // UDP
    assert_eq!(changed(13, 6), Err(NotSegmentable::NotTcp)); // ARP
    assert_eq!(changed(20, 0x20), Err(NotSegmentable::NotTcp)); // more fragments
    assert_eq!(changed(21, 1), Err(NotSegmentable::NotTcp)); // a later fragment
    assert_eq!(changed(14, 0x44), Err(NotSegmentable::Header)); // IP header of 16 bytes
    assert_eq!(changed(14, 0x65), Err(NotSegmentable::Header)); // version 6
    assert_eq!(changed(46, 0x40), Err(NotSegmentable::Header)); // TCP header of 16 bytes
    assert_eq!(changed(46, 0x60), Err(NotSegmentable::Header)); // options that are not there
    for len in 0..good.len() {
        assert_eq!(judge(&good[..len]), Err(NotSegmentable::Header));
        // As long as the copy is, but the packet ends there.
        let seen = check(&good, len as u16, four, Checksum::Blank);
        assert_eq!(seen, Err(NotSegmentable::Header));
    }
    // The other IP than announced.
    assert_eq!(judge(&v6(&[])), Err(NotSegmentable::NotTcp));
    assert_eq!(
        check(&good, 9000, gso(1000, GsoType::TCPV6), Checksum::Blank),
        Err(NotSegmentable::NotTcp)
    );
    // A fragment, no next header, and too many extensions.
    for extensions in [&[44][..], &[0, 59], &[60; 9]] {
        let six = gso(1000, GsoType::TCPV6);
        let seen = check(&v6(extensions), 9000, six, Checksum::Blank);
        assert_eq!(seen, Err(NotSegmentable::NotTcp));
    }
    assert!(check(&good, 54 + 1000, four, Checksum::Blank).is_ok());
    assert_eq!(
        check(&good, 54 + 999, four, Checksum::Blank),
        Err(NotSegmentable::Payload { size: 1000, payload: 999 })
    );
}

#[test]
fn hostile_22_a_checksum_that_is_not_blank_is_made_so() {
    let judge = |header: &[u8], kind, checksum| {
        check(header, 3054, gso(1000, kind), checksum).unwrap().fix_up
    };
    for checksum in [Checksum::Unverified, Checksum::Validated] {
        // 0a00 + 0001 + 0a00 + 0002 + 6 + 3020
        let bytes = (0x1403_u16 + 6 + 3020).to_be_bytes();
        assert_eq!(judge(&v4(0, 0), GsoType::TCPV4, checksum), Some(FixUp { at: 50, bytes }));
        let sum: u32 =
            (0..32).step_by(2).map(|it| ((it * 7) << 8) | ((it + 1) * 7)).sum::<u32>() + 6 + 3000;
        let bytes = ((sum & 0xffff) as u16 + (sum >> 16) as u16).to_be_bytes();
        assert_eq!(judge(&v6(&[]), GsoType::TCPV6, checksum), Some(FixUp { at: 70, bytes }));
    }
    assert_eq!(judge(&v4(0, 0), GsoType::TCPV4, Checksum::Blank), None);
}

proptest! {
    #[test]
    fn any_header_is_survived(
        mut header in prop::collection::vec(any::<u8>(), 0..128),
        six: bool, likely: bool, size: u16, mss in 1_u16..,
    ) {
        if likely && let Some(kind) = header.get_mut(12..15) {
            kind.copy_from_slice(if six { &[0x86, 0xdd, 0x60] } else { &[8, 0, 0x45] });
        }
        let kind = if six { GsoType::TCPV6 } else { GsoType::TCPV4 };
        if let Ok(seen) = check(&header, size, gso(mss, kind), Checksum::Unverified) {
            prop_assert!(seen.network < seen.transport && seen.transport < seen.payload);
            prop_assert!(usize::from(seen.payload) <= header.len() && seen.payload < size);
            prop_assert!(usize::from(seen.fix_up.unwrap().at) + 2 <= header.len());
            prop_assert!(seen.segments >= 1);
        }
    }
}

#[test]
fn features_print_and_come_from_keys() {
    let modern = Features::SG
        | Features::GSO_TCPV4
        | Features::GSO_TCPV6
        | Features::IPV6_CSUM
        | Features::SPLIT;
    assert_eq!(modern.to_string(), "sg,gso-tcpv4,gso-tcpv6,ipv6-csum,split");
    assert_eq!(Features::empty().to_string(), "none");
    assert_eq!(Features::offered(|_| None), Features::IPV4_CSUM);
    assert_eq!(Features::offered(|_| Some(0)), Features::IPV4_CSUM);
    assert_eq!(Features::offered(|_| Some(1)), Features::all() - Features::IPV4_CSUM);
    let sg = Features::offered(|key| (key == "feature-sg").then_some(7));
    assert_eq!(sg, Features::IPV4_CSUM | Features::SG);
}

#[test]
fn queue_keys() {
    assert_eq!(QueueKey::new(0, 1, keys::TX_RING_REF).to_string(), "tx-ring-ref");
    assert_eq!(QueueKey::new(0, 2, keys::RX_RING_REF).to_string(), "queue-0/rx-ring-ref");
    assert_eq!(QueueKey::new(11, 12, keys::EVENT_CHANNEL).to_string(), "queue-11/event-channel");
}

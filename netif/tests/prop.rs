//! Parsers of what the other end writes into the store, and slots as bytes, each against an oracle; and the assemblers, each
//! against one that is wrong, which has to show.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;

use hypercall::{GrantRef, PageOffset};
use netif::keys::{Features, QueueKey};
use netif::mac::MacAddr;
use netif::offload::Checksum;
use netif::rx::{self, RxPacket, RxVerdict};
use netif::slot::{RxId, RxRequest, RxResponse, TxFlags, TxId, TxRequest, TxResponse, TxStatus};
use netif::tx::{self, Verdict};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

type Judged = Result<(), TestCaseError>;

/// Whether a property fails on any of many values.
fn fails<S: Strategy>(strategy: &S, property: impl Fn(S::Value) -> Judged) -> bool {
    let config = Config { failure_persistence: None, ..Config::with_cases(3000) };
    TestRunner::new(config).run(strategy, property).is_err()
}

/// Addresses as text, and what is nearly one.
fn addresses() -> impl Strategy<Value = String> {
    let right = any::<[u8; 6]>().prop_map(|bytes| MacAddr(bytes).to_string());
    let near = (right.clone(), 0..17_usize, prop::sample::select(b"0aF:g-+. \0".to_vec()));
    let changed = near.prop_map(|(text, at, byte)| {
        let mut bytes = text.into_bytes();
        bytes[at] = byte;
        String::from_utf8(bytes).unwrap()
    });
    let longer = (right.clone(), "[0-9a-f: ]{1,3}").prop_map(|(text, more)| text + &more);
    let shorter = (right.clone(), 0..17_usize).prop_map(|(text, at)| text[..at].into());
    let upper = right.clone().prop_map(|text| text.to_uppercase());
    prop_oneof![right, upper, changed, longer, shorter, ".*"]
}

/// Six pairs of hexadecimal digits, and colons.
fn address(text: &str, parse: fn(&str) -> Option<MacAddr>) -> Judged {
    let pairs: Vec<_> = text.split(':').collect();
    let digits = |pair: &&str| pair.len() == 2 && pair.bytes().all(|it| it.is_ascii_hexdigit());
    let bytes: Vec<_> = match pairs.len() == 6 && pairs.iter().all(digits) {
        true => pairs.iter().map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect(),
        false => Vec::new(),
    };
    prop_assert_eq!(parse(text), bytes.try_into().ok().map(MacAddr));
    Ok(())
}

/// As C libraries read it: pairs may be of one digit, and what follows does not matter.
fn lax(text: &str) -> Option<MacAddr> {
    let pairs = text.split(':').take(6).map(|pair| u8::from_str_radix(pair, 16).ok());
    Some(MacAddr(pairs.collect::<Option<Vec<_>>>()?.try_into().ok()?))
}

#[test]
fn addresses_are_read_strictly() {
    assert!(!fails(&addresses(), |text| address(&text, |text| text.parse().ok())));
    assert!(fails(&addresses(), |text| address(&text, lax)));
    assert!(fails(&addresses(), |text| address(&text, |text| text.trim().parse().ok())));
}

/// A directory with some of the keys that say something, and some that do not.
fn directories() -> impl Strategy<Value = BTreeMap<&'static str, u32>> {
    let mut keys: Vec<_> = Features::KEYS.iter().map(|(_, key)| *key).collect();
    keys.extend(["feature-no-csum-offload", "multi-queue-max-queues", "feature-rx-flip", "mtu"]);
    prop::collection::btree_map(prop::sample::select(keys), 0..3_u32, 0..14)
}

fn offer(keys: &BTreeMap<&str, u32>, read: fn(&BTreeMap<&str, u32>) -> Features) -> Judged {
    let is_set = |key: &str| keys.get(key).is_some_and(|value| *value != 0);
    let offered = read(keys);
    for (feature, key) in Features::KEYS {
        prop_assert_eq!(offered.contains(feature), is_set(key), "{}", key);
    }
    // The only one that says what is not wanted.
    let csum = offered.contains(Features::IPV4_CSUM);
    prop_assert_eq!(csum, !is_set("feature-no-csum-offload"));
    let queues = offered.contains(Features::MULTI_QUEUE);
    prop_assert_eq!(queues, is_set("multi-queue-max-queues"));
    Ok(())
}

#[test]
fn what_an_end_offers_is_in_its_keys() {
    let right = |keys: &BTreeMap<&str, u32>| Features::offered(|key| keys.get(key).copied());
    assert!(!fails(&directories(), |keys| offer(&keys, right)));
    // A key that is there with 0 counts as there.
    let wrong = |keys: &BTreeMap<&str, u32>| Features::offered(|key| keys.get(key).map(|_| 1));
    assert!(fails(&directories(), |keys| offer(&keys, wrong)));
}

/// A chain by the rules, with at most as many follow-ons as are tolerated: sizes of the slots behind the head, which has
/// `head` bytes of its own.
fn chains() -> impl Strategy<Value = (u16, Vec<u16>)> {
    (0..100_u16, prop::collection::vec(0..200_u16, 0..20))
}

fn requests(head: u16, rest: &[u16]) -> Vec<TxRequest> {
    let request = |at: usize, size: u16| {
        let mut flags = TxFlags::empty();
        flags.set(TxFlags::MORE_DATA, at < rest.len());
        TxRequest { gref: GrantRef(at as u32), flags, id: TxId(at as u16), size, offset: 7 }
    };
    let total = head + rest.iter().sum::<u16>();
    let rest = rest.iter().zip(1..).map(|(size, at)| request(at, *size));
    std::iter::once(request(0, total)).chain(rest).collect()
}

type Assemble = fn(&[TxRequest]) -> (Vec<u16>, Vec<(TxId, TxStatus)>);

/// Sizes of the slots of a packet (none if it is dropped), and the answers.
fn assembled(requests: &[TxRequest]) -> (Vec<u16>, Vec<(TxId, TxStatus)>) {
    let verdict = tx::assemble(&mut requests.iter().copied()).unwrap().unwrap();
    let (sizes, answers, status) = match verdict {
        Verdict::Packet(packet) => {
            let sizes = packet.slots.iter().map(|slot| slot.size).collect();
            (sizes, packet.answers, TxStatus::OKAY)
        }
        Verdict::Drop { answers, .. } | Verdict::Multicast { answers, .. } => {
            (Vec::new(), answers, TxStatus::ERROR)
        }
    };
    (sizes, answers.responses(status).map(|it| (it.id, it.status)).collect())
}

fn chain((head, rest): (u16, Vec<u16>), assemble: Assemble) -> Judged {
    let requests = requests(head, &rest);
    let (sizes, answers) = assemble(&requests);
    let delivered = head >= 14 && rest.len() <= 18;
    let expected = if delivered { [vec![head], rest].concat() } else { Vec::new() };
    prop_assert_eq!(sizes, expected);
    let status = if delivered { TxStatus::OKAY } else { TxStatus::ERROR };
    let owed: Vec<_> = requests.iter().map(|request| (request.id, status)).collect();
    prop_assert_eq!(answers, owed);
    Ok(())
}

#[test]
fn a_chain_is_delivered_whole_or_dropped_and_each_slot_answered() {
    assert!(!fails(&chains(), |it| chain(it, assembled)));
    // The head with all bytes to itself, as if it said its own size.
    assert!(fails(&chains(), |it| chain(it, |requests| {
        let (mut sizes, answers) = assembled(requests);
        if let Some(first) = sizes.first_mut() {
            *first = requests[0].size;
        }
        (sizes, answers)
    })));
    // The last slot of long chains forgotten.
    assert!(fails(&chains(), |it| chain(it, |requests| {
        let (sizes, mut answers) = assembled(requests);
        answers.truncate(18);
        (sizes, answers)
    })));
}

type Slots = fn(&RxPacket<'_>) -> usize;

/// A packet with so much room before it takes these slots and no more.
fn parts((len, headroom): (u16, u16), slots: Slots) -> Judged {
    let headroom = PageOffset::new(headroom).unwrap();
    let packet =
        RxPacket { pieces: &[], len, headroom, checksum: Checksum::Blank, gso: None, hash: None };
    let responses: Vec<_> = (0..slots(&packet))
        .filter_map(|at| Some((at as u16, packet.response(at, RxId(at as u16))?)))
        .collect();
    let RxVerdict { taken, packet: received } =
        rx::assemble(&mut responses.iter().copied()).unwrap().unwrap();
    prop_assert_eq!(usize::from(taken.count), slots(&packet));
    prop_assert_eq!(received.map(|packet| packet.size), Ok(len.into()));
    Ok(())
}

#[test]
fn a_packet_takes_as_many_slots_as_it_says() {
    let packets = (14_u16..=65_535, prop_oneof![Just(0_u16), Just(256), 0..500_u16]);
    assert!(!fails(&packets, |it| parts(it, |it| it.slots())));
    // Counted without the room that is left free.
    let wrong: Slots = |packet| {
        let extras = usize::from(packet.headroom != PageOffset::ZERO);
        usize::from(packet.len).div_ceil(4096) + extras
    };
    assert!(fails(&packets, |it| parts(it, wrong)));
}

proptest! {
    #[test]
    fn slots_keep_every_bit(words: [u32; 3]) {
        let [first, second, third] = words;
        prop_assert_eq!(TxRequest::decode(words).encode(), words);
        prop_assert_eq!(TxResponse::decode([first]).encode(), [first]);
        prop_assert_eq!(RxResponse::decode([first, second]).encode(), [first, second]);
        // Between id and reference there is padding.
        prop_assert_eq!(RxRequest::decode([first, third]).encode(), [first & 0xffff, third]);
    }

    #[test]
    fn keys_of_queues_are_below_their_queue(queue: u16, queues: u16, key in "[a-z-]{1,12}") {
        let text = QueueKey::new(queue, queues, &key).to_string();
        let expected = if queues > 1 { format!("queue-{queue}/{key}") } else { key };
        prop_assert_eq!(text, expected);
    }
}

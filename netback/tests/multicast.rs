//! Multicast control: what the store asks for, and what comes by the ring.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::raw::Raw;
use common::{MS, Machine, frame};
use netback::{Notice, VifFault};
use netif::keys::Features;
use netif::mac::MacAddr;
use netif::slot::{Extra, ExtraInfo, RxStatus, TxFlags, TxId, TxRequest, TxResponse, TxStatus};
use netif::tx::PeerFault;
use xenbus::device::State;

const REQUEST: &str = "request-multicast-control";

fn group(number: u8) -> [u8; 6] {
    [1, 0, 0x5e, 0, 0, number]
}

/// Two guests that carry, and a raw one which asks for what `request` says.
fn machine(request: Option<&str>) -> (Machine, usize, Raw) {
    let mut machine = Machine::two();
    let guest = machine.bare_guest();
    let mut raw = Raw::new(&machine.guests[guest], 0);
    let mut keys = raw.keys();
    keys.extend(request.map(|value| (REQUEST, value.to_string())));
    machine.offer(guest, &keys, "4");
    assert!(machine.is_connected(guest), "{:?}", machine.notices);
    raw.post(&machine.guests[guest], 100);
    open(&mut machine, &mut raw);
    (machine, guest, raw)
}

/// Shows the pages that were posted, and waits until it is forgiven that they were news to nobody.
fn open(machine: &mut Machine, raw: &mut Raw) {
    raw.go();
    machine.settle();
    machine.pass(10 * MS);
}

/// Whether a packet to `dst` reaches the raw guest; it reaches the other in any case.
fn hears(machine: &mut Machine, raw: &mut Raw, dst: [u8; 6]) -> bool {
    let sent = frame(dst, machine.guests[0].mac(), 200, 9);
    machine.guests[1].take();
    machine.guests[0].send(&sent);
    machine.settle();
    if dst[0] & 1 != 0 {
        assert_eq!(machine.guests[1].take().len(), 1);
    }
    raw.rx.poll().unwrap();
    let got: Vec<_> = raw.rx.responses().map(|(_, response)| response.status).collect();
    assert!(got.is_empty() || got == [RxStatus(200)], "{got:?}");
    !got.is_empty()
}

fn change(machine: &mut Machine, raw: &mut Raw, infos: &[ExtraInfo]) -> TxStatus {
    raw.push(raw.request(5, 0, 0, TxFlags::EXTRA_INFO));
    for (index, info) in infos.iter().enumerate() {
        let more = index + 1 < infos.len();
        raw.push(TxRequest::from_extra(Extra { more, info: *info }));
    }
    raw.go();
    machine.settle();
    let responses = raw.responses();
    let null = TxResponse { id: TxId(0), status: TxStatus::NULL };
    assert_eq!(responses[0].id, TxId(5));
    assert_eq!(responses[1..], vec![null; infos.len()]);
    responses[0].status
}

fn add(number: u8) -> ExtraInfo {
    ExtraInfo::McastAdd(MacAddr(group(number)))
}

fn remove(number: u8) -> ExtraInfo {
    ExtraInfo::McastDel(MacAddr(group(number)))
}

fn agreed(machine: &Machine, guest: usize) -> bool {
    machine.status(guest).unwrap().features.contains(Features::MULTICAST_CONTROL)
}

#[test]
fn asked_for_before_connecting() {
    let (mut machine, guest, mut raw) = machine(Some("1"));
    assert!(agreed(&machine, guest));
    assert!(!hears(&mut machine, &mut raw, group(1)));
    assert_eq!(machine.status(guest).unwrap().counters.rx_drops.filtered, 1);
    assert_eq!(change(&mut machine, &mut raw, &[add(1)]), TxStatus::OKAY);
    assert!(hears(&mut machine, &mut raw, group(1)));
    assert!(!hears(&mut machine, &mut raw, group(2)));
    // Broadcast and what is not for a group at all.
    assert!(hears(&mut machine, &mut raw, [0xff; 6]));
    assert!(hears(&mut machine, &mut raw, [2, 0, 0, 0, 0, 77]));
    assert_eq!(change(&mut machine, &mut raw, &[remove(1)]), TxStatus::OKAY);
    assert!(!hears(&mut machine, &mut raw, group(1)));
    // Of several in one request an addition counts, and no more than one.
    assert_eq!(change(&mut machine, &mut raw, &[add(3), remove(3)]), TxStatus::OKAY);
    assert!(hears(&mut machine, &mut raw, group(3)));
    machine.assert_carries(0, 1);
}

#[test]
fn asked_for_at_any_time() {
    let (mut machine, guest, mut raw) = machine(None);
    assert!(hears(&mut machine, &mut raw, group(1)));
    // The filter may be made first.
    assert_eq!(change(&mut machine, &mut raw, &[add(2)]), TxStatus::OKAY);
    assert!(hears(&mut machine, &mut raw, group(1)));
    for _ in 0..3 {
        machine.offer(guest, &[(REQUEST, "1".into())], "4");
        assert!(agreed(&machine, guest));
        assert!(
            !hears(&mut machine, &mut raw, group(1)) && hears(&mut machine, &mut raw, group(2))
        );
        machine.offer(guest, &[(REQUEST, "0".into())], "4");
        assert!(!agreed(&machine, guest));
        assert!(hears(&mut machine, &mut raw, group(1)));
    }
    // What cannot be read asks for nothing, as does what is not there.
    for value in ["x", "", "-1", " 1"] {
        machine.offer(guest, &[(REQUEST, "1".into())], "4");
        machine.offer(guest, &[(REQUEST, value.into())], "4");
        assert!(hears(&mut machine, &mut raw, group(1)), "{value:?}");
    }
    machine.offer(guest, &[(REQUEST, "1".into())], "4");
    let path = format!("{}/{REQUEST}", common::front(machine.guests[guest].id));
    machine.remove(&path);
    assert!(hears(&mut machine, &mut raw, group(1)));
    assert!(machine.is_connected(guest));
    assert_eq!(machine.take_notices(guest).len(), 2, "offered and connected, nothing else");
}

#[test]
fn the_filter_ends_with_the_connection() {
    let (mut machine, guest, mut raw) = machine(Some("1"));
    change(&mut machine, &mut raw, &[add(1)]);
    assert!(hears(&mut machine, &mut raw, group(1)));
    machine.set_state(guest, "6");
    machine.set_state(guest, "1");
    let mut raw = Raw::new(&machine.guests[guest], 0);
    machine.offer(guest, &raw.keys(), "4");
    raw.post(&machine.guests[guest], 10);
    open(&mut machine, &mut raw);
    assert!(agreed(&machine, guest), "the key is still there");
    assert!(!hears(&mut machine, &mut raw, group(1)));
    machine.set_state(guest, "6");
    machine.assert_let_go(guest);
}

#[test]
fn hostile_23_the_filter_is_full() {
    let (mut machine, guest, mut raw) = machine(Some("1"));
    for number in 0..64 {
        assert_eq!(change(&mut machine, &mut raw, &[add(number)]), TxStatus::OKAY);
    }
    for number in 64..200 {
        assert_eq!(change(&mut machine, &mut raw, &[add(number)]), TxStatus::ERROR);
    }
    assert!(hears(&mut machine, &mut raw, group(63)) && !hears(&mut machine, &mut raw, group(64)));
    // What is there takes no more room.
    assert_eq!(change(&mut machine, &mut raw, &[add(5)]), TxStatus::OKAY);
    assert_eq!(change(&mut machine, &mut raw, &[remove(0)]), TxStatus::OKAY);
    assert_eq!(change(&mut machine, &mut raw, &[add(64)]), TxStatus::OKAY);
    assert!(hears(&mut machine, &mut raw, group(64)) && !hears(&mut machine, &mut raw, group(0)));
    assert!(machine.is_connected(guest));
    machine.assert_carries(0, 1);
}

#[test]
fn hostile_23_multicast_with_a_packet() {
    let (mut machine, guest, mut raw) = machine(Some("1"));
    raw.push(raw.request(5, 0, 100, TxFlags::EXTRA_INFO | TxFlags::MORE_DATA));
    raw.push(TxRequest::from_extra(Extra { more: false, info: add(1) }));
    raw.push_plain(6, 100);
    raw.go();
    machine.settle();
    let notices = machine.take_notices(guest);
    let fault = VifFault::Peer(PeerFault::MulticastWithData);
    assert!(notices.iter().any(|it| matches!(it, Notice::Faulted(_, f) if *f == fault)));
    assert_eq!(machine.states(guest).1, State::Closing);
    machine.assert_let_go(guest);
    machine.assert_carries(0, 1);
}

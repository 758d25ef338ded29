//! What changes while a vif is connected: room for XDP, and the rate.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::raw::Raw;
use common::{MS, Machine, SECOND, back, frame};
use grant::SharedMemory;
use hypercall::Handle;
use netfront::{Config, Meta};
use netif::keys::Features;
use netif::slot::{ExtraInfo, RxFlags, RxResponse};
use xenbus::device::State;

fn machine(headroom: Option<&str>) -> (Machine, usize, Raw) {
    let mut machine = Machine::two();
    let guest = machine.bare_guest();
    let raw = Raw::new(&machine.guests[guest], 0);
    let mut keys = raw.keys();
    keys.extend(headroom.map(|value| ("xdp-headroom", value.to_string())));
    machine.offer(guest, &keys, "4");
    assert!(machine.is_connected(guest), "{:?}", machine.notices);
    (machine, guest, raw)
}

/// Sends a packet to the raw guest, which posts so many pages, and reads it there, past `headroom`.
fn assert_arrives(
    machine: &mut Machine,
    guest: usize,
    raw: &mut Raw,
    len: usize,
    pages: usize,
    headroom: u16,
) {
    raw.post(&machine.guests[guest], pages);
    raw.go();
    let sent = frame(machine.guests[guest].mac(), machine.guests[0].mac(), len, 3);
    let blank = Meta::default();
    machine.guests[0].frontend().send(0, &sent, blank).unwrap();
    machine.settle();
    raw.rx.poll().unwrap();
    let first = raw.rx_data.len() - pages;
    let mut got = Vec::new();
    let mut responses: Vec<RxResponse> = raw.rx.responses().map(|(_, it)| it).collect();
    assert_eq!(responses.len(), pages);
    if headroom > 0 {
        assert!(responses[0].flags.contains(RxFlags::EXTRA_INFO));
        let extra = responses.remove(1).as_extra().unwrap();
        assert_eq!((extra.more, extra.info), (false, ExtraInfo::Xdp { headroom }));
    }
    let places = (0..pages).filter(|place| headroom == 0 || *place != 1);
    for (place, response) in places.zip(&responses) {
        assert_eq!(response.offset, headroom);
        let mut part = vec![0; response.status.bytes().unwrap().into()];
        let page = &raw.rx_data[first + place];
        page.read_bytes(headroom.into(), &mut part);
        got.extend(part);
        let mut before = vec![1; headroom.into()];
        page.read_bytes(0, &mut before);
        assert!(before.iter().all(|byte| *byte == 0), "the room is left alone");
    }
    assert!(got == sent, "{} {}", got.len(), sent.len());
}

fn agreed(machine: &Machine, guest: usize) -> bool {
    machine.status(guest).unwrap().features.contains(Features::XDP_HEADROOM)
}

#[test]
fn headroom_from_the_start() {
    let (mut machine, guest, mut raw) = machine(Some("256"));
    assert!(agreed(&machine, guest));
    assert_arrives(&mut machine, guest, &mut raw, 60, 2, 256);
    assert_arrives(&mut machine, guest, &mut raw, 1514, 2, 256);
    assert_arrives(&mut machine, guest, &mut raw, 3840, 2, 256);
    assert_arrives(&mut machine, guest, &mut raw, 3841, 3, 256);
    assert_arrives(&mut machine, guest, &mut raw, 60_000, 17, 256);
    machine.set_state(guest, "6");
    machine.assert_let_go(guest);
}

#[test]
fn headroom_makes_the_page_smaller_for_a_guest_that_takes_one_page() {
    let mut machine = Machine::two();
    let guest = machine.bare_guest();
    let mut raw = Raw::new(&machine.guests[guest], 0);
    let mut keys = raw.keys();
    keys.retain(|(key, _)| *key != "feature-sg");
    keys.push(("xdp-headroom", "256".into()));
    machine.offer(guest, &keys, "4");
    assert_arrives(&mut machine, guest, &mut raw, 3840, 2, 256);
    let sent = frame(machine.guests[guest].mac(), machine.guests[0].mac(), 3841, 3);
    machine.guests[0].frontend().send(0, &sent, Meta::default()).unwrap();
    machine.settle();
    assert_eq!(machine.status(guest).unwrap().counters.rx_drops.too_big, 1);
}

/// Linux's netfront: xdp-headroom, 7; on 8, 4. No packet is lost, no ring is touched.
#[test]
fn headroom_comes_and_goes_while_connected() {
    let (mut machine, guest, mut raw) = machine(None);
    assert_arrives(&mut machine, guest, &mut raw, 1514, 1, 0);
    for (asked, granted) in
        [("256", 256), ("0", 0), ("16", 16), ("65535", 646), ("x", 0), ("1", 1), ("", 0)]
    {
        machine.offer(guest, &[("xdp-headroom", asked.into())], "7");
        assert_eq!(machine.states(guest).1, State::Reconfigured, "{asked:?}");
        let pages = if granted > 0 { 2 } else { 1 };
        assert_arrives(&mut machine, guest, &mut raw, 1514, pages, granted);
        machine.set_state(guest, "4");
        assert_eq!(machine.states(guest).1, State::Connected, "{asked:?}");
        assert_arrives(&mut machine, guest, &mut raw, 1514, pages, granted);
        assert_eq!(agreed(&machine, guest), granted > 0);
    }
    assert_eq!(machine.take_notices(guest).len(), 2, "offered and connected, nothing else");
    machine.assert_carries(0, 1);
}

#[test]
fn a_key_alone_changes_nothing() {
    let (mut machine, guest, mut raw) = machine(None);
    machine.offer(guest, &[("xdp-headroom", "256".into())], "4");
    assert_arrives(&mut machine, guest, &mut raw, 1514, 1, 0);
}

/// Hostile: reconfiguring without end, and from states where there is nothing to reconfigure.
#[test]
fn hostile_71_reconfiguring_without_end() {
    let (mut machine, guest, _) = machine(None);
    for _ in 0..100 {
        machine.set_state(guest, "7");
        assert_eq!(machine.states(guest).1, State::Reconfigured);
    }
    machine.set_state(guest, "5");
    assert_eq!(machine.states(guest).1, State::Closing);
    machine.assert_let_go(guest);
    machine.set_state(guest, "7");
    assert_eq!(machine.states(guest).1, State::Closing);
    machine.set_state(guest, "6");
    machine.set_state(guest, "1");
    machine.set_state(guest, "7");
    assert_eq!(machine.states(guest).1, State::InitWait);
    let mut raw = Raw::new(&machine.guests[guest], 0);
    machine.offer(guest, &raw.keys(), "4");
    assert_arrives(&mut machine, guest, &mut raw, 100, 1, 0);
    machine.assert_carries(0, 1);
}

#[test]
fn a_frontend_that_breaks_the_ring_while_reconfiguring_is_closed() {
    let (mut machine, guest, mut raw) = machine(None);
    machine.set_state(guest, "7");
    raw.rewrite(netif::ring::layout::REQ_PROD, 400);
    raw.channel.notify().unwrap();
    machine.settle();
    assert_eq!(machine.states(guest).1, State::Closing);
    machine.assert_let_go(guest);
    machine.assert_carries(0, 1);
    raw.rx_data.clear();
}

#[test]
fn hostile_64_headroom_that_is_no_number_is_refused() {
    for value in ["x", "", "-1", "4294967296", "0x100"] {
        let mut machine = Machine::two();
        let guest = machine.bare_guest();
        let raw = Raw::new(&machine.guests[guest], 0);
        let mut keys = raw.keys();
        keys.push(("xdp-headroom", value.into()));
        machine.offer(guest, &keys, "4");
        assert_eq!(machine.states(guest).1, State::Closing, "{value:?}");
        machine.assert_let_go(guest);
    }
}

/// Packets of 1,000 bytes that get through in a second when as many as will go are sent.
fn per_second(machine: &mut Machine, from: usize, to: usize) -> usize {
    let bytes = frame(machine.guests[to].mac(), machine.guests[from].mac(), 1000, 1);
    machine.guests[to].take();
    let mut got = 0;
    for _ in 0..100 {
        for _ in 0..20 {
            let _ = machine.guests[from].frontend().send(0, &bytes, Meta::default());
        }
        machine.settle();
        machine.pass(10 * MS);
        got += machine.guests[to].take().len();
    }
    got
}

#[test]
fn the_rate_changes_under_traffic() {
    let mut machine = Machine::two();
    let path = format!("{}/rate", back(machine.guests[0].id));
    let unlimited = per_second(&mut machine, 0, 1);
    assert_eq!(unlimited, 2000);
    machine.write(&path, "10000,100000");
    // 100 a second, and an interval's worth of what was saved.
    let limited = per_second(&mut machine, 0, 1);
    assert!((90..=120).contains(&limited), "{limited}");
    machine.write(&path, "50000,100000");
    let faster = per_second(&mut machine, 0, 1);
    assert!((450..=560).contains(&faster), "{faster}");
    // The other way is not limited, and neither are others.
    assert_eq!(per_second(&mut machine, 1, 0), 2000);
    // None at all: nothing passes, until there is another.
    machine.write(&path, "0,100000");
    machine.pass(SECOND);
    machine.guests[1].take();
    let nothing = per_second(&mut machine, 0, 1);
    assert!(nothing <= 1, "{nothing}");
    for open in ["garbage", "10000,0"] {
        machine.write(&path, "0,100000");
        machine.write(&path, open);
        machine.settle();
        machine.guests[1].take();
        assert!(per_second(&mut machine, 0, 1) >= 1900, "{open}");
    }
    machine.write(&path, "0,100000");
    machine.remove(&path);
    assert!(per_second(&mut machine, 0, 1) >= 1900);
    machine.pass(SECOND);
    machine.assert_carries(0, 1);
    machine.assert_no_buffer_out();
}

#[test]
fn a_rate_that_came_meanwhile_holds_for_the_next_connection() {
    let mut machine = Machine::new();
    let guest = machine.bare_guest();
    machine.write(&format!("{}/rate", back(machine.guests[guest].id)), "10000,100000");
    machine.start(guest, Config::new(Handle(0)));
    let other = machine.plain_guest();
    let limited = per_second(&mut machine, guest, other);
    assert!((90..=120).contains(&limited), "{limited}");
}

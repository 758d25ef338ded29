//! Frontends that receive against the rules, and what is refused at the door.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::num::{NonZeroU16, NonZeroUsize};
use std::sync::atomic::Ordering;

use common::raw::Raw;
use common::{Machine, SECOND, frame};
use grant::SharedMemory;
use hypercall::{DomId, Errno, GrantRef, GrantStatus, Handle};
use netback::{Notice, Refusal, VifFault};
use netfront::{Config, Meta};
use netif::offload::{Checksum, Gso, IpVersion};
use netif::ring::{RingFault, layout};
use netif::rx::failed;
use netif::slot::{RxFlags, RxId, RxRequest, RxResponse, RxStatus, TxFlags, TxId, TxRequest};
use netif::tx::PeerFault;
use sim::{Fault, FaultPlan, Kind};
use xenbus::device::State;

fn machine() -> (Machine, usize, Raw) {
    let small_buffers = NonZeroUsize::new(2048).unwrap();
    let mut machine = Machine::with(netback::Config { small_buffers, ..common::config() });
    // What guests send is copied, so that it is known which copy is which.
    let config = Config { static_grants: false, ..Config::new(Handle(0)) };
    machine.guest(config);
    machine.guest(config);
    machine.assert_carries(0, 1);
    let (guest, mut raw) = machine.raw();
    // Known to the switch.
    let hello = frame([0xff; 6], machine.guests[guest].mac(), 60, 0);
    raw.data.write_bytes(0, &hello);
    raw.push_plain(0, 60);
    raw.go();
    machine.settle();
    machine.guests[0].take();
    machine.guests[1].take();
    machine.take_notices(guest);
    machine.assert_no_buffer_out();
    (machine, guest, raw)
}

fn assert_clean(machine: &mut Machine, guest: usize) {
    machine.assert_let_go(guest);
    machine.assert_unnoticed(&[guest]);
    machine.assert_carries(0, 1);
    machine.assert_no_buffer_out();
}

/// Guest 0 sends a packet to the hostile guest.
fn send_to(machine: &mut Machine, guest: usize, len: usize) -> Vec<u8> {
    let sent = frame(machine.guests[guest].mac(), machine.guests[0].mac(), len, 3);
    machine.guests[0].send(&sent);
    machine.settle();
    sent
}

fn responses(raw: &mut Raw) -> Vec<(u16, RxResponse)> {
    raw.rx.poll().unwrap();
    raw.rx.responses().collect()
}

/// Posts a page, sends a packet and finds it there; then closes.
fn assert_goes_on(machine: &mut Machine, guest: usize, raw: &mut Raw) {
    assert_eq!(machine.take_notices(guest), []);
    raw.post(&machine.guests[guest], 1);
    raw.go();
    machine.settle();
    let sent = send_to(machine, guest, 700);
    let got = responses(raw);
    assert_eq!(got.last().unwrap().1.status, RxStatus(700));
    let mut bytes = vec![0; 700];
    raw.rx_data.last().unwrap().read_bytes(0, &mut bytes);
    assert!(bytes == sent);
    machine.set_state(guest, "6");
    assert_clean(machine, guest);
}

#[test]
fn hostile_35_producer_further_than_the_ring() {
    for (producer, fault) in [
        (257, RingFault::Overrun { index: 257, ahead: 257, limit: 256 }),
        (u32::MAX, RingFault::MovedBack { from: 0, to: u32::MAX }),
    ] {
        let (mut machine, guest, raw) = machine();
        raw.rx_page.store_u32(layout::REQ_PROD, producer, Ordering::SeqCst);
        send_to(&mut machine, guest, 100);
        let vif = machine.status(guest).unwrap().id;
        let fault = VifFault::Peer(PeerFault::Ring(fault));
        let expected = [Notice::Faulted(vif, fault), Notice::Disconnected(vif)];
        assert_eq!(machine.take_notices(guest), expected);
        assert_eq!(machine.states(guest).1, State::Closing);
        assert_clean(&mut machine, guest);
    }
}

#[test]
fn hostile_36_no_page_is_ever_posted() {
    let (mut machine, guest, mut raw) = machine();
    for _ in 0..600 {
        send_to(&mut machine, guest, 60);
    }
    let pools = machine.backend.pools();
    assert!((1..=512).contains(&pools.all().out()));
    machine.pass(11 * SECOND);
    let counters = machine.status(guest).unwrap().counters;
    assert_eq!(counters.rx.packets, 0);
    let drops = counters.rx_drops;
    assert_eq!(drops.queue_full + drops.expired + drops.no_buffer, 600);
    machine.assert_no_buffer_out();
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_37_a_packet_waits_for_all_its_slots() {
    let (mut machine, guest, mut raw) = machine();
    // Three pages of data, and a slot for the extra.
    raw.post(&machine.guests[guest], 3);
    raw.go();
    let mut bytes = frame(machine.guests[guest].mac(), machine.guests[0].mac(), 12_000, 3);
    bytes[12..34].copy_from_slice(&[
        0x08, 0, 0x45, 0, 0x2e, 0xd2, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    bytes[46] = 0x50;
    let gso = Some(Gso { size: NonZeroU16::new(1000).unwrap(), version: IpVersion::V4 });
    let meta = Meta { checksum: Checksum::Blank, gso };
    machine.guests[0].frontend().send(0, &bytes, meta).unwrap();
    machine.settle();
    assert_eq!(responses(&mut raw), [], "one slot short");
    raw.post(&machine.guests[guest], 1);
    raw.go();
    machine.settle();
    let got = responses(&mut raw);
    assert_eq!(got.len(), 4);
    assert!(got[0].1.flags.contains(RxFlags::EXTRA_INFO | RxFlags::MORE_DATA));
    let mut arrived = Vec::new();
    for index in [0, 2, 3] {
        let (slot, response) = got[index];
        assert_eq!(response.id.0, slot);
        let mut part = vec![0; usize::from(response.status.bytes().unwrap())];
        raw.rx_data[usize::from(slot)].read_bytes(0, &mut part);
        arrived.extend(part);
    }
    assert!(arrived == bytes);
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_37_so_does_each_of_several_packets() {
    let (mut machine, guest, mut raw) = machine();
    for _ in 0..2 {
        send_to(&mut machine, guest, 8000);
    }
    raw.post(&machine.guests[guest], 3);
    raw.go();
    machine.settle();
    assert_eq!(responses(&mut raw).len(), 2, "the third page is not enough for the second");
    raw.post(&machine.guests[guest], 1);
    raw.go();
    machine.settle();
    assert_eq!(responses(&mut raw).len(), 2);
    assert_eq!(machine.status(guest).unwrap().counters.rx.packets, 2);
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_38_pages_that_cannot_be_written() {
    let (mut machine, guest, mut raw) = machine();
    let read_only = machine.guests[guest].page(true);
    let foreign = machine.guests[guest].page_for(machine.guests[0].id, false);
    for gref in [read_only.gref(), foreign.gref(), GrantRef(400), GrantRef(u32::MAX)] {
        let id = RxId(0x1234);
        raw.rx.push(RxRequest { id, gref }).unwrap();
        raw.go();
        machine.settle();
        send_to(&mut machine, guest, 100);
        let got = responses(&mut raw);
        assert_eq!(got.len(), 1);
        assert_eq!(got[0].1, failed(id), "the error names the request");
    }
    assert_eq!(machine.status(guest).unwrap().counters.rx_drops.grant, 4);
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_39_the_last_page_of_a_packet_is_bad() {
    let (mut machine, guest, mut raw) = machine();
    raw.post(&machine.guests[guest], 2);
    raw.rx.push(RxRequest { id: RxId(2), gref: GrantRef(400) }).unwrap();
    raw.go();
    machine.settle();
    send_to(&mut machine, guest, 10_000);
    let got = responses(&mut raw);
    assert_eq!(got, [0, 1, 2].map(|slot| (slot, failed(RxId(slot)))), "all of it failed");
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn copies_to_the_guest_that_xen_refuses() {
    let (mut machine, guest, mut raw) = machine();
    for (round, fault) in
        [Fault::Untouched, Fault::Status(GrantStatus(1)), Fault::Errno(Errno::FAULT)]
            .into_iter()
            .enumerate()
    {
        raw.post(&machine.guests[guest], 1);
        raw.go();
        machine.settle();
        // The first call or operation takes the packet from guest 0.
        machine.sim.inject(DomId(0), FaultPlan::nth(Kind::Copy, 1, fault));
        send_to(&mut machine, guest, 100);
        assert_eq!(machine.sim.faults_left(DomId(0)), 0);
        let slot = round as u16;
        assert_eq!(responses(&mut raw), [(slot, failed(RxId(slot)))], "{fault:?}");
    }
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_41_a_guest_sends_to_itself() {
    let (mut machine, guest, mut raw) = machine();
    let own = machine.guests[guest].mac();
    raw.data.write_bytes(0, &frame(own, own, 500, 1));
    for id in 1..50 {
        raw.push_plain(id, 500);
    }
    raw.go();
    machine.settle();
    assert_eq!(responses(&mut raw), []);
    assert_eq!(machine.backend.switch_counters().hairpin, 49);
    machine.assert_no_buffer_out();
    assert_goes_on(&mut machine, guest, &mut raw);
}

/// Connects with the keys that `edit` makes of good ones, and answers why it is refused.
fn refused(
    edit: impl Fn(&Machine, usize, &mut Vec<(&'static str, String)>) -> Box<dyn std::any::Any>,
) -> Refusal {
    let mut machine = Machine::two();
    let guest = machine.bare_guest();
    let raw = Raw::new(&machine.guests[guest], 0);
    let mut keys = raw.keys();
    let _kept = edit(&machine, guest, &mut keys);
    machine.offer(guest, &keys, "4");
    let mut notices = machine.take_notices(guest);
    assert_eq!(machine.states(guest).1, State::Closing);
    assert_clean(&mut machine, guest);
    match notices.pop() {
        Some(Notice::Refused(_, refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

fn put(keys: &mut Vec<(&'static str, String)>, key: &'static str, value: impl ToString) {
    keys.retain(|(name, _)| *name != key);
    keys.push((key, value.to_string()));
}

#[test]
fn hostile_67_rings_that_are_not_to_be_had() {
    for key in ["tx-ring-ref", "rx-ring-ref"] {
        let read_only = refused(|machine, guest, keys| {
            let page = machine.guests[guest].page(true);
            put(keys, key, page.gref());
            Box::new(page)
        });
        let foreign = refused(|machine, guest, keys| {
            let page = machine.guests[guest].page_for(machine.guests[1].id, false);
            put(keys, key, page.gref());
            Box::new(page)
        });
        let nothing = refused(|_, _, keys| {
            put(keys, key, u32::MAX);
            Box::new(())
        });
        for refusal in [read_only, foreign, nothing] {
            assert!(matches!(refusal, Refusal::Map { key: of, .. } if of == key), "{refusal:?}");
        }
    }
}

#[test]
fn hostile_68_ports_that_are_not_to_be_had() {
    for key in ["event-channel", "event-channel-rx"] {
        let both = |keys: &mut Vec<(&'static str, String)>, good: u32, bad: u32| {
            if key == "event-channel-rx" {
                put(keys, "event-channel-tx", good);
            }
            put(keys, key, bad);
        };
        let foreign = refused(|machine, guest, keys| {
            let binder = machine.guests[guest].upcalls.binder();
            let good = binder.alloc_unbound(DomId(0)).unwrap();
            let bad = binder.alloc_unbound(machine.guests[1].id).unwrap();
            both(keys, good.port().0, bad.port().0);
            Box::new((good, bad))
        });
        let nothing = refused(|machine, guest, keys| {
            let good = machine.guests[guest].upcalls.binder().alloc_unbound(DomId(0)).unwrap();
            both(keys, good.port().0, 4000);
            Box::new(good)
        });
        for refusal in [foreign, nothing] {
            assert!(matches!(refusal, Refusal::Bind { key: of, .. } if of == key), "{refusal:?}");
        }
    }
    // One port of its own, twice.
    let twice = refused(|machine, guest, keys| {
        let good = machine.guests[guest].upcalls.binder().alloc_unbound(DomId(0)).unwrap();
        put(keys, "event-channel-tx", good.port());
        put(keys, "event-channel-rx", good.port());
        Box::new(good)
    });
    assert!(matches!(twice, Refusal::Bind { key: "event-channel-rx", .. }), "{twice:?}");
}

/// Hypercalls of the handshake that fail: all or nothing, and the next attempt may succeed.
#[test]
fn refused_by_xen_in_the_middle() {
    for kind in [Kind::Map, Kind::BindInterdomain, Kind::Window] {
        for passed in 0..2 {
            let mut machine = Machine::two();
            let guest = machine.bare_guest();
            let raw = Raw::new(&machine.guests[guest], 0);
            let plan = FaultPlan::nth(kind, passed, Fault::Errno(Errno::NOMEM));
            machine.sim.inject(DomId(0), plan);
            machine.offer(guest, &raw.keys(), "4");
            if machine.sim.clear_faults(DomId(0)) > 0 {
                // It needs no more of that kind.
                assert!(machine.is_connected(guest));
                continue;
            }
            assert_eq!(machine.states(guest).1, State::Closing, "{kind:?} {passed}");
            assert_clean(&mut machine, guest);
            machine.set_state(guest, "6");
            machine.set_state(guest, "1");
            machine.pass(SECOND);
            machine.set_state(guest, "4");
            assert!(machine.is_connected(guest), "{kind:?} {passed}");
        }
    }
}

/// Rings full of anything at all: whatever becomes of their interface, the others carry on and nothing is left.
#[test]
fn slots_of_any_bytes() {
    let (mut machine, first, _raw) = machine();
    machine.destroy(first);
    machine.take_notices(first);
    let mut state = 1_u64;
    let mut random = move |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let (mut closed, mut open) = (0, 0);
    for round in 0..150 {
        let (guest, mut raw) = machine.raw_at(random(1 << 32) as u32);
        let good = [raw.data.gref(), raw.tx_page.gref(), raw.rx_page.gref(), GrantRef(7)];
        raw.data.write_bytes(0, &frame([0xff; 6], machine.guests[guest].mac(), 4096, round));
        for _ in 0..random(60) + 1 {
            let mut some =
                |limit: u64| if random(200) == 0 { random(65_536) } else { random(limit) };
            let request = TxRequest {
                gref: good[some(4) as usize % 4],
                offset: some(2000) as u16,
                flags: TxFlags::from_bits_retain(some(4) as u16),
                id: TxId(some(256) as u16),
                size: some(2000) as u16,
            };
            raw.push(request);
        }
        for slot in 0..random(40) {
            let gref = good[random(4) as usize];
            raw.rx.push(RxRequest { id: RxId(slot as u16), gref }).unwrap();
        }
        raw.go();
        machine.settle();
        for len in [60, 5000, 65_535] {
            send_to(&mut machine, 1, len);
            send_to(&mut machine, guest, len);
        }
        if machine.is_connected(guest) {
            open += 1;
        } else {
            closed += 1;
            machine.assert_let_go(guest);
        }
        machine.destroy(guest);
        assert_clean(&mut machine, guest);
        machine.take_notices(guest);
        machine.guests[0].take();
        machine.guests[1].take();
        machine.guests.truncate(2);
    }
    assert!(closed > 10 && open > 10, "{closed} closed, {open} not");
}

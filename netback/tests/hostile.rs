//! Frontends that break the protocol, one test for each way. Whatever one does: the other interfaces carry on, and in the
//! end nothing of it is held.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::num::NonZeroU16;
use std::sync::atomic::Ordering;

use common::raw::{Page, Raw};
use common::{MS, Machine, SECOND, frame};
use grant::SharedMemory;
use hypercall::abi::GrantEntryV1;
use hypercall::{DomId, Errno, GrantRef, GrantStatus};
use netback::{Notice, Refusal, VifFault};
use netfront::Meta;
use netif::offload::{Checksum, Gso, GsoFault, IpVersion};
use netif::ring::{RingFault, layout};
use netif::slot::{Extra, ExtraInfo, GsoType, TxFlags, TxId, TxRequest, TxResponse, TxStatus};
use netif::tx::PeerFault;
use sim::{Fault, FaultPlan, Kind};
use xenbus::device::State;

const MORE: TxFlags = TxFlags::MORE_DATA;
const EXTRA: TxFlags = TxFlags::EXTRA_INFO;
const NONE: TxFlags = TxFlags::empty();

/// Two guests that know each other, and the hostile one, whose page holds a packet for guest 0.
fn machine() -> (Machine, usize, Raw) {
    machine_at(0)
}

fn machine_at(start: u32) -> (Machine, usize, Raw) {
    let mut machine = Machine::two();
    machine.assert_carries(0, 1);
    let (guest, raw) = machine.raw_at(start);
    raw.data.write_bytes(0, &packet(&machine, guest, 4096));
    machine.take_notices(guest);
    (machine, guest, raw)
}

/// A packet for guest 0.
fn packet(machine: &Machine, from: usize, len: usize) -> Vec<u8> {
    frame(machine.guests[0].mac(), machine.guests[from].mac(), len, 9)
}

/// The interface is closed for that reason, and no other is.
fn assert_closed(machine: &mut Machine, guest: usize, fault: VifFault) {
    let notices = machine.take_notices(guest);
    let vif = machine.status(guest).unwrap().id;
    assert_eq!(notices, [Notice::Faulted(vif, fault), Notice::Disconnected(vif)]);
    assert_eq!(machine.states(guest).1, State::Closing);
    assert_clean(machine, guest);
}

fn assert_peer(machine: &mut Machine, guest: usize, fault: PeerFault) {
    assert_closed(machine, guest, VifFault::Peer(fault));
}

fn assert_clean(machine: &mut Machine, guest: usize) {
    machine.assert_let_go(guest);
    machine.assert_unnoticed(&[guest]);
    machine.assert_carries(0, 1);
    machine.assert_no_buffer_out();
}

/// All goes on: what is sent now arrives. In the end the interface is closed in order.
fn assert_goes_on(machine: &mut Machine, guest: usize, raw: &mut Raw) {
    assert_eq!(machine.take_notices(guest), []);
    raw.responses();
    machine.guests[0].take();
    let sent = packet(machine, guest, 600);
    raw.data.write_bytes(0, &sent);
    raw.push_plain(999, 600);
    raw.go();
    machine.settle();
    assert!(machine.guests[0].take() == [(sent, Meta::default())]);
    assert_eq!(raw.responses(), [answer(999, TxStatus::OKAY)]);
    assert!(machine.is_connected(guest));
    machine.set_state(guest, "6");
    assert_clean(machine, guest);
}

fn answer(id: u16, status: TxStatus) -> TxResponse {
    TxResponse { id: TxId(id), status }
}

/// A chain: the sizes of the head's whole and of the follow-ons, ids from 0.
fn push_chain(raw: &mut Raw, total: u16, rest: &[u16]) {
    let more = |index: usize| if index < rest.len() { MORE } else { NONE };
    let head = raw.request(0, 0, total, more(0));
    raw.push(head);
    let mut offset = total.saturating_sub(rest.iter().sum());
    for (index, &size) in (1..).zip(rest) {
        let request = raw.request(index as u16, offset % 2048, size, more(index));
        raw.push(request);
        offset += size;
    }
}

fn push_extra(raw: &mut Raw, extra: Extra) {
    raw.push(TxRequest::from_extra(extra));
}

fn gso(size: u16, kind: GsoType) -> Extra {
    Extra { more: false, info: ExtraInfo::Gso { size, kind, features: 0 } }
}

fn run(machine: &mut Machine, raw: &mut Raw) {
    raw.go();
    machine.settle();
}

#[test]
fn hostile_01_producer_further_than_the_ring() {
    for ahead in [257, 1000, 1 << 31 | 5, u32::MAX] {
        let (mut machine, guest, raw) = machine();
        raw.rewrite(layout::REQ_PROD, ahead);
        raw.channel.notify().unwrap();
        machine.settle();
        let fault = if ahead.cast_signed() < 0 {
            RingFault::MovedBack { from: 0, to: ahead }
        } else {
            RingFault::Overrun { index: ahead, ahead, limit: 256 }
        };
        assert_peer(&mut machine, guest, fault.into());
    }
}

#[test]
fn hostile_02_producer_moves_back() {
    let (mut machine, guest, mut raw) = machine();
    for id in 0..5 {
        raw.push_plain(id, 100);
    }
    run(&mut machine, &mut raw);
    assert_eq!(raw.responses().len(), 5);
    raw.rewrite(layout::REQ_PROD, 3);
    raw.channel.notify().unwrap();
    machine.settle();
    assert_peer(&mut machine, guest, RingFault::MovedBack { from: 5, to: 3 }.into());
}

#[test]
fn hostile_03_overrun_at_attach() {
    for (producer, which) in [(257, 0), (5000, 1), (u32::MAX, 0)] {
        let mut machine = Machine::two();
        let guest = machine.bare_guest();
        let raw = Raw::new(&machine.guests[guest], 0);
        let page = if which == 0 { &raw.tx_page } else { &raw.rx_page };
        page.store_u32(layout::REQ_PROD, producer, Ordering::SeqCst);
        machine.offer(guest, &raw.keys(), "4");
        let notices = machine.take_notices(guest);
        assert!(
            matches!(notices.last(), Some(Notice::Refused(_, Refusal::Ring { .. }))),
            "{notices:?}"
        );
        assert_eq!(machine.states(guest).1, State::Closing);
        assert_clean(&mut machine, guest);
    }
}

#[test]
fn hostile_04_indices_that_wrap() {
    for start in [u32::MAX, u32::MAX - 100, u32::MAX - 255, i32::MAX as u32] {
        let (mut machine, guest, mut raw) = machine_at(start);
        for _ in 0..6 {
            for id in 0..100 {
                raw.push_plain(id, 100);
            }
            run(&mut machine, &mut raw);
            assert_eq!(raw.responses().len(), 100);
            assert_eq!(machine.guests[0].take().len(), 100);
        }
        assert_goes_on(&mut machine, guest, &mut raw);
    }
}

#[test]
fn hostile_05_the_backends_words_rewritten() {
    for at in (4..64).step_by(4) {
        // Its own event index is the frontend's to read; the other is the frontend's.
        let (mut machine, guest, mut raw) = machine();
        raw.rewrite(at, 0x5555_5555);
        raw.push_plain(0, 100);
        run(&mut machine, &mut raw);
        machine.pass(2 * SECOND);
        assert_eq!(machine.guests[0].take().len(), 1, "offset {at}");
        assert_eq!(machine.take_notices(guest), []);
        raw.rewrite(layout::REQ_EVENT, raw.published() + 1);
        assert_goes_on(&mut machine, guest, &mut raw);
    }
}

#[test]
fn hostile_06_first_slot_crosses_its_page() {
    for (offset, size) in [(4095, 60), (1, 4096), (65_535, 14), (0, 4097), (0, 65_535)] {
        let (mut machine, guest, mut raw) = machine();
        let request = raw.request(0, offset, size, NONE);
        raw.push(request);
        run(&mut machine, &mut raw);
        assert_peer(&mut machine, guest, PeerFault::CrossesPage { offset, size });
    }
}

#[test]
fn hostile_07_follow_on_crosses_its_page() {
    for (offset, size) in [(4095, 2), (4097, 0), (65_535, 1), (1, 4096)] {
        let (mut machine, guest, mut raw) = machine();
        let head = raw.request(0, 0, 5000, MORE);
        raw.push(head);
        let rest = raw.request(1, offset, size, NONE);
        raw.push(rest);
        run(&mut machine, &mut raw);
        assert_peer(&mut machine, guest, PeerFault::CrossesPage { offset, size });
    }
}

#[test]
fn hostile_08_more_data_and_no_slot() {
    let (mut machine, guest, mut raw) = machine();
    let head = raw.request(0, 0, 500, MORE);
    raw.push(head);
    run(&mut machine, &mut raw);
    assert_peer(&mut machine, guest, PeerFault::MissingSlot);
}

#[test]
fn hostile_09_19_slots_are_a_packet() {
    let (mut machine, guest, mut raw) = machine();
    push_chain(&mut raw, 200 + 18 * 50, &[50; 18]);
    run(&mut machine, &mut raw);
    let got = machine.guests[0].take();
    assert!(got[0].0 == packet(&machine, guest, 1100), "every byte");
    assert_eq!(raw.responses(), (0..19).map(|id| answer(id, TxStatus::OKAY)).collect::<Vec<_>>());
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_10_a_slot_or_two_too_many() {
    for rest in [19, 20] {
        let (mut machine, guest, mut raw) = machine();
        push_chain(&mut raw, 2000, &[50; 20][..rest]);
        run(&mut machine, &mut raw);
        let dropped: Vec<_> = (0..=rest as u16).map(|id| answer(id, TxStatus::ERROR)).collect();
        assert_eq!(raw.responses(), dropped);
        assert_eq!(machine.status(guest).unwrap().counters.tx_drops.too_many_slots, 1);
        assert_goes_on(&mut machine, guest, &mut raw);
    }
}

#[test]
fn hostile_11_far_too_many_slots() {
    for rest in [21, 100, 255] {
        let (mut machine, guest, mut raw) = machine();
        push_chain(&mut raw, 60_000, &vec![50; rest]);
        run(&mut machine, &mut raw);
        assert_peer(&mut machine, guest, PeerFault::TooManySlots);
    }
}

/// A packet that is dropped: each slot is answered with an error, and all goes on.
fn assert_dropped(total: u16, rest: &[u16], count: impl Fn(&netback::counters::Drops) -> u64) {
    let (mut machine, guest, mut raw) = machine();
    push_chain(&mut raw, total, rest);
    run(&mut machine, &mut raw);
    assert!(machine.guests[0].take().is_empty());
    let slots = 0..=rest.len() as u16;
    assert_eq!(raw.responses(), slots.map(|id| answer(id, TxStatus::ERROR)).collect::<Vec<_>>());
    assert_eq!(count(&machine.status(guest).unwrap().counters.tx_drops), 1);
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_12_follow_ons_hold_more_than_the_packet() {
    assert_dropped(100, &[101], |drops| drops.slots_too_long);
    assert_dropped(100, &[60, 60, 3000], |drops| drops.slots_too_long);
}

#[test]
fn hostile_13_first_slot_without_a_header() {
    assert_dropped(100, &[87], |drops| drops.short);
    assert_dropped(100, &[50, 50], |drops| drops.short);
}

#[test]
fn hostile_14_no_bytes_at_all() {
    assert_dropped(0, &[], |drops| drops.short);
    assert_dropped(13, &[], |drops| drops.short);
}

#[test]
fn hostile_15_headers_in_crumbs() {
    let (mut machine, guest, mut raw) = machine();
    let mut rest = [1; 18];
    rest[17] = 400;
    push_chain(&mut raw, 14 + 17 + 400, &rest);
    run(&mut machine, &mut raw);
    assert!(machine.guests[0].take()[0].0 == packet(&machine, guest, 431), "every byte");
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_16_extra_of_no_known_type() {
    for kind in [0, 6, 255] {
        let (mut machine, guest, mut raw) = machine();
        let head = raw.request(0, 0, 500, EXTRA);
        raw.push(head);
        raw.push(TxRequest { gref: GrantRef(kind.into()), ..TxRequest::default() });
        run(&mut machine, &mut raw);
        assert_peer(&mut machine, guest, PeerFault::UnknownExtra(kind));
    }
}

#[test]
fn hostile_17_extra_announced_and_not_there() {
    let (mut machine, guest, mut raw) = machine();
    let head = raw.request(0, 0, 500, EXTRA);
    raw.push(head);
    push_extra(&mut raw, Extra { more: true, ..gso(1000, GsoType::TCPV4) });
    run(&mut machine, &mut raw);
    assert_peer(&mut machine, guest, PeerFault::MissingExtra);
}

#[test]
fn hostile_18_extra_flag_on_a_follow_on() {
    let (mut machine, guest, mut raw) = machine();
    let (head, rest) = (raw.request(0, 0, 500, MORE), raw.request(1, 400, 100, EXTRA));
    raw.push(head);
    raw.push(rest);
    run(&mut machine, &mut raw);
    assert!(machine.guests[0].take()[0].0 == packet(&machine, guest, 500));
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_19_20_segmentation_that_means_nothing() {
    for (size, kind, fault) in [
        (0, GsoType::TCPV4, GsoFault::SizeZero),
        (1000, GsoType(0), GsoFault::UnknownType(0)),
        (1000, GsoType(3), GsoFault::UnknownType(3)),
        (1000, GsoType(255), GsoFault::UnknownType(255)),
    ] {
        let (mut machine, guest, mut raw) = machine();
        let head = raw.request(0, 0, 3000, EXTRA);
        raw.push(head);
        push_extra(&mut raw, gso(size, kind));
        run(&mut machine, &mut raw);
        assert_peer(&mut machine, guest, fault.into());
    }
}

/// A TCP packet over IPv4 of 3,000 bytes for guest 0.
fn tcp(machine: &Machine, guest: usize) -> Vec<u8> {
    let mut bytes = packet(machine, guest, 3000);
    bytes[12..34].copy_from_slice(&[
        0x08, 0, 0x45, 0, 0x0b, 0xaa, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    bytes[46] = 0x50;
    bytes
}

#[test]
fn hostile_21_segmentation_of_what_cannot_be_segmented() {
    type Spoil = (&'static str, u16, fn(&mut [u8]));
    let spoils: [Spoil; 5] = [
        ("not IP", 1000, |bytes| bytes[12] = 0x88),
        ("UDP", 1000, |bytes| bytes[23] = 17),
        ("a fragment", 1000, |bytes| bytes[20] = 0x20),
        ("options beyond the packet", 1000, |bytes| bytes[46] = 0),
        ("segments larger than all", 2947, |_| {}),
    ];
    for (what, size, spoil) in spoils {
        let (mut machine, guest, mut raw) = machine();
        let mut bytes = tcp(&machine, guest);
        spoil(&mut bytes);
        raw.data.write_bytes(0, &bytes);
        let head = raw.request(0, 0, 3000, EXTRA | TxFlags::CSUM_BLANK);
        raw.push(head);
        push_extra(&mut raw, gso(size, GsoType::TCPV4));
        run(&mut machine, &mut raw);
        assert!(machine.guests[0].take().is_empty(), "{what}");
        let responses = raw.responses();
        assert_eq!(responses[0], answer(0, TxStatus::ERROR), "{what}");
        assert_eq!(responses[1].status, TxStatus::NULL, "{what}");
        assert_eq!(machine.status(guest).unwrap().counters.tx_drops.not_segmentable, 1, "{what}");
        assert_goes_on(&mut machine, guest, &mut raw);
    }
}

#[test]
fn hostile_22_segmentation_without_a_blank_checksum() {
    let (mut machine, guest, mut raw) = machine();
    raw.data.write_bytes(0, &tcp(&machine, guest));
    let head = raw.request(0, 0, 3000, EXTRA);
    raw.push(head);
    push_extra(&mut raw, gso(1000, GsoType::TCPV4));
    run(&mut machine, &mut raw);
    let got = machine.guests[0].take();
    let gso = Gso { size: NonZeroU16::new(1000).unwrap(), version: IpVersion::V4 };
    assert_eq!(got[0].1, Meta { checksum: Checksum::Blank, gso: Some(gso) });
    assert_eq!(machine.status(guest).unwrap().counters.tx.fixed_up, 1);
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_23_multicast_with_data_or_past_the_filter() {
    let group = |number| ExtraInfo::McastAdd(netif::mac::MacAddr([1, 0, 0, 0, 0, number]));
    let add = |number| Extra { more: false, info: group(number) };
    let (mut machine, guest, mut raw) = machine();
    for number in 0..100 {
        let head = raw.request(5, 0, 0, EXTRA);
        raw.push(head);
        push_extra(&mut raw, add(number));
        run(&mut machine, &mut raw);
        let responses = raw.responses();
        let status = if number < 64 { TxStatus::OKAY } else { TxStatus::ERROR };
        assert_eq!(responses[0], answer(5, status));
        assert_eq!(responses[1].status, TxStatus::NULL);
    }
    assert_goes_on(&mut machine, guest, &mut raw);
    let (mut machine, guest, mut raw) = self::machine();
    let head = raw.request(5, 0, 0, EXTRA | MORE);
    raw.push(head);
    push_extra(&mut raw, add(0));
    run(&mut machine, &mut raw);
    assert_peer(&mut machine, guest, PeerFault::MulticastWithData);
}

/// A packet in two slots, of which the second names `bad`, between two good ones.
fn assert_bad_grant(bad: impl Fn(&Machine, usize) -> (GrantRef, Option<Page>)) {
    let (mut machine, guest, mut raw) = machine();
    let (gref, _kept) = bad(&machine, guest);
    raw.push_plain(0, 300);
    let (head, rest) = (raw.request(1, 0, 300, MORE), raw.request(2, 0, 100, NONE));
    raw.push(head);
    raw.push(TxRequest { gref, ..rest });
    raw.push_plain(3, 300);
    run(&mut machine, &mut raw);
    let got = machine.guests[0].take();
    assert_eq!(got.len(), 2, "never half a packet");
    assert!(got.iter().all(|(bytes, _)| *bytes == packet(&machine, guest, 300)));
    let (ok, bad) = (TxStatus::OKAY, TxStatus::ERROR);
    assert_eq!(raw.responses(), [answer(0, ok), answer(1, bad), answer(2, bad), answer(3, ok)]);
    assert_eq!(machine.status(guest).unwrap().counters.tx_drops.grant, 1);
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_24_references_that_were_never_granted() {
    for gref in [0, 8, 500, 511, 512, 100_000, u32::MAX] {
        // 8 may be one of its own; it is closed there, as the table hands out others first.
        assert_bad_grant(|machine, guest| {
            let gref = GrantRef(gref);
            machine.sim.set_grant_entry(machine.guests[guest].id, gref, GrantEntryV1::default());
            (gref, None)
        });
    }
}

#[test]
fn hostile_25_references_for_somebody_else() {
    assert_bad_grant(|machine, guest| {
        let page = machine.guests[guest].page_for(machine.guests[0].id, true);
        (page.gref(), Some(page))
    });
}

#[test]
fn hostile_26_references_revoked_before_the_copy() {
    assert_bad_grant(|machine, guest| {
        let page = machine.guests[guest].page(true);
        let (sim, id, gref) = (machine.sim.clone(), machine.guests[guest].id, page.gref());
        machine.hv.before(Kind::Copy, move || {
            sim.set_grant_entry(id, gref, GrantEntryV1::default());
        });
        (gref, Some(page))
    });
}

/// One copy of three ends with a fault: that packet is dropped.
fn assert_copy_fault(fault: Fault) {
    let (mut machine, guest, mut raw) = machine();
    for id in 0..3 {
        raw.push_plain(id, 300);
    }
    machine.sim.inject(DomId(0), FaultPlan::nth(Kind::Copy, 1, fault));
    run(&mut machine, &mut raw);
    assert_eq!(machine.guests[0].take().len(), 2);
    let (ok, bad) = (TxStatus::OKAY, TxStatus::ERROR);
    assert_eq!(raw.responses(), [answer(0, ok), answer(1, bad), answer(2, ok)]);
    assert_eq!(machine.sim.faults_left(DomId(0)), 0);
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_27_a_page_that_xen_cannot_look_at_now() {
    let (mut machine, guest, mut raw) = machine();
    let again = Fault::Status(GrantStatus::EAGAIN);
    for id in 0..3 {
        raw.push_plain(id, 300);
    }
    machine.sim.inject(DomId(0), FaultPlan::nth(Kind::Copy, 1, again));
    run(&mut machine, &mut raw);
    assert_eq!(raw.responses(), [answer(0, TxStatus::OKAY)]);
    let calls = machine.hv.hypercalls();
    run(&mut machine, &mut raw);
    assert_eq!((machine.hv.hypercalls() - calls).calls(Kind::Copy), 0, "not before its time");
    machine.pass(2 * MS);
    assert_eq!(raw.responses(), [1, 2].map(|id| answer(id, TxStatus::OKAY)), "in order");
    // One that stays so is dropped, within its time, and the one behind it goes on.
    machine.sim.inject(DomId(0), FaultPlan { times: 1000, ..FaultPlan::next(Kind::Copy, again) });
    raw.push_plain(7, 300);
    run(&mut machine, &mut raw);
    let mut waited = 0;
    let responses = loop {
        let responses = raw.responses();
        if !responses.is_empty() {
            break responses;
        }
        machine.pass(MS);
        waited += 1;
    };
    assert!((10..=20).contains(&waited), "{waited} ms");
    assert_eq!(responses, [answer(7, TxStatus::ERROR)]);
    machine.sim.clear_faults(DomId(0));
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_28_a_status_that_was_left_as_it_was() {
    let (mut machine, guest, mut raw) = machine();
    for id in 0..3 {
        raw.push_plain(id, 300);
    }
    machine.sim.inject(DomId(0), FaultPlan::nth(Kind::Copy, 1, Fault::Untouched));
    run(&mut machine, &mut raw);
    assert_eq!(raw.responses(), [0, 1, 2].map(|id| answer(id, TxStatus::ERROR)));
    assert!(machine.guests[0].take().is_empty());
    machine.pass(2 * MS);
    assert_goes_on(&mut machine, guest, &mut raw);
}

#[test]
fn hostile_29_statuses_that_are_no_success() {
    assert_copy_fault(Fault::Status(GrantStatus::BAD_PAGE));
    assert_copy_fault(Fault::Status(GrantStatus(1)));
}

#[test]
fn hostile_30_refused_batches() {
    let (mut machine, guest, mut raw) = machine();
    machine.sim.inject(DomId(0), FaultPlan::next(Kind::Copy, Fault::Errno(Errno::FAULT)));
    for id in 0..3 {
        raw.push_plain(id, 300);
    }
    run(&mut machine, &mut raw);
    assert!(machine.guests[0].take().is_empty());
    assert!(raw.responses().iter().all(|response| response.status == TxStatus::ERROR));
    assert_eq!(machine.status(guest).unwrap().counters.tx_drops.hypercall, 3);
    assert_eq!(machine.take_notices(guest), []);
    // Again and again, and it is closed.
    let fault = Fault::Errno(Errno::FAULT);
    machine.sim.inject(DomId(0), FaultPlan::every(Kind::Copy, fault));
    for id in 0..100 {
        if machine.is_connected(guest) {
            raw.push_plain(id, 300);
            // Meanwhile it is not asked.
            machine.pass(2 * MS);
            run(&mut machine, &mut raw);
            raw.responses();
        }
    }
    machine.sim.clear_faults(DomId(0));
    assert_closed(&mut machine, guest, VifFault::CopyRefused(Errno::FAULT));
}

#[test]
fn hostile_31_responses_that_nobody_takes() {
    let (mut machine, guest, mut raw) = machine();
    for id in 0..256 {
        raw.push_plain(id, 100);
    }
    run(&mut machine, &mut raw);
    assert_eq!(machine.guests[0].take().len(), 256);
    // A ring full of answers, and it says that it has asked 256 times more.
    raw.rewrite(layout::REQ_PROD, 512);
    raw.channel.notify().unwrap();
    machine.settle();
    let idle = machine.hv.hypercalls();
    machine.settle();
    assert_eq!((machine.hv.hypercalls() - idle).to_string(), "", "it does not spin");
    machine.assert_carries(0, 1);
    machine.set_state(guest, "6");
    assert_clean(&mut machine, guest);
}

//! A backend, played by hand on a simulated Xen, that breaks the rules of the rings. Each test: what comes of it, that the
//! interface beside it did not notice, and that nothing is held afterwards.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{World, connected, okay, rx};
use grant::SharedMemory;
use hypercall::{DomId, GrantRef, PAGE_SIZE};
use netfront::{BackendFault, Meta, Notice, SendError};
use netif::offload::Checksum;
use netif::ring::{RingFault, layout};
use netif::rx::WrongId;
use netif::slot::{
    Extra, ExtraInfo, GsoType, RxFlags, RxId, RxResponse, TxId, TxResponse, TxStatus,
};
use sim::{Fault, FaultPlan, Kind};

const NONE: RxFlags = RxFlags::empty();
const MORE: RxFlags = RxFlags::MORE_DATA;

fn jump(ring: usize, producer: u32, fault: RingFault) {
    let (mut world, rings) = connected();
    world.send(3);
    let page = if ring == 0 { &rings.tx_grant } else { &rings.rx_grant };
    page.store_u32(layout::RSP_PROD, producer, Ordering::SeqCst);
    rings.channel.notify().unwrap();
    world.settle();
    world.assert_left(rings, fault.into());
}

#[test]
fn hostile_42_more_responses_than_requests() {
    for (ring, producer) in [(0, 4), (0, 1 << 20), (1, 257), (1, 1 << 30)] {
        let limit = if ring == 0 { 3 } else { 256 };
        jump(ring, producer, RingFault::Overrun { index: producer, ahead: producer, limit });
    }
}

#[test]
fn hostile_43_responses_taken_back() {
    for ring in [0, 1] {
        jump(ring, u32::MAX, RingFault::MovedBack { from: 0, to: u32::MAX });
    }
    let (mut world, mut rings) = connected();
    world.send(3);
    rings.tx.poll().unwrap();
    for id in 0..3 {
        rings.tx.take().unwrap();
        rings.tx.push(okay(id)).unwrap();
    }
    world.kick(&mut rings);
    rings.tx_grant.store_u32(layout::RSP_PROD, 1, Ordering::SeqCst);
    rings.channel.notify().unwrap();
    world.settle();
    world.assert_left(rings, RingFault::MovedBack { from: 3, to: 1 }.into());
}

fn answer(ids: &[u16]) {
    let (mut world, mut rings) = connected();
    world.send(3);
    rings.tx.poll().unwrap();
    for &id in ids {
        rings.tx.take().unwrap();
        rings.tx.push(okay(id)).unwrap();
    }
    world.kick(&mut rings);
    world.assert_left(rings, BackendFault::NotInFlight(TxId(*ids.last().unwrap())));
}

#[test]
fn hostile_44_answers_to_requests_that_cannot_be() {
    answer(&[256]);
    answer(&[u16::MAX]);
    answer(&[0, 1, 300]);
}

#[test]
fn hostile_45_answers_to_requests_that_are_not_in_flight() {
    answer(&[9]);
    answer(&[0, 0]);
    answer(&[0, 1, 1]);
    // An answer to an extra, of which there was none.
    let (mut world, mut rings) = connected();
    world.send(1);
    rings.tx.poll().unwrap();
    rings.tx.take().unwrap();
    rings.tx.push(TxResponse { id: TxId(0), status: TxStatus::NULL }).unwrap();
    world.kick(&mut rings);
    world.assert_left(rings, BackendFault::NoExtra);
}

#[test]
fn hostile_46_statuses_of_all_kinds() {
    let (mut world, mut rings) = connected();
    for round in 0..300 {
        world.send(4);
        rings.tx.poll().unwrap();
        let requests: Vec<_> = rings.tx.requests().collect();
        assert_eq!(requests.len(), 4);
        // In any order.
        for (request, status) in requests.iter().rev().zip([0, -1, -2, -99 - round]) {
            rings.tx.push(TxResponse { id: request.id, status: TxStatus(status) }).unwrap();
        }
        world.kick(&mut rings);
    }
    let tx = world.nic.counters().tx;
    assert_eq!((tx.completed, tx.failed, tx.unknown), (300, 600, 300));
    assert_eq!(world.grants().0, 2 + 256 + 4, "pages are used again");
    world.assert_carried_on(rings);
}

#[test]
fn hostile_47_a_page_still_mapped_when_its_packet_is_done() {
    let (mut world, mut rings) = connected();
    world.send(1);
    rings.tx.poll().unwrap();
    let request = rings.tx.take().unwrap();
    let kept = world.map_read_only(request.gref);
    rings.tx.push(okay(request.id.0)).unwrap();
    world.kick(&mut rings);
    // A page is granted as long as the connection lasts, so that is no harm; then it is parked.
    world.send(300 - 256);
    world.nic.close(&mut world.guest.1, world.now);
    drop(rings);
    world.set(&[("state", "6")]);
    world.set(&[("state", "6")]);
    assert_eq!(world.grants(), (0, 1));
    let frame = world.sim.grant_entry(DomId(1), request.gref).unwrap().frame;
    assert_ne!(frame, 0);
    world.assert_unmoved();
    // Retried less and less often, and freed in the end.
    for _ in 0..20 {
        let deadline = world.nic.deadline().unwrap();
        assert!(deadline > world.now);
        world.now = deadline;
        world.settle();
        assert_eq!(world.grants(), (0, 1));
    }
    assert!(world.now.0 > 600_000_000_000);
    drop(kept);
    world.pass(64_000_000_000);
    assert_eq!(world.grants(), (0, 0));
    assert_eq!(world.nic.deadline(), None);
    world.assert_clean();
}

#[test]
fn hostile_48_rx_response_in_a_slot_not_its_own() {
    for id in [1, 255, 256, u16::MAX] {
        let (mut world, mut rings) = connected();
        world.answer_rx(&mut rings, &[rx(id, 0, NONE, 100)]);
        world.assert_left(rings, WrongId { slot: 0, id: RxId(id) }.into());
    }
}

/// Answers requests with a packet that is none, and then with one that is; many times.
fn drops(chain: impl Fn(u16) -> Vec<RxResponse>) {
    let (mut world, mut rings) = connected();
    let mut at = 0;
    for _ in 0..60 {
        let bad = chain(at % 256);
        // An extra's slot has no id, so ids are set right only where there is one.
        let bad: Vec<_> = bad
            .iter()
            .map(|it| match it.id.0 >= at % 256 && it.id.0 < at % 256 + 32 {
                true => RxResponse { id: RxId(it.id.0 % 256), ..*it },
                false => *it,
            })
            .collect();
        at += bad.len() as u16;
        world.answer_rx(&mut rings, &bad);
        world.answer_rx(&mut rings, &[rx(at % 256, 5, NONE, 60)]);
        at = (at + 1) % 256;
    }
    assert_eq!(world.received.len(), 60);
    let counters = world.nic.counters().rx;
    assert_eq!((counters.failed + counters.malformed, counters.packets), (60, 60));
    rings.rx.poll().unwrap();
    assert_eq!(rings.rx.available(), 256, "every page is posted again");
    world.assert_carried_on(rings);
}

#[test]
fn hostile_49_packets_that_failed() {
    for status in [-1, -2, -77, i16::MIN] {
        drops(|at| vec![rx(at, 0, NONE, status)]);
        drops(|at| vec![rx(at, 0, MORE, 60), rx(at + 1, 0, NONE, status)]);
    }
}

#[test]
fn hostile_50_bytes_beyond_the_page() {
    drops(|at| vec![rx(at, 4000, NONE, 97)]);
    drops(|at| vec![rx(at, 4097, NONE, 0)]);
    drops(|at| vec![rx(at, u16::MAX, NONE, i16::MAX)]);
    drops(|at| vec![rx(at, 0, NONE, 4097)]);
    drops(|at| vec![rx(at, 0, MORE, 100), rx(at + 1, 1, NONE, 4096)]);
}

#[test]
fn hostile_51_the_rest_of_a_packet_is_missing() {
    drops(|at| vec![rx(at, 0, MORE, 100)]);
    drops(|at| vec![rx(at, 0, MORE, 100), rx(at + 1, 0, MORE, 100)]);
}

#[test]
fn hostile_52_more_slots_than_a_packet_has() {
    for count in [20, 21, 30] {
        drops(|at| {
            (0..count).map(|n| rx(at + n, 0, if n + 1 < count { MORE } else { NONE }, 50)).collect()
        });
    }
}

#[test]
fn hostile_53_memory_that_changes_all_the_time() {
    let (mut world, mut rings) = connected();
    let stop = Arc::new(AtomicBool::new(false));
    // Slots of both rings, and a page that is received into, under the frontend's eyes.
    rings.rx.poll().unwrap();
    let grefs: Vec<GrantRef> = (0..256).map(|_| rings.rx.take().unwrap().gref).collect();
    let keys = world.keys();
    let pages = [grefs[0].0, keys["tx-ring-ref"], keys["rx-ring-ref"]].map(|gref| world.map(gref));
    let stopped = Arc::clone(&stop);
    let mutator = std::thread::spawn(move || {
        let mut state = 0x1234_5678_9abc_def0_u64;
        while !stopped.load(Ordering::Relaxed) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            let at = layout::SLOTS + (state >> 40) as usize % (PAGE_SIZE - layout::SLOTS);
            for page in &pages {
                page.store_u32(at & !3, (state >> 20) as u32, Ordering::Relaxed);
            }
        }
    });
    let mut frame = Vec::new();
    for round in 0..3000_u32 {
        if !world.nic.is_connected() {
            break;
        }
        let _ = world.nic.send(0, &[7; 5000], Meta::default());
        rings.rx_grant.store_u32(layout::RSP_PROD, round % 256, Ordering::SeqCst);
        while world.nic.receive(0, &mut frame).is_some() {
            assert!((14..=65_535 * 2).contains(&frame.len()));
        }
        world.nic.poll(&mut world.guest.1, world.now);
    }
    stop.store(true, Ordering::Relaxed);
    mutator.join().unwrap();
    world.settle();
    drop(rings);
    world.set(&[("state", "6")]);
    world.set(&[("state", "6")]);
    world.assert_clean();
    world.assert_unmoved();
}

fn extra(info: ExtraInfo) -> RxResponse {
    RxResponse::from_extra(Extra { more: false, info })
}

fn gso(size: u16, kind: u8) -> RxResponse {
    extra(ExtraInfo::Gso { size, kind: GsoType(kind), features: 0 })
}

#[test]
fn hostile_54_extras_that_are_missing_or_unknown() {
    drops(|at| vec![rx(at, 0, RxFlags::EXTRA_INFO, 1000)]);
    // Type 0, and one beyond the last.
    for kind in [0, 6, 255] {
        let unknown = RxResponse { id: RxId(kind), offset: 0, ..RxResponse::default() };
        drops(|at| vec![rx(at, 0, RxFlags::EXTRA_INFO, 1000), unknown]);
    }
    // Another is announced behind the last.
    let more = RxResponse::from_extra(Extra {
        more: true,
        info: ExtraInfo::Gso { size: 100, kind: GsoType::TCPV4, features: 0 },
    });
    drops(move |at| vec![rx(at, 0, RxFlags::EXTRA_INFO, 1000), more]);
}

#[test]
fn hostile_55_segmentation_that_means_nothing() {
    for (size, kind) in [(0, 1), (0, 2), (100, 0), (100, 3), (100, 255)] {
        drops(|at| vec![rx(at, 0, RxFlags::EXTRA_INFO, 1000), gso(size, kind)]);
    }
}

#[test]
fn hostile_56_nothing_is_ever_answered() {
    let (mut world, rings) = connected();
    for _ in 0..256 {
        world.nic.send(0, &[7; 100], Meta::default()).unwrap();
    }
    let granted = world.table.granted();
    for _ in 0..1000 {
        assert_eq!(world.nic.send(0, &[7; 100], Meta::default()), Err(SendError::Full));
        world.settle();
    }
    let stalled = Notice::Stalled { queue: 0 };
    world.pass(4_900_000_000);
    assert!(!world.notices.contains(&stalled));
    world.now = world.nic.deadline().unwrap().max(world.now.after(100_000_000));
    world.settle();
    assert!(world.notices.contains(&stalled));
    for _ in 0..100 {
        world.pass(5_000_000_000);
    }
    assert_eq!(world.notices.iter().filter(|it| **it == stalled).count(), 1, "said once");
    assert_eq!(world.table.granted(), granted);
    world.assert_unmoved();
    // It comes back to life.
    world.assert_carried_on(rings);
}

#[test]
fn what_is_answered_now_and_then_is_not_stalled() {
    let (mut world, mut rings) = connected();
    world.send(200);
    for _ in 0..100 {
        world.pass(4_000_000_000);
        rings.tx.poll().unwrap();
        let request = rings.tx.take().unwrap();
        rings.tx.push(okay(request.id.0)).unwrap();
        world.kick(&mut rings);
    }
    assert!(!world.notices.iter().any(|it| matches!(it, Notice::Stalled { .. })));
    world.assert_carried_on(rings);
}

#[test]
fn a_sender_without_room_is_woken_once_there_is_some() {
    let (mut world, mut rings) = connected();
    let mut answer = |count: u16| {
        rings.tx.poll().unwrap();
        for _ in 0..count {
            let request = rings.tx.take().unwrap();
            rings.tx.push(okay(request.id.0)).unwrap();
        }
        rings.tx.publish().is_needed()
    };
    world.send(256);
    answer(100);
    world.settle();
    assert!(!answer(50), "nobody waits");
    world.settle();
    world.send(150);
    assert_eq!(world.nic.send(0, &[7; 100], Meta::default()), Err(SendError::Full));
    world.settle();
    assert!(!answer(127), "too little to be woken for");
    assert!(answer(1));
    assert!(world.nic.poll(&mut world.guest.1, world.now), "try again");
    world.send(1);
    assert!(!world.nic.poll(&mut world.guest.1, world.now));
    // All are answered before the next poll: there is no event to come, so it says so at once.
    world.send(127);
    assert_eq!(world.nic.send(0, &[7; 100], Meta::default()), Err(SendError::Full));
    answer(256);
    assert!(world.nic.poll(&mut world.guest.1, world.now));
    assert!(!world.nic.poll(&mut world.guest.1, world.now));
}

/// Of events, until what has to be heard is heard.
fn storm(events: usize) -> u64 {
    let (mut world, rings) = connected();
    for _ in 0..events {
        rings.channel.notify().unwrap();
        world.settle();
    }
    world.assert_unmoved();
    let spurious = world.nic.counters().spurious;
    world.pass(2_000_000_000);
    world.assert_carried_on(rings);
    spurious
}

#[test]
fn hostile_57_91_92_events_about_nothing() {
    assert_eq!(storm(1), 1, "forgiven");
    assert!(storm(1000) < 5, "throttled");
}

#[test]
fn hostile_61_no_memory_for_pages() {
    let (mut world, mut rings) = connected();
    // All posted; from now on no page can be had, and none is needed.
    let fault = Fault::Errno(hypercall::Errno::NOMEM);
    world.sim.inject(DomId(1), FaultPlan::every(Kind::AllocPages, fault));
    for at in 0..600_u16 {
        world.answer_rx(&mut rings, &[rx(at % 256, 0, NONE, 60)]);
    }
    assert_eq!(world.received.len(), 600);
    assert!(matches!(world.nic.send(0, &[7; 100], Meta::default()), Err(SendError::Grant(_))));
    world.sim.clear_faults(DomId(1));
    world.send(1);
    assert_eq!(rings.tx.poll().unwrap(), 1);
    world.assert_carried_on(rings);
}

#[test]
fn hostile_61_few_pages_to_begin_with() {
    let config = netfront::Config { split: false, ..netfront::Config::new(hypercall::Handle(0)) };
    let mut world = World::plain(config).with_neighbour();
    world.set(&[("feature-rx-copy", "1")]);
    let fault = Fault::Errno(hypercall::Errno::NOMEM);
    // Both rings and ten pages, of 256.
    let plan = FaultPlan { after: 12, ..FaultPlan::every(Kind::AllocPages, fault) };
    world.sim.inject(DomId(1), plan);
    world.set(&[("state", "2")]);
    let mut rings = world.attach();
    assert_eq!(rings.rx.poll().unwrap(), 10);
    world.answer_rx(&mut rings, &[rx(0, 0, NONE, 60), rx(1, 0, NONE, 60)]);
    assert_eq!((world.received.len(), rings.rx.poll().unwrap()), (2, 8));
    // Tried again by a timer, and by nothing else.
    let tried = world.nic.counters().rx.no_memory;
    (0..50).for_each(|_| world.settle());
    assert_eq!(world.nic.counters().rx.no_memory, tried);
    world.pass(100_000_000);
    assert_eq!(world.nic.counters().rx.no_memory, tried + 1);
    world.sim.clear_faults(DomId(1));
    world.pass(100_000_000);
    assert_eq!(rings.rx.poll().unwrap(), 256);
    world.assert_carried_on(rings);
}

#[test]
fn no_more_pages_are_received_into_than_are_posted() {
    let config = netfront::Config {
        split: false,
        posted: 20,
        ..netfront::Config::new(hypercall::Handle(0))
    };
    let mut world = World::plain(config).with_neighbour();
    world.offer(&[("feature-sg", "1")]);
    let mut rings = world.attach();
    let granted = world.grants();
    assert_eq!(granted, (2 + 20, 0));
    for at in 0..300_u16 {
        let (at, next) = (at * 2 % 256, (at * 2 + 1) % 256);
        world.answer_rx(&mut rings, &[rx(at, 0, MORE, 60), rx(next, 0, NONE, 60)]);
        assert_eq!(rings.rx.poll().unwrap(), 20);
    }
    assert_eq!((world.received.len(), world.grants()), (300, granted));
    world.assert_carried_on(rings);
}

#[test]
fn hostile_80_no_reference_is_free() {
    let (mut world, mut rings) = connected();
    world.send(3);
    let mut taken = Vec::new();
    while let Ok(page) = world.table.share(DomId(0), false) {
        taken.push(page);
    }
    // Three pages there are, and these come back.
    for _ in 0..20 {
        assert_eq!(world.nic.send(0, &[7; 100], Meta::default()), Err(SendError::Full));
        rings.tx.poll().unwrap();
        let requests: Vec<_> = rings.tx.requests().collect();
        assert_eq!(requests.len(), 3);
        for request in requests {
            rings.tx.push(okay(request.id.0)).unwrap();
        }
        world.kick(&mut rings);
        world.send(3);
    }
    drop(taken);
    world.send(1);
    world.assert_carried_on(rings);
}

#[test]
fn hostile_94_closed_while_packets_are_taken() {
    let (mut world, mut rings) = connected();
    rings.rx.poll().unwrap();
    for at in 0..3 {
        rings.rx.take().unwrap();
        rings.rx.push(rx(at, 0, NONE, 60)).unwrap();
    }
    let _ = rings.rx.publish();
    world.nic.poll(&mut world.guest.1, world.now);
    let mut frame = Vec::new();
    assert!(world.nic.receive(0, &mut frame).is_some());
    world.nic.close(&mut world.guest.1, world.now);
    assert!(world.nic.receive(0, &mut frame).is_none());
    assert_eq!(world.nic.send(0, &frame, Meta::default()), Err(SendError::NotConnected));
    world.assert_closes(rings);
}

#[test]
fn hostile_95_a_notification_is_lost() {
    let (mut world, mut rings) = connected();
    rings.rx.poll().unwrap();
    rings.rx.take().unwrap();
    rings.rx.push(rx(0, 0, NONE, 60)).unwrap();
    let _ = rings.rx.publish();
    assert_eq!(world.received.len(), 0);
    let deadline = world.nic.deadline().unwrap();
    assert!(deadline <= world.now.after(1_000_000_000));
    world.now = deadline;
    world.settle();
    assert_eq!(world.received.len(), 1);
    world.assert_carried_on(rings);
}

#[test]
fn what_the_backend_does_not_offer_is_not_sent() {
    let config = netfront::Config { split: false, ..netfront::Config::new(hypercall::Handle(0)) };
    let mut world = World::plain(config);
    world.offer(&[("feature-no-csum-offload", "1")]);
    let rings = world.attach();
    assert_eq!(world.nic.features(), netif::keys::Features::RX_COPY);
    let blank = Meta { checksum: Checksum::Blank, gso: None };
    let send = |world: &mut World, len: usize, meta| world.nic.send(0, &vec![8; len], meta);
    assert_eq!(send(&mut world, 100, blank), Err(SendError::NotOffered));
    assert_eq!(send(&mut world, 4097, Meta::default()), Err(SendError::TooLong));
    assert_eq!(send(&mut world, 65_536, Meta::default()), Err(SendError::TooLong));
    assert_eq!(send(&mut world, 13, Meta::default()), Err(SendError::TooShort));
    assert_eq!(world.nic.send(1, &[8; 100], Meta::default()), Err(SendError::NoQueue));
    assert_eq!(send(&mut world, 4096, Meta::default()), Ok(()));
    world.assert_carried_on(rings);
}

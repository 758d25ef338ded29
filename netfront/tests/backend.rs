//! A backend played by hand that breaks the protocol, on a simulated Xen.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::sync::atomic::Ordering;

use common::{BACK, FRONT, World, connected, directory, okay, rx, write};
use grant::SharedMemory;
use hypercall::{DomId, Handle};
use netfront::{BackendFault, Config, Frontend, Meta, Notice, SendError};
use netif::keys::Features;
use netif::ring::{RingFault, layout};
use netif::rx::WrongId;
use netif::slot::{
    Extra, ExtraInfo, GsoType, RxFlags, RxId, RxResponse, TxId, TxResponse, TxStatus,
};
use sim::{Fault, FaultPlan, Kind};
use xenbus::client::Change;
use xenbus::device::State;

#[test]
fn hostile_42_43_producers_that_jump() {
    for (ring, producer) in [(0, 4), (0, 1 << 20), (1, 257), (1, 1 << 30), (0, u32::MAX)] {
        let (mut world, rings) = connected();
        world.send(3);
        let page = if ring == 0 { &rings.tx_grant } else { &rings.rx_grant };
        page.store_u32(layout::RSP_PROD, producer, Ordering::SeqCst);
        rings.channel.notify().unwrap();
        world.settle();
        let limit = if ring == 0 { 3 } else { 256 };
        let fault = if producer.cast_signed() < 0 {
            RingFault::MovedBack { from: 0, to: producer }
        } else {
            RingFault::Overrun { index: producer, ahead: producer, limit }
        };
        world.assert_left(rings, fault.into());
    }
}

#[test]
fn hostile_44_45_responses_to_nothing() {
    for ids in [&[256][..], &[u16::MAX], &[9], &[0, 0], &[0, 1, 1]] {
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
    assert!(world.nic.is_connected());
}

#[test]
fn hostile_48_rx_response_in_a_slot_not_its_own() {
    let (mut world, mut rings) = connected();
    rings.rx.poll().unwrap();
    rings.rx.take().unwrap();
    rings.rx.push(rx(1, 0, RxFlags::empty(), 100)).unwrap();
    world.kick(&mut rings);
    world.assert_left(rings, WrongId { slot: 0, id: RxId(1) }.into());
}

#[test]
fn hostile_49_to_55_packets_that_are_none() {
    let more = RxFlags::MORE_DATA;
    let extra = |size, kind| {
        let info = ExtraInfo::Gso { size, kind, features: 0 };
        RxResponse::from_extra(Extra { more: false, info })
    };
    let gso = |slot| rx(slot, 0, RxFlags::EXTRA_INFO, 1000);
    type Chain = Box<dyn Fn(u16) -> Vec<RxResponse>>;
    let long = move |at: u16| {
        (0..20).map(|n| rx(at + n, 0, if n < 19 { more } else { RxFlags::empty() }, 50)).collect()
    };
    let bad: Vec<Chain> = vec![
        Box::new(|at| vec![rx(at, 0, RxFlags::empty(), -1)]),
        Box::new(|at| vec![rx(at, 4000, RxFlags::empty(), 97)]),
        Box::new(|at| vec![rx(at, 4097, RxFlags::empty(), 0)]),
        Box::new(move |at| vec![rx(at, 0, more, 100)]),
        Box::new(long),
        Box::new(move |at| vec![gso(at)]),
        Box::new(move |at| vec![gso(at), extra(0, GsoType::TCPV4)]),
        Box::new(move |at| vec![gso(at), extra(100, GsoType(9))]),
        Box::new(|at| vec![rx(at, 0, RxFlags::empty(), 13)]),
    ];
    let (mut world, mut rings) = connected();
    let mut at = 0;
    for round in 0..100 {
        let chain = bad[round % bad.len()](at);
        let good = round % 2 == 0;
        rings.rx.poll().unwrap();
        for response in &chain {
            rings.rx.take().unwrap();
            let id = RxId(response.id.0 % 256);
            let response =
                if response.id.0 >= at { RxResponse { id, ..*response } } else { *response };
            rings.rx.push(response).unwrap();
        }
        at += chain.len() as u16;
        world.kick(&mut rings);
        rings.rx.poll().unwrap();
        if good {
            rings.rx.take().unwrap();
            rings.rx.push(rx(at % 256, 5, RxFlags::empty(), 60)).unwrap();
            at += 1;
            world.kick(&mut rings);
        }
        at %= 256;
    }
    assert!(world.nic.is_connected(), "{:?}", world.notices);
    assert_eq!(world.received.len(), 50);
    let counters = world.nic.counters().rx;
    assert_eq!((counters.failed + counters.malformed, counters.packets), (100, 50));
    rings.rx.poll().unwrap();
    assert_eq!(rings.rx.available(), 256, "every page is posted again");
}

#[test]
fn hostile_56_nothing_is_ever_answered() {
    let (mut world, _rings) = connected();
    for _ in 0..256 {
        world.nic.send(0, &[7; 100], Meta::default()).unwrap();
    }
    let granted = world.table.granted();
    for _ in 0..1000 {
        assert_eq!(world.nic.send(0, &[7; 100], Meta::default()), Err(SendError::Full));
        world.settle();
    }
    assert_eq!(world.table.granted(), granted);
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

#[test]
fn hostile_57_events_about_nothing() {
    let (mut world, mut rings) = connected();
    for _ in 0..1000 {
        rings.channel.notify().unwrap();
        world.settle();
    }
    assert!(world.nic.counters().spurious < 5, "throttled");
    world.pass(2_000_000_000);
    rings.rx.poll().unwrap();
    rings.rx.take().unwrap();
    rings.rx.push(rx(0, 0, RxFlags::empty(), 60)).unwrap();
    world.kick(&mut rings);
    world.pass(2_000_000_000);
    assert_eq!(world.received.len(), 1);
}

#[test]
fn hostile_58_the_backend_dies() {
    for holds in [false, true] {
        let (mut world, rings) = connected();
        world.send(5);
        let kept = holds.then(|| {
            let tx = world.keys()["tx-ring-ref"];
            world.map(tx)
        });
        drop(rings);
        world.dom0.1.commit([Change::Rm { path: BACK.into() }]);
        world.settle();
        assert_eq!(world.nic.state(), State::Closed);
        assert_eq!(world.nic.counters().tx.lost, 5);
        assert_eq!(world.grants(), (0, usize::from(holds)));
        drop(kept);
        world.dom0.1.commit(directory(BACK, 0, 1));
        world.pass(1_000_000_000);
        world.offer(&[]);
        world.attach();
    }
}

#[test]
fn hostile_59_the_backend_is_replaced_by_another() {
    let (mut world, rings) = connected();
    world.send(2);
    let other = "/local/domain/0/backend/vif/1/7";
    world.dom0.1.commit(directory(other, 0, 1));
    world.dom0.1.commit([
        write(format!("{other}/feature-rx-copy"), "1"),
        write(format!("{other}/state"), "2"),
    ]);
    drop(rings);
    world.settle();
    world.dom0.1.commit([write(format!("{FRONT}/backend"), other)]);
    world.settle();
    assert!(world.notices.contains(&Notice::Disconnected));
    assert_eq!((world.nic.counters().tx.lost, world.table.parked()), (2, 0));
    assert_eq!(world.nic.state(), State::Connected, "published anew");
    world.set(&[("state", "4")]);
    assert!(!world.nic.is_connected(), "the old one has no say any more");
    world.dom0.1.commit([write(format!("{other}/state"), "4")]);
    world.settle();
    assert!(world.nic.is_connected());
}

#[test]
fn what_an_earlier_kernel_left_is_ended_first() {
    let mut world = World::plain(Config { split: false, ..Config::new(Handle(0)) });
    world.offer(&[]);
    let rings = world.attach();
    // Another kernel in the same domain, which knows nothing of all this.
    let (binder, client) = (world.upcalls.binder(), &mut world.guest.1);
    let next = Frontend::new(world.table.clone(), binder, client, Config::new(Handle(0)));
    std::mem::forget(std::mem::replace(&mut world.nic, next));
    world.settle();
    assert_eq!(world.nic.state(), State::Initialising);
    assert_eq!(world.keys()["state"], 1, "and the backend is told");
    drop(rings);
    world.set(&[("state", "5")]);
    world.set(&[("state", "6")]);
    world.pass(1_000_000_000);
    world.set(&[("state", "2")]);
    world.attach();
}

#[test]
fn hostile_61_no_memory_for_pages() {
    let (mut world, mut rings) = connected();
    // All posted; from now on no page can be had, and none is needed.
    let fault = Fault::Errno(hypercall::Errno::NOMEM);
    world.sim.inject(DomId(1), FaultPlan::every(Kind::AllocPages, fault));
    for at in 0..600_u16 {
        rings.rx.poll().unwrap();
        rings.rx.take().unwrap();
        rings.rx.push(rx(at % 256, 0, RxFlags::empty(), 60)).unwrap();
        world.kick(&mut rings);
    }
    assert_eq!(world.received.len(), 600);
    assert!(matches!(world.nic.send(0, &[7; 100], Meta::default()), Err(SendError::Grant(_))));
    world.sim.clear_faults(DomId(1));
    world.send(1);
    assert_eq!(rings.tx.poll().unwrap(), 1);
}

#[test]
fn what_the_backend_does_not_offer_is_not_sent() {
    let mut world = World::plain(Config { split: false, ..Config::new(Handle(0)) });
    world.offer(&[("feature-no-csum-offload", "1")]);
    let _rings = world.attach();
    assert_eq!(world.nic.features(), Features::RX_COPY);
    let blank = Meta { checksum: netif::offload::Checksum::Blank, gso: None };
    let send = |world: &mut World, len: usize, meta| world.nic.send(0, &vec![8; len], meta);
    assert_eq!(send(&mut world, 100, blank), Err(SendError::NotOffered));
    assert_eq!(send(&mut world, 4097, Meta::default()), Err(SendError::TooLong));
    assert_eq!(send(&mut world, 65_536, Meta::default()), Err(SendError::TooLong));
    assert_eq!(send(&mut world, 13, Meta::default()), Err(SendError::TooShort));
    assert_eq!(world.nic.send(1, &[8; 100], Meta::default()), Err(SendError::NoQueue));
    assert_eq!(send(&mut world, 4096, Meta::default()), Ok(()));
}

#[test]
fn a_backend_that_does_not_copy_is_left() {
    let mut world = World::plain(Config::new(Handle(0)));
    world.set(&[("state", "2")]);
    assert!(matches!(world.notices[..], [Notice::Refused(netfront::Refusal::NoCopy)]));
    assert_eq!(world.nic.state(), State::Closing);
    assert_eq!(world.table.granted(), 0);
}

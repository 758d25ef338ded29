//! Cards that do not get done, and guests that do not live to see it.

use netback::datapath::Datapath;
use netback::uplink::{Offers, UplinkConfig};
use netfront::Meta;

use crate::common::{SECOND, frame};
use crate::frames::OUTSIDE;
use crate::{Board, World};

/// A card that has a mapped packet and keeps it.
fn hung() -> (World, Vec<u8>) {
    let mut world = World::new(Board::plain(), Offers::empty());
    world.card().held = true;
    let bytes = frame(OUTSIDE, world.guest(), 1500, 1);
    world.send(&bytes, Meta::default());
    world.settle();
    assert_eq!((world.uplink.in_flight(), world.machine.backend.open()), (1, 1));
    assert!(world.lent() > 0);
    (world, bytes)
}

/// That packets go out.
fn assert_sends(world: &mut World) {
    for seed in 0..3 {
        let bytes = frame(OUTSIDE, world.guest(), 1400, seed);
        world.send(&bytes, Meta::default());
        world.settle();
        assert!(world.take_wire() == [bytes]);
    }
}

#[test]
fn pages_stay_mapped_until_the_card_is_done() {
    let (mut world, bytes) = hung();
    world.pass(3 * SECOND, SECOND / 4);
    assert!(world.lent() > 0);
    assert_eq!((world.uplink.in_flight(), world.machine.backend.open()), (1, 1));
    let hardware = world.uplink.counters().hardware;
    assert_eq!((hardware.late, hardware.resets), (1, 0));
    world.card().held = false;
    world.settle();
    assert!(world.take_wire() == [bytes]);
    world.assert_right();
}

#[test]
fn a_card_that_hangs_is_reset_and_everything_comes_back() {
    let (mut world, _) = hung();
    // The port says itself when to look.
    let patience = UplinkConfig::default().patience;
    let (begun, mut looks) = (world.machine.now, 0);
    while world.uplink.counters().hardware.resets == 0 {
        world.machine.now = world.uplink.deadline().unwrap();
        world.settle();
        looks += 1;
        assert!(looks < 10);
    }
    assert_eq!(world.machine.now, begun.after(patience));
    let hardware = world.uplink.counters().hardware;
    assert_eq!((hardware.late, hardware.lost, hardware.stuck), (1, 1, 0));
    assert!(world.card().posted() > 0, "it receives again");
    world.assert_right();
    assert_sends(&mut world);
    world.assert_right();
}

#[test]
fn a_card_that_says_that_it_is_broken_is_reset_at_once() {
    let (mut world, _) = hung();
    world.card().broken = true;
    world.settle();
    assert_eq!(world.uplink.counters().hardware.resets, 1);
    world.assert_right();
    assert_sends(&mut world);
}

#[test]
fn a_card_that_does_not_stop_keeps_what_it_has() {
    let (mut world, bytes) = hung();
    world.card().unstoppable = true;
    world.pass(20 * SECOND, SECOND);
    assert!(world.uplink.counters().hardware.stuck >= 3);
    assert!(world.lent() > 0, "it may still read them");
    assert_eq!(world.uplink.counters().hardware.resets, 0);
    // Nothing new is given to it.
    world.send(&bytes, Meta::default());
    world.settle();
    assert_eq!(world.card().holds(), 1);
    world.card().unstoppable = false;
    world.pass(6 * SECOND, SECOND);
    assert_eq!(world.uplink.counters().hardware.resets, 1);
    assert!(world.take_wire() == [bytes]);
    world.assert_right();
}

#[test]
fn one_frame_that_is_kept_is_noticed_though_others_come_and_go() {
    let (mut world, _) = hung();
    // The device has forgotten the first, and goes on with the next.
    world.card().forget();
    world.card().held = false;
    let mut rounds = 0;
    while world.uplink.counters().hardware.resets == 0 {
        assert_sends(&mut world);
        world.pass(SECOND / 2, SECOND / 2);
        rounds += 1;
        assert!(rounds <= 20);
    }
    assert_eq!(world.uplink.counters().hardware.lost, 1);
    assert_sends(&mut world);
    world.assert_right();
}

#[test]
fn a_guest_may_die_while_the_card_has_its_pages() {
    let (mut world, bytes) = hung();
    world.machine.destroy(0);
    world.settle();
    assert!(world.lent() + world.rings > 0, "the page outlives its guest");
    // Another guest has come, and goes on.
    let other = world.machine.plain_guest();
    world.settle();
    world.card().held = false;
    world.settle();
    assert!(world.take_wire() == [bytes]);
    world.machine.assert_let_go(0);
    let next = frame(OUTSIDE, world.machine.guests[other].mac(), 1500, 2);
    world.machine.guests[other].send(&next);
    world.settle();
    assert!(world.take_wire() == [next]);
    assert_eq!(world.card().device.counts().stray, 0);
    assert_eq!(world.machine.backend.open(), 0);
}

#[test]
fn a_guest_may_die_before_a_card_that_hangs() {
    let (mut world, _) = hung();
    world.machine.destroy(0);
    world.pass(12 * SECOND, SECOND / 2);
    assert_eq!(world.uplink.counters().hardware.resets, 1);
    world.machine.assert_let_go(0);
    assert_eq!(world.uplink.in_flight(), 0);
}

#[test]
fn what_waits_in_front_of_a_slow_card_is_given_back_in_time() {
    let (mut world, first) = hung();
    let held = world.lent();
    // Room for nothing more, but the port has one packet and the switch another.
    world.card().capacity = 4;
    let more: Vec<_> = (2..5).map(|seed| frame(OUTSIDE, world.guest(), 1500, seed)).collect();
    for bytes in &more {
        world.send(bytes, Meta::default());
    }
    world.settle();
    assert!(world.lent() > held);
    world.pass(2 * SECOND, SECOND / 4);
    assert_eq!((world.lent(), world.machine.backend.open()), (held, 1));
    world.card().held = false;
    world.settle();
    assert!(world.take_wire() == [vec![first], more].concat());
    assert_eq!(world.uplink.counters().sent(Datapath::Map).packets, 1);
    world.assert_right();
}

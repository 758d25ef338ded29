//! Events that are too many, too few, or about nothing; and queues that nobody serves.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::raw::Raw;
use common::{MS, Machine, SECOND, back, frame};
use evtchn::{Channel, Eoi, Work};
use hypercall::{DomId, Instant, Port};
use netback::{Notice, Refusal};
use netfront::Meta;
use netif::slot::TxStatus;
use sim::{Item, Kind, Ledger, SimHv};
use xenbus::device::State;

/// Two guests that take no part in it, and a frontend by hand that the switch knows.
struct Scene {
    machine: Machine,
    before: Ledger,
    guest: usize,
    raw: Raw,
}

fn scene() -> Scene {
    scene_without(&[])
}

fn scene_without(keys: &[&str]) -> Scene {
    let mut machine = Machine::two();
    machine.assert_carries(0, 1);
    let before = machine.held();
    let guest = machine.bare_guest();
    let raw = Raw::new(&machine.guests[guest], 0);
    let all = raw.keys().into_iter().filter(|(key, _)| !keys.contains(key));
    machine.offer(guest, &all.collect::<Vec<_>>(), "4");
    assert!(machine.is_connected(guest));
    let mut scene = Scene { machine, before, guest, raw };
    let hello = frame([0xff; 6], scene.machine.guests[guest].mac(), 60, 0);
    scene.write(&hello);
    scene.raw.push_plain(0, 60);
    scene.run();
    scene.raw.responses();
    scene.machine.take_local();
    scene.machine.guests[0].take();
    scene.machine.guests[1].take();
    scene.machine.take_notices(guest);
    scene
}

impl Scene {
    fn write(&self, bytes: &[u8]) {
        grant::SharedMemory::write_bytes(&self.raw.data, 0, bytes);
    }

    fn run(&mut self) {
        self.raw.go();
        self.machine.settle();
    }

    fn notify(&self) {
        self.raw.channel.notify().unwrap();
    }

    /// A packet for guest 0, which the hostile guest puts on its ring; nobody is told.
    fn push(&mut self, id: u16) -> Vec<u8> {
        let dst = self.machine.guests[0].mac();
        let bytes = frame(dst, self.machine.guests[self.guest].mac(), 300, 3);
        self.write(&bytes);
        self.raw.push_plain(id, 300);
        bytes
    }

    /// A packet of guest 0's for the hostile guest.
    fn send_to(&mut self, len: usize) {
        let (dst, src) = (self.machine.guests[self.guest].mac(), self.machine.guests[0].mac());
        self.machine.guests[0].send(&frame(dst, src, len, 3));
        self.machine.settle();
    }

    /// Statuses of what the guest received.
    fn received(&mut self) -> Vec<i16> {
        self.raw.rx.poll().unwrap();
        self.raw.rx.responses().map(|(_, response)| response.status.0).collect()
    }

    fn spurious(&self) -> u64 {
        let counters = self.machine.status(self.guest).unwrap().counters;
        counters.tx.spurious + counters.rx.spurious
    }

    fn carrier(&mut self) -> Option<String> {
        let path = format!("{}/carrier", back(self.machine.guests[self.guest].id));
        self.machine.read(&path)
    }

    /// What is sent arrives; then all is closed, and nothing is held.
    fn assert_over(mut self) {
        self.machine.guests[0].take();
        self.raw.responses();
        let sent = self.push(999);
        self.run();
        // Its port may be throttled.
        self.machine.pass(SECOND + 100 * MS);
        assert!(self.machine.guests[0].take() == [(sent, Meta::default())]);
        assert_eq!(self.raw.responses().len(), 1);
        assert_eq!(self.machine.take_notices(self.guest), []);
        self.machine.set_state(self.guest, "6");
        let Self { mut machine, guest, before, .. } = self;
        machine.assert_unnoticed(&[guest]);
        machine.assert_let_go(guest);
        // Pages that the two others have kept mapped meanwhile are their own affair.
        let others = [machine.guests[0].id, machine.guests[1].id];
        let came = machine.held().since(&before).came;
        let theirs = |item: &Item| matches!(item, Item::Mapping { of, .. } if others.contains(of));
        let left: Vec<_> = came.entries().filter(|(_, item)| !theirs(item)).collect();
        assert_eq!(left, []);
        machine.assert_carries(0, 1);
        machine.assert_no_buffer_out();
    }
}

#[test]
fn hostile_36_the_carrier_goes_off_and_comes_back() {
    let mut scene = scene();
    // Every packet is waited with until it expires, or there is no room: never more than so many.
    for second in 0..59 {
        for _ in 0..20 {
            scene.send_to(60);
        }
        let held = scene.machine.backend.pools().all().out();
        assert!(held <= 512, "{held} packets held");
        scene.machine.pass(SECOND);
        assert_eq!(scene.carrier(), None, "{second}");
    }
    scene.machine.pass(2 * SECOND);
    assert_eq!(scene.carrier().as_deref(), Some("0"));
    // Nothing is kept for it now.
    scene.machine.assert_no_buffer_out();
    let drops = scene.machine.status(scene.guest).unwrap().counters.rx_drops;
    assert!(drops.expired > 0 && drops.stalled > 0, "{drops:?}");
    for _ in 0..100 {
        scene.send_to(60);
    }
    let after = scene.machine.status(scene.guest).unwrap().counters.rx_drops;
    assert_eq!(after.stalled, drops.stalled + 100);
    scene.machine.assert_no_buffer_out();
    assert!(scene.machine.is_connected(scene.guest));
    // It can send all the same.
    let sent = scene.push(1);
    scene.machine.guests[0].take();
    scene.run();
    assert!(scene.machine.guests[0].take() == [(sent, Meta::default())]);
    assert_eq!(scene.carrier().as_deref(), Some("0"), "only pages make it a good one");
    scene.raw.post(&scene.machine.guests[scene.guest], 1);
    scene.run();
    assert_eq!(scene.carrier().as_deref(), Some("1"));
    scene.send_to(60);
    assert_eq!(scene.received(), [60]);
    scene.assert_over();
}

/// What it was short of counts: a page now and then that no packet fits in does not keep it alive.
#[test]
fn hostile_36_a_page_too_few_is_a_stall_too() {
    let mut scene = scene();
    scene.raw.post(&scene.machine.guests[scene.guest], 1);
    scene.run();
    for _ in 0..7 {
        scene.send_to(8000);
        scene.machine.pass(10 * SECOND);
    }
    assert_eq!(scene.carrier().as_deref(), Some("0"));
    scene.raw.post(&scene.machine.guests[scene.guest], 1);
    scene.run();
    assert_eq!(scene.carrier().as_deref(), Some("1"));
    scene.send_to(8000);
    assert_eq!(scene.received().len(), 2);
    scene.assert_over();
}

/// A queue that nothing is sent to for an hour has not stalled, nor has one that starves by turns.
#[test]
fn hostile_36_waiting_for_nothing_is_no_stall() {
    let mut scene = scene();
    scene.machine.pass(200 * SECOND);
    for _ in 0..5 {
        scene.send_to(60);
        scene.machine.pass(30 * SECOND);
        scene.raw.post(&scene.machine.guests[scene.guest], 1);
        scene.run();
        assert_eq!(scene.carrier(), None);
        scene.machine.pass(30 * SECOND);
    }
    assert_eq!(scene.machine.status(scene.guest).unwrap().counters.rx_drops.stalled, 0);
    scene.assert_over();
}

#[test]
fn hostile_40_a_frontend_that_does_not_tell_of_its_pages() {
    let mut scene = scene_without(&["feature-rx-notify"]);
    scene.send_to(60);
    scene.raw.post(&scene.machine.guests[scene.guest], 3);
    let _ = scene.raw.rx.publish();
    scene.machine.settle();
    let now = scene.machine.now;
    assert!(scene.machine.backend.deadline(now) <= now.after(SECOND), "it looks by itself");
    scene.machine.pass(SECOND);
    assert_eq!(scene.received(), [60]);
    scene.assert_over();
}

#[test]
fn hostile_91_events_without_end() {
    let mut scene = scene();
    // Time stands still: it is heard a few times, then no more.
    let (before, heard) = (scene.machine.hv.hypercalls(), scene.spurious());
    for _ in 0..1000 {
        scene.notify();
        scene.machine.turn();
    }
    assert!(scene.spurious() <= heard + 2, "{}", scene.spurious());
    let calls = scene.machine.hv.hypercalls() - before;
    assert!(calls.all_calls() < 50, "{calls}");
    // Over two seconds, less and less often; the others carry on meanwhile, without delay.
    let heard = scene.spurious();
    for _ in 0..200 {
        for _ in 0..50 {
            scene.notify();
        }
        scene.machine.assert_carries(0, 1);
        scene.machine.pass(10 * MS);
    }
    let heard = scene.spurious() - heard;
    assert!((5..15).contains(&heard), "{heard} of 10,000");
    // It is served in the end, be it late.
    scene.machine.guests[0].take();
    let sent = scene.push(1);
    scene.run();
    scene.machine.pass(SECOND + 100 * MS);
    assert!(scene.machine.guests[0].take() == [(sent, Meta::default())]);
    scene.machine.pass(SECOND);
    scene.assert_over();
}

/// One event about nothing is forgiven: what is sent after it goes at once.
#[test]
fn hostile_92_an_event_about_nothing() {
    let mut scene = scene();
    let heard = scene.spurious();
    for id in 0..50 {
        scene.notify();
        scene.machine.settle();
        assert_eq!(scene.spurious(), heard + u64::from(id) + 1);
        scene.push(id);
        scene.run();
        assert_eq!(scene.raw.responses().len(), 1);
    }
    assert_eq!(scene.machine.guests[0].take().len(), 50);
    // The second in a row is not.
    scene.notify();
    scene.machine.settle();
    scene.notify();
    scene.machine.settle();
    scene.push(50);
    scene.run();
    assert_eq!(scene.raw.responses(), []);
    let now = scene.machine.now;
    assert!(scene.machine.backend.deadline(now) <= now.after(MS));
    scene.machine.pass(MS);
    assert_eq!(scene.raw.responses().len(), 1);
    scene.assert_over();
}

#[test]
fn hostile_93_no_port_is_free() {
    let mut machine = Machine::two();
    machine.assert_carries(0, 1);
    let before = machine.held();
    let dom0 = machine.upcalls.binder();
    machine.sim.set_max_port(DomId(0), 40);
    let taken: Vec<_> = std::iter::from_fn(|| dom0.alloc_unbound(DomId(1)).ok()).collect();
    assert!(!taken.is_empty());
    let guest = machine.bare_guest();
    let raw = Raw::new(&machine.guests[guest], 0);
    machine.offer(guest, &raw.keys(), "4");
    let notices = machine.take_notices(guest);
    let refused = matches!(
        notices.last(),
        Some(Notice::Refused(_, Refusal::Bind { key: "event-channel", .. }))
    );
    assert!(refused, "{notices:?}");
    assert_eq!(machine.states(guest).1, State::Closing);
    machine.assert_let_go(guest);
    machine.assert_unnoticed(&[guest]);
    machine.assert_carries(0, 1);
    // With one port for two that it wants it is refused as well, and keeps none.
    let mut taken = taken;
    taken.pop();
    let (tx, rx) = {
        let binder = machine.guests[guest].upcalls.binder();
        (binder.alloc_unbound(DomId(0)).unwrap(), binder.alloc_unbound(DomId(0)).unwrap())
    };
    let mut keys = raw.keys();
    keys.retain(|(key, _)| *key != "event-channel");
    keys.push(("event-channel-tx", tx.port().to_string()));
    keys.push(("event-channel-rx", rx.port().to_string()));
    let again = |machine: &mut Machine, keys: &[(&str, String)]| {
        machine.set_state(guest, "6");
        machine.set_state(guest, "1");
        machine.pass(SECOND);
        machine.offer(guest, keys, "4");
    };
    again(&mut machine, &keys);
    assert!(!machine.is_connected(guest));
    machine.assert_let_go(guest);
    // When there are ports, it connects.
    drop(taken);
    again(&mut machine, &keys);
    assert!(machine.is_connected(guest));
    machine.set_state(guest, "6");
    machine.take_notices(guest);
    machine.assert_unnoticed(&[guest]);
    machine.assert_let_go(guest);
    assert_eq!(machine.held().since(&before).to_string(), "");
    machine.assert_carries(0, 1);
}

/// The port is handed out, and before its event is handled the vif is closed, or even replaced.
#[test]
fn hostile_94_closed_while_its_event_is_handled() {
    for replaced in [false, true] {
        let mut scene = scene();
        scene.push(1);
        let _ = scene.raw.tx.publish();
        scene.notify();
        let mut ports: Vec<Port> = Vec::new();
        scene.machine.upcalls.scan(64, |port| ports.push(port));
        assert_eq!(ports.len(), 1);
        scene.machine.set_state(scene.guest, "6");
        scene.machine.assert_let_go(scene.guest);
        let mut raw = None;
        if replaced {
            // Most likely by the same port.
            let next = Raw::new(&scene.machine.guests[scene.guest], 0);
            scene.machine.set_state(scene.guest, "1");
            scene.machine.offer(scene.guest, &next.keys(), "4");
            assert!(scene.machine.is_connected(scene.guest));
            raw = Some(next);
        }
        scene.machine.take_notices(scene.guest);
        let taken = scene.machine.backend.on_event(ports[0]);
        assert!(replaced || !taken);
        scene.machine.settle();
        assert!(!scene.machine.backend.on_event(Port(u32::MAX)));
        match raw {
            Some(next) => {
                // With what the last one left on its ring nothing is done.
                scene.raw = next;
                scene.assert_over();
            }
            None => {
                scene.machine.assert_unnoticed(&[scene.guest]);
                assert_eq!(scene.machine.held().since(&scene.before).to_string(), "");
                scene.machine.assert_carries(0, 1);
            }
        }
    }
}

#[test]
fn hostile_95_a_notification_is_lost() {
    let mut scene = scene();
    for id in 1..5 {
        scene.push(id);
        let _ = scene.raw.tx.publish();
        scene.machine.settle();
        let copies = scene.machine.hv.hypercalls().calls(Kind::Copy);
        let now = scene.machine.now;
        let deadline = scene.machine.backend.deadline(now);
        assert!(deadline > now && deadline <= now.after(SECOND));
        scene.machine.now = deadline;
        scene.machine.settle();
        assert_eq!(scene.raw.responses().len(), 1);
        assert_eq!(scene.machine.guests[0].take().len(), 1);
        assert!(scene.machine.hv.hypercalls().calls(Kind::Copy) > copies);
    }
    // That of pages for packets, too.
    scene.send_to(60);
    scene.raw.post(&scene.machine.guests[scene.guest], 1);
    let _ = scene.raw.rx.publish();
    scene.machine.pass(SECOND);
    assert_eq!(scene.received(), [60]);
    scene.assert_over();
}

/// All ports there are raise their events again and again; each turn handles a few of them, and everybody's come round.
#[test]
fn hostile_96_thousands_of_ports_at_once() {
    let mut scene = scene();
    let (dom0, id) = (scene.machine.upcalls.binder(), scene.machine.guests[scene.guest].id);
    let theirs = scene.machine.guests[scene.guest].upcalls.binder();
    let mut ports: Vec<(Channel<SimHv>, Channel<SimHv>)> = Vec::new();
    while let Ok(ours) = dom0.alloc_unbound(id) {
        let Ok(its) = theirs.bind_interdomain(DomId(0), ours.port()) else { break };
        ports.push((ours, its));
    }
    assert!(ports.len() > 3000, "{}", ports.len());
    let sent = scene.push(1);
    scene.machine.guests[0].take();
    scene.raw.go();
    let mut turns = 0;
    let mut handled = 0;
    while scene.raw.responses().is_empty() {
        // As soon as one is handled it is raised again.
        for (ours, its) in &mut ports {
            let (Eoi::Open | Eoi::Throttled(_)) = ours.eoi(Work::Done, Instant(0));
            its.notify().unwrap();
        }
        let machine = &mut scene.machine;
        let mut found = Vec::new();
        handled += machine.upcalls.scan(64, |port| found.push(port));
        assert!(found.len() <= 64);
        for port in found {
            machine.backend.on_event(port);
        }
        machine.backend.poll(&mut machine.client, machine.now, |_| ());
        turns += 1;
        assert!(turns <= 4096 / 64 + 1, "after {handled} events");
    }
    for (ours, _) in &ports {
        scene.machine.backend.on_event(ours.port());
    }
    drop(ports);
    scene.machine.settle();
    assert!(scene.machine.guests[0].take() == [(sent, Meta::default())]);
    scene.push(2);
    scene.run();
    assert!(scene.raw.responses().iter().all(|answer| answer.status == TxStatus::OKAY));
    scene.assert_over();
}

/// Nothing of the backend's is ever granted to anybody, whichever way packets go: no table of its own can be full.
#[test]
fn hostile_80_the_backend_grants_nothing() {
    let mut scene = scene();
    scene.raw.post(&scene.machine.guests[scene.guest], 5);
    scene.run();
    for len in [60, 1500, 8000] {
        scene.send_to(len);
        scene.machine.assert_carries(0, 1);
        let held = scene.machine.held();
        let granted = held.entries().filter(|(_, item)| matches!(item, Item::Grant { .. }));
        assert_eq!(granted.count(), 0);
    }
    scene.assert_over();
}

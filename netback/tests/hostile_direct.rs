//! Packets that go from guest to guest by reference, and one of the two is not to be trusted: never half a packet, and
//! the blame where it belongs.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use common::raw::{Page, Raw};
use common::{Machine, SECOND, frame};
use grant::SharedMemory;
use hypercall::abi::GrantEntryV1;
use hypercall::{DomId, Errno, GrantRef, GrantStatus};
use netback::counters::{Counters, Drops};
use netback::datapath::Datapath;
use netif::slot::{RxFlags, RxId, RxRequest, RxStatus, TxFlags, TxId, TxRequest, TxStatus};
use sim::{Fault, FaultPlan, Kind, Ledger};

/// A packet of this size goes by reference, in two slots: so much is in the first,
const SIZE: u16 = 1600;
const FIRST: u16 = 1200;
/// and so much is copied privately.
const HEADER: usize = 128;

/// Two guests that know each other and take no part, and two frontends by hand: one sends, one receives.
struct Scene {
    machine: Machine,
    before: Ledger,
    sender: usize,
    from: Raw,
    receiver: usize,
    to: Raw,
    packet: Vec<u8>,
    /// Of the bystanders.
    counters: [Counters; 2],
}

fn scene() -> Scene {
    let mut machine = Machine::two();
    machine.assert_carries(0, 1);
    let before = machine.held();
    let (receiver, mut to) = machine.raw();
    // Known to the switch.
    let hello = frame([0xff; 6], machine.guests[receiver].mac(), 60, 0);
    to.data.write_bytes(0, &hello);
    to.push_plain(0, 60);
    to.go();
    machine.settle();
    to.responses();
    let (sender, from) = machine.raw();
    let (dst, src) = (machine.guests[receiver].mac(), machine.guests[sender].mac());
    let packet = frame(dst, src, SIZE.into(), 9);
    from.data.write_bytes(0, &packet);
    let counters = [0, 1].map(|guest| machine.status(guest).unwrap().counters);
    Scene { machine, before, sender, from, receiver, to, packet, counters }
}

impl Scene {
    /// A packet whose first slot is good, and whose second is of `gref`.
    fn push(&mut self, id: u16, gref: GrantRef) {
        let head = self.from.request(id, 0, SIZE, TxFlags::MORE_DATA);
        self.from.push(head);
        let rest = self.from.request(id + 1, FIRST, SIZE - FIRST, TxFlags::empty());
        self.from.push(TxRequest { gref, ..rest });
    }

    fn push_good(&mut self, id: u16) {
        let gref = self.from.data.gref();
        self.push(id, gref);
    }

    fn post(&mut self, count: usize) {
        self.to.post(&self.machine.guests[self.receiver], count);
        self.to.go();
        self.machine.settle();
    }

    fn post_gref(&mut self, id: u16, gref: GrantRef) {
        self.to.rx.push(RxRequest { id: RxId(id), gref }).unwrap();
        self.to.go();
        self.machine.settle();
    }

    fn run(&mut self) {
        self.from.go();
        self.machine.settle();
    }

    /// Statuses by id, in the order of ids.
    fn answers(&mut self) -> Vec<(u16, TxStatus)> {
        let mut answers: Vec<_> =
            self.from.responses().into_iter().map(|got| (got.id.0, got.status)).collect();
        answers.sort_by_key(|(id, _)| *id);
        answers
    }

    /// Ids and statuses, in the order of slots; nothing comes with an error.
    fn received(&mut self) -> Vec<(u16, i16)> {
        self.to.rx.poll().unwrap();
        let got: Vec<_> = self.to.rx.responses().map(|(_, response)| response).collect();
        let failed = got.iter().filter(|response| response.status == RxStatus::ERROR);
        for response in failed {
            assert_eq!(response.flags, RxFlags::empty());
        }
        got.into_iter().map(|response| (response.id.0, response.status.0)).collect()
    }

    fn sender_mac(&self) -> [u8; 6] {
        self.machine.guests[self.sender].mac()
    }

    fn bytes(&self, page: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.to.rx_data[page].read_bytes(0, &mut bytes);
        bytes
    }

    fn sent(&self) -> Counters {
        self.machine.status(self.sender).unwrap().counters
    }

    fn taken(&self) -> Counters {
        self.machine.status(self.receiver).unwrap().counters
    }

    /// Whom the one packet that was lost is held against.
    fn assert_blamed(&self, sender: u64, receiver: u64) {
        let of = |grant| {
            let mut drops = Drops::default();
            drops.grant = grant;
            drops
        };
        assert_eq!((self.sent().tx_drops, self.taken().rx_drops), (of(sender), of(receiver)));
    }

    /// Both go on, and in the end nothing of them is held. Nobody else has noticed.
    fn assert_over(mut self) {
        assert_eq!(self.machine.backend.open(), 0);
        self.answers();
        self.received();
        let (dst, src) = (self.machine.guests[self.receiver].mac(), self.sender_mac());
        let last = frame(dst, src, SIZE.into(), 77);
        self.from.data.write_bytes(0, &last);
        self.post(1);
        self.push_good(500);
        self.run();
        assert_eq!(self.answers(), [(500, TxStatus::OKAY), (501, TxStatus::OKAY)]);
        assert_eq!(self.received().last().unwrap().1, SIZE.cast_signed());
        let pages = 0..self.to.rx_data.len();
        assert!(pages.into_iter().any(|page| self.bytes(page, SIZE.into()) == last));
        let Self { mut machine, before, sender, receiver, counters, .. } = self;
        assert_eq!(machine.take_notices(sender).len() + machine.take_notices(receiver).len(), 4);
        machine.assert_unnoticed(&[sender, receiver]);
        for guest in [0, 1] {
            assert_eq!(machine.status(guest).unwrap().counters, counters[guest]);
        }
        machine.set_state(sender, "6");
        machine.set_state(receiver, "6");
        machine.assert_let_go(sender);
        machine.assert_let_go(receiver);
        assert_eq!(machine.held().since(&before).to_string(), "");
        machine.assert_carries(0, 1);
        machine.assert_no_buffer_out();
    }
}

const SENT: i16 = SIZE.cast_signed();
const FAILED: i16 = -1;
const OKAY: TxStatus = TxStatus::OKAY;
const BAD: TxStatus = TxStatus::ERROR;

/// Of three packets the second has a second slot that is bad.
fn assert_bad_reference(bad: impl Fn(&Machine, usize) -> (GrantRef, Option<Page>)) {
    let mut scene = scene();
    let (gref, _kept) = bad(&scene.machine, scene.sender);
    scene.post(5);
    scene.push_good(0);
    scene.push(2, gref);
    scene.push_good(4);
    scene.run();
    assert_eq!(scene.answers(), [(0, OKAY), (1, OKAY), (2, BAD), (3, BAD), (4, OKAY), (5, OKAY)]);
    assert_eq!(scene.received(), [(0, SENT), (1, FAILED), (2, SENT)]);
    for page in [0, 2] {
        assert!(scene.bytes(page, SIZE.into()) == scene.packet);
    }
    scene.assert_blamed(1, 0);
    assert_eq!(scene.sent().tx_paths.of(Datapath::Direct).packets, 2);
    assert_eq!(scene.taken().rx.packets, 2);
    scene.assert_over();
}

#[test]
fn hostile_24_direct_references_that_were_never_granted() {
    for gref in [0, 500, 511, 512, 100_000, u32::MAX] {
        assert_bad_reference(|_, _| (GrantRef(gref), None));
    }
}

#[test]
fn hostile_25_direct_references_for_somebody_else() {
    assert_bad_reference(|machine, sender| {
        // Not even the one that the packet is for.
        let receiver = machine.guests[sender - 1].id;
        let page = machine.guests[sender].page_for(receiver, true);
        (page.gref(), Some(page))
    });
}

/// Has something done between the copy of the headers and that of the rest.
fn between(machine: &Machine, what: impl Fn() + Send + Sync + 'static) {
    let calls = AtomicUsize::new(0);
    machine.hv.before(Kind::Copy, move || {
        if calls.fetch_add(1, Ordering::Relaxed) == 1 {
            what();
        }
    });
}

#[test]
fn hostile_26_direct_a_reference_revoked_after_its_headers_were_read() {
    let mut scene = scene();
    let page = scene.machine.guests[scene.sender].page(true);
    page.write_bytes(0, &scene.packet);
    let (sim, id, gref) =
        (scene.machine.sim.clone(), scene.machine.guests[scene.sender].id, page.gref());
    let entry = sim.grant_entry(id, gref).unwrap();
    let again = sim.clone();
    between(&scene.machine, move || {
        sim.set_grant_entry(id, gref, GrantEntryV1::default());
    });
    scene.post(2);
    scene.from.push(TxRequest {
        gref,
        offset: 0,
        flags: TxFlags::empty(),
        id: TxId(7),
        size: SIZE,
    });
    scene.run();
    again.set_grant_entry(id, gref, entry);
    assert_eq!(scene.answers(), [(7, BAD)]);
    assert_eq!(scene.received(), [(0, FAILED)]);
    scene.assert_blamed(1, 0);
    scene.assert_over();
}

/// The relay's own copies: the first of the batch is of the headers, one is of the rest of the first slot, one of the
/// second slot.
fn assert_relay_fault(fault: Fault) {
    for which in 0..3 {
        let mut scene = scene();
        scene.post(2);
        // Behind the copy of the headers from the sender.
        scene.machine.sim.inject(DomId(0), FaultPlan::nth(Kind::Copy, 1 + which, fault));
        scene.push_good(0);
        scene.run();
        assert_eq!(scene.machine.sim.faults_left(DomId(0)), 0);
        assert_eq!(scene.received(), [(0, FAILED)], "{fault:?} {which}");
        // The sender's pages can be read: it has done nothing.
        assert_eq!(scene.answers(), [(0, OKAY), (1, OKAY)]);
        scene.assert_blamed(0, 1);
        scene.assert_over();
    }
}

/// A relay that Xen cannot do now is not tried again: the receiver's ring would have to wait for a sender's page.
#[test]
fn hostile_27_direct_is_not_tried_again() {
    assert_relay_fault(Fault::Status(GrantStatus::EAGAIN));
}

/// Headers are: nobody waits for them but their sender.
#[test]
fn hostile_27_direct_headers_that_cannot_be_read_now() {
    let mut scene = scene();
    scene.post(2);
    let again = Fault::Status(GrantStatus::EAGAIN);
    scene.machine.sim.inject(DomId(0), FaultPlan::next(Kind::Copy, again));
    scene.push_good(0);
    scene.push_good(2);
    scene.run();
    assert_eq!((scene.answers(), scene.received()), (vec![], vec![]));
    scene.machine.pass(2 * common::MS);
    assert_eq!(scene.answers(), [0, 1, 2, 3].map(|id| (id, OKAY)));
    assert_eq!(scene.received(), [(0, SENT), (1, SENT)]);
    scene.assert_blamed(0, 0);
    scene.assert_over();
}

#[test]
fn hostile_28_direct_a_status_that_was_left_as_it_was() {
    assert_relay_fault(Fault::Untouched);
}

#[test]
fn hostile_29_direct_statuses_that_are_no_success() {
    assert_relay_fault(Fault::Status(GrantStatus(1)));
    assert_relay_fault(Fault::Status(GrantStatus::BAD_PAGE));
}

#[test]
fn hostile_30_direct_refused_batches() {
    let mut scene = scene();
    scene.post(9);
    // Of the calls the first copies headers, the second relays.
    let fault = Fault::Errno(Errno::FAULT);
    scene.machine.sim.inject(DomId(0), FaultPlan::nth(Kind::Copy, 1, fault));
    scene.push_good(0);
    scene.push_good(2);
    scene.run();
    assert_eq!(scene.received(), [(0, FAILED), (1, FAILED)]);
    assert_eq!(scene.answers(), [0, 1, 2, 3].map(|id| (id, OKAY)));
    assert_eq!(scene.sent().tx_drops, Drops::default());
    assert_eq!((scene.taken().rx_drops.hypercall, scene.taken().rx_drops.grant), (2, 0));
    // It is no row of refusals: each relay follows a copy of headers.
    for round in 0..20 {
        scene.machine.sim.inject(DomId(0), FaultPlan::nth(Kind::Copy, 1, fault));
        scene.post(1);
        scene.push_good(10 + 2 * round);
        scene.run();
        scene.received();
        scene.answers();
        if !scene.machine.is_connected(scene.receiver) {
            break;
        }
    }
    // Xen refuses all that is for it.
    assert!(!scene.machine.is_connected(scene.receiver), "it is given up");
    assert!(scene.machine.is_connected(scene.sender));
    let Scene { mut machine, sender, receiver, before, .. } = scene;
    machine.sim.clear_faults(DomId(0));
    machine.set_state(sender, "6");
    machine.assert_unnoticed(&[sender, receiver]);
    machine.assert_let_go(sender);
    machine.assert_let_go(receiver);
    assert_eq!(machine.held().since(&before).to_string(), "");
    machine.assert_carries(0, 1);
    machine.assert_no_buffer_out();
}

/// What was checked is what is sent: the headers. The rest is the sender's own affair.
#[test]
fn hostile_34_direct_a_packet_that_changes_after_it_was_looked_at() {
    let mut scene = scene();
    let page = scene.machine.guests[scene.sender].page(true);
    page.write_bytes(0, &scene.packet);
    let (sim, id, gref) =
        (scene.machine.sim.clone(), scene.machine.guests[scene.sender].id, page.gref());
    let at = sim.grant_entry(id, gref).unwrap();
    between(&scene.machine, move || {
        let wrote = sim.write(id, hypercall::Gfn(at.frame.into()), 0, &[0xee; 4096]);
        assert!(wrote);
    });
    scene.post(2);
    let head = scene.from.request(7, 0, SIZE, TxFlags::empty());
    scene.from.push(TxRequest { gref, ..head });
    scene.run();
    assert_eq!(scene.answers(), [(7, OKAY)]);
    assert_eq!(scene.received(), [(0, SENT)]);
    let bytes = scene.bytes(0, SIZE.into());
    assert!(bytes[..HEADER] == scene.packet[..HEADER]);
    assert!(bytes[HEADER..].iter().all(|byte| *byte == 0xee));
    scene.assert_over();
}

/// It is the receiver's own loss.
#[test]
fn hostile_38_direct_pages_that_cannot_be_written() {
    let mut scene = scene();
    let guest = &scene.machine.guests[scene.receiver];
    let read_only = guest.page(true);
    let sender = scene.machine.guests[scene.sender].id;
    let foreign = guest.page_for(sender, false);
    let grefs = [read_only.gref(), foreign.gref(), GrantRef(400), GrantRef(u32::MAX)];
    for (round, gref) in (0..).zip(grefs) {
        scene.post_gref(0x1234, gref);
        scene.push_good(2 * round);
        scene.run();
        assert_eq!(scene.received(), [(0x1234, FAILED)]);
        assert_eq!(scene.answers(), [(2 * round, OKAY), (2 * round + 1, OKAY)]);
        scene.assert_blamed(0, u64::from(round) + 1);
    }
    assert_eq!(scene.sent().tx_paths.of(Datapath::Direct).packets, 4);
    scene.assert_over();
}

#[test]
fn hostile_38_direct_both_are_bad() {
    let mut scene = scene();
    scene.post_gref(9, GrantRef(400));
    scene.push(0, GrantRef(400));
    scene.run();
    assert_eq!(scene.received(), [(9, FAILED)]);
    assert_eq!(scene.answers(), [(0, BAD), (1, BAD)]);
    scene.assert_blamed(1, 0);
    scene.assert_over();
}

#[test]
fn hostile_39_direct_the_last_page_of_a_packet_is_bad() {
    let mut scene = scene();
    scene.post(2);
    scene.post_gref(2, GrantRef(400));
    // 10,000 bytes in three slots, all from one page.
    let more = TxFlags::MORE_DATA;
    for (id, size, flags) in [(0, 10_000, more), (1, 4000, more), (2, 3000, TxFlags::empty())] {
        let request = scene.from.request(id, 0, size, flags);
        scene.from.push(TxRequest { offset: 0, ..request });
    }
    scene.run();
    assert_eq!(scene.received(), [0, 1, 2].map(|id| (id, FAILED)), "all of it failed");
    assert_eq!(scene.answers(), [0, 1, 2].map(|id| (id, OKAY)));
    scene.assert_blamed(0, 1);
    scene.assert_over();
}

/// What it sends to itself goes nowhere; it is answered and nothing of it is kept.
#[test]
fn hostile_41_direct_a_guest_sends_to_itself() {
    let mut scene = scene();
    let own = scene.machine.guests[scene.sender].mac();
    scene.from.data.write_bytes(0, &frame(own, own, SIZE.into(), 1));
    for id in 0..40 {
        scene.push_good(2 * id);
    }
    scene.run();
    assert_eq!(scene.answers(), (0..80).map(|id| (id, OKAY)).collect::<Vec<_>>());
    assert_eq!(scene.machine.backend.switch_counters().hairpin, 40);
    assert_eq!(scene.received(), []);
    scene.machine.assert_no_buffer_out();
    scene.assert_over();
}

/// A receiver that posts pages and goes away with them promised: the sender is answered.
#[test]
fn hostile_41_direct_the_receiver_is_gone_before_it_gets_anything() {
    let mut scene = scene();
    scene.post(9);
    scene.push_good(0);
    let _ = scene.from.tx.publish();
    scene.from.channel.notify().unwrap();
    let receiver = scene.receiver;
    let id = scene.machine.guests[receiver].id;
    scene.machine.sim.destroy(id);
    scene.machine.destroy(receiver);
    scene.machine.pass(SECOND);
    let mut answers = scene.answers();
    answers.dedup_by_key(|(_, status)| *status);
    assert_eq!(answers.len(), 1, "one way or the other, each slot is answered");
    assert_eq!(scene.machine.backend.open(), 0);
    let Scene { mut machine, sender, before, .. } = scene;
    machine.set_state(sender, "6");
    machine.assert_let_go(sender);
    machine.assert_let_go(receiver);
    machine.assert_unnoticed(&[sender, receiver]);
    assert_eq!(machine.held().since(&before).to_string(), "");
    machine.assert_carries(0, 1);
    machine.assert_no_buffer_out();
}

//! Pages that a frontend has agreed to keep mapped, and what it does to them then.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::raw::{Page, Raw};
use common::{Machine, frame};
use evtchn::Channel;
use grant::SharedMemory;
use hypercall::abi::GrantEntryV1;
use hypercall::{DomId, Errno, GrantRef};
use netback::datapath::Datapath;
use netfront::Meta;
use netif::ctrl::{CtrlFrontRing, CtrlRequest, CtrlStatus, CtrlType, StaticGrant};
use netif::slot::{RxId, RxRequest, TxFlags, TxRequest, TxStatus};
use sim::{Fault, FaultPlan, Kind, SimHv};

struct Scene {
    machine: Machine,
    guest: usize,
    raw: Raw,
    ring: CtrlFrontRing<Page>,
    channel: Channel<SimHv>,
}

/// A frontend by hand that has its pages kept mapped: the one it sends from, and `kept` of those that it posts.
fn scene(kept: usize) -> Scene {
    let mut machine = Machine::two();
    machine.assert_carries(0, 1);
    let guest = machine.bare_guest();
    let mut raw = Raw::new(&machine.guests[guest], 0);
    let page = machine.guests[guest].page(false);
    let channel = machine.guests[guest].upcalls.binder().alloc_unbound(DomId(0)).unwrap();
    let ring = CtrlFrontRing::init_at(page.clone(), 0);
    let mut keys = raw.keys();
    keys.push(("ctrl-ring-ref", page.gref().to_string()));
    keys.push(("event-channel-ctrl", channel.port().to_string()));
    machine.offer(guest, &keys, "4");
    assert!(machine.is_connected(guest));
    let hello = frame([0xff; 6], machine.guests[guest].mac(), 60, 0);
    raw.data.write_bytes(0, &hello);
    raw.push_plain(0, 60);
    raw.go();
    machine.settle();
    raw.responses();
    raw.post(&machine.guests[guest], 4);
    machine.guests[0].take();
    machine.take_local();
    machine.take_notices(guest);
    let mut scene = Scene { machine, guest, raw, ring, channel };
    let posted = scene.raw.rx_data.iter().take(kept).map(|page| (page.gref(), false));
    let mut grefs: Vec<_> = posted.collect();
    grefs.push((scene.raw.data.gref(), true));
    assert_eq!(scene.ask(CtrlType::ADD_GREF_MAPPING, &grefs), (CtrlStatus::SUCCESS, 0));
    scene
}

impl Scene {
    /// A request about a list of pages.
    fn ask(&mut self, kind: CtrlType, grefs: &[(GrantRef, bool)]) -> (CtrlStatus, u32) {
        let list = self.machine.guests[self.guest].page(false);
        for (index, &(gref, readonly)) in grefs.iter().enumerate() {
            let words = StaticGrant { gref, readonly, status: CtrlStatus::SUCCESS }.encode();
            for (word, value) in words.into_iter().enumerate() {
                let order = std::sync::atomic::Ordering::SeqCst;
                list.store_u32(index * 8 + word * 4, value, order);
            }
        }
        let data = [0, list.gref().0, grefs.len() as u32];
        self.ring.push(CtrlRequest { id: 1, kind, data }).unwrap();
        let _ = self.ring.publish();
        self.channel.notify().unwrap();
        self.machine.settle();
        assert_eq!(self.ring.poll(), Ok(1));
        let (_, response) = self.ring.take().unwrap();
        (response.status, response.data)
    }

    fn packet(&self, len: usize) -> Vec<u8> {
        frame(self.machine.guests[0].mac(), self.machine.guests[self.guest].mac(), len, 9)
    }

    fn run(&mut self) {
        self.raw.go();
        self.machine.settle();
    }

    fn answers(&mut self) -> Vec<(u16, TxStatus)> {
        let answers = self.raw.responses().into_iter();
        answers.map(|response| (response.id.0, response.status)).collect()
    }

    fn sent(&self, path: Datapath) -> u64 {
        self.machine.status(self.guest).unwrap().counters.tx_paths.of(path).packets
    }

    fn assert_over(mut self) {
        let sent = self.packet(600);
        self.raw.data.write_bytes(0, &sent);
        self.machine.guests[0].take();
        self.raw.push_plain(999, 600);
        self.run();
        assert!(self.machine.guests[0].take() == [(sent, Meta::default())]);
        assert_eq!(self.answers().last(), Some(&(999, TxStatus::OKAY)));
        assert_eq!(self.machine.take_notices(self.guest), []);
        let Self { mut machine, guest, .. } = self;
        machine.set_state(guest, "6");
        machine.assert_unnoticed(&[guest]);
        machine.assert_let_go(guest);
        assert_eq!(machine.mapper.parked(), 0);
        machine.assert_carries(0, 1);
        machine.assert_no_buffer_out();
    }
}

/// A packet that is in a kept page and in one that is none is copied, and dropped as a whole.
#[test]
fn hostile_24_static_and_a_reference_that_was_never_granted() {
    for gref in [GrantRef(400), GrantRef(u32::MAX)] {
        let mut scene = scene(0);
        scene.raw.data.write_bytes(0, &scene.packet(500));
        let head = scene.raw.request(1, 0, 500, TxFlags::MORE_DATA);
        let rest = scene.raw.request(2, 400, 100, TxFlags::empty());
        scene.raw.push(head);
        scene.raw.push(TxRequest { gref, ..rest });
        scene.run();
        assert_eq!(scene.answers(), [(1, TxStatus::ERROR), (2, TxStatus::ERROR)]);
        assert!(scene.machine.guests[0].take().is_empty());
        assert_eq!(scene.sent(Datapath::Static), 0);
        scene.assert_over();
    }
}

/// What is mapped stays so: that the reference is taken back meanwhile is the guest's own affair.
#[test]
fn hostile_26_static_a_reference_that_is_taken_back() {
    let mut scene = scene(0);
    let (id, gref) = (scene.machine.guests[scene.guest].id, scene.raw.data.gref());
    let entry = scene.machine.sim.grant_entry(id, gref).unwrap();
    scene.machine.sim.set_grant_entry(id, gref, GrantEntryV1::default());
    let sent = scene.packet(500);
    scene.raw.data.write_bytes(0, &sent);
    scene.raw.push_plain(1, 500);
    scene.run();
    assert!(scene.machine.guests[0].take() == [(sent, Meta::default())]);
    assert_eq!((scene.answers(), scene.sent(Datapath::Static)), (vec![(1, TxStatus::OKAY)], 1));
    scene.machine.sim.set_grant_entry(id, gref, entry);
    scene.assert_over();
}

/// Copies that Xen refuses are nothing to a packet that takes none.
#[test]
fn hostile_30_static_refused_batches() {
    let mut scene = scene(0);
    let sent = scene.packet(500);
    scene.raw.data.write_bytes(0, &sent);
    scene.raw.push_plain(1, 500);
    let bad = scene.raw.request(2, 0, 500, TxFlags::empty());
    scene.raw.push(TxRequest { gref: scene.raw.tx_page.gref(), ..bad });
    scene.machine.sim.inject(DomId(0), FaultPlan::next(Kind::Copy, Fault::Errno(Errno::FAULT)));
    scene.run();
    assert_eq!(scene.answers(), [(1, TxStatus::OKAY), (2, TxStatus::ERROR)]);
    assert!(scene.machine.guests[0].take() == [(sent, Meta::default())]);
    scene.machine.pass(2 * common::MS);
    scene.assert_over();
}

/// All of it is read at once, before it is looked at: what changes later is not in it.
#[test]
fn hostile_34_static_a_page_that_changes() {
    let mut scene = scene(0);
    let sent = scene.packet(3000);
    scene.raw.data.write_bytes(0, &sent);
    let (sim, id) = (scene.machine.sim.clone(), scene.machine.guests[scene.guest].id);
    let at = sim.grant_entry(id, scene.raw.data.gref()).unwrap().frame;
    // Before the copy of another packet's, which comes with it: kept pages are read before that.
    scene.machine.hv.before(Kind::Copy, move || {
        assert!(sim.write(id, hypercall::Gfn(at.into()), 0, &[0xee; 4096]));
    });
    scene.raw.push_plain(1, 3000);
    let other = scene.raw.request(2, 0, 500, TxFlags::empty());
    scene.raw.push(TxRequest { gref: GrantRef(400), ..other });
    scene.run();
    scene.machine.hv.before(Kind::Copy, || ());
    let mut now = [0; 3000];
    scene.raw.data.read_bytes(0, &mut now);
    assert_eq!(now, [0xee; 3000], "it has changed");
    assert!(scene.machine.guests[0].take() == [(sent, Meta::default())]);
    assert_eq!(scene.answers(), [(1, TxStatus::OKAY), (2, TxStatus::ERROR)]);
    scene.assert_over();
}

/// A packet to the guest, some of whose pages are kept mapped and one is none at all: error responses for all of it.
#[test]
fn hostile_38_39_static_the_last_page_is_bad() {
    let mut scene = scene(4);
    scene.raw.rx.push(RxRequest { id: RxId(4), gref: GrantRef(400) }).unwrap();
    scene.run();
    let (dst, src) = (scene.machine.guests[scene.guest].mac(), scene.machine.guests[0].mac());
    // Five pages.
    scene.machine.guests[0].send(&frame(dst, src, 20_000, 3));
    scene.machine.settle();
    scene.raw.rx.poll().unwrap();
    let got: Vec<_> = scene.raw.rx.responses().map(|(_, got)| (got.id.0, got.status.0)).collect();
    assert_eq!(got, [0, 1, 2, 3, 4].map(|id| (id, -1)));
    assert_eq!(scene.machine.status(scene.guest).unwrap().counters.rx_drops.grant, 1);
    scene.assert_over();
}

//! The control ring, from the store to the packets.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::sync::atomic::Ordering;

use common::raw::{Page, Raw};
use common::{Machine, SECOND};
use evtchn::Channel;
use grant::SharedMemory;
use hypercall::DomId;
use netback::{Notice, Refusal, VifFault};
use netif::ctrl::{CtrlFrontRing, CtrlRequest, CtrlStatus, CtrlType, StaticGrant};
use netif::hash::{HashTypes, Toeplitz};
use netif::keys::Features;
use netif::ring::layout;
use netif::slot::ExtraInfo;
use netif::tx::PeerFault;
use sim::SimHv;
use xenbus::device::State;

const KEY: [u32; 10] = [0x6d5a_56da, 0xc20e_5b25, 7, 8, 9, 10, 11, 12, 13, 14];

struct Ctrl {
    page: Page,
    ring: CtrlFrontRing<Page>,
    channel: Channel<SimHv>,
}

impl Ctrl {
    fn new(machine: &Machine, guest: usize) -> Self {
        let guest = &machine.guests[guest];
        let page = guest.page(false);
        let channel = guest.upcalls.binder().alloc_unbound(DomId(0)).unwrap();
        Self { ring: CtrlFrontRing::init_at(page.clone(), u32::MAX - 3), page, channel }
    }

    fn keys(&self) -> [(&'static str, String); 2] {
        [
            ("ctrl-ring-ref", self.page.gref().to_string()),
            ("event-channel-ctrl", self.channel.port().to_string()),
        ]
    }

    fn push(&mut self, kind: CtrlType, data: [u32; 3]) {
        self.ring.push(CtrlRequest { id: 3, kind, data }).unwrap();
    }

    fn ask(&mut self, machine: &mut Machine, kind: CtrlType, data: [u32; 3]) -> (CtrlStatus, u32) {
        self.push(kind, data);
        if self.ring.publish().is_needed() {
            self.channel.notify().unwrap();
        }
        machine.settle();
        assert_eq!(self.ring.poll(), Ok(1));
        let (_, response) = self.ring.take().unwrap();
        assert_eq!((response.id, response.kind), (3, kind));
        (response.status, response.data)
    }

    fn set(&mut self, machine: &mut Machine, kind: CtrlType, data: [u32; 3]) {
        assert_eq!(self.ask(machine, kind, data), (CtrlStatus::SUCCESS, 0), "{kind:?}");
    }
}

fn filled(machine: &Machine, guest: usize, words: &[u32]) -> Page {
    let page = machine.guests[guest].page(false);
    for (at, word) in words.iter().enumerate() {
        page.store_u32(at * 4, *word, Ordering::SeqCst);
    }
    page
}

/// A guest of two queues, with a control ring.
fn machine() -> (Machine, usize, [Raw; 2], Ctrl) {
    let mut machine = Machine::two();
    let guest = machine.bare_guest();
    let mut queues = [0, 1].map(|_| Raw::new(&machine.guests[guest], 0));
    let ctrl = Ctrl::new(&machine, guest);
    let mut keys: Vec<(String, String)> = Vec::new();
    for (queue, raw) in queues.iter().enumerate() {
        let own = raw.keys().into_iter().take(3);
        keys.extend(own.map(|(key, value)| (format!("queue-{queue}/{key}"), value)));
    }
    let shared = queues[0].keys().into_iter().skip(3).chain(ctrl.keys());
    keys.extend(shared.map(|(key, value)| (key.to_string(), value)));
    keys.push(("multi-queue-num-queues".into(), "2".into()));
    let keys: Vec<_> = keys.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    machine.offer(guest, &keys, "4");
    assert!(machine.is_connected(guest), "{:?}", machine.notices);
    for raw in &mut queues {
        raw.post(&machine.guests[guest], 200);
        raw.go();
    }
    machine.settle();
    (machine, guest, queues, ctrl)
}

fn tcp(machine: &Machine, guest: usize, port: u16) -> Vec<u8> {
    let (dst, src) = (machine.guests[guest].mac(), machine.guests[0].mac());
    let fixed = [8, 0, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    let rest = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0];
    [&dst[..], &src, &fixed, &port.to_be_bytes(), &rest].concat()
}

/// Sends to the guest; which queue it came by, and the extra with it.
fn arrives(
    machine: &mut Machine,
    queues: &mut [Raw; 2],
    packet: &[u8],
) -> (usize, Option<ExtraInfo>) {
    machine.guests[0].send(packet);
    machine.settle();
    let mut came = None;
    for (queue, raw) in queues.iter_mut().enumerate() {
        raw.rx.poll().unwrap();
        let got: Vec<_> = raw.rx.responses().map(|(_, response)| response).collect();
        if let Some(first) = got.first() {
            assert_eq!(usize::from(first.status.bytes().unwrap()), packet.len());
            let extra = got.get(1).map(|extra| extra.as_extra().unwrap().info);
            assert!(came.replace((queue, extra)).is_none(), "twice");
        }
    }
    came.unwrap()
}

#[test]
fn packets_are_steered_and_hashes_told() {
    let (mut machine, guest, mut queues, mut ctrl) = machine();
    assert!(machine.status(guest).unwrap().features.contains(Features::CTRL_RING));
    let packet = tcp(&machine, guest, 1);
    assert_eq!(arrives(&mut machine, &mut queues, &packet).1, None);

    let key = filled(&machine, guest, &KEY);
    ctrl.set(&mut machine, CtrlType::SET_HASH_ALGORITHM, [1, 0, 0]);
    ctrl.set(&mut machine, CtrlType::SET_HASH_FLAGS, [15, 0, 0]);
    ctrl.set(&mut machine, CtrlType::SET_HASH_KEY, [key.gref().0, 40, 0]);
    let table: Vec<u32> = (0..128).map(|at| at / 3 % 2).collect();
    let page = filled(&machine, guest, &table);
    ctrl.set(&mut machine, CtrlType::SET_HASH_MAPPING_SIZE, [128, 0, 0]);
    ctrl.set(&mut machine, CtrlType::SET_HASH_MAPPING, [page.gref().0, 128, 0]);
    let bytes: Vec<u8> = KEY.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let toeplitz = Toeplitz::new(&bytes);
    let mut seen = [0; 2];
    for port in 0..40 {
        let packet = tcp(&machine, guest, port);
        let hash = toeplitz.packet(&packet, HashTypes::all()).unwrap();
        let (queue, extra) = arrives(&mut machine, &mut queues, &packet);
        assert_eq!(queue, table[hash.value as usize % 128] as usize);
        let value = hash.value.to_le_bytes();
        assert_eq!(extra, Some(ExtraInfo::Hash { kind: 1, algorithm: 1, value }));
        seen[queue] += 1;
    }
    assert!(seen.iter().all(|count| *count > 5), "{seen:?}");
    // What has no hash goes by the first entry, and untold.
    let first = filled(&machine, guest, &[1]);
    ctrl.set(&mut machine, CtrlType::SET_HASH_MAPPING, [first.gref().0, 1, 0]);
    let arp = common::frame(machine.guests[guest].mac(), machine.guests[0].mac(), 60, 1);
    assert_eq!(arrives(&mut machine, &mut queues, &arp), (1, None));
    machine.set_state(guest, "6");
    machine.assert_let_go(guest);
    machine.assert_carries(0, 1);
}

#[test]
fn what_was_asked_before_connecting_is_answered() {
    let mut machine = Machine::two();
    let guest = machine.bare_guest();
    let raw = Raw::new(&machine.guests[guest], 0);
    let mut ctrl = Ctrl::new(&machine, guest);
    for _ in 0..100 {
        ctrl.push(CtrlType::GET_HASH_MAPPING_SIZE, [0; 3]);
    }
    let _ = ctrl.ring.publish();
    let keys: Vec<_> = raw.keys().into_iter().chain(ctrl.keys()).collect();
    machine.offer(guest, &keys, "4");
    assert_eq!(ctrl.ring.poll(), Ok(100));
    while let Some((_, response)) = ctrl.ring.take() {
        assert_eq!((response.status, response.data), (CtrlStatus::SUCCESS, 128));
    }
    assert_eq!(ctrl.ask(&mut machine, CtrlType(77), [0; 3]), (CtrlStatus::NOT_SUPPORTED, 0));
}

#[test]
fn a_notification_that_was_lost_is_made_up_for() {
    let (mut machine, _, _queues, mut ctrl) = machine();
    ctrl.push(CtrlType::GET_HASH_MAPPING_SIZE, [0; 3]);
    let _ = ctrl.ring.publish();
    machine.settle();
    assert_eq!(ctrl.ring.poll(), Ok(0));
    machine.pass(2 * SECOND);
    assert_eq!(ctrl.ring.poll(), Ok(1));
}

#[test]
fn static_pages_go_with_the_connection() {
    for end in ["5", "6", "1", "x"] {
        let (mut machine, guest, queues, mut ctrl) = machine();
        let pages: Vec<_> = (0..100).map(|_| machine.guests[guest].page(false)).collect();
        let words: Vec<u32> = pages
            .iter()
            .flat_map(|page| {
                let status = CtrlStatus::SUCCESS;
                StaticGrant { gref: page.gref(), readonly: false, status }.encode()
            })
            .collect();
        let list = filled(&machine, guest, &words);
        let live = machine.mapper.live();
        ctrl.set(&mut machine, CtrlType::ADD_GREF_MAPPING, [1, list.gref().0, 100]);
        assert_eq!(machine.mapper.live(), live + 100);
        let kind = CtrlType::DEL_GREF_MAPPING;
        let answer = ctrl.ask(&mut machine, kind, [1, list.gref().0, 10]);
        assert_eq!(answer, (CtrlStatus::SUCCESS, 10));
        assert_eq!(machine.mapper.live(), live + 90);
        machine.set_state(guest, end);
        machine.assert_let_go(guest);
        assert_eq!(machine.mapper.parked(), 0);
        machine.assert_carries(0, 1);
        drop(queues);
    }
}

/// Hostile 32: a jump of the producer closes the vif, and all that it had goes.
#[test]
fn hostile_32_the_control_rings_producer_jumps() {
    for index in [200, u32::MAX / 2, u32::MAX - 4] {
        let (mut machine, guest, _queues, mut ctrl) = machine();
        let page = machine.guests[guest].page(false);
        let status = CtrlStatus::SUCCESS;
        let entry = StaticGrant { gref: page.gref(), readonly: true, status }.encode();
        let list = filled(&machine, guest, &entry);
        ctrl.set(&mut machine, CtrlType::ADD_GREF_MAPPING, [0, list.gref().0, 1]);
        ctrl.page.store_u32(layout::REQ_PROD, index, Ordering::SeqCst);
        ctrl.channel.notify().unwrap();
        machine.settle();
        let notices = machine.take_notices(guest);
        let fault =
            |it: &Notice| matches!(it, Notice::Faulted(_, VifFault::Peer(PeerFault::Ring(_))));
        assert!(notices.iter().any(fault), "{notices:?}");
        assert_eq!(machine.states(guest).1, State::Closing);
        machine.assert_let_go(guest);
        machine.assert_carries(0, 1);
    }
}

/// Hostile 32, 91: requests as fast as they are answered do not keep others waiting.
#[test]
fn hostile_32_requests_without_end() {
    let (mut machine, guest, _queues, mut ctrl) = machine();
    let list = machine.guests[guest].page(false);
    for _ in 0..50 {
        while ctrl.ring.free() > 0 {
            ctrl.push(CtrlType::DEL_GREF_MAPPING, [0, list.gref().0, 512]);
        }
        let _ = ctrl.ring.publish();
        ctrl.channel.notify().unwrap();
        let (to, from) = (machine.guests[1].mac(), machine.guests[0].mac());
        let packet = common::frame(to, from, 100, 1);
        machine.guests[0].send(&packet);
        for _ in 0..4 {
            machine.turn();
        }
        assert_eq!(machine.guests[1].take().len(), 1);
        ctrl.ring.poll().unwrap();
        while ctrl.ring.take().is_some() {}
    }
    assert!(machine.is_connected(guest));
    machine.settle();
    machine.assert_carries(0, 1);
}

/// Hostile 63, 67, 68: a control ring that cannot be had; nothing else is had, either.
#[test]
fn hostile_67_68_control_rings_that_are_not_to_be_had() {
    type Edit = fn(&Machine, usize, &mut Vec<(&'static str, String)>);
    fn replace(keys: &mut Vec<(&'static str, String)>, key: &'static str, value: &str) {
        keys.retain(|(name, _)| *name != key);
        keys.push((key, value.to_string()));
    }
    let edits: [(&str, Edit); 6] = [
        ("event-channel-ctrl", |_, _, keys| keys.retain(|(key, _)| *key != "event-channel-ctrl")),
        ("event-channel-ctrl", |_, _, keys| replace(keys, "event-channel-ctrl", "9999")),
        ("ctrl-ring-ref", |_, _, keys| replace(keys, "ctrl-ring-ref", "4000")),
        ("ctrl-ring-ref", |_, _, keys| replace(keys, "ctrl-ring-ref", "0x9")),
        ("ctrl-ring-ref", |machine, guest, keys| {
            let page = machine.guests[guest].page(true);
            replace(keys, "ctrl-ring-ref", &page.gref().to_string());
            std::mem::forget(page);
        }),
        ("ctrl-ring-ref", |machine, guest, keys| {
            let page = machine.guests[guest].page(false);
            page.store_u32(layout::REQ_PROD, 129, Ordering::SeqCst);
            replace(keys, "ctrl-ring-ref", &page.gref().to_string());
            std::mem::forget(page);
        }),
    ];
    for (expected, edit) in edits {
        let mut machine = Machine::two();
        let guest = machine.bare_guest();
        let raw = Raw::new(&machine.guests[guest], 0);
        let ctrl = Ctrl::new(&machine, guest);
        let mut keys: Vec<_> = raw.keys().into_iter().chain(ctrl.keys()).collect();
        edit(&machine, guest, &mut keys);
        machine.offer(guest, &keys, "4");
        let notices = machine.take_notices(guest);
        let Some(Notice::Refused(_, refusal)) = notices.last() else { panic!("{notices:?}") };
        let key = match refusal {
            Refusal::Missing(key) | Refusal::BadValue(key) => key,
            Refusal::Map { key, .. } | Refusal::Ring { key, .. } | Refusal::Bind { key, .. } => key,
            other => panic!("{other:?}"),
        };
        assert_eq!(*key, expected, "{refusal:?}");
        assert_eq!(machine.states(guest).1, State::Closing);
        machine.assert_let_go(guest);
        machine.assert_carries(0, 1);
    }
}

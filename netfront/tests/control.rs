//! The control ring: hashing and static grants, with a backend that agrees, one that does not, and one that lies.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::collections::BTreeMap;

use common::{FRONT, Rings, World, okay, rx};
use evtchn::Channel;
use grant::{Mapping, SharedMemory};
use hypercall::{DomId, GrantRef, Handle, Port};
use netfront::{BackendFault, Config, Meta, Notice};
use netif::ctrl::{CtrlBackRing, CtrlRequest, CtrlResponse, CtrlStatus, CtrlType, StaticGrant};
use netif::hash::{HashTypes, Toeplitz};
use netif::ring::{RingFault, layout};
use netif::slot::RxFlags;
use sim::SimHv;
use std::sync::atomic::Ordering;
use xenbus::device::State;

const OFFER: &[(&str, &str)] = &[("feature-ctrl-ring", "1"), ("multi-queue-max-queues", "4")];

/// The backend's end of the control ring, and what it was asked to remember.
struct Backend {
    ring: CtrlBackRing<Mapping<SimHv>>,
    grant: Mapping<SimHv>,
    channel: Channel<SimHv>,
    asked: Vec<CtrlRequest>,
    algorithm: u32,
    types: u32,
    key: Vec<u8>,
    mapping: Vec<u32>,
    /// References kept, by queue; and whether to read alone.
    kept: Vec<BTreeMap<u32, bool>>,
    limit: u32,
    refuse: Option<CtrlType>,
}

impl Backend {
    fn attach(world: &mut World, queues: usize) -> Self {
        let keys = ["ctrl-ring-ref", "event-channel-ctrl"].map(|key| format!("{FRONT}/{key}"));
        let values: Vec<u32> =
            world.read(&keys).into_iter().map(|value| value.unwrap().parse().unwrap()).collect();
        let binder = world.own.binder();
        Self {
            ring: CtrlBackRing::attach(world.map(values[0])).map_err(|(fault, _)| fault).unwrap(),
            grant: world.map(values[0]),
            channel: binder.bind_interdomain(DomId(1), Port(values[1])).unwrap(),
            asked: Vec::new(),
            algorithm: 0,
            types: 0,
            key: Vec::new(),
            mapping: Vec::new(),
            kept: vec![BTreeMap::new(); queues],
            limit: 512,
            refuse: None,
        }
    }

    fn list(&self, world: &World, [_, gref, count]: [u32; 3]) -> Vec<StaticGrant> {
        assert!(count > 0 && count <= 512);
        let page = world.map(gref);
        let word = |at| page.load_u32(at, Ordering::Relaxed);
        (0..count as usize)
            .map(|at| StaticGrant::decode([word(at * 8), word(at * 8 + 4)]))
            .collect()
    }

    fn act(&mut self, world: &World, request: CtrlRequest) -> Result<u32, CtrlStatus> {
        if self.refuse == Some(request.kind) {
            return Err(CtrlStatus::INVALID_PARAMETER);
        }
        let data = request.data;
        let bytes = |gref: u32, len: u32| world.peek(GrantRef(gref), 0, len as u16);
        match request.kind {
            CtrlType::SET_HASH_ALGORITHM => self.algorithm = data[0],
            CtrlType::GET_HASH_FLAGS => return Ok(0xf),
            CtrlType::SET_HASH_FLAGS => self.types = data[0],
            CtrlType::SET_HASH_KEY => self.key = bytes(data[0], data[1]),
            CtrlType::GET_HASH_MAPPING_SIZE => return Ok(128),
            CtrlType::SET_HASH_MAPPING_SIZE => self.mapping = vec![0; data[0] as usize],
            CtrlType::SET_HASH_MAPPING => {
                assert_eq!((data[1] as usize, data[2]), (self.mapping.len(), 0));
                let table = bytes(data[0], data[1] * 4);
                let words = table.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
                self.mapping = words.collect();
            }
            CtrlType::GET_GREF_MAPPING_SIZE => return Ok(self.limit),
            CtrlType::ADD_GREF_MAPPING => {
                for it in self.list(world, data) {
                    let kept = &mut self.kept[data[0] as usize];
                    assert_eq!(kept.insert(it.gref.0, it.readonly), None, "once each");
                    assert!(kept.len() <= self.limit as usize);
                    let entry = world.sim.grant_entry(DomId(1), it.gref).unwrap();
                    assert_eq!(entry.flags & hypercall::abi::GTF_READONLY != 0, it.readonly);
                }
            }
            CtrlType::DEL_GREF_MAPPING => {
                for it in self.list(world, data) {
                    self.kept[data[0] as usize].remove(&it.gref.0);
                }
            }
            other => panic!("{other:?}"),
        }
        Ok(0)
    }

    fn serve(&mut self, world: &mut World) {
        for _ in 0..1000 {
            world.settle();
            if self.ring.poll().unwrap() == 0 {
                return;
            }
            let request = self.ring.take().unwrap();
            self.asked.push(request);
            let answer = self.act(world, request);
            let (status, data) = answer.map_or_else(|it| (it, 0), |it| (CtrlStatus::SUCCESS, it));
            let response = CtrlResponse { id: request.id, kind: request.kind, status, data };
            self.ring.push(response).unwrap();
            assert!(self.ring.publish().is_needed());
            self.channel.notify().unwrap();
        }
        panic!("no end to it");
    }
}

fn connected(queues: u16) -> (World, Vec<Rings>, Backend) {
    let config =
        Config { queues, split: false, first_index: 0xffff_fff0, ..Config::new(Handle(0)) };
    let mut world = World::plain(config).with_neighbour();
    world.offer(OFFER);
    let backend = Backend::attach(&mut world, queues.into());
    let rings = match queues {
        1 => vec![world.attach()],
        _ => world.attach_queues(queues.into()),
    };
    (world, rings, backend)
}

#[test]
fn received_flows_are_spread_as_sent_ones_are() {
    let (mut world, rings, mut backend) = connected(3);
    backend.serve(&mut world);
    assert_eq!((backend.algorithm, backend.types, backend.mapping.len()), (1, 0xf, 128));
    let toeplitz = Toeplitz::new(&backend.key);
    let mut used = [0; 3];
    for port in 0..200_u16 {
        let mut frame = [0; 54];
        frame[12] = 8;
        frame[14..34]
            .copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame[34..36].copy_from_slice(&port.to_be_bytes());
        frame[37] = 80;
        let sent = world.nic.queue_for(&frame);
        // As it comes back.
        frame[26..34].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
        frame[34..38].rotate_left(2);
        let hash = toeplitz.packet(&frame, HashTypes::from_bits_retain(backend.types)).unwrap();
        assert_eq!(backend.mapping[hash.value as usize % 128] as usize, sent);
        used[sent] += 1;
    }
    assert!(used.iter().all(|count| *count > 40), "{used:?}");
    drop((rings, backend));
    world.set(&[("state", "6")]);
    world.assert_clean();
    world.assert_unmoved();
}

#[test]
fn half_a_hash_is_none() {
    for refuse in [
        CtrlType::SET_HASH_ALGORITHM,
        CtrlType::GET_HASH_FLAGS,
        CtrlType::SET_HASH_FLAGS,
        CtrlType::SET_HASH_KEY,
        CtrlType::SET_HASH_MAPPING_SIZE,
        CtrlType::SET_HASH_MAPPING,
    ] {
        let (mut world, _rings, mut backend) = connected(2);
        backend.refuse = Some(refuse);
        backend.serve(&mut world);
        assert_eq!(backend.algorithm, 0, "{refuse:?}");
        let mut hashing = backend.asked.iter().filter(|it| it.kind.0 < 8);
        assert_eq!(hashing.next_back().unwrap().kind, CtrlType::SET_HASH_ALGORITHM);
        assert!(world.nic.static_grants() > 0, "the rest goes on");
        assert!(world.nic.is_connected());
    }
    // Without a mapping hashes are taken modulo the queues.
    let (mut world, _rings, mut backend) = connected(2);
    backend.refuse = Some(CtrlType::GET_HASH_MAPPING_SIZE);
    backend.serve(&mut world);
    assert_eq!((backend.algorithm, backend.mapping.len()), (1, 0));
}

#[test]
fn pages_are_kept_mapped_where_the_backend_agrees() {
    for queues in [1, 2] {
        let (mut world, mut rings, mut backend) = connected(queues);
        backend.serve(&mut world);
        assert!(backend.kept.iter().all(|kept| kept.len() == 256 && kept.values().all(|it| !it)));
        // Pages to send from are told as they come to be.
        for round in 1..=3 {
            world.send(10);
            backend.serve(&mut world);
            assert_eq!(backend.kept[0].values().filter(|it| **it).count(), round * 10);
        }
        assert_eq!(world.nic.static_grants(), backend.kept.iter().map(BTreeMap::len).sum());
        // Nothing is granted, or told, for a packet any more.
        let told = backend.asked.len();
        for at in 0..50 {
            rings[0].tx.poll().unwrap();
            let requests: Vec<_> = rings[0].tx.requests().collect();
            for request in requests {
                assert!(backend.kept[0].contains_key(&request.gref.0));
                rings[0].tx.push(okay(request.id.0)).unwrap();
            }
            rings[0].rx.poll().unwrap();
            let request = rings[0].rx.take().unwrap();
            assert_eq!(backend.kept[0].get(&request.gref.0), Some(&false));
            // The indices begin within the ring.
            assert_eq!(request.id.0, (at + 0xf0) % 256);
            rings[0].rx.push(rx(request.id.0, 0, RxFlags::empty(), 60)).unwrap();
            world.kick(&mut rings[0]);
            world.send(10);
            backend.serve(&mut world);
        }
        assert_eq!(backend.asked.len(), told);
        // And it is asked to let go before the connection ends.
        let now = world.now;
        for _ in 0..40 {
            // Pages that it does not keep, and is not told of any more.
            world.nic.send(0, &[7; 100], Meta::default()).unwrap();
        }
        world.nic.close(&mut world.guest.1, now);
        world.settle();
        assert_eq!(world.nic.state(), State::Connected);
        backend.serve(&mut world);
        let mut later = backend.asked[told..].iter();
        assert!(later.all(|it| it.kind == CtrlType::DEL_GREF_MAPPING));
        assert!(backend.kept.iter().all(BTreeMap::is_empty));
        assert_eq!(world.nic.state(), State::Closing);
        world.backend_closes((rings, backend));
        world.assert_clean();
        world.assert_unmoved();
    }
}

#[test]
fn no_more_pages_than_the_backend_has_room_for() {
    let (mut world, _rings, mut backend) = connected(1);
    backend.limit = 100;
    backend.serve(&mut world);
    world.send(20);
    backend.serve(&mut world);
    assert_eq!((backend.kept[0].len(), world.nic.static_grants()), (100, 100));
    for (limit, refuse) in [
        (0, None),
        (512, Some(CtrlType::GET_GREF_MAPPING_SIZE)),
        (512, Some(CtrlType::ADD_GREF_MAPPING)),
    ] {
        let (mut world, _rings, mut backend) = connected(1);
        (backend.limit, backend.refuse) = (limit, refuse);
        backend.serve(&mut world);
        world.send(20);
        backend.serve(&mut world);
        assert_eq!((backend.kept[0].len(), world.nic.static_grants()), (0, 0));
        let adds = backend.asked.iter().filter(|it| it.kind == CtrlType::ADD_GREF_MAPPING).count();
        assert!(adds <= 1, "asked once, and no more");
        assert!(world.nic.is_connected());
    }
}

#[test]
fn a_backend_that_answers_nothing_is_no_hindrance() {
    let (mut world, mut rings, backend) = connected(1);
    world.send(50);
    assert_eq!(rings[0].tx.poll().unwrap(), 50);
    drop(backend);
    world.assert_carried_on(rings.pop().unwrap());
    // Nor one that keeps pages and does not let go of them.
    let (mut world, rings, mut backend) = connected(1);
    backend.serve(&mut world);
    let now = world.now;
    world.nic.close(&mut world.guest.1, now);
    world.settle();
    assert_eq!(world.nic.state(), State::Connected);
    assert!(!world.nic.is_connected());
    world.now = world.nic.deadline().unwrap().max(now.after(1_000_000_000));
    world.settle();
    assert_eq!(world.nic.state(), State::Closing);
    world.backend_closes((rings, backend));
    world.assert_clean();
    world.assert_unmoved();
}

#[test]
fn there_is_no_control_ring_without_an_offer_or_a_use() {
    for (offer, static_grants) in [(&[][..], true), (&OFFER[..1], false)] {
        let config = Config { split: false, static_grants, ..Config::new(Handle(0)) };
        let mut world = World::plain(config).with_neighbour();
        world.offer(offer);
        let paths = ["ctrl-ring-ref", "event-channel-ctrl"].map(|key| format!("{FRONT}/{key}"));
        assert_eq!(world.read(&paths), [None, None]);
        let rings = world.attach();
        world.assert_carried_on(rings);
    }
}

fn lies(lie: impl Fn(&mut Backend, CtrlRequest) -> BackendFault) {
    let (mut world, mut rings, mut backend) = connected(1);
    world.settle();
    backend.ring.poll().unwrap();
    let request = backend.ring.take().unwrap();
    let fault = lie(&mut backend, request);
    let _ = backend.ring.publish();
    backend.channel.notify().unwrap();
    world.settle();
    assert!(world.notices.contains(&Notice::Faulted(fault)), "{:?}", world.notices);
    drop(backend);
    world.assert_left(rings.pop().unwrap(), fault);
}

#[test]
fn hostile_control_answers_to_what_was_not_asked() {
    let fine = CtrlResponse { status: CtrlStatus::SUCCESS, ..CtrlResponse::default() };
    lies(|backend, request| {
        let response = CtrlResponse { id: request.id ^ 1, kind: request.kind, ..fine };
        backend.ring.push(response).unwrap();
        BackendFault::Control(response.id)
    });
    lies(|backend, request| {
        let kind = CtrlType(request.kind.0 ^ 1);
        backend.ring.push(CtrlResponse { id: request.id, kind, ..fine }).unwrap();
        BackendFault::Control(request.id)
    });
    lies(|backend, _| {
        let index = 0xffff_fff0_u32.wrapping_add(2);
        backend.grant.store_u32(layout::RSP_PROD, index, Ordering::SeqCst);
        RingFault::Overrun { index, ahead: 2, limit: 1 }.into()
    });
    lies(|backend, _| {
        let (from, to) = (0xffff_fff0, 0xffff_ffef);
        backend.grant.store_u32(layout::RSP_PROD, to, Ordering::SeqCst);
        RingFault::MovedBack { from, to }.into()
    });
}

#[test]
fn hostile_control_events_about_nothing() {
    let (mut world, mut rings, mut backend) = connected(1);
    backend.serve(&mut world);
    for _ in 0..1000 {
        backend.channel.notify().unwrap();
        world.settle();
    }
    let port = world.read(&[format!("{FRONT}/event-channel-ctrl")]).pop().unwrap().unwrap();
    let port = Port(port.parse().unwrap());
    assert_eq!(world.sim.port_bits(DomId(1), port), Some((true, true)), "throttled");
    let deadline = world.nic.deadline().unwrap();
    assert!(deadline > world.now);
    world.assert_unmoved();
    world.pass(2_000_000_000);
    let (_, masked) = world.sim.port_bits(DomId(1), port).unwrap();
    assert!(!masked, "and heard in the end");
    let numbers: Vec<u32> = (0..8).chain([u32::MAX]).collect();
    for status in numbers {
        // Statuses that mean nothing are failures.
        let (mut world, _rings, mut backend) = connected(2);
        for _ in 0..20 {
            world.settle();
            backend.ring.poll().unwrap();
            let Some(request) = backend.ring.take() else { break };
            let (id, kind, status) = (request.id, request.kind, CtrlStatus(status));
            backend.ring.push(CtrlResponse { id, kind, status, data: u32::MAX }).unwrap();
            let _ = backend.ring.publish();
            backend.channel.notify().unwrap();
        }
        assert!(world.nic.is_connected());
    }
    drop(backend);
    // Closing asks nobody any more, so it takes its second.
    let rings = rings.pop().unwrap();
    world.nic.close(&mut world.guest.1, world.now);
    world.pass(2_000_000_000);
    world.backend_closes(rings);
    world.assert_clean();
}

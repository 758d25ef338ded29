//! A guest with an interface, a backend for it that is played by hand, and a second interface beside it, whose backend
//! keeps to the rules: whatever the first one does, that one carries on.

#![allow(dead_code, clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeMap;

use evtchn::{Channel, Upcalls};
use grant::{GrantTable, MapRequest, Mapper, Mapping, SharedMemory};
use hypercall::{DomId, GrantRef, Handle, Instant, Port, VcpuId};
use netfront::{BackendFault, Config, Frontend, Meta, Notice, SendError};
use netif::ring::{RxBackRing, TxBackRing};
use netif::slot::{RxFlags, RxId, RxResponse, RxStatus, TxId, TxResponse, TxStatus};
use sim::{DomainConfig, Ledger, Sim, SimHv};
use xenbus::client::{Change, Client, Event, Outcome};
use xenbus::device::State;
use xenbus::server::{ConnId, Quotas, Server};
use xenbus::wire::{Access, Perm};

pub const BACK: &str = "/local/domain/0/backend/vif/1/0";
pub const FRONT: &str = "/local/domain/1/device/vif/0";
pub const OTHER_BACK: &str = "/local/domain/0/backend/vif/1/1";
pub const OTHER_FRONT: &str = "/local/domain/1/device/vif/1";

/// The backend's end of a queue.
pub struct Rings {
    pub tx: TxBackRing<Mapping<SimHv>>,
    pub rx: RxBackRing<Mapping<SimHv>>,
    pub tx_grant: Mapping<SimHv>,
    pub rx_grant: Mapping<SimHv>,
    pub channel: Channel<SimHv>,
}

/// The interface under test, bare or in a device.
pub trait Nic {
    /// Received packets are taken from it by the world.
    const DRAINED: bool;
    fn of(frontend: Frontend<SimHv>) -> Self;
    fn frontend(&mut self) -> &mut Frontend<SimHv>;
}

impl Nic for Frontend<SimHv> {
    const DRAINED: bool = true;
    fn of(frontend: Frontend<SimHv>) -> Self {
        frontend
    }
    fn frontend(&mut self) -> &mut Frontend<SimHv> {
        self
    }
}

#[cfg(feature = "smoltcp")]
impl Nic for netfront::device::NetDevice<SimHv> {
    const DRAINED: bool = false;
    fn of(frontend: Frontend<SimHv>) -> Self {
        Self::new(frontend)
    }
    fn frontend(&mut self) -> &mut Frontend<SimHv> {
        self.frontend_mut()
    }
}

/// The interface beside it.
struct Neighbour {
    nic: Frontend<SimHv>,
    notices: Vec<Notice>,
    received: usize,
    rings: Option<Rings>,
}

pub struct World<N = Frontend<SimHv>> {
    pub sim: Sim,
    pub server: Server,
    pub dom0: (ConnId, Client),
    pub guest: (ConnId, Client),
    pub upcalls: Upcalls<SimHv>,
    pub own: Upcalls<SimHv>,
    pub mapper: Mapper<SimHv>,
    pub table: GrantTable<SimHv>,
    pub nic: N,
    pub notices: Vec<Notice>,
    pub received: Vec<Vec<u8>>,
    pub now: Instant,
    /// What was held before the interface under test connected.
    pub before: Ledger,
    granted: usize,
    neighbour: Option<Neighbour>,
}

pub fn write(path: String, value: &str) -> Change {
    Change::Write { path, value: value.into() }
}

/// A directory that one domain owns and another may read.
pub fn directory(path: &str, owner: u16, reader: u16) -> [Change; 2] {
    let perms = [(Access::None, owner), (Access::Read, reader)];
    let perms = perms.map(|(access, id)| Perm::new(access, DomId(id))).into();
    [Change::Mkdir { path: path.into() }, Change::SetPerms { path: path.into(), perms }]
}

impl<N: Nic> World<N> {
    pub fn new(config: Config) -> Self {
        let sim = Sim::new();
        let (back, hv) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
        let mut server = Server::new(Quotas::default());
        let mut dom0 = (server.connect(DomId(0), true), Client::new());
        let mut guest = (server.introduce(DomId(1)), Client::new());
        let mut changes = Vec::new();
        changes.extend(directory("/local/domain/1", 0, 1));
        changes.extend(directory("/local/domain/1/error", 1, 0));
        for (front, back) in [(FRONT, BACK), (OTHER_FRONT, OTHER_BACK)] {
            changes.extend(directory(front, 1, 0));
            changes.extend(directory(back, 0, 1));
            for (key, value) in [("backend", back), ("backend-id", "0"), ("state", "1")] {
                changes.push(write(format!("{front}/{key}"), value));
            }
            changes.push(write(format!("{back}/state"), "1"));
            changes.push(write(format!("{back}/online"), "1"));
        }
        dom0.1.commit(changes);
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        let table = GrantTable::new(&hv).unwrap();
        let nic = Frontend::new(table.clone(), upcalls.binder(), &mut guest.1, config);
        let mut world = Self {
            before: sim.ledger(),
            granted: 0,
            sim,
            server,
            dom0,
            guest,
            upcalls,
            own: Upcalls::new(&back, VcpuId(0)),
            mapper: Mapper::new(&back),
            table,
            nic: N::of(nic),
            notices: Vec::new(),
            received: Vec::new(),
            now: Instant(0),
            neighbour: None,
        };
        world.settle();
        world.before = world.sim.ledger();
        world
    }

    pub fn settle(&mut self) {
        for _ in 0..2000 {
            let mut more = self.turn();
            more |= self.serve_neighbour();
            if !more && self.guest.1.pending_output().is_empty() {
                return;
            }
        }
        panic!("no end to it");
    }

    /// Moves bytes between a domain's client and the store.
    fn exchange(&mut self) -> bool {
        let mut more = false;
        for (conn, client) in [&mut self.dom0, &mut self.guest] {
            let sent = self.server.receive(*conn, client.pending_output()).unwrap();
            client.consume_output(sent);
            let bytes = self.server.pending_output(*conn);
            let heard = bytes.len();
            client.receive(bytes).unwrap();
            self.server.consume_output(*conn, heard);
            more |= sent + heard > 0;
        }
        while self.dom0.1.poll_event().is_some() {}
        more
    }

    /// One turn of the guest's loop.
    pub fn turn(&mut self) -> bool {
        let mut more = self.exchange();
        let Self { upcalls, nic, guest, now, neighbour, .. } = self;
        let nic = nic.frontend();
        more |= upcalls.scan(64, |port| {
            let other = neighbour.as_mut().is_some_and(|it| it.nic.on_event(port));
            assert!(other || nic.on_event(port));
        }) > 0;
        while let Some(event) = guest.1.poll_event() {
            nic.on_store(&mut guest.1, &event, *now);
            if let Some(it) = neighbour {
                it.nic.on_store(&mut guest.1, &event, *now);
            }
            more = true;
        }
        let mut frame = Vec::new();
        for queue in 0..if N::DRAINED { nic.queues() } else { 0 } {
            while nic.receive(queue, &mut frame).is_some() {
                self.received.push(std::mem::take(&mut frame));
            }
        }
        more |= nic.poll(&mut guest.1, *now);
        self.notices.extend(nic.take_notices());
        if let Some(it) = neighbour {
            while it.nic.receive(0, &mut frame).is_some() {
                it.received += 1;
            }
            more |= it.nic.poll(&mut guest.1, *now);
            it.notices.extend(it.nic.take_notices());
        }
        more
    }

    /// The backend of the interface beside it answers everything.
    fn serve_neighbour(&mut self) -> bool {
        let Some(rings) = self.neighbour.as_mut().and_then(|it| it.rings.as_mut()) else {
            return false;
        };
        let mut worked = rings.tx.poll().unwrap() > 0;
        while let Some(request) = rings.tx.take() {
            rings.tx.push(okay(request.id.0)).unwrap();
        }
        worked |= rings.tx.publish().is_needed();
        worked
    }

    /// Connects a second interface, of whose doings all is judged by [`Self::assert_unmoved`].
    pub fn with_neighbour(mut self) -> Self {
        let config = Config { split: false, posted: 32, ..Config::new(Handle(1)) };
        let (binder, client) = (self.upcalls.binder(), &mut self.guest.1);
        let nic = Frontend::new(self.table.clone(), binder, client, config);
        self.neighbour = Some(Neighbour { nic, notices: Vec::new(), received: 0, rings: None });
        self.settle();
        self.set_at(OTHER_BACK, &[("feature-rx-copy", "1"), ("state", "2")]);
        let keys = self.keys_of(OTHER_FRONT);
        let rings = self.rings(&keys);
        self.set_at(OTHER_BACK, &[("state", "4")]);
        let neighbour = self.neighbour.as_mut().unwrap();
        assert!(neighbour.nic.is_connected());
        neighbour.notices.clear();
        neighbour.rings = Some(rings);
        self.exercise_neighbour();
        self.before = self.sim.ledger();
        self.granted = self.table.granted();
        self
    }

    /// References that the interface under test has granted, and those that are parked.
    pub fn grants(&self) -> (usize, usize) {
        (self.table.granted() - self.granted, self.table.parked())
    }

    /// A packet each way, by the interface beside it.
    fn exercise_neighbour(&mut self) {
        let it = self.neighbour.as_mut().unwrap();
        let (received, sent) = (it.received, it.nic.counters().tx.completed);
        it.nic.send(0, &[9; 60], Meta::default()).unwrap();
        let rings = it.rings.as_mut().unwrap();
        rings.rx.poll().unwrap();
        let request = rings.rx.take().unwrap();
        rings.rx.push(rx(request.id.0, 0, RxFlags::empty(), 60)).unwrap();
        let _ = rings.rx.publish();
        rings.channel.notify().unwrap();
        self.settle();
        let it = self.neighbour.as_mut().unwrap();
        it.rings.as_ref().unwrap().channel.notify().unwrap();
        self.settle();
        let it = self.neighbour.as_ref().unwrap();
        assert_eq!((it.received, it.nic.counters().tx.completed), (received + 1, sent + 1));
    }

    /// The interface beside it has noticed nothing.
    pub fn assert_unmoved(&mut self) {
        self.exercise_neighbour();
        let it = self.neighbour.as_ref().unwrap();
        assert!(it.nic.is_connected());
        assert_eq!(it.notices, []);
        assert_eq!(it.nic.counters().tx.lost, 0);
    }

    /// Nothing is held that was not held before the interface connected.
    pub fn assert_clean(&self) {
        let since = self.sim.ledger().since(&self.before).to_string();
        assert_eq!(since, "");
        assert_eq!(self.sim.violations(), Vec::<String>::new());
    }

    pub fn set_at(&mut self, dir: &str, changes: &[(&str, &str)]) {
        let changes = changes.iter().map(|(key, value)| write(format!("{dir}/{key}"), value));
        self.dom0.1.commit(changes.collect::<Vec<_>>());
        self.settle();
    }

    pub fn set(&mut self, changes: &[(&str, &str)]) {
        self.set_at(BACK, changes);
    }

    pub fn offer(&mut self, features: &[(&str, &str)]) {
        self.set(features);
        self.set(&[("feature-rx-copy", "1"), ("state", "2")]);
    }

    /// Values of the store, as dom0 sees them.
    pub fn read(&mut self, paths: &[String]) -> Vec<Option<String>> {
        let (conn, mut client) = (self.server.connect(DomId(0), true), Client::new());
        client.read_many(paths.to_vec());
        for _ in 0..paths.len() + 4 {
            let sent = self.server.receive(conn, client.pending_output()).unwrap();
            client.consume_output(sent);
            let bytes = self.server.pending_output(conn).to_vec();
            client.receive(&bytes).unwrap();
            self.server.consume_output(conn, bytes.len());
        }
        self.server.disconnect(conn);
        let Some(Event::Done { result: Ok(Outcome::Values(values)), .. }) = client.poll_event()
        else {
            panic!("the read has ended");
        };
        values.into_iter().map(|value| Some(String::from_utf8(value?).unwrap())).collect()
    }

    fn keys_of(&mut self, dir: &str) -> BTreeMap<&'static str, u32> {
        let names = ["tx-ring-ref", "rx-ring-ref", "event-channel", "state"];
        let values = self.read(&names.map(|name| format!("{dir}/{name}")));
        let pairs = names.into_iter().zip(values);
        pairs.filter_map(|(name, value)| Some((name, value?.parse().unwrap()))).collect()
    }

    pub fn keys(&mut self) -> BTreeMap<&'static str, u32> {
        self.keys_of(FRONT)
    }

    pub fn map(&self, gref: u32) -> Mapping<SimHv> {
        let request = MapRequest { domain: DomId(1), gref: GrantRef(gref), read_only: false };
        self.mapper.map(request).unwrap()
    }

    pub fn map_read_only(&self, gref: GrantRef) -> Mapping<SimHv> {
        self.mapper.map(MapRequest { domain: DomId(1), gref, read_only: true }).unwrap()
    }

    fn rings(&self, keys: &BTreeMap<&'static str, u32>) -> Rings {
        let (tx, rx) = (keys["tx-ring-ref"], keys["rx-ring-ref"]);
        let binder = self.own.binder();
        Rings {
            tx: TxBackRing::attach(self.map(tx)).map_err(|(fault, _)| fault).unwrap(),
            rx: RxBackRing::attach(self.map(rx)).map_err(|(fault, _)| fault).unwrap(),
            tx_grant: self.map(tx),
            rx_grant: self.map(rx),
            channel: binder.bind_interdomain(DomId(1), Port(keys["event-channel"])).unwrap(),
        }
    }

    /// Connects the backend's end.
    pub fn attach(&mut self) -> Rings {
        let keys = self.keys();
        assert_eq!(keys["state"], 4, "{:?}", self.notices);
        let rings = self.rings(&keys);
        self.set(&[("state", "4")]);
        assert!(self.nic.frontend().is_connected());
        rings
    }

    /// Connects the backend's ends of several queues.
    pub fn attach_queues(&mut self, queues: usize) -> Vec<Rings> {
        let dirs: Vec<_> = (0..queues).map(|queue| format!("{FRONT}/queue-{queue}")).collect();
        let keys: Vec<_> = dirs.iter().map(|dir| self.keys_of(dir)).collect();
        let rings = keys.iter().map(|keys| self.rings(keys)).collect();
        self.set(&[("state", "4")]);
        assert!(self.nic.frontend().is_connected());
        rings
    }

    /// Wakes the frontend.
    pub fn kick(&mut self, rings: &mut Rings) {
        let _ = rings.tx.publish();
        let _ = rings.rx.publish();
        rings.channel.notify().unwrap();
        self.settle();
    }

    /// The backend takes the next request for a page, and answers so.
    pub fn answer_rx(&mut self, rings: &mut Rings, responses: &[RxResponse]) {
        rings.rx.poll().unwrap();
        for response in responses {
            rings.rx.take().unwrap();
            rings.rx.push(*response).unwrap();
        }
        self.kick(rings);
    }

    pub fn send(&mut self, count: usize) {
        for _ in 0..count {
            self.nic.frontend().send(0, &[7; 100], Meta::default()).unwrap();
        }
        self.settle();
    }

    pub fn pass(&mut self, nanos: u64) {
        self.now = self.now.after(nanos);
        self.settle();
    }

    /// Has a node, or a tree, of the store removed by its owner's owner.
    pub fn remove(&mut self, path: &str) {
        self.dom0.1.commit([Change::Rm { path: path.into() }]);
        self.settle();
    }

    /// The backend lets go of everything, and has gone through the states that say so.
    pub fn backend_closes(&mut self, rings: impl Sized) {
        drop(rings);
        self.set(&[("state", "6")]);
        self.set(&[("state", "6")]);
    }

    /// The bytes behind a reference.
    pub fn peek(&self, gref: GrantRef, offset: u16, size: u16) -> Vec<u8> {
        let mut bytes = vec![0; size.into()];
        self.map_read_only(gref).read_bytes(offset.into(), &mut bytes);
        bytes
    }

    /// The backend was left for that reason; once it has let go, the two connect again, and nothing is held of before.
    pub fn assert_left(&mut self, rings: Rings, fault: BackendFault) {
        assert!(self.notices.contains(&Notice::Faulted(fault)), "{:?}", self.notices);
        let nic = self.nic.frontend();
        assert_eq!(nic.state(), State::Closing);
        assert_eq!(nic.send(0, &[7; 100], Meta::default()), Err(SendError::NotConnected));
        let held = self.sim.ledger().since(&self.before);
        assert!(!held.is_empty(), "the backend may still use them");
        drop(rings);
        self.set(&[("state", "6")]);
        self.set(&[("state", "6")]);
        assert_eq!(self.nic.frontend().state(), State::Closed);
        self.assert_clean();
        self.pass(1_000_000_000);
        assert_eq!(self.nic.frontend().state(), State::Initialising);
        self.set(&[("state", "2")]);
        let mut rings = self.attach();
        self.send(1);
        assert_eq!(rings.tx.poll().unwrap(), 1);
        if self.neighbour.is_some() {
            self.assert_unmoved();
        }
        assert_eq!(self.sim.violations(), Vec::<String>::new());
    }
}

impl World {
    /// Of an interface without a device around it.
    pub fn plain(config: Config) -> Self {
        Self::new(config)
    }
}

impl World {
    /// Nothing came of it: packets go both ways, the connection ends well, and nothing is held of it after.
    pub fn assert_carried_on(&mut self, mut rings: Rings) {
        self.settle();
        assert!(self.nic.is_connected(), "{:?}", self.notices);
        let faulted = |it: &&Notice| matches!(it, Notice::Faulted(_) | Notice::Refused(_));
        assert_eq!(self.notices.iter().find(faulted), None);
        rings.tx.poll().unwrap();
        while let Some(request) = rings.tx.take() {
            rings.tx.push(okay(request.id.0)).unwrap();
        }
        self.kick(&mut rings);
        let received = self.received.len();
        self.send(1);
        assert_eq!(rings.tx.poll().unwrap(), 1);
        rings.rx.poll().unwrap();
        let request = rings.rx.take().unwrap();
        rings.rx.push(rx(request.id.0, 8, RxFlags::empty(), 64)).unwrap();
        self.kick(&mut rings);
        // A channel that was throttled is heard again in the end.
        self.pass(2_000_000_000);
        assert_eq!(self.received.len(), received + 1);
        self.assert_closes(rings);
    }

    /// Ends the connection from this side.
    pub fn assert_closes(&mut self, rings: impl Sized) {
        let now = self.now;
        self.nic.close(&mut self.guest.1, now);
        self.settle();
        assert_eq!(self.nic.state(), State::Closing);
        drop(rings);
        self.set(&[("state", "6")]);
        self.set(&[("state", "6")]);
        assert_eq!(self.nic.state(), State::Closed);
        self.assert_clean();
        if self.neighbour.is_some() {
            self.assert_unmoved();
        }
    }
}

/// One queue with one port, and packets of several pages; a second interface beside it.
pub fn connected() -> (World, Rings) {
    let config = Config { split: false, ..Config::new(Handle(0)) };
    let mut world = World::plain(config).with_neighbour();
    world.offer(&[("feature-sg", "1")]);
    let rings = world.attach();
    (world, rings)
}

pub fn okay(id: u16) -> TxResponse {
    TxResponse { id: TxId(id), status: TxStatus::OKAY }
}

pub fn rx(id: u16, offset: u16, flags: RxFlags, status: i16) -> RxResponse {
    RxResponse { id: RxId(id), offset, flags, status: RxStatus(status) }
}

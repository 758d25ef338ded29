//! A backend in a driver domain, to which the store shows and allows no more than to any other; and vifs that go and come
//! again.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::collections::BTreeMap;

use common::raw::Raw;
use common::{MS, Machine, SECOND, config};
use evtchn::{Channel, Upcalls};
use grant::{GrantTable, GrantedPage, Mapper};
use hypercall::{DomId, Instant, VcpuId};
use netback::{Backend, Notice, VifStatus};
use netif::ring::TxFrontRing;
use netif::slot::{TxFlags, TxId, TxRequest, TxStatus};
use sim::{DomainConfig, Sim, SimHv};
use xenbus::client::{Change, Client, Event, Outcome};
use xenbus::device::State;
use xenbus::server::{ConnId, Quotas, Server};
use xenbus::wire::{Access, Perm};

struct Guest {
    hv: SimHv,
    table: GrantTable<SimHv>,
    client: Client,
    conn: ConnId,
}

/// Domain 0 with the store, a driver domain with the backend, and guests.
struct World {
    sim: Sim,
    server: Server,
    tools: (Client, ConnId),
    driver: DomId,
    upcalls: Upcalls<SimHv>,
    mapper: Mapper<SimHv>,
    client: Client,
    conn: ConnId,
    backend: Backend<SimHv>,
    guests: Vec<Guest>,
    notices: Vec<Notice>,
    now: Instant,
    /// Whether the driver domain's bytes reach the store, and the other way,
    connected: bool,
    /// and how many at a time.
    at_once: usize,
}

/// A guest's TX ring, by hand.
struct Ring<'a> {
    tx: TxFrontRing<&'a grant::SharedPage>,
    channel: &'a Channel<SimHv>,
    data: &'a GrantedPage<SimHv>,
}

/// What a guest shows a backend.
struct Shown {
    tx: GrantedPage<SimHv>,
    rx: GrantedPage<SimHv>,
    data: GrantedPage<SimHv>,
    channel: Channel<SimHv>,
}

impl Shown {
    fn ring(&self) -> Ring<'_> {
        let tx = TxFrontRing::init(self.tx.page());
        Ring { tx, channel: &self.channel, data: &self.data }
    }
}

impl Ring<'_> {
    /// Whether a packet that is sent is taken.
    fn is_served(&mut self, world: &mut World) -> bool {
        let request = TxRequest {
            gref: self.data.gref(),
            offset: 0,
            flags: TxFlags::empty(),
            id: TxId(9),
            size: 100,
        };
        self.tx.push(request).unwrap();
        if self.tx.publish().is_needed() {
            self.channel.notify().unwrap();
        }
        world.settle();
        self.tx.poll().unwrap();
        let taken = self.tx.take();
        assert!(taken.is_none_or(|(_, response)| response.status == TxStatus::OKAY));
        taken.is_some()
    }
}

fn write(path: String, value: &str) -> Change {
    Change::Write { path, value: value.into() }
}

fn perms(path: String, owner: DomId, reader: DomId) -> Change {
    let perms = [Perm::new(Access::None, owner), Perm::new(Access::Read, reader)];
    Change::SetPerms { path, perms: perms.into() }
}

impl World {
    fn new(quotas: Quotas) -> Self {
        let sim = Sim::new();
        sim.create(DomainConfig::dom0());
        let hv = sim.create(DomainConfig::guest());
        let driver = hv.id();
        let mut server = Server::new(quotas);
        let tools = (Client::new(), server.connect(DomId(0), true));
        let conn = server.introduce(driver);
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        let mapper = Mapper::new(&hv);
        let mut client = Client::new();
        let backend = Backend::new(&hv, upcalls.binder(), mapper.clone(), &mut client, config());
        let backend = backend.unwrap();
        let mut world = Self {
            sim,
            server,
            tools,
            driver,
            upcalls,
            mapper,
            client,
            conn,
            backend,
            guests: Vec::new(),
            notices: Vec::new(),
            now: Instant(SECOND),
            connected: true,
            at_once: usize::MAX,
        };
        let home = format!("/local/domain/{driver}");
        world.tools([Change::Mkdir { path: home.clone() }, perms(home, driver, DomId(0))]);
        world
    }

    fn move_bytes(server: &mut Server, conn: ConnId, client: &mut Client, at_once: usize) -> bool {
        let output = client.pending_output();
        let sent = server.receive(conn, &output[..output.len().min(at_once)]).unwrap();
        client.consume_output(sent);
        let heard = server.pending_output(conn).to_vec();
        client.receive(&heard).unwrap();
        server.consume_output(conn, heard.len());
        sent + heard.len() > 0
    }

    fn turn(&mut self) -> bool {
        let mut more =
            Self::move_bytes(&mut self.server, self.tools.1, &mut self.tools.0, usize::MAX);
        if self.connected {
            more |= Self::move_bytes(&mut self.server, self.conn, &mut self.client, self.at_once);
        }
        for guest in &mut self.guests {
            more |= Self::move_bytes(&mut self.server, guest.conn, &mut guest.client, usize::MAX);
        }
        let mut ports = Vec::new();
        more |= self.upcalls.scan(64, |port| ports.push(port)) > 0;
        for port in ports {
            self.backend.on_event(port);
        }
        while let Some(event) = self.client.poll_event() {
            self.backend.on_store(&mut self.client, &event, self.now);
            more = true;
        }
        more |= self.backend.poll(&mut self.client, self.now, |_| {});
        while self.backend.receive_local().is_some() {}
        self.notices.extend(self.backend.take_notices());
        more || (self.connected && !self.client.pending_output().is_empty())
    }

    fn settle(&mut self) {
        for _ in 0..2_000 {
            if !self.turn() {
                return;
            }
        }
        panic!("no end to it: {:?}", self.notices);
    }

    fn pass(&mut self, nanos: u64) {
        for _ in 0..20 {
            self.now = self.now.after(nanos / 20);
            self.settle();
        }
    }

    /// Changes that the toolstack makes.
    fn tools(&mut self, changes: impl IntoIterator<Item = Change>) {
        self.tools.0.commit(changes);
        self.settle();
    }

    fn read(&mut self, path: &str) -> Option<String> {
        while self.tools.0.poll_event().is_some() {}
        let job = self.tools.0.read_many([path]);
        self.settle();
        loop {
            match self.tools.0.poll_event().unwrap() {
                Event::Done { job: done, result: Ok(Outcome::Values(values)) } if done == job => {
                    return values[0].clone().map(|value| String::from_utf8(value).unwrap());
                }
                _ => {}
            }
        }
    }

    fn guest(&mut self) -> usize {
        let hv = self.sim.create(DomainConfig::guest());
        let id = hv.id();
        let table = GrantTable::new(&hv).unwrap();
        let conn = self.server.introduce(id);
        self.guests.push(Guest { hv, table, client: Client::new(), conn });
        let home = format!("/local/domain/{id}");
        self.tools([Change::Mkdir { path: home.clone() }, perms(home, id, DomId(0))]);
        self.guests.len() - 1
    }

    fn front(&self, guest: usize) -> String {
        format!("/local/domain/{}/device/vif/0", self.guests[guest].hv.id())
    }

    fn back(&self, guest: usize) -> String {
        format!("/local/domain/{}/backend/vif/{}/0", self.driver, self.guests[guest].hv.id())
    }

    /// What a toolstack writes for an interface.
    fn nodes(&self, guest: usize) -> Vec<Change> {
        let (front, back) = (self.front(guest), self.back(guest));
        let (driver, id) = (self.driver, self.guests[guest].hv.id());
        let mut changes = Vec::new();
        for (path, owner, reader) in [(&front, id, driver), (&back, driver, id)] {
            changes.push(Change::Mkdir { path: path.clone() });
            changes.push(perms(path.clone(), owner, reader));
        }
        for (key, value) in [("backend", back.as_str()), ("state", "1")] {
            changes.push(write(format!("{front}/{key}"), value));
        }
        for (key, value) in [
            ("frontend", front.as_str()),
            ("frontend-id", &id.to_string()),
            ("online", "1"),
            ("state", "1"),
            ("hotplug-status", "connected"),
        ] {
            changes.push(write(format!("{back}/{key}"), value));
        }
        changes
    }

    /// The guest writes its keys and connects.
    fn offer(&mut self, guest: usize) -> Shown {
        let it = &self.guests[guest];
        let share = |read_only| it.table.share(self.driver, read_only).unwrap();
        let binder = Upcalls::new(&it.hv, VcpuId(0)).binder();
        let channel = binder.alloc_unbound(self.driver).unwrap();
        let shown = Shown { tx: share(false), rx: share(false), data: share(true), channel };
        let values = BTreeMap::from([
            ("tx-ring-ref", shown.tx.gref().to_string()),
            ("rx-ring-ref", shown.rx.gref().to_string()),
            ("event-channel", shown.channel.port().to_string()),
            ("request-rx-copy", "1".into()),
        ]);
        let front = self.front(guest);
        let keys = values.iter().map(|(key, value)| write(format!("{front}/{key}"), value));
        let changes: Vec<_> = keys.chain([write(format!("{front}/state"), "4")]).collect();
        self.guests[guest].client.commit(changes);
        self.settle();
        shown
    }

    fn set_state(&mut self, guest: usize, state: &str) {
        let path = format!("{}/state", self.front(guest));
        self.guests[guest].client.commit([write(path, state)]);
        self.settle();
    }

    /// A guest that is connected.
    fn connected(&mut self) -> (usize, Shown) {
        let guest = self.guest();
        self.tools(self.nodes(guest));
        let shown = self.offer(guest);
        assert_eq!(self.state(guest), Some(State::Connected), "{:?}", self.notices);
        (guest, shown)
    }

    fn status(&self, guest: usize) -> Option<VifStatus> {
        let id = self.guests[guest].hv.id();
        self.backend.vifs().find(|vif| vif.id.domain == id)
    }

    fn state(&self, guest: usize) -> Option<State> {
        self.status(guest).map(|vif| vif.state)
    }

    fn own_state(&mut self, guest: usize) -> State {
        let state = self.read(&format!("{}/state", self.back(guest)));
        State::parse(state.as_deref().map(str::as_bytes))
    }

    fn assert_let_go(&self, guest: usize) {
        let ledger = self.sim.ledger();
        let items = ledger.concerning(self.guests[guest].hv.id());
        let held: Vec<_> = items.entries().filter(|(holder, _)| *holder == self.driver).collect();
        assert!(held.is_empty(), "{held:?}");
        assert_eq!(self.mapper.parked(), 0);
        assert_eq!(self.sim.violations(), Vec::<String>::new());
    }

    fn count(&self, of: impl Fn(&Notice) -> bool) -> usize {
        self.notices.iter().filter(|notice| of(notice)).count()
    }
}

/// Hostile 73: what was the guest's and is gone, permissions and all, is forbidden rather than missing.
#[test]
fn hostile_73_a_guests_directory_goes_and_the_driver_domain_may_not_look() {
    let mut world = World::new(Quotas::default());
    let (_other, other_shown) = world.connected();
    let mut other = other_shown.ring();
    for path in [
        |world: &World, guest: usize| world.front(guest),
        |world: &World, guest: usize| {
            format!("/local/domain/{}/device", world.guests[guest].hv.id())
        },
        |world: &World, guest: usize| format!("/local/domain/{}", world.guests[guest].hv.id()),
    ] {
        for is_connected in [true, false] {
            let guest = world.guest();
            world.tools(world.nodes(guest));
            let shown = is_connected.then(|| world.offer(guest));
            world.tools([Change::Rm { path: path(&world, guest) }]);
            assert!(world.status(guest).is_none(), "{:?}", world.notices);
            assert_eq!(world.own_state(guest), State::Closed);
            world.assert_let_go(guest);
            assert!(other.is_served(&mut world));
            drop(shown);
        }
    }
    assert_eq!(world.count(|notice| matches!(notice, Notice::Faulted(..))), 0);
}

/// Hostile 74: the directory that is ours goes, with all above it.
#[test]
fn hostile_74_the_driver_domains_directory_goes() {
    let mut world = World::new(Quotas::default());
    let (_other, other_shown) = world.connected();
    let mut other = other_shown.ring();
    let (guest, _shown) = world.connected();
    let id = world.guests[guest].hv.id();
    let path = format!("/local/domain/{}/backend/vif/{id}", world.driver);
    world.tools([Change::Rm { path }]);
    assert!(world.status(guest).is_none(), "{:?}", world.notices);
    assert_eq!(world.own_state(guest), State::Unknown, "it is not written anew");
    world.assert_let_go(guest);
    assert!(other.is_served(&mut world));
}

/// Hostile 75: the store lets nothing be written where features are offered.
#[test]
fn hostile_75_nothing_can_be_offered() {
    // A driver domain with nodes of its own to the brim, and one whose directory is not its own.
    for quota in [true, false] {
        let quotas = Quotas { nodes: if quota { 60 } else { 1000 }, ..Quotas::default() };
        let mut world = World::new(quotas);
        let (_other, other_shown) = world.connected();
        let mut other = other_shown.ring();
        let guest = world.guest();
        let mut nodes = world.nodes(guest);
        if quota {
            let home = format!("/local/domain/{}", world.driver);
            let filler = (0..60).map(|at| write(format!("{home}/filler-{at}"), ""));
            for change in filler {
                world.client.commit([change]);
            }
            world.settle();
        } else {
            let readable =
                [Perm::new(Access::None, DomId(0)), Perm::new(Access::Read, world.driver)];
            let path = world.back(guest);
            nodes.retain(|it| !matches!(it, Change::SetPerms { path: p, .. } if *p == path));
            nodes.insert(3, Change::SetPerms { path, perms: readable.into() });
        }
        world.tools(nodes);
        assert!(world.status(guest).is_none(), "{:?}", world.notices);
        assert_eq!(world.count(|notice| matches!(notice, Notice::Removed(_))), 1);
        assert!(other.is_served(&mut world));
        world.assert_let_go(guest);
    }
}

/// Hostile 75: the store lets the state be written no more. Nothing stays bound, and it is not tried for ever.
#[test]
fn hostile_75_connecting_cannot_be_said() {
    let mut world = World::new(Quotas::default());
    let (_other, other_shown) = world.connected();
    let mut other = other_shown.ring();
    let guest = world.guest();
    world.tools(world.nodes(guest));
    let path = format!("{}/state", world.back(guest));
    let readable = [Perm::new(Access::None, DomId(0)), Perm::new(Access::Read, world.driver)];
    world.tools([Change::SetPerms { path: path.clone(), perms: readable.into() }]);
    let _shown = world.offer(guest);
    world.assert_let_go(guest);
    assert_ne!(world.state(guest), Some(State::Connected));
    assert_eq!(world.own_state(guest), State::InitWait);
    world.pass(5 * SECOND);
    world.assert_let_go(guest);
    assert!(other.is_served(&mut world));
}

/// Hostile 76: the store speaks nonsense; packets go on, and what happened meanwhile is seen once it is back.
#[test]
fn hostile_76_the_store_is_dead_and_packets_go_on() {
    let mut world = World::new(Quotas::default());
    let (guest, shown) = world.connected();
    let mut ring = shown.ring();
    assert!(ring.is_served(&mut world));
    assert!(world.client.receive(&[0xff; 64]).is_err());
    assert!(world.client.is_dead());
    world.connected = false;
    for _ in 0..10 {
        assert!(ring.is_served(&mut world));
        world.pass(100 * MS);
    }
    assert_eq!(world.state(guest), Some(State::Connected));
    world.set_state(guest, "5");
    assert_eq!(world.state(guest), Some(State::Connected), "nobody told us");
    world.server.reset(world.conn);
    world.client.reconnect();
    world.connected = true;
    world.settle();
    assert_eq!(
        (world.state(guest), world.own_state(guest)),
        (Some(State::Closing), State::Closing)
    );
    world.assert_let_go(guest);
}

/// An interface is taken away and made anew at each step of taking notice, so that some nodes are read before and some
/// after: it connects in the end.
#[test]
fn a_vif_that_is_made_anew_is_served() {
    for turns in 0..40 {
        let mut world = World::new(Quotas::default());
        let guest = world.guest();
        world.tools(world.nodes(guest));
        let _shown = world.offer(guest);
        let (front, back) = (world.front(guest), world.back(guest));
        world.at_once = 30;
        world.tools.0.commit([Change::Rm { path: front }, Change::Rm { path: back }]);
        for _ in 0..turns {
            world.turn();
        }
        let nodes = world.nodes(guest);
        world.tools(nodes);
        world.at_once = usize::MAX;
        assert_eq!(world.state(guest), Some(State::InitWait), "{turns}: {:?}", world.notices);
        let shown = world.offer(guest);
        assert_eq!(world.own_state(guest), State::Connected, "{turns}: {:?}", world.notices);
        assert!(shown.ring().is_served(&mut world));
    }
}

/// A toolstack that writes one node after another.
#[test]
fn nodes_that_come_one_by_one() {
    for (turns, at_once) in (0..6).flat_map(|turns| [(turns, 8), (turns, 30), (turns, 1000)]) {
        let mut world = World::new(Quotas::default());
        let guest = world.guest();
        world.at_once = at_once;
        for change in world.nodes(guest) {
            world.tools.0.commit([change]);
            for _ in 0..turns {
                world.turn();
            }
        }
        world.settle();
        let shown = world.offer(guest);
        assert_eq!(world.own_state(guest), State::Connected, "{turns}: {:?}", world.notices);
        assert!(shown.ring().is_served(&mut world));
    }
}

/// What the data path finds while a state is being read does not make that state forgotten.
#[test]
fn a_fault_while_a_state_is_read() {
    for turns in 0..8 {
        let mut machine = Machine::two();
        let (guest, raw) = machine.raw();
        let dir = common::front(machine.guests[guest].id);
        machine.guests[guest].commit([write(format!("{dir}/state"), "6")]);
        for _ in 0..turns {
            machine.turn();
        }
        raw.rewrite(netif::ring::layout::REQ_PROD, 400);
        raw.channel.notify().unwrap();
        machine.settle();
        assert_eq!(machine.states(guest).1, State::Closed, "{turns}");
        machine.assert_let_go(guest);
        machine.set_state(guest, "1");
        machine.pass(SECOND);
        assert_eq!(machine.states(guest).1, State::InitWait, "{turns}");
        let raw = Raw::new(&machine.guests[guest], 0);
        machine.offer(guest, &raw.keys(), "4");
        assert!(machine.is_connected(guest), "{turns}");
        machine.assert_carries(0, 1);
    }
}

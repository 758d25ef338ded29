//! The backend in a domain that is not dom0: what libxl does to its directories, and what has to become of them and when.
//! The store lets this domain do what xenstored would, and no more.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::collections::BTreeMap;

use common::{MS, SECOND, config, frame};
use evtchn::Upcalls;
use grant::{GrantTable, Mapper};
use hypercall::{DomId, Handle, Instant, VcpuId};
use netback::{Backend, Config, Hotplug, Notice};
use netfront::{Frontend, Meta};
use sim::{DomainConfig, Sim, SimHv};
use xenbus::client::{Change, Client, Error, Event, Outcome};
use xenbus::device::State;
use xenbus::server::{ConnId, Quotas, Server};
use xenbus::wire::{Access, Perm, XsError};

/// What libxl waits before it gives up: `LIBXL_INIT_TIMEOUT`, `LIBXL_DESTROY_TIMEOUT`.
const LIBXL_WAITS: u64 = 10 * SECOND;

/// A connection to the store.
struct Conn(ConnId, Client);

impl Conn {
    fn move_bytes(&mut self, server: &mut Server) -> bool {
        let Self(conn, client) = self;
        let sent = server.receive(*conn, client.pending_output()).unwrap();
        client.consume_output(sent);
        let bytes = server.pending_output(*conn);
        let heard = bytes.len();
        client.receive(bytes).unwrap();
        server.consume_output(*conn, heard);
        sent + heard > 0
    }
}

struct Guest {
    hv: SimHv,
    upcalls: Upcalls<SimHv>,
    table: GrantTable<SimHv>,
    store: Conn,
    frontend: Option<Frontend<SimHv>>,
    received: usize,
}

impl Guest {
    fn turn(&mut self, server: &mut Server, now: Instant) -> bool {
        let mut more = self.store.move_bytes(server);
        let mut ports = Vec::new();
        more |= self.upcalls.scan(64, |port| ports.push(port)) > 0;
        let client = &mut self.store.1;
        let Some(frontend) = &mut self.frontend else {
            while client.poll_event().is_some() {}
            return more;
        };
        for port in ports {
            frontend.on_event(port);
        }
        while let Some(event) = client.poll_event() {
            frontend.on_store(client, &event, now);
            more = true;
        }
        let mut bytes = Vec::new();
        for queue in 0..frontend.queues() {
            while frontend.receive(queue, &mut bytes).is_some() {
                self.received += 1;
                more = true;
            }
        }
        more |= frontend.poll(client, now);
        more | (frontend.take_notices().count() > 0)
    }
}

/// The driver domain's end.
struct Domain {
    hv: SimHv,
    upcalls: Upcalls<SimHv>,
    mapper: Mapper<SimHv>,
    store: Conn,
    backend: Option<Backend<SimHv>>,
    notices: Vec<Notice>,
}

struct World {
    sim: Sim,
    server: Server,
    toolstack: Conn,
    domain: Domain,
    guests: Vec<Guest>,
    now: Instant,
}

fn write(path: impl Into<String>, value: &str) -> Change {
    Change::Write { path: path.into(), value: value.into() }
}

/// A node, as libxl makes it.
fn node(path: &str, owner: DomId, reader: DomId) -> [Change; 2] {
    let perms = [Perm::new(Access::None, owner), Perm::new(Access::Read, reader)];
    [
        Change::Mkdir { path: path.into() },
        Change::SetPerms { path: path.into(), perms: perms.into() },
    ]
}

/// A domain's nodes, as `libxl__domain_make` has them.
fn home(id: DomId) -> Vec<Change> {
    let home = format!("/local/domain/{id}");
    let mut changes = Vec::from(node(&home, DomId(0), id));
    changes.push(write(format!("{home}/domid"), &id.to_string()));
    changes.extend(node(&format!("{home}/device"), DomId(0), id));
    changes.extend(node(&format!("{home}/error"), id, DomId(0)));
    changes
}

impl World {
    fn new() -> Self {
        Self::with(config(), true)
    }

    /// `starts`: the backend is there before anything else.
    fn with(config: Config, starts: bool) -> Self {
        let sim = Sim::new();
        sim.create(DomainConfig::dom0());
        let hv = sim.create(DomainConfig::guest());
        let mut server = Server::new(Quotas::default());
        let toolstack = Conn(server.connect(DomId(0), true), Client::new());
        let store = Conn(server.introduce(hv.id()), Client::new());
        let (upcalls, mapper) = (Upcalls::new(&hv, VcpuId(0)), Mapper::new(&hv));
        let domain = Domain { hv, upcalls, mapper, store, backend: None, notices: Vec::new() };
        let guests = Vec::new();
        let mut world = Self { sim, server, toolstack, domain, guests, now: Instant(SECOND) };
        world.toolstack.1.commit(home(world.domain.hv.id()));
        world.settle();
        if starts {
            world.begin(config);
        }
        world
    }

    fn begin(&mut self, config: Config) {
        let Domain { hv, upcalls, mapper, store, backend, .. } = &mut self.domain;
        let hotplug = Hotplug::Switch;
        let config = Config { hotplug, ..config };
        let new = Backend::new(hv, upcalls.binder(), mapper.clone(), &mut store.1, config);
        *backend = Some(new.unwrap());
        self.settle();
    }

    fn backend(&mut self) -> &mut Backend<SimHv> {
        self.domain.backend.as_mut().unwrap()
    }

    fn guest(&mut self) -> usize {
        let hv = self.sim.create(DomainConfig::guest());
        let store = Conn(self.server.introduce(hv.id()), Client::new());
        self.toolstack(home(hv.id()));
        let table = GrantTable::new(&hv).unwrap();
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        self.guests.push(Guest { upcalls, table, store, frontend: None, received: 0, hv });
        self.guests.len() - 1
    }

    fn front(&self, guest: usize) -> String {
        format!("/local/domain/{}/device/vif/0", self.guests[guest].hv.id())
    }

    fn back(&self, guest: usize) -> String {
        let (own, theirs) = (self.domain.hv.id(), self.guests[guest].hv.id());
        format!("/local/domain/{own}/backend/vif/{theirs}/0")
    }

    fn mac(&self, guest: usize) -> [u8; 6] {
        common::mac(self.guests[guest].hv.id())
    }

    /// `xl network-attach`: `libxl__device_generic_add`, in one transaction.
    fn attach(&mut self, guest: usize) {
        let (own, theirs) = (self.domain.hv.id(), self.guests[guest].hv.id());
        let (front, back) = (self.front(guest), self.back(guest));
        let [a, b, c, d, e, f] = self.mac(guest);
        let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        let mut changes = Vec::new();
        for (dir, owner, reader) in [(&front, theirs, own), (&back, own, theirs)] {
            changes.push(Change::Rm { path: dir.clone() });
            changes.extend(node(dir, owner, reader));
        }
        for (key, value) in [
            ("backend", back.as_str()),
            ("backend-id", &own.to_string()),
            ("state", "1"),
            ("handle", "0"),
            ("mac", &mac),
            ("trusted", "1"),
        ] {
            changes.push(write(format!("{front}/{key}"), value));
        }
        changes.extend(node(&format!("{front}/mtu"), own, theirs));
        changes.push(write(format!("{front}/mtu"), "1500"));
        for (key, value) in [
            ("frontend", front.as_str()),
            ("frontend-id", &theirs.to_string()),
            ("online", "1"),
            ("state", "1"),
            ("script", "/etc/xen/scripts/vif-bridge"),
            ("mac", &mac),
            ("bridge", "xenbr0"),
            ("handle", "0"),
            ("type", "vif"),
            ("hotplug-status", ""),
        ] {
            changes.push(write(format!("{back}/{key}"), value));
        }
        self.toolstack(changes);
    }

    /// A guest's driver starts.
    fn start(&mut self, guest: usize) {
        let Guest { table, upcalls, store, frontend, .. } = &mut self.guests[guest];
        // As Linux's, so that what is held of a guest does not depend on what it has sent.
        let config = netfront::Config { static_grants: false, ..netfront::Config::new(Handle(0)) };
        let new = Frontend::new(table.clone(), upcalls.binder(), &mut store.1, config);
        *frontend = Some(new);
        self.settle();
    }

    fn connected(&mut self) -> usize {
        let guest = self.guest();
        self.attach(guest);
        self.start(guest);
        assert!(self.is_connected(guest), "{:?}", self.domain.notices);
        guest
    }

    fn is_connected(&self, guest: usize) -> bool {
        let id = self.guests[guest].hv.id();
        let mut vifs = self.domain.backend.as_ref().unwrap().vifs();
        vifs.any(|vif| vif.id.domain == id && vif.state == State::Connected && vif.queues > 0)
            && self.guests[guest].frontend.as_ref().is_some_and(Frontend::is_connected)
    }

    /// What `xl network-detach` begins with: `libxl__initiate_device_generic_remove`.
    fn begin_detach(&mut self, guest: usize) {
        let back = self.back(guest);
        let state = State::Closing.text();
        self.toolstack([
            write(format!("{back}/online"), "0"),
            write(format!("{back}/state"), state),
        ]);
    }

    /// What it ends with, `libxl__device_destroy`, once the backend's directory is gone.
    fn end_detach(&mut self, guest: usize) {
        let (front, back) = (self.front(guest), self.back(guest));
        assert_eq!(self.read(&format!("{back}/state")), None);
        self.toolstack([Change::Rm { path: front }]);
    }

    fn toolstack(&mut self, changes: impl IntoIterator<Item = Change>) {
        self.toolstack.1.commit(changes);
        self.settle();
    }

    fn read(&mut self, path: &str) -> Option<String> {
        let mut conn = Conn(self.server.connect(DomId(0), true), Client::new());
        conn.1.read_many([path]);
        while conn.move_bytes(&mut self.server) {}
        self.server.disconnect(conn.0);
        let Some(Event::Done { result: Ok(Outcome::Values(values)), .. }) = conn.1.poll_event()
        else {
            panic!("{path}");
        };
        values[0].clone().map(|value| String::from_utf8(value).unwrap())
    }

    fn state(&mut self, dir: &str) -> State {
        State::parse(self.read(&format!("{dir}/state")).as_deref().map(str::as_bytes))
    }

    /// All keys of a directory that is flat, but for `mtu`.
    fn keys(&mut self, dir: &str) -> BTreeMap<String, String> {
        let mut conn = Conn(self.server.connect(DomId(0), true), Client::new());
        conn.1.list(dir);
        while conn.move_bytes(&mut self.server) {}
        self.server.disconnect(conn.0);
        let Some(Event::Done { result: Ok(Outcome::Names(Some(names))), .. }) = conn.1.poll_event()
        else {
            panic!("{dir}");
        };
        let value = |name: String| (name.clone(), self.read(&format!("{dir}/{name}")).unwrap());
        names.into_iter().map(value).collect()
    }

    fn turn(&mut self) -> bool {
        let Self { server, toolstack, domain, guests, now, .. } = self;
        let mut more = toolstack.move_bytes(server);
        while toolstack.1.poll_event().is_some() {}
        for guest in guests {
            more |= guest.turn(server, *now) || !guest.store.1.pending_output().is_empty();
        }
        let Domain { upcalls, store, backend: Some(backend), notices, .. } = domain else {
            return more;
        };
        more |= store.move_bytes(server);
        let mut ports = Vec::new();
        more |= upcalls.scan(64, |port| ports.push(port)) > 0;
        for port in ports {
            backend.on_event(port);
        }
        while let Some(event) = store.1.poll_event() {
            backend.on_store(&mut store.1, &event, *now);
            more = true;
        }
        more |= backend.poll(&mut store.1, *now, |_| ());
        // Nobody lives there.
        while backend.receive_local().is_some() {}
        let before = notices.len();
        notices.extend(backend.take_notices());
        more | (notices.len() > before) | !store.1.pending_output().is_empty()
    }

    fn settle(&mut self) {
        for _ in 0..20_000 {
            if !self.turn() {
                return;
            }
        }
        panic!("no end to it: {:?}", self.domain.notices);
    }

    fn pass(&mut self, nanos: u64) {
        let end = self.now.after(nanos);
        while self.now < end {
            self.now = self.now.after(10 * MS).min(end);
            self.settle();
        }
    }

    /// Nanoseconds until a directory is gone; panics when it takes longer than libxl waits.
    fn gone_after(&mut self, dir: &str) -> u64 {
        let begin = self.now;
        while self.read(&format!("{dir}/state")).is_some() {
            assert!(self.now.since(begin) < LIBXL_WAITS, "{:?}", self.keys(dir));
            self.pass(50 * MS);
        }
        self.now.since(begin)
    }

    /// What the driver domain holds of guests, and what is out: mappings, ports, packet buffers.
    fn held(&mut self) -> [usize; 4] {
        let Domain { upcalls, mapper, .. } = &self.domain;
        let (ports, live, parked) = (upcalls.bound(), mapper.live(), mapper.parked());
        let pools = self.backend().pools();
        [ports, live, parked, pools.all().out()]
    }

    /// The same of one guest, as Xen has it.
    fn held_of(&self, guest: usize) -> Vec<String> {
        let ledger = self.sim.ledger().concerning(self.guests[guest].hv.id());
        let own = self.domain.hv.id();
        let held = ledger.entries().filter(|(holder, _)| *holder == own);
        held.map(|(_, item)| item.to_string()).collect()
    }
}

#[test]
fn a_vif_is_offered_at_once_and_plugged_in() {
    let mut world = World::new();
    let guest = world.guest();
    world.attach(guest);
    // No time has passed, and the guest has no driver yet.
    let back = world.back(guest);
    assert_eq!(world.state(&back), State::InitWait);
    assert_eq!(world.read(&format!("{back}/hotplug-status")).as_deref(), Some("connected"));
    world.start(guest);
    assert!(world.is_connected(guest));
    // What Linux 6.1's xen-netback has there under xl, with two more queues.
    let keys = world.keys(&back);
    let ours = keys.iter().filter(|(key, _)| {
        key.starts_with("feature") || key.starts_with("multi") || key.starts_with("hotplug")
    });
    let ours: Vec<_> = ours.map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(
        ours,
        [
            "feature-ctrl-ring=1",
            "feature-dynamic-multicast-control=1",
            "feature-gso-tcpv4=1",
            "feature-gso-tcpv6=1",
            "feature-ipv6-csum-offload=1",
            "feature-multicast-control=1",
            "feature-rx-copy=1",
            "feature-rx-flip=0",
            "feature-sg=1",
            "feature-split-event-channels=1",
            "feature-xdp-headroom=1",
            "hotplug-status=connected",
            "multi-queue-max-queues=4",
        ]
    );
    let libxls = 10;
    assert_eq!(keys.len(), libxls - 1 + ours.len());
}

#[test]
fn a_script_is_waited_for_where_there_is_one() {
    let mut world = World::with(config(), false);
    let Domain { hv, upcalls, mapper, store, backend, .. } = &mut world.domain;
    let config = Config { hotplug: Hotplug::Script, ..config() };
    *backend =
        Some(Backend::new(hv, upcalls.binder(), mapper.clone(), &mut store.1, config).unwrap());
    let guest = world.guest();
    world.attach(guest);
    world.start(guest);
    let back = world.back(guest);
    assert_eq!(world.state(&back), State::InitWait);
    world.toolstack([write(format!("{back}/hotplug-status"), "connected")]);
    assert!(world.is_connected(guest));
    world.begin_detach(guest);
    world.pass(LIBXL_WAITS);
    assert_eq!(world.state(&back), State::Closed, "it is the script's side that removes it");
}

#[test]
fn a_vif_that_is_detached_is_cleared_away_and_can_be_attached_again() {
    let mut world = World::new();
    let before = world.held();
    let guest = world.connected();
    for _ in 0..3 {
        let back = world.back(guest);
        world.begin_detach(guest);
        assert_eq!(world.state(&back), State::Closed, "which libxl has to see");
        world.pass(500 * MS);
        assert_eq!(world.state(&back), State::Closed);
        world.gone_after(&back);
        world.end_detach(guest);
        assert_eq!(world.held(), before);
        world.guests[guest].frontend = None;
        world.attach(guest);
        world.start(guest);
        assert!(world.is_connected(guest));
    }
}

#[test]
fn a_directory_that_was_made_anew_meanwhile_stays() {
    let mut world = World::new();
    let guest = world.connected();
    let back = world.back(guest);
    world.begin_detach(guest);
    assert_eq!(world.state(&back), State::Closed);
    world.guests[guest].frontend = None;
    // As after a time-out, on which libxl clears away by itself.
    world.attach(guest);
    world.start(guest);
    assert!(world.is_connected(guest));
    world.pass(LIBXL_WAITS);
    assert!(world.is_connected(guest));
}

#[test]
fn a_vif_of_a_guest_without_a_driver_closes_at_once() {
    let mut world = World::new();
    let guest = world.guest();
    world.attach(guest);
    let back = world.back(guest);
    world.begin_detach(guest);
    assert_eq!(world.state(&back), State::Closed);
    assert!(world.gone_after(&back) <= 2 * SECOND);
}

#[test]
fn offline_is_not_closed_for_good_while_the_frontend_is_connected() {
    let mut world = World::new();
    let guest = world.connected();
    let back = world.back(guest);
    world.toolstack([write(format!("{back}/online"), "0")]);
    world.pass(LIBXL_WAITS);
    assert!(world.is_connected(guest));
}

/// `xl destroy`: libxl forces it, so that the frontend's directory goes first; then the domain.
fn destroy(world: &mut World, guest: usize, absent_is: XsError) {
    let (front, back) = (world.front(guest), world.back(guest));
    let id = world.guests[guest].hv.id();
    if absent_is == XsError::ENOENT {
        // Where a node's parent may be read, a node that is not there is said not to be there.
        let own = world.domain.hv.id();
        world.toolstack(node(&format!("/local/domain/{id}/device/vif"), DomId(0), own));
    }
    // What it sees of a directory that is gone, to be sure that this is what is tested.
    let mut conn = Conn(world.server.connect(world.domain.hv.id(), false), Client::new());
    conn.1.get_perms(format!("/local/domain/{id}/device/vif/7/state"));
    while conn.move_bytes(&mut world.server) {}
    let Some(Event::Done { result, .. }) = conn.1.poll_event() else { panic!() };
    assert_eq!(result, Err(Error::Store { error: absent_is, at: 0 }));
    world.server.disconnect(conn.0);

    let (online, state) = (format!("{back}/online"), format!("{back}/state"));
    let state = write(state, State::Closing.text());
    // Its processors stand still by now.
    world.guests[guest].frontend = None;
    world.toolstack([Change::Rm { path: front }, write(online, "0"), state]);
    assert_eq!(world.state(&back), State::Closed);
    assert!(world.gone_after(&back) <= 2 * SECOND);
    assert_eq!(world.held_of(guest), [""; 0]);
    world.sim.destroy(id);
    world.server.domain_gone(id);
    world.toolstack([Change::Rm { path: format!("/local/domain/{id}") }]);
}

#[test]
fn a_guest_that_is_destroyed_in_mid_transfer_leaves_nothing() {
    for absent_is in [XsError::EACCES, XsError::ENOENT] {
        let mut world = World::new();
        let (one, two) = (world.connected(), world.connected());
        let before = world.held();
        let third = world.connected();
        assert_ne!(world.held(), before);
        let (to, from) = (world.mac(one), world.mac(third));
        for turn in 0..200 {
            for (guest, to, from) in [(third, to, from), (one, from, to)] {
                let big = frame(to, from, 1400, turn as u8);
                let frontend = world.guests[guest].frontend.as_mut().unwrap();
                let _ = frontend.send(0, &big, Meta::default());
            }
            world.turn();
        }
        assert!(world.guests[one].received > 50 && world.guests[third].received > 50);
        destroy(&mut world, third, absent_is);
        world.pass(SECOND);
        assert_eq!(world.held(), before, "{absent_is:?}");
        assert!(world.is_connected(one) && world.is_connected(two));
        assert_eq!(world.sim.violations(), Vec::<String>::new());
    }
}

#[test]
fn a_guest_whose_directory_goes_without_a_word_is_let_go_of() {
    let mut world = World::new();
    let before = world.held();
    let guest = world.connected();
    let (front, back) = (world.front(guest), world.back(guest));
    world.guests[guest].frontend = None;
    world.toolstack([Change::Rm { path: front }]);
    assert_eq!(world.state(&back), State::Closed);
    assert_eq!(world.held(), before);
    // Nobody has said that it is for good: the directory is the toolstack's.
    world.pass(LIBXL_WAITS);
    assert_eq!(world.state(&back), State::Closed);
    world.toolstack([write(format!("{back}/online"), "0")]);
    world.gone_after(&back);
}

#[test]
fn our_own_directory_may_go_at_any_time() {
    let mut world = World::new();
    let before = world.held();
    let guest = world.connected();
    let back = world.back(guest);
    world.toolstack([Change::Rm { path: back.clone() }]);
    assert_eq!(world.held(), before);
    assert_eq!(world.read(&format!("{back}/state")), None, "and it does not come back");
    world.attach(guest);
    assert_eq!(world.state(&back), State::InitWait);
}

/// A domain that starts over finds what its earlier life left: in each state, wanted or not, with a guest or without.
#[test]
fn what_an_earlier_life_left_is_closed_and_offered_again() {
    for state in State::ALL.into_iter().skip(1) {
        for (online, has_frontend) in [(true, true), (true, false), (false, true), (false, false)] {
            let mut world = World::with(config(), false);
            let guest = world.guest();
            world.attach(guest);
            let (front, back) = (world.front(guest), world.back(guest));
            let online_is = if online { "1" } else { "0" };
            let peer = if state == State::Initialising { state } else { State::Connected };
            world.toolstack([
                write(format!("{back}/state"), state.text()),
                write(format!("{back}/online"), online_is),
                write(format!("{back}/hotplug-status"), "connected"),
                write(format!("{back}/feature-of-another-life"), "1"),
                write(format!("{front}/state"), peer.text()),
            ]);
            if !has_frontend {
                world.toolstack([Change::Rm { path: front }]);
            }
            world.begin(config());
            let what = format!("{state:?} online={online} frontend={has_frontend}");
            if state == State::Initialising {
                // Not left over.
                continue;
            }
            if !online {
                world.gone_after(&back);
                continue;
            }
            if !has_frontend {
                assert_eq!(world.state(&back), State::Closed, "{what}");
                world.pass(LIBXL_WAITS);
                assert_eq!(world.state(&back), State::Closed, "{what}");
                continue;
            }
            // The guest's driver takes part in it, from `Connected` on.
            let closing = [State::Closing, State::Closed, State::InitWait];
            assert!(closing.contains(&world.state(&back)), "{what}");
            world.start(guest);
            // In `InitWait` the frontend was taken at its word, and refused for a while.
            world.pass(SECOND);
            let states = (world.state(&world.front(guest)), world.state(&back));
            assert!(world.is_connected(guest), "{what}: {states:?} {:?}", world.domain.notices);
        }
    }
}

#[test]
fn a_new_driver_domain_is_another_domain() {
    let mut world = World::new();
    let guest = world.connected();
    let old = world.domain.hv.id();
    let back = world.back(guest);
    // `xl destroy` of the driver domain, and a new one.
    world.domain.backend = None;
    world.sim.destroy(old);
    world.server.domain_gone(old);
    world.toolstack([Change::Rm { path: format!("/local/domain/{old}") }]);
    let hv = world.sim.create(DomainConfig::guest());
    world.domain = Domain {
        upcalls: Upcalls::new(&hv, VcpuId(0)),
        mapper: Mapper::new(&hv),
        store: Conn(world.server.introduce(hv.id()), Client::new()),
        backend: None,
        notices: Vec::new(),
        hv,
    };
    let id = world.domain.hv.id();
    world.toolstack(home(id));
    world.begin(config());
    assert!(!world.is_connected(guest));
    // `xl network-detach` finds no backend and removes the frontend's end alone.
    assert_eq!(world.read(&format!("{back}/state")), None);
    let front = world.front(guest);
    world.toolstack([Change::Rm { path: front }]);
    world.guests[guest].frontend = None;
    world.attach(guest);
    world.start(guest);
    assert!(world.is_connected(guest), "{:?}", world.domain.notices);
}

//! A machine on the simulated Xen: domain 0 with the store and a backend, and guests. Two of them are honest, and have to be
//! able to send each other a packet whatever the rest does.

use std::num::NonZeroUsize;

use evtchn::Upcalls;
use grant::{GrantTable, Mapper};
use hypercall::{DomId, Handle, Instant, Port, VcpuId};
use netback::datapath::{Arch, Facts, Policy};
use netback::switch::{Seed, SwitchLimits};
use netback::{Backend, Hotplug, Notice};
use netfront::{Frontend, Meta};
use sim::{DomainConfig, Sim, SimHv};
use xenbus::client::{Change, Client};
use xenbus::server::{ConnId, Quotas, Server};
use xenbus::wire::{Access, Perm};

pub const DOM0: DomId = DomId(0);
pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1000 * MS;
/// The longest that a peer which broke the protocol is kept waiting.
pub const LONGEST_PENALTY: u64 = 60 * SECOND;

/// Turns of all domains after which something goes in circles.
const TURNS: usize = 4000;

/// A domain other than 0.
pub struct Guest {
    pub id: DomId,
    pub upcalls: Upcalls<SimHv>,
    pub table: GrantTable<SimHv>,
    pub client: Client,
    pub conn: Option<ConnId>,
    pub frontends: Vec<Frontend<SimHv>>,
    pub received: Vec<Vec<u8>>,
}

impl Guest {
    fn turn(&mut self, now: Instant) -> bool {
        let mut ports = Vec::new();
        self.upcalls.scan(64, |port| ports.push(port));
        let mut more = !ports.is_empty();
        for port in ports {
            for frontend in &mut self.frontends {
                if frontend.on_event(port) {
                    break;
                }
            }
        }
        while let Some(event) = self.client.poll_event() {
            for frontend in &mut self.frontends {
                if frontend.on_store(&mut self.client, &event, now) {
                    break;
                }
            }
            more = true;
        }
        let mut frame = Vec::new();
        for frontend in &mut self.frontends {
            for queue in 0..frontend.queues() {
                while frontend.receive(queue, &mut frame).is_some() {
                    self.received.push(std::mem::take(&mut frame));
                    more = true;
                }
            }
            more |= frontend.poll(&mut self.client, now);
            more |= frontend.take_notices().count() > 0;
        }
        more
    }
}

pub struct World {
    pub sim: Sim,
    pub upcalls: Upcalls<SimHv>,
    pub server: Server,
    pub client: Client,
    pub own: ConnId,
    pub backend: Backend<SimHv>,
    /// The honest two, then others.
    pub guests: Vec<Guest>,
    pub now: Instant,
    /// Vifs for which `hotplug-status` is to be written.
    pub hotplug: bool,
}

pub fn write(path: impl Into<String>, value: impl Into<Vec<u8>>) -> Change {
    Change::Write { path: path.into(), value: value.into() }
}

/// A directory that one domain owns and another may read.
pub fn directory(path: &str, owner: DomId, reader: DomId) -> [Change; 2] {
    let perms = vec![Perm::new(Access::None, owner), Perm::new(Access::Read, reader)];
    [Change::Mkdir { path: path.into() }, Change::SetPerms { path: path.into(), perms }]
}

pub fn home(domain: DomId) -> String {
    format!("/local/domain/{domain}")
}

pub fn front(domain: DomId, handle: u32) -> String {
    format!("{}/device/vif/{handle}", home(domain))
}

/// The directory of a vif that `backend` serves.
pub fn back(backend: DomId, domain: DomId, handle: u32) -> String {
    format!("{}/backend/vif/{domain}/{handle}", home(backend))
}

fn mac(domain: DomId) -> [u8; 6] {
    let [high, low] = domain.0.to_be_bytes();
    [0, 0x16, 0x3e, 0, high, low]
}

/// What a toolstack writes for a domain that is new.
pub fn home_nodes(domain: DomId) -> Vec<Change> {
    let home = home(domain);
    let error = format!("{home}/error");
    [directory(&home, DOM0, domain), directory(&error, domain, DOM0)]
        .into_iter()
        .flatten()
        .collect()
}

/// What a toolstack writes for an interface.
pub fn vif_nodes(backend: DomId, domain: DomId, handle: u32) -> Vec<Change> {
    let (front, back) = (front(domain, handle), back(backend, domain, handle));
    let mut changes: Vec<_> = directory(&front, domain, backend).into();
    changes.extend(directory(&back, backend, domain));
    let [a, b, c, d, e, f] = mac(domain);
    let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    let handle = handle.to_string();
    for (key, value) in [
        ("backend", back.as_str()),
        ("backend-id", &backend.to_string()),
        ("state", "1"),
        ("handle", &handle),
        ("mac", &mac),
    ] {
        changes.push(write(format!("{front}/{key}"), value));
    }
    for (key, value) in [
        ("frontend", front.as_str()),
        ("frontend-id", &domain.to_string()),
        ("online", "1"),
        ("state", "1"),
        ("handle", &handle),
        ("mac", &mac),
        ("hotplug-status", ""),
    ] {
        changes.push(write(format!("{back}/{key}"), value));
    }
    changes
}

/// As little as will do, since each input has a machine of its own.
fn small(config: DomainConfig) -> DomainConfig {
    DomainConfig { grant_frames: 4, windows: 64, maptrack: 64, ..config }
}

fn count(number: usize) -> NonZeroUsize {
    NonZeroUsize::new(number).unwrap()
}

impl World {
    /// Domain 0 and the honest two, connected.
    pub fn new() -> Self {
        let sim = Sim::new();
        let hv = sim.create(small(DomainConfig::dom0()));
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        let mut server = Server::new(Quotas::default());
        let own = server.connect(DOM0, true);
        let mut client = Client::new();
        let config = netback::Config {
            max_queues: 2,
            small_buffers: count(64),
            large_buffers: count(4),
            hotplug: Hotplug::Script,
            max_vifs: 8,
            switch: SwitchLimits::default(),
            seed: Seed(1, 2),
            facts: Facts::probe(&hv, Arch::Arm, false, None),
            policy: Policy::default(),
        };
        let (binder, mapper) = (upcalls.binder(), Mapper::new(&hv));
        let backend = Backend::new(&hv, binder, mapper, &mut client, config).expect("features");
        let now = Instant(SECOND);
        let guests = Vec::new();
        let mut world =
            Self { sim, upcalls, server, client, own, backend, guests, now, hotplug: true };
        for guest in 0..2 {
            world.add_guest();
            let id = world.guests[guest].id;
            world.client.commit(vif_nodes(DOM0, id, 0));
            world.start(guest, 0);
        }
        world.settle();
        assert!(world.guests.iter().all(|guest| guest.frontends[0].is_connected()));
        world
    }

    /// A new domain, without interfaces. Answers its index.
    pub fn add_guest(&mut self) -> usize {
        let hv = self.sim.create(small(DomainConfig::guest()));
        let id = hv.id();
        self.client.commit(home_nodes(id));
        let table = GrantTable::new(&hv).unwrap();
        // The table's first frame stays; it is not to show up as a leak.
        drop(table.share(DOM0, true).unwrap());
        self.guests.push(Guest {
            upcalls: Upcalls::new(&hv, VcpuId(0)),
            table,
            client: Client::new(),
            conn: Some(self.server.introduce(id)),
            frontends: Vec::new(),
            received: Vec::new(),
            id,
        });
        self.settle();
        self.guests.len() - 1
    }

    /// Starts a frontend in a domain.
    pub fn start(&mut self, guest: usize, handle: u32) {
        let guest = &mut self.guests[guest];
        let config = netfront::Config { posted: 24, ..netfront::Config::new(Handle(handle)) };
        let (table, binder) = (guest.table.clone(), guest.upcalls.binder());
        guest.frontends.push(Frontend::new(table, binder, &mut guest.client, config));
    }

    fn move_bytes(server: &mut Server, conn: ConnId, client: &mut Client) -> bool {
        let sent = server.receive(conn, client.pending_output()).unwrap();
        client.consume_output(sent);
        let bytes = server.pending_output(conn);
        let heard = bytes.len();
        client.receive(bytes).unwrap();
        server.consume_output(conn, heard);
        sent + heard > 0
    }

    fn turn_dom0(&mut self) -> bool {
        let mut more = Self::move_bytes(&mut self.server, self.own, &mut self.client);
        let mut ports: Vec<Port> = Vec::new();
        more |= self.upcalls.scan(64, |port| ports.push(port)) > 0;
        for port in ports {
            self.backend.on_event(port);
        }
        while let Some(event) = self.client.poll_event() {
            self.backend.on_store(&mut self.client, &event, self.now);
            more = true;
        }
        more |= self.backend.poll(&mut self.client, self.now, |_| {});
        let notices: Vec<_> = self.backend.take_notices().collect();
        for notice in notices {
            more = true;
            if let (Notice::Offered(vif), true) = (notice, self.hotplug) {
                let path = format!("{}/hotplug-status", back(DOM0, vif.domain, vif.handle.0));
                self.client.commit([Change::Update { path, value: "connected".into() }]);
            }
        }
        while self.backend.receive_local().is_some() {}
        more || !self.client.pending_output().is_empty()
    }

    /// One turn of every domain. Answers whether anything happened.
    pub fn turn(&mut self) -> bool {
        let mut more = false;
        for guest in &mut self.guests {
            let Some(conn) = guest.conn else { continue };
            more |= Self::move_bytes(&mut self.server, conn, &mut guest.client);
            more |= guest.turn(self.now);
            more |= guest.upcalls.is_pending() || !guest.client.pending_output().is_empty();
        }
        more | self.turn_dom0()
    }

    /// Until nothing happens any more, while time stands still.
    pub fn settle(&mut self) {
        for _ in 0..TURNS {
            if !self.turn() {
                return;
            }
        }
        panic!("no end to it");
    }

    /// Lets time pass, in steps.
    pub fn pass(&mut self, nanos: u64) {
        let end = self.now.after(nanos);
        while self.now < end {
            self.now = self.now.after((nanos / 4).max(MS)).min(end);
            self.settle();
        }
    }

    /// That the honest two can still send each other packets.
    pub fn assert_carries(&mut self) {
        for (from, to) in [(0, 1), (1, 0)] {
            let (source, target) = (mac(self.guests[from].id), mac(self.guests[to].id));
            let mut frame = [&target[..], &source, &[0x88, 0xb5]].concat();
            frame.resize(300, from as u8 + 1);
            self.guests[to].received.clear();
            self.guests[from].frontends[0].send(0, &frame, Meta::default()).unwrap();
            self.settle();
            let arrived = self.guests[to].received.contains(&frame);
            assert!(arrived, "{from} to {to}: {:?}", self.backend.vifs().collect::<Vec<_>>());
        }
    }

    /// That nobody but a domain itself holds anything of it.
    pub fn assert_let_go(&self, id: DomId) {
        let ledger = self.sim.ledger();
        let items = ledger.concerning(id);
        let held: Vec<_> = items.entries().filter(|(holder, _)| *holder != id).collect();
        assert!(held.is_empty(), "{held:?}");
    }

    /// That nobody broke the contract of the seam, and all packet buffers are back.
    pub fn assert_clean(&self) {
        assert_eq!(self.sim.violations(), Vec::<String>::new());
        assert_eq!(self.backend.pools().all().out(), 0);
    }

    /// A domain is destroyed, and the toolstack says so.
    pub fn destroy(&mut self, guest: usize) {
        let id = self.guests[guest].id;
        self.sim.destroy(id);
        self.guests[guest].conn = None;
        self.backend.domain_gone(&mut self.client, id, self.now);
        self.server.domain_gone(id);
        self.client.commit([
            Change::Rm { path: home(id) },
            Change::Rm { path: format!("{}/backend/vif/{id}", home(DOM0)) },
        ]);
        self.settle();
    }
}

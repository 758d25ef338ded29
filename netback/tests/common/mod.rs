//! A machine in one process: domain 0 with the store and the backend, and guests with a frontend or with none, in which
//! case a test plays one by hand (see `raw`). Time stands still unless a test lets it pass.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, dead_code)]

pub mod raw;

use std::num::NonZeroUsize;

use evtchn::Upcalls;
use grant::{GrantTable, Mapper};
use hypercall::{DomId, Handle, Instant, Port};
use netback::datapath::{Arch, Facts, Policy};
use netback::switch::{Seed, SwitchLimits};
use netback::{Backend, Config, Hotplug, Notice, VifId, VifStatus};
use netfront::{Frontend, Meta};
use sim::{DomainConfig, Item, Sim, SimHv};
use xenbus::client::{Change, Client, Event, Outcome};
use xenbus::device::State;
use xenbus::server::{ConnId, Quotas, Server};
use xenbus::wire::{Access, Perm};

pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1000 * MS;

/// Turns of all domains after which something goes in circles.
const TURNS: usize = 20_000;

pub type Received = (Vec<u8>, Meta);

/// One guest.
pub struct Guest {
    pub hv: SimHv,
    pub id: DomId,
    pub upcalls: Upcalls<SimHv>,
    pub table: GrantTable<SimHv>,
    pub client: Client,
    conn: Option<ConnId>,
    pub frontend: Option<Frontend<SimHv>>,
    /// Whether packets are taken as they come.
    pub receives: bool,
    /// What came, by queue.
    pub received: Vec<Vec<Received>>,
    pub notices: Vec<netfront::Notice>,
    /// Events of ports that no frontend has.
    pub events: Vec<Port>,
    /// Whether the domain's virtual CPU runs.
    pub runs: bool,
}

impl Guest {
    pub fn mac(&self) -> [u8; 6] {
        mac(self.id)
    }

    pub fn frontend(&mut self) -> &mut Frontend<SimHv> {
        self.frontend.as_mut().unwrap()
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.frontend().send(0, frame, Meta::default()).unwrap();
    }

    /// What came on queue 0 since the last call.
    pub fn take(&mut self) -> Vec<Received> {
        match self.received.first_mut() {
            Some(received) => std::mem::take(received),
            None => Vec::new(),
        }
    }

    /// Whether another turn is due.
    fn has_more(&self) -> bool {
        let says = self.conn.is_some() && !self.client.pending_output().is_empty();
        self.runs && (says || self.upcalls.is_pending())
    }

    fn turn(&mut self, now: Instant) -> bool {
        let mut ports = Vec::new();
        self.upcalls.scan(64, |port| ports.push(port));
        let mut more = !ports.is_empty();
        let Some(frontend) = &mut self.frontend else {
            self.events.extend(ports);
            while self.client.poll_event().is_some() {}
            return more;
        };
        for port in ports {
            if !frontend.on_event(port) {
                self.events.push(port);
            }
        }
        while let Some(event) = self.client.poll_event() {
            frontend.on_store(&mut self.client, &event, now);
            more = true;
        }
        if self.receives {
            for queue in 0..frontend.queues() {
                if self.received.len() <= queue {
                    self.received.resize_with(queue + 1, Vec::new);
                }
                let mut frame = Vec::new();
                while let Some(meta) = frontend.receive(queue, &mut frame) {
                    self.received[queue].push((std::mem::take(&mut frame), meta));
                    more = true;
                }
            }
        }
        more |= frontend.poll(&mut self.client, now) && self.receives;
        let before = self.notices.len();
        self.notices.extend(frontend.take_notices());
        more | (self.notices.len() != before)
    }
}

pub struct Machine {
    pub sim: Sim,
    pub hv: SimHv,
    pub upcalls: Upcalls<SimHv>,
    pub mapper: Mapper<SimHv>,
    pub server: Server,
    pub client: Client,
    own: ConnId,
    pub backend: Backend<SimHv>,
    pub guests: Vec<Guest>,
    pub notices: Vec<Notice>,
    /// Packets that the tap saw.
    pub tapped: usize,
    pub now: Instant,
    /// Whether `hotplug-status` is written as soon as a vif is offered.
    pub hotplug: bool,
}

/// A dom0 on Arm whose own stack takes what is for the local port.
pub fn facts() -> Facts {
    Facts { arch: Arch::Arm, grant_copy: true, cache_flush: true, iommu_maps: false, uplink: None }
}

pub fn config() -> Config {
    Config {
        max_queues: 4,
        small_buffers: NonZeroUsize::new(512).unwrap(),
        large_buffers: NonZeroUsize::new(32).unwrap(),
        hotplug: Hotplug::Script,
        max_vifs: 16,
        switch: SwitchLimits::default(),
        seed: Seed(1, 2),
        facts: facts(),
        // Packets of two slots that one page of the sender's has room for go by reference.
        policy: Policy { direct_from: 1024, map_from: 2048, ..Policy::default() },
    }
}

pub fn mac(domain: DomId) -> [u8; 6] {
    let [high, low] = domain.0.to_be_bytes();
    [0, 0x16, 0x3e, 0, high, low]
}

fn write(path: String, value: &str) -> Change {
    Change::Write { path, value: value.into() }
}

fn perms(path: String, owner: DomId, reader: DomId) -> Change {
    let perms = [Perm::new(Access::None, owner), Perm::new(Access::Read, reader)];
    Change::SetPerms { path, perms: perms.into() }
}

/// The directory of a guest's home.
pub fn home(domain: DomId) -> String {
    format!("/local/domain/{domain}")
}

pub fn front(domain: DomId) -> String {
    format!("/local/domain/{domain}/device/vif/0")
}

pub fn back(domain: DomId) -> String {
    format!("/local/domain/0/backend/vif/{domain}/0")
}

/// What a toolstack writes for a guest with one interface.
pub fn nodes(domain: DomId, rate: Option<&str>) -> Vec<Change> {
    let dom0 = DomId(0);
    let (home, front, back) = (home(domain), front(domain), back(domain));
    let mut changes = vec![Change::Mkdir { path: home.clone() }, perms(home.clone(), dom0, domain)];
    changes.push(write(format!("{home}/domid"), &domain.to_string()));
    changes.push(write(format!("{home}/error"), ""));
    changes.push(perms(format!("{home}/error"), domain, dom0));
    for (path, owner, reader) in [(&front, domain, dom0), (&back, dom0, domain)] {
        changes.push(Change::Mkdir { path: path.clone() });
        changes.push(perms(path.clone(), owner, reader));
    }
    let [a, b, c, d, e, f] = mac(domain);
    let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    for (key, value) in [
        ("backend", back.as_str()),
        ("backend-id", "0"),
        ("state", "1"),
        ("handle", "0"),
        ("mac", &mac),
        ("mtu", "1500"),
    ] {
        changes.push(write(format!("{front}/{key}"), value));
    }
    for (key, value) in [
        ("frontend", front.as_str()),
        ("frontend-id", &domain.to_string()),
        ("online", "1"),
        ("state", "1"),
        ("handle", "0"),
        ("mac", &mac),
        ("hotplug-status", ""),
    ] {
        changes.push(write(format!("{back}/{key}"), value));
    }
    changes.extend(rate.map(|rate| write(format!("{back}/rate"), rate)));
    changes
}

impl Machine {
    pub fn new() -> Self {
        Self::with(config())
    }

    pub fn with(config: Config) -> Self {
        Self::in_domain(DomainConfig::dom0(), config)
    }

    /// With a domain 0 that is like this.
    pub fn in_domain(domain: DomainConfig, config: Config) -> Self {
        let sim = Sim::new();
        let hv = sim.create(domain);
        let upcalls = Upcalls::new(&hv, hypercall::VcpuId(0));
        let mapper = Mapper::new(&hv);
        let mut server = Server::new(Quotas::default());
        let own = server.connect(DomId(0), true);
        let mut client = Client::new();
        let backend = Backend::new(&hv, upcalls.binder(), mapper.clone(), &mut client, config);
        let backend = backend.unwrap();
        Self {
            sim,
            hv,
            upcalls,
            mapper,
            server,
            client,
            own,
            backend,
            guests: Vec::new(),
            notices: Vec::new(),
            tapped: 0,
            now: Instant(SECOND),
            hotplug: true,
        }
    }

    /// A guest without a frontend; the nodes of its interface are there. Answers its index.
    pub fn bare_guest(&mut self) -> usize {
        self.limited_guest(None)
    }

    /// As `bare_guest`, with a `rate`.
    pub fn limited_guest(&mut self, rate: Option<&str>) -> usize {
        let hv = self.sim.create(DomainConfig::guest());
        let id = hv.id();
        self.client.commit(nodes(id, rate));
        let table = GrantTable::new(&hv).unwrap();
        // The table's first frame stays; it is not to show up as a leak.
        drop(table.share(DomId(0), true).unwrap());
        self.guests.push(Guest {
            upcalls: Upcalls::new(&hv, hypercall::VcpuId(0)),
            table,
            client: Client::new(),
            conn: Some(self.server.introduce(id)),
            frontend: None,
            receives: true,
            received: Vec::new(),
            notices: Vec::new(),
            events: Vec::new(),
            runs: true,
            id,
            hv,
        });
        self.settle();
        self.guests.len() - 1
    }

    /// Gives a guest a frontend.
    pub fn start(&mut self, guest: usize, config: netfront::Config) {
        let guest = &mut self.guests[guest];
        let binder = guest.upcalls.binder();
        let frontend = Frontend::new(guest.table.clone(), binder, &mut guest.client, config);
        guest.frontend = Some(frontend);
        self.settle();
    }

    /// A guest with a connected frontend.
    pub fn guest(&mut self, config: netfront::Config) -> usize {
        let guest = self.bare_guest();
        self.start(guest, config);
        assert!(self.guests[guest].frontend().is_connected(), "{:?}", self.notices);
        guest
    }

    /// As `guest`, with everything there is.
    pub fn plain_guest(&mut self) -> usize {
        self.guest(netfront::Config::new(Handle(0)))
    }

    pub fn two() -> Self {
        let mut machine = Self::new();
        machine.plain_guest();
        machine.plain_guest();
        machine
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

    /// One turn of every domain. Answers whether anything happened.
    pub fn turn(&mut self) -> bool {
        let mut more = Self::move_bytes(&mut self.server, self.own, &mut self.client);
        for guest in &mut self.guests {
            if let Some(conn) = guest.conn {
                more |= Self::move_bytes(&mut self.server, conn, &mut guest.client);
            }
            if guest.runs {
                more |= guest.turn(self.now);
            }
        }
        more |= self.turn_dom0() || !self.client.pending_output().is_empty();
        more | self.upcalls.is_pending() | self.guests.iter().any(Guest::has_more)
    }

    /// One turn of domain 0 alone.
    pub fn turn_dom0(&mut self) -> bool {
        let mut ports = Vec::new();
        let mut more = self.upcalls.scan(64, |port| ports.push(port)) > 0;
        for port in ports {
            self.backend.on_event(port);
        }
        while let Some(event) = self.client.poll_event() {
            self.backend.on_store(&mut self.client, &event, self.now);
            more = true;
        }
        let tapped = &mut self.tapped;
        more |= self.backend.poll(&mut self.client, self.now, |_| *tapped += 1);
        for notice in self.backend.take_notices() {
            more = true;
            if let (Notice::Offered(VifId { domain, .. }), true) = (&notice, self.hotplug) {
                self.client
                    .commit([write(format!("{}/hotplug-status", back(*domain)), "connected")]);
            }
            self.notices.push(notice);
        }
        more
    }

    /// Until nothing happens any more, while time stands still.
    pub fn settle(&mut self) {
        for _ in 0..TURNS {
            if !self.turn() {
                return;
            }
        }
        panic!("no end to it: {:?}", self.notices);
    }

    /// Lets time pass, in steps of a millisecond up to a twentieth.
    pub fn pass(&mut self, nanos: u64) {
        let end = self.now.after(nanos);
        let step = (nanos / 20).max(MS);
        while self.now < end {
            self.now = self.now.after(step).min(end);
            self.settle();
        }
    }

    pub fn status(&self, guest: usize) -> Option<VifStatus> {
        let domain = self.guests[guest].id;
        self.backend.vifs().find(|vif| vif.id.domain == domain)
    }

    pub fn is_connected(&self, guest: usize) -> bool {
        self.status(guest).is_some_and(|vif| vif.state == State::Connected && vif.queues > 0)
    }

    /// The notices of one guest's vif so far, which are forgotten.
    pub fn take_notices(&mut self, guest: usize) -> Vec<Notice> {
        let domain = self.guests[guest].id;
        let of = |notice: &Notice| match notice {
            Notice::Offered(vif)
            | Notice::Disconnected(vif)
            | Notice::Faulted(vif, _)
            | Notice::Refused(vif, _)
            | Notice::Removed(vif)
            | Notice::Connected { vif, .. } => vif.domain == domain,
            _ => false,
        };
        let (mine, others) = std::mem::take(&mut self.notices).into_iter().partition(of);
        self.notices = others;
        mine
    }

    /// Writes nodes as the toolstack.
    pub fn toolstack(&mut self, changes: impl IntoIterator<Item = Change>) {
        self.client.commit(changes);
        self.settle();
    }

    pub fn write(&mut self, path: &str, value: &str) {
        self.toolstack([write(path.into(), value)]);
    }

    pub fn remove(&mut self, path: &str) {
        self.toolstack([Change::Rm { path: path.into() }]);
    }

    /// Reads a node, past all drivers.
    pub fn read(&mut self, path: &str) -> Option<String> {
        let conn = self.server.connect(DomId(0), true);
        let mut client = Client::new();
        client.read_many([path]);
        while Self::move_bytes(&mut self.server, conn, &mut client) {}
        self.server.disconnect(conn);
        match client.poll_event() {
            Some(Event::Done { result: Ok(Outcome::Values(values)), .. }) => {
                values[0].as_ref().map(|value| String::from_utf8(value.clone()).unwrap())
            }
            other => panic!("{path}: {other:?}"),
        }
    }

    /// The states of the frontend's and the backend's node.
    pub fn states(&mut self, guest: usize) -> (State, State) {
        let id = self.guests[guest].id;
        let mut state = |dir: String| {
            State::parse(self.read(&format!("{dir}/state")).as_deref().map(str::as_bytes))
        };
        (state(front(id)), state(back(id)))
    }

    /// What domain 0 holds of a guest: mappings, and ports joined to its.
    pub fn held_of(&self, guest: usize) -> String {
        let ledger = self.sim.ledger();
        let items = ledger.concerning(self.guests[guest].id);
        let held = items.entries().filter(|(holder, _)| *holder == DomId(0));
        held.map(|(_, item)| format!("{item}\n")).collect()
    }

    /// Everything that a guest holds and that is held of it.
    pub fn ledger_of(&self, guest: usize) -> sim::Ledger {
        self.sim.ledger().concerning(self.guests[guest].id)
    }

    /// That nothing of a guest is held, and nobody broke the seam's contract.
    pub fn assert_let_go(&self, guest: usize) {
        assert_eq!(self.held_of(guest), "");
        assert_eq!(self.sim.violations(), Vec::<String>::new());
    }

    /// That no interface but those of `hostile` has noticed anything: all are connected, and nothing was dropped or said.
    pub fn assert_unnoticed(&self, hostile: &[usize]) {
        let hostile: Vec<_> = hostile.iter().map(|guest| self.guests[*guest].id).collect();
        for vif in self.backend.vifs().filter(|vif| !hostile.contains(&vif.id.domain)) {
            assert_eq!(vif.state, State::Connected, "{}", vif.id);
            let drops = (vif.counters.tx_drops, vif.counters.rx_drops);
            assert_eq!(drops, Default::default(), "{}", vif.id);
        }
        let of = |notice: &&Notice| match notice {
            Notice::Disconnected(vif)
            | Notice::Faulted(vif, _)
            | Notice::Refused(vif, _)
            | Notice::Removed(vif) => !hostile.contains(&vif.domain),
            _ => false,
        };
        assert_eq!(self.notices.iter().filter(of).collect::<Vec<_>>(), Vec::<&Notice>::new());
    }

    /// What domain 0 holds.
    pub fn held(&self) -> sim::Ledger {
        self.sim.ledger().held_by(DomId(0))
    }

    /// That packets flow both ways between two guests.
    pub fn assert_carries(&mut self, one: usize, other: usize) {
        for (from, to) in [(one, other), (other, one)] {
            let sent = frame(self.guests[to].mac(), self.guests[from].mac(), 200, 7);
            self.guests[to].take();
            self.guests[from].send(&sent);
            self.settle();
            let got = self.guests[to].take();
            let arrived = got.iter().any(|(bytes, _)| *bytes == sent);
            assert!(arrived, "{from} to {to}: {:?}\n{:?}", self.status(from), self.status(to));
        }
    }

    /// What waits for the local stack.
    pub fn take_local(&mut self) -> Vec<Vec<u8>> {
        let packets = std::iter::from_fn(|| self.backend.receive_local());
        let packets: Vec<_> = packets.collect();
        let pools = self.backend.pools();
        let whole = |mut packet: netback::Packet<SimHv>| {
            assert!(packet.make_whole(pools), "a buffer");
            packet.bytes().to_vec()
        };
        packets.into_iter().map(whole).collect()
    }

    /// That all packet buffers are back.
    pub fn assert_no_buffer_out(&mut self) {
        self.take_local();
        assert_eq!(self.backend.pools().all().out(), 0);
    }

    /// A guest's domain is destroyed, and its toolstack tells.
    pub fn destroy(&mut self, guest: usize) {
        let id = self.guests[guest].id;
        self.sim.destroy(id);
        self.guests[guest].conn = None;
        self.guests[guest].runs = false;
        self.backend.domain_gone(&mut self.client, id, self.now);
        self.server.domain_gone(id);
        self.toolstack([
            Change::Rm { path: home(id) },
            Change::Rm { path: format!("/local/domain/0/backend/vif/{id}") },
        ]);
    }
}

/// An Ethernet frame of an experimental type whose bytes depend on `seed`.
pub fn frame(dst: [u8; 6], src: [u8; 6], len: usize, seed: u8) -> Vec<u8> {
    let mut frame = [&dst[..], &src[..], &[0x88, 0xb5]].concat();
    let mut state = u32::from(seed) + 1;
    frame.extend((14..len).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    }));
    frame.truncate(len);
    frame
}

/// Whether an item of the ledger is a port.
pub fn is_port(item: &Item) -> bool {
    matches!(item, Item::Port { .. })
}

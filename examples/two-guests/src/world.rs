//! The machine: who is in it, whose turn it is, and what time it is.

use std::net::Ipv4Addr;
use std::num::NonZeroUsize;

use evtchn::Upcalls;
use grant::Mapper;
use hypercall::{DomId, Errno, Instant, VcpuId};
use netback::datapath::{Arch, Facts, Policy, Uplink};
use netback::switch::{Seed, SwitchLimits};
use netback::{Backend, Notice, VifId, VifStatus};
use netif::mac::MacAddr;
use sim::{DomainConfig, Ledger, Sim, SimHv};
use xenbus::client::{Change, Client};
use xenbus::server::{ConnId, Quotas, Server};

use crate::check::Tally;
use crate::frames::{Flow, Frames, Sizes, StationId};
use crate::guest::{Guest, GuestConfig, converse};
use crate::host::Host;
use crate::levers::{Lever, Meter};
use crate::nodes;
use crate::random::Random;
use crate::tcp::{StreamId, Tcp};
use crate::uplink::{Nic, Outside};

/// A second, in nanoseconds.
pub const SECOND: u64 = 1_000_000_000;

/// How a machine is made.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The same seed gives the same run.
    pub seed: u64,
    /// The backend.
    pub backend: netback::Config,
    /// The domain that the backend is in.
    pub domain: DomainConfig,
    /// Whether that is a domain of its own, which can die. Else it is domain 0.
    pub driver_domain: bool,
    /// Nanoseconds that pass while each domain has a turn.
    pub tick: u64,
}

impl Default for Config {
    fn default() -> Self {
        let buffers = |count| NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN);
        Self {
            seed: 0,
            backend: netback::Config {
                max_queues: 4,
                small_buffers: buffers(1024),
                large_buffers: buffers(32),
                max_vifs: 16,
                switch: SwitchLimits::default(),
                seed: Seed(1, 2),
                facts: Facts {
                    arch: Arch::Arm,
                    grant_copy: true,
                    cache_flush: true,
                    iommu_maps: false,
                    uplink: Uplink::Stack,
                },
                policy: Policy::default(),
            },
            domain: DomainConfig::dom0(),
            driver_domain: false,
            tick: 10_000,
        }
    }
}

impl Config {
    /// A machine that is quickly made, for those who make many: few packet buffers.
    #[must_use]
    pub fn small(seed: u64) -> Self {
        let mut config = Self { seed, ..Self::default() };
        let buffers = |count| NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN);
        config.backend.small_buffers = buffers(256);
        config.backend.large_buffers = buffers(8);
        config
    }
}

/// Somewhere that frames come from and go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// A guest, by index.
    Guest(usize),
    /// The far end of domain 0's network card.
    Outside,
}

/// Who can have a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    /// The toolstack, in domain 0.
    Toolstack,
    /// The backend's domain.
    Backend,
    /// A guest's.
    Guest(usize),
    /// The network card, and who is behind it.
    Outside,
}

/// Something did not come about in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stuck;

impl std::fmt::Display for Stuck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the machine is stuck")
    }
}

impl std::error::Error for Stuck {}

/// The backend, while its domain lives.
pub struct BackendDomain {
    /// Its domain's own view of Xen.
    pub hv: SimHv,
    /// The backend.
    pub backend: Backend<SimHv>,
    /// What its windows are shared out by.
    pub mapper: Mapper<SimHv>,
    /// What it has said.
    pub notices: Vec<Notice>,
    upcalls: Upcalls<SimHv>,
    client: Client,
    conn: ConnId,
}

/// A machine with domain 0, a backend, guests and an outside, in one thread.
pub struct World {
    /// The simulated Xen.
    pub sim: Sim,
    /// The store.
    pub server: Server,
    /// What time it is.
    pub now: Instant,
    config: Config,
    toolstack: (ConnId, Client),
    dom0: SimHv,
    backend: Option<BackendDomain>,
    guests: Vec<Option<Guest>>,
    guest_configs: Vec<GuestConfig>,
    outside: Host,
    uplink: Nic,
    flows: Vec<(Place, Place, Flow)>,
    /// Those that begin when both ends are there.
    pending: Vec<(Place, Place, Flow)>,
    stations: u32,
    streams: u16,
    /// Of lives and connections that are over: what was in flight then may be gone.
    graves: Vec<Frames>,
    /// What Xen advertises to the backend's domain.
    advertised: u32,
    random: Random,
    /// Who still has a turn in this round, the next one last.
    order: Vec<Actor>,
    /// Turns in a row in which nothing happened, by distinct actors.
    idle: Vec<Actor>,
    /// Turns so far.
    steps: u64,
}

impl World {
    /// A machine with domain 0, the store and the backend, and no guests.
    ///
    /// # Panics
    /// When the host has no memory left.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let sim = Sim::new();
        let dom0 = if config.driver_domain { DomainConfig::dom0() } else { config.domain };
        let dom0 = sim.create(dom0);
        let mut server = Server::new(Quotas::default());
        let toolstack = (server.connect(DomId(0), true), Client::new());
        let mut random = Random::new(config.seed);
        let outside = Host::new(Frames::new(StationId(0), random.next()));
        let mut world = Self {
            sim,
            server,
            now: Instant(SECOND),
            config,
            toolstack,
            dom0,
            backend: None,
            guests: Vec::new(),
            guest_configs: Vec::new(),
            outside,
            uplink: Nic::default(),
            flows: Vec::new(),
            pending: Vec::new(),
            stations: 1,
            streams: 0,
            graves: Vec::new(),
            advertised: config.domain.features,
            random,
            order: Vec::new(),
            idle: Vec::new(),
            steps: 0,
        };
        world.start_backend();
        world
    }

    /// Starts the backend, in a new domain if it has one of its own; it takes over all guests.
    pub fn start_backend(&mut self) {
        let hv = if self.config.driver_domain {
            let hv = self.sim.create(self.config.domain);
            self.toolstack.1.commit(nodes::driver_domain(hv.id()));
            hv
        } else {
            self.dom0.clone()
        };
        let conn = match hv.id() {
            DomId(0) => self.server.connect(DomId(0), true),
            id => self.server.introduce(id),
        };
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        let mapper = Mapper::new(&hv);
        let mut client = Client::new();
        let (binder, config) = (upcalls.binder(), self.config.backend);
        let backend = Backend::new(&hv, binder, mapper.clone(), &mut client, config)
            .expect("Xen says what it offers");
        let id = hv.id();
        let notices = Vec::new();
        self.backend = Some(BackendDomain { hv, backend, mapper, notices, upcalls, client, conn });
        for guest in self.guests.iter().flatten() {
            let rate = guest.config.rate.as_deref();
            self.toolstack.1.commit(nodes::other_backend(id, guest.id(), guest.mac, rate));
        }
    }

    /// Destroys the backend's domain, which must be one of its own; answers whether it was.
    pub fn kill_backend(&mut self) -> bool {
        if !self.config.driver_domain {
            return false;
        }
        let Some(domain) = self.backend.take() else { return false };
        let id = domain.hv.id();
        self.sim.destroy(id);
        self.uplink.reset();
        drop(domain);
        self.server.domain_gone(id);
        self.toolstack.1.commit([Change::Rm { path: nodes::home(id) }]);
        for place in self.places() {
            self.renew(place);
        }
        self.idle.clear();
        true
    }

    /// Makes a guest; it connects in its own time. Answers its index.
    ///
    /// # Errors
    /// As Xen answers the guest.
    pub fn add_guest(&mut self, config: GuestConfig) -> Result<usize, Errno> {
        let index = self.guests.len();
        self.guests.push(None);
        self.guest_configs.push(config);
        self.start_guest(index)?;
        Ok(index)
    }

    /// Starts a guest that was killed: a new domain, with the same interface and the same flows.
    ///
    /// # Errors
    /// As Xen answers the guest.
    pub fn start_guest(&mut self, index: usize) -> Result<(), Errno> {
        let Some(config) = self.guest_configs.get(index).cloned() else { return Ok(()) };
        let hv = self.sim.create(config.domain);
        let id = hv.id();
        let mac = self.mac(Place::Guest(index));
        let mut changes = nodes::domain(id);
        if let Some(backend) = &self.backend {
            changes.extend(nodes::vif(backend.hv.id(), id, mac, config.rate.as_deref()));
        }
        self.toolstack.1.commit(changes);
        let station = StationId(self.stations);
        self.stations += 1;
        let host = Host::new(Frames::new(station, self.random.next()));
        let guest = Guest::new(hv, &mut self.server, config, mac, host)?;
        if let Some(place) = self.guests.get_mut(index) {
            *place = Some(guest);
        }
        self.suspend_flows(Place::Guest(index));
        self.idle.clear();
        Ok(())
    }

    /// The flows of a place begin when both ends are connected, be it for the first time or again.
    fn suspend_flows(&mut self, place: Place) {
        for pending in &self.flows {
            let (from, to, _) = *pending;
            let known = self.pending.iter().any(|(.., flow)| flow.id == pending.2.id);
            if (from == place || to == place) && !known {
                self.pending.push(*pending);
            }
        }
    }

    /// A place's connection is over. What was in flight may have arrived or not; what comes after is counted anew.
    fn renew(&mut self, place: Place) {
        let station = StationId(self.stations);
        let fresh = Frames::new(station, self.random.next());
        let Some(host) = self.host_mut(place) else { return };
        let old = std::mem::replace(&mut host.frames, fresh);
        self.stations += 1;
        let station = old.station();
        for other in self.hosts_mut() {
            other.frames.end(station);
        }
        self.graves.push(old);
        self.suspend_flows(place);
    }

    fn is_up(&self, place: Place) -> bool {
        match place {
            Place::Outside => self.backend.is_some(),
            Place::Guest(index) => {
                self.guest(index).is_some_and(Guest::is_connected)
                    && self.vif(index).is_some_and(|vif| vif.queues > 0)
            }
        }
    }

    fn places(&self) -> Vec<Place> {
        (0..self.guests.len()).map(Place::Guest).chain([Place::Outside]).collect()
    }

    fn begin_pending(&mut self) {
        let up: Vec<_> = self.places().into_iter().filter(|place| self.is_up(*place)).collect();
        let ready = |(from, to, _): &mut (Place, Place, Flow)| up.contains(from) && up.contains(to);
        let ready: Vec<_> = self.pending.extract_if(.., ready).collect();
        for (from, to, flow) in ready {
            self.begin(from, to, flow);
        }
    }

    /// Destroys a guest's domain, and has the toolstack say so to the backend in domain 0.
    pub fn kill_guest(&mut self, index: usize) {
        let Some(guest) = self.guests.get_mut(index).and_then(Option::take) else { return };
        let id = guest.id();
        self.sim.destroy(id);
        let station = guest.host.frames.station();
        let Guest { host, .. } = guest;
        self.graves.push(host.frames);
        for other in self.hosts_mut() {
            other.frames.end(station);
        }
        let mut changes = vec![Change::Rm { path: nodes::home(id) }];
        if let Some(domain) = &mut self.backend {
            if !self.config.driver_domain {
                domain.backend.domain_gone(&mut domain.client, id, self.now);
            }
            let back = format!("/local/domain/{}/backend/vif/{id}", domain.hv.id());
            changes.push(Change::Rm { path: back });
        }
        self.server.domain_gone(id);
        self.toolstack.1.commit(changes);
        self.idle.clear();
    }

    /// A place's Ethernet address: what a guest has over all its lives.
    #[must_use]
    pub fn mac(&self, place: Place) -> MacAddr {
        match place {
            Place::Guest(index) => MacAddr([0, 0x16, 0x3e, 0, 1, index as u8]),
            Place::Outside => MacAddr([0, 0x16, 0x3e, 0, 2, 0]),
        }
    }

    fn address(place: Place) -> Ipv4Addr {
        match place {
            Place::Guest(index) => Ipv4Addr::new(10, 0, 0, 1 + index as u8),
            Place::Outside => Ipv4Addr::new(10, 0, 0, 254),
        }
    }

    fn host(&self, place: Place) -> Option<&Host> {
        match place {
            Place::Guest(index) => Some(&self.guest(index)?.host),
            Place::Outside => Some(&self.outside),
        }
    }

    fn hosts_mut(&mut self) -> impl Iterator<Item = &mut Host> {
        let guests = self.guests.iter_mut().flatten().map(|guest| &mut guest.host);
        guests.chain([&mut self.outside])
    }

    fn host_mut(&mut self, place: Place) -> Option<&mut Host> {
        match place {
            Place::Guest(index) => Some(&mut self.guests.get_mut(index)?.as_mut()?.host),
            Place::Outside => Some(&mut self.outside),
        }
    }

    /// Has frames go from one place to another, for as long as both live and over all their lives.
    pub fn flow(&mut self, from: Place, to: Place, sizes: Sizes, window: u64) {
        let id = self.flows.len() as u16;
        let flow = Flow { id, to: StationId(0), mac: self.mac(to), sizes, window };
        self.flows.push((from, to, flow));
        self.pending.push((from, to, flow));
        self.idle.clear();
    }

    fn begin(&mut self, from: Place, to: Place, flow: Flow) {
        let Some(to) = self.host(to).map(|host| host.frames.station()) else { return };
        let now = self.now;
        if let Some(from) = self.host_mut(from) {
            from.frames.begin(Flow { to, ..flow }, now);
        }
    }

    /// Has one place pull a stream by TCP from another. Does not outlive either.
    pub fn stream(&mut self, server: Place, client: Place) {
        let id = StreamId(self.streams);
        self.streams += 1;
        if let Some(tcp) = self.tcp(server) {
            tcp.serve(id);
        }
        if let Some(tcp) = self.tcp(client) {
            tcp.pull(id, Self::address(server));
        }
        self.idle.clear();
    }

    fn tcp(&mut self, place: Place) -> Option<&mut Tcp> {
        let (address, mac, now) = (Self::address(place), self.mac(place), self.now);
        if self.host(place)?.tcp.is_none() {
            match place {
                Place::Guest(index) => {
                    self.guests.get_mut(index)?.as_mut()?.with_tcp(address, now);
                }
                Place::Outside => {
                    let nic = &mut self.uplink;
                    self.outside.with_tcp(&mut Outside { nic, mac }, address, now);
                }
            }
        }
        self.host_mut(place)?.tcp.as_mut()
    }

    /// A guest that lives.
    #[must_use]
    pub fn guest(&self, index: usize) -> Option<&Guest> {
        self.guests.get(index)?.as_ref()
    }

    /// A guest that lives, to change.
    pub fn guest_mut(&mut self, index: usize) -> Option<&mut Guest> {
        self.idle.clear();
        self.guests.get_mut(index)?.as_mut()
    }

    /// The guests that live.
    pub fn guests(&self) -> impl Iterator<Item = &Guest> {
        self.guests.iter().flatten()
    }

    /// The backend's domain, while it lives.
    #[must_use]
    pub fn backend(&self) -> Option<&BackendDomain> {
        self.backend.as_ref()
    }

    /// The backend's domain, to change.
    pub fn backend_mut(&mut self) -> Option<&mut BackendDomain> {
        self.idle.clear();
        self.backend.as_mut()
    }

    /// What runs at the far end of the wire.
    #[must_use]
    pub fn outside(&self) -> &Host {
        &self.outside
    }

    /// A guest's vif in the backend.
    #[must_use]
    pub fn vif(&self, guest: usize) -> Option<VifStatus> {
        let id = self.guest(guest)?.id();
        self.backend.as_ref()?.backend.vifs().find(|vif| vif.id.domain == id)
    }

    /// What a guest's vif has carried in this connection and all before it.
    #[must_use]
    pub fn meter(&self, guest: usize) -> Option<Meter> {
        let back = self.vif(guest)?.counters;
        let front = self.guest(guest)?.nic.frontend().counters();
        let ends = [back.tx.notifications, back.rx.notifications];
        let ends = ends.into_iter().chain([front.tx.notifications, front.rx.notifications]);
        Some(Meter {
            packets: back.tx.packets + back.rx.packets,
            bytes: [back.tx.bytes + back.rx.bytes, 0, 0, 0, 0],
            hypercalls: back.tx_paths.total().hypercalls + back.rx_paths.total().hypercalls,
            notifications: ends.sum(),
        })
    }

    /// Who dropped what, for a run in which something was lost.
    #[must_use]
    pub fn drops(&self) -> String {
        let mut text = String::new();
        if let Some(domain) = &self.backend {
            for vif in domain.backend.vifs() {
                let (from, to) = (vif.counters.tx_drops, vif.counters.rx_drops);
                text += &format!("{}: from the guest {from:?}, to it {to:?}\n", vif.id);
            }
            text += &format!("switch: {:?}\n", domain.backend.switch_counters());
        }
        for guest in self.guests() {
            text += &format!("guest {}: {:?}\n", guest.id(), guest.nic.frontend().counters());
        }
        text + &format!("network card: {} overruns", self.uplink.overruns)
    }

    /// Takes something away from the backend, under traffic.
    pub fn withdraw(&mut self, lever: Lever) {
        self.set(lever, false);
    }

    /// Gives it back.
    pub fn restore(&mut self, lever: Lever) {
        self.set(lever, true);
    }

    fn set(&mut self, lever: Lever, there: bool) {
        let Some(domain) = &self.backend else { return };
        if let Lever::Bits(bits) = lever {
            let now = self.advertised;
            self.advertised = if there { now | bits.bits() } else { now & !bits.bits() };
            self.sim.set_features(domain.hv.id(), self.advertised);
        }
        self.idle.clear();
    }

    /// Writes nodes as the toolstack.
    pub fn toolstack(&mut self, changes: impl IntoIterator<Item = Change>) {
        self.toolstack.1.commit(changes);
        self.idle.clear();
    }

    /// Who holds what.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.sim.ledger()
    }

    /// Turns so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    fn is_alive(&self, actor: Actor) -> bool {
        match actor {
            Actor::Toolstack | Actor::Outside => true,
            Actor::Backend => self.backend.is_some(),
            Actor::Guest(index) => self.guest(index).is_some(),
        }
    }

    fn actors(&self) -> Vec<Actor> {
        let guests = (0..self.guests.len()).map(Actor::Guest);
        let all = guests.chain([Actor::Toolstack, Actor::Backend, Actor::Outside]);
        all.filter(|actor| self.is_alive(*actor)).collect()
    }

    /// Gives the next domain its turn: in each round all have one, in an order of the seed's. When nobody has anything to do,
    /// the time comes at which somebody has. Answers who it was, and whether anything happened.
    pub fn step(&mut self) -> (Actor, bool) {
        let actor = loop {
            match self.order.pop() {
                Some(actor) if self.is_alive(actor) => break actor,
                Some(_) => {}
                None => {
                    self.order = self.actors();
                    self.random.shuffle(&mut self.order);
                    self.now = if self.is_idle() {
                        let next = self.next_deadline().unwrap_or(self.now);
                        self.idle.clear();
                        next.max(self.now.after(self.config.tick))
                    } else {
                        self.now.after(self.config.tick)
                    };
                }
            }
        };
        (actor, self.act(actor))
    }

    fn act(&mut self, actor: Actor) -> bool {
        self.steps += 1;
        let some = self.turn(actor);
        if some {
            self.idle.clear();
            if !self.pending.is_empty() {
                self.begin_pending();
            }
        } else if !self.idle.contains(&actor) {
            self.idle.push(actor);
        }
        some
    }

    /// Whether nobody has anything to do before its time.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.actors().iter().all(|actor| self.idle.contains(actor))
    }

    fn next_deadline(&mut self) -> Option<Instant> {
        let now = self.now;
        let backend = self.backend.as_ref().map(|domain| domain.backend.deadline(now));
        let outside = self.outside.deadline(now);
        let guests = self.guests.iter_mut().flatten().filter_map(|guest| guest.deadline(now));
        guests.chain(backend).chain(outside).min()
    }

    fn turn(&mut self, actor: Actor) -> bool {
        let now = self.now;
        match actor {
            Actor::Toolstack => self.turn_toolstack(),
            Actor::Backend => self.turn_backend(),
            Actor::Guest(index) => {
                let Some(Some(guest)) = self.guests.get_mut(index) else { return false };
                let before = guest.notices.len();
                let some = guest.turn(&mut self.server, now);
                let new = guest.notices.get(before..).unwrap_or_default();
                if new.contains(&netfront::Notice::Disconnected) {
                    self.renew(Place::Guest(index));
                }
                some
            }
            Actor::Outside => {
                self.uplink.turn(16 + self.random.below(240));
                let mac = self.mac(Place::Outside);
                let nic = &mut self.uplink;
                let some = self.outside.turn(&mut Outside { nic, mac }, now);
                some | self.uplink.is_busy()
            }
        }
    }

    fn turn_toolstack(&mut self) -> bool {
        let (conn, client) = &mut self.toolstack;
        let some = converse(&mut self.server, *conn, client);
        while client.poll_event().is_some() {}
        some
    }

    fn turn_backend(&mut self) -> bool {
        let (now, server) = (self.now, &mut self.server);
        let Some(domain) = &mut self.backend else { return false };
        let BackendDomain { backend, notices, upcalls, client, conn, hv, .. } = domain;
        let mut cut = Vec::new();
        let mut some = converse(server, *conn, client);
        some |= upcalls.scan(64, |port| {
            backend.on_event(port);
        }) > 0;
        while let Some(event) = client.poll_event() {
            backend.on_store(client, &event, now);
            some = true;
        }
        some |= self.uplink.drive(backend, now);
        some |= backend.poll(client, now, |_| {});
        some |= self.uplink.drive(backend, now);
        for notice in backend.take_notices() {
            some = true;
            match &notice {
                Notice::Offered(VifId { domain, .. }) => {
                    let path = format!("{}/hotplug-status", nodes::back(hv.id(), *domain));
                    self.toolstack.1.commit([nodes::write(path, "connected")]);
                }
                Notice::Disconnected(vif) => cut.push(vif.domain),
                _ => {}
            }
            notices.push(notice);
        }
        some |= converse(server, *conn, client);
        for domain in cut {
            if let Some(index) = self.index_of(domain) {
                self.renew(Place::Guest(index));
            }
        }
        some
    }

    /// Gives everybody one turn, in an order of the seed's, at a time of the caller's: for who has a clock of their own. Answers
    /// whether anything happened.
    pub fn round(&mut self, now: Instant) -> bool {
        self.now = self.now.max(now);
        self.order.clear();
        let mut actors = self.actors();
        self.random.shuffle(&mut actors);
        let mut some = false;
        for actor in actors {
            some |= self.act(actor);
        }
        some
    }

    /// Gives turns until `until` says that it is enough, or so many nanoseconds have passed.
    ///
    /// # Errors
    /// [`Stuck`] in the latter case.
    pub fn run_until(
        &mut self,
        nanos: u64,
        mut until: impl FnMut(&Self) -> bool,
    ) -> Result<(), Stuck> {
        let end = self.now.after(nanos);
        while !until(self) {
            if self.now >= end {
                return Err(Stuck);
            }
            self.step();
        }
        Ok(())
    }

    /// Lets time pass.
    pub fn run_for(&mut self, nanos: u64) {
        // Time does pass: the other end of this is `Stuck`.
        let _ = self.run_until(nanos, |_| false);
    }

    /// Whether packets flow between all guests that live and the backend.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        let living = (0..self.guests.len()).filter(|index| self.guest(*index).is_some());
        living.map(Place::Guest).chain([Place::Outside]).all(|place| self.is_up(place))
    }

    fn index_of(&self, domain: DomId) -> Option<usize> {
        let of = |guest: &Option<Guest>| guest.as_ref().is_some_and(|guest| guest.id() == domain);
        self.guests.iter().position(of)
    }

    /// Gives turns until all guests are connected, for up to a minute.
    ///
    /// # Errors
    /// [`Stuck`]
    pub fn connect(&mut self) -> Result<(), Stuck> {
        self.run_until(60 * SECOND, Self::is_connected)
    }

    /// Stops what would go on for ever, and lets what is on its way arrive, for up to a minute. Then says what became of all
    /// that was ever sent.
    pub fn finish(&mut self) -> Tally {
        self.hosts_mut().for_each(Host::stop);
        self.idle.clear();
        let _ = self.run_until(60 * SECOND, |world| {
            world.is_idle() && world.is_done() && world.tally().lost == 0
        });
        self.tally()
    }

    fn is_done(&self) -> bool {
        self.guests().all(|guest| guest.host.is_done()) && self.outside.is_done()
    }

    /// What became of all that was sent; what is still on its way counts as lost.
    #[must_use]
    pub fn tally(&self) -> Tally {
        let mut sum = Tally::default();
        let living: Vec<_> =
            self.guests().map(|guest| &guest.host).chain([&self.outside]).collect();
        let frames = || living.iter().map(|host| (&host.frames, false));
        let frames = || frames().chain(self.graves.iter().map(|frames| (frames, true)));
        for (from, dead) in frames() {
            for (to, other_dead) in frames() {
                let mut tally = from.settle_with(to);
                if dead || other_dead {
                    tally.excused += std::mem::take(&mut tally.lost);
                }
                sum += tally;
            }
            sum.corrupt += from.counts().corrupt;
        }
        for from in &living {
            for to in &living {
                if let (Some(from), Some(to)) = (&from.tcp, &to.tcp) {
                    sum += from.settle_with(to);
                }
            }
        }
        sum
    }
}

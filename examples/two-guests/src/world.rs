//! The machine: who is in it, whose turn it is, and what time it is.

use evtchn::Upcalls;
use grant::Mapper;
use hypercall::{DomId, Instant};
use netback::datapath::Datapaths;
use netback::{Backend, Notice, VifId, VifStatus};
use sim::{DomainConfig, Ledger, Sim, SimHv};
use xenbus::client::{Change, Client};
use xenbus::server::{ConnId, Quotas, Server};

use crate::frames::{Flow, Frames, StationId};
use crate::guest::{Guest, GuestConfig, converse};
use crate::host::Host;
use crate::nodes;
use crate::random::Random;
use crate::uplink::{Outside, Uplink};

mod account;
mod config;
mod life;

pub use config::{Board, Config};

/// A second, in nanoseconds.
pub const SECOND: u64 = 1_000_000_000;

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
    /// The backend's network card, which is lost with its domain.
    uplink: Uplink,
    flows: Vec<(Place, Place, Flow)>,
    /// Those that begin when both ends are there.
    pending: Vec<(Place, Place, Flow)>,
    stations: u32,
    streams: u16,
    /// Of lives and connections that are over: what was in flight then may be gone.
    graves: Vec<Frames>,
    /// What Xen advertises to the backend's domain.
    advertised: u32,
    /// What the operator has withdrawn.
    withdrawn: Datapaths,
    random: Random,
    /// Who still has a turn in this round, the next one last.
    order: Vec<Actor>,
    /// Turns in a row in which nothing happened, by distinct actors.
    idle: Vec<Actor>,
    /// Who gets no turn until further notice.
    frozen: Vec<Actor>,
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
        let uplink = Uplink::new(&sim, dom0.clone(), &config);
        let mut server = Server::new(Quotas::default());
        let toolstack = (server.connect(DomId(0), true), Client::new());
        let mut random = Random::new(config.seed);
        let outside = Host::new(Frames::new(StationId(0), random.draw()));
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
            uplink,
            flows: Vec::new(),
            pending: Vec::new(),
            stations: 1,
            streams: 0,
            graves: Vec::new(),
            advertised: config.domain.features,
            withdrawn: Datapaths::empty(),
            random,
            order: Vec::new(),
            idle: Vec::new(),
            frozen: Vec::new(),
            steps: 0,
        };
        world.start_backend();
        world
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

    /// The backend's network card.
    #[must_use]
    pub fn uplink(&self) -> &Uplink {
        &self.uplink
    }

    /// The backend's network card, to change.
    pub fn uplink_mut(&mut self) -> &mut Uplink {
        &mut self.uplink
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

    /// Somebody gets no turn any more, be it that it hangs or that it is about to die, until [`thaw`](Self::thaw).
    pub fn freeze(&mut self, actor: Actor) {
        self.frozen.push(actor);
    }

    /// Somebody gets turns again, or whoever comes in its place.
    pub fn thaw(&mut self, actor: Actor) {
        self.frozen.retain(|frozen| *frozen != actor);
        self.idle.clear();
    }

    /// Somebody's connection to the store breaks, with all that was on its way, and is made anew.
    pub fn lose_store(&mut self, actor: Actor) {
        let guest = match actor {
            Actor::Guest(index) => self.guests.get_mut(index).and_then(Option::as_mut),
            _ => None,
        };
        let backend = self.backend.as_mut().filter(|_| actor == Actor::Backend);
        let of = guest.map(|guest| guest.store());
        let of = of.or(backend.map(|domain| (domain.conn, &mut domain.client)));
        if let Some((conn, client)) = of {
            self.server.reset(conn);
            client.reconnect();
        }
        self.idle.clear();
    }

    fn is_alive(&self, actor: Actor) -> bool {
        if self.frozen.contains(&actor) {
            return false;
        }
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
        if !self.pending.is_empty() {
            self.begin_pending();
        }
        if some {
            self.idle.clear();
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
        let frozen = &self.frozen;
        let backend = self.backend.as_ref().filter(|_| !frozen.contains(&Actor::Backend));
        let uplink = backend.and_then(|_| self.uplink.deadline());
        let backend = backend.map(|domain| domain.backend.deadline(now));
        let outside = self.outside.deadline(now);
        let guests = (0..).zip(&mut self.guests);
        let guests = guests.filter(|(index, _)| !frozen.contains(&Actor::Guest(*index)));
        let guests = guests.filter_map(|(_, guest)| guest.as_mut()?.deadline(now));
        guests.chain(backend).chain(outside).chain(uplink).min()
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
                self.uplink.receive();
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
        // The domain has no stack of its own: what was for everybody ends here.
        while backend.receive_local().is_some() {}
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
}

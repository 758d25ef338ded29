//! The life of an interface: the handshake over the store, and the queues while it is connected.
//!
//! Driven by the store alone: every change of a node it looks at ends in a look at all of them, so that a storm of
//! changes costs one look, and what to do follows from the states as they are and not from the order of events.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use evtchn::Binder;
use grant::GrantTable;
use hypercall::{DomId, Handle, Hypervisor, Instant, Port};
use netif::keys::{self, Features};
use netif::mac::MacAddr;
use xenbus::client::{Change, Client, Error, Event, JobId, Outcome, WatchId};
use xenbus::device::frontend::{on_backend, on_fault, restart};
use xenbus::device::{Action, State, parse_u32};

use crate::Meta;
use crate::counters::Counters;
use crate::fault::{BackendFault, Refusal, SendError};
use crate::flow::Steering;
use crate::negotiate::{self, MAX_QUEUES};
use crate::queue::{Maker, Queue};

/// Nanoseconds until a connection that ended is tried again; doubled with each that ends in a fault.
const FIRST_DELAY: u64 = 100_000_000;
/// Doublings of [`FIRST_DELAY`] at most: about half a minute.
const MAX_DOUBLINGS: u32 = 8;
/// Pages that backends may have kept when connections ended (4 MiB): beyond it there are no further connections.
const MAX_PARKED: usize = 1024;

/// How a frontend is set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Which interface of this domain.
    pub handle: Handle,
    /// Queues at most, 1 to [`MAX_QUEUES`]; the backend may offer fewer.
    pub queues: u16,
    /// What packets may come in: of several pages, to be segmented, with blank checksums.
    pub features: Features,
    /// An event channel for each ring, where the backend offers it.
    pub split: bool,
    /// Pages of 4 KiB with the backend per queue, 1 to 256: packets of 64 KiB need 17.
    pub posted: u16,
}

impl Config {
    /// One queue with everything there is, and a full ring of pages.
    #[must_use]
    pub const fn new(handle: Handle) -> Self {
        let features = Features::SG
            .union(Features::GSO_TCPV4)
            .union(Features::GSO_TCPV6)
            .union(Features::IPV4_CSUM)
            .union(Features::IPV6_CSUM);
        Self { handle, queues: 1, features, split: true, posted: 256 }
    }
}

/// What a frontend can take at all.
const KNOWN: Features = Config::new(Handle(0)).features;

/// The nodes of our own directory that each look reads first.
const OWN_KEYS: [&str; 5] = ["state", "backend", "backend-id", keys::MAC, keys::MTU];

/// Something that the owner of an interface may want to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Notice {
    /// Packets can flow.
    Connected {
        /// With how many queues.
        queues: usize,
        /// What packets may go out.
        features: Features,
    },
    /// Packets no longer flow. What was in flight may have arrived or not.
    Disconnected,
    /// The backend broke the protocol, and is left.
    Faulted(BackendFault),
    /// There can be no connection now.
    Refused(Refusal),
    /// The interface was taken away.
    Removed,
}

/// The job that is waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Idle,
    Look(JobId),
    Read(JobId),
    Publish(JobId),
    Write(JobId),
}

/// One network interface of this domain.
pub struct Frontend<H: Hypervisor> {
    config: Config,
    table: GrantTable<H>,
    binder: Binder<H>,
    dir: String,
    own_watch: WatchId,
    watch: Option<WatchId>,
    /// The backend's directory and domain, once known.
    backend: Option<(String, DomId)>,
    mac: Option<MacAddr>,
    mtu: Option<u16>,
    /// What we last wrote; `None` before the first look.
    own: Option<State>,
    step: Step,
    /// Something changed since the last look began.
    dirty: bool,
    /// The last look found that we may not read the backend's directory: it is gone, with the right to know so.
    hidden: bool,
    /// Whether a connection is wanted.
    wanted: bool,
    steering: Steering,
    queues: Vec<Queue<H>>,
    /// Of a connection that has ended, until the backend has let go of them.
    retired: Vec<Queue<H>>,
    offered: Features,
    established: bool,
    /// Found while there was no client at hand.
    fault: Option<BackendFault>,
    /// Connections that did not come about or ended in a fault, in a row.
    failures: u32,
    not_before: Option<Instant>,
    ended: Counters,
    notices: Vec<Notice>,
    gone: bool,
}

impl<H: Hypervisor> Frontend<H> {
    /// The interface that `config` names; it connects when its backend is ready.
    #[must_use]
    pub fn new(
        table: GrantTable<H>,
        binder: Binder<H>,
        client: &mut Client,
        config: Config,
    ) -> Self {
        let dir = format!("device/vif/{}", config.handle);
        let config = Config {
            queues: config.queues.clamp(1, MAX_QUEUES),
            features: config.features & KNOWN,
            posted: config.posted.clamp(1, 256),
            ..config
        };
        Self {
            config,
            table,
            binder,
            own_watch: client.watch(dir.clone()),
            dir,
            watch: None,
            backend: None,
            mac: None,
            mtu: None,
            own: None,
            step: Step::Idle,
            dirty: true,
            hidden: false,
            wanted: true,
            steering: Steering::new(),
            queues: Vec::new(),
            retired: Vec::new(),
            offered: Features::empty(),
            established: false,
            fault: None,
            failures: 0,
            not_before: None,
            ended: Counters::default(),
            notices: Vec::new(),
            gone: false,
        }
    }

    /// Takes an event of the store client, if it is for this interface; says whether it was.
    pub fn on_store(&mut self, client: &mut Client, event: &Event, now: Instant) -> bool {
        match event {
            Event::Watch { watch, .. }
                if *watch == self.own_watch || Some(*watch) == self.watch =>
            {
                self.changed(client);
                true
            }
            Event::Done { job, result } => self.done(client, *job, result, now),
            Event::Watch { .. } => false,
            Event::WatchFailed { watch, error } => {
                let own = *watch == self.own_watch || Some(*watch) == self.watch;
                if own {
                    log::error!("{}: cannot watch: {error}", self.dir);
                }
                own
            }
        }
    }

    fn changed(&mut self, client: &mut Client) {
        self.dirty = true;
        self.look(client);
    }

    fn look(&mut self, client: &mut Client) {
        if self.step != Step::Idle || !self.dirty || self.gone {
            return;
        }
        self.dirty = false;
        let hidden = core::mem::take(&mut self.hidden);
        let mut paths: Vec<_> = OWN_KEYS.iter().map(|key| format!("{}/{key}", self.dir)).collect();
        if let Some((backend, _)) = self.backend.as_ref().filter(|_| !hidden) {
            paths.extend(["state", "online"].iter().map(|key| format!("{backend}/{key}")));
        }
        self.step = Step::Look(client.read_many(paths));
    }

    fn done(
        &mut self,
        client: &mut Client,
        job: JobId,
        result: &Result<Outcome, Error>,
        now: Instant,
    ) -> bool {
        match self.step {
            Step::Look(mine) | Step::Read(mine) | Step::Publish(mine) | Step::Write(mine)
                if mine == job => {}
            _ => return false,
        }
        match (core::mem::replace(&mut self.step, Step::Idle), result) {
            (Step::Look(_), Ok(Outcome::Values(values))) => self.looked(client, values, now),
            (Step::Read(_), Ok(Outcome::Values(values))) => {
                if let Err(refusal) = self.publish(client, values, now) {
                    self.refused(client, refusal, now);
                }
            }
            (Step::Publish(_), Ok(_)) => self.write_states(client, &[State::Connected]),
            (Step::Write(_), Ok(_)) => {}
            (Step::Look(_), Err(Error::Store { at, .. })) if *at >= OWN_KEYS.len() => {
                (self.hidden, self.dirty) = (true, true);
            }
            // Our own directory: not there yet, or taken away.
            (Step::Look(_), Err(Error::Store { .. })) => {
                if self.own.is_some() {
                    self.remove(client);
                }
            }
            // The store is gone, the backend is not: packets go on. Look again when the store is back.
            (_, Err(Error::Disconnected)) => {
                self.dirty = true;
                return true;
            }
            (_, result) => {
                log::error!("{}: store job failed: {result:?}", self.dir);
                self.penalise(now);
                self.end(client, on_fault(self.own.unwrap_or(State::Unknown)), now);
            }
        }
        self.look(client);
        true
    }

    fn looked(&mut self, client: &mut Client, values: &[Option<Vec<u8>>], now: Instant) {
        let value = |index: usize| values.get(index).and_then(Option::as_deref);
        let text = |index: usize| value(index).and_then(|text| core::str::from_utf8(text).ok());
        let backend = text(1).zip(value(2).and_then(parse_u32).and_then(|id| id.try_into().ok()));
        self.mac = text(3).and_then(|mac| mac.parse().ok());
        self.mtu = value(4).and_then(parse_u32).and_then(|mtu| mtu.try_into().ok());
        let Some((path, id)) = backend else {
            // Not set up yet, or taken away.
            if self.own.is_some() && value(0).is_none() {
                self.remove(client);
            }
            return;
        };
        let backend = (String::from(path), DomId(id));
        if self.backend.as_ref() != Some(&backend) {
            self.meet(client, backend, State::parse(value(0)));
            return;
        }
        if value(0).is_none() {
            self.remove(client);
            return;
        }
        let own = self.own.unwrap_or(State::Unknown);
        let peer = State::parse(value(5));
        if peer != State::Connected && peer != State::Reconfigured {
            self.established = false;
        }
        if !matches!(peer, State::Connected | State::Reconfigured | State::Reconfiguring) {
            self.retired.clear();
        }
        let mut action = on_backend(own, peer);
        if own == State::Closed {
            let online = value(6).and_then(parse_u32) == Some(1);
            let ready = self.not_before.is_none_or(|at| at <= now);
            action = match action {
                _ if !self.wanted || !ready => Action::None,
                Action::None if peer == State::Closed && online => restart(own),
                action => action,
            };
        }
        self.end(client, action, now);
    }

    /// The backend is another than was thought, or the first.
    fn meet(&mut self, client: &mut Client, backend: (String, DomId), stored: State) {
        if let Some(watch) = self.watch.take() {
            client.unwatch(watch);
        }
        // Nothing of what the other was lent is its own any more; a page it still uses is parked.
        self.disconnect();
        self.retired.clear();
        self.watch = Some(client.watch(format!("{}/state", backend.0)));
        self.backend = Some(backend);
        if self.own.is_none() && stored == State::Initialising {
            self.own = Some(State::Initialising);
        } else {
            // What an earlier life of this domain left, or a change of backend: start at the start.
            self.write_states(client, &[State::Closed, State::Initialising]);
        }
        self.changed(client);
    }

    fn end(&mut self, client: &mut Client, action: Action, now: Instant) {
        match action {
            Action::None | Action::Reconfigure => {}
            Action::Switch(states) => {
                if self.not_before.is_none() && states == [State::Closed] {
                    self.not_before = Some(now.after(FIRST_DELAY));
                }
                self.write_states(client, states);
            }
            Action::Connect => {
                if let Some((backend, _)) = &self.backend {
                    let keys = negotiate::backend_keys().map(|key| format!("{backend}/{key}"));
                    self.step = Step::Read(client.read_many(keys));
                }
            }
            Action::Established => {
                if !self.established && !self.queues.is_empty() {
                    self.established = true;
                    self.failures = 0;
                    let (queues, features) = (self.queues.len(), self.offered);
                    self.notices.push(Notice::Connected { queues, features });
                }
            }
            Action::Disconnect { then } | Action::Fault { then } => {
                self.disconnect();
                if then.contains(&State::Closed) {
                    // The backend has let go already: it says so by its state.
                    self.retired.clear();
                }
                self.not_before.get_or_insert(now.after(FIRST_DELAY));
                self.write_states(client, then);
            }
            Action::Remove { .. } => self.remove(client),
        }
    }

    /// Makes the queues and tells the backend of them.
    fn publish(
        &mut self,
        client: &mut Client,
        values: &[Option<Vec<u8>>],
        now: Instant,
    ) -> Result<(), Refusal> {
        let offer = negotiate::parse(values)?;
        let Some((_, backend)) = self.backend else { return Ok(()) };
        if self.table.parked() > MAX_PARKED {
            return Err(Refusal::Parked(self.table.parked()));
        }
        let maker = Maker {
            table: &self.table,
            binder: &self.binder,
            backend,
            offered: offer.features,
            posted: self.config.posted,
            now,
        };
        let split = self.config.split && offer.features.contains(Features::SPLIT);
        let count = self.config.queues.min(offer.queues);
        self.queues = (0..count).map(|_| maker.make(split)).collect::<Result<_, _>>()?;
        self.offered = offer.features;
        let nodes: Vec<_> = self.queues.iter().map(Queue::nodes).collect();
        let changes = negotiate::describe(&self.dir, self.config.features, &nodes);
        self.step = Step::Publish(client.commit(changes));
        Ok(())
    }

    fn refused(&mut self, client: &mut Client, refusal: Refusal, now: Instant) {
        self.notices.push(Notice::Refused(refusal));
        self.penalise(now);
        self.report(client, &format!("{refusal}"));
        self.end(client, on_fault(self.own.unwrap_or(State::Unknown)), now);
    }

    fn penalise(&mut self, now: Instant) {
        self.not_before = Some(now.after(FIRST_DELAY << self.failures.min(MAX_DOUBLINGS)));
        self.failures = self.failures.saturating_add(1);
    }

    fn report(&self, client: &mut Client, error: &str) {
        log::error!("{}: {error}", self.dir);
        client.commit([Change::Write {
            path: format!("error/{}/error", self.dir),
            value: error.as_bytes().to_vec(),
        }]);
    }

    /// Stops using the queues; their pages are kept until the backend has let go.
    fn disconnect(&mut self) {
        if self.queues.is_empty() {
            return;
        }
        let mut sum = self.counters();
        sum.tx.lost += self.queues.iter().map(Queue::in_flight).sum::<u64>();
        self.ended = sum;
        self.retired = core::mem::take(&mut self.queues);
        self.established = false;
        self.offered = Features::empty();
        self.notices.push(Notice::Disconnected);
    }

    fn remove(&mut self, client: &mut Client) {
        if self.gone {
            return;
        }
        self.gone = true;
        self.disconnect();
        self.retired.clear();
        client.unwatch(self.own_watch);
        if let Some(watch) = self.watch.take() {
            client.unwatch(watch);
        }
        self.notices.push(Notice::Removed);
    }

    fn write_states(&mut self, client: &mut Client, states: &[State]) {
        // One commit each: the backend may wait for any of them.
        for &state in states {
            self.own = Some(state);
            self.step = Step::Write(client.commit([Change::Update {
                path: format!("{}/state", self.dir),
                value: state.text().into(),
            }]));
        }
    }

    /// Ends the connection, and stays so until [`open`](Self::open).
    pub fn close(&mut self, client: &mut Client, now: Instant) {
        self.wanted = false;
        if let Some(own) = self.own {
            self.end(client, on_fault(own), now);
        }
    }

    /// Wants a connection again.
    pub fn open(&mut self, client: &mut Client) {
        self.wanted = true;
        self.not_before = None;
        self.changed(client);
    }

    /// An event came on `port`; says whether the port is one of this interface's.
    pub fn on_event(&mut self, port: Port) -> bool {
        self.queues.iter_mut().chain(&mut self.retired).any(|queue| queue.on_event(port))
    }

    /// Takes responses, posts pages again, shows the backend what was sent, and ends events. To be called after events,
    /// and after packets were sent or received. Answers whether there is more to do at once: packets wait to be received,
    /// or there is room again for a sender that was told [`SendError::Full`].
    pub fn poll(&mut self, client: &mut Client, now: Instant) -> bool {
        if self.not_before.is_some_and(|at| at <= now) {
            self.not_before = None;
            self.changed(client);
        }
        let mut more = false;
        for queue in &mut self.queues {
            match queue.poll(now) {
                Ok(waiting) => more |= waiting,
                Err(fault) => self.fault = self.fault.or(Some(fault)),
            }
        }
        if let Some(fault) = self.fault.take() {
            self.notices.push(Notice::Faulted(fault));
            self.penalise(now);
            self.report(client, &format!("{fault}"));
            self.end(client, on_fault(self.own.unwrap_or(State::Unknown)), now);
            return false;
        }
        more
    }

    /// When [`poll`](Self::poll) is to be called though no event comes.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.queues.iter().filter_map(Queue::deadline).chain(self.not_before).min()
    }

    /// Puts an Ethernet frame of up to 65,535 bytes, without trailer, on a queue. The backend sees it after the next
    /// [`poll`](Self::poll). Packets of one flow belong on one queue, or their order is lost.
    ///
    /// # Errors
    /// As [`SendError`] says; nothing of the packet is sent then.
    pub fn send(&mut self, queue: usize, frame: &[u8], meta: Meta) -> Result<(), SendError> {
        if !self.established {
            return Err(SendError::NotConnected);
        }
        self.queues.get_mut(queue).ok_or(SendError::NoQueue)?.send(frame, meta)
    }

    /// The next packet of a queue, into `frame`, which is emptied first.
    pub fn receive(&mut self, queue: usize, frame: &mut Vec<u8>) -> Option<Meta> {
        if self.fault.is_some() {
            return None;
        }
        match self.queues.get_mut(queue)?.receive(frame) {
            Ok(meta) => meta,
            Err(fault) => {
                self.fault = Some(fault);
                None
            }
        }
    }

    /// The queue that a frame belongs on: always the same for the packets of one flow, so that their order is kept.
    #[must_use]
    pub fn queue_for(&self, frame: &[u8]) -> usize {
        self.steering.queue(frame, self.queues.len())
    }

    /// Whether `packets` of the largest kind would find room on each queue. If not, somebody waits for it from now on.
    #[cfg(feature = "smoltcp")]
    pub(crate) fn has_room(&mut self, packets: usize) -> bool {
        let mut room = self.established;
        for queue in &mut self.queues {
            // All are asked: each is to say when it has room again.
            room &= queue.has_room(packets);
        }
        room
    }

    /// Counts a packet whose checksum was wrong.
    #[cfg(feature = "smoltcp")]
    pub(crate) fn count_bad_checksum(&mut self) {
        self.ended.rx.checksum += 1;
    }

    /// What has happened since the last call.
    pub fn take_notices(&mut self) -> impl Iterator<Item = Notice> {
        core::mem::take(&mut self.notices).into_iter()
    }

    /// The state we last wrote; unknown before the toolstack has set the interface up, and after it was taken away.
    #[must_use]
    pub fn state(&self) -> State {
        if self.gone { State::Unknown } else { self.own.unwrap_or(State::Unknown) }
    }

    /// Whether packets can flow.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.established
    }

    /// Queues there are while connected.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// What packets may go out, while connected.
    #[must_use]
    pub fn features(&self) -> Features {
        self.offered
    }

    /// The address that the toolstack gave this interface.
    #[must_use]
    pub fn mac(&self) -> Option<MacAddr> {
        self.mac
    }

    /// Bytes of payload per packet, if the toolstack says.
    #[must_use]
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// What this interface has done, over all its connections.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = self.ended;
        for queue in &self.queues {
            sum += queue.counters();
        }
        sum
    }
}

impl<H: Hypervisor> fmt::Debug for Frontend<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frontend({}, {:?}, {} queues)", self.dir, self.state(), self.queues.len())
    }
}

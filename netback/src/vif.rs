//! The life of one vif: from the toolstack's nodes through the handshake to packets, and back.
//!
//! Driven by the store alone: every change of a node it looks at ends in a look at all of them, so that a storm of
//! changes costs one look, and what to do follows from the states as they are and not from the order of events.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use evtchn::Binder;
use features::XenFeatures;
use grant::{MapOps, Mapper};
use hypercall::{Hypervisor, Instant, PageOffset};
use netif::keys::{self, Features};
use netif::mac::MacAddr;
use xenbus::client::{Change, Client, Error, JobId, Outcome, WatchId};
use xenbus::device::backend::{on_fault, on_frontend};
use xenbus::device::{Action, State, parse_u32};

use crate::counters::Counters;
use crate::ctrl::Control;
use crate::fault::{Refusal, VifFault};
use crate::lent::Origin;
use crate::multicast::Filter;
use crate::negotiate;
pub use crate::notice::{Notice, VifId};
use crate::queue::{Connector, Queue};
use crate::rate::RateLimit;
use crate::switch::PortId;

/// Nanoseconds that a frontend which broke the protocol waits before it may connect again; doubled each time.
const FIRST_PENALTY: u64 = 100_000_000;
/// Doublings of [`FIRST_PENALTY`] at most: about half a minute.
const MAX_DOUBLINGS: u32 = 8;
/// Nanoseconds that pages which were lent out are waited for after a disconnect, before they are parked.
const DRAIN_CAP: u64 = 10_000_000_000;

/// The job that the vif waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Idle,
    Probe(JobId),
    Offer(JobId),
    Look(JobId),
    Read(JobId),
    Reconfigure(JobId),
    Write(JobId),
    /// For no job: what was connected is not all let go of yet. What changes meanwhile is looked at after.
    Drain,
}

/// What was connected and is on its way out. The queues carry no more packets, but pages of the guest's may still be in
/// somebody's hands (a card's, or another queue's), and until they are back nothing is unmapped and the guest, which
/// takes its pages back once it reads `Closing`, is told nothing.
struct Draining<H: Hypervisor> {
    queues: Vec<Queue<H>>,
    control: Option<Control<H>>,
    /// When it is given up: what is still out then is parked.
    until: Instant,
    /// What follows.
    after: After,
}

/// What follows once nothing is connected any more.
#[derive(Default)]
struct After {
    /// States to write, in order.
    states: &'static [State],
    /// For the error node.
    error: Option<String>,
    /// Whether the vif ends.
    remove: bool,
}

impl After {
    const fn states(states: &'static [State]) -> Self {
        Self { states, error: None, remove: false }
    }
}

pub(crate) struct Vif<H: Hypervisor> {
    pub(crate) id: VifId,
    /// Its port of the switch.
    port: PortId,
    /// Which connection this is.
    pub(crate) life: u32,
    /// Packets of this connection whose pages are mapped.
    pub(crate) lent: usize,
    /// Why it cannot go on, until that is seen to.
    pub(crate) found: Option<VifFault>,
    /// The control ring, of a frontend that has one.
    pub(crate) control: Option<Control<H>>,
    /// Which multicast the frontend wants.
    pub(crate) filter: Filter,
    /// What `carrier` says, or would if it were there.
    carrier: bool,
    dir: String,
    frontend: String,
    watch: Option<WatchId>,
    own: State,
    step: Step,
    /// Something changed since the last look began.
    dirty: bool,
    /// The store may have missed what we wrote.
    unsure: bool,
    pub(crate) mac: Option<MacAddr>,
    rate: RateLimit,
    max_queues: u16,
    pub(crate) queues: Vec<Queue<H>>,
    draining: Option<Draining<H>>,
    /// It was cut off from its queues, and others may not know yet.
    pub(crate) cut: bool,
    pub(crate) features: Features,
    /// Of connections that have ended, and of packets that reached none of its queues.
    pub(crate) ended: Counters,
    faults: u32,
    not_before: Option<Instant>,
    pub(crate) gone: bool,
}

/// What a vif needs of the backend around it while it handles an event.
pub(crate) struct Around<'a, H: Hypervisor> {
    pub(crate) client: &'a mut Client,
    pub(crate) mapper: &'a Mapper<H>,
    pub(crate) binder: &'a Binder<H>,
    pub(crate) notices: &'a mut Vec<Notice>,
    pub(crate) features: &'a features::Features,
    pub(crate) hv: &'a H,
    /// Whether there is an operation to copy.
    pub(crate) grant_copy: bool,
    pub(crate) now: Instant,
}

/// The nodes of our own directory that [`Vif::probed`] reads.
const PROBE: [&str; 5] = ["state", "frontend", "frontend-id", keys::MAC, keys::RATE];

impl<H: Hypervisor> Vif<H> {
    /// A vif whose directory `dir` has just been seen.
    pub(crate) fn new(
        id: VifId,
        port: PortId,
        life: u32,
        dir: String,
        max_queues: u16,
        client: &mut Client,
    ) -> Self {
        let probe = client.read_many(PROBE.map(|key| format!("{dir}/{key}")));
        Self {
            id,
            port,
            life,
            lent: 0,
            found: None,
            control: None,
            filter: Filter::default(),
            carrier: true,
            dir,
            frontend: String::new(),
            watch: None,
            own: State::Initialising,
            step: Step::Probe(probe),
            dirty: false,
            unsure: false,
            mac: None,
            rate: RateLimit::UNLIMITED,
            max_queues,
            queues: Vec::new(),
            draining: None,
            features: Features::empty(),
            ended: Counters::default(),
            faults: 0,
            not_before: None,
            cut: false,
            gone: false,
        }
    }

    pub(crate) fn state(&self) -> State {
        self.own
    }

    pub(crate) fn watch(&self) -> Option<WatchId> {
        self.watch
    }

    pub(crate) fn counters(&self) -> Counters {
        let mut sum = self.ended;
        let draining = self.draining.iter().flat_map(|draining| &draining.queues);
        for queue in self.queues.iter().chain(draining) {
            sum += queue.counters();
        }
        sum
    }

    /// A node of ours or the frontend's state may have changed.
    pub(crate) fn changed(&mut self, client: &mut Client) {
        self.dirty = true;
        self.look(client);
    }

    fn look(&mut self, client: &mut Client) {
        if self.step != Step::Idle || !self.dirty {
            return;
        }
        self.dirty = false;
        if self.watch.is_none() {
            // The store went before it was known that the offer is made.
            self.step = if self.frontend.is_empty() {
                Step::Probe(client.read_many(PROBE.map(|key| format!("{}/{key}", self.dir))))
            } else {
                self.offer(client)
            };
            return;
        }
        let (dir, frontend) = (&self.dir, &self.frontend);
        self.step = Step::Look(client.read_many([
            format!("{frontend}/state"),
            format!("{dir}/state"),
            format!("{dir}/online"),
            format!("{dir}/hotplug-status"),
            format!("{dir}/{}", keys::RATE),
            format!("{frontend}/{}", keys::REQUEST_MULTICAST_CONTROL),
        ]));
    }

    /// When the vif wants [`wake_if_due`](Self::wake_if_due), or [`settle`](Self::settle).
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let drained = self.draining.as_ref().map(|draining| draining.until);
        self.not_before.into_iter().chain(drained).min()
    }

    /// Looks again if a frontend that had to wait may now connect.
    pub(crate) fn wake_if_due(&mut self, client: &mut Client, now: Instant) {
        if self.not_before.is_some_and(|at| at <= now) {
            self.not_before = None;
            self.changed(client);
        }
    }

    /// Takes the end of a job, if it is this vif's.
    pub(crate) fn done(
        &mut self,
        job: JobId,
        result: &Result<Outcome, Error>,
        around: &mut Around<'_, H>,
    ) -> bool {
        match self.step {
            Step::Probe(mine)
            | Step::Offer(mine)
            | Step::Look(mine)
            | Step::Read(mine)
            | Step::Reconfigure(mine)
            | Step::Write(mine)
                if mine == job => {}
            _ => return false,
        }
        let step = core::mem::replace(&mut self.step, Step::Idle);
        match (step, result) {
            (Step::Probe(_), Ok(Outcome::Values(values))) => self.probed(values, around),
            (Step::Offer(_), Ok(_)) => self.offered(around),
            (Step::Look(_), Ok(Outcome::Values(values))) => self.looked(values, around),
            (Step::Read(_), Ok(Outcome::Values(values))) => self.asked(values, around),
            (Step::Reconfigure(_), Ok(Outcome::Values(values))) => {
                let value = values.first().and_then(Option::as_deref);
                self.set_headroom(negotiate::headroom(value));
                self.write_states(&[State::Reconfigured], None, around);
            }
            (Step::Write(_), Ok(_)) | (Step::Idle, _) => {}
            (_, Err(Error::Disconnected)) => {
                // The store is gone, the guest is not: packets go on. Look again when the store is back.
                (self.dirty, self.unsure) = (true, true);
                return true;
            }
            (Step::Probe(_) | Step::Offer(_), result) => {
                log::error!("{}: cannot set up: {result:?}", self.id);
                self.remove(around);
            }
            (_, result) => {
                log::error!("{}: store job failed: {result:?}", self.id);
                self.fault(None, around);
            }
        }
        self.look(around.client);
        true
    }

    fn probed(&mut self, values: &[Option<Vec<u8>>], around: &mut Around<'_, H>) {
        let value = |index: usize| values.get(index).and_then(Option::as_deref);
        let frontend = value(1).and_then(|path| core::str::from_utf8(path).ok());
        let domain = value(2).and_then(parse_u32);
        let (Some(frontend), State::Initialising) = (frontend, State::parse(value(0))) else {
            // Not set up yet, or left over: only a fresh device is taken on.
            self.forget(around);
            return;
        };
        if domain != Some(self.id.domain.0.into()) {
            log::error!("{}: frontend-id is not that of the directory", self.id);
            self.forget(around);
            return;
        }
        self.frontend = frontend.to_string();
        self.mac = value(3).and_then(|mac| core::str::from_utf8(mac).ok()?.parse().ok());
        self.set_rate(value(4));
        self.step = self.offer(around.client);
    }

    fn offer(&self, client: &mut Client) -> Step {
        let mut changes = negotiate::offer(&self.dir, self.max_queues);
        changes.push(self.state_change(State::InitWait));
        Step::Offer(client.commit(changes))
    }

    fn offered(&mut self, around: &mut Around<'_, H>) {
        self.own = State::InitWait;
        // All of the directory: besides `state`, some keys count at any time.
        self.watch = Some(around.client.watch(self.frontend.clone()));
        around.notices.push(Notice::Offered(self.id));
    }

    fn looked(&mut self, values: &[Option<Vec<u8>>], around: &mut Around<'_, H>) {
        let value = |index: usize| values.get(index).and_then(Option::as_deref);
        if value(1).is_none() {
            // Our own directory was taken away.
            self.own = State::Unknown;
        }
        let missed = core::mem::take(&mut self.unsure) && self.own != State::parse(value(1));
        if missed && value(1).is_some() {
            self.dirty = true;
            self.write_states(&[self.own], None, around);
            return;
        }
        self.set_rate(value(4));
        if !self.queues.is_empty() {
            self.filter.requested = negotiate::multicast_control(value(5));
            self.features.set(Features::MULTICAST_CONTROL, self.filter.requested);
        }
        let peer = State::parse(value(0));
        let online = value(2).and_then(parse_u32) == Some(1);
        let hotplug = value(3) == Some(b"connected".as_slice());
        let action = on_frontend(self.own, peer, online, hotplug);
        if matches!(action, Action::Switch(states) if states.contains(&State::InitWait))
            && self.not_before.is_some_and(|at| at > around.now)
        {
            return;
        }
        self.act(action, around);
    }

    fn act(&mut self, action: Action, around: &mut Around<'_, H>) {
        match action {
            Action::None | Action::Established => {}
            Action::Switch(states) => self.write_states(states, None, around),
            Action::Connect => {
                let names = negotiate::frontend_keys(self.max_queues);
                let frontend = &self.frontend;
                let paths = names.iter().map(|name| format!("{frontend}/{name}"));
                self.step = Step::Read(around.client.read_many(paths));
            }
            Action::Reconfigure => {
                let headroom = format!("{}/{}", self.frontend, keys::XDP_HEADROOM);
                self.step = Step::Reconfigure(around.client.read_many([headroom]));
            }
            Action::Disconnect { then } => self.disconnect(After::states(then), around),
            Action::Fault { then } => {
                let error = Some("frontend is in a state it has no business in".into());
                self.disconnect(After { error, ..After::states(then) }, around);
            }
            Action::Remove { then } => {
                self.disconnect(After { remove: true, ..After::states(then) }, around);
            }
        }
    }

    fn asked(&mut self, values: &[Option<Vec<u8>>], around: &mut Around<'_, H>) {
        let names = negotiate::frontend_keys(self.max_queues);
        let given: BTreeMap<String, Vec<u8>> = names
            .into_iter()
            .zip(values)
            .filter_map(|(name, value)| Some((name, value.clone()?)))
            .collect();
        match self.connect(&given, around) {
            Ok(()) => {
                self.faults = 0;
                around.notices.push(Notice::Connected {
                    vif: self.id,
                    queues: self.queues.len(),
                    features: self.features,
                });
                self.set_carrier(true, around.client);
                self.write_states(&[State::Connected], None, around);
            }
            Err(refusal) => {
                let text = refusal.to_string();
                around.notices.push(Notice::Refused(self.id, refusal));
                self.penalise(around.now);
                if let Action::Fault { then } = on_fault(self.own) {
                    self.write_states(then, Some(&text), around);
                }
            }
        }
    }

    fn connect(
        &mut self,
        given: &BTreeMap<String, Vec<u8>>,
        around: &Around<'_, H>,
    ) -> Result<(), Refusal> {
        let request = negotiate::parse(given, self.max_queues)?;
        // Xen tells nobody when what it offers changes. If it does not answer, what it said last holds.
        if let Err(error) = around.features.refresh(around.hv) {
            log::warn!("{}: cannot read what Xen offers: {error}", self.id);
        }
        let bits = around.features.snapshot().bits();
        if !around.grant_copy && !bits.contains(XenFeatures::AUTO_TRANSLATED_PHYSMAP) {
            return Err(Refusal::NoDatapath);
        }
        let connector = Connector {
            mapper: around.mapper,
            binder: around.binder,
            domain: self.id.domain,
            rate: self.rate,
            headroom: request.headroom,
            now: around.now,
        };
        let count = u16::try_from(request.queues.len()).unwrap_or(u16::MAX);
        let (hv, mapper, binder) = (around.hv, around.mapper, around.binder);
        let control = request
            .control
            .map(|control| Control::connect(hv, mapper, binder, self.id.domain, control, count));
        let mut control = control.transpose()?;
        if let Some(control) = control.as_mut().filter(|_| !around.grant_copy) {
            control.copy_by_mapping(mapper);
        }
        let mut queues = Vec::with_capacity(request.queues.len());
        self.life = self.life.wrapping_add(1);
        self.lent = 0;
        for (queue, request) in (0..).zip(&request.queues) {
            let origin = Origin { port: self.port, queue, life: self.life };
            queues.push(connector.connect(origin, request)?);
        }
        self.queues = queues;
        self.control = control;
        self.features = request.features;
        self.filter = Filter::new(request.multicast_control);
        Ok(())
    }

    /// Leaves so much room at the start of each page from now on.
    fn set_headroom(&mut self, headroom: PageOffset) {
        for queue in &mut self.queues {
            queue.rx.set_headroom(headroom);
        }
        self.features.set(Features::XDP_HEADROOM, headroom != PageOffset::ZERO);
    }

    /// Takes `rate` as the toolstack has it now; queues that are connected obey at once.
    fn set_rate(&mut self, value: Option<&[u8]>) {
        let read = value.map_or(Some(RateLimit::UNLIMITED), RateLimit::parse);
        let rate = read.unwrap_or(RateLimit::UNLIMITED);
        if rate == self.rate {
            return;
        }
        if read.is_none() {
            log::warn!("{}: rate is not BYTES,USECS; not limited", self.id);
        }
        self.rate = rate;
        for queue in &mut self.queues {
            queue.set_rate(rate);
        }
    }

    /// Tells the frontend whether packets reach it (`carrier`). Nothing is written where nothing changes, so that a vif
    /// that never stalls has no such key, as with Linux.
    pub(crate) fn set_carrier(&mut self, carrier: bool, client: &mut Client) {
        if core::mem::replace(&mut self.carrier, carrier) != carrier {
            let value = if carrier { "1" } else { "0" };
            let path = format!("{}/{}", self.dir, keys::CARRIER);
            client.commit([Change::Write { path, value: value.into() }]);
        }
    }

    /// The data path found that the frontend cannot be gone on with (or the store, with `None`).
    pub(crate) fn fault(&mut self, fault: Option<VifFault>, around: &mut Around<'_, H>) {
        self.penalise(around.now);
        let text = fault.map(|fault| fault.to_string());
        if let Some(fault) = fault {
            around.notices.push(Notice::Faulted(self.id, fault));
        }
        let error = Some(text.unwrap_or_else(|| "store failure".into()));
        let after = match on_fault(self.own) {
            Action::Fault { then } => After { error, ..After::states(then) },
            Action::Remove { then } => After { remove: true, ..After::states(then) },
            _ => After::default(),
        };
        self.disconnect(after, around);
    }

    fn penalise(&mut self, now: Instant) {
        self.not_before = Some(now.after(FIRST_PENALTY << self.faults.min(MAX_DOUBLINGS)));
        self.faults = self.faults.saturating_add(1);
    }

    /// Cuts off what is connected, and does what follows as soon as all of it is let go of: at once, or when a later
    /// [`settle`](Self::settle) finds that it is.
    fn disconnect(&mut self, after: After, around: &mut Around<'_, H>) {
        match &mut self.draining {
            // Only the end of the vif comes over a disconnect: all else waits for it (see `Step::Drain`).
            Some(draining) => draining.after = after,
            None if self.queues.is_empty() => return self.follow(after, around),
            None => {
                let queues = core::mem::take(&mut self.queues);
                self.cut = true;
                let control = self.control.take();
                let until = around.now.after(DRAIN_CAP);
                self.draining = Some(Draining { queues, control, until, after });
                self.features = Features::empty();
                self.step = Step::Drain;
            }
        }
        self.settle(around);
    }

    /// Ends a disconnect if nothing is out any more, or what is has been waited for long enough. To be called whenever
    /// something came back; does nothing if nothing is being disconnected.
    pub(crate) fn settle(&mut self, around: &mut Around<'_, H>) {
        let Some(draining) = &self.draining else { return };
        let is_out = self.lent > 0 || draining.control.as_ref().is_some_and(Control::is_in_use);
        if is_out && around.now < draining.until {
            return;
        }
        self.ended = self.counters();
        let Some(Draining { queues, control, after, .. }) = self.draining.take() else { return };
        let pages = control.as_ref().map_or(0, |control| 1 + control.static_pages());
        // Two rings a queue.
        let mut ops = MapOps::new(queues.len() * 2 + pages);
        let control = control.into_iter().flat_map(Control::disconnect);
        let mappings = queues.into_iter().flat_map(Queue::disconnect).chain(control);
        around.mapper.unmap_batch(&mut ops, mappings);
        around.notices.push(Notice::Disconnected(self.id));
        self.step = Step::Idle;
        self.follow(after, around);
        self.look(around.client);
    }

    fn follow(&mut self, after: After, around: &mut Around<'_, H>) {
        self.write_states(after.states, after.error.as_deref(), around);
        if after.remove {
            self.end(around);
        }
    }

    /// Ends the vif, as soon as all that is connected is let go of; nothing is written.
    pub(crate) fn remove(&mut self, around: &mut Around<'_, H>) {
        self.dirty = false;
        self.disconnect(After { remove: true, ..After::default() }, around);
    }

    fn end(&mut self, around: &mut Around<'_, H>) {
        if let Some(watch) = self.watch.take() {
            around.client.unwatch(watch);
        }
        if !self.gone {
            around.notices.push(Notice::Removed(self.id));
            self.forget(around);
        }
    }

    /// Ends the vif, or starts another in its place if its directory has changed since it was last looked at: it may have
    /// been made anew.
    fn forget(&mut self, around: &mut Around<'_, H>) {
        if self.dirty {
            let (dir, life) = (core::mem::take(&mut self.dir), self.life);
            *self = Self::new(self.id, self.port, life, dir, self.max_queues, around.client);
        } else {
            self.gone = true;
        }
    }

    fn state_change(&self, state: State) -> Change {
        Change::Update { path: format!("{}/state", self.dir), value: state.text().into() }
    }

    fn write_states(&mut self, states: &[State], error: Option<&str>, around: &mut Around<'_, H>) {
        if let Some(error) = error {
            log::error!("{}: {error}", self.id);
            around.client.commit([Change::Write {
                path: format!("error/{}/error", self.dir),
                value: error.as_bytes().to_vec(),
            }]);
        }
        // One commit each: the frontend may wait for any of them.
        for &state in states {
            self.own = state;
            self.step = Step::Write(around.client.commit([self.state_change(state)]));
        }
    }
}

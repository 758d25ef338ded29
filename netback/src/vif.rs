//! The life of one vif: from the toolstack's nodes through the handshake to packets, and back.
//!
//! Driven by the store alone: every change of a node it looks at ends in a look at all of them, so that a storm of
//! changes costs one look, and what to do follows from the states as they are and not from the order of events.

mod close;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use evtchn::Binder;
use features::XenFeatures;
use grant::Mapper;
use hypercall::{Hypervisor, Instant, PageOffset};
use netif::keys::{self, Features};
use netif::mac::MacAddr;
use xenbus::client::{Change, Client, Error, JobId, Outcome, WatchId};
use xenbus::device::backend::{on_fault, on_frontend};
use xenbus::device::{Action, State, parse_u32};

use crate::counters::Counters;
use crate::ctrl::Control;
use crate::fault::{Refusal, VifFault};
use crate::hotplug::{self, Closed, Hotplug};
use crate::lent::Origin;
use crate::multicast::Filter;
use crate::negotiate::{self, Terms};
pub use crate::notice::{Notice, VifId};
use crate::queue::{Connector, Queue};
use crate::rate::RateLimit;
use crate::switch::PortId;
use close::{After, Draining};

/// The job that the vif waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Idle,
    Probe(JobId),
    LeftOver(JobId),
    Offer(JobId),
    Look(JobId),
    Read(JobId),
    Reconfigure(JobId),
    Write(JobId),
    /// For no job: what was connected is not all let go of yet. What changes meanwhile is looked at after.
    Drain,
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
    terms: Terms,
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
    /// Vifs that are closed for good.
    pub(crate) closed: &'a mut Closed,
    /// Whether there is an operation to copy.
    pub(crate) grant_copy: bool,
    pub(crate) now: Instant,
}

/// The nodes of our own directory that [`Vif::probed`] reads.
const PROBE: [&str; 6] = ["state", "online", "frontend", "frontend-id", keys::MAC, keys::RATE];

impl<H: Hypervisor> Vif<H> {
    /// A vif whose directory `dir` has just been seen.
    pub(crate) fn new(
        id: VifId,
        port: PortId,
        life: u32,
        dir: String,
        terms: Terms,
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
            terms,
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
            format!("{dir}/{}", hotplug::STATUS),
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
            | Step::LeftOver(mine)
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
            (Step::LeftOver(_), Ok(Outcome::Values(values))) => self.left_over(values, around),
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
            (Step::Probe(_) | Step::LeftOver(_) | Step::Offer(_), result) => {
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
        let (state, online) = (State::parse(value(0)), is_online(value(1)));
        let frontend = value(2).and_then(|path| core::str::from_utf8(path).ok());
        let domain = value(3).and_then(parse_u32);
        let (Some(frontend), true) = (frontend, state != State::Unknown) else {
            // Not set up yet.
            return self.forget(around);
        };
        if domain != Some(self.id.domain.0.into()) {
            log::error!("{}: frontend-id is not that of the directory", self.id);
            return self.forget(around);
        }
        self.frontend = frontend.to_string();
        self.mac = value(4).and_then(|mac| core::str::from_utf8(mac).ok()?.parse().ok());
        self.set_rate(value(5));
        match state {
            State::Initialising => {
                self.own = State::InitWait;
                self.step = self.offer(around.client);
            }
            _ if online => {
                self.own = state;
                let state = format!("{frontend}/state");
                self.step = Step::LeftOver(around.client.read_many([state]));
            }
            _ => self.leave_closed(state, around),
        }
    }

    /// The directory is not new: it is from an earlier life of this domain, or of a vif that has just ended. Whatever was
    /// connected is no more, and the frontend is told so; it may connect anew.
    fn left_over(&mut self, values: &[Option<Vec<u8>>], around: &mut Around<'_, H>) {
        if State::parse(values.first().and_then(Option::as_deref)) == State::Unknown {
            return self.leave_closed(self.own, around);
        }
        log::info!("{}: was left over", self.id);
        self.own = match self.own {
            kept @ (State::InitWait | State::Closing | State::Closed) => kept,
            _ => State::Closing,
        };
        self.step = self.offer(around.client);
    }

    /// Sees to it that a directory which nobody wants any more says so.
    fn leave_closed(&mut self, state: State, around: &mut Around<'_, H>) {
        if state != State::Closed {
            around.client.commit([self.state_change(State::Closed)]);
        } else if self.terms.hotplug == Hotplug::Switch {
            around.closed.found(self.id, around.now);
        }
        self.forget(around);
    }

    /// Says what there is to be had, and the state that this leads to.
    fn offer(&self, client: &mut Client) -> Step {
        let mut changes = negotiate::offer(&self.dir, self.terms);
        changes.push(self.state_change(self.own));
        Step::Offer(client.commit(changes))
    }

    fn offered(&mut self, around: &mut Around<'_, H>) {
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
        let (said, online) = (State::parse(value(1)), is_online(value(2)));
        // The toolstack writes it in our place when it wants the vif to end (libxl_device.c,
        // `libxl__initiate_device_generic_remove`).
        let to_end = said == State::Closing && !online;
        let missed = core::mem::take(&mut self.unsure) && self.own != said;
        if missed && value(1).is_some() && !to_end {
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
        let plugged_in = value(3) == Some(hotplug::CONNECTED.as_bytes());
        if to_end && self.own == State::InitWait {
            // The guest may have no driver that would answer.
            self.own = State::Closing;
        }
        let action = on_frontend(self.own, peer, online, plugged_in);
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
                let names = negotiate::frontend_keys(self.terms.max_queues);
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
        let names = negotiate::frontend_keys(self.terms.max_queues);
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
        let request = negotiate::parse(given, self.terms.max_queues)?;
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

/// Whether `online` says that the toolstack wants the vif to be there.
fn is_online(value: Option<&[u8]>) -> bool {
    value.and_then(parse_u32) == Some(1)
}

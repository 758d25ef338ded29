//! The life of an interface: the handshake over the store, and how connections end.
//!
//! Driven by the store alone: every change of a node it looks at ends in a look at all of them, so that a storm of
//! changes costs one look, and what to do follows from the states as they are and not from the order of events.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use hypercall::{DomId, Hypervisor, Instant, PageOffset};
use netif::keys::{self, Features};
use netif::slot::ExtraInfo;
use xenbus::client::{Change, Client, Error, Event, JobId, Outcome};
use xenbus::device::frontend::{on_backend, on_fault, restart};
use xenbus::device::{Action, State, parse_u32};

use super::{Frontend, MAX_RECLAIM, Notice, RECLAIM, RECLAIM_BATCH, Step};
use crate::control::Control;
use crate::fault::{BackendFault, Refusal};
use crate::negotiate::{self, Wishes};
use crate::queue::{Maker, Queue};

/// Nanoseconds until a connection that ended is tried again; doubled with each that ends in a fault.
const FIRST_DELAY: u64 = 100_000_000;
/// Doublings of [`FIRST_DELAY`] at most: about half a minute.
const MAX_DOUBLINGS: u32 = 8;
/// Pages that backends may have kept when connections ended (4 MiB): beyond it there are no further connections.
const MAX_PARKED: usize = 1024;
/// Nanoseconds for a backend to let go of what it keeps mapped before the connection ends all the same.
const LEAVE: u64 = 1_000_000_000;

/// The nodes of our own directory that each look reads first.
const OWN_KEYS: [&str; 6] = ["state", "backend", "backend-id", keys::MAC, keys::MTU, keys::TRUSTED];

impl<H: Hypervisor> Frontend<H> {
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
                if self.seen {
                    self.remove(client, now);
                }
            }
            // The store is gone, the backend is not: packets go on. Look again when the store is back.
            (_, Err(Error::Disconnected)) => {
                (self.dirty, self.unsure) = (true, true);
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
        self.trusted = value(5).and_then(parse_u32) != Some(0);
        let mtu = value(4).and_then(parse_u32).and_then(|mtu| mtu.try_into().ok());
        // An interface that is taken away has not changed.
        let there = value(0).is_some();
        if there && core::mem::replace(&mut self.mtu, mtu) != mtu && self.seen {
            self.notices.push(Notice::Mtu(mtu));
        }
        let Some((path, id)) = backend else {
            // Not set up yet, or taken away.
            if self.seen && value(0).is_none() {
                self.remove(client, now);
            }
            return;
        };
        let backend = (String::from(path), DomId(id));
        if self.backend.as_ref() != Some(&backend) {
            self.meet(client, backend, State::parse(value(0)), now);
            return;
        }
        if value(0).is_none() {
            self.remove(client, now);
            return;
        }
        let own = self.own.unwrap_or(State::Unknown);
        if core::mem::take(&mut self.unsure) && own != State::parse(value(0)) {
            self.write_states(client, &[own]);
            self.dirty = true;
            return;
        }
        let peer = State::parse(value(6));
        if peer != State::Connected && peer != State::Reconfigured {
            self.established = false;
        }
        let mut action = on_backend(own, peer);
        if own == State::Closed {
            let online = value(7).and_then(parse_u32) == Some(1);
            let ready = self.not_before.is_none_or(|at| at <= now);
            action = match action {
                _ if !self.wanted || !ready => Action::None,
                Action::None if peer == State::Closed && online => restart(own),
                action => action,
            };
        }
        self.end(client, action, now);
        // `Closing` may be the toolstack's word, and no more than a wish: it is written to the backend's node before the
        // backend knows (`libxl__initiate_device_generic_remove`).
        let holds = [State::Closing, State::Connected, State::Reconfiguring, State::Reconfigured];
        if !holds.contains(&peer) {
            self.let_go(now);
        }
    }

    /// The backend is another than was thought, or the first.
    fn meet(&mut self, client: &mut Client, backend: (String, DomId), stored: State, now: Instant) {
        if let Some(watch) = self.watch.take() {
            client.unwatch(watch);
        }
        self.seen = true;
        // Nothing of what the other was lent is its own any more; a page it still uses is parked.
        self.disconnect();
        self.let_go(now);
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
                if let Some((backend, _)) = self.backend.as_ref().filter(|_| self.wanted) {
                    let keys = negotiate::backend_keys().map(|key| format!("{backend}/{key}"));
                    self.step = Step::Read(client.read_many(keys));
                }
            }
            Action::Established => self.establish(),
            Action::Disconnect { then } | Action::Fault { then } => {
                self.disconnect();
                self.not_before.get_or_insert(now.after(FIRST_DELAY));
                self.write_states(client, then);
            }
            Action::Remove { .. } => self.remove(client, now),
        }
    }

    fn establish(&mut self) {
        if self.established || self.queues.is_empty() || self.leaving.is_some() {
            return;
        }
        self.established = true;
        self.failures = 0;
        self.untold.clear();
        if self.has_filter() {
            self.untold.extend(self.multicast.iter().map(|address| ExtraInfo::McastAdd(*address)));
        }
        let (queues, features) = (self.queues.len(), self.offered);
        self.notices.push(Notice::Connected { queues, features });
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
            self.reclaim.get_or_insert((now.after(RECLAIM), RECLAIM));
            return Err(Refusal::Parked(self.table.parked()));
        }
        let with_control = offer.features.contains(Features::CTRL_RING);
        let maker = Maker {
            table: &self.table,
            binder: &self.binder,
            backend,
            offered: offer.features,
            posted: self.config.posted,
            first_index: self.config.first_index,
            trusted: self.config.trusted && self.trusted,
            static_grants: self.config.static_grants && with_control,
            now,
        };
        let split = self.config.split && offer.features.contains(Features::SPLIT);
        let count = self.config.queues.min(offer.queues);
        let queues = (0..count).map(|_| maker.make(split)).collect::<Result<Vec<_>, _>>()?;
        // With one queue and nothing to keep mapped there is nothing to say on it.
        let control = with_control && (count > 1 || maker.static_grants);
        self.control = control.then(|| Control::new(&maker, queues.len())).transpose()?;
        self.queues = queues;
        self.offered = offer.features;
        let nodes: Vec<_> = self.queues.iter().map(Queue::nodes).collect();
        let wishes = Wishes {
            features: self.config.features,
            control: self.control.as_ref().map(Control::nodes),
            multicast_filter: self.has_filter(),
            headroom: offer
                .features
                .contains(Features::XDP_HEADROOM)
                .then_some(self.config.headroom),
        };
        let changes = negotiate::describe(&self.dir, &wishes, &nodes);
        self.step = Step::Publish(client.commit(changes));
        Ok(())
    }

    fn refused(&mut self, client: &mut Client, refusal: Refusal, now: Instant) {
        self.notices.push(Notice::Refused(refusal));
        self.penalise(now);
        self.report(client, &format!("{refusal}"));
        self.end(client, on_fault(self.own.unwrap_or(State::Unknown)), now);
    }

    pub(super) fn faulted(&mut self, client: &mut Client, fault: BackendFault, now: Instant) {
        self.notices.push(Notice::Faulted(fault));
        self.penalise(now);
        self.report(client, &format!("{fault}"));
        self.leaving = None;
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

    /// Does what has been put off.
    pub(super) fn keep_time(&mut self, client: &mut Client, now: Instant) {
        if self.not_before.is_some_and(|at| at <= now) {
            self.not_before = None;
            self.changed(client);
        }
        if let Some((at, delay)) = self.reclaim.filter(|(at, _)| *at <= now) {
            let freed = self.table.retry_parked(RECLAIM_BATCH);
            let delay = if freed > 0 { RECLAIM } else { (delay * 2).min(MAX_RECLAIM) };
            let left = self.table.parked() > 0;
            self.reclaim = left.then(|| (at.max(now).after(delay), delay));
        }
        let has_left = self.control.as_ref().is_none_or(Control::has_left);
        if self.leaving.is_some_and(|until| has_left || until <= now) {
            self.leaving = None;
            self.end(client, on_fault(self.own.unwrap_or(State::Unknown)), now);
        }
    }

    /// Stops using the queues; their pages are kept until the backend has let go.
    fn disconnect(&mut self) {
        self.leaving = None;
        self.fault = None;
        if self.queues.is_empty() {
            return;
        }
        let mut sum = self.counters();
        sum.tx.lost += self.queues.iter().map(Queue::in_flight).sum::<u64>();
        self.ended = sum;
        self.retired = core::mem::take(&mut self.queues);
        self.retired_control = self.control.take();
        self.established = false;
        self.offered = Features::empty();
        self.untold.clear();
        self.notices.push(Notice::Disconnected);
    }

    /// Takes back what connections that have ended left; what the backend still uses is parked.
    fn forget(&mut self) {
        let before = self.table.parked();
        self.retired.clear();
        self.retired_control = None;
        let more = self.table.parked().saturating_sub(before);
        if more > 0 {
            self.notices.push(Notice::Parked(more));
        }
    }

    /// As [`forget`](Self::forget), and what is parked is to be looked at again.
    fn let_go(&mut self, now: Instant) {
        self.forget();
        if self.table.parked() > 0 {
            self.reclaim.get_or_insert((now.after(RECLAIM), RECLAIM));
        }
    }

    fn remove(&mut self, client: &mut Client, now: Instant) {
        if self.gone {
            return;
        }
        self.gone = true;
        self.disconnect();
        self.let_go(now);
        client.unwatch(self.own_watch);
        if let Some(watch) = self.watch.take() {
            client.unwatch(watch);
        }
        self.not_before = None;
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

    /// Ends the connection, and stays so until [`open`](Self::open). A backend that keeps pages mapped is asked to let go of
    /// them first, and given a second for it.
    pub fn close(&mut self, client: &mut Client, now: Instant) {
        self.wanted = false;
        if self.gone || self.leaving.is_some() {
            return;
        }
        if let Some(control) = self.control.as_mut().filter(|it| it.static_grants() > 0)
            && self.established
        {
            control.leave();
            self.established = false;
            self.leaving = Some(now.after(LEAVE));
        } else if let Some(own) = self.own {
            self.end(client, on_fault(own), now);
        }
    }

    /// Wants a connection again.
    pub fn open(&mut self, client: &mut Client) {
        self.wanted = true;
        self.not_before = None;
        self.changed(client);
    }

    /// Has the backend leave so many bytes free at the start of each page from now on, where it offers that (Linux's
    /// `xdp-headroom`). Packets go on meanwhile, and each says where it begins.
    pub fn set_headroom(&mut self, client: &mut Client, headroom: PageOffset) {
        self.config.headroom = headroom;
        if self.own != Some(State::Connected)
            || !self.established
            || !self.offered.contains(Features::XDP_HEADROOM)
        {
            // It is part of the next connection.
            return;
        }
        self.own = Some(State::Reconfiguring);
        // Together, so that no backend reads the old value.
        self.step = Step::Write(client.commit([
            Change::Write {
                path: format!("{}/{}", self.dir, keys::XDP_HEADROOM),
                value: format!("{}", headroom.get()).into_bytes(),
            },
            Change::Update {
                path: format!("{}/state", self.dir),
                value: State::Reconfiguring.text().into(),
            },
        ]));
    }

    /// The domain is about to be suspended: no ring is touched any more until [`resumed`](Self::resumed).
    pub fn suspended(&mut self) {
        self.suspended = true;
    }

    /// The domain runs again. If the suspension was `cancelled`, all is as it was. If not, this may be another machine: the
    /// backend, the rings, the ports and all references are void, and the interface starts over.
    ///
    /// To be called once the event channels ([`Upcalls::resumed`](evtchn::Upcalls::resumed)), the grant table
    /// ([`GrantTable::resumed`](grant::GrantTable::resumed)) and the store client ([`Client::reconnect`]) have started over.
    pub fn resumed(&mut self, client: &mut Client, cancelled: bool) {
        self.suspended = false;
        if self.gone {
            return;
        }
        if !cancelled {
            self.disconnect();
            self.forget();
            if let Some(watch) = self.watch.take() {
                client.unwatch(watch);
            }
            self.backend = None;
            self.own = None;
            self.step = Step::Idle;
            self.hidden = false;
            self.unsure = false;
            self.failures = 0;
            self.not_before = None;
        }
        self.changed(client);
    }
}

//! All vifs of a domain, and the switch that joins them.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::num::NonZeroUsize;

use evtchn::Binder;
use grant::Mapper;
use hypercall::{DomId, Handle, Hypervisor, Instant, Port};
use netif::keys::Features;
use netif::mac::MacAddr;
use xenbus::client::{Client, Event, JobId, Outcome, WatchId};
use xenbus::device::{State, parse_u32};

use crate::counters::Counters;
use crate::deliver::{Fit, fit};
use crate::negotiate::MAX_QUEUES;
use crate::packet::{Packet, Pools};
use crate::queue::Queue;
use crate::switch::{Destination, Learned, PortId, Seed, Switch, SwitchLimits};
use crate::vif::{Around, Notice, Vif, VifId};

/// The directory of all vifs, relative to our own.
const ROOT: &str = "backend/vif";
/// Packets taken from one queue before the others have their turn.
const QUEUE_BUDGET: usize = 128;
/// Nanoseconds between looks at queues that nobody notified us of.
const TICK: u64 = 1_000_000_000;
/// Nanoseconds after which a queue that waits for a buffer is looked at again.
const BUFFER_WAIT: u64 = 1_000_000;
/// Packets that may wait for the local stack.
const LOCAL_PACKETS: usize = 256;

/// How a backend is set up.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Queues offered to each vif, 1 to [`MAX_QUEUES`].
    pub max_queues: u16,
    /// Buffers of 4 KiB.
    pub small_buffers: NonZeroUsize,
    /// Buffers of 64 KiB.
    pub large_buffers: NonZeroUsize,
    /// Vifs at most.
    pub max_vifs: u16,
    /// What the switch may learn.
    pub switch: SwitchLimits,
    /// The key of the switch's table: random, and no guest may learn it.
    pub seed: Seed,
}

/// What a vif is at, for whoever watches over it.
#[derive(Clone, Copy, Debug)]
pub struct VifStatus {
    /// Which.
    pub id: VifId,
    /// The state we last wrote.
    pub state: State,
    /// Queues that are connected.
    pub queues: usize,
    /// What both ends can do, while connected.
    pub features: Features,
    /// The guest's address, as the toolstack wrote it.
    pub mac: Option<MacAddr>,
    /// What it has done since it was made.
    pub counters: Counters,
}

/// Counters of the switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SwitchCounters {
    /// Packets that went to every port, their address being unknown or a group's.
    pub flooded: u64,
    /// Packets for the port they came from.
    pub hairpin: u64,
    /// Packets that were dropped as the local stack did not take them in time.
    pub local_full: u64,
}

/// The network backend of a domain.
pub struct Backend<H: Hypervisor> {
    hv: H,
    config: Config,
    mapper: Mapper<H>,
    binder: Binder<H>,
    pools: Pools<H>,
    root: WatchId,
    lists: Vec<(JobId, Listing)>,
    /// A vif's index, plus one, is its port of the switch.
    vifs: Vec<Option<Vif<H>>>,
    switch: Switch,
    switch_counters: SwitchCounters,
    local: VecDeque<Packet<H>>,
    staging: Vec<Packet<H>>,
    notices: Vec<Notice>,
    next_tick: Instant,
}

/// Which directory a listing is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Listing {
    Domains,
    Vifs(DomId),
}

impl<H: Hypervisor> Backend<H> {
    /// A backend that serves whatever vifs appear below `backend/vif` of its own domain.
    #[must_use]
    pub fn new(
        hv: &H,
        binder: Binder<H>,
        mapper: Mapper<H>,
        client: &mut Client,
        config: Config,
    ) -> Self {
        let config = Config { max_queues: config.max_queues.clamp(1, MAX_QUEUES), ..config };
        Self {
            hv: hv.clone(),
            mapper,
            binder,
            pools: Pools::new(hv, config.small_buffers, config.large_buffers),
            root: client.watch(ROOT),
            lists: Vec::new(),
            vifs: Vec::new(),
            switch: Switch::new(config.switch, config.seed),
            switch_counters: SwitchCounters::default(),
            local: VecDeque::with_capacity(LOCAL_PACKETS),
            staging: Vec::with_capacity(2 * QUEUE_BUDGET),
            notices: Vec::new(),
            next_tick: Instant::default(),
            config,
        }
    }

    /// Takes an event of the store client, if it is for this backend; says whether it was.
    pub fn on_store(&mut self, client: &mut Client, event: &Event, now: Instant) -> bool {
        let taken = match event {
            Event::Watch { watch, path } if *watch == self.root => {
                self.on_root(client, path);
                true
            }
            Event::Watch { watch, .. } => {
                let mut vifs = self.vifs.iter_mut().flatten();
                let vif = vifs.find(|vif| vif.watch() == Some(*watch));
                vif.map(|vif| vif.changed(client)).is_some()
            }
            Event::WatchFailed { watch, error } if *watch == self.root => {
                log::error!("netback: cannot watch {ROOT}: {error}");
                true
            }
            Event::WatchFailed { .. } => false,
            Event::Done { job, result } => {
                let listing = self.lists.iter().position(|(mine, _)| mine == job);
                match listing {
                    Some(at) => {
                        let (_, listing) = self.lists.swap_remove(at);
                        if let Ok(Outcome::Names(Some(names))) = result {
                            self.on_names(client, listing, names);
                        }
                        true
                    }
                    None => {
                        self.each_vif(client, now, |vif, around| vif.done(*job, result, around))
                    }
                }
            }
        };
        self.sweep();
        taken
    }

    /// Hands each vif to `each` until one says that the event was its own.
    fn each_vif(
        &mut self,
        client: &mut Client,
        now: Instant,
        mut each: impl FnMut(&mut Vif<H>, &mut Around<'_, H>) -> bool,
    ) -> bool {
        let mut around = Around {
            client,
            mapper: &self.mapper,
            binder: &self.binder,
            notices: &mut self.notices,
            now,
        };
        self.vifs.iter_mut().flatten().any(|vif| each(vif, &mut around))
    }

    fn on_root(&mut self, client: &mut Client, path: &str) {
        match parse_path(path) {
            Some(id) => self.seen(client, id),
            None => self.list(client, ROOT.into(), Listing::Domains),
        }
    }

    fn list(&mut self, client: &mut Client, path: String, what: Listing) {
        if self.lists.iter().all(|(_, listing)| *listing != what) {
            let job = client.list(path);
            self.lists.push((job, what));
        }
    }

    fn on_names(&mut self, client: &mut Client, listing: Listing, names: &[String]) {
        for number in names.iter().filter_map(|name| parse_u32(name.as_bytes())) {
            match listing {
                Listing::Domains => {
                    let Ok(domain) = u16::try_from(number) else { continue };
                    self.list(client, format!("{ROOT}/{domain}"), Listing::Vifs(DomId(domain)));
                }
                Listing::Vifs(domain) => {
                    self.seen(client, VifId { domain, handle: Handle(number) });
                }
            }
        }
    }

    /// A vif's directory, or something in it, has changed.
    fn seen(&mut self, client: &mut Client, id: VifId) {
        if let Some(vif) = self.vifs.iter_mut().flatten().find(|vif| vif.id == id) {
            vif.changed(client);
            return;
        }
        let dir = format!("{ROOT}/{}/{}", id.domain, id.handle);
        if let Some(free) = self.vifs.iter_mut().find(|vif| vif.is_none()) {
            *free = Some(Vif::new(id, dir, self.config.max_queues, client));
        } else if self.vifs.len() < self.config.max_vifs.into() {
            self.vifs.push(Some(Vif::new(id, dir, self.config.max_queues, client)));
        } else {
            log::error!("netback: {id} is one vif more than {}", self.config.max_vifs);
        }
    }

    /// Drops vifs that have ended, and what the switch knew of those that are cut off.
    fn sweep(&mut self) {
        for (index, slot) in self.vifs.iter_mut().enumerate() {
            let Some(vif) = slot else { continue };
            if vif.queues.is_empty() {
                self.switch.forget_port(port_of(index));
            }
            if vif.gone {
                *slot = None;
            }
        }
    }

    /// A domain is gone: lets go of all that was its, at once and whatever the store says.
    pub fn domain_gone(&mut self, client: &mut Client, domain: DomId, now: Instant) {
        self.each_vif(client, now, |vif, around| {
            if vif.id.domain == domain {
                vif.remove(around);
            }
            false
        });
        self.sweep();
    }

    /// An event came on `port`; says whether the port is one of a vif.
    pub fn on_event(&mut self, port: Port) -> bool {
        let mut queues = self.vifs.iter_mut().flatten().flat_map(|vif| &mut vif.queues);
        match queues.find(|queue| queue.ports().any(|own| own == port)) {
            Some(queue) => {
                queue.on_event(port);
                true
            }
            None => false,
        }
    }

    /// Carries packets, within a budget. `tap` sees each packet that a port sent, before it is switched. Answers whether
    /// there is more to do at once.
    pub fn poll(
        &mut self,
        client: &mut Client,
        now: Instant,
        mut tap: impl FnMut(&Packet<H>),
    ) -> bool {
        let tick = now >= self.next_tick;
        if tick {
            self.next_tick = now.after(TICK);
        }
        for index in 0..self.vifs.len() {
            self.poll_from(index, client, now, tick);
            let mut staging = core::mem::take(&mut self.staging);
            for packet in staging.drain(..) {
                tap(&packet);
                self.route(packet, port_of(index), now);
            }
            self.staging = staging;
        }
        self.poll_to(client, now);
        self.sweep();
        self.vifs.iter().flatten().flat_map(|vif| &vif.queues).any(|queue| queue.has_tx())
            && self.pools.small().free > 0
            && self.pools.large().free > 0
    }

    /// Takes packets from a vif into `staging`.
    fn poll_from(&mut self, index: usize, client: &mut Client, now: Instant, tick: bool) {
        let Some(Some(vif)) = self.vifs.get_mut(index) else { return };
        vif.wake_if_due(client, now);
        let mut fault = None;
        for queue in &mut vif.queues {
            queue.wake_if_due(now);
            if tick {
                queue.look();
            }
            if !queue.has_tx() {
                continue;
            }
            let polled = queue.poll_tx(&self.hv, &self.pools, now, QUEUE_BUDGET, &mut self.staging);
            fault = fault.or(polled.err());
        }
        if fault.is_some() {
            let (mapper, binder) = (&self.mapper, &self.binder);
            let notices = &mut self.notices;
            vif.fault(fault, &mut Around { client, mapper, binder, notices, now });
        }
    }

    /// Gives all vifs what waits for them, and ends the events whose work is done.
    fn poll_to(&mut self, client: &mut Client, now: Instant) {
        for vif in self.vifs.iter_mut().flatten() {
            let mut fault = None;
            for queue in &mut vif.queues {
                if queue.has_rx() {
                    fault = fault.or(queue.poll_rx(&self.hv, now).err());
                }
                queue.end_events(now);
            }
            if fault.is_some() {
                let (mapper, binder) = (&self.mapper, &self.binder);
                let notices = &mut self.notices;
                vif.fault(fault, &mut Around { client, mapper, binder, notices, now });
            }
        }
    }

    /// When [`poll`](Self::poll) is to be called though no event comes.
    #[must_use]
    pub fn deadline(&self, now: Instant) -> Instant {
        let vifs = self.vifs.iter().flatten();
        let queues = vifs.clone().flat_map(|vif| &vif.queues);
        let waiting = queues.clone().any(Queue::has_tx).then(|| now.after(BUFFER_WAIT));
        let deadlines = queues.filter_map(Queue::deadline).chain(vifs.filter_map(Vif::deadline));
        let connected = self.vifs.iter().flatten().any(|vif| !vif.queues.is_empty());
        let tick = if connected { self.next_tick } else { now.after(TICK) };
        deadlines.chain(waiting).fold(tick, Instant::min)
    }

    fn route(&mut self, packet: Packet<H>, from: PortId, now: Instant) {
        let Some((&dst, rest)) = packet.bytes().split_first_chunk::<6>() else { return };
        let Some(&src) = rest.first_chunk::<6>() else { return };
        if self.switch.learn(MacAddr(src), from, now) == Learned::Refused {
            if let Some(vif) = self.vif_mut(from) {
                vif.ended.tx_drops.spoofed += 1;
            }
            return;
        }
        match self.switch.lookup(MacAddr(dst), now) {
            Destination::Port(to) if to == from => self.switch_counters.hairpin += 1,
            Destination::Port(to) => self.deliver(packet, from, to, now),
            Destination::Flood => {
                self.switch_counters.flooded += 1;
                self.flood(packet, from, now);
            }
        }
    }

    fn flood(&mut self, packet: Packet<H>, from: PortId, now: Instant) {
        let mut last = None;
        for to in 0..=self.vifs.len() {
            let to = PortId(u16::try_from(to).unwrap_or(u16::MAX));
            let open =
                to == PortId::LOCAL || self.vif_mut(to).is_some_and(|vif| !vif.queues.is_empty());
            if to == from || !open {
                continue;
            }
            if let Some(before) = last.replace(to) {
                match self.pools.duplicate(&packet) {
                    Some(copy) => self.deliver(copy, from, before, now),
                    None => self.count_no_buffer(before),
                }
            }
        }
        if let Some(to) = last {
            self.deliver(packet, from, to, now);
        }
    }

    fn count_no_buffer(&mut self, to: PortId) {
        if let Some(vif) = self.vif_mut(to) {
            vif.ended.rx_drops.no_buffer += 1;
        }
    }

    fn vif_mut(&mut self, port: PortId) -> Option<&mut Vif<H>> {
        vif_at(&mut self.vifs, port)
    }

    fn deliver(&mut self, packet: Packet<H>, from: PortId, to: PortId, now: Instant) {
        if to == PortId::LOCAL {
            if self.local.len() >= LOCAL_PACKETS {
                self.switch_counters.local_full += 1;
            } else {
                self.local.push_back(packet);
            }
            return;
        }
        let Self { vifs, pools, .. } = self;
        let Some(vif) = vif_at(vifs, to) else {
            if let Some(vif) = self.vif_mut(from) {
                vif.ended.tx_drops.unreachable += 1;
            }
            return;
        };
        let features = vif.features;
        let count = vif.queues.len();
        let at = usize::from(packet.flow.0).checked_rem(count).unwrap_or(0);
        let Some(queue) = vif.queues.get_mut(at) else {
            vif.ended.rx_drops.unreachable += 1;
            return;
        };
        let enqueue = |packet| {
            let free = pools.free_like(&packet);
            queue.enqueue(packet, free);
        };
        match fit(packet, features, pools, now, enqueue) {
            Fit::Done => {}
            Fit::TooBig => vif.ended.rx_drops.too_big += 1,
            Fit::NoBuffer => vif.ended.rx_drops.no_buffer += 1,
        }
    }

    /// A packet for the local stack.
    pub fn receive_local(&mut self) -> Option<Packet<H>> {
        self.local.pop_front()
    }

    /// An empty packet of `len` bytes for the local stack to fill and send.
    #[must_use]
    pub fn packet(&self, len: usize, now: Instant) -> Option<Packet<H>> {
        self.pools.packet(len, now)
    }

    /// Switches a packet of the local stack's.
    pub fn send_local(&mut self, packet: Packet<H>, now: Instant) {
        self.route(packet, PortId::LOCAL, now);
    }

    /// What has happened since the last call.
    pub fn take_notices(&mut self) -> impl Iterator<Item = Notice> {
        core::mem::take(&mut self.notices).into_iter()
    }

    /// The vifs there are.
    pub fn vifs(&self) -> impl Iterator<Item = VifStatus> {
        self.vifs.iter().flatten().map(|vif| VifStatus {
            id: vif.id,
            state: vif.state(),
            queues: vif.queues.len(),
            features: vif.features,
            mac: vif.mac,
            counters: vif.counters(),
        })
    }

    /// The buffers that packets live in.
    #[must_use]
    pub fn pools(&self) -> &Pools<H> {
        &self.pools
    }

    /// What the switch has done.
    #[must_use]
    pub fn switch_counters(&self) -> SwitchCounters {
        self.switch_counters
    }
}

impl<H: Hypervisor> fmt::Debug for Backend<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Backend({} vifs)", self.vifs.iter().flatten().count())
    }
}

fn port_of(index: usize) -> PortId {
    PortId(u16::try_from(index.saturating_add(1)).unwrap_or(u16::MAX))
}

fn vif_at<H: Hypervisor>(vifs: &mut [Option<Vif<H>>], port: PortId) -> Option<&mut Vif<H>> {
    vifs.get_mut(usize::from(port.0).checked_sub(1)?)?.as_mut()
}

/// The vif that a path at or below `backend/vif/F/N` is of.
fn parse_path(path: &str) -> Option<VifId> {
    let mut parts = path.strip_prefix(ROOT)?.strip_prefix('/')?.split('/');
    let domain = u16::try_from(parse_u32(parts.next()?.as_bytes())?).ok()?;
    let handle = parse_u32(parts.next()?.as_bytes())?;
    Some(VifId { domain: DomId(domain), handle: Handle(handle) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_vifs() {
        let id = VifId { domain: DomId(7), handle: Handle(1) };
        assert_eq!(parse_path("backend/vif/7/1"), Some(id));
        assert_eq!(parse_path("backend/vif/7/1/state"), Some(id));
        for other in ["backend/vif", "backend/vif/7", "backend/vif/7/x", "backend/vif/70000/1"] {
            assert_eq!(parse_path(other), None, "{other}");
        }
    }
}

//! All vifs of a domain, and the switch that joins them.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::num::NonZeroUsize;

use evtchn::Binder;
use features::Features;
use grant::{CopyOps, MapOps, Mapper};
use hypercall::{DomId, Errno, Handle, Hypervisor, Instant, Port};
use netif::keys;
use netif::mac::MacAddr;
use xenbus::client::{Client, Event, JobId, Outcome, WatchId};
use xenbus::device::{State, parse_u32};

use crate::counters::Counters;
use crate::datapath::{Datapaths, Facts, Modes, Policy, Ways, Withdrawal, possible};
use crate::dma::{self, DmaRule, OwnRule};
use crate::hotplug::{Closed, Hotplug};
use crate::lent::Table;
use crate::negotiate::{MAX_QUEUES, Terms};
use crate::packet::{Packet, Pools};
use crate::queue::Queue;
use crate::round::{COPIES, Scratch};
use crate::switch::{PortId, Seed, Switch, SwitchLimits};
use crate::vif::{Around, Notice, Vif, VifId};
use crate::waiting::Waiting;

/// The directory of all vifs, relative to our own.
const ROOT: &str = "backend/vif";
/// Nanoseconds between looks at queues that nobody notified us of.
pub(crate) const TICK: u64 = 1_000_000_000;
/// Nanoseconds after which a queue that waits for a buffer is looked at again.
const BUFFER_WAIT: u64 = 1_000_000;
/// Pages mapped or unmapped by one hypercall.
const MAPS: usize = 256;

/// How a backend is set up.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Queues offered to each vif, 1 to [`MAX_QUEUES`].
    pub max_queues: u16,
    /// Buffers of 4 KiB, and as many of 256 bytes.
    pub small_buffers: NonZeroUsize,
    /// Buffers of 64 KiB.
    pub large_buffers: NonZeroUsize,
    /// Who plugs vifs in.
    pub hotplug: Hotplug,
    /// Vifs at most.
    pub max_vifs: u16,
    /// What the switch may learn.
    pub switch: SwitchLimits,
    /// The key of the switch's table: random, and no guest may learn it.
    pub seed: Seed,
    /// What the domain is: see [`Facts::probe`].
    pub facts: Facts,
    /// What the operator wants of the ways packets can take.
    pub policy: Policy,
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
    pub features: keys::Features,
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
    /// Packets that were dropped as too many waited for the local stack.
    pub local_full: u64,
    /// Packets for the local stack, or of its own, that were dropped as there was no buffer to copy them to.
    pub local_no_buffer: u64,
    /// Packets that were dropped as too many waited for the uplink.
    pub uplink_full: u64,
    /// Packets for the uplink, or from it, that were dropped as there was no buffer to copy them to.
    pub uplink_no_buffer: u64,
    /// Packets from the uplink whose source is an address that is not for it to have: a group's, or one of our own.
    pub uplink_spoofed: u64,
}

/// The network backend of a domain.
pub struct Backend<H: Hypervisor> {
    pub(crate) hv: H,
    pub(crate) config: Config,
    pub(crate) features: Features,
    /// By the operator's word.
    pub(crate) withdrawn: Datapaths,
    pub(crate) modes: Modes,
    pub(crate) mapper: Mapper<H>,
    pub(crate) binder: Binder<H>,
    pub(crate) pools: Pools<H>,
    root: WatchId,
    lists: Vec<(JobId, Listing)>,
    /// A vif's index, plus [`PortId::OWN`], is its port of the switch.
    pub(crate) vifs: Vec<Option<Vif<H>>>,
    /// Vifs whose directories are to go.
    closed: Closed,
    lives: u32,
    /// The vif that is asked first for packets.
    pub(crate) turn: usize,
    pub(crate) switch: Switch,
    pub(crate) switch_counters: SwitchCounters,
    /// For the local stack.
    pub(crate) local: Waiting<H>,
    /// For the card.
    pub(crate) uplink: Waiting<H>,
    pub(crate) table: Table<H>,
    pub(crate) ops: CopyOps,
    pub(crate) map_ops: MapOps<H>,
    pub(crate) scratch: Scratch<H>,
    /// Packets that this round means to map.
    pub(crate) planned_maps: usize,
    /// When static pages are unmapped, while they are not to be used.
    pub(crate) unmap_statics_at: Option<Instant>,
    pub(crate) notices: Vec<Notice>,
    pub(crate) next_tick: Instant,
}

/// Which directory a listing is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Listing {
    Domains,
    Vifs(DomId),
}

impl<H: Hypervisor> Backend<H> {
    /// A backend that serves whatever vifs appear below `backend/vif` of its own domain.
    ///
    /// # Errors
    /// Xen does not say what it offers.
    pub fn new(
        hv: &H,
        binder: Binder<H>,
        mapper: Mapper<H>,
        client: &mut Client,
        config: Config,
    ) -> Result<Self, Errno> {
        let config = Config { max_queues: config.max_queues.clamp(1, MAX_QUEUES), ..config };
        let features = Features::read(hv)?;
        let wanted = possible(features.snapshot().bits(), &config.facts) & config.policy.allowed;
        let ops = if config.facts.grant_copy {
            CopyOps::new(COPIES)
        } else {
            CopyOps::by_mapping(COPIES, &mapper)
        };
        Ok(Self {
            hv: hv.clone(),
            features,
            withdrawn: Datapaths::empty(),
            modes: Modes::new(wanted),
            mapper,
            binder,
            pools: Pools::new(hv, config.small_buffers, config.large_buffers),
            root: client.watch(ROOT),
            lists: Vec::new(),
            closed: Closed::default(),
            vifs: Vec::new(),
            switch: Switch::new(config.switch, config.seed),
            switch_counters: SwitchCounters::default(),
            local: Waiting::new(config.max_vifs),
            uplink: Waiting::new(config.max_vifs),
            table: Table::new(config.policy.max_lent),
            ops,
            map_ops: MapOps::new(MAPS),
            scratch: Scratch::new(),
            planned_maps: 0,
            unmap_statics_at: None,
            turn: 0,
            lives: 0,
            notices: Vec::new(),
            next_tick: Instant::default(),
            config,
        })
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
    pub(crate) fn each_vif(
        &mut self,
        client: &mut Client,
        now: Instant,
        mut each: impl FnMut(&mut Vif<H>, &mut Around<'_, H>) -> bool,
    ) -> bool {
        let Self { mapper, binder, notices, features, hv, config, closed, .. } = self;
        let grant_copy = config.facts.grant_copy;
        let mut around =
            Around { client, mapper, binder, notices, features, hv, closed, grant_copy, now };
        self.vifs.iter_mut().flatten().any(|vif| each(vif, &mut around))
    }

    fn on_root(&mut self, client: &mut Client, path: &str) {
        match parse_path(path) {
            Some(id) => self.seen(client, id),
            None => {
                // A directory above vifs: they may have gone with it.
                let above = format!("{path}/");
                let below = |id: VifId| format!("{ROOT}/{}/", id.domain).starts_with(&above);
                for vif in self.vifs.iter_mut().flatten().filter(|vif| below(vif.id)) {
                    vif.changed(client);
                }
                self.list(client, ROOT.into(), Listing::Domains);
            }
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
        let free = self.vifs.iter().position(Option::is_none).unwrap_or(self.vifs.len());
        let port = port_of(free);
        // Numbers of connections that no other vif has had: pages that outlive one are not taken for the next one's.
        self.lives = self.lives.wrapping_add(1 << 16);
        let life = self.lives;
        let Config { max_queues, hotplug, .. } = self.config;
        let terms = Terms { max_queues, hotplug };
        if let Some(free) = self.vifs.get_mut(free) {
            *free = Some(Vif::new(id, port, life, dir, terms, client));
        } else if self.vifs.len() < self.config.max_vifs.into() {
            self.vifs.push(Some(Vif::new(id, port, life, dir, terms, client)));
        } else {
            log::error!("netback: {id} is one vif more than {}", self.config.max_vifs);
        }
    }

    /// Removes the directories of vifs that were closed for good, when it is time.
    pub(crate) fn remove_closed(&mut self, client: &mut Client, now: Instant) {
        self.closed.remove_due(ROOT, client, now);
    }

    /// Drops vifs that have ended, and what the switch knew of those that are cut off.
    pub(crate) fn sweep(&mut self) {
        for (index, slot) in self.vifs.iter_mut().enumerate() {
            let Some(vif) = slot else { continue };
            if core::mem::take(&mut vif.cut) {
                // Chains that others still hold are of rings that are gone.
                self.table.forget(port_of(index));
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
        let mut controls = self.vifs.iter_mut().flatten().filter_map(|vif| vif.control.as_mut());
        if let Some(control) = controls.find(|control| control.port() == port) {
            control.on_event();
            return true;
        }
        let mut queues = self.vifs.iter_mut().flatten().flat_map(|vif| &mut vif.queues);
        match queues.find(|queue| queue.ports().any(|own| own == port)) {
            Some(queue) => {
                queue.on_event(port);
                true
            }
            None => false,
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
        let policy = &self.config.policy;
        let held = self.local.iter().chain(self.uplink.iter()).filter_map(Packet::lent_by);
        let held = held.map(|(_, since)| since.after(policy.hold)).min();
        let returned = self.table.has_returned().then_some(now);
        let unmap = self.unmap_statics_at.filter(|_| connected);
        let closed = self.closed.deadline();
        let others = [waiting, self.modes.deadline(policy), held, returned, unmap, closed];
        deadlines.chain(others.into_iter().flatten()).fold(tick, Instant::min)
    }

    pub(crate) fn queues(&self) -> impl Iterator<Item = &Queue<H>> {
        self.vifs.iter().flatten().flat_map(|vif| &vif.queues)
    }

    /// What Xen offers this domain, as the backend understands it: bits withdrawn here are not used from the next poll on.
    #[must_use]
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Reads again what Xen advertises, and asks whether it cleans caches: two hypercalls. To be called after each resume, as it
    /// may be another Xen; [`poll`](Self::poll) does it once a second.
    ///
    /// # Errors
    /// As Xen answers: then what was read before still holds.
    pub fn refresh_features(&mut self) -> Result<(), Errno> {
        self.features.refresh(&self.hv)?;
        self.config.facts.cache_flush = dma::has_cache_flush(&self.hv);
        Ok(())
    }

    /// The operator's word: all of this, and nothing else, is not to be used from now on. Packets that are under way
    /// end as they began.
    pub fn set_withdrawn(&mut self, withdrawal: &Withdrawal) {
        self.withdrawn = withdrawal.paths - Datapaths::COPY;
        let withdrawn = self.features.withdrawn();
        self.features.restore(withdrawn - withdrawal.bits);
        self.features.withdraw(withdrawal.bits - withdrawn);
    }

    /// The ways that packets may take now.
    #[must_use]
    pub fn datapaths(&self) -> Ways {
        self.modes.up()
    }

    /// How often that has changed.
    #[must_use]
    pub fn switches(&self) -> u64 {
        self.modes.switches()
    }

    /// How the card at the uplink is made to see packets that are mapped now. `None`: there are none.
    #[must_use]
    pub fn dma_rule(&self) -> Option<DmaRule> {
        dma::rule(self.features.snapshot().bits(), &self.config.facts)
    }

    /// How it is made to see what is in memory of our own. `None`: there is no card.
    #[must_use]
    pub fn own_rule(&self) -> Option<OwnRule> {
        dma::own_rule(&self.config.facts)
    }

    /// Packets taken from guests that are not answered yet.
    #[must_use]
    pub fn open(&self) -> usize {
        self.table.open()
    }

    /// A packet for the local stack.
    pub fn receive_local(&mut self) -> Option<Packet<H>> {
        self.local.pop()
    }

    /// A packet for the card. There are none where [`Facts::uplink`] says that there is no card.
    pub fn receive_uplink(&mut self) -> Option<Packet<H>> {
        self.uplink.pop()
    }

    /// An empty packet of `len` bytes for the local stack or the card to fill and send.
    #[must_use]
    pub fn packet(&self, len: usize, now: Instant) -> Option<Packet<H>> {
        self.pools.packet(len, now)
    }

    /// Switches a packet of the local stack's. One that came from a guest is copied first where that has not been done yet,
    /// so that no guest's pages wait for another guest; it is dropped if there is no buffer for that.
    pub fn send_local(&mut self, mut packet: Packet<H>, now: Instant) {
        if !packet.make_whole(&self.pools) {
            self.switch_counters.local_no_buffer += 1;
            return;
        }
        self.route(packet, PortId::LOCAL, now);
    }

    /// Switches a packet that the card received; otherwise as [`send_local`](Self::send_local).
    pub fn send_uplink(&mut self, mut packet: Packet<H>, now: Instant) {
        if !packet.make_whole(&self.pools) {
            self.switch_counters.uplink_no_buffer += 1;
            return;
        }
        self.route(packet, PortId::UPLINK, now);
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

pub(crate) fn port_of(index: usize) -> PortId {
    PortId(u16::try_from(index.saturating_add(PortId::OWN.into())).unwrap_or(u16::MAX))
}

pub(crate) fn vif_at<H: Hypervisor>(
    vifs: &mut [Option<Vif<H>>],
    port: PortId,
) -> Option<&mut Vif<H>> {
    vifs.get_mut(usize::from(port.0.checked_sub(PortId::OWN)?))?.as_mut()
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

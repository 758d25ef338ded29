//! Carrying packets: one round takes requests from all rings, does their copies and those of what the round before left to
//! be delivered in one hypercall, and decides where each packet goes and how.

use alloc::boxed::Box;
use alloc::vec::Vec;

use features::XenFeatures;
use grant::{CopyRange, MapError, MapRequest, Mapping, PeerSpan};
use hypercall::{GrantRef, Hypervisor, Instant};
use netif::mac::MacAddr;
use netif::slot::TxStatus;
use xenbus::client::Client;

use crate::backend::{Backend, LOCAL_PACKETS, TICK, port_of, vif_at};
use crate::ctrl::Control;
use crate::datapath::{Datapath, Datapaths, Fallback, Target, choose, possible};
use crate::deliver::{Fit, Taker, fit, takes_as_is};
use crate::fault::VifFault;
use crate::lent::{Open, Pages, Returned};
use crate::packet::{Packet, Rest};
use crate::rx::Relayed;
use crate::switch::{Destination, Learned, PortId};
use crate::tx::{COPIES_PER_PACKET, Statics, Take, pull, rest_of};
use crate::vif::{Around, Vif};

/// Copies per hypercall at most.
pub(crate) const COPIES: usize = 2048;
/// Packets whose rest is copied by one hypercall.
const FETCHES: usize = COPIES / COPIES_PER_PACKET;

/// Nanoseconds that static pages stay mapped while they are not to be used: a withdrawal that is taken back at once costs
/// nothing.
const STATIC_LINGER: u64 = 10_000_000;

/// What is to become of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Plan {
    /// It goes as it is.
    Forward(Destination),
    /// Its rest is to be copied first,
    Fetch(Destination),
    /// or mapped.
    Map(Destination, Datapath),
    /// It does not go anywhere.
    Drop,
}

/// A packet that has come and is to be sent on.
pub(crate) struct Staged<H: Hypervisor> {
    packet: Packet<H>,
    from: PortId,
    plan: Plan,
    copies: CopyRange,
}

impl<H: Hypervisor> Staged<H> {
    fn new(packet: Packet<H>, from: PortId) -> Self {
        Self { packet, from, plan: Plan::Drop, copies: CopyRange::default() }
    }
}

/// Room that is used anew in each round.
pub(crate) struct Scratch<H: Hypervisor> {
    arrived: Vec<Packet<H>>,
    staging: Vec<Staged<H>>,
    relayed: Vec<Relayed>,
    mapped: Vec<Result<Mapping<H>, MapError>>,
    returned: Vec<Box<Pages<H>>>,
    unmapped: Vec<bool>,
}

impl<H: Hypervisor> Scratch<H> {
    pub(crate) fn new() -> Self {
        Self {
            arrived: Vec::with_capacity(256),
            staging: Vec::with_capacity(256),
            relayed: Vec::with_capacity(256),
            mapped: Vec::with_capacity(256),
            returned: Vec::with_capacity(64),
            unmapped: Vec::with_capacity(256),
        }
    }
}

/// The pages that one queue's frontend keeps mapped.
struct QueuePages<'a, H: Hypervisor> {
    control: Option<&'a Control<H>>,
    queue: u16,
}

impl<H: Hypervisor> Statics<H> for QueuePages<'_, H> {
    fn page(&self, gref: GrantRef, writable: bool) -> Option<&Mapping<H>> {
        self.control?.static_page(self.queue, gref, writable).map(|page| &**page)
    }
}

impl<H: Hypervisor> Backend<H> {
    /// Carries packets, within a budget. `tap` sees each packet that a port sent, before it is switched: of one that is not copied
    /// whole, [the headers](Packet::bytes). Answers whether there is more to do at once.
    pub fn poll(
        &mut self,
        client: &mut Client,
        now: Instant,
        mut tap: impl FnMut(&Packet<H>),
    ) -> bool {
        self.update_modes(now);
        let tick = now >= self.next_tick;
        if tick {
            self.next_tick = now.after(TICK);
            self.mapper.retry_parked(&mut self.map_ops);
        }
        for vif in self.vifs.iter_mut().flatten() {
            vif.wake_if_due(client, now);
            for queue in &mut vif.queues {
                queue.begin(tick, now);
            }
        }
        self.serve_controls(tick, now);
        self.take_back();
        while self.gather(now) {
            self.copy(now);
            self.carry(now, &mut tap);
            // What is left to be delivered goes with the copies of what is still to be taken.
            if self.has_more() {
                break;
            }
        }
        self.recall(now);
        self.take_back();
        self.finish(client, now);
        self.sweep();
        let waits = self.queues().any(|queue| queue.has_tx());
        self.has_more() || (waits && self.pools.small().free > 0 && self.pools.large().free > 0)
    }

    fn has_more(&self) -> bool {
        self.queues().any(|queue| queue.has_more())
    }

    /// Looks at what may be used.
    fn update_modes(&mut self, now: Instant) {
        let bits = self.features.snapshot().bits();
        let policy = &self.config.policy;
        let wanted = possible(bits, &self.config.facts) & policy.allowed;
        self.modes.update(wanted - self.withdrawn, policy, now);
    }

    fn serve_controls(&mut self, tick: bool, now: Instant) {
        let keeps = self.modes.up().contains(Datapaths::STATIC);
        let leaves = !keeps && self.unmap_statics_at.is_some_and(|at| at <= now);
        self.unmap_statics_at = match self.unmap_statics_at {
            _ if keeps => None,
            // What is added meanwhile goes then.
            Some(_) if leaves => Some(now.after(TICK)),
            at => at.or(Some(now.after(STATIC_LINGER))),
        };
        let Self { vifs, hv, mapper, .. } = self;
        for vif in vifs.iter_mut().flatten() {
            let Some(control) = &mut vif.control else { continue };
            if keeps {
                control.map_pages_again(mapper);
            } else if leaves {
                control.unmap_pages(mapper);
            }
            if tick {
                control.look();
            }
            if control.is_ready() {
                let served = control.poll(hv, mapper);
                vif.found = vif.found.or(served.err());
            }
        }
    }

    /// Takes packets off all queues, both ways; `false` if there are none.
    fn gather(&mut self, now: Instant) -> bool {
        let Self { vifs, pools, table, config, modes, turn, .. } = self;
        let mut room = COPIES;
        for vif in vifs.iter_mut().flatten().filter(|vif| vif.found.is_none()) {
            for queue in &mut vif.queues {
                vif.found = vif.found.or(queue.rx.gather(table, now, &mut room).err());
            }
        }
        let (up, policy, openings) = (modes.up(), &config.policy, table.room());
        let mut take = Take { pools, up, policy, room, openings, now };
        // Each round another vif is the first, should there not be room for all.
        *turn = turn.checked_add(1).filter(|turn| *turn < vifs.len()).unwrap_or(0);
        let (last, first) = vifs.split_at_mut_checked(*turn).unwrap_or_default();
        for vif in first.iter_mut().chain(last).flatten().filter(|vif| vif.found.is_none()) {
            let Vif { queues, control, filter, found, .. } = vif;
            for (queue, index) in queues.iter_mut().zip(0..) {
                let pages = QueuePages { control: control.as_ref(), queue: index };
                let taken = queue.gather_tx(&mut take, &pages, Some(filter));
                *found = found.or(taken.err());
            }
        }
        // What a vif that is given up has begun goes with it.
        let going_on = self.vifs.iter().flatten().filter(|vif| vif.found.is_none());
        let mut queues = going_on.flat_map(|vif| &vif.queues);
        queues.any(|queue| queue.tx.is_busy() || queue.rx.is_busy())
    }

    /// Does all copies in one hypercall, and settles what they were for.
    fn copy(&mut self, now: Instant) {
        let Self { hv, ops, vifs, table, modes, scratch, .. } = self;
        let up = modes.up();
        let mut copies = ops.begin();
        for vif in vifs.iter_mut().flatten().filter(|vif| vif.found.is_none()) {
            let Vif { queues, control, found, .. } = vif;
            for (queue, index) in queues.iter_mut().zip(0..) {
                let pages = QueuePages { control: control.as_ref(), queue: index };
                let added = queue.rx.add(&mut copies, table, &pages, up);
                let added = added.and(queue.tx.add(&mut copies, &pages));
                *found = found.or(added.err());
            }
        }
        let outcome = copies.submit(hv);
        for (index, vif) in vifs.iter_mut().enumerate() {
            let Some(Vif { queues, found, .. }) = vif else { continue };
            if found.is_some() {
                continue;
            }
            for queue in queues {
                if queue.rx.is_busy() {
                    let settled = queue.rx.settle(outcome, table, &mut scratch.relayed);
                    *found = found.or(settled.err());
                }
                if queue.tx.is_busy() {
                    let settled = queue.tx.settle(outcome, table, now, &mut scratch.arrived);
                    *found = found.or(settled.err());
                }
            }
            let staged =
                scratch.arrived.drain(..).map(|packet| Staged::new(packet, port_of(index)));
            scratch.staging.extend(staged);
        }
        self.answer_relayed();
    }

    /// Answers those whose packets went from guest to guest.
    fn answer_relayed(&mut self) {
        let mut relayed = core::mem::take(&mut self.scratch.relayed);
        for Relayed { open, to, len, copies, failed } in relayed.drain(..) {
            let source_is_good = !failed || self.can_be_read(&open);
            if failed && source_is_good {
                let receiver = vif_at(&mut self.vifs, to.port);
                if let Some(queue) =
                    receiver.and_then(|vif| vif.queues.get_mut(usize::from(to.queue)))
                {
                    queue.rx.drops.grant += 1;
                }
            }
            let Some((tx, found)) = source(&mut self.vifs, &open) else { continue };
            tx.paths.count(Datapath::Direct, |counters| counters.copies += copies as u64);
            let status = if source_is_good {
                tx.count(Datapath::Direct, len);
                TxStatus::OKAY
            } else {
                tx.drops.grant += 1;
                TxStatus::ERROR
            };
            *found = found.or(tx.answer(open.chain.answers, status).err());
        }
        self.scratch.relayed = relayed;
    }

    /// Whether a sender has granted what it sent; if a relay failed, it was its fault otherwise. Tried with a byte of each
    /// slot.
    fn can_be_read(&mut self, open: &Open) -> bool {
        let Some(mut packet) = self.pools.packet(open.chain.slots.len(), Instant::default()) else {
            return true;
        };
        let mut copies = self.ops.begin();
        let (mut range, mut to) = (CopyRange::default(), packet.frame_mut().span_mut());
        for (gref, offset, _) in rest_of(&open.chain, 0) {
            let (byte, behind) = to.split_at(1);
            to = behind;
            let Ok(copy) = copies.pull(PeerSpan { domain: open.domain, gref, offset }, byte) else {
                return false;
            };
            range = range.with(copy);
        }
        copies.submit(&self.hv).is_ok_and(|results| results.of(range).is_ok())
    }

    /// Sends on what has come.
    fn carry(&mut self, now: Instant, tap: &mut impl FnMut(&Packet<H>)) {
        for queue in self.vifs.iter_mut().flatten().flat_map(|vif| &mut vif.queues) {
            queue.rx.count_waiting();
        }
        let mut staging = core::mem::take(&mut self.scratch.staging);
        for staged in &mut staging {
            tap(&staged.packet);
            staged.plan = self.plan(&mut staged.packet, staged.from, now);
        }
        self.map(&mut staging, now);
        self.fetch(&mut staging);
        for staged in staging.drain(..) {
            match staged.plan {
                Plan::Forward(to) => self.forward(staged.packet, staged.from, to, now),
                Plan::Fetch(_) | Plan::Map(..) | Plan::Drop => {}
            }
        }
        self.scratch.staging = staging;
    }

    /// Decides where a packet goes, and how.
    fn plan(&mut self, packet: &mut Packet<H>, from: PortId, now: Instant) -> Plan {
        let Some((&dst, rest)) = packet.bytes().split_first_chunk::<6>() else { return Plan::Drop };
        let Some(&src) = rest.first_chunk::<6>() else { return Plan::Drop };
        if self.switch.learn(MacAddr(src), from, now) == Learned::Refused {
            if let Some(vif) = vif_at(&mut self.vifs, from) {
                vif.ended.tx_drops.spoofed += 1;
            }
            return Plan::Drop;
        }
        let to = self.switch.lookup(MacAddr(dst), now);
        let target = match to {
            Destination::Port(to) if to == from => {
                self.switch_counters.hairpin += 1;
                return Plan::Drop;
            }
            Destination::Port(PortId::LOCAL) => {
                Target::Local { room: self.table.spare() > self.planned_maps }
            }
            Destination::Port(to) => self.target(packet, to),
            Destination::Flood => Target::Many,
        };
        if from == PortId::LOCAL || packet.path == Datapath::Static {
            return Plan::Forward(to);
        }
        let size = u16::try_from(packet.len()).unwrap_or(u16::MAX);
        let choice = choose(self.modes.up(), &self.config.policy, size, target);
        let by_reference = matches!(choice, Ok(path) if path != Datapath::Copy);
        let whole = packet.is_whole();
        if let Some((tx, _)) = queue_of(&mut self.vifs, from, packet.flow.0) {
            match choice {
                Err(why) => {
                    tx.fallbacks.count(why);
                    // A short wait for pages is not worth guessing; what it costs is one more hypercall.
                    tx.wanted_whole |= why != Fallback::NotReady && !whole;
                }
                Ok(_) if by_reference => tx.wanted_whole = false,
                Ok(_) => {}
            }
        }
        match choice {
            _ if whole => Plan::Forward(to),
            Ok(Datapath::Direct) => Plan::Forward(to),
            Ok(path @ (Datapath::Map | Datapath::MapIdentity)) => {
                self.planned_maps += 1;
                Plan::Map(to, path)
            }
            Ok(_) | Err(_) => Plan::Fetch(to),
        }
    }

    /// What another guest can take.
    fn target(&mut self, packet: &mut Packet<H>, to: PortId) -> Target {
        let Some(vif) = vif_at(&mut self.vifs, to) else {
            return Target::Guest { ready: false, as_is: false };
        };
        let (features, count) = (vif.features, vif.queues.len());
        let steered = vif.control.as_ref().and_then(|control| control.steer(packet.bytes()));
        // Its frontend's wish; else as the sender spread them.
        let index = steered.map_or(packet.flow.0, |steered| steered.queue);
        packet.hash = steered.and_then(|steered| steered.hash);
        packet.to_queue = usize::from(index).checked_rem(count).unwrap_or(0);
        let Some(queue) = vif.queues.get_mut(packet.to_queue) else {
            return Target::Guest { ready: false, as_is: false };
        };
        let promised = queue.rx.promise(packet);
        vif.found = vif.found.or(promised.err());
        let taker = Taker { features, room: queue.rx.room() };
        Target::Guest { ready: promised == Ok(true), as_is: takes_as_is(packet, taker) }
    }

    /// Maps what is to be mapped, in one hypercall. What cannot be is copied instead.
    fn map(&mut self, staging: &mut [Staged<H>], now: Instant) {
        if core::mem::take(&mut self.planned_maps) == 0 {
            return;
        }
        let Self { table, mapper, map_ops, scratch, vifs, features, hv, .. } = self;
        let requests = staging.iter().filter(|staged| matches!(staged.plan, Plan::Map(..)));
        let requests = requests.filter_map(|staged| match &staged.packet.rest {
            Rest::Taken(token) => Some((table.get(token)?, staged.packet.bytes().len())),
            Rest::None | Rest::Lent(_) => None,
        });
        let requests = requests.flat_map(|(open, private)| {
            let domain = open.domain;
            let slots = rest_of(&open.chain, private);
            slots.map(move |(gref, ..)| MapRequest { domain, gref, read_only: true })
        });
        mapper.map_batch(map_ops, requests, |result| scratch.mapped.push(result));
        // The identity mapping is there if the bit was while Xen mapped. It may have gone since it was last read.
        let refreshed = features.refresh(hv);
        let identity =
            refreshed.is_ok_and(|snapshot| snapshot.has(XenFeatures::GRANT_MAP_IDENTITY));
        let mut results = scratch.mapped.drain(..);
        for staged in staging {
            let Plan::Map(to, path) = staged.plan else { continue };
            staged.plan = Plan::Fetch(to);
            let packet = &mut staged.packet;
            let Rest::Taken(token) = &packet.rest else { continue };
            let Some(open) = table.get(token) else { continue };
            let origin = open.origin;
            let mut good = path != Datapath::MapIdentity || identity;
            let mut pages = heapless::Vec::new();
            for (_, offset, len) in rest_of(&open.chain, packet.bytes().len()) {
                match results.next() {
                    Some(Ok(page)) => {
                        let offset = offset.get();
                        good &= pages.push(crate::lent::LentPage { page, offset, len }).is_ok();
                    }
                    Some(Err(_)) | None => good = false,
                }
            }
            let maps = pages.len() as u64;
            let vif = vif_at(vifs, origin.port);
            let lent = if good { table.lend() } else { None };
            let Some(mut lent) = lent else {
                mapper.unmap_batch(map_ops, pages.into_iter().map(|lent| lent.page));
                if let Some((tx, _)) = queue_of(vifs, origin.port, origin.queue) {
                    tx.fallbacks.map_refused += 1;
                }
                continue;
            };
            if let Some(vif) = vif {
                vif.lent += 1;
            }
            (lent.count, lent.pages) = (pages.len(), pages);
            (lent.path, lent.since, lent.origin) = (path, now, Some(origin));
            if let Rest::Taken(token) = core::mem::replace(&mut packet.rest, Rest::None) {
                lent.token = Some(token);
            }
            packet.path = path;
            packet.rest = Rest::Lent(table.on_loan(lent));
            staged.plan = Plan::Forward(to);
            if let Some((tx, _)) = queue_of(vifs, origin.port, origin.queue) {
                tx.count(path, packet.len());
                tx.paths.count(path, |counters| {
                    counters.hypercalls += 1;
                    counters.maps += maps;
                });
            }
        }
    }

    /// Copies the rest of what turned out to be needed whole.
    fn fetch(&mut self, staging: &mut [Staged<H>]) {
        let Self { ops, hv, table, vifs, pools, .. } = self;
        for chunk in staging.chunks_mut(FETCHES) {
            let wanted = |staged: &Staged<H>| matches!(staged.plan, Plan::Fetch(_));
            if !chunk.iter().any(wanted) {
                continue;
            }
            for staged in chunk.iter_mut().filter(|staged| wanted(staged)) {
                if staged.packet.grow(pools).is_none() {
                    staged.plan = Plan::Drop;
                    if let Some(vif) = vif_at(vifs, staged.from) {
                        vif.ended.tx_drops.no_buffer += 1;
                    }
                }
            }
            let mut copies = ops.begin();
            for Staged { packet, plan, copies: range, .. } in chunk.iter_mut() {
                if !matches!(plan, Plan::Fetch(_)) {
                    continue;
                }
                let private = packet.bytes().len();
                let open = packet.unfilled().and_then(|(to, token)| Some((to, table.get(token)?)));
                let added =
                    open.map(|(to, open)| pull(&mut copies, open.domain, &open.chain, private, to));
                match added {
                    Some(Ok(added)) => *range = added,
                    Some(Err(_)) | None => *plan = Plan::Drop,
                }
            }
            let outcome = copies.submit(hv);
            for Staged { packet, plan, copies, .. } in chunk {
                let Plan::Fetch(to) = *plan else { continue };
                *plan = Plan::Drop;
                let Some(open) = packet.take_token().and_then(|token| table.take(token)) else {
                    continue;
                };
                let status = outcome.map(|results| results.of(*copies));
                let Some((tx, found)) = source(vifs, &open) else { continue };
                tx.paths.count(Datapath::Copy, |counters| {
                    counters.hypercalls += 1;
                    counters.copies += copies.len() as u64;
                });
                let answer = match status {
                    Ok(Ok(())) => {
                        packet.is_filled();
                        packet.path = Datapath::Copy;
                        tx.count(Datapath::Copy, packet.len());
                        *plan = Plan::Forward(to);
                        TxStatus::OKAY
                    }
                    Ok(Err(_)) => {
                        tx.drops.grant += 1;
                        TxStatus::ERROR
                    }
                    Err(_) => {
                        tx.drops.hypercall += 1;
                        TxStatus::ERROR
                    }
                };
                *found = found.or(tx.answer(open.chain.answers, answer).err());
            }
        }
    }

    /// Sends a packet of the local port's.
    pub(crate) fn route(&mut self, mut packet: Packet<H>, from: PortId, now: Instant) {
        if let Plan::Forward(to) = self.plan(&mut packet, from, now) {
            self.forward(packet, from, to, now);
        }
    }

    fn forward(&mut self, packet: Packet<H>, from: PortId, to: Destination, now: Instant) {
        match to {
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
            let vif = vif_at(&mut self.vifs, to);
            let open = to == PortId::LOCAL || vif.is_some_and(|vif| !vif.queues.is_empty());
            if to == from || !open {
                continue;
            }
            if let Some(before) = last.replace(to) {
                match self.pools.duplicate(&packet) {
                    Some(mut copy) => {
                        self.target(&mut copy, before);
                        self.deliver(copy, from, before, now);
                    }
                    None => {
                        if let Some(vif) = vif_at(&mut self.vifs, before) {
                            vif.ended.rx_drops.no_buffer += 1;
                        }
                    }
                }
            }
        }
        if let Some(to) = last {
            let mut packet = packet;
            self.target(&mut packet, to);
            self.deliver(packet, from, to, now);
        }
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
            if let Some(vif) = vif_at(vifs, from) {
                vif.ended.tx_drops.unreachable += 1;
            }
            return;
        };
        let dst = packet.bytes().first_chunk::<6>().copied().map_or(MacAddr::BROADCAST, MacAddr);
        if !vif.filter.passes(dst) {
            vif.ended.rx_drops.filtered += 1;
            return;
        }
        let features = vif.features;
        let Some(queue) = vif.queues.get_mut(packet.to_queue) else {
            vif.ended.rx_drops.unreachable += 1;
            return;
        };
        if !packet.is_whole() {
            return queue.rx.enqueue(packet, usize::MAX);
        }
        let taker = Taker { features, room: queue.rx.room() };
        let enqueue = |packet| {
            let free = pools.free_like(&packet);
            queue.rx.enqueue(packet, free);
        };
        match fit(packet, taker, pools, now, enqueue) {
            Fit::Done => {}
            Fit::TooBig => vif.ended.rx_drops.too_big += 1,
            Fit::NoBuffer => vif.ended.rx_drops.no_buffer += 1,
        }
    }

    /// Copies what has waited for the local port too long, or whose vif is to go, so that its guest has its pages back.
    pub(crate) fn recall(&mut self, now: Instant) {
        let Self { local, vifs, pools, config, .. } = self;
        local.retain_mut(|packet| {
            let Some((origin, since)) = packet.lent_by() else { return true };
            let vif = vif_at(vifs, origin.port);
            let leaves = vif.as_ref().is_none_or(|vif| vif.queues.is_empty());
            if !leaves && now < since.after(config.policy.hold) {
                return true;
            }
            let kept = packet.make_whole(pools);
            if let Some(vif) = vif {
                vif.ended.fallbacks.overdue += 1;
                vif.ended.tx_drops.no_buffer += u64::from(!kept);
            }
            kept
        });
    }

    /// Unmaps what is no longer read, and answers for it and for what could not be delivered.
    pub(crate) fn take_back(&mut self) {
        let Self { table, vifs, scratch, mapper, map_ops, .. } = self;
        while let Some(returned) = table.returned() {
            match returned {
                Returned::Token(token) => {
                    if let Some(open) = table.take(token) {
                        answer(vifs, open);
                    }
                }
                Returned::Pages(pages) => scratch.returned.push(pages),
            }
        }
        if scratch.returned.is_empty() {
            return;
        }
        let Scratch { returned, unmapped, .. } = scratch;
        unmapped.clear();
        let leaving = returned.iter_mut().flat_map(|pages| core::mem::take(&mut pages.pages));
        mapper.unmap_each(map_ops, leaving.map(|lent| lent.page), |result| {
            unmapped.push(result.is_ok());
        });
        let mut unmapped = unmapped.drain(..);
        for mut pages in returned.drain(..) {
            // All of them, whether or not one is parked.
            let parked = unmapped.by_ref().take(pages.count).filter(|unmapped| !unmapped).count();
            let vif = pages.origin.and_then(|origin| vif_at(vifs, origin.port).zip(Some(origin)));
            if let Some((vif, origin)) = vif.filter(|(vif, origin)| vif.life == origin.life) {
                vif.lent = vif.lent.saturating_sub(1);
                if parked > 0 {
                    vif.found = vif.found.or(Some(VifFault::Unmap));
                }
                if let Some(queue) = vif.queues.get_mut(usize::from(origin.queue)) {
                    queue.tx.paths.count(pages.path, |counters| {
                        counters.hypercalls += 1;
                        counters.unmaps += pages.count as u64;
                    });
                }
            }
            if let Some(open) = pages.token.take().and_then(|token| table.take(token)) {
                answer(vifs, open);
            }
            table.keep(pages);
        }
    }

    /// Shows each guest what was done, ends the events whose work that was, and closes those vifs that cannot go on.
    fn finish(&mut self, client: &mut Client, now: Instant) {
        let Self { vifs, mapper, binder, notices, features, hv, config, .. } = self;
        let grant_copy = config.facts.grant_copy;
        for vif in vifs.iter_mut().flatten() {
            for queue in &mut vif.queues {
                queue.publish();
                queue.end_events(now);
            }
            if let Some(control) = &mut vif.control {
                control.end_event(now);
            }
            if !vif.queues.is_empty() {
                vif.set_carrier(!vif.queues.iter().any(|queue| queue.rx.is_stalled()), client);
            }
            let around =
                &mut Around { client, mapper, binder, notices, features, hv, grant_copy, now };
            if let Some(fault) = vif.found.take() {
                vif.fault(Some(fault), around);
            }
            vif.settle(around);
        }
    }
}

/// The queue that a chain was taken from, if it is still there, and where to note that its vif cannot go on.
fn source<'v, H: Hypervisor>(
    vifs: &'v mut [Option<Vif<H>>],
    open: &Open,
) -> Option<(&'v mut crate::tx::TxQueue<H>, &'v mut Option<VifFault>)> {
    queue_of(vifs, open.origin.port, open.origin.queue)
}

fn queue_of<H: Hypervisor>(
    vifs: &mut [Option<Vif<H>>],
    port: PortId,
    queue: u16,
) -> Option<(&mut crate::tx::TxQueue<H>, &mut Option<VifFault>)> {
    let vif = vif_at(vifs, port)?;
    Some((&mut vif.queues.get_mut(usize::from(queue))?.tx, &mut vif.found))
}

/// Answers a chain whose packet was taken, whatever became of it then.
fn answer<H: Hypervisor>(vifs: &mut [Option<Vif<H>>], open: Open) {
    if let Some((tx, found)) = source(vifs, &open) {
        *found = found.or(tx.answer(open.chain.answers, TxStatus::OKAY).err());
    }
}

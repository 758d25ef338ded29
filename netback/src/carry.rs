//! Where each packet of a round goes, and how: the switch, the choice of a datapath, and what that takes.

use features::XenFeatures;
use grant::{CopyRange, MapRequest};
use hypercall::{Hypervisor, Instant};
use netif::mac::MacAddr;
use netif::slot::TxStatus;

use crate::backend::{Backend, port_of, vif_at};
use crate::datapath::{Datapath, Datapaths, Fallback, Target, choose};
use crate::deliver::{Fit, Taker, fit, takes_as_is};
use crate::packet::{Packet, Rest};
use crate::round::{COPIES, queue_of, source};
use crate::switch::{Destination, Learned, PortId};
use crate::tx::{COPIES_PER_PACKET, pull, rest_of};

/// Packets whose rest is copied by one hypercall.
const FETCHES: usize = COPIES / COPIES_PER_PACKET;

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
    pub(crate) fn new(packet: Packet<H>, from: PortId) -> Self {
        Self { packet, from, plan: Plan::Drop, copies: CopyRange::default() }
    }
}

impl<H: Hypervisor> Backend<H> {
    /// Sends on what has come.
    pub(crate) fn carry(&mut self, now: Instant, tap: &mut impl FnMut(&Packet<H>)) {
        for queue in self.vifs.iter_mut().flatten().flat_map(|vif| &mut vif.queues) {
            queue.rx.count_waiting();
        }
        let mut staging = core::mem::take(&mut self.scratch.staging);
        let mut later = core::mem::take(&mut self.scratch.later);
        for mut staged in staging.drain(..) {
            tap(&staged.packet);
            match self.plan(&mut staged.packet, staged.from, now) {
                // What is behind one that has to wait waits with it: order matters.
                Plan::Forward(to) if later.is_empty() => {
                    self.forward(staged.packet, staged.from, to, now);
                }
                Plan::Drop => {}
                plan => {
                    staged.plan = plan;
                    later.push(staged);
                }
            }
        }
        if !later.is_empty() {
            self.map(&mut later, now);
            self.fetch(&mut later);
            for staged in later.drain(..) {
                match staged.plan {
                    Plan::Forward(to) => self.forward(staged.packet, staged.from, to, now),
                    Plan::Fetch(_) | Plan::Map(..) | Plan::Drop => {}
                }
            }
        }
        (self.scratch.staging, self.scratch.later) = (staging, later);
    }

    /// Decides where a packet goes, and how.
    fn plan(&mut self, packet: &mut Packet<H>, from: PortId, now: Instant) -> Plan {
        let Some((&dst, rest)) = packet.bytes().split_first_chunk::<6>() else { return Plan::Drop };
        let Some(&src) = rest.first_chunk::<6>() else { return Plan::Drop };
        if self.switch.learn(MacAddr(src), from, now) == Learned::Refused {
            if let Some(vif) = vif_at(&mut self.vifs, from) {
                vif.ended.tx_drops.spoofed += 1;
            } else if from == PortId::UPLINK {
                self.switch_counters.uplink_spoofed += 1;
            }
            return Plan::Drop;
        }
        let room = self.table.spare() > self.planned_maps;
        let to = self.switch.lookup(MacAddr(dst), now);
        let target = match to {
            Destination::Port(to) if to == from => {
                self.switch_counters.hairpin += 1;
                return Plan::Drop;
            }
            Destination::Port(PortId::LOCAL) => Target::Local { room },
            Destination::Port(PortId::UPLINK) => Target::Uplink { room },
            Destination::Port(to) => self.target(packet, to),
            Destination::Flood => Target::Many,
        };
        if from.is_own() || packet.path == Datapath::Static {
            return Plan::Forward(to);
        }
        let size = u16::try_from(packet.len()).unwrap_or(u16::MAX);
        let choice = choose(self.modes.up(), &self.config.policy, size, target);
        let by_reference = matches!(choice, Ok(path) if path != Datapath::Copy);
        let whole = packet.is_whole();
        if (choice.is_err() || by_reference)
            && let Some((tx, _)) = queue_of(&mut self.vifs, from, packet.flow.0)
        {
            match choice {
                Err(why) => {
                    tx.fallbacks.count(why);
                    // A short wait for pages is not worth guessing; what it costs is one more hypercall.
                    tx.wanted_whole |= why != Fallback::NotReady && !whole;
                }
                Ok(_) => tx.wanted_whole = false,
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
        let (features, count) = (vif.features, u16::try_from(vif.queues.len()).unwrap_or(u16::MAX));
        let steered = vif.control.as_ref().and_then(|control| control.steer(packet.bytes()));
        // Its frontend's wish; else as the sender spread them.
        let index = steered.map_or(packet.flow.0, |steered| steered.queue);
        packet.hash = steered.and_then(|steered| steered.hash);
        // Dividing is slow, and mostly not needed.
        packet.to_queue = if index < count { index } else { index.checked_rem(count).unwrap_or(0) };
        let Some(queue) = vif.queues.get_mut(usize::from(packet.to_queue)) else {
            return Target::Guest { ready: false, as_is: false };
        };
        if !self.modes.up().local.contains(Datapaths::DIRECT) {
            // Nobody is to know then whether there are pages for it.
            return Target::Guest { ready: false, as_is: false };
        }
        queue.rx.promise(packet);
        if packet.len() < self.config.policy.direct_from.into() {
            // It is copied, whatever the guest can take.
            return Target::Guest { ready: false, as_is: false };
        }
        let ready = queue.rx.is_ready();
        vif.found = vif.found.or(ready.err());
        let taker = Taker { features, room: queue.rx.room() };
        Target::Guest { ready: ready == Ok(true), as_is: takes_as_is(packet, taker) }
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
            let slots = rest_of(&open.chain.slots, private);
            slots.map(move |(gref, ..)| MapRequest { domain, gref, read_only: true })
        });
        mapper.map_batch(map_ops, requests, |result| scratch.mapped.push(result));
        // The identity mapping is there if the bit was while Xen mapped. It may have gone since it was last read. Other
        // mappings do not hang on a bit, and are not worth a call.
        let relies =
            |staged: &Staged<H>| matches!(staged.plan, Plan::Map(_, Datapath::MapIdentity));
        let identity = staging.iter().any(relies)
            && features
                .refresh(hv)
                .is_ok_and(|snapshot| snapshot.has(XenFeatures::GRANT_MAP_IDENTITY));
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
            for (_, offset, len) in rest_of(&open.chain.slots, packet.bytes().len()) {
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
                let added = open.map(|(to, open)| {
                    pull(&mut copies, open.domain, &open.chain.slots, private, to)
                });
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

    /// Sends a packet of the local port's, or the uplink's.
    pub(crate) fn route(&mut self, mut packet: Packet<H>, from: PortId, now: Instant) {
        if let Plan::Forward(to) = self.plan(&mut packet, from, now) {
            self.forward(packet, from, to, now);
        }
    }

    #[inline]
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
        let own = [PortId::LOCAL, PortId::UPLINK];
        for to in own.into_iter().chain((0..self.vifs.len()).map(port_of)) {
            let open = match to {
                PortId::LOCAL => true,
                PortId::UPLINK => self.config.facts.uplink.is_some(),
                _ => vif_at(&mut self.vifs, to).is_some_and(|vif| !vif.queues.is_empty()),
            };
            if to == from || !open {
                continue;
            }
            if let Some(before) = last.replace(to) {
                match self.pools.duplicate(&packet) {
                    Some(mut copy) => {
                        self.target(&mut copy, before);
                        self.deliver(copy, from, before, now);
                    }
                    None => match (before, vif_at(&mut self.vifs, before)) {
                        (PortId::LOCAL, _) => self.switch_counters.local_no_buffer += 1,
                        (PortId::UPLINK, _) => self.switch_counters.uplink_no_buffer += 1,
                        (_, Some(vif)) => vif.ended.rx_drops.no_buffer += 1,
                        (_, None) => {}
                    },
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
        if to.is_own() {
            let Self { local, uplink, switch_counters, .. } = self;
            let (queue, full) = match to {
                PortId::LOCAL => (local, &mut switch_counters.local_full),
                _ => (uplink, &mut switch_counters.uplink_full),
            };
            let taken = self.pools.can_spare(&packet) && queue.push(from, packet);
            *full += u64::from(!taken);
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
        let Some(queue) = vif.queues.get_mut(usize::from(packet.to_queue)) else {
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
}

//! Carrying packets: one round takes requests from all rings, does their copies and those of what the round before left to
//! be delivered in one hypercall, and decides where each packet goes and how.

use alloc::boxed::Box;
use alloc::vec::Vec;

use grant::{CopyRange, MapError, Mapping, PeerSpan};
use hypercall::{GrantRef, Hypervisor, Instant};
use netif::slot::TxStatus;
use xenbus::client::Client;

use crate::backend::{Backend, TICK, vif_at};
use crate::carry::Staged;
use crate::ctrl::Control;
use crate::datapath::{Datapath, Datapaths, possible};
use crate::fault::VifFault;
use crate::lent::{Open, Pages, Returned};
use crate::packet::Packet;
use crate::rx::Relayed;
use crate::switch::PortId;
use crate::tx::{Statics, Take, rest_of};
use crate::vif::Vif;

/// Copies per hypercall at most.
pub(crate) const COPIES: usize = 2048;

/// Nanoseconds that static pages stay mapped while they are not to be used: a withdrawal that is taken back at once costs
/// nothing.
const STATIC_LINGER: u64 = 10_000_000;

/// Room that is used anew in each round.
pub(crate) struct Scratch<H: Hypervisor> {
    pub(crate) staging: Vec<Staged<H>>,
    /// Of those, what has to be mapped or copied first, and what is behind it.
    pub(crate) later: Vec<Staged<H>>,
    relayed: Vec<Relayed>,
    pub(crate) mapped: Vec<Result<Mapping<H>, MapError>>,
    returned: Vec<Box<Pages<H>>>,
    unmapped: Vec<bool>,
}

impl<H: Hypervisor> Scratch<H> {
    pub(crate) fn new() -> Self {
        Self {
            staging: Vec::with_capacity(256),
            later: Vec::with_capacity(256),
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
        let tick = now >= self.next_tick;
        if tick {
            self.next_tick = now.after(TICK);
            self.mapper.retry_parked(&mut self.map_ops);
            // Nobody says when something comes back, nor when something goes that no map hangs on.
            let _ = self.refresh_features();
        }
        self.update_modes(now);
        for vif in self.vifs.iter_mut().flatten() {
            vif.wake_if_due(client, now);
            for queue in &mut vif.queues {
                queue.begin(tick, now);
            }
        }
        self.remove_closed(client, now);
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
        self.has_more() || (waits && self.pools.any_of_each())
    }

    fn has_more(&self) -> bool {
        self.queues().any(|queue| queue.has_more())
    }

    /// Looks at what may be used.
    fn update_modes(&mut self, now: Instant) {
        let bits = self.features.snapshot().bits();
        let policy = &self.config.policy;
        let allowed = policy.allowed - self.withdrawn;
        self.modes.update(possible(bits, &self.config.facts) & allowed, policy, now);
    }

    fn serve_controls(&mut self, tick: bool, now: Instant) {
        let keeps = self.modes.up().any().contains(Datapaths::STATIC);
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
        let (up, policy, openings) = (modes.up().any(), &config.policy, table.room());
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
        let up = modes.up().any();
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
        for vif in vifs.iter_mut().flatten().filter(|vif| vif.found.is_none()) {
            let Vif { queues, found, .. } = vif;
            for queue in queues {
                if queue.rx.is_busy() {
                    let settled = queue.rx.settle(outcome, table, &mut scratch.relayed);
                    *found = found.or(settled.err());
                }
                if queue.tx.is_busy() {
                    let settled = queue.tx.settle(outcome, table, now, &mut scratch.staging);
                    *found = found.or(settled.err());
                }
            }
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
        for (gref, offset, _) in rest_of(&open.chain.slots, 0) {
            let (byte, behind) = to.split_at(1);
            to = behind;
            let Ok(copy) = copies.pull(PeerSpan { domain: open.domain, gref, offset }, byte) else {
                return false;
            };
            range = range.with(copy);
        }
        copies.submit(&self.hv).is_ok_and(|results| results.of(range).is_ok())
    }

    /// Copies what has waited at the local port or the uplink too long, or whose vif is to go, so that its guest has its pages back.
    pub(crate) fn recall(&mut self, now: Instant) {
        let Self { local, uplink, vifs, pools, config, .. } = self;
        let mut keep = |packet: &mut Packet<H>| {
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
        };
        local.retain(&mut keep);
        uplink.retain(keep);
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
        for vif in self.vifs.iter_mut().flatten() {
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
        }
        self.each_vif(client, now, |vif, around| {
            if let Some(fault) = vif.found.take() {
                vif.fault(Some(fault), around);
            }
            vif.settle(around);
            false
        });
    }
}

/// The queue that a chain was taken from, if it is still there, and where to note that its vif cannot go on.
pub(crate) fn source<'v, H: Hypervisor>(
    vifs: &'v mut [Option<Vif<H>>],
    open: &Open,
) -> Option<(&'v mut crate::tx::TxQueue<H>, &'v mut Option<VifFault>)> {
    queue_of(vifs, open.origin.port, open.origin.queue)
}

pub(crate) fn queue_of<H: Hypervisor>(
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

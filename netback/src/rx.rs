//! To the guest: packets wait in a bounded queue until the guest has posted pages for them.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use grant::{CopyBatch, CopyRange, CopyResults, Mapping, PeerSpan, SharedMemory};
use hypercall::{DomId, Errno, GrantRef, Hypervisor, Instant, PAGE_SIZE, PageOffset};
use netif::ring::{Notify, RxBackRing};
use netif::rx::{RxPacket, failed};
use netif::slot::RxRequest;
use netif::tx::MAX_SLOTS;

use crate::counters::{CopyCount, Direction, Drops, Paths};
use crate::datapath::{Datapath, Datapaths};
use crate::fault::{Refusals, VifFault};
use crate::lent::{Open, Origin, Table};
use crate::packet::{Packet, Rest};
use crate::stall::Stall;
use crate::tx::{Pieces, Statics, pieces, rest_of};

/// Packets per hypercall at most.
const BATCH: usize = 128;
/// Requests that one packet can take: its data, and a slot for each kind of extra.
const MAX_REQUESTS: usize = MAX_SLOTS + 3;
/// Packets that may wait.
const QUEUE_PACKETS: usize = 512;
/// Nanoseconds after which a packet is not waited with any longer (`rx_drain_timeout_msecs` of Linux's netback).
const EXPIRY: u64 = 10_000_000_000;

struct InFlight<H: Hypervisor> {
    packet: Packet<H>,
    /// How many of the batch's requests are its.
    slots: u16,
    copies: CopyRange,
    path: Datapath,
}

/// A packet that went from guest to guest by reference: its sender is to be answered.
pub(crate) struct Relayed {
    pub(crate) open: Open,
    /// The queue that it went to.
    pub(crate) to: Origin,
    pub(crate) len: usize,
    pub(crate) copies: usize,
    /// It did not arrive: one of the two has granted what cannot be copied.
    pub(crate) failed: bool,
}

/// One queue's way to the guest.
pub(crate) struct RxQueue<H: Hypervisor> {
    domain: DomId,
    origin: Origin,
    ring: RxBackRing<Mapping<H>>,
    /// With the requests that each takes.
    waiting: VecDeque<(Packet<H>, u16)>,
    /// How many of them are in large buffers.
    waiting_large: usize,
    /// Requests that all of them take.
    waiting_slots: usize,
    /// Requests that those which wait will take, and those that are about to.
    promised: usize,
    headroom: PageOffset,
    stall: Stall,
    /// Requests that the guest had not posted when it was last found short of them.
    lacking: u32,
    batch: Vec<InFlight<H>>,
    /// What the batch's packets go to, in their order.
    requests: Vec<RxRequest>,
    refusals: Refusals,
    answered: bool,
    pub(crate) counters: Direction,
    pub(crate) drops: Drops,
    pub(crate) paths: Paths,
}

impl<H: Hypervisor> RxQueue<H> {
    pub(crate) fn new(
        domain: DomId,
        origin: Origin,
        ring: RxBackRing<Mapping<H>>,
        headroom: PageOffset,
    ) -> Self {
        Self {
            domain,
            origin,
            ring,
            waiting: VecDeque::with_capacity(QUEUE_PACKETS),
            waiting_large: 0,
            waiting_slots: 0,
            promised: 0,
            headroom,
            stall: Stall::default(),
            lacking: 0,
            batch: Vec::with_capacity(BATCH),
            requests: Vec::with_capacity(RxBackRing::<Mapping<H>>::ENTRIES as usize),
            refusals: Refusals::default(),
            answered: false,
            counters: Direction::default(),
            drops: Drops::default(),
            paths: Paths::default(),
        }
    }

    pub(crate) fn into_mapping(self) -> Mapping<H> {
        self.ring.into_inner()
    }

    /// Bytes that the guest wants free at the start of each page, from now on.
    pub(crate) fn set_headroom(&mut self, headroom: PageOffset) {
        self.headroom = headroom;
        self.waiting_slots = 0;
        let mut waiting = core::mem::take(&mut self.waiting);
        for (packet, slots) in &mut waiting {
            *slots = self.slots(packet);
            self.waiting_slots += usize::from(*slots);
        }
        self.waiting = waiting;
    }

    /// Bytes that one page of the guest's takes.
    pub(crate) fn room(&self) -> usize {
        self.headroom.room()
    }

    /// Requests that a packet takes.
    fn slots(&self, packet: &Packet<H>) -> u16 {
        let shape = shape(packet, self.headroom, &[]);
        let slots = if keeps_pieces(packet, self.headroom) {
            usize::from(packet.pieces) + shape.extras()
        } else {
            shape.slots()
        };
        // A packet has 64 KiB at most, and a page room for some bytes.
        u16::try_from(slots).unwrap_or(u16::MAX)
    }

    /// Forgets what was promised but for packets that wait.
    pub(crate) fn count_waiting(&mut self) {
        self.promised = self.waiting_slots;
    }

    /// One more packet will come, behind all that wait and all that this was called for.
    pub(crate) fn promise(&mut self, packet: &Packet<H>) {
        self.promised += usize::from(self.slots(packet));
    }

    /// Whether the guest has pages for all that will come.
    pub(crate) fn is_ready(&mut self) -> Result<bool, VifFault> {
        let posted = usize::try_from(self.ring.poll()?).unwrap_or(0);
        Ok(self.promised <= posted)
    }

    /// Whether the guest takes nothing, so that nothing is kept for it.
    pub(crate) fn is_stalled(&self) -> bool {
        self.stall.is_stalled()
    }

    /// Puts a packet in the queue, or drops it if the queue is full or the guest takes nothing. A queue may hold no more buffers of a size than are
    /// `free`: then any number of guests that take nothing leave the others as much as one of them has
    /// (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998).
    pub(crate) fn enqueue(&mut self, packet: Packet<H>, free: usize) {
        if self.is_stalled() {
            self.drops.stalled += 1;
            return;
        }
        let large = packet.is_large();
        let held = if large { self.waiting_large } else { self.waiting.len() - self.waiting_large };
        if self.waiting.len() >= QUEUE_PACKETS || held > free {
            self.drops.queue_full += 1;
            return;
        }
        let slots = self.slots(&packet);
        self.waiting_large += usize::from(large);
        self.waiting_slots += usize::from(slots);
        self.waiting.push_back((packet, slots));
    }

    fn dequeue(&mut self) -> Option<Packet<H>> {
        let (packet, slots) = self.waiting.pop_front()?;
        self.waiting_large -= usize::from(packet.is_large());
        self.waiting_slots -= usize::from(slots);
        Some(packet)
    }

    /// Whether packets were taken from the queue that are not settled.
    pub(crate) fn is_busy(&self) -> bool {
        !self.batch.is_empty()
    }

    /// When the oldest packet is given up.
    fn expiry(&self) -> Option<Instant> {
        self.waiting.front().map(|(packet, _)| packet.arrived.after(EXPIRY))
    }

    /// When [`gather`](Self::gather) has something to do though nothing happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        [self.expiry(), self.stall.deadline()].into_iter().flatten().min()
    }

    /// Whether the guest has posted so many requests; if not, it is asked to notify when it has.
    #[inline]
    fn has_posted(&mut self, slots: usize, now: Instant) -> Result<bool, VifFault> {
        // It was not short of any when last looked at, so there is nothing to end.
        if self.lacking == 0 && self.ring.available() as usize >= slots {
            return Ok(true);
        }
        self.look_for(slots, now)
    }

    fn look_for(&mut self, slots: usize, now: Instant) -> Result<bool, VifFault> {
        self.lacking = u32::try_from(slots).unwrap_or(u32::MAX);
        if self.ring.available() >= self.lacking || self.ring.arm_for(self.lacking)? {
            self.stall.served();
            self.lacking = 0;
            return Ok(true);
        }
        if self.stall.starved(now) {
            while self.dequeue().is_some() {
                self.drops.stalled += 1;
            }
        }
        Ok(false)
    }

    /// Shows the guest what was delivered, if anything was.
    pub(crate) fn publish(&mut self) -> Option<Notify> {
        core::mem::take(&mut self.answered).then(|| {
            self.counters.publishes += 1;
            self.ring.publish()
        })
    }

    /// Matches what waits with what the guest has posted; `room` is the copies that the batch has room for. The rest waits:
    /// the guest is asked to notify when it has posted enough.
    pub(crate) fn gather(
        &mut self,
        table: &Table<H>,
        now: Instant,
        room: &mut usize,
    ) -> Result<(), VifFault> {
        while self.expiry().is_some_and(|at| at <= now) {
            self.drops.expired += u64::from(self.dequeue().is_some());
        }
        if self.waiting.is_empty() && self.lacking > 0 {
            // What it was short for has expired, and it may still be short.
            self.has_posted(usize::try_from(self.lacking).unwrap_or(usize::MAX), now)?;
        }
        while let Some((front, slots)) = self.waiting.front() {
            let (requests, slots, open) = (*slots, usize::from(*slots), open_of(front, table));
            if slots > MAX_REQUESTS {
                self.drops.too_big += u64::from(self.dequeue().is_some());
                continue;
            }
            // Each slot begins a copy, and so does each page of our buffer.
            let copies = match open {
                None => slots + front.len().div_ceil(PAGE_SIZE),
                Some(open) => slots + open.chain.slots.len() + 1,
            };
            if self.batch.len() >= BATCH || copies > *room {
                break;
            }
            let gone = open.is_none() && matches!(front.rest, Rest::Taken(_));
            if !self.has_posted(slots, now)? {
                break;
            }
            let Some(packet) = self.dequeue() else { break };
            if gone {
                // Its sender's rings are, and its pages with them.
                self.drops.unreachable += 1;
                continue;
            }
            *room -= copies;
            for _ in 0..slots {
                let Some(request) = self.ring.take() else { break };
                self.requests.push(request);
            }
            let (copies, path) = (CopyRange::default(), Datapath::Copy);
            self.batch.push(InFlight { packet, slots: requests, copies, path });
        }
        Ok(())
    }

    /// Adds the copies of what was gathered; to pages that stay mapped is written at once.
    pub(crate) fn add<'f>(
        &'f mut self,
        copies: &mut CopyBatch<'_, 'f>,
        table: &Table<H>,
        statics: &impl Statics<H>,
        up: Datapaths,
    ) -> Result<(), VifFault> {
        let Self { domain, batch, requests: behind, headroom, .. } = self;
        let (domain, mut behind) = (*domain, behind.as_slice());
        for InFlight { packet, slots, copies: range, path } in batch {
            let (requests, rest) = behind.split_at_checked((*slots).into()).unwrap_or_default();
            behind = rest;
            // Most packets lie in one buffer and go to one page.
            if let [request] = requests
                && packet.is_whole()
                && !up.contains(Datapaths::STATIC)
            {
                let bytes = packet.frame().span().split_at(packet.len()).0;
                let to = PeerSpan { domain, gref: request.gref, offset: *headroom };
                *range = copies.deliver(bytes, to)?;
                continue;
            }
            let open = open_of(packet, table);
            let pieces = pieces_of(packet, *headroom, open);
            let shape = shape(packet, *headroom, &pieces);
            let parts = (0..).zip(requests.iter()).filter_map(|(slot, request)| {
                let part = shape.part(slot)?;
                Some((PeerSpan { domain, gref: request.gref, offset: part.offset }, part.len))
            });
            if let Some(open) = open {
                *path = Datapath::Direct;
                *range = relay(copies, packet, open, parts)?;
                continue;
            }
            let writable = |request: &RxRequest| statics.page(request.gref, true).is_some();
            if up.contains(Datapaths::STATIC) && requests.iter().all(writable) {
                *path = Datapath::Static;
                let mut from = packet.bytes();
                for (to, len) in parts {
                    let Some((part, rest)) = from.split_at_checked(len.into()) else { break };
                    from = rest;
                    if let Some(page) = statics.page(to.gref, true) {
                        page.write_bytes(to.offset.get().into(), part);
                    }
                }
                continue;
            }
            let mut from = packet.frame().span();
            for (to, len) in parts {
                let (bytes, rest) = from.split_at(len.into());
                from = rest;
                *range = range.with(copies.deliver(bytes, to)?);
            }
        }
        Ok(())
    }

    /// Tells the guest what arrived. What came from another guest by reference goes to `relayed`.
    pub(crate) fn settle(
        &mut self,
        outcome: Result<CopyResults<'_>, Errno>,
        table: &mut Table<H>,
        relayed: &mut Vec<Relayed>,
    ) -> Result<(), VifFault> {
        let results = self.refusals.judge(outcome)?;
        self.answered |= !self.batch.is_empty();
        let Self { ring, origin, batch, requests: behind, counters, drops, paths, .. } = self;
        let headroom = self.headroom;
        let mut behind = behind.drain(..);
        let mut count = CopyCount::default();
        for InFlight { mut packet, slots, copies, path } in batch.drain(..) {
            count.add(path, copies.len());
            let pieces = pieces_of(&packet, headroom, open_of(&packet, table));
            let shape = shape(&packet, headroom, &pieces);
            let arrived = match results {
                _ if path == Datapath::Static => true,
                None => {
                    drops.hypercall += 1;
                    false
                }
                Some(results) => results.of(copies).is_ok(),
            };
            for slot in 0..usize::from(slots) {
                let Some(request) = behind.next() else { break };
                let response = if arrived { shape.response(slot, request.id) } else { None };
                ring.push(response.unwrap_or(failed(request.id)))?;
            }
            let len = packet.len();
            if arrived {
                counters.packets += 1;
                counters.bytes += len as u64;
                counters.gso_packets += u64::from(packet.gso.is_some());
                paths.count(path, |counters| {
                    counters.packets += 1;
                    counters.bytes += len as u64;
                });
            }
            match packet.take_token() {
                Some(token) => {
                    let Some(open) = table.take(token) else { continue };
                    let copies = copies.len();
                    // Nobody is to blame where Xen did not look.
                    let failed = !arrived && results.is_some();
                    relayed.push(Relayed { open, to: *origin, len, copies, failed });
                }
                None => drops.grant += u64::from(!arrived && results.is_some()),
            }
        }
        paths.count_hypercalls(count);
        Ok(())
    }
}

/// Whether each piece of a packet's sender goes to a page of its own. With room left free in each page they would not all fit.
fn keeps_pieces<H: Hypervisor>(packet: &Packet<H>, headroom: PageOffset) -> bool {
    packet.pieces > 0 && headroom == PageOffset::ZERO && matches!(packet.rest, Rest::Taken(_))
}

/// These pieces, or none.
fn pieces_of<H: Hypervisor>(
    packet: &Packet<H>,
    headroom: PageOffset,
    open: Option<&Open>,
) -> Pieces {
    match open.filter(|_| keeps_pieces(packet, headroom)) {
        Some(open) => pieces(&open.chain, packet.bytes().len()),
        None => Pieces::new(),
    }
}

/// A packet as its guest is to get it, with so much left free in each page.
fn shape<'p, H: Hypervisor>(
    packet: &Packet<H>,
    headroom: PageOffset,
    pieces: &'p [u16],
) -> RxPacket<'p> {
    RxPacket {
        pieces,
        len: u16::try_from(packet.len()).unwrap_or(u16::MAX),
        headroom,
        checksum: packet.checksum,
        gso: packet.gso,
        hash: packet.hash,
    }
}

/// The open chain that a packet's rest is in.
fn open_of<'t, H: Hypervisor>(packet: &Packet<H>, table: &'t Table<H>) -> Option<&'t Open> {
    match &packet.rest {
        Rest::Taken(token) => table.get(token),
        Rest::None | Rest::Lent(_) => None,
    }
}

/// Adds copies of a packet's own bytes, and behind them of its sender's, into the `parts` of another guest.
fn relay<'f, H: Hypervisor>(
    copies: &mut CopyBatch<'_, 'f>,
    packet: &'f Packet<H>,
    open: &Open,
    parts: impl Iterator<Item = (PeerSpan, u16)>,
) -> Result<CopyRange, VifFault> {
    let mut range = CopyRange::default();
    let private = packet.bytes().len();
    let mut own = packet.frame().span().split_at(private).0;
    let mut rest = rest_of(&open.chain.slots, private);
    let mut piece: Option<(GrantRef, PageOffset, u16)> = None;
    for (mut to, mut left) in parts {
        while left > 0 {
            let step = if own.is_empty() {
                let Some((gref, offset, len)) = piece.take().or_else(|| rest.next()) else { break };
                let step = left.min(len);
                range = range.with(copies.relay(
                    PeerSpan { domain: open.domain, gref, offset },
                    to,
                    step,
                )?);
                if let (Some(offset), Some(len @ 1..)) =
                    (after(offset, step), len.checked_sub(step))
                {
                    piece = Some((gref, offset, len));
                }
                step
            } else {
                let (bytes, behind) = own.split_at(usize::from(left).min(own.len()));
                let step = u16::try_from(bytes.len()).unwrap_or(left);
                own = behind;
                range = range.with(copies.deliver(bytes, to)?);
                step
            };
            left -= step;
            if let Some(offset) = after(to.offset, step) {
                to.offset = offset;
            }
        }
    }
    Ok(range)
}

fn after(offset: PageOffset, step: u16) -> Option<PageOffset> {
    PageOffset::new(offset.get().checked_add(step)?)
}

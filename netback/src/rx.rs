//! To the guest: packets wait in a bounded queue until the guest has posted pages for them.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use grant::{CopyOps, CopyRange, Mapping, PeerSpan};
use hypercall::{DomId, Hypervisor, Instant, PageOffset};
use netif::ring::{Notify, RxBackRing};
use netif::rx::{RxPacket, failed};
use netif::slot::RxRequest;
use netif::tx::MAX_SLOTS;

use crate::counters::{Direction, Drops};
use crate::fault::{Refusals, VifFault};
use crate::packet::Packet;

/// Packets per hypercall at most.
const BATCH: usize = 128;
/// Copies per hypercall at most.
const COPIES: usize = 512;
/// Requests that one packet can take: its data, and a slot for each kind of extra.
const MAX_REQUESTS: usize = MAX_SLOTS + 3;
/// Packets that may wait.
const QUEUE_PACKETS: usize = 512;
/// Nanoseconds after which a packet is not waited with any longer (`rx_drain_timeout_msecs` of Linux's netback).
const EXPIRY: u64 = 10_000_000_000;

struct InFlight<H: Hypervisor> {
    packet: Packet<H>,
    shape: RxPacket,
    requests: heapless::Vec<RxRequest, MAX_REQUESTS>,
    copies: CopyRange,
}

/// One queue's way to the guest.
pub(crate) struct RxQueue<H: Hypervisor> {
    domain: DomId,
    ring: RxBackRing<Mapping<H>>,
    waiting: VecDeque<Packet<H>>,
    /// How many of them are in large buffers.
    waiting_large: usize,
    ops: CopyOps,
    batch: Vec<InFlight<H>>,
    refusals: Refusals,
    pub(crate) counters: Direction,
    pub(crate) drops: Drops,
}

impl<H: Hypervisor> RxQueue<H> {
    pub(crate) fn new(domain: DomId, ring: RxBackRing<Mapping<H>>) -> Self {
        Self {
            domain,
            ring,
            waiting: VecDeque::with_capacity(QUEUE_PACKETS),
            waiting_large: 0,
            ops: CopyOps::new(COPIES),
            batch: Vec::with_capacity(BATCH),
            refusals: Refusals::default(),
            counters: Direction::default(),
            drops: Drops::default(),
        }
    }

    pub(crate) fn into_mapping(self) -> Mapping<H> {
        self.ring.into_inner()
    }

    /// Puts a packet in the queue, or drops it if the queue is full. A queue may hold no more buffers of a size than are
    /// `free`: then any number of guests that take nothing leave the others as much as one of them has
    /// (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998).
    pub(crate) fn enqueue(&mut self, packet: Packet<H>, free: usize) {
        let large = packet.is_large();
        let held = if large { self.waiting_large } else { self.waiting.len() - self.waiting_large };
        if self.waiting.len() >= QUEUE_PACKETS || held > free {
            self.drops.queue_full += 1;
            return;
        }
        self.waiting_large += usize::from(large);
        self.waiting.push_back(packet);
    }

    fn dequeue(&mut self) -> Option<Packet<H>> {
        let packet = self.waiting.pop_front()?;
        self.waiting_large -= usize::from(packet.is_large());
        Some(packet)
    }

    /// Whether packets wait.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// When the oldest packet is given up.
    pub(crate) fn expiry(&self) -> Option<Instant> {
        self.waiting.front().map(|packet| packet.arrived.after(EXPIRY))
    }

    /// Delivers what the guest has pages for. The rest waits: the guest is asked to notify when it has posted enough.
    pub(crate) fn poll(&mut self, hv: &H, now: Instant) -> Result<Notify, VifFault> {
        let mut answered = false;
        loop {
            self.expire(now);
            let Some(front) = self.waiting.front() else { break };
            let needed = u32::try_from(shape(front).slots()).unwrap_or(u32::MAX);
            if !self.ring.arm_for(needed)? {
                break;
            }
            self.gather();
            self.copy(hv)?;
            answered = true;
        }
        if !answered {
            return Ok(Notify::NotNeeded);
        }
        self.counters.publishes += 1;
        Ok(self.ring.publish())
    }

    fn expire(&mut self, now: Instant) {
        while self.expiry().is_some_and(|at| at <= now) {
            self.drops.expired += u64::from(self.dequeue().is_some());
        }
    }

    fn gather(&mut self) {
        let mut copies = 0;
        while self.batch.len() < BATCH {
            let Some(front) = self.waiting.front() else { break };
            let shape = shape(front);
            let slots = shape.slots();
            let room = usize::try_from(self.ring.available()).unwrap_or(0);
            // Our buffers begin at a page boundary, as do the guest's: a copy per slot.
            if slots > room || copies + slots > COPIES {
                break;
            }
            let Some(packet) = self.dequeue() else { break };
            if slots > MAX_REQUESTS {
                self.drops.too_big += 1;
                continue;
            }
            copies += slots;
            let requests = self.ring.requests().take(slots).collect();
            self.batch.push(InFlight { packet, shape, requests, copies: CopyRange::default() });
        }
    }

    fn copy(&mut self, hv: &H) -> Result<(), VifFault> {
        let Self { domain, ring, ops, batch, refusals, counters, drops, .. } = self;
        let mut copies = ops.begin();
        for InFlight { packet, shape, requests, copies: range } in batch.iter_mut() {
            let mut from = packet.frame().span();
            for (slot, request) in requests.iter().enumerate() {
                let Some(part) = shape.part(slot) else { continue };
                let (bytes, rest) = from.split_at(part.len.into());
                from = rest;
                let to = PeerSpan { domain: *domain, gref: request.gref, offset: part.offset };
                *range = range.with(copies.deliver(bytes, to)?);
            }
        }
        counters.hypercalls += 1;
        counters.copies += copies.len() as u64;
        let results = refusals.judge(copies.submit(hv))?;
        for InFlight { packet, shape, requests, copies } in batch.drain(..) {
            let arrived = match results {
                None => {
                    drops.hypercall += 1;
                    false
                }
                Some(results) => results.of(copies).inspect_err(|_| drops.grant += 1).is_ok(),
            };
            for (slot, request) in requests.iter().enumerate() {
                let response = if arrived { shape.response(slot, request.id) } else { None };
                ring.push(response.unwrap_or(failed(request.id)))?;
            }
            if arrived {
                counters.packets += 1;
                counters.bytes += packet.len() as u64;
                counters.gso_packets += u64::from(packet.gso.is_some());
            }
        }
        Ok(())
    }
}

fn shape<H: Hypervisor>(packet: &Packet<H>) -> RxPacket {
    RxPacket {
        len: u16::try_from(packet.len()).unwrap_or(u16::MAX),
        headroom: PageOffset::ZERO,
        checksum: packet.checksum,
        gso: packet.gso,
        hash: None,
    }
}

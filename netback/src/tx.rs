//! From the guest: requests off the ring, bytes by grant copy, packets out, responses on.

use alloc::vec::Vec;

use grant::{CopyOps, CopyRange, Mapping, PeerSpan};
use hypercall::{DomId, GrantStatus, Hypervisor, Instant, PAGE_SIZE, PageOffset};
use netif::offload::{Checksum, check_segmentation};
use netif::ring::{Notify, TxBackRing};
use netif::slot::TxStatus;
use netif::tx::{self, DropReason, Verdict};

use crate::counters::{Direction, Drops};
use crate::fault::{Refusals, VifFault};
use crate::packet::{Flow, Packet, Pools};
use crate::rate::Credit;

/// Packets per hypercall at most.
const BATCH: usize = 128;
/// Copies per hypercall at most: room for a batch of small packets, or a dozen of the largest.
const COPIES: usize = 512;
/// Most copies that one packet takes: each slot and each page boundary of our buffer begins one.
const COPIES_PER_PACKET: usize = tx::MAX_SLOTS + 16;
/// Bytes of headers that are looked at; they are always in the private copy.
const HEADER: usize = 128;

/// Why a queue stopped taking packets from its guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TxWait {
    /// There is nothing more; the guest will notify.
    Guest,
    /// The budget is used up.
    Budget,
    /// All buffers are out.
    Buffers,
    /// Its rate limit.
    Until(Instant),
}

struct InFlight<H: Hypervisor> {
    packet: Packet<H>,
    chain: tx::Packet,
    copies: CopyRange,
}

/// One queue's way from the guest.
pub(crate) struct TxQueue<H: Hypervisor> {
    domain: DomId,
    flow: Flow,
    ring: TxBackRing<Mapping<H>>,
    /// A packet that was taken from the ring and has to wait.
    held: Option<tx::Packet>,
    credit: Credit,
    ops: CopyOps,
    batch: Vec<InFlight<H>>,
    refusals: Refusals,
    /// Whether there are responses to publish.
    answered: bool,
    pub(crate) counters: Direction,
    pub(crate) drops: Drops,
}

impl<H: Hypervisor> TxQueue<H> {
    pub(crate) fn new(
        domain: DomId,
        flow: Flow,
        ring: TxBackRing<Mapping<H>>,
        credit: Credit,
    ) -> Self {
        Self {
            domain,
            flow,
            ring,
            held: None,
            credit,
            ops: CopyOps::new(COPIES),
            batch: Vec::with_capacity(BATCH),
            refusals: Refusals::default(),
            answered: false,
            counters: Direction::default(),
            drops: Drops::default(),
        }
    }

    pub(crate) fn into_mapping(self) -> Mapping<H> {
        self.ring.into_inner()
    }

    /// Takes up to `budget` packets and puts them on `out`. Responses are published once.
    pub(crate) fn poll(
        &mut self,
        hv: &H,
        pools: &Pools<H>,
        now: Instant,
        mut budget: usize,
        out: &mut Vec<Packet<H>>,
    ) -> Result<(TxWait, Notify), VifFault> {
        let wait = loop {
            self.ring.poll()?;
            let wait = self.gather(pools, now, &mut budget)?;
            if !self.batch.is_empty() {
                self.copy(hv, out)?;
            }
            match wait {
                // Ask to be woken, and look again: a request may have slipped in.
                Some(TxWait::Guest) if self.ring.arm()? => {}
                Some(wait) => break wait,
                None => {}
            }
        };
        if !core::mem::take(&mut self.answered) {
            return Ok((wait, Notify::NotNeeded));
        }
        self.counters.publishes += 1;
        Ok((wait, self.ring.publish()))
    }

    /// Takes packets until the batch is full (`None`) or there is a reason to stop.
    fn gather(
        &mut self,
        pools: &Pools<H>,
        now: Instant,
        budget: &mut usize,
    ) -> Result<Option<TxWait>, VifFault> {
        let mut copies = 0;
        while self.batch.len() < BATCH && copies + COPIES_PER_PACKET <= COPIES {
            if *budget == 0 {
                return Ok(Some(TxWait::Budget));
            }
            let next = match self.held.take() {
                Some(chain) => Some(Verdict::Packet(chain)),
                None => tx::assemble(&mut self.ring.requests())?,
            };
            let chain = match next {
                None => return Ok(Some(TxWait::Guest)),
                Some(Verdict::Packet(chain)) => chain,
                Some(Verdict::Drop { reason, answers }) => {
                    match reason {
                        DropReason::TooManySlots => self.drops.too_many_slots += 1,
                        DropReason::FollowOnsTooLong => self.drops.slots_too_long += 1,
                        _ => self.drops.short += 1,
                    }
                    self.ring.answer(answers, TxStatus::ERROR)?;
                    self.answered = true;
                    *budget -= 1;
                    continue;
                }
                Some(Verdict::Multicast { answers, .. }) => {
                    // Not offered, so not granted.
                    self.ring.answer(answers, TxStatus::ERROR)?;
                    self.answered = true;
                    *budget -= 1;
                    continue;
                }
            };
            let Some(mut packet) = pools.packet(chain.size.into(), now) else {
                self.held = Some(chain);
                return Ok(Some(TxWait::Buffers));
            };
            if let Err(until) = self.credit.allow(chain.size.into(), now) {
                self.held = Some(chain);
                return Ok(Some(TxWait::Until(until)));
            }
            packet.checksum = chain.checksum;
            packet.gso = chain.gso;
            packet.flow = self.flow;
            copies += chain.slots.len() + usize::from(chain.size).div_ceil(PAGE_SIZE);
            self.batch.push(InFlight { packet, chain, copies: CopyRange::default() });
            *budget -= 1;
        }
        Ok(None)
    }

    /// Copies the batch, answers it, and hands out what arrived.
    fn copy(&mut self, hv: &H, out: &mut Vec<Packet<H>>) -> Result<(), VifFault> {
        self.answered = true;
        let Self { domain, ring, ops, batch, refusals, counters, drops, .. } = self;
        let mut copies = ops.begin();
        for InFlight { packet, chain, copies: range } in batch.iter_mut() {
            let mut to = packet.frame_mut().span_mut();
            for slot in &chain.slots {
                let (part, rest) = to.split_at(slot.size.into());
                to = rest;
                // A slot at the very end of its page is empty.
                let Some(offset) = PageOffset::new(slot.offset) else { continue };
                let from = PeerSpan { domain: *domain, gref: slot.gref, offset };
                // There is room: `gather` counted. Were there none, the packet's range would lack this copy, and the
                // sizes were checked when the chain was assembled.
                *range = range.with(copies.pull(from, part)?);
            }
        }
        counters.hypercalls += 1;
        counters.copies += copies.len() as u64;
        let results = refusals.judge(copies.submit(hv))?;
        for InFlight { mut packet, chain, copies } in batch.drain(..) {
            let outcome = match results {
                None => {
                    drops.hypercall += 1;
                    Err(GrantStatus::UNTOUCHED)
                }
                Some(results) => results.of(copies).inspect_err(|_| drops.grant += 1),
            };
            let ready = outcome.is_ok() && {
                let fits = check_headers(&mut packet, counters);
                drops.not_segmentable += u64::from(!fits);
                fits
            };
            if !ready {
                ring.answer(chain.answers, TxStatus::ERROR)?;
                continue;
            }
            counters.packets += 1;
            counters.bytes += packet.len() as u64;
            ring.answer(chain.answers, TxStatus::OKAY)?;
            out.push(packet);
        }
        Ok(())
    }
}

/// Judges what the private copy of the headers says; a packet to be segmented counts as lacking its checksum.
fn check_headers<H: Hypervisor>(packet: &mut Packet<H>, counters: &mut Direction) -> bool {
    let Some(gso) = packet.gso else { return true };
    let header = packet.bytes().get(..HEADER).unwrap_or(packet.bytes());
    let size = u16::try_from(packet.len()).unwrap_or(u16::MAX);
    let Ok(segmentation) = check_segmentation(header, size, gso, packet.checksum) else {
        return false;
    };
    counters.gso_packets += 1;
    if let Some(fix) = segmentation.fix_up {
        let at = usize::from(fix.at);
        if let Some(field) = packet.bytes_mut().get_mut(at..at + 2) {
            field.copy_from_slice(&fix.bytes);
        }
        packet.checksum = Checksum::Blank;
        counters.fixed_up += 1;
    }
    true
}

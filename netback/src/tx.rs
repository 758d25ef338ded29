//! From the guest: requests off the ring, bytes by grant copy, packets out, responses on.
//!
//! What is copied here is the whole packet, or its headers alone: then the chain of slots stays open, and what becomes of
//! the rest is decided when it is known where the packet goes.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::{iter, slice};

use grant::{CopyBatch, CopyRange, CopyResults, Mapping, PeerSpan, SharedMemory, SpanMut};
use hypercall::{DomId, Errno, GrantRef, GrantStatus, Hypervisor, Instant, PAGE_SIZE, PageOffset};
use netif::offload::{Checksum, check_segmentation};
use netif::ring::{Notify, TxBackRing};
use netif::slot::TxStatus;
use netif::tx::{self, Answers, DropReason, Next, Single, TxSlot, Verdict};

use crate::carry::Staged;
use crate::counters::{CopyCount, Direction, Drops, Fallbacks, Paths};
use crate::datapath::{Datapath, Datapaths, Policy, first_look};
use crate::fault::{Refusals, VifFault};
use crate::lent::{Open, Origin, Table};
use crate::multicast::Filter;
use crate::packet::{Flow, HEADER, Packet, Pools, Rest};
use crate::rate::Credit;

/// Packets per hypercall at most.
pub(crate) const BATCH: usize = 128;
/// Most copies that one packet takes: each slot and each page boundary of our buffer begins one.
pub(crate) const COPIES_PER_PACKET: usize = tx::MAX_SLOTS + 16;
/// Nanoseconds for which a grant that Xen cannot look at now is tried again,
const EAGAIN_LIMIT: u64 = 10_000_000;
/// and how many between two tries.
const EAGAIN_WAIT: u64 = 1_000_000;
/// Nanoseconds that a queue rests after Xen has refused a batch of it.
const REFUSED_WAIT: u64 = 1_000_000;

/// Why a queue stopped taking packets from its guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TxWait {
    /// There is nothing more; the guest will notify.
    Guest,
    /// The budget is used up, or the batch is full.
    Budget,
    /// All buffers are out.
    Buffers,
    /// [A time](TxQueue::waits_until).
    Time,
}

/// The slots of a packet.
enum Chain {
    Single(Single),
    /// The next of [those of several](TxQueue::several), which are large.
    Several,
}

struct InFlight<H: Hypervisor> {
    packet: Packet<H>,
    chain: Chain,
    copies: CopyRange,
    status: Result<(), GrantStatus>,
}

impl<H: Hypervisor> InFlight<H> {
    fn new(packet: Packet<H>, chain: Chain) -> Self {
        Self { packet, chain, copies: CopyRange::default(), status: Ok(()) }
    }
}

/// What taking packets needs of what is around it.
pub(crate) struct Take<'a, H: Hypervisor> {
    pub(crate) pools: &'a Pools<H>,
    pub(crate) up: Datapaths,
    pub(crate) policy: &'a Policy,
    /// Copies that the batch has room for.
    pub(crate) room: usize,
    /// Chains that may be left open.
    pub(crate) openings: usize,
    pub(crate) now: Instant,
}

/// Pages of the guest's that stay mapped.
pub(crate) trait Statics<H: Hypervisor> {
    /// The page of a reference, if it stays mapped, and for writing if that is needed.
    fn page(&self, gref: GrantRef, writable: bool) -> Option<&Mapping<H>>;
}

/// One queue's way from the guest.
pub(crate) struct TxQueue<H: Hypervisor> {
    domain: DomId,
    origin: Origin,
    ring: TxBackRing<Mapping<H>>,
    /// Packets that were taken from the ring and have to wait, in order.
    held: VecDeque<tx::Packet>,
    credit: Credit,
    batch: Vec<InFlight<H>>,
    /// The chains of several slots that are of the batch's packets, in their order.
    several: VecDeque<tx::Packet>,
    refusals: Refusals,
    /// Since when a grant could not be looked at.
    again: Option<Instant>,
    /// When taking goes on.
    wait: Option<Instant>,
    /// The last large packet was wanted whole, so the next one probably is.
    pub(crate) wanted_whole: bool,
    /// Whether there are responses to publish.
    answered: bool,
    pub(crate) counters: Direction,
    pub(crate) drops: Drops,
    pub(crate) paths: Paths,
    pub(crate) fallbacks: Fallbacks,
}

impl<H: Hypervisor> TxQueue<H> {
    pub(crate) fn new(
        domain: DomId,
        origin: Origin,
        ring: TxBackRing<Mapping<H>>,
        credit: Credit,
    ) -> Self {
        Self {
            domain,
            origin,
            ring,
            held: VecDeque::new(),
            credit,
            batch: Vec::with_capacity(BATCH),
            several: VecDeque::with_capacity(BATCH),
            refusals: Refusals::default(),
            again: None,
            wait: None,
            wanted_whole: false,
            answered: false,
            counters: Direction::default(),
            drops: Drops::default(),
            paths: Paths::default(),
            fallbacks: Fallbacks::default(),
        }
    }

    pub(crate) fn into_mapping(self) -> Mapping<H> {
        self.ring.into_inner()
    }

    pub(crate) fn set_rate(&mut self, rate: crate::rate::RateLimit) {
        self.credit.set_limit(rate);
        self.wait = None;
    }

    /// Until when nothing is taken: for the rate limit, or as Xen would not copy.
    pub(crate) fn waits_until(&self) -> Option<Instant> {
        self.wait
    }

    /// Whether packets were taken that are not settled.
    pub(crate) fn is_busy(&self) -> bool {
        !self.batch.is_empty()
    }

    /// Answers a chain whose packet has got where it went.
    pub(crate) fn answer(&mut self, answers: Answers, status: TxStatus) -> Result<(), VifFault> {
        self.answered = true;
        Ok(self.ring.answer(answers, status)?)
    }

    /// Shows the guest what was answered, if anything was.
    pub(crate) fn publish(&mut self) -> Option<Notify> {
        core::mem::take(&mut self.answered).then(|| {
            self.counters.publishes += 1;
            self.ring.publish()
        })
    }

    /// Takes packets from the ring, up to `budget`, until there is a reason to stop. `filter` is the guest's multicast
    /// filter, if it has one.
    pub(crate) fn gather(
        &mut self,
        take: &mut Take<'_, H>,
        statics: &impl Statics<H>,
        mut filter: Option<&mut Filter>,
        budget: &mut usize,
    ) -> Result<TxWait, VifFault> {
        if let Some(until) = self.wait.take().filter(|until| *until > take.now) {
            self.wait = Some(until);
            return Ok(TxWait::Time);
        }
        self.ring.poll()?;
        while *budget > 0 && self.batch.len() < BATCH && take.room >= COPIES_PER_PACKET {
            let held = if self.held.is_empty() { None } else { self.held.pop_front() };
            let wait = match held {
                Some(chain) => self.admit(chain, take, statics),
                // Looked at where it is: it is large.
                None => match tx::next(&mut self.ring.requests()) {
                    Err(fault) => return Err(fault.into()),
                    // Ask to be woken, and look again: a request may have slipped in.
                    Ok(None) if self.ring.arm()? => continue,
                    Ok(None) => return Ok(TxWait::Guest),
                    Ok(Some(Next::Single(single))) => self.admit_single(single, take, statics),
                    Ok(Some(Next::Other(Verdict::Packet(chain)))) => {
                        self.admit(chain, take, statics)
                    }
                    Ok(Some(Next::Other(Verdict::Drop { reason, answers }))) => {
                        match reason {
                            DropReason::TooManySlots => self.drops.too_many_slots += 1,
                            DropReason::FollowOnsTooLong => self.drops.slots_too_long += 1,
                            _ => self.drops.short += 1,
                        }
                        self.answer(answers, TxStatus::ERROR)?;
                        None
                    }
                    Ok(Some(Next::Other(Verdict::Multicast { change, answers }))) => {
                        let status = match &mut filter {
                            Some(filter) => filter.apply(change),
                            None => TxStatus::ERROR,
                        };
                        self.answer(answers, status)?;
                        None
                    }
                },
            };
            if let Some(wait) = wait {
                return Ok(wait);
            }
            *budget -= 1;
        }
        Ok(TxWait::Budget)
    }

    /// Puts a packet of one slot in the batch, or holds it.
    #[inline]
    fn admit_single(
        &mut self,
        single: Single,
        take: &mut Take<'_, H>,
        statics: &impl Statics<H>,
    ) -> Option<TxWait> {
        let Single { slot, checksum, .. } = &single;
        match self.begin(slice::from_ref(slot), slot.size, take, statics) {
            Ok(mut packet) => {
                packet.checksum = *checksum;
                self.batch.push(InFlight::new(packet, Chain::Single(single)));
                None
            }
            Err(wait) => {
                self.held.push_front(single.into());
                Some(wait)
            }
        }
    }

    /// Puts a packet in the batch, or holds it. A chain is large, and is moved once.
    fn admit(
        &mut self,
        chain: tx::Packet,
        take: &mut Take<'_, H>,
        statics: &impl Statics<H>,
    ) -> Option<TxWait> {
        match self.begin(&chain.slots, chain.size, take, statics) {
            Ok(mut packet) => {
                packet.checksum = chain.checksum;
                packet.gso = chain.gso;
                self.several.push_back(chain);
                self.batch.push(InFlight::new(packet, Chain::Several));
                None
            }
            Err(wait) => {
                self.held.push_front(chain);
                Some(wait)
            }
        }
    }

    /// A buffer for as much of a packet of `size` bytes as is wanted at first.
    #[inline]
    fn begin(
        &mut self,
        slots: &[TxSlot],
        size: u16,
        take: &mut Take<'_, H>,
        statics: &impl Statics<H>,
    ) -> Result<Packet<H>, TxWait> {
        let all_static = take.up.contains(Datapaths::STATIC)
            && slots.iter().all(|slot| statics.page(slot.gref, false).is_some());
        let look = match first_look(take.up, take.policy, size, all_static) {
            Datapath::Direct if self.wanted_whole || take.openings == 0 => Datapath::Copy,
            look => look,
        };
        let private = match look {
            Datapath::Direct => HEADER.min(size.into()),
            _ => size.into(),
        };
        let mut packet = take.pools.packet(private, take.now).ok_or(TxWait::Buffers)?;
        if let Err(until) = self.credit.allow(size.into(), take.now) {
            self.wait = Some(until);
            return Err(TxWait::Time);
        }
        if look == Datapath::Direct {
            take.openings -= 1;
        }
        packet.set_total(size.into());
        packet.path = look;
        packet.flow = Flow(self.origin.queue);
        let copies = slots.len() + private.div_ceil(PAGE_SIZE);
        take.room = take.room.saturating_sub(copies);
        Ok(packet)
    }

    /// Adds the copies of what was gathered; pages that stay mapped are read at once.
    pub(crate) fn add<'f>(
        &'f mut self,
        copies: &mut CopyBatch<'_, 'f>,
        statics: &impl Statics<H>,
    ) -> Result<(), VifFault> {
        let domain = self.domain;
        let mut several = self.several.iter();
        for InFlight { packet, chain, copies: range, .. } in &mut self.batch {
            let slots = match chain {
                Chain::Single(single) => slice::from_ref(&single.slot),
                Chain::Several => several.next().map_or(&[][..], |chain| &chain.slots),
            };
            if packet.path == Datapath::Static {
                let mut to = packet.bytes_mut();
                for slot in slots {
                    let Some((part, rest)) = to.split_at_mut_checked(slot.size.into()) else {
                        break;
                    };
                    to = rest;
                    if let Some(page) = statics.page(slot.gref, false) {
                        page.read_bytes(slot.offset.into(), part);
                    }
                }
            } else {
                let private = packet.bytes().len();
                let to = packet.frame_mut().span_mut().split_at(private).0;
                *range = pull(copies, domain, slots, 0, to)?;
            }
        }
        Ok(())
    }

    /// Answers what was copied whole, keeps open what was not, and hands out what arrived.
    pub(crate) fn settle(
        &mut self,
        outcome: Result<CopyResults<'_>, Errno>,
        table: &mut Table<H>,
        now: Instant,
        out: &mut Vec<Staged<H>>,
    ) -> Result<(), VifFault> {
        let judged = self.refusals.judge(outcome)?;
        // A status that was left as it was says that Xen did not do what it said it had done: nothing here is to be believed.
        let mut results = judged;
        let mut copies = CopyCount::default();
        for of in &mut self.batch {
            copies.add(of.packet.path, of.copies.len());
            // Static packets take no copies, and none of none has failed.
            of.status = match judged {
                Some(results) => results.of(of.copies),
                None if of.packet.path == Datapath::Static => Ok(()),
                None => Err(GrantStatus::UNTOUCHED),
            };
            if of.status == Err(GrantStatus::UNTOUCHED) {
                results = None;
            }
        }
        self.paths.count_hypercalls(copies);
        if results.is_none() {
            self.wait = Some(now.after(REFUSED_WAIT));
        }
        let mut batch = core::mem::take(&mut self.batch);
        let mut outcome = Ok(());
        let mut later = 0;
        for InFlight { packet, chain, mut status, .. } in batch.drain(..) {
            if results.is_none() && packet.path != Datapath::Static {
                status = Err(GrantStatus::UNTOUCHED);
            }
            if later > 0 || (status == Err(GrantStatus::EAGAIN) && self.tries_again(now)) {
                // Those behind it wait with it: order matters more.
                if let Some(chain) = self.whole(chain) {
                    self.held.insert(later, chain);
                    later += 1;
                }
            } else if outcome.is_ok() {
                outcome = self.settle_one(packet, chain, status, results.is_none(), table, out);
            }
        }
        self.several.clear();
        if later == 0 {
            self.again = None;
        }
        self.batch = batch;
        outcome
    }

    /// Whether a grant that Xen could not look at is to be tried again.
    fn tries_again(&mut self, now: Instant) -> bool {
        let since = *self.again.get_or_insert(now);
        let again = now < since.after(EAGAIN_LIMIT);
        if again {
            self.wait = Some(now.after(EAGAIN_WAIT));
        }
        again
    }

    /// A chain in the form that holds any.
    fn whole(&mut self, chain: Chain) -> Option<tx::Packet> {
        match chain {
            Chain::Single(single) => Some(single.into()),
            Chain::Several => self.several.pop_front(),
        }
    }

    /// Answers a chain of the batch.
    #[inline]
    fn answer_chain(&mut self, chain: Chain, status: TxStatus) -> Result<(), VifFault> {
        match chain {
            Chain::Single(single) => {
                self.answered = true;
                Ok(self.ring.answer_single(single, status)?)
            }
            Chain::Several => match self.several.pop_front() {
                Some(chain) => self.answer(chain.answers, status),
                None => Ok(()),
            },
        }
    }

    #[inline]
    fn settle_one(
        &mut self,
        mut packet: Packet<H>,
        chain: Chain,
        status: Result<(), GrantStatus>,
        refused: bool,
        table: &mut Table<H>,
        out: &mut Vec<Staged<H>>,
    ) -> Result<(), VifFault> {
        match status {
            Ok(()) => {}
            Err(_) if refused => self.drops.hypercall += 1,
            Err(_) => self.drops.grant += 1,
        }
        let fits = status.is_ok() && check_headers(&mut packet, &mut self.counters);
        if !fits {
            self.drops.not_segmentable += u64::from(status.is_ok());
            return self.answer_chain(chain, TxStatus::ERROR);
        }
        let len = packet.len();
        if packet.is_whole() {
            // What was asked for as headers may have been all there is.
            if packet.path == Datapath::Direct {
                packet.path = Datapath::Copy;
            }
            self.count(packet.path, len);
            self.answer_chain(chain, TxStatus::OKAY)?;
        } else if table.room() == 0 {
            self.drops.no_buffer += 1;
            return self.answer_chain(chain, TxStatus::ERROR);
        } else {
            let Some(chain) = self.whole(chain) else { return Ok(()) };
            let kept = pieces(&chain, packet.bytes().len());
            packet.pieces = u8::try_from(kept.len()).unwrap_or(0);
            let open = Open { origin: self.origin, domain: self.domain, chain };
            packet.rest = table.insert(open).map_or(Rest::None, Rest::Taken);
        }
        out.push(Staged::new(packet, self.origin.port));
        Ok(())
    }

    /// A packet has been carried.
    pub(crate) fn count(&mut self, path: Datapath, len: usize) {
        self.counters.packets += 1;
        self.counters.bytes += len as u64;
        self.paths.count(path, |counters| {
            counters.packets += 1;
            counters.bytes += len as u64;
        });
    }
}

/// Adds copies of a chain's bytes from `skip` on into `to`, as many as `to` has.
#[inline]
pub(crate) fn pull<'f>(
    copies: &mut CopyBatch<'_, 'f>,
    domain: DomId,
    slots: &[TxSlot],
    skip: usize,
    to: SpanMut<'f>,
) -> Result<CopyRange, VifFault> {
    // Most packets are one slot.
    if let ([slot], 0) = (slots, skip)
        && let Some(offset) = PageOffset::new(slot.offset)
        && to.len() <= slot.size.into()
    {
        return Ok(copies.pull(PeerSpan { domain, gref: slot.gref, offset }, to)?);
    }
    pull_each(copies, domain, slots, skip, to)
}

fn pull_each<'f>(
    copies: &mut CopyBatch<'_, 'f>,
    domain: DomId,
    slots: &[TxSlot],
    skip: usize,
    mut to: SpanMut<'f>,
) -> Result<CopyRange, VifFault> {
    let mut range = CopyRange::default();
    for (gref, offset, len) in rest_of(slots, skip) {
        if to.is_empty() {
            break;
        }
        let take = usize::from(len).min(to.len());
        let (part, rest) = to.split_at(take);
        to = rest;
        range = range.with(copies.pull(PeerSpan { domain, gref, offset }, part)?);
    }
    Ok(range)
}

/// Where a chain's bytes from `skip` on are, in order. Empty slots are left out.
pub(crate) fn rest_of(
    slots: &[TxSlot],
    mut skip: usize,
) -> impl Iterator<Item = (GrantRef, PageOffset, u16)> {
    slots.iter().filter_map(move |slot| {
        let passed = skip.min(slot.size.into());
        skip -= passed;
        let passed = u16::try_from(passed).ok()?;
        let left = slot.size.checked_sub(passed).filter(|left| *left > 0)?;
        Some((slot.gref, PageOffset::new(slot.offset.checked_add(passed)?)?, left))
    })
}

/// What Linux's xen-netfront makes of a packet's slots: 17 pages, and before them one more whose bytes it can move to the front, if these
/// are 256 at most (`MAX_SKB_FRAGS`, `RX_COPY_THRESHOLD` in drivers/net/xen-netfront.c). Everybody else takes as many.
const PAGES: usize = 17;
/// Pieces of a packet at most.
const MAX_PIECES: usize = PAGES + 1;
const IN_FRONT: u16 = 256;
/// Their lengths.
pub(crate) type Pieces = heapless::Vec<u16, MAX_PIECES>;
/// Slots that a packet may take beyond those that it would take with full pages: a sender of many small pieces must not use up its
/// receiver's.
const MORE_SLOTS: usize = 2;

/// How the bytes of a chain are spread over the pages of whom they go to, so that a piece of its sender's becomes a piece there, and one
/// copy. Several share a page that they fit into whole; the first is the `private` bytes. Empty, if pages are to be filled instead.
pub(crate) fn pieces(chain: &tx::Packet, private: usize) -> Pieces {
    let mut lens = Pieces::new();
    let first = u16::try_from(private).unwrap_or(u16::MAX);
    let mut all = iter::once(first).chain(rest_of(&chain.slots, private).map(|(_, _, len)| len));
    let fits = all.all(|len| match lens.last_mut() {
        Some(last) if usize::from(*last) + usize::from(len) <= PAGE_SIZE => {
            *last += len;
            true
        }
        _ => lens.push(len).is_ok(),
    });
    let full = usize::from(chain.size).div_ceil(PAGE_SIZE);
    let in_front = usize::from(lens.first().is_some_and(|first| *first <= IN_FRONT));
    if !fits || lens.len() > (full + MORE_SLOTS).min(PAGES + in_front) {
        lens.clear();
    }
    lens
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

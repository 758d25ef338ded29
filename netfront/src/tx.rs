//! To the backend: bytes into granted pages, requests on the ring, responses off.

use alloc::vec::Vec;
use core::ops::Range;

use grant::{GrantTable, GrantedPage, SharedMemory};
use hypercall::{DomId, GrantRef, Hypervisor, Instant, PAGE_SIZE};
use netif::keys::Features;
use netif::offload::{Checksum, ETHERNET_HEADER, IpVersion};
use netif::ring::{Notify, TxFrontRing};
use netif::slot::{Extra, ExtraInfo, TxFlags, TxId, TxRequest, TxResponse, TxStatus};

use crate::Meta;
use crate::counters::TxCounters;
use crate::fault::{BackendFault, SendError};
use crate::queue::{Maker, RingPage};

/// Packets up to this many bytes do not all begin at the start of their page: data that lies at the same offset in every
/// page shares few cache sets.
const SPREAD: usize = 1024;
/// Bytes between the places where small packets begin: a cache line.
const STRIDE: usize = 64;
/// How many such places there are.
const PLACES: usize = (PAGE_SIZE - SPREAD) / STRIDE;

/// Pages of the longest packet.
#[cfg(feature = "smoltcp")]
const MAX_PAGES: usize = (u16::MAX as usize).div_ceil(PAGE_SIZE);

/// Nanoseconds without an answer after which a backend is said to have stalled (as Linux's transmit watchdog).
const WATCHDOG: u64 = 5_000_000_000;

/// What a request that is with the backend is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Use {
    Data,
    Multicast,
}

/// A page, and what a request that names it is with the backend for.
struct Buffer<H: Hypervisor> {
    /// Granted when first needed, and from then on.
    page: Option<GrantedPage<H>>,
    in_flight: Option<Use>,
    /// Bytes of the page that packets have left there.
    written: Range<usize>,
}

/// How long requests have been without any answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Watchdog {
    /// There are none.
    Idle,
    /// Since then.
    Since(Instant),
    /// For so long that it was said.
    Barked,
}

/// What [`TxQueue::reap`] came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Reaped {
    /// There were responses.
    pub(crate) worked: bool,
    /// There is room again for somebody who was told that there is none.
    pub(crate) room: bool,
    /// The backend has begun to leave everything unanswered.
    pub(crate) stalled: bool,
}

/// One queue's way to the backend.
pub(crate) struct TxQueue<H: Hypervisor> {
    backend: DomId,
    /// What the backend takes.
    features: Features,
    table: GrantTable<H>,
    ring: TxFrontRing<RingPage<H>>,
    gref: GrantRef,
    /// Requests were pushed that are not published.
    pushed: bool,
    /// By id.
    buffers: Vec<Buffer<H>>,
    /// Ids with a page, not in flight; the last is the next, as its page is the warmest.
    free: Vec<u16>,
    /// Ids that no page was needed for so far.
    bare: Vec<u16>,
    /// Slots of extras in flight; their responses have no id.
    extras: u32,
    /// Somebody waits for room.
    blocked: bool,
    /// Bytes that earlier packets left in a page are wiped, whoever may have seen them.
    wipe: bool,
    /// References granted since they were last asked for; `None` if nobody asks.
    fresh: Option<Vec<GrantRef>>,
    watchdog: Watchdog,
    /// The backend refused a change of the multicast filter.
    multicast_refused: bool,
    pub(crate) counters: TxCounters,
}

impl<H: Hypervisor> TxQueue<H> {
    pub(crate) fn new(maker: &Maker<'_, H>, page: RingPage<H>) -> Self {
        let ids = 0..TxFrontRing::<RingPage<H>>::ENTRIES as u16;
        let empty = |_| Buffer { page: None, in_flight: None, written: 0..0 };
        Self {
            backend: maker.backend,
            features: maker.offered,
            table: maker.table.clone(),
            gref: page.gref(),
            ring: TxFrontRing::init_at(page, maker.first_index),
            pushed: false,
            buffers: ids.clone().map(empty).collect(),
            free: Vec::with_capacity(ids.len()),
            fresh: maker.static_grants.then(|| Vec::with_capacity(ids.len())),
            bare: ids.rev().collect(),
            extras: 0,
            blocked: false,
            wipe: !maker.trusted,
            watchdog: Watchdog::Idle,
            multicast_refused: false,
            counters: TxCounters::default(),
        }
    }

    /// The ring's page.
    pub(crate) fn gref(&self) -> GrantRef {
        self.gref
    }

    /// Slots with data whose responses have not come.
    pub(crate) fn in_flight(&self) -> u64 {
        u64::from(self.ring.outstanding().saturating_sub(self.extras))
    }

    /// Puts a packet on the ring; [`publish`](Self::publish) shows it.
    pub(crate) fn send(&mut self, bytes: &[u8], meta: Meta) -> Result<(), SendError> {
        let size = u16::try_from(bytes.len()).map_err(|_| SendError::TooLong)?;
        if size < ETHERNET_HEADER {
            return Err(SendError::TooShort);
        }
        let pages = bytes.len().div_ceil(PAGE_SIZE);
        if pages > 1 && !self.features.contains(Features::SG) {
            return Err(SendError::TooLong);
        }
        if !offered(bytes, meta, self.features) {
            return Err(SendError::NotOffered);
        }
        let slots = pages + usize::from(meta.gso.is_some());
        // All pages before the first request: half a packet must not get on the ring.
        self.reserve(slots, pages)?;
        let mut flags = match meta.checksum {
            Checksum::Unverified => TxFlags::empty(),
            Checksum::Validated => TxFlags::DATA_VALIDATED,
            Checksum::Blank => TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED,
        };
        flags.set(TxFlags::EXTRA_INFO, meta.gso.is_some());
        if slots == 1 {
            self.slot(bytes, flags, Some(size))?;
        } else {
            self.slots(bytes, flags, size, meta)?;
        }
        self.pushed = true;
        self.counters.packets += 1;
        self.counters.bytes += u64::from(size);
        Ok(())
    }

    /// Puts a packet of several slots on the ring. There is room for it, and pages.
    fn slots(
        &mut self,
        bytes: &[u8],
        mut flags: TxFlags,
        size: u16,
        meta: Meta,
    ) -> Result<(), SendError> {
        // The head says how long the whole packet is.
        let mut total = Some(size);
        let mut parts = bytes.chunks(PAGE_SIZE).peekable();
        while let Some(part) = parts.next() {
            flags.set(TxFlags::MORE_DATA, parts.peek().is_some());
            self.slot(part, flags, total)?;
            flags = TxFlags::empty();
            if total.take().is_some()
                && let Some(gso) = meta.gso
            {
                let extra = Extra { more: false, info: gso.info() };
                self.ring.push(TxRequest::from_extra(extra)).map_err(|_| SendError::Full)?;
                self.extras += 1;
            }
        }
        Ok(())
    }

    /// Makes sure that so many slots are free, and so many pages are at hand.
    #[inline]
    fn reserve(&mut self, slots: usize, pages: usize) -> Result<(), SendError> {
        if slots > self.ring.free() as usize {
            return Err(self.block());
        }
        if self.free.len() < pages { self.grant(pages) } else { Ok(()) }
    }

    /// Grants pages until there are as many at hand.
    fn grant(&mut self, pages: usize) -> Result<(), SendError> {
        while self.free.len() < pages {
            let Some(&id) = self.bare.last() else { return Err(self.block()) };
            let page = match self.table.share(self.backend, true) {
                Ok(page) => page,
                // Pages come back with what is in flight.
                Err(_) if self.in_flight() > 0 => return Err(self.block()),
                Err(error) => return Err(error.into()),
            };
            let Some(buffer) = self.buffers.get_mut(usize::from(id)) else {
                return Err(self.block());
            };
            if let Some(fresh) = &mut self.fresh {
                fresh.push(page.gref());
            }
            buffer.page = Some(page);
            self.bare.pop();
            self.free.push(id);
        }
        Ok(())
    }

    fn block(&mut self) -> SendError {
        self.blocked = true;
        self.counters.full += 1;
        SendError::Full
    }

    /// Whether `packets` of the largest kind would find room now. If not, somebody waits for it from now on.
    #[cfg(feature = "smoltcp")]
    pub(crate) fn has_room(&mut self, packets: usize) -> bool {
        let pages = if self.features.contains(Features::SG) { MAX_PAGES } else { 1 };
        let pages = pages.max(packets);
        // One for the extra.
        self.reserve(pages + 1, pages).is_ok()
    }

    /// Puts a part of a packet on the ring. There is room for it, and a page.
    fn slot(&mut self, part: &[u8], flags: TxFlags, total: Option<u16>) -> Result<(), SendError> {
        let id = self.free.pop().ok_or(SendError::Full)?;
        let buffer = self.buffers.get_mut(usize::from(id)).ok_or(SendError::Full)?;
        let page = buffer.page.as_ref().ok_or(SendError::Full)?;
        let offset = if part.len() <= SPREAD { usize::from(id) % PLACES * STRIDE } else { 0 };
        page.page().write_bytes(offset, part);
        let written = offset..offset + part.len();
        if self.wipe {
            let Range { start, end } = buffer.written;
            for rest in [start..end.min(written.start), start.max(written.end)..end] {
                wipe(page, rest);
            }
            buffer.written = written;
        }
        let request = TxRequest {
            gref: page.gref(),
            offset: offset as u16,
            flags,
            id: TxId(id),
            size: total.unwrap_or(part.len() as u16),
        };
        self.ring.push(request).map_err(|_| SendError::Full)?;
        buffer.in_flight = Some(Use::Data);
        Ok(())
    }

    /// Asks the backend to let a multicast address through, or no longer; [`publish`](Self::publish) shows it.
    pub(crate) fn multicast(&mut self, change: ExtraInfo) -> Result<(), SendError> {
        self.reserve(2, 1)?;
        let id = self.free.pop().ok_or(SendError::Full)?;
        let buffer = self.buffers.get_mut(usize::from(id)).ok_or(SendError::Full)?;
        let gref = buffer.page.as_ref().ok_or(SendError::Full)?.gref();
        // Without data; the reference is not looked at.
        let request =
            TxRequest { gref, offset: 0, flags: TxFlags::EXTRA_INFO, id: TxId(id), size: 0 };
        let extra = TxRequest::from_extra(Extra { more: false, info: change });
        for request in [request, extra] {
            self.ring.push(request).map_err(|_| SendError::Full)?;
        }
        buffer.in_flight = Some(Use::Multicast);
        self.extras += 1;
        self.pushed = true;
        Ok(())
    }

    /// Whether the backend has refused a change of the multicast filter since the last call.
    pub(crate) fn take_multicast_refused(&mut self) -> bool {
        core::mem::take(&mut self.multicast_refused)
    }

    /// A reference that was granted and not yet given out here.
    pub(crate) fn take_fresh(&mut self) -> Option<GrantRef> {
        self.fresh.as_mut()?.pop()
    }

    /// Nobody asks for fresh references any more.
    pub(crate) fn keep_fresh(&mut self) {
        self.fresh = None;
    }

    /// Every reference that the backend knows of.
    pub(crate) fn grefs(&self) -> impl Iterator<Item = GrantRef> {
        self.buffers.iter().filter_map(|buffer| Some(buffer.page.as_ref()?.gref()))
    }

    /// Takes responses.
    pub(crate) fn reap(&mut self, now: Instant) -> Result<Reaped, BackendFault> {
        let mut reaped = self.take_responses()?;
        self.watchdog = match self.watchdog {
            _ if self.ring.outstanding() == 0 => Watchdog::Idle,
            Watchdog::Since(since) if !reaped.worked && since.after(WATCHDOG) <= now => {
                reaped.stalled = true;
                Watchdog::Barked
            }
            watchdog if !reaped.worked && watchdog != Watchdog::Idle => watchdog,
            _ => Watchdog::Since(now),
        };
        Ok(reaped)
    }

    fn take_responses(&mut self) -> Result<Reaped, BackendFault> {
        let mut reaped = Reaped { worked: false, room: false, stalled: false };
        loop {
            self.ring.poll()?;
            while let Some((_, response)) = self.ring.take() {
                self.done(response)?;
                reaped.worked = true;
            }
            if reaped.worked {
                reaped.room = core::mem::take(&mut self.blocked);
                return Ok(reaped);
            }
            // Nobody needs to know when a request is done, except for the room.
            if !self.blocked || !self.ring.arm_for(self.ring.outstanding().div_ceil(2).max(1))? {
                return Ok(reaped);
            }
        }
    }

    fn done(&mut self, response: TxResponse) -> Result<(), BackendFault> {
        if response.status == TxStatus::NULL {
            self.extras = self.extras.checked_sub(1).ok_or(BackendFault::NoExtra)?;
            return Ok(());
        }
        let id = response.id;
        let buffer = self.buffers.get_mut(usize::from(id.0));
        let used = buffer.and_then(|buffer| buffer.in_flight.take());
        let used = used.ok_or(BackendFault::NotInFlight(id))?;
        self.free.push(id.0);
        if used == Use::Multicast {
            self.multicast_refused |= response.status != TxStatus::OKAY;
            return Ok(());
        }
        match response.status {
            TxStatus::OKAY => self.counters.completed += 1,
            TxStatus::DROPPED | TxStatus::ERROR => self.counters.failed += 1,
            _ => self.counters.unknown += 1,
        }
        Ok(())
    }

    /// Shows what was sent since the last time.
    pub(crate) fn publish(&mut self) -> Notify {
        if !core::mem::take(&mut self.pushed) {
            return Notify::NotNeeded;
        }
        self.counters.publishes += 1;
        let notify = self.ring.publish();
        if notify.is_needed() {
            self.counters.notifications += 1;
        }
        notify
    }
}

/// Zeroes a part of a page, for which `range` may be empty.
fn wipe<H: Hypervisor>(page: &GrantedPage<H>, range: Range<usize>) {
    const ZEROS: [u8; 256] = [0; 256];
    for at in range.clone().step_by(ZEROS.len()) {
        let (zeros, _) = ZEROS.split_at(range.end.saturating_sub(at).min(ZEROS.len()));
        page.page().write_bytes(at, zeros);
    }
}

/// Whether a backend with `features` does what the packet leaves to it.
fn offered(bytes: &[u8], meta: Meta, features: Features) -> bool {
    if let Some(gso) = meta.gso {
        return features.contains(match gso.version {
            IpVersion::V4 => Features::GSO_TCPV4,
            IpVersion::V6 => Features::GSO_TCPV6,
        });
    }
    if meta.checksum != Checksum::Blank {
        return true;
    }
    features.contains(match bytes.get(12..14) {
        Some([0x08, 0x00]) => Features::IPV4_CSUM,
        Some([0x86, 0xdd]) => Features::IPV6_CSUM,
        // Behind a tag it may be either.
        _ => Features::IPV4_CSUM | Features::IPV6_CSUM,
    })
}

//! The control ring's end in the backend (io/netif.h): the frontend sets how its packets are steered to queues, and has
//! pages of its own kept mapped.
//!
//! What a frontend can make us do by it is bounded: per poll by `REQUESTS` and `ENTRIES`, in all by the sizes of the
//! tables, which are fixed.

mod statics;
mod steering;
#[cfg(test)]
mod tests;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::num::NonZeroUsize;

use evtchn::{Binder, Channel, Eoi, Work};
use grant::{BufferSize, CopyOps, Frame, FramePool, MapOps, MapRequest, Mapper, Mapping, PeerSpan};
use hypercall::{DomId, GrantRef, Hypervisor, Instant, PageOffset, Port};
use netif::ctrl::{CtrlBackRing, CtrlRequest, CtrlResponse, CtrlStatus, CtrlType, StaticGrant};
use netif::hash::MAX_KEY;
use netif::keys;

use crate::fault::{Refusal, VifFault};
pub use statics::STATIC_PAGES;
use statics::{Removal, StaticPages, Wanted};
pub use steering::Steering;
use steering::{MAX_TABLE, Steer};

/// Requests served per poll at most.
const REQUESTS: u32 = 32;
/// Entries of lists of pages looked at per poll, after which the poll ends.
const ENTRIES: usize = 512;

/// Where a frontend's control ring is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControlRequest {
    /// Its page.
    pub ring: GrantRef,
    /// Its port.
    pub port: Port,
}

/// A vif's control ring, and what has been set by it.
pub struct Control<H: Hypervisor> {
    domain: DomId,
    ring: CtrlBackRing<Mapping<H>>,
    channel: Channel<H>,
    /// An event was handed out, and the channel is still masked.
    event: bool,
    /// Whether there was work since the last event ended.
    worked: bool,
    /// There may be requests to take.
    ready: bool,
    steer: Steer,
    /// Per queue.
    pages: Vec<StaticPages<H>>,
    /// They may be not mapped now.
    unmapped: bool,
    /// Where the frontend's tables are copied to, to be read. `None` where there was no memory for it.
    page: Option<Frame<H>>,
    ops: CopyOps,
    /// Entries of lists that this poll may yet look at.
    entries: usize,
}

impl<H: Hypervisor> Control<H> {
    /// Maps the ring and binds the port, for a frontend with so many queues.
    ///
    /// # Errors
    /// One of them cannot be had; nothing stays bound.
    pub fn connect(
        hv: &H,
        mapper: &Mapper<H>,
        binder: &Binder<H>,
        domain: DomId,
        request: ControlRequest,
        queues: u16,
    ) -> Result<Self, Refusal> {
        let ring = MapRequest { domain, gref: request.ring, read_only: false };
        let key = keys::CTRL_RING_REF;
        let mapping = mapper.map(ring).map_err(|error| Refusal::Map { key, error })?;
        let ring = CtrlBackRing::attach(mapping)
            .map_err(|(fault, _mapping)| Refusal::Ring { key, fault })?;
        let channel = binder
            .bind_interdomain(domain, request.port)
            .map_err(|error| Refusal::Bind { key: keys::EVENT_CHANNEL_CTRL, error })?;
        Ok(Self {
            domain,
            ring,
            channel,
            event: false,
            worked: false,
            // The frontend may have asked before we came, and does not say so again.
            ready: true,
            steer: Steer::new(queues),
            pages: (0..queues).map(|_| StaticPages::new()).collect(),
            unmapped: false,
            page: FramePool::new(hv, NonZeroUsize::MIN, BufferSize::PAGE).take(),
            ops: CopyOps::new(1),
            entries: 0,
        })
    }

    /// Has the frontend's tables read by mapping, where Xen cannot copy.
    pub(crate) fn copy_by_mapping(&mut self, mapper: &Mapper<H>) {
        self.ops = CopyOps::by_mapping(1, mapper);
    }

    /// The port, for which [`on_event`](Self::on_event) is.
    #[must_use]
    pub fn port(&self) -> Port {
        self.channel.port()
    }

    /// An event came on the port.
    pub fn on_event(&mut self) {
        self.event = true;
        self.ready = true;
    }

    /// Looks at the ring though nobody notified: a notification may have been lost.
    pub fn look(&mut self) {
        self.ready = true;
    }

    /// Whether [`poll`](Self::poll) has something to do.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Serves requests, within a bound, and answers them; [`is_ready`](Self::is_ready) tells whether there may be more.
    ///
    /// # Errors
    /// The frontend broke the ring.
    pub fn poll(&mut self, hv: &H, mapper: &Mapper<H>) -> Result<(), VifFault> {
        self.ring.poll()?;
        let mut left = REQUESTS;
        self.entries = ENTRIES;
        self.ready = loop {
            if left == 0 || self.entries == 0 {
                break true;
            }
            if let Some(request) = self.ring.take() {
                left -= 1;
                let (status, data) = self.serve(request, hv, mapper);
                let CtrlRequest { id, kind, .. } = request;
                self.ring.push(CtrlResponse { id, kind, status, data })?;
            } else if !self.ring.arm()? {
                break false;
            }
        };
        self.worked |= left != REQUESTS;
        if self.ring.publish().is_needed() {
            // A peer whose end is gone is seen by its state in the store.
            let _ = self.channel.notify();
        }
        Ok(())
    }

    /// Ends an event whose work is done, and opens the channel once it was throttled long enough.
    pub fn end_event(&mut self, now: Instant) {
        if !self.event {
            self.channel.open_if_due(now);
        } else if !self.ready {
            self.event = false;
            let worked = core::mem::take(&mut self.worked);
            // A throttled channel is opened above, when its time comes.
            let (Eoi::Open | Eoi::Throttled(_)) =
                self.channel.eoi(if worked { Work::Done } else { Work::Spurious }, now);
        }
    }

    /// When [`end_event`](Self::end_event) is to be called though no event comes.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.channel.throttled_until()
    }

    /// Where a packet goes, of whose first bytes 128 hold every header that matters. `None`: that is left to us.
    #[must_use]
    pub fn steer(&self, header: &[u8]) -> Option<Steering> {
        self.steer.steer(header)
    }

    /// The page that a queue's frontend keeps mapped for a reference, if it may be written where that is asked for. Who
    /// holds it beyond a poll takes a count of it: the frontend then cannot take it back.
    #[must_use]
    pub fn static_page(
        &self,
        queue: u16,
        gref: GrantRef,
        writable: bool,
    ) -> Option<&Arc<Mapping<H>>> {
        self.pages.get(usize::from(queue))?.get(gref, writable)
    }

    /// Unmaps the pages that are kept, for as long as they are not to be used; what the frontend asked for stays as it is.
    pub(crate) fn unmap_pages(&mut self, mapper: &Mapper<H>) {
        self.unmapped = true;
        for pages in &mut self.pages {
            pages.unmap(mapper);
        }
    }

    /// Maps them again.
    pub(crate) fn map_pages_again(&mut self, mapper: &Mapper<H>) {
        if core::mem::take(&mut self.unmapped) {
            for pages in &mut self.pages {
                pages.map_again(self.domain, mapper);
            }
        }
    }

    /// Pages kept for the frontend, in all queues.
    #[must_use]
    pub fn static_pages(&self) -> usize {
        self.pages.iter().map(StaticPages::len).sum()
    }

    /// Whether somebody holds a page, so that [`disconnect`](Self::disconnect) had better wait.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.pages.iter().any(StaticPages::is_in_use)
    }

    /// Lets go of the port, and hands out the ring and all pages that nobody holds, to be unmapped.
    pub fn disconnect(self) -> impl Iterator<Item = Mapping<H>> {
        let Self { ring, pages, .. } = self;
        let pages = pages.into_iter().flat_map(StaticPages::into_mappings);
        core::iter::once(ring.into_inner()).chain(pages)
    }

    fn serve(&mut self, request: CtrlRequest, hv: &H, mapper: &Mapper<H>) -> (CtrlStatus, u32) {
        let [first, second, third] = request.data;
        let status = match request.kind {
            CtrlType::SET_HASH_ALGORITHM => self.steer.set_algorithm(first),
            CtrlType::GET_HASH_FLAGS => match self.steer.types() {
                Ok(types) => return (CtrlStatus::SUCCESS, types.bits()),
                Err(status) => status,
            },
            CtrlType::SET_HASH_FLAGS => self.steer.set_types(first),
            CtrlType::SET_HASH_KEY => self.set_key(GrantRef(first), second, hv),
            CtrlType::GET_HASH_MAPPING_SIZE => return (CtrlStatus::SUCCESS, MAX_TABLE as u32),
            CtrlType::SET_HASH_MAPPING_SIZE => self.steer.set_table_len(first),
            CtrlType::SET_HASH_MAPPING => self.set_table(GrantRef(first), second, third, hv),
            CtrlType::GET_GREF_MAPPING_SIZE => match self.pages_of(first) {
                Some(_) => return (CtrlStatus::SUCCESS, STATIC_PAGES as u32),
                None => CtrlStatus::INVALID_PARAMETER,
            },
            CtrlType::ADD_GREF_MAPPING => {
                match self.add_pages(first, GrantRef(second), third, hv, mapper) {
                    Some(()) => CtrlStatus::SUCCESS,
                    None => CtrlStatus::INVALID_PARAMETER,
                }
            }
            CtrlType::DEL_GREF_MAPPING => {
                match self.remove_pages(first, GrantRef(second), third, hv, mapper) {
                    Some(removed) => return (CtrlStatus::SUCCESS, removed),
                    None => CtrlStatus::INVALID_PARAMETER,
                }
            }
            _ => CtrlStatus::NOT_SUPPORTED,
        };
        (status, 0)
    }

    /// Copies the first bytes of a page of the frontend's into ours. `None`: it has none such, or does not let us.
    fn fetch(&mut self, gref: GrantRef, len: usize, hv: &H) -> Option<&[u8]> {
        let frame = self.page.as_mut()?;
        let from = PeerSpan { domain: self.domain, gref, offset: PageOffset::ZERO };
        if len > 0 {
            let mut batch = self.ops.begin();
            let range = batch.pull(from, frame.span_mut().split_at(len).0).ok()?;
            batch.submit(hv).ok()?.of(range).ok()?;
        }
        frame.bytes().get(..len)
    }

    fn set_key(&mut self, gref: GrantRef, len: u32, hv: &H) -> CtrlStatus {
        let len = usize::try_from(len).ok().filter(|len| *len <= MAX_KEY);
        let mut key = [0; MAX_KEY];
        let Some(given) = len.and_then(|len| self.fetch(gref, len, hv)) else {
            return CtrlStatus::INVALID_PARAMETER;
        };
        for (to, from) in key.iter_mut().zip(given) {
            *to = *from;
        }
        self.steer.set_key(&key)
    }

    fn set_table(&mut self, gref: GrantRef, len: u32, offset: u32, hv: &H) -> CtrlStatus {
        if !self.steer.has_entries(offset, len) {
            return CtrlStatus::INVALID_PARAMETER;
        }
        // No more than the table has, and so within a page.
        let mut table = [0; MAX_TABLE];
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let Some(bytes) = self.fetch(gref, len.saturating_mul(4), hv) else {
            return CtrlStatus::INVALID_PARAMETER;
        };
        let (words, _) = bytes.as_chunks::<4>();
        for (to, word) in table.iter_mut().zip(words) {
            *to = u32::from_ne_bytes(*word);
        }
        self.steer.set_entries(offset, table.get(..len).unwrap_or_default().iter().copied())
    }

    fn pages_of(&mut self, queue: u32) -> Option<&mut StaticPages<H>> {
        self.pages.get_mut(usize::try_from(queue).ok()?)
    }

    /// The list of pages that a request names.
    fn list(&mut self, gref: GrantRef, len: u32, hv: &H) -> Option<Vec<StaticGrant>> {
        let len = usize::try_from(len).ok()?;
        self.entries = self.entries.saturating_sub(len.max(1));
        let bytes = self.fetch(gref, len.checked_mul(StaticGrant::SIZE)?, hv)?;
        let (entries, _) = bytes.as_chunks::<{ StaticGrant::SIZE }>();
        Some(entries.iter().map(decode).collect())
    }

    fn add_pages(
        &mut self,
        queue: u32,
        gref: GrantRef,
        len: u32,
        hv: &H,
        mapper: &Mapper<H>,
    ) -> Option<()> {
        self.pages_of(queue)?;
        let list = self.list(gref, len, hv)?;
        let wanted = list
            .into_iter()
            .map(|StaticGrant { gref, readonly, .. }| Wanted { gref, read_only: readonly });
        let domain = self.domain;
        self.pages_of(queue)?.add(domain, wanted.collect(), mapper).ok()
    }

    /// How many of the listed pages were let go of; the list says which. Nothing was if the list cannot be written.
    fn remove_pages(
        &mut self,
        queue: u32,
        gref: GrantRef,
        len: u32,
        hv: &H,
        mapper: &Mapper<H>,
    ) -> Option<u32> {
        self.pages_of(queue)?;
        let mut list = self.list(gref, len, hv)?;
        let pages = self.pages_of(queue)?;
        let mut going: Vec<GrantRef> = Vec::with_capacity(list.len());
        for entry in &mut list {
            entry.status = match pages.removal(entry.gref) {
                Removal::Removed => {
                    going.push(entry.gref);
                    CtrlStatus::SUCCESS
                }
                Removal::Unknown | Removal::InUse => CtrlStatus::INVALID_PARAMETER,
            };
        }
        self.tell(gref, &list, hv)?;
        let pages = self.pages_of(queue)?;
        // What is listed twice goes once.
        let gone: Vec<_> = going.into_iter().filter_map(|gref| pages.remove(gref)).collect();
        let count = u32::try_from(gone.len()).unwrap_or(u32::MAX);
        mapper.unmap_batch(&mut MapOps::new(gone.len()), gone.into_iter().flatten());
        Some(count)
    }

    /// Writes a list back, with its statuses.
    fn tell(&mut self, gref: GrantRef, list: &[StaticGrant], hv: &H) -> Option<()> {
        let frame = self.page.as_mut()?;
        let (places, _) = frame.bytes_mut().as_chunks_mut::<{ StaticGrant::SIZE }>();
        for (place, entry) in places.iter_mut().zip(list) {
            encode(place, *entry);
        }
        let len = list.len().saturating_mul(StaticGrant::SIZE);
        let to = PeerSpan { domain: self.domain, gref, offset: PageOffset::ZERO };
        if len > 0 {
            let mut batch = self.ops.begin();
            let range = batch.deliver(frame.span().split_at(len).0, to).ok()?;
            batch.submit(hv).ok()?.of(range).ok()?;
        }
        Some(())
    }
}

fn decode(entry: &[u8; StaticGrant::SIZE]) -> StaticGrant {
    let [a, b, c, d, e, f, g, h] = *entry;
    StaticGrant::decode([u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])])
}

fn encode(place: &mut [u8; StaticGrant::SIZE], entry: StaticGrant) {
    let words = entry.encode().map(u32::to_ne_bytes);
    for (to, from) in place.iter_mut().zip(words.as_flattened()) {
        *to = *from;
    }
}

impl<H: Hypervisor> fmt::Debug for Control<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Control({:?}, {} static pages)", self.steer.steer(&[]), self.static_pages())
    }
}

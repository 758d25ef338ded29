//! From the backend: pages posted, responses put together, bytes copied out, pages posted again.

use alloc::vec::Vec;

use grant::{GrantTable, GrantedPage, SharedMemory};
use hypercall::{DomId, GrantRef, Hypervisor, Instant};
use netif::offload::Checksum;
use netif::ring::{Notify, RxFrontRing};
use netif::rx::{Next, Received, RxDrop, RxSlot, Taken, next};
use netif::slot::{RxId, RxRequest};

use crate::Meta;
use crate::counters::RxCounters;
use crate::fault::BackendFault;
use crate::queue::{Maker, RingPage};

/// Nanoseconds until a page that could not be had is asked for again (`xennet_alloc_rx_buffers` of Linux: a tenth of a
/// second).
const RETRY: u64 = 100_000_000;

/// One queue's way from the backend.
pub(crate) struct RxQueue<H: Hypervisor> {
    backend: DomId,
    table: GrantTable<H>,
    ring: RxFrontRing<RingPage<H>>,
    gref: GrantRef,
    /// With the backend, by slot.
    pages: Vec<Option<GrantedPage<H>>>,
    /// Back from it; the last is the next to be posted, as it is the warmest. Once granted a page stays so.
    spare: Vec<GrantedPage<H>>,
    /// References granted since they were last asked for; `None` if nobody asks.
    fresh: Option<Vec<GrantRef>>,
    /// Requests to have with the backend.
    posted: u32,
    /// When to try again to get pages.
    retry: Option<Instant>,
    pub(crate) counters: RxCounters,
}

impl<H: Hypervisor> RxQueue<H> {
    pub(crate) fn new(maker: &Maker<'_, H>, page: RingPage<H>) -> Self {
        let slots = 0..RxFrontRing::<RingPage<H>>::ENTRIES as usize;
        let mut queue = Self {
            backend: maker.backend,
            table: maker.table.clone(),
            gref: page.gref(),
            ring: RxFrontRing::init_at(page, maker.first_index),
            fresh: maker.static_grants.then(|| Vec::with_capacity(slots.len())),
            spare: Vec::with_capacity(slots.len()),
            pages: slots.map(|_| None).collect(),
            posted: maker.posted.into(),
            retry: None,
            counters: RxCounters::default(),
        };
        // Published before the backend can look: nobody is to be told.
        queue.refill(maker.now);
        let _ = queue.ring.publish();
        queue
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
        self.pages.iter().flatten().chain(&self.spare).map(GrantedPage::gref)
    }

    /// The ring's page.
    pub(crate) fn gref(&self) -> GrantRef {
        self.gref
    }

    /// When [`refill`](Self::refill) is to be tried again.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.retry
    }

    /// The next packet, in `to`'s place. Packets that are none are counted, and their pages kept.
    pub(crate) fn receive(&mut self, to: &mut Vec<u8>) -> Result<Option<Meta>, BackendFault> {
        loop {
            if self.ring.available() == 0 && self.ring.poll()? == 0 {
                return Ok(None);
            }
            // Looked at where it is: it is large.
            let verdict = match next(&mut self.ring.responses()) {
                Err(fault) => return Err(fault.into()),
                Ok(None) => return Ok(None),
                Ok(Some(Next::Single { slot, checksum })) => {
                    return Ok(Some(self.take_single(slot, checksum, to)));
                }
                Ok(Some(Next::Other(verdict))) => verdict,
            };
            let received = match verdict.packet {
                Ok(received) => Some(self.linearise(&received, to)),
                Err(RxDrop::Status(_)) => {
                    self.counters.failed += 1;
                    None
                }
                Err(_) => {
                    self.counters.malformed += 1;
                    None
                }
            };
            self.take_back(verdict.taken);
            if received.is_some() {
                return Ok(received);
            }
        }
    }

    /// The packet of one slot.
    #[inline]
    fn take_single(&mut self, slot: RxSlot, checksum: Checksum, to: &mut Vec<u8>) -> Meta {
        let size = usize::from(slot.size);
        if to.len() != size {
            to.resize(size, 0);
        }
        if let Some(page) = self.pages.get_mut(usize::from(slot.slot)).and_then(Option::take) {
            page.page().read_bytes(slot.offset.into(), to);
            self.spare.push(page);
        }
        self.counters.packets += 1;
        self.counters.bytes += u64::from(slot.size);
        Meta { checksum, gso: None }
    }

    /// Pages whose responses came are ours again.
    fn take_back(&mut self, taken: Taken) {
        let mut slot = usize::from(taken.first);
        for _ in 0..taken.count {
            let Some(place) = self.pages.get_mut(slot) else { break };
            if let Some(page) = place.take() {
                self.spare.push(page);
            }
            slot += 1;
            if slot == self.pages.len() {
                slot = 0;
            }
        }
    }

    fn linearise(&mut self, received: &Received, to: &mut Vec<u8>) -> Meta {
        // Zeros only for what it grows by: the rest is overwritten.
        to.resize(received.size as usize, 0);
        let mut rest = to.as_mut_slice();
        for slot in &received.slots {
            let (part, after) = rest.split_at_mut(rest.len().min(slot.size.into()));
            rest = after;
            if let Some(Some(page)) = self.pages.get(usize::from(slot.slot)) {
                page.page().read_bytes(slot.offset.into(), part);
            }
        }
        self.counters.packets += 1;
        self.counters.bytes += u64::from(received.size);
        Meta { checksum: received.checksum, gso: received.gso }
    }

    /// Posts pages in the slots that are free.
    fn refill(&mut self, now: Instant) {
        if self.retry.is_some_and(|at| at > now) {
            return;
        }
        self.retry = None;
        while self.ring.outstanding() < self.posted {
            let slot = self.ring.next_slot();
            let Some(place) = self.pages.get_mut(usize::from(slot)) else { break };
            let page = match self.spare.pop() {
                Some(page) => page,
                None => match self.table.share(self.backend, false) {
                    Ok(page) => {
                        if let Some(fresh) = &mut self.fresh {
                            fresh.push(page.gref());
                        }
                        page
                    }
                    Err(error) => {
                        log::debug!("netfront: no page to post: {error}");
                        self.counters.no_memory += 1;
                        self.retry = Some(now.after(RETRY));
                        break;
                    }
                },
            };
            let gref = place.insert(page).gref();
            if self.ring.push(RxRequest { id: RxId(slot), gref }).is_err() {
                break;
            }
        }
    }

    /// Posts pages again, and shows them.
    pub(crate) fn publish(&mut self, now: Instant) -> Notify {
        let before = self.ring.outstanding();
        self.refill(now);
        if self.ring.outstanding() == before {
            return Notify::NotNeeded;
        }
        self.counters.publishes += 1;
        let notify = self.ring.publish();
        if notify.is_needed() {
            self.counters.notifications += 1;
        }
        notify
    }

    /// Asks for an event with the next packet. `true`: there is one already.
    pub(crate) fn arm(&mut self) -> Result<bool, BackendFault> {
        Ok(self.ring.arm()?)
    }
}

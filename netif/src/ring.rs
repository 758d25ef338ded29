//! The ring (io/ring.h): one page, two producers, no lock.
//!
//! The frontend writes requests and the backend writes responses over them; each end has a producer index for what it
//! wrote and an event index for when it wants to be woken. All indices run freely and wrap at 2^32.
//!
//! Each end keeps its own indices privately and never reads them back, so a peer that rewrites them changes nothing. Of the
//! peer's it reads the producer once per poll, with a check, and the event index once per publish, with no harm in any
//! value: the worst is a notification too many for the peer, or one too few.

use core::marker::PhantomData;
use core::ops::BitOr;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use grant::SharedMemory;
use hypercall::PAGE_SIZE;

use crate::slot::{RxRequest, RxResponse, Slot, TxRequest, TxResponse};

/// Byte offsets in the ring's page (`struct netif_tx_sring`).
pub mod layout {
    /// `req_prod`: requests published, written by the frontend.
    pub const REQ_PROD: usize = 0;
    /// `req_event`: wake the backend when `req_prod` gets here, written by the backend.
    pub const REQ_EVENT: usize = 4;
    /// `rsp_prod`: responses published, written by the backend.
    pub const RSP_PROD: usize = 8;
    /// `rsp_event`: wake the frontend when `rsp_prod` gets here, written by the frontend.
    pub const RSP_EVENT: usize = 12;
    /// Where the slots begin.
    pub const SLOTS: usize = 64;
}

/// The backend's end of a TX ring.
pub type TxBackRing<M> = BackRing<M, TxRequest, TxResponse>;
/// The backend's end of an RX ring.
pub type RxBackRing<M> = BackRing<M, RxRequest, RxResponse>;
/// The frontend's end of a TX ring.
pub type TxFrontRing<M> = FrontRing<M, TxRequest, TxResponse>;
/// The frontend's end of an RX ring.
pub type RxFrontRing<M> = FrontRing<M, RxRequest, RxResponse>;

/// The peer broke the protocol of the ring. Nothing that the ring says can be believed any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingFault {
    /// The peer's producer is further ahead than the ring, or than what was asked for, allows.
    #[error("the peer's producer index {index} is {ahead} ahead, of at most {limit}")]
    Overrun {
        /// The peer's producer.
        index: u32,
        /// How far it is from what was consumed.
        ahead: u32,
        /// How far it may be.
        limit: u32,
    },
    /// The peer took back what it had published.
    #[error("the peer's producer index moved back from {from} to {to}")]
    MovedBack {
        /// What was last seen.
        from: u32,
        /// What is there now.
        to: u32,
    },
}

/// There was no room for a slot: see [`FrontRing::push`] and [`BackRing::push`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no room in the ring for another slot")]
pub struct Full;

/// Whether the peer asked to be woken for what has just been published. Two rings may share an event channel: `|` joins.
#[must_use = "a peer that is not notified sleeps on"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notify {
    /// Send on the event channel.
    Needed,
    /// The peer is awake, or wants to be woken later.
    NotNeeded,
}

impl Notify {
    /// Whether to send.
    #[must_use]
    pub const fn is_needed(self) -> bool {
        matches!(self, Self::Needed)
    }
}

impl BitOr for Notify {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        if self.is_needed() { self } else { other }
    }
}

const fn entry_size(request: usize, response: usize) -> usize {
    if request > response { request } else { response }
}

const fn entries(entry: usize) -> u32 {
    let fit = ((PAGE_SIZE - layout::SLOTS) / entry) as u32;
    // Rounded down to a power of two, so that an index is masked.
    1 << fit.ilog2()
}

/// How far the peer's producer is ahead of what was consumed. It may only have moved forward from `seen`, and no further
/// than `limit` beyond `consumed`.
#[inline]
fn check(index: u32, seen: u32, consumed: u32, limit: u32) -> Result<u32, RingFault> {
    let ahead = index.wrapping_sub(consumed);
    if index.wrapping_sub(seen).cast_signed() < 0 {
        Err(RingFault::MovedBack { from: seen, to: index })
    } else if ahead > limit {
        Err(RingFault::Overrun { index, ahead, limit })
    } else {
        Ok(ahead)
    }
}

/// Publishes a producer index and says whether the peer wants to hear of it.
///
/// The fence orders our producer before the peer's event index. The peer does the reverse in [`arm`]; without either
/// fence both can read the old value, and the peer sleeps on what was published.
#[inline]
fn publish<M: SharedMemory>(memory: &M, prod: usize, event: usize, old: u32, new: u32) -> Notify {
    if new == old {
        return Notify::NotNeeded;
    }
    memory.store_u32(prod, new, Release);
    memory.fence();
    let event = memory.load_u32(event, Relaxed);
    if new.wrapping_sub(event) < new.wrapping_sub(old) { Notify::Needed } else { Notify::NotNeeded }
}

/// Asks to be woken when the peer's producer reaches an index. The caller must look at the producer again.
#[inline]
fn arm<M: SharedMemory>(memory: &M, event: usize, index: u32) {
    memory.store_u32(event, index, Relaxed);
    memory.fence();
}

/// The backend's end: takes requests off and puts responses on.
#[derive(Debug)]
pub struct BackRing<M, Req, Rsp> {
    memory: M,
    req_cons: u32,
    /// What the last poll saw.
    req_seen: u32,
    /// How much of that can be answered: where taking ends.
    req_end: u32,
    rsp_prod: u32,
    rsp_published: u32,
    slots: PhantomData<(Req, Rsp)>,
}

impl<M: SharedMemory, Req: Slot, Rsp: Slot> BackRing<M, Req, Rsp> {
    const ENTRY: usize = entry_size(Req::SIZE, Rsp::SIZE);
    /// Slots in the ring.
    pub const ENTRIES: u32 = entries(Self::ENTRY);

    #[inline]
    fn at(index: u32) -> usize {
        layout::SLOTS + (index & (Self::ENTRIES - 1)) as usize * Self::ENTRY
    }

    /// Takes up a ring where its responses end: a ring that another backend served goes on, and what that one had taken
    /// but not answered comes again.
    ///
    /// # Errors
    /// The ring says that it holds more requests than it can. The memory is given back.
    pub fn attach(memory: M) -> Result<Self, (RingFault, M)> {
        let start = memory.load_u32(layout::RSP_PROD, Relaxed);
        let index = memory.load_u32(layout::REQ_PROD, Acquire);
        if let Err(fault) = check(index, start, start, Self::ENTRIES) {
            return Err((fault, memory));
        }
        Ok(Self {
            memory,
            req_cons: start,
            req_seen: start,
            req_end: start,
            rsp_prod: start,
            rsp_published: start,
            slots: PhantomData,
        })
    }

    /// Looks, once, how far the frontend has come. The number of requests that [`take`](Self::take) will now give: never
    /// more than can be answered.
    ///
    /// # Errors
    /// The frontend's index jumped or moved back.
    #[inline]
    pub fn poll(&mut self) -> Result<u32, RingFault> {
        let index = self.memory.load_u32(layout::REQ_PROD, Acquire);
        let ahead = check(index, self.req_seen, self.req_cons, Self::ENTRIES)?;
        let available = ahead.min(Self::ENTRIES - self.unanswered());
        self.req_seen = index;
        self.req_end = self.req_cons.wrapping_add(available);
        Ok(available)
    }

    /// Requests that [`take`](Self::take) will give, as of the last [`poll`](Self::poll).
    #[inline]
    #[must_use]
    pub fn available(&self) -> u32 {
        self.req_end.wrapping_sub(self.req_cons)
    }

    /// The next request, read from the page once. `None` when all that the last [`poll`](Self::poll) saw are taken.
    #[inline]
    pub fn take(&mut self) -> Option<Req> {
        if self.available() == 0 {
            return None;
        }
        let request = Req::load(&self.memory, Self::at(self.req_cons));
        self.req_cons = self.req_cons.wrapping_add(1);
        Some(request)
    }

    /// The requests as an iterator; it takes what it gives.
    #[inline]
    pub fn requests(&mut self) -> Requests<'_, M, Req, Rsp> {
        Requests(self)
    }

    /// Requests taken and not yet answered, 0 to [`ENTRIES`](Self::ENTRIES).
    #[inline]
    #[must_use]
    pub fn unanswered(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// Writes a response, which the frontend sees after the next [`publish`](Self::publish).
    ///
    /// # Errors
    /// All requests that were taken are answered.
    #[inline]
    pub fn push(&mut self, response: Rsp) -> Result<(), Full> {
        if self.unanswered() == 0 {
            return Err(Full);
        }
        response.store(&self.memory, Self::at(self.rsp_prod));
        self.rsp_prod = self.rsp_prod.wrapping_add(1);
        Ok(())
    }

    /// Shows the frontend all responses pushed so far. Costs a full barrier and a shared cache line: once per batch.
    #[inline]
    pub fn publish(&mut self) -> Notify {
        let old = core::mem::replace(&mut self.rsp_published, self.rsp_prod);
        publish(&self.memory, layout::RSP_PROD, layout::RSP_EVENT, old, self.rsp_prod)
    }

    /// Asks to be woken by the next request. `true`: there is one already (it may have slipped in meanwhile), so go on
    /// instead of going to sleep.
    ///
    /// # Errors
    /// As of [`poll`](Self::poll).
    pub fn arm(&mut self) -> Result<bool, RingFault> {
        self.arm_for(1)
    }

    /// As [`arm`](Self::arm), but to be woken once `needed` requests are there. At most as many as can be answered count,
    /// as in [`poll`](Self::poll): with many unanswered, answer and look again.
    ///
    /// # Errors
    /// As of [`poll`](Self::poll).
    pub fn arm_for(&mut self, needed: u32) -> Result<bool, RingFault> {
        if self.poll()? >= needed {
            return Ok(true);
        }
        arm(&self.memory, layout::REQ_EVENT, self.req_cons.wrapping_add(needed));
        Ok(self.poll()? >= needed)
    }

    /// Gives the page back.
    #[must_use]
    pub fn into_inner(self) -> M {
        self.memory
    }
}

/// See [`BackRing::requests`].
#[derive(Debug)]
pub struct Requests<'a, M, Req, Rsp>(&'a mut BackRing<M, Req, Rsp>);

impl<M: SharedMemory, Req: Slot, Rsp: Slot> Iterator for Requests<'_, M, Req, Rsp> {
    type Item = Req;

    #[inline]
    fn next(&mut self) -> Option<Req> {
        self.0.take()
    }
}

/// The frontend's end: puts requests on and takes responses off.
#[derive(Debug)]
pub struct FrontRing<M, Req, Rsp> {
    memory: M,
    req_prod: u32,
    req_published: u32,
    rsp_cons: u32,
    /// What the last poll saw.
    rsp_seen: u32,
    slots: PhantomData<(Req, Rsp)>,
}

impl<M: SharedMemory, Req: Slot, Rsp: Slot> FrontRing<M, Req, Rsp> {
    const ENTRY: usize = entry_size(Req::SIZE, Rsp::SIZE);
    /// Slots in the ring.
    pub const ENTRIES: u32 = entries(Self::ENTRY);

    #[inline]
    fn slot(index: u32) -> u16 {
        (index & (Self::ENTRIES - 1)) as u16
    }

    #[inline]
    fn at(index: u32) -> usize {
        layout::SLOTS + usize::from(Self::slot(index)) * Self::ENTRY
    }

    /// Makes a ring of a page that the backend cannot see yet (`XEN_FRONT_RING_INIT`).
    pub fn init(memory: M) -> Self {
        Self::init_at(memory, 0)
    }

    /// As [`init`](Self::init), but with the indices at `start`: any will do, since they wrap and a backend attaches where
    /// it finds them.
    pub fn init_at(memory: M, start: u32) -> Self {
        for (at, index) in [
            (layout::REQ_PROD, start),
            (layout::REQ_EVENT, start.wrapping_add(1)),
            (layout::RSP_PROD, start),
            (layout::RSP_EVENT, start.wrapping_add(1)),
        ] {
            memory.store_u32(at, index, Relaxed);
        }
        for at in (layout::RSP_EVENT + 4..layout::SLOTS).step_by(4) {
            memory.store_u32(at, 0, Relaxed);
        }
        Self {
            memory,
            req_prod: start,
            req_published: start,
            rsp_cons: start,
            rsp_seen: start,
            slots: PhantomData,
        }
    }

    /// Requests that can be pushed now.
    #[inline]
    #[must_use]
    pub fn free(&self) -> u32 {
        Self::ENTRIES - self.outstanding()
    }

    /// Requests pushed whose responses were not taken.
    #[inline]
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.req_prod.wrapping_sub(self.rsp_cons)
    }

    /// The slot that the next request goes to. Its response comes in the same slot.
    #[inline]
    #[must_use]
    pub fn next_slot(&self) -> u16 {
        Self::slot(self.req_prod)
    }

    /// Writes a request, which the backend sees after the next [`publish`](Self::publish).
    ///
    /// # Errors
    /// As many as the ring holds are outstanding.
    #[inline]
    pub fn push(&mut self, request: Req) -> Result<(), Full> {
        if self.free() == 0 {
            return Err(Full);
        }
        request.store(&self.memory, Self::at(self.req_prod));
        self.req_prod = self.req_prod.wrapping_add(1);
        Ok(())
    }

    /// Shows the backend all requests pushed so far. Costs a full barrier and a shared cache line: once per batch.
    #[inline]
    pub fn publish(&mut self) -> Notify {
        let old = core::mem::replace(&mut self.req_published, self.req_prod);
        publish(&self.memory, layout::REQ_PROD, layout::REQ_EVENT, old, self.req_prod)
    }

    /// Looks, once, how far the backend has come. The number of responses that [`take`](Self::take) will now give.
    ///
    /// # Errors
    /// The backend's index moved back, or beyond the requests that were published.
    #[inline]
    pub fn poll(&mut self) -> Result<u32, RingFault> {
        let index = self.memory.load_u32(layout::RSP_PROD, Acquire);
        let asked = self.req_published.wrapping_sub(self.rsp_cons);
        let ahead = check(index, self.rsp_seen, self.rsp_cons, asked)?;
        self.rsp_seen = index;
        Ok(ahead)
    }

    /// Responses that [`take`](Self::take) will give, as of the last [`poll`](Self::poll).
    #[inline]
    #[must_use]
    pub fn available(&self) -> u32 {
        self.rsp_seen.wrapping_sub(self.rsp_cons)
    }

    /// The next response, read from the page once, and the slot it was in. `None` when all that the last
    /// [`poll`](Self::poll) saw are taken.
    #[inline]
    pub fn take(&mut self) -> Option<(u16, Rsp)> {
        if self.available() == 0 {
            return None;
        }
        let response = Rsp::load(&self.memory, Self::at(self.rsp_cons));
        let slot = Self::slot(self.rsp_cons);
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Some((slot, response))
    }

    /// The responses as an iterator; it takes what it gives.
    #[inline]
    pub fn responses(&mut self) -> Responses<'_, M, Req, Rsp> {
        Responses(self)
    }

    /// Asks to be woken by the next response. `true`: there is one already (it may have slipped in meanwhile), so go on
    /// instead of going to sleep.
    ///
    /// # Errors
    /// As of [`poll`](Self::poll).
    pub fn arm(&mut self) -> Result<bool, RingFault> {
        self.arm_for(1)
    }

    /// As [`arm`](Self::arm), but to be woken once `needed` responses are there to be taken.
    ///
    /// # Errors
    /// As of [`poll`](Self::poll).
    pub fn arm_for(&mut self, needed: u32) -> Result<bool, RingFault> {
        if self.poll()? >= needed {
            return Ok(true);
        }
        arm(&self.memory, layout::RSP_EVENT, self.rsp_cons.wrapping_add(needed));
        Ok(self.poll()? >= needed)
    }

    /// Gives the page back.
    #[must_use]
    pub fn into_inner(self) -> M {
        self.memory
    }
}

/// See [`FrontRing::responses`].
#[derive(Debug)]
pub struct Responses<'a, M, Req, Rsp>(&'a mut FrontRing<M, Req, Rsp>);

impl<M: SharedMemory, Req: Slot, Rsp: Slot> Iterator for Responses<'_, M, Req, Rsp> {
    type Item = (u16, Rsp);

    #[inline]
    fn next(&mut self) -> Option<(u16, Rsp)> {
        self.0.take()
    }
}

//! The control ring: what is asked of the backend out of band.
//!
//! One request at a time, and nothing waits for an answer: packets flow before, meanwhile and without. What the backend
//! does not do is left out.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use evtchn::{Channel, Eoi, Work};
use grant::SharedMemory;
use hypercall::{GrantRef, Hypervisor, Instant, PAGE_SIZE, Port};
use netif::ctrl::{CtrlFrontRing, CtrlRequest, CtrlResponse, CtrlStatus, CtrlType, StaticGrant};
use netif::hash::{HashAlgorithm, HashTypes};

use crate::fault::{BackendFault, Refusal};
use crate::flow;
use crate::queue::{Maker, Queue, RingPage};

/// Entries of a list of references: what a page holds.
const LIST: usize = PAGE_SIZE / StaticGrant::SIZE;

/// A request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ask {
    /// Which fields it can hash.
    HashTypes,
    Algorithm(HashAlgorithm),
    SetTypes(HashTypes),
    Key,
    /// How large a mapping from hashes to queues can be.
    MappingSize,
    SetMappingSize,
    Mapping,
    /// How many references of a queue it can keep mapped.
    Statics(usize),
    /// Keep so many of a queue.
    Add(usize, u32),
    /// Let go of all of a queue.
    Remove(usize),
}

impl Ask {
    const fn kind(self) -> CtrlType {
        match self {
            Self::HashTypes => CtrlType::GET_HASH_FLAGS,
            Self::Algorithm(_) => CtrlType::SET_HASH_ALGORITHM,
            Self::SetTypes(_) => CtrlType::SET_HASH_FLAGS,
            Self::Key => CtrlType::SET_HASH_KEY,
            Self::MappingSize => CtrlType::GET_HASH_MAPPING_SIZE,
            Self::SetMappingSize => CtrlType::SET_HASH_MAPPING_SIZE,
            Self::Mapping => CtrlType::SET_HASH_MAPPING,
            Self::Statics(_) => CtrlType::GET_GREF_MAPPING_SIZE,
            Self::Add(..) => CtrlType::ADD_GREF_MAPPING,
            Self::Remove(_) => CtrlType::DEL_GREF_MAPPING,
        }
    }

    const fn is_about_hashing(self) -> bool {
        !matches!(self, Self::Statics(_) | Self::Add(..) | Self::Remove(_))
    }
}

/// The references of a queue that the backend keeps mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Statics {
    kept: u32,
    /// At most.
    limit: u32,
}

/// The control ring of a connection.
pub(crate) struct Control<H: Hypervisor> {
    ring: CtrlFrontRing<RingPage<H>>,
    gref: GrantRef,
    channel: Channel<H>,
    event: bool,
    /// What goes with a request.
    page: RingPage<H>,
    todo: VecDeque<Ask>,
    asked: Option<(u16, Ask)>,
    next_id: u16,
    /// By queue.
    statics: Vec<Statics>,
    /// The connection is about to end.
    leaving: bool,
}

impl<H: Hypervisor> Control<H> {
    /// A control ring that no backend knows of yet.
    pub(crate) fn new(maker: &Maker<'_, H>, queues: usize) -> Result<Self, Refusal> {
        let (ring, page) = (maker.page()?, maker.page()?);
        let mut todo = VecDeque::new();
        if queues > 1 {
            todo.extend([
                Ask::Algorithm(HashAlgorithm::Toeplitz),
                Ask::HashTypes,
                Ask::Key,
                Ask::MappingSize,
            ]);
        }
        if maker.static_grants {
            todo.extend((0..queues).map(Ask::Statics));
        }
        Ok(Self {
            gref: ring.gref(),
            ring: CtrlFrontRing::init_at(ring, maker.first_index),
            channel: maker.channel()?,
            event: false,
            page,
            todo,
            asked: None,
            next_id: 0,
            statics: vec![Statics::default(); queues],
            leaving: false,
        })
    }

    /// What the backend has to know.
    pub(crate) fn nodes(&self) -> (GrantRef, Port) {
        (self.gref, self.channel.port())
    }

    /// Takes an event, if it is for this ring.
    pub(crate) fn on_event(&mut self, port: Port) -> bool {
        let own = self.channel.port() == port;
        self.event |= own;
        own
    }

    /// References that the backend keeps mapped.
    pub(crate) fn static_grants(&self) -> usize {
        self.statics.iter().map(|it| it.kept as usize).sum()
    }

    /// Has the backend let go of what it keeps mapped, since the connection is about to end.
    pub(crate) fn leave(&mut self) {
        self.leaving = true;
        self.todo.clear();
        let kept = self.statics.iter().enumerate().filter(|(_, it)| it.kept > 0);
        self.todo.extend(kept.map(|(queue, _)| Ask::Remove(queue)));
    }

    /// Whether there is nothing more that [`leave`](Self::leave) waits for.
    pub(crate) fn has_left(&self) -> bool {
        self.leaving && self.asked.is_none() && self.todo.is_empty()
    }

    /// Takes answers, and asks what there is to ask.
    pub(crate) fn poll(
        &mut self,
        queues: &mut [Queue<H>],
        now: Instant,
    ) -> Result<(), BackendFault> {
        let mut worked = false;
        loop {
            self.ring.poll()?;
            if let Some((_, response)) = self.ring.take() {
                worked = true;
                self.answered(response, queues)?;
            }
            self.ask(queues)?;
            if self.ring.publish().is_needed() {
                // A backend whose end is gone is seen by its state in the store.
                let _ = self.channel.notify();
            }
            if !self.ring.arm()? {
                break;
            }
        }
        if core::mem::take(&mut self.event) {
            let work = if worked { Work::Done } else { Work::Spurious };
            let (Eoi::Open | Eoi::Throttled(_)) = self.channel.eoi(work, now);
        } else {
            self.channel.open_if_due(now);
        }
        Ok(())
    }

    /// When to poll though no event comes.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.channel.throttled_until()
    }

    /// The next request, if none is without its answer.
    fn ask(&mut self, queues: &mut [Queue<H>]) -> Result<(), BackendFault> {
        if self.asked.is_some() {
            return Ok(());
        }
        let Some(ask) = self.todo.pop_front().or_else(|| self.keep_more(queues)) else {
            return Ok(());
        };
        let gref = self.page.gref().0;
        let data = match ask {
            Ask::HashTypes | Ask::MappingSize => [0; 3],
            Ask::Algorithm(algorithm) => [algorithm as u32, 0, 0],
            Ask::SetTypes(types) => [types.bits(), 0, 0],
            Ask::Key => {
                let key = flow::key();
                self.page.write_bytes(0, &key);
                [gref, key.len() as u32, 0]
            }
            Ask::SetMappingSize => [flow::MAPPING as u32, 0, 0],
            Ask::Mapping => {
                for entry in 0..flow::MAPPING {
                    let queue = entry.checked_rem(queues.len()).unwrap_or(0) as u32;
                    self.page.store_u32(entry * 4, queue, Ordering::Relaxed);
                }
                [gref, flow::MAPPING as u32, 0]
            }
            Ask::Statics(queue) => [queue as u32, 0, 0],
            Ask::Add(queue, count) => [queue as u32, gref, count],
            Ask::Remove(queue) => {
                let grefs = queues.get(queue).into_iter().flat_map(Queue::grefs);
                let mut count = 0;
                for (gref, readonly) in grefs.take(LIST) {
                    put(&self.page, count, gref, readonly);
                    count += 1;
                }
                [queue as u32, gref, count as u32]
            }
        };
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.ring.push(CtrlRequest { id, kind: ask.kind(), data })?;
        self.asked = Some((id, ask));
        Ok(())
    }

    /// A list of references that the backend has room to keep and does not, if there are any.
    fn keep_more(&mut self, queues: &mut [Queue<H>]) -> Option<Ask> {
        if self.leaving {
            return None;
        }
        for (index, (queue, statics)) in queues.iter_mut().zip(&self.statics).enumerate() {
            let room = (statics.limit.saturating_sub(statics.kept) as usize).min(LIST);
            let fresh = core::iter::from_fn(|| queue.take_fresh()).take(room);
            let mut count = 0;
            for (gref, readonly) in fresh {
                put(&self.page, count, gref, readonly);
                count += 1;
            }
            if count > 0 {
                return Some(Ask::Add(index, count as u32));
            }
        }
        None
    }

    fn answered(
        &mut self,
        response: CtrlResponse,
        queues: &mut [Queue<H>],
    ) -> Result<(), BackendFault> {
        let Some((id, ask)) = self.asked.take() else {
            return Err(BackendFault::Control(response.id));
        };
        if (response.id, response.kind) != (id, ask.kind()) {
            return Err(BackendFault::Control(response.id));
        }
        let done = response.status == CtrlStatus::SUCCESS;
        if !done {
            log::debug!("netfront: {ask:?} ended with {:?}", response.status);
        }
        if self.leaving {
            return Ok(());
        }
        match ask {
            Ask::HashTypes if done => {
                let types = flow::TYPES & HashTypes::from_bits_truncate(response.data);
                if types.is_empty() {
                    self.do_without_hash();
                } else {
                    self.todo.push_front(Ask::SetTypes(types));
                }
            }
            // Without a mapping the remainder counts, which is all that ours says.
            Ask::MappingSize if done && response.data >= flow::MAPPING as u32 => {
                self.todo.push_front(Ask::Mapping);
                self.todo.push_front(Ask::SetMappingSize);
            }
            Ask::Algorithm(HashAlgorithm::None) | Ask::MappingSize => {}
            ask if ask.is_about_hashing() && !done => self.do_without_hash(),
            Ask::Statics(queue) => {
                let limit = if done { response.data } else { 0 };
                self.limit(queue, limit, queues);
            }
            Ask::Add(queue, count) => {
                // None of them is kept if one cannot be.
                let kept = self.statics.get(queue).map_or(0, |it| it.kept);
                if !done {
                    self.limit(queue, kept, queues);
                } else if let Some(statics) = self.statics.get_mut(queue) {
                    statics.kept = kept.saturating_add(count);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A queue can have so many references kept.
    fn limit(&mut self, queue: usize, limit: u32, queues: &mut [Queue<H>]) {
        let Some(statics) = self.statics.get_mut(queue) else { return };
        statics.limit = limit;
        if limit <= statics.kept
            && let Some(queue) = queues.get_mut(queue)
        {
            queue.keep_fresh();
        }
    }

    /// The backend chooses queues as it likes. Half a hash would have all packets on one queue.
    fn do_without_hash(&mut self) {
        self.todo.retain(|ask| !ask.is_about_hashing());
        self.todo.push_front(Ask::Algorithm(HashAlgorithm::None));
    }
}

/// Writes an entry of a list.
fn put<H: Hypervisor>(page: &RingPage<H>, index: usize, gref: GrantRef, readonly: bool) {
    let [first, second] = StaticGrant { gref, readonly, status: CtrlStatus::SUCCESS }.encode();
    page.store_u32(index * StaticGrant::SIZE, first, Ordering::Relaxed);
    page.store_u32(index * StaticGrant::SIZE + 4, second, Ordering::Relaxed);
}

//! A queue: both rings and their event channels.

use core::sync::atomic::Ordering;

use alloc::vec::Vec;

use evtchn::{Binder, Channel, Eoi, Work};
use grant::{GrantTable, GrantedPage, SharedMemory};
use hypercall::{DomId, GrantRef, Hypervisor, Instant, Port};
use netif::keys::Features;
use netif::slot::ExtraInfo;

use crate::Meta;
use crate::counters::Counters;
use crate::fault::{BackendFault, Refusal, SendError};
use crate::negotiate::{Ports, QueueNodes};
use crate::rx::RxQueue;
use crate::tx::TxQueue;

/// Nanoseconds between two looks at a queue of which nothing is heard: a notification may have been lost.
const SLOW_POLL: u64 = 1_000_000_000;

/// The page of a ring: granted for as long as the ring is there.
pub(crate) struct RingPage<H: Hypervisor>(GrantedPage<H>);

impl<H: Hypervisor> RingPage<H> {
    pub(crate) fn gref(&self) -> GrantRef {
        self.0.gref()
    }
}

impl<H: Hypervisor> SharedMemory for RingPage<H> {
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.0.page().load_u32(offset, order)
    }

    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.0.page().store_u32(offset, value, order);
    }

    fn load_words<const N: usize>(&self, offset: usize) -> [u32; N] {
        self.0.page().load_words(offset)
    }

    fn store_words<const N: usize>(&self, offset: usize, words: [u32; N]) {
        self.0.page().store_words(offset, words);
    }

    fn fence(&self) {
        self.0.page().fence();
    }

    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        self.0.page().read_bytes(offset, to);
    }

    fn write_bytes(&self, offset: usize, from: &[u8]) {
        self.0.page().write_bytes(offset, from);
    }
}

enum Channels<H: Hypervisor> {
    Shared(Channel<H>),
    Split { tx: Channel<H>, rx: Channel<H> },
}

/// What making a queue takes.
pub(crate) struct Maker<'a, H: Hypervisor> {
    pub(crate) table: &'a GrantTable<H>,
    pub(crate) binder: &'a Binder<H>,
    pub(crate) backend: DomId,
    /// What the backend takes and offers.
    pub(crate) offered: Features,
    /// Requests to have posted.
    pub(crate) posted: u16,
    /// Where the rings' indices begin.
    pub(crate) first_index: u32,
    /// What pages held before may be seen by the backend again.
    pub(crate) trusted: bool,
    /// The backend may be asked to keep pages mapped.
    pub(crate) static_grants: bool,
    pub(crate) now: Instant,
}

impl<H: Hypervisor> Maker<'_, H> {
    pub(crate) fn page(&self) -> Result<RingPage<H>, Refusal> {
        Ok(RingPage(self.table.share(self.backend, false)?))
    }

    pub(crate) fn channel(&self) -> Result<Channel<H>, Refusal> {
        self.binder.alloc_unbound(self.backend).map_err(Refusal::Port)
    }

    /// Rings, pages and ports that no backend knows of yet; what was done is undone where the rest fails.
    pub(crate) fn make(&self, split: bool) -> Result<Queue<H>, Refusal> {
        let first = self.channel()?;
        // Where ports are short, one does for both.
        let channels = match split.then(|| self.channel()) {
            Some(Ok(rx)) => Channels::Split { tx: first, rx },
            Some(Err(_)) | None => Channels::Shared(first),
        };
        Ok(Queue {
            tx: TxQueue::new(self, self.page()?),
            rx: RxQueue::new(self, self.page()?),
            channels,
            tx_event: false,
            rx_event: false,
            tx_worked: false,
            rx_worked: false,
            spurious: 0,
            next_poll: self.now.after(SLOW_POLL),
        })
    }
}

pub(crate) struct Queue<H: Hypervisor> {
    tx: TxQueue<H>,
    rx: RxQueue<H>,
    channels: Channels<H>,
    /// Events that came and whose channel is still masked.
    tx_event: bool,
    rx_event: bool,
    /// Whether there was something to do since.
    tx_worked: bool,
    rx_worked: bool,
    spurious: u64,
    /// When to look though nothing calls for it: for packets of which no event came, and for stalls.
    next_poll: Instant,
}

/// What a poll came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Polled {
    /// Packets wait to be received, or there is room again for a sender that found none.
    pub(crate) more: bool,
    /// The backend has begun to leave everything unanswered.
    pub(crate) stalled: bool,
}

impl<H: Hypervisor> Queue<H> {
    pub(crate) fn nodes(&self) -> QueueNodes {
        let ports = match &self.channels {
            Channels::Shared(both) => Ports::Shared(both.port()),
            Channels::Split { tx, rx } => Ports::Split { tx: tx.port(), rx: rx.port() },
        };
        QueueNodes { tx_ring: self.tx.gref(), rx_ring: self.rx.gref(), ports }
    }

    pub(crate) fn counters(&self) -> Counters {
        Counters { tx: self.tx.counters, rx: self.rx.counters, spurious: self.spurious }
    }

    /// Slots that were sent and not answered.
    pub(crate) fn in_flight(&self) -> u64 {
        self.tx.in_flight()
    }

    /// Takes an event, if it is for this queue.
    pub(crate) fn on_event(&mut self, port: Port) -> bool {
        match &self.channels {
            Channels::Shared(both) if both.port() == port => {
                (self.tx_event, self.rx_event) = (true, true);
            }
            Channels::Split { tx, .. } if tx.port() == port => self.tx_event = true,
            Channels::Split { rx, .. } if rx.port() == port => self.rx_event = true,
            _ => return false,
        }
        true
    }

    #[cfg(feature = "smoltcp")]
    pub(crate) fn has_room(&mut self, packets: usize) -> bool {
        self.tx.has_room(packets)
    }

    pub(crate) fn send(&mut self, bytes: &[u8], meta: Meta) -> Result<(), SendError> {
        self.tx.send(bytes, meta)
    }

    pub(crate) fn receive(&mut self, to: &mut Vec<u8>) -> Result<Option<Meta>, BackendFault> {
        let received = self.rx.receive(to)?;
        self.rx_worked |= received.is_some();
        Ok(received)
    }

    /// Shows the backend what was sent and what pages are free; wakes it at most once for each channel.
    fn publish(&mut self, now: Instant) {
        let (tx, rx) = (self.tx.publish(), self.rx.publish(now));
        // A backend whose end is gone is seen by its state in the store.
        match &self.channels {
            Channels::Shared(both) => {
                if (tx | rx).is_needed() {
                    let _ = both.notify();
                }
            }
            Channels::Split { tx: tx_channel, rx: rx_channel } => {
                if tx.is_needed() {
                    let _ = tx_channel.notify();
                }
                if rx.is_needed() {
                    let _ = rx_channel.notify();
                }
            }
        }
    }

    /// Takes TX responses, shows what there is to show, and ends events.
    pub(crate) fn poll(&mut self, now: Instant) -> Result<Polled, BackendFault> {
        self.next_poll = now.after(SLOW_POLL);
        let reaped = self.tx.reap(now)?;
        self.tx_worked |= reaped.worked;
        self.publish(now);
        let more = self.rx.arm()?;
        self.end_events(more, now);
        Ok(Polled { more: more || reaped.room, stalled: reaped.stalled })
    }

    pub(crate) fn multicast(&mut self, change: ExtraInfo) -> Result<(), SendError> {
        self.tx.multicast(change)
    }

    pub(crate) fn take_multicast_refused(&mut self) -> bool {
        self.tx.take_multicast_refused()
    }

    /// A reference that was granted and not yet given out here, and whether the backend only reads there.
    pub(crate) fn take_fresh(&mut self) -> Option<(GrantRef, bool)> {
        let tx = self.tx.take_fresh().map(|gref| (gref, true));
        tx.or_else(|| self.rx.take_fresh().map(|gref| (gref, false)))
    }

    /// Nobody asks for fresh references any more.
    pub(crate) fn keep_fresh(&mut self) {
        self.tx.keep_fresh();
        self.rx.keep_fresh();
    }

    /// Every reference to pages for packets that the backend knows of.
    pub(crate) fn grefs(&self) -> impl Iterator<Item = (GrantRef, bool)> {
        let tx = self.tx.grefs().map(|gref| (gref, true));
        tx.chain(self.rx.grefs().map(|gref| (gref, false)))
    }

    /// The RX event goes on until all packets are received.
    fn end_events(&mut self, more: bool, now: Instant) {
        let (tx_done, rx_done) = (self.tx_event, self.rx_event && !more);
        let (tx_worked, rx_worked) = (self.tx_worked, self.rx_worked);
        let mut settle = |channel: &mut Channel<H>, done: bool, worked: bool| {
            if done {
                self.spurious += u64::from(!worked);
                let work = if worked { Work::Done } else { Work::Spurious };
                // Throttled channels are opened below, when their time comes.
                let (Eoi::Open | Eoi::Throttled(_)) = channel.eoi(work, now);
            } else {
                channel.open_if_due(now);
            }
        };
        match &mut self.channels {
            Channels::Shared(both) => {
                settle(both, rx_done, tx_worked || rx_worked);
                if rx_done {
                    (self.tx_event, self.rx_event) = (false, false);
                    (self.tx_worked, self.rx_worked) = (false, false);
                }
            }
            Channels::Split { tx, rx } => {
                settle(tx, tx_done, tx_worked);
                settle(rx, rx_done, rx_worked);
                if tx_done {
                    (self.tx_event, self.tx_worked) = (false, false);
                }
                if rx_done {
                    (self.rx_event, self.rx_worked) = (false, false);
                }
            }
        }
    }

    /// When this queue wants to be polled though no event comes.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let channels = match &self.channels {
            Channels::Shared(both) => [both.throttled_until(), None],
            Channels::Split { tx, rx } => [tx.throttled_until(), rx.throttled_until()],
        };
        let own = [self.rx.deadline(), Some(self.next_poll)];
        channels.into_iter().chain(own).flatten().min()
    }
}

//! A queue: both rings and their event channels. Each is independent of all others.

use evtchn::{Binder, Channel, Eoi, Work};
use grant::{MapRequest, Mapper, Mapping};
use hypercall::{DomId, GrantRef, Hypervisor, Instant, PageOffset, Port};
use netif::keys;
use netif::ring::{Notify, RxBackRing, TxBackRing};

use crate::counters::Counters;
use crate::fault::{Refusal, VifFault};
use crate::lent::Origin;
use crate::multicast::Filter;
use crate::negotiate::{Ports, QueueRequest};
use crate::rate::{Credit, RateLimit};
use crate::rx::RxQueue;
use crate::tx::{BATCH, Statics, Take, TxQueue, TxWait};

enum Channels<H: Hypervisor> {
    Shared(Channel<H>),
    Split { tx: Channel<H>, rx: Channel<H> },
}

/// Events that were handed out and whose channel is still masked.
#[derive(Clone, Copy, Default)]
struct Events {
    tx: bool,
    rx: bool,
}

pub(crate) struct Queue<H: Hypervisor> {
    pub(crate) tx: TxQueue<H>,
    pub(crate) rx: RxQueue<H>,
    channels: Channels<H>,
    events: Events,
    /// Whether packets were carried since the last event ended. Not since this one came: work is often done before the
    /// event that announces it is seen, and a peer must not be throttled for that.
    worked: Events,
    /// There may be requests to take.
    tx_ready: bool,
    /// Packets that may still be taken in this poll.
    budget: usize,
}

/// What connecting a queue takes.
pub(crate) struct Connector<'a, H: Hypervisor> {
    pub(crate) mapper: &'a Mapper<H>,
    pub(crate) binder: &'a Binder<H>,
    pub(crate) domain: DomId,
    pub(crate) rate: RateLimit,
    pub(crate) headroom: PageOffset,
    pub(crate) now: Instant,
}

impl<H: Hypervisor> Connector<'_, H> {
    fn map(&self, gref: GrantRef, key: &'static str) -> Result<Mapping<H>, Refusal> {
        let request = MapRequest { domain: self.domain, gref, read_only: false };
        self.mapper.map(request).map_err(|error| Refusal::Map { key, error })
    }

    fn bind(&self, port: Port, key: &'static str) -> Result<Channel<H>, Refusal> {
        let bound = self.binder.bind_interdomain(self.domain, port);
        bound.map_err(|error| Refusal::Bind { key, error })
    }

    /// Maps the rings and binds the ports; what was done is undone where the rest fails.
    pub(crate) fn connect(
        &self,
        origin: Origin,
        request: &QueueRequest,
    ) -> Result<Queue<H>, Refusal> {
        let ring_fault = |key, fault| Refusal::Ring { key, fault };
        let tx = TxBackRing::attach(self.map(request.tx_ring, keys::TX_RING_REF)?)
            .map_err(|(fault, _)| ring_fault(keys::TX_RING_REF, fault))?;
        let rx = RxBackRing::attach(self.map(request.rx_ring, keys::RX_RING_REF)?)
            .map_err(|(fault, _)| ring_fault(keys::RX_RING_REF, fault))?;
        let channels = match request.ports {
            Ports::Shared(port) => Channels::Shared(self.bind(port, keys::EVENT_CHANNEL)?),
            Ports::Split { tx, rx } => Channels::Split {
                tx: self.bind(tx, keys::EVENT_CHANNEL_TX)?,
                rx: self.bind(rx, keys::EVENT_CHANNEL_RX)?,
            },
        };
        Ok(Queue {
            tx: TxQueue::new(self.domain, origin, tx, Credit::new(self.rate, self.now)),
            rx: RxQueue::new(self.domain, origin, rx, self.headroom),
            channels,
            events: Events::default(),
            worked: Events::default(),
            // The frontend may have sent before we came, and does not say so again.
            tx_ready: true,
            budget: 0,
        })
    }
}

impl<H: Hypervisor> Queue<H> {
    pub(crate) fn ports(&self) -> impl Iterator<Item = Port> {
        let (first, second) = match &self.channels {
            Channels::Shared(both) => (both, None),
            Channels::Split { tx, rx } => (tx, Some(rx)),
        };
        [Some(first), second].into_iter().flatten().map(Channel::port)
    }

    pub(crate) fn counters(&self) -> Counters {
        Counters {
            tx: self.tx.counters,
            rx: self.rx.counters,
            tx_drops: self.tx.drops,
            rx_drops: self.rx.drops,
            tx_paths: self.tx.paths,
            rx_paths: self.rx.paths,
            fallbacks: self.tx.fallbacks,
        }
    }

    /// An event came on one of its ports.
    pub(crate) fn on_event(&mut self, port: Port) {
        match &self.channels {
            Channels::Shared(_) => self.events = Events { tx: true, rx: true },
            Channels::Split { tx, .. } if tx.port() == port => self.events.tx = true,
            Channels::Split { .. } => self.events.rx = true,
        }
        self.tx_ready |= self.events.tx;
    }

    /// Takes a new limit; a packet that waits for the old one is tried again at once.
    pub(crate) fn set_rate(&mut self, rate: RateLimit) {
        self.tx_ready |= self.tx.waits_until().is_some();
        self.tx.set_rate(rate);
    }

    /// Whether there may be packets to take.
    pub(crate) fn has_tx(&self) -> bool {
        self.tx_ready
    }

    /// Whether there may be packets to take, and as many as a poll may take were taken.
    pub(crate) fn has_more(&self) -> bool {
        self.tx_ready && self.budget == 0
    }

    /// A poll begins.
    pub(crate) fn begin(&mut self, tick: bool, now: Instant) {
        self.budget = BATCH;
        self.tx_ready |= tick;
        self.tx_ready |= self.tx.waits_until().is_some_and(|at| at <= now);
    }

    /// Takes packets from the guest into the batch.
    pub(crate) fn gather_tx(
        &mut self,
        take: &mut Take<'_, H>,
        statics: &impl Statics<H>,
        filter: Option<&mut Filter>,
    ) -> Result<(), VifFault> {
        if !self.tx_ready || self.budget == 0 {
            return Ok(());
        }
        let budget = self.budget;
        let wait = self.tx.gather(take, statics, filter, &mut self.budget)?;
        // A packet that is mapped is answered long after the event that announced it.
        self.worked.tx |= self.budget != budget;
        match wait {
            TxWait::Guest | TxWait::Time => self.tx_ready = false,
            TxWait::Budget | TxWait::Buffers => {}
        }
        Ok(())
    }

    /// Shows the guest all that was done since the last time, each ring once, and notifies it of both at once where
    /// they share a channel.
    pub(crate) fn publish(&mut self) {
        let (tx, rx) = (self.tx.publish(), self.rx.publish());
        // Requests that were answered, if only to be dropped: the event announced something.
        self.worked.tx |= tx.is_some();
        self.worked.rx |= rx.is_some();
        let (tx, rx) = (tx == Some(Notify::Needed), rx == Some(Notify::Needed));
        self.tx.counters.notifications += u64::from(tx);
        // A peer whose end is gone is seen by its state in the store.
        match &self.channels {
            Channels::Shared(both) => {
                self.rx.counters.notifications += u64::from(rx && !tx);
                if tx || rx {
                    let _ = both.notify();
                }
            }
            Channels::Split { tx: tx_channel, rx: rx_channel } => {
                self.rx.counters.notifications += u64::from(rx);
                if tx {
                    let _ = tx_channel.notify();
                }
                if rx {
                    let _ = rx_channel.notify();
                }
            }
        }
    }

    /// Ends the events whose work is done, and opens the channels that were throttled long enough.
    pub(crate) fn end_events(&mut self, now: Instant) {
        let Self { channels, events, worked, tx, rx, .. } = self;
        let work = |worked| if worked { Work::Done } else { Work::Spurious };
        let settle = |channel: &mut Channel<H>, event: bool, worked: bool, spurious: &mut u64| {
            if event {
                *spurious += u64::from(!worked);
                // Throttled channels are opened below, when their time comes.
                let (Eoi::Open | Eoi::Throttled(_)) = channel.eoi(work(worked), now);
            } else {
                channel.open_if_due(now);
            }
        };
        let tx_done = events.tx && !self.tx_ready && tx.waits_until().is_none();
        match channels {
            Channels::Shared(both) => {
                settle(both, tx_done, worked.tx || worked.rx, &mut tx.counters.spurious);
                if tx_done {
                    (*events, *worked) = (Events::default(), Events::default());
                }
            }
            Channels::Split { tx: tx_channel, rx: rx_channel } => {
                settle(tx_channel, tx_done, worked.tx, &mut tx.counters.spurious);
                settle(rx_channel, events.rx, worked.rx, &mut rx.counters.spurious);
                if tx_done {
                    (events.tx, worked.tx) = (false, false);
                }
                if events.rx {
                    (events.rx, worked.rx) = (false, false);
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
        channels.into_iter().chain([self.tx.waits_until(), self.rx.deadline()]).flatten().min()
    }

    /// Lets go of ports and rings; what was not delivered is dropped.
    pub(crate) fn disconnect(self) -> [Mapping<H>; 2] {
        [self.tx.into_mapping(), self.rx.into_mapping()]
    }
}

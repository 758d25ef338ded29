//! The upcall: which ports have something for us.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::Ordering;

use hypercall::{DomId, Errno, Hypervisor, Port, VcpuId, Virq};

use crate::channel::Channel;
use crate::fifo::Queues;
use crate::ports::{Delivery, Ports};

/// The event channels of a domain, and the upcalls of the virtual CPU that hears them. A domain has one of these, for as long
/// as it runs.
pub struct Upcalls<H: Hypervisor> {
    ports: Arc<Ports<H>>,
    vcpu: VcpuId,
    /// Where there are none, delivery is by bits.
    queues: Option<Queues>,
    /// Where the next scan of bits begins.
    start: u32,
}

impl<H: Hypervisor> Upcalls<H> {
    /// Takes over event delivery, all ports masked: through queues if Xen has them, else by bits.
    #[must_use]
    pub fn new(hv: &H, vcpu: VcpuId) -> Self {
        let ports = Arc::new(Ports::new(hv, vcpu));
        let queues = Queues::start(hv, vcpu);
        let mut upcalls = Self { ports, vcpu, queues: None, start: 0 };
        upcalls.begin(queues);
        upcalls
    }

    fn begin(&mut self, queues: Option<Queues>) {
        self.ports.begin(if queues.is_some() { Delivery::Fifo } else { Delivery::TwoLevel });
        self.queues = queues;
    }

    /// To be called after this domain was restored elsewhere, before anything else that has to do with events (and not at all
    /// after a suspend that was cancelled). Xen knows no ports of ours there, and perhaps delivers in another way. All ports
    /// are masked. [`Channel`]s of before are void: they change nothing any more, also when they are dropped, whatever their
    /// numbers mean now. Binders go on as they are.
    pub fn resumed(&mut self) {
        let (hv, vcpu) = (&self.ports.hv, self.vcpu);
        let queues = match self.queues.take() {
            Some(queues) => queues.restart(hv, vcpu),
            None => Queues::start(hv, vcpu),
        };
        self.begin(queues);
    }

    /// How events are delivered.
    #[must_use]
    pub fn delivery(&self) -> Delivery {
        self.ports.delivery()
    }

    /// Ports that are bound now.
    #[must_use]
    pub fn bound(&self) -> usize {
        self.ports.bound()
    }

    /// What drivers bind their ports with.
    #[must_use]
    pub fn binder(&self) -> Binder<H> {
        Binder { ports: Arc::clone(&self.ports) }
    }

    /// Whether a scan would find anything. Ask before going to sleep: an event that Xen raises after that wakes the
    /// domain, one that came before does not.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.ports.bits.upcall_pending().load(Ordering::SeqCst) != 0
    }

    /// Hands out at most `budget` ports that have events, each masked until its [`Channel::eoi`]; what is left over
    /// is found by the next scan. Answers how many.
    pub fn scan(&mut self, budget: usize, each: impl FnMut(Port)) -> usize {
        let Self { ports, queues, start, .. } = self;
        let bits = &ports.bits;
        // First of all: Xen sets this last, so what it is set for after this is either found below or by the next scan.
        if budget == 0 || bits.upcall_pending().swap(0, Ordering::SeqCst) == 0 {
            return 0;
        }
        let Some(queues) = queues else { return bits.scan(start, budget, each) };
        let (found, more) = queues.scan(&ports.array, budget, each);
        if more {
            bits.look_again();
        }
        found
    }
}

/// Binds ports whose events [`Upcalls::scan`] will hand out. Cheap to clone; each driver has its own.
#[derive(Clone)]
pub struct Binder<H: Hypervisor> {
    ports: Arc<Ports<H>>,
}

impl<H: Hypervisor> Binder<H> {
    /// Joins the port that `remote` offers us.
    ///
    /// # Errors
    /// As Xen answers: [`Errno::INVAL`] when it is not offered to us. [`Errno::NOMEM`] when there is no memory for its events.
    pub fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Channel<H>, Errno> {
        self.ports.hv.bind_interdomain(remote, port).and_then(|port| self.bind(port))
    }

    /// A port of ours that `remote` may join.
    ///
    /// # Errors
    /// As Xen answers. [`Errno::NOMEM`] when there is no memory for its events.
    pub fn alloc_unbound(&self, remote: DomId) -> Result<Channel<H>, Errno> {
        self.ports.hv.alloc_unbound(remote).and_then(|port| self.bind(port))
    }

    /// A virtual interrupt line.
    ///
    /// # Errors
    /// As Xen answers. [`Errno::NOMEM`] when there is no memory for its events.
    pub fn bind_virq(&self, virq: Virq, vcpu: VcpuId) -> Result<Channel<H>, Errno> {
        self.ports.hv.bind_virq(virq, vcpu).and_then(|port| self.bind(port))
    }

    /// A port that is bound already, by whoever built this domain: the store's or the console's.
    ///
    /// # Errors
    /// [`Errno::NOMEM`] when there is no memory for its events, or as Xen answers when it is given that. The port stays as it
    /// is.
    pub fn adopt(&self, port: Port) -> Result<Channel<H>, Errno> {
        self.ports.bind(port)?;
        Ok(Channel::new(Arc::clone(&self.ports), port))
    }

    /// A port that Xen has just bound for us, and that nobody needs if we cannot hear it.
    fn bind(&self, port: Port) -> Result<Channel<H>, Errno> {
        let bound = self.adopt(port);
        if bound.is_err() {
            let _ = self.ports.hv.close(port);
        }
        bound
    }
}

impl<H: Hypervisor> fmt::Debug for Binder<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Binder").finish_non_exhaustive()
    }
}

impl<H: Hypervisor> fmt::Debug for Upcalls<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upcalls").field("delivery", &self.delivery()).finish_non_exhaustive()
    }
}

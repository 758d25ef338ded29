//! What the channels of a domain have in common.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use hypercall::{Errno, Hypervisor, Port, VcpuId};

use crate::fifo::EventArray;
use crate::two_level::EventBits;

/// How Xen says which ports have events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Through queues in memory of the domain's: 131,072 ports, and each looks at those alone that have something.
    Fifo,
    /// By two levels of bits in the shared info page: 4,096 ports.
    TwoLevel,
}

/// In which of the lives of the domain, from one restore to the next, a channel was bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life(u32);

/// A domain's ports.
#[derive(Debug)]
pub(crate) struct Ports<H: Hypervisor> {
    pub(crate) hv: H,
    pub(crate) bits: EventBits,
    pub(crate) array: EventArray,
    /// Whether delivery is through queues.
    fifo: AtomicBool,
    life: AtomicU32,
    bound: AtomicUsize,
}

impl<H: Hypervisor> Ports<H> {
    pub(crate) fn new(hv: &H, vcpu: VcpuId) -> Self {
        Self {
            hv: hv.clone(),
            bits: EventBits::new(hv, vcpu),
            array: EventArray::new(),
            fifo: AtomicBool::new(false),
            life: AtomicU32::new(0),
            bound: AtomicUsize::new(0),
        }
    }

    /// A life begins, with all ports masked.
    pub(crate) fn begin(&self, delivery: Delivery) {
        self.life.fetch_add(1, Ordering::SeqCst);
        self.bound.store(0, Ordering::SeqCst);
        self.fifo.store(delivery == Delivery::Fifo, Ordering::SeqCst);
        match delivery {
            Delivery::Fifo => self.array.reset(),
            Delivery::TwoLevel => self.bits.mask_all(),
        }
    }

    pub(crate) fn delivery(&self) -> Delivery {
        if self.fifo.load(Ordering::SeqCst) { Delivery::Fifo } else { Delivery::TwoLevel }
    }

    pub(crate) fn life(&self) -> Life {
        Life(self.life.load(Ordering::SeqCst))
    }

    pub(crate) fn bound(&self) -> usize {
        self.bound.load(Ordering::Relaxed)
    }

    /// A port was bound: sees to it that its events have a place, and counts it.
    pub(crate) fn bind(&self, port: Port) -> Result<(), Errno> {
        if self.delivery() == Delivery::Fifo {
            self.array.cover(&self.hv, port)?;
        }
        self.bound.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Lets go of a port.
    pub(crate) fn close(&self, port: Port) {
        match self.delivery() {
            Delivery::Fifo => self.array.mask(port),
            Delivery::TwoLevel => self.bits.mask_port(port),
        }
        // A port that Xen has already closed, because its peer is gone for good, is what we want.
        let _ = self.hv.close(port);
        self.bound.fetch_sub(1, Ordering::Relaxed);
    }

    /// Lets events of a port raise upcalls; what came while it was masked does so now.
    pub(crate) fn unmask(&self, port: Port) -> Result<(), Errno> {
        match self.delivery() {
            Delivery::Fifo => self.array.unmask(&self.hv, port),
            Delivery::TwoLevel => {
                self.bits.unmask_port(port);
                Ok(())
            }
        }
    }
}

impl<H: Hypervisor> Drop for Ports<H> {
    fn drop(&mut self) {
        self.array.free(&self.hv);
    }
}

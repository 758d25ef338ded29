//! One event channel: notify, late end of interrupt, back-off.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

use hypercall::{Errno, Hypervisor, Instant, Port};

use crate::bits::EventBits;

/// Nanoseconds that a port is left masked after its second spurious event in a row; doubled with each further one.
const FIRST_DELAY: u64 = 1_000_000;
/// Doublings of [`FIRST_DELAY`] at most: about a second.
const MAX_DOUBLINGS: u32 = 10;

/// What an event turned out to be worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// There was something to do.
    Done,
    /// There was nothing: the peer notified for no reason.
    Spurious,
}

/// What became of the port after [`Channel::eoi`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Eoi {
    /// It may raise upcalls again.
    Open,
    /// It stays masked until then: call [`Channel::open_if_due`] when that time comes.
    Throttled(Instant),
}

/// A bound port; closed when dropped.
pub struct Channel<H: Hypervisor> {
    hv: H,
    bits: EventBits,
    port: Port,
    /// Spurious events in a row.
    spurious: u32,
    until: Option<Instant>,
    bound: Arc<AtomicUsize>,
}

impl<H: Hypervisor> Channel<H> {
    pub(crate) fn new(hv: H, bits: EventBits, port: Port, bound: Arc<AtomicUsize>) -> Self {
        bound.fetch_add(1, Ordering::Relaxed);
        bits.unmask_port(port);
        Self { hv, bits, port, spurious: 0, until: None, bound }
    }

    /// Which port.
    #[must_use]
    pub fn port(&self) -> Port {
        self.port
    }

    /// Raises the other end.
    ///
    /// # Errors
    /// As Xen answers.
    pub fn notify(&self) -> Result<(), Errno> {
        self.hv.notify(self.port)
    }

    /// Ends an event that [`Upcalls::scan`](crate::Upcalls::scan) handed out, after the work for it is done. A single
    /// spurious event is forgiven, since work is often done before its notification arrives; a peer that sends several in a
    /// row is heard less and less often.
    pub fn eoi(&mut self, work: Work, now: Instant) -> Eoi {
        match work {
            Work::Done => self.spurious = 0,
            Work::Spurious => self.spurious = self.spurious.saturating_add(1),
        }
        if self.spurious < 2 {
            self.until = None;
            self.bits.unmask_port(self.port);
            return Eoi::Open;
        }
        let doublings = (self.spurious - 2).min(MAX_DOUBLINGS);
        let until = now.after(FIRST_DELAY << doublings);
        self.until = Some(until);
        Eoi::Throttled(until)
    }

    /// When a throttled port is to be opened again.
    #[must_use]
    pub fn throttled_until(&self) -> Option<Instant> {
        self.until
    }

    /// Opens a throttled port whose time has come.
    pub fn open_if_due(&mut self, now: Instant) {
        if self.until.is_some_and(|until| until <= now) {
            self.until = None;
            self.bits.unmask_port(self.port);
        }
    }
}

impl<H: Hypervisor> Drop for Channel<H> {
    fn drop(&mut self) {
        self.bits.mask_port(self.port);
        // A port that Xen has already closed, because its peer is gone for good, is what we want.
        let _ = self.hv.close(self.port);
        self.bound.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<H: Hypervisor> fmt::Debug for Channel<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Channel({})", self.port)
    }
}

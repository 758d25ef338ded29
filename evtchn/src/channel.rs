//! One event channel: notify, late end of interrupt, back-off.

use alloc::sync::Arc;
use core::fmt;

use hypercall::{Errno, Hypervisor, Instant, Port};

use crate::ports::{Life, Ports};

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

/// A bound port; closed when dropped. After [`Upcalls::resumed`](crate::Upcalls::resumed) it is void.
pub struct Channel<H: Hypervisor> {
    ports: Arc<Ports<H>>,
    port: Port,
    life: Life,
    /// Spurious events in a row.
    spurious: u32,
    until: Option<Instant>,
}

impl<H: Hypervisor> Channel<H> {
    /// For a port that `ports` counts as bound.
    pub(crate) fn new(ports: Arc<Ports<H>>, port: Port) -> Self {
        let life = ports.life();
        let mut channel = Self { ports, port, life, spurious: 0, until: None };
        // If it stays closed, it is due from the beginning.
        let _ = channel.open(Instant(0));
        channel
    }

    /// Whether the number of the port still means what it did.
    fn is_current(&self) -> bool {
        self.life == self.ports.life()
    }

    /// Opens the port; where that fails, it counts as throttled, to be opened later.
    fn open(&mut self, now: Instant) -> Eoi {
        self.until = None;
        if self.is_current() && self.ports.unmask(self.port).is_err() {
            return self.throttle(now, FIRST_DELAY);
        }
        Eoi::Open
    }

    fn throttle(&mut self, now: Instant, nanos: u64) -> Eoi {
        let until = now.after(nanos);
        self.until = Some(until);
        Eoi::Throttled(until)
    }

    /// Which port.
    #[must_use]
    pub fn port(&self) -> Port {
        self.port
    }

    /// Raises the other end.
    ///
    /// # Errors
    /// As Xen answers; [`Errno::INVAL`] when the channel is void.
    pub fn notify(&self) -> Result<(), Errno> {
        if !self.is_current() {
            return Err(Errno::INVAL);
        }
        self.ports.hv.notify(self.port)
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
            return self.open(now);
        }
        let doublings = (self.spurious - 2).min(MAX_DOUBLINGS);
        self.throttle(now, FIRST_DELAY << doublings)
    }

    /// When a throttled port is to be opened again.
    #[must_use]
    pub fn throttled_until(&self) -> Option<Instant> {
        self.until
    }

    /// Opens a throttled port whose time has come.
    pub fn open_if_due(&mut self, now: Instant) {
        if self.until.is_some_and(|until| until <= now) {
            // If it stays closed, `until` says so.
            let _ = self.open(now);
        }
    }
}

impl<H: Hypervisor> Drop for Channel<H> {
    fn drop(&mut self) {
        if self.is_current() {
            self.ports.close(self.port);
        }
    }
}

impl<H: Hypervisor> fmt::Debug for Channel<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Channel({})", self.port)
    }
}

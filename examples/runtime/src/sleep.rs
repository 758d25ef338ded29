//! Sleep until there is something to do.

use core::sync::atomic::{AtomicU8, Ordering};

use evtchn::{Binder, Channel, Eoi, Work};
use hypercall::arch::shared_info::UPCALL_PENDING;
use hypercall::{Errno, Hypervisor, Instant, Port};

use crate::machine::{HV, Hv};
use crate::{arch, now};

/// Sleep without processor time. After a suspend that was not cancelled there has to be a new one.
#[derive(Debug)]
pub struct Sleep {
    /// Where the clock's alarm is an event like others.
    timer: Option<Channel<Hv>>,
}

impl Sleep {
    /// # Errors
    /// As Xen answers, where the alarm is an event: when there is a `Sleep` already, for one.
    pub fn new(binder: &Binder<Hv>) -> Result<Self, Errno> {
        Ok(Self { timer: arch::bind_timer(binder)? })
    }

    /// Sleeps until an event channel is pending, a device has raised its interrupt, or the deadline is past, whichever comes
    /// first; without a deadline, until an event or an interrupt.
    ///
    /// "Pending" is `evtchn_upcall_pending` in the shared info page: scan, which clears it, then sleep. No event is
    /// missed: Xen sets the flag before it raises the interrupt, and what the processor does from the look at the flag on
    /// until it sleeps is argued at each processor's `wait`.
    pub fn until(&self, deadline: Option<Instant>) {
        loop {
            let device = arch::acknowledge();
            if device || upcall_pending() || deadline.is_some_and(|deadline| now() >= deadline) {
                break;
            }
            arch::wait(deadline);
        }
    }

    /// Takes an event, if it is the alarm's. What it was about is on the clock.
    pub fn on_event(&mut self, port: Port) -> bool {
        let timer = self.timer.as_mut().filter(|timer| timer.port() == port);
        timer.is_some_and(|timer| {
            // An alarm is never spurious.
            let (Eoi::Open | Eoi::Throttled(_)) = timer.eoi(Work::Done, now());
            true
        })
    }
}

fn upcall_pending() -> bool {
    // SAFETY: the shared info page is mapped for good; Xen and we access the flag as one byte.
    let flag = unsafe { AtomicU8::from_ptr(HV.shared_info().add(UPCALL_PENDING).as_ptr()) };
    flag.load(Ordering::Acquire) != 0
}

//! Stands in for the machine where this crate has no port: an image type-checks, and nothing runs.

use core::ptr::NonNull;

use evtchn::{Binder, Channel};
use hypercall::{Errno, Gfn, Instant, Suspended};

use crate::machine::Hv;

/// Nanoseconds since the domain was created. Never goes back.
#[must_use]
pub fn now() -> Instant {
    Instant(0)
}

/// Whether [`suspend`] can be of use.
pub const CAN_SUSPEND: bool = false;

/// Asks to be suspended.
///
/// # Errors
/// [`Errno::NOSYS`]
pub fn suspend(_: &Hv) -> Result<Suspended, Errno> {
    Err(Errno::NOSYS)
}

pub fn bind_timer(_: &Binder<Hv>) -> Result<Option<Channel<Hv>>, Errno> {
    Ok(None)
}

pub fn acknowledge() -> bool {
    false
}

pub fn wait(_: Option<Instant>) {}

pub fn write(_: &[u8]) {}

pub fn last_words(_: &[u8]) {}

pub fn show(_: Gfn) -> Option<NonNull<u8>> {
    None
}

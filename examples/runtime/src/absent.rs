//! Stands in for the machine where this crate has no port: an image type-checks, and nothing runs.

use hypercall::Instant;

/// Nanoseconds since the domain was created.
#[must_use]
pub fn now() -> Instant {
    Instant(0)
}

/// Sleeps until an event channel is pending or until a deadline, whichever comes first.
pub fn idle(_until: Option<Instant>) {}

//! What a backend tells whoever runs it.

use core::fmt;

use hypercall::{DomId, Handle};
use netif::keys::Features;

use crate::fault::{Refusal, VifFault};

/// Names a vif: the guest's domain, and its interface's number there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VifId {
    /// The frontend's domain.
    pub domain: DomId,
    /// Which of its interfaces.
    pub handle: Handle,
}

impl fmt::Display for VifId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vif{}.{}", self.domain, self.handle)
    }
}

/// Something that whoever runs the backend may want to know.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Notice {
    /// The vif is offered to its frontend. It does not connect before the toolstack has put it where it belongs and
    /// written `hotplug-status`.
    Offered(VifId),
    /// Packets can flow.
    Connected {
        /// Which vif.
        vif: VifId,
        /// With how many queues.
        queues: usize,
        /// With what both ends can do.
        features: Features,
    },
    /// Packets no longer flow; rings and ports are released.
    Disconnected(VifId),
    /// The frontend broke the protocol, and is closed.
    Faulted(VifId, VifFault),
    /// What the frontend asked for cannot be had.
    Refused(VifId, Refusal),
    /// The vif is gone.
    Removed(VifId),
}

#![no_std]
#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

extern crate alloc;

mod control;
mod counters;
#[cfg(feature = "smoltcp")]
pub mod device;
mod fault;
mod flow;
mod frontend;
mod negotiate;
mod queue;
mod rx;
mod tx;

pub use counters::{Counters, RxCounters, TxCounters};
pub use fault::{BackendFault, JoinError, Refusal, SendError};
pub use frontend::{Config, Frontend, MAX_MULTICAST, Notice};
pub use negotiate::MAX_QUEUES;

use netif::offload::{Checksum, Gso};

/// What goes with a packet's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Meta {
    /// The state of its transport checksum.
    pub checksum: Checksum,
    /// Whether and how it is to be segmented, or was put together from segments.
    pub gso: Option<Gso>,
}

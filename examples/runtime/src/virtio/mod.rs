//! Virtio devices at memory-mapped registers (virtio 1.2, 4.2), of which a network card is known.
//!
//! Registers and the negotiation are `virtio-drivers`'. The queues are not: that crate's take what is sent as Rust slices,
//! which memory that a guest can write must never be.

mod memory;
mod net;
mod queue;
#[cfg(test)]
mod software;

#[cfg_attr(all(target_os = "none", target_arch = "aarch64"), path = "aarch64.rs")]
#[cfg_attr(not(all(target_os = "none", target_arch = "aarch64")), path = "absent.rs")]
mod platform;

pub use net::{Net, NetFeatures};
pub use platform::find;

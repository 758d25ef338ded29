#![no_std]
#![forbid(unsafe_code)]
//! The Xen store: wire format, client, device states, the shared ring and a whole server.

extern crate alloc;

pub mod client;
pub mod device;
#[cfg(feature = "server")]
pub mod server;
pub mod wire;

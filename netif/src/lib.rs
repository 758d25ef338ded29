#![no_std]
#![forbid(unsafe_code)]
//! Xen's paravirtual network protocol.

pub mod ctrl;
pub mod keys;
pub mod offload;
pub mod ring;
pub mod rx;
pub mod slot;
pub mod tx;

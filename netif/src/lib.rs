#![no_std]
#![forbid(unsafe_code)]
//! Xen's paravirtual network protocol.

pub mod ring;
pub mod slot;

#![no_std]
#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

extern crate alloc;

pub mod client;
pub mod device;
pub mod ring;
#[cfg(feature = "server")]
pub mod server;
pub mod wire;

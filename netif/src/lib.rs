#![no_std]
#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

mod counters;
pub mod ctrl;
pub mod hash;
pub mod headers;
pub mod keys;
pub mod mac;
pub mod offload;
pub mod ring;
pub mod rx;
pub mod slot;
pub mod tx;

#![no_std]
#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

extern crate alloc;

#[cfg(test)]
extern crate std;

pub mod control;
pub mod http;
pub mod store;

#[cfg(test)]
mod host;

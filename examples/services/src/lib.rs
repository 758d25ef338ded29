#![no_std]
#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

extern crate alloc;

#[cfg(test)]
extern crate std;

pub mod control;
pub mod exposition;
pub mod generator;
pub mod http;
pub mod jobs;
#[cfg(feature = "netback")]
pub mod metrics;
#[cfg(feature = "netback")]
pub mod notices;
#[cfg(feature = "netback")]
pub mod station;
pub mod store;
pub mod streams;
#[cfg(feature = "netback")]
pub mod vifs;
#[cfg(feature = "netback")]
pub mod withdrawal;

#[cfg(test)]
mod host;

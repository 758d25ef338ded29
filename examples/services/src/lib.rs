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
pub mod store;
pub mod streams;

#[cfg(test)]
mod host;

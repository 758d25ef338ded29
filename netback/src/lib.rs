#![no_std]
#![forbid(unsafe_code)]
//! TODO

extern crate alloc;

pub mod rate;
pub mod switch;

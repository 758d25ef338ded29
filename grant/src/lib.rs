#![no_std]
#![doc = include_str!("../README.md")]

extern crate alloc;

mod shared;

pub use shared::{SharedMemory, SharedPage};

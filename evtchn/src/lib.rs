#![no_std]
#![doc = include_str!("../README.md")]

extern crate alloc;

mod bits;
mod channel;
mod upcall;

pub use channel::{Channel, Eoi, Work};
pub use upcall::{Binder, Upcalls};

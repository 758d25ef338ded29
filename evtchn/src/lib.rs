#![no_std]
#![doc = include_str!("../README.md")]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod channel;
mod fifo;
mod ports;
mod two_level;
mod upcall;

pub use channel::{Channel, Eoi, Work};
pub use ports::Delivery;
pub use upcall::{Binder, Upcalls};

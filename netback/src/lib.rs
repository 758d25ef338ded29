#![no_std]
#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

extern crate alloc;

pub mod backend;
mod carry;
pub mod counters;
pub mod ctrl;
pub mod datapath;
mod deliver;
pub mod dma;
mod fault;
mod hotplug;
mod lent;
pub mod multicast;
mod negotiate;
mod notice;
pub mod offload;
pub mod packet;
mod queue;
pub mod rate;
mod round;
mod rx;
pub mod stall;
pub mod switch;
mod tx;
pub mod uplink;
mod vif;
mod waiting;

pub use backend::{Backend, Config, SwitchCounters, VifStatus};
pub use fault::{Refusal, VifFault};
pub use hotplug::Hotplug;
pub use negotiate::{MAX_QUEUES, OFFERED};
pub use packet::{Flow, Label, Packet, PoolUse, Pools};
pub use vif::{Notice, VifId};

/// The repository's README, so that its example is compiled.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;

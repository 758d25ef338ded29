#![doc = include_str!("../README.md")]

mod check;
mod frames;
mod guest;
mod host;
mod levers;
mod misrule;
mod nodes;
mod payload;
mod random;
mod tcp;
mod uplink;
mod wire;
mod world;

pub use check::{Absurd, Sequence, Tally};
pub use frames::{ETHERTYPE, Flow, FrameCounts, Frames, Sizes, StationId};
pub use guest::{Guest, GuestConfig};
pub use host::Host;
pub use levers::{Lever, Meter, Unknown};
pub use misrule::Misrule;
pub use netback::datapath::Datapath;
pub use random::Random;
pub use tcp::{BLOCK, StreamId, Tcp};
pub use uplink::{CardConfig, Uplink};
pub use wire::{Misdeed, Wire};
pub use world::{Actor, BackendDomain, Board, Config, Place, SECOND, Stuck, World};

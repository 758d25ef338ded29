#![doc = include_str!("../README.md")]

/// How many things each case does: packets, slots, chains, events or messages.
pub const ITEMS: u64 = 1024;

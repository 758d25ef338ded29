//! The upcall scan against Xen that raises ports meanwhile, and channels that are closed under a handler, over all
//! interleavings, for both ways of delivery: no wake-up is lost, and each twin that does something in the wrong order loses
//! one.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p evtchn --release --test loom`
//!
//! The model checker takes each access for acquire and release, no more. Where Xen relies on a full barrier in front of a
//! load, an operation that writes as well stands for the two.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
#![cfg(loom)]

#[path = "loom/fifo.rs"]
mod fifo;
#[path = "loom/handler.rs"]
mod handler;
#[path = "loom/machine.rs"]
mod machine;
#[path = "loom/two_level.rs"]
mod two_level;

#![doc = include_str!("../README.md")]
// All of this is tests, though it is no test crate: a panic is the finding.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::missing_panics_doc
)]

mod backend;
mod control;
mod ctrl_ring;
mod frontend;
mod input;
mod page;
mod rx_chain;
mod store_client;
mod store_server;
mod tx_chain;
mod world;

/// Something that takes bytes which somebody else chose.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, also that of its corpus.
    pub name: &'static str,
    /// Takes one input; panics if what has to hold does not.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "tx-chain", run: tx_chain::run },
    Target { name: "rx-chain", run: rx_chain::run },
    Target { name: "ctrl-ring", run: ctrl_ring::run },
    Target { name: "control", run: control::run },
    Target { name: "store-client", run: store_client::run },
    Target { name: "store-server", run: store_server::run },
    Target { name: "backend", run: backend::run },
    Target { name: "frontend", run: frontend::run },
];

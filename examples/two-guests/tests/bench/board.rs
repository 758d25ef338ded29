//! The machine that a way needs.

use netback::datapath::{Datapath, Facts};
use sim::DomainConfig;
use two_guests::Board;

/// Domain 0, and what its backend finds out about it.
pub fn domain(path: Datapath) -> (DomainConfig, Facts) {
    let board = match path {
        Datapath::MapIdentity => Board::Arm2014,
        _ => Board::Arm,
    };
    (board.domain(), board.facts())
}

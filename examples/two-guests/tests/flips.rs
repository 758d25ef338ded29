//! Every pair of datapaths takes turns a hundred thousand times under load: nothing is lost, duplicated, reordered within its flow,
//! or changed, and nothing stays behind.

mod common;

use common::{Plan, run};
use netback::datapath::Datapath::{self, Copy, Direct, Map, MapIdentity, Static};

const FLIPS: usize = 100_000;

fn flip(one: Datapath, other: Datapath) {
    let seed = (one.index() * 5 + other.index()) as u64;
    let start = std::time::Instant::now();
    let tally = run(Plan { pair: [one, other], seed, first_index: 0, flips: FLIPS });
    println!("{tally} of {} in {:?}", tally.sent, start.elapsed());
    assert!(tally.sent > FLIPS as u64);
}

#[test]
fn copy_and_direct() {
    flip(Direct, Copy);
}

#[test]
fn copy_and_map() {
    flip(Map, Copy);
}

#[test]
fn copy_and_map_identity() {
    flip(MapIdentity, Copy);
}

#[test]
fn copy_and_static() {
    flip(Static, Copy);
}

#[test]
fn direct_and_map() {
    flip(Direct, Map);
}

#[test]
fn direct_and_map_identity() {
    flip(Direct, MapIdentity);
}

#[test]
fn direct_and_static() {
    flip(Direct, Static);
}

#[test]
fn map_and_map_identity() {
    flip(MapIdentity, Map);
}

#[test]
fn map_and_static() {
    flip(Map, Static);
}

#[test]
fn map_identity_and_static() {
    flip(MapIdentity, Static);
}

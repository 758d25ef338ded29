//! All indices begin a thousand short of 2^32, and wrap under load.

mod common;

use common::{Plan, run};
use netback::datapath::Datapath::{self, Copy, Direct, Map, MapIdentity, Static};

/// Every ring wraps after a thousand requests.
const BEFORE_WRAP: u32 = 1000_u32.wrapping_neg();
/// Enough for each ring to wrap.
const FLIPS: usize = 2000;

fn flip(one: Datapath, other: Datapath) {
    let seed = 100 + (one.index() * 5 + other.index()) as u64;
    let tally = run(Plan { pair: [one, other], seed, first_index: BEFORE_WRAP, flips: FLIPS });
    println!("{tally} of {}", tally.sent);
}

#[test]
fn rings_wrap_while_datapaths_flip() {
    let ways = [Direct, MapIdentity, Map, Copy];
    for (index, one) in ways.into_iter().enumerate() {
        for other in ways.into_iter().skip(index + 1) {
            flip(one, other);
        }
    }
}

#[test]
fn rings_wrap_while_static_pages_flip() {
    for other in [Copy, Direct, Map, MapIdentity] {
        flip(Static, other);
    }
}

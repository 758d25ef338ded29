//! What is withdrawn and restored when.

use std::fmt;

use features::XenFeatures;
use two_guests::{Datapath, Lever};

use crate::args::{Args, At};

/// One change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Seconds after the start.
    pub when: f64,
    pub lever: Lever,
    /// It is given back.
    pub restore: bool,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.restore { '+' } else { '−' };
        write!(f, "{sign}{}", self.lever)
    }
}

/// What is tried where the command line says nothing: what goes, when, and when it is back, in tenths of the run.
const DEFAULT: [(Lever, f64, f64); 5] = [
    (Lever::Path(Datapath::Direct), 1.0, 2.5),
    (Lever::Bits(XenFeatures::GRANT_MAP_IDENTITY), 3.0, 4.5),
    (Lever::Path(Datapath::Map), 5.0, 6.5),
    (Lever::Bits(XenFeatures::DIRECT_MAPPED), 7.0, 8.0),
    (Lever::Path(Datapath::Direct), 8.5, 9.25),
];

/// All changes, the first first.
pub fn schedule(args: &Args) -> Vec<Change> {
    let mut changes = Vec::new();
    for (list, restore) in [(&args.withdraw, false), (&args.restore, true)] {
        let change = |at: &At| Change { when: at.when, lever: at.lever, restore };
        changes.extend(list.iter().map(change));
    }
    if changes.is_empty() {
        let tenth = args.seconds / 10.0;
        for (lever, gone, back) in DEFAULT {
            changes.push(Change { when: gone * tenth, lever, restore: false });
            changes.push(Change { when: back * tenth, lever, restore: true });
        }
    }
    changes.sort_by(|one, other| one.when.total_cmp(&other.when));
    changes
}

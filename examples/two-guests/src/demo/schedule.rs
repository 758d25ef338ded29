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

/// What is tried where the command line says nothing: when, in tenths of the run, and whether it is given back. Each step takes
/// something that is in use.
const DEFAULT: [(f64, Lever, bool); 8] = [
    (1.0, Lever::Path(Datapath::Static), false),
    (2.2, Lever::Bits(XenFeatures::GRANT_MAP_IDENTITY), false),
    (3.2, Lever::Path(Datapath::Direct), false),
    (4.2, Lever::Bits(XenFeatures::GRANT_MAP_IDENTITY), true),
    (5.2, Lever::Path(Datapath::Direct), true),
    (6.2, Lever::Bits(XenFeatures::AUTO_TRANSLATED_PHYSMAP), false),
    (7.2, Lever::Bits(XenFeatures::AUTO_TRANSLATED_PHYSMAP), true),
    (8.6, Lever::Path(Datapath::Static), true),
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
        let change = |(at, lever, restore)| Change { when: at * tenth, lever, restore };
        changes.extend(DEFAULT.map(change));
    }
    changes.sort_by(|one, other| one.when.total_cmp(&other.when));
    changes
}

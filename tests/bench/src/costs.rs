//! What packets cost in things that come out the same on every machine: each end has its turn in one thread, under the greatest
//! load that the rings let through.

use anyhow::Result;
use netback::datapath::Datapath;
use serde_json::{Value, json};

use crate::duel::Subject as _;
use crate::pair::{Load, Pair, Reading, Way};
use crate::plan::{SIZES, paths};

/// Packets that are looked at, at least.
const PACKETS: u64 = 5000;
/// As many as a ring has slots: a sender goes on until there is no room.
const FILL: usize = 256;

/// Counts per packet.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    pub load: Load,
    /// By grant hypercalls: copy, map, unmap.
    pub hypercalls: [f64; 3],
    /// Operations in these.
    pub operations: [f64; 3],
    /// Towards the backend, and from it.
    pub notifications: [f64; 2],
    pub publishes: [f64; 2],
    /// By Xen, for each byte delivered.
    pub copied: f64,
}

/// For every way, datapath and size.
pub fn all() -> Result<Vec<Costs>> {
    let mut all = Vec::new();
    for way in [Way::In, Way::Out, Way::Across] {
        for size in SIZES {
            for path in paths(way, size).into_iter().flatten() {
                all.push(count(Load { way, path: Some(path), size, batch: FILL })?);
            }
        }
    }
    Ok(all)
}

fn count(load: Load) -> Result<Costs> {
    let mut pair = Pair::new(load)?;
    // What is under way from one turn to the next is as it will be.
    (0..50).for_each(|_| _ = pair.step());
    let before = pair.read();
    let mut turns = 0;
    while pair.read().packets - before.packets < PACKETS {
        pair.step();
        turns += 1;
        anyhow::ensure!(turns < PACKETS * 10, "{load:?}: nothing moves");
    }
    let after = pair.read();
    pair.check()?;
    Ok(costs(load, &before, &after))
}

fn costs(load: Load, before: &Reading, after: &Reading) -> Costs {
    let packets = (after.packets - before.packets) as f64;
    let made = after.backend - before.backend;
    let each = |count: u64| count as f64 / packets;
    Costs {
        load,
        hypercalls: [made.copy_calls, made.map_calls, made.unmap_calls].map(each),
        operations: [made.copies, made.maps, made.unmaps].map(each),
        notifications: [
            each(after.front_notifications - before.front_notifications),
            each(made.notifications),
        ],
        publishes: [
            each(after.requests - before.requests),
            each(after.responses - before.responses),
        ],
        copied: made.bytes_copied as f64 / packets / load.size as f64,
    }
}

impl Costs {
    pub fn name(&self) -> String {
        let Load { way, size, .. } = self.load;
        format!("{}, {}, {size} B", way.name(), self.load.path_name())
    }

    pub fn is(&self, way: Way, path: Datapath, size: usize) -> bool {
        let load = self.load;
        load.way == way && load.path == Some(path) && load.size == size
    }

    /// Grant hypercalls of all kinds.
    pub fn all_hypercalls(&self) -> f64 {
        self.hypercalls.iter().sum()
    }

    /// Everything, with what it is called.
    pub fn figures(&self) -> [(&'static str, f64); 11] {
        let [copy, map, unmap] = self.hypercalls;
        let [copies, maps, unmaps] = self.operations;
        let [to_back, from_back] = self.notifications;
        let [requests, responses] = self.publishes;
        [
            ("hypercalls: copy", copy),
            ("hypercalls: map", map),
            ("hypercalls: unmap", unmap),
            ("copies", copies),
            ("maps", maps),
            ("unmaps, each flushing a TLB", unmaps),
            ("notifications to the backend", to_back),
            ("notifications from it", from_back),
            ("indices shown by guests", requests),
            ("indices shown by the backend", responses),
            ("bytes copied by Xen per byte delivered", self.copied),
        ]
    }

    pub fn json(&self) -> Value {
        let figures = self.figures().into_iter().map(|(name, value)| (name.into(), value.into()));
        json!({ "name": self.name(), "per_packet": Value::Object(figures.collect()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_those_of_the_datapath() {
        let of =
            |path, size| count(Load { way: Way::In, path: Some(path), size, batch: FILL }).unwrap();
        let copy = of(Datapath::Copy, 64);
        assert!(copy.all_hypercalls() <= 1.0 / 128.0 + 0.001, "{copy:?}");
        assert_eq!((copy.operations[0], copy.copied), (1.0, 1.0));
        let fixed = of(Datapath::Static, 1500);
        assert_eq!((fixed.all_hypercalls(), fixed.operations), (0.0, [0.0; 3]));
        let map = of(Datapath::Map, 1500);
        assert!((map.operations[1] - 1.0).abs() < 0.1, "{map:?}");
        assert!(map.copied < 0.2, "{map:?}");
    }
}

//! What was measured, and what it comes to.

use std::collections::BTreeSet;

use features::XenFeatures;
use serde_json::{Value, json};
use two_guests::{Datapath, Lever, Meter, Tally};

use crate::schedule::Change;

/// Seconds between samples.
pub const INTERVAL: f64 = 0.1;
/// Packets in a sample from which it says something about the datapaths in use.
const ENOUGH: u64 = 50;

/// What happened between two readings.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The end of it, in seconds after the start.
    pub at: f64,
    /// How long it was, in seconds.
    pub length: f64,
    /// By vif.
    pub vifs: Vec<Meter>,
}

impl Sample {
    /// A vif's bits per second, in millions.
    pub fn mbits(&self, bytes: u64) -> f64 {
        bytes as f64 * 8.0 / 1e6 / self.length
    }
}

/// A whole run.
#[derive(Debug, Default)]
pub struct Record {
    pub names: Vec<String>,
    pub samples: Vec<Sample>,
    /// Those that were made, with the time at which.
    pub changes: Vec<(f64, Change)>,
    /// Datapaths besides copying that each vif uses.
    using: Vec<BTreeSet<Datapath>>,
    /// Datapaths that fell out of use or came into it, over all vifs, after the first time.
    pub switches: u64,
    /// Something was withdrawn while it was in use.
    pub withdrew_used: bool,
}

impl Record {
    pub fn new(names: Vec<String>) -> Self {
        let using = names.iter().map(|_| BTreeSet::new()).collect();
        Self { names, using, ..Self::default() }
    }

    pub fn sample(&mut self, sample: Sample) {
        for (using, meter) in self.using.iter_mut().zip(&sample.vifs) {
            if meter.packets < ENOUGH {
                continue;
            }
            let paths = Datapath::ALL.into_iter().skip(1).filter(|path| meter.by(*path) > 0);
            let now: BTreeSet<_> = paths.collect();
            if !self.samples.is_empty() {
                self.switches += now.symmetric_difference(using).count() as u64;
            }
            *using = now;
        }
        self.samples.push(sample);
    }

    pub fn change(&mut self, at: f64, change: Change) {
        let in_use = |path| self.using.iter().any(|using| using.contains(&path));
        let counts = match change.lever {
            Lever::Path(path) => in_use(path),
            // What else a bit is good for depends on more than can be seen here.
            Lever::Bits(bits) => {
                let mapped = [Datapath::Map, Datapath::MapIdentity, Datapath::Static];
                bits.contains(XenFeatures::GRANT_MAP_IDENTITY) && in_use(Datapath::MapIdentity)
                    || bits.contains(XenFeatures::AUTO_TRANSLATED_PHYSMAP)
                        && mapped.into_iter().any(in_use)
            }
        };
        self.withdrew_used |= !change.restore && counts;
        self.changes.push((at, change));
    }

    /// Everything, for machines.
    pub fn json(&self, seed: u64, tally: &Tally) -> Value {
        let paths = |meter: &Meter, length: f64| -> serde_json::Map<String, Value> {
            let each = Datapath::ALL.iter().zip(meter.bytes);
            let rate = |bytes: u64| bytes as f64 * 8.0 / 1e6 / length;
            each.map(|(path, bytes)| (path.name().into(), json!(rate(bytes)))).collect()
        };
        let vif = |(name, meter): (&String, &Meter), length: f64| {
            json!({
                "vif": name,
                "datapath": meter.main_path().map(Datapath::name),
                "mbits_per_second": meter.total() as f64 * 8.0 / 1e6 / length,
                "mbits_per_second_by_datapath": paths(meter, length),
                "packets_per_second": meter.packets as f64 / length,
                "hypercalls_per_packet": per(meter.hypercalls, meter.packets),
                "notifications_per_packet": per(meter.notifications, meter.packets),
            })
        };
        let samples = self.samples.iter().map(|sample| {
            let vifs = self.names.iter().zip(&sample.vifs);
            json!({
                "seconds": sample.at,
                "vifs": vifs.map(|pair| vif(pair, sample.length)).collect::<Vec<_>>(),
            })
        });
        let changes = self.changes.iter().map(|(at, change)| {
            json!({
                "seconds": at,
                "what": change.lever.to_string(),
                "action": if change.restore { "restore" } else { "withdraw" },
            })
        });
        json!({
            "seed": seed,
            "samples": samples.collect::<Vec<_>>(),
            "changes": changes.collect::<Vec<_>>(),
            "sent": tally.sent,
            "received": tally.received,
            "lost": tally.lost,
            "duplicated": tally.duplicated,
            "reordered": tally.reordered,
            "corrupt": tally.corrupt,
            "switches": self.switches,
        })
    }
}

/// So many for each of so many.
pub fn per(count: u64, of: u64) -> f64 {
    if of == 0 { 0.0 } else { count as f64 / of as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: f64, copy: u64, direct: u64) -> Sample {
        let bytes = [copy, direct, 0, 0, 0];
        let meter = Meter { packets: 1000, bytes, ..Meter::default() };
        Sample { at, length: INTERVAL, vifs: vec![meter] }
    }

    #[test]
    fn a_datapath_that_goes_and_comes_back_is_two_switches() {
        let mut record = Record::new(vec!["vif1.0".into()]);
        let lever = Lever::Path(Datapath::Direct);
        for (at, direct) in [(0.1, 9), (0.2, 9), (0.3, 0), (0.4, 0), (0.5, 7)] {
            if at == 0.3 {
                record.change(at, Change { when: at, lever, restore: false });
            }
            record.sample(sample(at, 5, direct));
        }
        assert_eq!(record.switches, 2);
        assert!(record.withdrew_used);
        let json = record.json(1, &Tally::default());
        assert_eq!(json.pointer("/samples/4/vifs/0/datapath"), Some(&json!("direct")));
        assert_eq!(json.pointer("/changes/0/action"), Some(&json!("withdraw")));
    }

    #[test]
    fn what_nobody_uses_may_go_unnoticed() {
        let mut record = Record::new(vec!["vif1.0".into()]);
        record.sample(sample(0.1, 5, 0));
        let lever = Lever::Path(Datapath::Map);
        record.change(0.1, Change { when: 0.1, lever, restore: false });
        record.sample(sample(0.2, 5, 0));
        assert_eq!((record.switches, record.withdrew_used), (0, false));
    }
}

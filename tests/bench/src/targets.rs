//! What is to be reached, and what was.

use netback::datapath::Datapath;
use serde_json::{Value, json};

use crate::chart::figure;
use crate::costs::Costs;
use crate::duel::Class;
use crate::pair::Way;
use crate::peers::descriptors::Queue;
use crate::plan::{BATCH, Group, Measured, SIZES, names, pair_name, paths};
use crate::series::{Series, Stats};
use crate::testpmd;

/// What a figure may be.
#[derive(Clone, Copy, Debug)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// One line of what is to be reached.
pub struct Target {
    what: String,
    against: String,
    bound: Bound,
    /// By class of the processors, where that matters; nothing where the peer is missing.
    reached: Vec<(&'static str, Stats)>,
    /// Somebody else was at the processors: what was found is shown, and proves nothing.
    disturbed: bool,
}

impl Target {
    fn at_least(what: &str, against: &str, bound: f64) -> Self {
        let (what, against) = (what.to_owned(), against.to_owned());
        Self { what, against, bound: Bound::AtLeast(bound), reached: Vec::new(), disturbed: false }
    }

    fn with(mut self, of: impl Fn(Class) -> Option<Stats>) -> Self {
        let all = Class::ALL.into_iter().filter_map(|class| Some((class.name(), of(class)?)));
        self.reached = all.collect();
        self
    }

    /// Notes whether what it is about was measured on a quiet machine.
    fn about(mut self, group: &Group, names: &[&str]) -> Self {
        let mut all = names.iter().filter_map(|name| group.find(name));
        self.disturbed = all.any(Series::is_disturbed);
        self
    }

    /// What counts: of the class of which there is more.
    fn main(&self) -> Option<Stats> {
        self.reached.iter().map(|(_, stats)| *stats).max_by_key(|stats| stats.count)
    }

    pub fn is_reached(&self) -> Option<bool> {
        let median = self.main().filter(|_| !self.disturbed)?.median;
        Some(match self.bound {
            Bound::AtLeast(bound) => median >= bound,
            Bound::AtMost(bound) => median <= bound,
        })
    }

    pub fn line(&self) -> String {
        let Self { what, against, bound, reached, .. } = self;
        let bound = match bound {
            Bound::AtLeast(bound) => format!("{bound} x"),
            Bound::AtMost(bound) => format!("<= {}", figure(*bound)),
        };
        let unit = if matches!(self.bound, Bound::AtLeast(_)) { " x" } else { "" };
        let each = reached.iter().map(|(class, stats)| {
            let Stats { median, low, high, count } = stats;
            let range = format!("{}-{}", figure(*low), figure(*high));
            match *count {
                1 => format!("{class} {}{unit}", figure(*median)),
                count => format!("{class} {}{unit} ({range}, {count})", figure(*median)),
            }
        });
        let each = each.collect::<Vec<_>>().join(", ");
        let verdict = match self.is_reached() {
            None if self.disturbed => "disturbed",
            None => "not measured: the peer is not here, or nothing was left to compare",
            Some(true) => "reached",
            Some(false) => "NOT REACHED",
        };
        format!("{what:<47} {against:<31} {bound:>9}  {verdict:<11}  {each}")
    }

    pub fn json(&self) -> Value {
        let reached = self.reached.iter();
        let reached = reached.map(|(class, stats)| ((*class).to_owned(), stats.json()));
        let (kind, bound) = match self.bound {
            Bound::AtLeast(bound) => ("at_least", bound),
            Bound::AtMost(bound) => ("at_most", bound),
        };
        json!({
            "what": self.what, "against": self.against, kind: bound,
            "reached": self.is_reached(), "disturbed": self.disturbed, "figures": Value::Object(reached.collect()),
        })
    }
}

/// Ratio of two series of a group that were measured side by side.
fn ratio(group: &Group, ours: &str, others: &[&str], class: Class) -> Option<Stats> {
    let others: Vec<_> = others.iter().map(|name| group.find(name)).collect::<Option<_>>()?;
    group.find(ours)?.ratio(&others, class)
}

/// Ratio of medians, against what ran in processes of its own.
fn against_foreign(
    measured: &Measured,
    ours: &Series,
    link: usize,
    size: usize,
    class: Class,
) -> Option<Stats> {
    let link = testpmd::LINKS.get(link)?.name;
    let found =
        measured.foreign.iter().find(|foreign| foreign.link == link && foreign.size == size);
    let (its_class, rates) = found?.outcome.as_ref().ok()?;
    let theirs = Stats::of(rates.clone()).filter(|_| *its_class == Some(class))?;
    let Stats { median, low, high, .. } = ours.stats(class)?;
    let part = |rate: f64| rate / theirs.median;
    // One figure against one: not so many pairs.
    Some(Stats { median: part(median), low: part(low), high: part(high), count: rates.len() })
}

/// All that concern what is measured here.
pub fn all(measured: &Measured, costs: &[Costs]) -> Vec<Target> {
    let mut all = Vec::new();
    let copy = pair_name(Way::In, Some(Datapath::Copy));
    for (ours, who) in
        [(copy.as_str(), "netfront and netback"), (names::RINGS, "our rings and grants")]
    {
        for (size, peers) in [(64, [(0, 3.0), (1, 1.5)]), (1500, [(0, 1.5), (2, 4.0)])] {
            let what = format!("{size} B copied: {who}");
            let Some(group) = measured.packets.iter().find(|group| group.size == Some(size)) else {
                continue;
            };
            if size == 64 {
                let target = Target::at_least(&what, names::RING_H, 2.0);
                let target = target.about(group, &[ours, names::RING_H]);
                all.push(target.with(|class| ratio(group, ours, &[names::RING_H], class)));
            }
            for (link, bound) in peers {
                let against =
                    ["vhost-user, split ring", "virtio-user, packed, vectorised", "memif"];
                let against = against.get(link).copied().unwrap_or_default();
                let of = |class| against_foreign(measured, group.find(ours)?, link, size, class);
                all.push(Target::at_least(&what, against, bound).about(group, &[ours]).with(of));
            }
        }
    }
    if let Some(group) = measured.packets.iter().find(|group| group.size == Some(65_535)) {
        for path in [Datapath::Map, Datapath::Static] {
            let ours = pair_name(Way::In, Some(path));
            let what = format!("64 KiB by {path}: netfront and netback");
            let of = |class| ratio(group, &ours, &[&copy], class);
            all.push(Target::at_least(&what, "copy", 4.0).about(group, &[&ours, &copy]).with(of));
        }
    }
    for group in &measured.packets {
        for way in [Way::In, Way::Across] {
            let size = group.size.unwrap_or_default();
            let others = paths(way, size).into_iter().filter(Option::is_some);
            let others: Vec<_> = others.map(|path| pair_name(way, path)).collect();
            let others: Vec<_> = others.iter().map(String::as_str).collect();
            let what = format!("automatic choice, {size} B, {}", way.name());
            let ours = pair_name(way, None);
            let of = |class| ratio(group, &ours, &others, class);
            let target = Target::at_least(&what, "the best datapath", 0.95);
            all.push(target.about(group, &[others.as_slice(), &[&ours]].concat()).with(of));
        }
    }
    if let Some((_, group)) = measured.descriptors.iter().find(|(batch, _)| *batch == BATCH) {
        for (peer, bound) in [(names::DESCRIPTORS_C, 1.2), (Queue::Crossbeam.name(), 8.0)] {
            let of = |class| ratio(group, names::DESCRIPTORS, &[peer], class);
            let what = "descriptors, request and response, batch 32";
            all.push(
                Target::at_least(what, peer, bound)
                    .about(group, &[names::DESCRIPTORS, peer])
                    .with(of),
            );
        }
    }
    for (path, bound) in [(Datapath::Copy, 1.0 / 128.0), (Datapath::Static, 0.0)] {
        for size in SIZES.into_iter().take(2) {
            let found = costs.iter().find(|cost| cost.is(Way::In, path, size));
            let reached = found.map(|cost| {
                let count = cost.all_hypercalls();
                ("any", Stats { median: count, low: count, high: count, count: 1 })
            });
            all.push(Target {
                what: format!("grant hypercalls per packet, {path}, {size} B"),
                against: "under load".into(),
                bound: Bound::AtMost(bound + 1e-9),
                reached: reached.into_iter().collect(),
                disturbed: false,
            });
        }
    }
    all
}

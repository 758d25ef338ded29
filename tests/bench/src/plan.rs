//! What is measured beside what, and in which order: candidates take turns, A B C A B C, each between two probes.

use std::time::Duration;

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressStyle};
use netback::datapath::Datapath;

use crate::duel::{Arena, Class, Subject};
use crate::pair::{Load, Pair, Way};
use crate::peers::Packets;
use crate::peers::descriptors::{Descriptors, Queue};
#[cfg(ring_h)]
use crate::peers::ring_h::RingH;
use crate::peers::rings::Rings;
use crate::series::{Sample, Series, Stats};
use crate::testpmd;

/// Sizes of packets: the least, the most of Ethernet, and the most of a packet.
pub const SIZES: [usize; 3] = [64, 1500, 65_535];
pub const BATCHES: [usize; 4] = [1, 8, 32, 64];
/// Packets shown at a time where batches are not the question.
pub const BATCH: usize = 32;
/// Nanoseconds of a hypercall beyond what it does.
pub const COSTS: [u64; 3] = [0, 300, 1000];

/// How long everything takes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub rounds: usize,
    pub warm_up: Duration,
    pub sample: Duration,
    /// Seconds for each pair of testpmd.
    pub testpmd: usize,
}

impl Pace {
    pub const QUICK: Self = Self {
        rounds: 9,
        warm_up: Duration::from_millis(2),
        sample: Duration::from_millis(8),
        testpmd: 2,
    };
    pub const FULL: Self = Self {
        rounds: 40,
        warm_up: Duration::from_millis(4),
        sample: Duration::from_millis(16),
        testpmd: 6,
    };
}

/// What somebody does, and what it is called.
struct Candidate {
    name: String,
    subject: Box<dyn Subject>,
}

fn candidate(name: impl Into<String>, subject: impl Subject + 'static) -> Candidate {
    Candidate { name: name.into(), subject: Box::new(subject) }
}

/// Names by which the report finds what it compares.
pub mod names {
    pub const RINGS: &str = "our rings and grant copy, 42 B written";
    pub const RINGS_WHOLE: &str = "our rings and grant copy, all written";
    pub const RING_H: &str = "ring.h in C, 42 B written";
    pub const RING_H_WHOLE: &str = "ring.h in C, all written";
    pub const RING_H_GRANTED: &str = "ring.h in C and grant copy, 42 B written";
    pub const DESCRIPTORS: &str = "our rings";
    pub const DESCRIPTORS_C: &str = "ring.h in C";
}

/// The name of a pair's series.
pub fn pair_name(way: Way, path: Option<Datapath>) -> String {
    format!("{}, {}", way.name(), path.map_or("automatic", Datapath::name))
}

/// Datapaths that a way has; those that take headers alone need packets with something behind.
pub fn paths(way: Way, size: usize) -> Vec<Option<Datapath>> {
    let large = match way {
        Way::In => Some(Datapath::Map),
        Way::Across => Some(Datapath::Direct),
        Way::Out => None,
    };
    let large = large.filter(|_| size > 128);
    let automatic = (way != Way::Out).then_some(None);
    let all = [Some(Datapath::Copy), large, Some(Datapath::Static)];
    all.into_iter().flatten().map(Some).chain(automatic).collect()
}

/// Series that were measured together.
pub struct Group {
    pub title: String,
    /// Bytes of a packet; none, where descriptors are what is carried.
    pub size: Option<usize>,
    pub series: Vec<Series>,
    /// Both ends in one thread: nanoseconds of its processor for a packet, in the order of the series.
    pub alone: Vec<Option<Stats>>,
    /// What did not go as it should.
    pub remarks: Vec<String>,
}

impl Group {
    pub fn find(&self, name: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.name == name)
    }
}

/// A second of testpmd after another, between probes.
pub struct Foreign {
    pub link: &'static str,
    pub size: usize,
    pub outcome: Result<(Option<Class>, Vec<f64>), String>,
}

/// Everything.
#[derive(Default)]
pub struct Measured {
    pub packets: Vec<Group>,
    /// By batch.
    pub descriptors: Vec<(usize, Group)>,
    /// By batch and nanoseconds of a hypercall.
    pub batches: Vec<(usize, u64, Group)>,
    pub foreign: Vec<Foreign>,
    /// Nanoseconds of each probe.
    pub probes: Vec<f64>,
}

/// Who measures.
pub struct Bench {
    pub arena: Arena,
    pub pace: Pace,
    bar: ProgressBar,
    probes: Vec<f64>,
}

impl Bench {
    pub fn new(arena: Arena, pace: Pace) -> Result<Self> {
        let style = ProgressStyle::with_template("{elapsed:>4} {pos:>5} samples  {msg}")?;
        let bar = ProgressBar::new(0).with_style(style);
        bar.enable_steady_tick(Duration::from_millis(500));
        Ok(Self { arena, pace, bar, probes: Vec::new() })
    }

    fn probe(&mut self) -> Class {
        let (class, nanos) = self.arena.class();
        self.probes.push(nanos);
        class
    }

    fn group(
        &mut self,
        title: &str,
        size: Option<usize>,
        mut candidates: Vec<Candidate>,
    ) -> Result<Group> {
        let mut samples = vec![Vec::new(); candidates.len()];
        self.bar.inc_length((self.pace.rounds * candidates.len()) as u64);
        let mut before = self.probe();
        for round in 0..self.pace.rounds {
            for (Candidate { name, subject }, samples) in candidates.iter_mut().zip(&mut samples) {
                self.bar.set_message(format!("{title}: {name}"));
                let run = self.arena.run(&mut **subject, self.pace.warm_up, self.pace.sample);
                let after = self.probe();
                let class = (before == after).then_some(after);
                samples.push(Sample { round, rate: run.rate, class, lost: run.lost });
                before = after;
                self.bar.inc(1);
            }
        }
        let mut alone = vec![Vec::new(); candidates.len()];
        for _ in 0..self.pace.rounds {
            for (candidate, alone) in candidates.iter_mut().zip(&mut alone) {
                alone.extend(Arena::alone(&mut *candidate.subject, self.pace.sample));
            }
        }
        let alone = alone.into_iter().map(Stats::of).collect();
        let remark = |of: &Candidate| Some(format!("{}: {:#}", of.name, of.subject.check().err()?));
        let remarks = candidates.iter().filter_map(remark).collect();
        let series = candidates.into_iter().zip(samples);
        let series = series.map(|(candidate, samples)| Series::new(candidate.name, samples));
        Ok(Group { title: title.to_owned(), size, series: series.collect(), alone, remarks })
    }

    /// Everything that is to be measured.
    pub fn run(mut self) -> Result<Measured> {
        let mut measured = Measured::default();
        for size in SIZES {
            let title = format!("{size} bytes");
            let group = self.group(&title, Some(size), packets(size)?)?;
            measured.packets.push(group);
        }
        for batch in BATCHES {
            let title = format!("descriptors, request and response, batch {batch}");
            let group = self.group(&title, None, descriptors(batch)?)?;
            measured.descriptors.push((batch, group));
        }
        for cost in COSTS {
            for batch in BATCHES {
                let title = format!("64 bytes, batch {batch}, hypercall {cost} ns");
                let group = self.group(&title, Some(64), costly(batch, cost)?)?;
                measured.batches.push((batch, cost, group));
            }
        }
        if testpmd::version().is_some() {
            for link in &testpmd::LINKS {
                for size in [64, 1500] {
                    self.bar.set_message(format!("{}, {size} bytes", link.name));
                    measured.foreign.push(self.foreign(link, size));
                }
            }
        }
        self.bar.finish_and_clear();
        measured.probes = self.probes;
        Ok(measured)
    }

    fn foreign(&mut self, link: &testpmd::Link, size: usize) -> Foreign {
        let before = self.probe();
        let rates = testpmd::measure(&self.arena, link, size, self.pace.testpmd);
        let class = Some(self.probe()).filter(|after| *after == before);
        let outcome = rates.map(|rates| (class, rates)).map_err(|error| format!("{error:#}"));
        Foreign { link: link.name, size, outcome }
    }
}

fn packets(size: usize) -> Result<Vec<Candidate>> {
    let mut all = Vec::new();
    for way in [Way::In, Way::Out, Way::Across] {
        for path in paths(way, size) {
            let load = Load { way, path, size, batch: BATCH };
            let pair = Pair::new(load).with_context(|| format!("{load:?}"))?;
            all.push(candidate(pair_name(way, path), pair));
        }
    }
    // Without a driver above them they have packets of one page.
    if size <= hypercall::PAGE_SIZE {
        let (headers, whole) = (Packets::headers(size, BATCH), Packets::whole(size, BATCH));
        all.push(candidate(names::RINGS, Rings::packets(headers)?));
        all.push(candidate(names::RINGS_WHOLE, Rings::packets(whole)?));
        #[cfg(ring_h)]
        {
            all.push(candidate(names::RING_H, RingH::packets(headers)?));
            all.push(candidate(names::RING_H_WHOLE, RingH::packets(whole)?));
            all.push(candidate(names::RING_H_GRANTED, RingH::granted(headers)?));
        }
    }
    Ok(all)
}

fn descriptors(batch: usize) -> Result<Vec<Candidate>> {
    let mut all = vec![candidate(names::DESCRIPTORS, Rings::descriptors(batch)?)];
    #[cfg(ring_h)]
    all.push(candidate(names::DESCRIPTORS_C, RingH::descriptors(batch)?));
    for queue in Queue::ALL {
        all.push(candidate(queue.name(), Descriptors::new(queue, batch)));
    }
    Ok(all)
}

fn costly(batch: usize, cost: u64) -> Result<Vec<Candidate>> {
    let paths = [Datapath::Copy, Datapath::Static].into_iter();
    paths
        .map(|path| {
            let pair = Pair::new(Load { way: Way::In, path: Some(path), size: 64, batch })?;
            pair.set_hypercall_cost(Duration::from_nanos(cost));
            Ok(candidate(path.name(), pair))
        })
        .collect()
}

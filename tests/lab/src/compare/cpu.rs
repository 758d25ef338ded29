//! Processor time of domains, which Xen counts (XEN_DOMCTL_getdomaininfo): this project's dom0 asks for it whenever its counters are
//! read, Linux as dom0 does in a step.

use std::cell::Cell;
use std::ops::Sub;

use anyhow::Result;

use super::stats::Spread;
use crate::run::Run;

/// The backend and both guests.
const DOMAINS: usize = 3;

/// Processor time in seconds, and in which time.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Cpu {
    /// Of the backend and both guests.
    pub used: [f64; DOMAINS],
    /// By the clock of whoever asked.
    pub elapsed: f64,
    /// Hypercalls that moved packets or notified guests, where the backend counts them: what served several vifs counts for each.
    pub calls: Option<f64>,
}

impl Cpu {
    /// The backend's.
    pub fn backend(self) -> f64 {
        let [backend, ..] = self.used;
        backend
    }

    /// Made of all their values in order.
    fn by(mut value: impl FnMut(usize) -> f64) -> Self {
        let elapsed = value(DOMAINS);
        Self { used: std::array::from_fn(value), elapsed, calls: None }
    }

    fn value(&self, place: usize) -> f64 {
        self.used.get(place).copied().unwrap_or(self.elapsed)
    }
}

impl Sub for Cpu {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        let calls = self.calls.map(|calls| calls - other.calls.unwrap_or(0.0));
        Self { calls, ..Self::by(|place| self.value(place) - other.value(place)) }
    }
}

/// Who asks Xen.
pub enum Asked {
    /// This project's dom0, which is the backend of guests 1 and 2, and by a domain with Linux.
    Ours(usize),
    /// Linux as dom0, for the backend and the guests by their numbers.
    Linux([u32; DOMAINS]),
}

/// Reads it before and after something.
pub struct Meter {
    asked: Asked,
    /// What it costs to read it.
    own: Cpu,
    readings: Cell<u32>,
}

/// Times that it is read for nothing, to see what that costs.
const BARE: usize = 5;

impl Meter {
    /// Finds out what a reading costs.
    pub fn new(run: &Run, asked: Asked) -> Result<Self> {
        let mut meter = Self { asked, own: Cpu::by(|_| 0.0), readings: Cell::new(0) };
        let mut costs = Vec::new();
        let mut last = meter.read(run)?;
        for _ in 0..BARE {
            let next = meter.read(run)?;
            costs.push(next - last);
            last = next;
        }
        meter.own = Cpu::by(|place| {
            let values: Vec<_> = costs.iter().map(|cost| cost.value(place)).collect();
            Spread::of(&values).map_or(0.0, |spread| spread.median)
        });
        Ok(meter)
    }

    /// What it costs to read it.
    pub fn own(&self) -> Cpu {
        self.own
    }

    fn read(&self, run: &Run) -> Result<Cpu> {
        let (used, elapsed, calls) = match self.asked {
            Asked::Ours(by) => {
                self.readings.set(self.readings.get() + 1);
                let metrics = run.metrics(by, &format!("{:02}", self.readings.get()))?;
                let of = |domain: usize| {
                    let labels = [("domid", &*domain.to_string())];
                    metrics.need("xen_domain_cpu_seconds_total", &labels)
                };
                let counted = ["netback_path_hypercalls_total", "netback_notifications_total"];
                let calls = counted.into_iter().filter_map(|name| metrics.get(name, &[])).sum();
                let elapsed = metrics.need("dom0_uptime_seconds", &[])?;
                ([of(0)?, of(1)?, of(2)?], elapsed, Some(calls))
            }
            Asked::Linux([backend, one, two]) => {
                let answer = run.good(0, &format!("cputime {backend} {one} {two}"), 60)?;
                let of = |number| answer.number(&format!("cpu{number}"));
                ([of(backend)?, of(one)?, of(two)?], answer.number("now")?, None)
            }
        };
        Ok(Cpu { used, elapsed, calls })
    }

    /// What something takes, without the cost of the reading.
    pub fn around<T>(&self, run: &Run, act: impl FnOnce() -> Result<T>) -> Result<(T, Cpu)> {
        let before = self.read(run)?;
        let done = act()?;
        Ok((done, self.read(run)? - before - self.own))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_is_a_difference_of_each() {
        let before = Cpu { used: [1.0, 2.0, 3.0], elapsed: 10.0, calls: Some(5.0) };
        let after = Cpu { used: [1.5, 3.0, 7.0], elapsed: 12.0, calls: Some(8.0) };
        let used = Cpu { used: [0.5, 1.0, 4.0], elapsed: 2.0, calls: Some(3.0) };
        assert_eq!(after - before, used);
        assert_eq!((used.backend(), used.value(2), used.value(DOMAINS)), (0.5, 4.0, 2.0));
    }
}

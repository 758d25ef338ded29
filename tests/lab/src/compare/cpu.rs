//! Processor time of domains, which Xen counts (XEN_DOMCTL_getdomaininfo): this project's dom0 asks for it whenever its counters are
//! read, Linux as dom0 does in a step.

use std::cell::Cell;
use std::ops::Sub;

use anyhow::Result;

use super::stats::Spread;
use crate::run::Run;

/// The backend and both guests.
pub const DOMAINS: usize = 3;

/// Seconds of processor time of the backend and both guests.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Cpu(pub [f64; DOMAINS]);

impl Sub for Cpu {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self::of(self.0.into_iter().zip(other.0).map(|(one, other)| one - other))
    }
}

impl Cpu {
    /// As many as there are domains.
    fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values = values.into_iter();
        Self(std::array::from_fn(|_| values.next().unwrap_or_default()))
    }

    /// The backend's.
    pub fn backend(self) -> f64 {
        let [backend, ..] = self.0;
        backend
    }
}

/// Who asks Xen.
pub enum Asked {
    /// This project's dom0, which is the backend of guests 1 and 2.
    Ours,
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
        let mut meter = Self { asked, own: Cpu([0.0; DOMAINS]), readings: Cell::new(0) };
        let mut costs = Vec::new();
        let mut last = meter.read(run)?;
        for _ in 0..BARE {
            let next = meter.read(run)?;
            costs.push(next - last);
            last = next;
        }
        meter.own = Cpu::of((0..DOMAINS).map(|domain| {
            let of: Vec<_> = costs.iter().filter_map(|cost| cost.0.get(domain)).copied().collect();
            Spread::of(&of).map_or(0.0, |spread| spread.median)
        }));
        Ok(meter)
    }

    /// What it costs to read it.
    pub fn own(&self) -> Cpu {
        self.own
    }

    fn read(&self, run: &Run) -> Result<Cpu> {
        let values: Vec<f64> = match self.asked {
            Asked::Ours => {
                self.readings.set(self.readings.get() + 1);
                let metrics = run.metrics(1, &format!("{:02}", self.readings.get()))?;
                let of = |domain: usize| {
                    let labels = [("domid", &*domain.to_string())];
                    metrics.need("xen_domain_cpu_seconds_total", &labels)
                };
                (0..DOMAINS).map(of).collect::<Result<_>>()?
            }
            Asked::Linux(numbers) => {
                let words: String = numbers.iter().map(|number| format!(" {number}")).collect();
                let answer = run.good(0, &format!("cputime{words}"), 60)?;
                let of = |number| answer.number(&format!("cpu{number}"));
                numbers.into_iter().map(of).collect::<Result<_>>()?
            }
        };
        Ok(Cpu::of(values))
    }

    /// What something takes, without the cost of the reading.
    pub fn around<T>(&self, run: &Run, act: impl FnOnce() -> Result<T>) -> Result<(T, Cpu)> {
        let before = self.read(run)?;
        let done = act()?;
        Ok((done, self.read(run)? - before - self.own))
    }
}

//! Samples, and what they come to: medians and ranges, and ratios of what was measured side by side.

use serde_json::{Value, json};

use crate::duel::Class;

/// Of a sample's time, what somebody else may have had of a processor.
const LOST: f64 = 0.03;
/// Samples without which a series says nothing: if fewer are undisturbed, the least disturbed are taken, and it is said.
const FEW: usize = 5;

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub round: usize,
    /// Packets per second.
    pub rate: f64,
    /// How far apart the processors were; none, if that changed meanwhile.
    pub class: Option<Class>,
    /// The share of the time that somebody else had.
    pub lost: f64,
}

/// All samples of one candidate.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    samples: Vec<Sample>,
    /// Most of the time that was lost in a sample that counts.
    limit: f64,
}

/// A median, and where the middle half of the values lies.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Stats {
    pub median: f64,
    pub low: f64,
    pub high: f64,
    pub count: usize,
}

impl Stats {
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let at = |part: f64| values.get((part * (values.len().max(1) - 1) as f64).round() as usize);
        let (median, low, high) = (*at(0.5)?, *at(0.25)?, *at(0.75)?);
        Some(Self { median, low, high, count: values.len() })
    }

    pub fn json(&self) -> Value {
        let Self { median, low, high, count } = self;
        json!({ "median": median, "quartiles": [low, high], "count": count })
    }
}

impl Series {
    pub fn new(name: String, samples: Vec<Sample>) -> Self {
        let mut lost: Vec<_> =
            samples.iter().filter(|s| s.class.is_some()).map(|s| s.lost).collect();
        lost.sort_by(f64::total_cmp);
        let limit = lost.iter().take(FEW).next_back().copied().unwrap_or(LOST).max(LOST);
        Self { name, samples, limit }
    }

    /// Whether somebody else was at the processors in samples that count.
    pub fn is_disturbed(&self) -> bool {
        self.limit > LOST
    }

    fn kept(&self) -> impl Iterator<Item = (&Sample, Class)> {
        let kept = self.samples.iter().filter(|sample| sample.lost <= self.limit);
        kept.filter_map(|sample| Some((sample, sample.class?)))
    }

    /// Packets per second.
    pub fn stats(&self, class: Class) -> Option<Stats> {
        let of_class = self.kept().filter(|(_, of)| *of == class);
        Stats::of(of_class.map(|(sample, _)| sample.rate).collect())
    }

    /// Of the class of which there are more samples.
    pub fn main(&self) -> Option<(Class, Stats)> {
        let all = Class::ALL.into_iter().filter_map(|class| Some((class, self.stats(class)?)));
        all.max_by_key(|(_, stats)| stats.count)
    }

    fn in_round(&self, round: usize, class: Class) -> Option<f64> {
        let found = self.kept().find(|(sample, of)| sample.round == round && *of == class);
        found.map(|(sample, _)| sample.rate)
    }

    /// How much faster it was than the best of `others`, round by round.
    pub fn ratio(&self, others: &[&Self], class: Class) -> Option<Stats> {
        let ratios = self.kept().filter(|(_, of)| *of == class).filter_map(|(sample, class)| {
            let of_other = |other: &&Self| other.in_round(sample.round, class);
            let best = others.iter().map(of_other).collect::<Option<Vec<_>>>()?;
            let best = best.into_iter().max_by(f64::total_cmp).filter(|best| *best > 0.0)?;
            Some(sample.rate / best)
        });
        Stats::of(ratios.collect())
    }

    /// Samples there are, and those that count.
    pub fn counts(&self) -> (usize, usize) {
        (self.samples.len(), self.kept().count())
    }

    pub fn json(&self) -> Value {
        let samples = self.samples.iter().map(|sample| {
            let Sample { round, rate, class, lost } = sample;
            json!({ "round": round, "rate": rate, "class": class.map(Class::name), "lost": lost })
        });
        let stats = Class::ALL.map(|class| {
            let stats = self.stats(class).map(|stats| stats.json());
            (class.name().to_owned(), stats.unwrap_or_default())
        });
        json!({
            "name": self.name,
            "disturbed": self.is_disturbed(),
            "stats": Value::Object(stats.into_iter().collect()),
            "samples": samples.collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(rates: &[(f64, Option<Class>, f64)]) -> Series {
        let samples = rates.iter().enumerate();
        let samples =
            samples.map(|(round, &(rate, class, lost))| Sample { round, rate, class, lost });
        Series::new("x".into(), samples.collect())
    }

    #[test]
    fn what_changed_or_was_disturbed_does_not_count() {
        let near = Some(Class::Near);
        let mut all = vec![(10.0, near, 0.0); 5];
        all.extend([(99.0, None, 0.0), (1.0, near, 0.5), (4.0, Some(Class::Far), 0.0)]);
        let series = series(&all);
        let stats = series.stats(Class::Near).unwrap();
        assert_eq!((stats.median, stats.count), (10.0, 5));
        assert_eq!(series.stats(Class::Far).unwrap().median, 4.0);
        assert!(!series.is_disturbed());
    }

    #[test]
    fn where_all_were_disturbed_it_is_said() {
        let near = Some(Class::Near);
        let all: Vec<_> = (0..9).map(|i| (1.0, near, 0.1 * f64::from(i + 1))).collect();
        let series = series(&all);
        assert!(series.is_disturbed());
        assert_eq!(series.counts(), (9, FEW));
    }

    #[test]
    fn ratios_are_of_samples_of_one_round_and_class() {
        let (near, far) = (Some(Class::Near), Some(Class::Far));
        let ours = series(&[(20.0, near, 0.0), (5.0, far, 0.0), (30.0, near, 0.0)]);
        let theirs = series(&[(10.0, near, 0.0), (5.0, far, 0.0), (1.0, far, 0.0)]);
        let ratio = |class| ours.ratio(&[&theirs], class).map(|ratio| (ratio.median, ratio.count));
        assert_eq!(ratio(Class::Near), Some((2.0, 1)));
        assert_eq!(ratio(Class::Far), Some((1.0, 1)));
    }
}

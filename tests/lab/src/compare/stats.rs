//! Of a few runs: what is in the middle, and how far apart they are.

/// The middle of some values and the outermost ones.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Spread {
    /// The one in the middle, or between the two there.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// Of no values there is none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let sorted = sorted(values);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let half = sorted.len() / 2;
        let (low, high) = (*sorted.get((sorted.len() - 1) / 2)?, *sorted.get(half)?);
        Some(Self { median: f64::midpoint(low, high), least, most })
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The least of the values that so many of a hundred do not exceed.
pub fn percentile(values: &[f64], percent: usize) -> Option<f64> {
    let rank = (values.len() * percent).div_ceil(100).max(1);
    sorted(values).get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_or_between_the_two_there() {
        let odd = Spread::of(&[9.0, 1.0, 2.0]).unwrap();
        assert_eq!(odd, Spread { median: 2.0, least: 1.0, most: 9.0 });
        let even = Spread::of(&[10.0, 4.0, 1.0, 2.0]).unwrap();
        assert_eq!(even, Spread { median: 3.0, least: 1.0, most: 10.0 });
        let one = Spread::of(&[5.0]).unwrap();
        assert_eq!((one.median, one.least, one.most), (5.0, 5.0, 5.0));
        assert!(Spread::of(&[]).is_none());
    }

    #[test]
    fn percentiles_are_values_that_were_there() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let of = |percent| percentile(&hundred, percent).unwrap();
        assert_eq!((of(1), of(50), of(90), of(99), of(100)), (1.0, 50.0, 90.0, 99.0, 100.0));
        assert_eq!(percentile(&[7.0, 3.0], 50), Some(3.0));
        assert_eq!(percentile(&[7.0, 3.0], 51), Some(7.0));
        assert_eq!(percentile(&[7.0, 3.0], 0), Some(3.0));
        assert_eq!(percentile(&[], 50), None);
    }
}

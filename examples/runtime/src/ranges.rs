//! Sets of addresses: memory, less what is in use.

use core::ops::Range;

use heapless::Vec;

/// More pieces than any device tree cuts memory into.
pub const MAX: usize = 32;

/// Disjoint ranges of addresses.
#[derive(Debug, Default)]
pub struct Ranges(Vec<Range<u64>, MAX>);

impl Ranges {
    /// Adds a range, unless it is empty. `None` when there are too many.
    pub fn add(&mut self, range: Range<u64>) -> Option<()> {
        if range.is_empty() {
            return Some(());
        }
        self.0.push(range).ok()
    }

    /// Cuts a range out. `None` when that leaves too many pieces.
    pub fn remove(&mut self, cut: &Range<u64>) -> Option<()> {
        let mut left = Self::default();
        for range in &self.0 {
            left.add(range.start..range.end.min(cut.start.max(range.start)))?;
            left.add(range.start.max(cut.end.min(range.end))..range.end)?;
        }
        *self = left;
        Some(())
    }

    pub fn iter(&self) -> impl Iterator<Item = &Range<u64>> {
        self.0.iter()
    }

    /// How many addresses are in the set.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn after(cut: Range<u64>) -> Vec<(u64, u64)> {
        let mut ranges = Ranges::default();
        ranges.add(10..20).unwrap();
        ranges.add(30..40).unwrap();
        ranges.remove(&cut).unwrap();
        let left: Vec<_> = ranges.iter().map(|range| (range.start, range.end)).collect();
        assert_eq!(ranges.total(), left.iter().map(|(start, end)| end - start).sum());
        left
    }

    #[test]
    fn a_cut_takes_exactly_what_it_covers() {
        assert_eq!(after(0..5), [(10, 20), (30, 40)]);
        assert_eq!(after(20..30), [(10, 20), (30, 40)]);
        assert_eq!(after(10..20), [(30, 40)]);
        assert_eq!(after(12..15), [(10, 12), (15, 20), (30, 40)]);
        assert_eq!(after(15..35), [(10, 15), (35, 40)]);
        assert_eq!(after(0..50), []);
        assert_eq!(after(5..12), [(12, 20), (30, 40)]);
        assert_eq!(after(35..45), [(10, 20), (30, 35)]);
    }
}

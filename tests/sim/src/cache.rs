//! The cache between the CPUs and DRAM, for devices that do not look into it.
//!
//! A page of the host is what CPUs see. Once somebody does maintenance on a page or a non-coherent device reaches it, there is
//! its DRAM besides, and what the cache took from or gave to DRAM last: a line that is different now is dirty. No line is ever
//! written back by itself, as lines may be on real machines at any time; what that could do is counted where it matters.

use std::ops::Range;

use hypercall::PAGE_SIZE;

use crate::page::Page;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;
/// What DRAM holds that nothing was ever written to, and what a device reads where nothing is.
pub(crate) const GARBAGE: u8 = 0xa5;

/// A page's DRAM.
#[derive(Debug)]
pub(crate) struct Dram {
    bytes: [u8; PAGE_SIZE],
    /// What the cache had in common with DRAM last,
    synced: [u8; PAGE_SIZE],
    /// and for which lines that says anything: a bit for each.
    known: u64,
}

impl Dram {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self { bytes: [GARBAGE; PAGE_SIZE], synced: [0; PAGE_SIZE], known: 0 })
    }

    /// Lines that `range` touches, each by where it is.
    fn lines(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let first = range.start / LINE * LINE;
        let end = if range.is_empty() { first } else { range.end.min(PAGE_SIZE) };
        (first..end).step_by(LINE).map(|at| at..at + LINE)
    }

    fn bit(line: &Range<usize>) -> u64 {
        1 << (line.start / LINE)
    }

    /// Whether the cache would write a line back.
    fn is_dirty(&self, page: Page, line: &Range<usize>) -> bool {
        let mut seen = [0; LINE];
        page.read(line.start, &mut seen);
        self.known & Self::bit(line) == 0 || self.synced.get(line.clone()) != Some(&seen[..])
    }

    fn clean_line(&mut self, page: Page, line: Range<usize>) {
        if !self.is_dirty(page, &line) {
            return;
        }
        self.known |= Self::bit(&line);
        for to in [&mut self.bytes, &mut self.synced] {
            page.read(line.start, to.get_mut(line.clone()).unwrap_or_default());
        }
    }

    /// Writes back what the CPUs changed.
    pub(crate) fn clean(&mut self, page: Page, range: Range<usize>) {
        for line in Self::lines(range) {
            self.clean_line(page, line);
        }
    }

    /// Has the CPUs see DRAM. Lines of which only a part is meant are cleaned first; the others too unless they are to be
    /// discarded.
    pub(crate) fn invalidate(&mut self, page: Page, range: Range<usize>, discard: bool) {
        for line in Self::lines(range.clone()) {
            let whole = range.start <= line.start && line.end <= range.end;
            if !(whole && discard) {
                self.clean_line(page, line.clone());
            }
            self.known |= Self::bit(&line);
            let now = self.bytes.get(line.clone()).unwrap_or_default();
            page.write(line.start, now);
            self.synced.get_mut(line).unwrap_or_default().copy_from_slice(now);
        }
    }

    fn dirty_lines(&self, page: Page, range: Range<usize>) -> u64 {
        Self::lines(range).filter(|line| self.is_dirty(page, line)).count() as u64
    }

    /// A device reads. Answers of how many lines the CPUs had something newer.
    pub(crate) fn read(&self, page: Page, offset: usize, to: &mut [u8]) -> u64 {
        let range = offset..offset + to.len();
        if let Some(from) = self.bytes.get(range.clone()) {
            to.copy_from_slice(from);
        }
        self.dirty_lines(page, range)
    }

    /// A device writes. Answers how many dirty lines that touched: the cache may write those back over it.
    pub(crate) fn write(&mut self, page: Page, offset: usize, from: &[u8]) -> u64 {
        let range = offset..offset + from.len();
        if let Some(to) = self.bytes.get_mut(range.clone()) {
            to.copy_from_slice(from);
        }
        self.dirty_lines(page, range)
    }
}

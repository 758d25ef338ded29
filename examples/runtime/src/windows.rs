//! Guest-physical space to map other domains' pages at: which pages of it are taken.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How many pages of others' can be mapped at a time.
pub const WINDOWS: usize = 4096;

const WORDS: usize = WINDOWS / 64;

/// One bit for each window, set while it is free. Lock-free: a bit changes hands in one atomic operation.
pub struct Windows {
    free: [AtomicU64; WORDS],
    /// The word where the last free window was found.
    hint: AtomicUsize,
}

impl Windows {
    pub const fn new() -> Self {
        Self { free: [const { AtomicU64::new(u64::MAX) }; WORDS], hint: AtomicUsize::new(0) }
    }

    /// Takes a window: its number, below [`WINDOWS`].
    pub fn take(&self) -> Option<usize> {
        let start = self.hint.load(Ordering::Relaxed);
        (0..WORDS).map(|step| (start + step) % WORDS).find_map(|index| {
            let bit = take_bit(self.free.get(index)?)?;
            self.hint.store(index, Ordering::Relaxed);
            Some(index * 64 + bit as usize)
        })
    }

    /// Takes a window back. `false` if it was not taken.
    pub fn give(&self, window: usize) -> bool {
        let bit = 1 << (window % 64);
        // Release: what the holder did with the window comes before what the next one does.
        self.free
            .get(window / 64)
            .is_some_and(|word| word.fetch_or(bit, Ordering::Release) & bit == 0)
    }
}

fn take_bit(word: &AtomicU64) -> Option<u32> {
    let taken = word.fetch_update(Ordering::Acquire, Ordering::Relaxed, |free| {
        (free != 0).then(|| free & (free - 1))
    });
    taken.ok().map(u64::trailing_zeros)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_window_is_handed_out_once_and_again_after_it_came_back() {
        let windows = Windows::new();
        let taken: BTreeSet<usize> = core::iter::from_fn(|| windows.take()).collect();
        assert_eq!(taken.len(), WINDOWS);
        assert!(windows.give(77));
        assert!(!windows.give(77), "given twice");
        assert!(!windows.give(WINDOWS), "no such window");
        assert_eq!(windows.take(), Some(77));
        assert_eq!(windows.take(), None);
    }

    #[test]
    fn threads_never_hold_the_same_window() {
        let windows = Windows::new();
        let held: std::vec::Vec<AtomicU64> = (0..WINDOWS).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let window = windows.take().unwrap();
                        assert_eq!(held[window].fetch_add(1, Ordering::Relaxed), 0);
                        held[window].fetch_sub(1, Ordering::Relaxed);
                        assert!(windows.give(window));
                    }
                });
            }
        });
    }
}

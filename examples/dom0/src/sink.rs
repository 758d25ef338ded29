//! Where a guest can send a stream to: all that comes is compared with a pattern, and at the end the sender is told how
//! much it was and how much of it was wrong.

use core::fmt;

use services::streams::Judge;

/// `discard`, as far as a sender is concerned.
pub(crate) const PORT: u16 = 9;

/// The byte at place `n` of a stream is `n` modulo this: a prime, so that whatever is lost, repeated or put in the place
/// of something else by pages or packets is wrong nearly everywhere after.
const PERIOD: usize = 251;
/// Bytes compared at a time.
const CHUNK: usize = 4096;

static PATTERN: [u8; PERIOD + CHUNK] = pattern();

#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler, and in bounds")]
const fn pattern() -> [u8; PERIOD + CHUNK] {
    let mut bytes = [0; PERIOD + CHUNK];
    let mut at = 0;
    while at < bytes.len() {
        bytes[at] = (at % PERIOD) as u8;
        at += 1;
    }
    bytes
}

/// What has come of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Tally {
    bytes: u64,
    wrong: u64,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes={} wrong={}", self.bytes, self.wrong)
    }
}

impl Judge for Tally {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn take(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(CHUNK) {
            let phase = (self.bytes % PERIOD as u64) as usize;
            let right = PATTERN.get(phase..).unwrap_or_default();
            if !right.starts_with(chunk) {
                let differ = chunk.iter().zip(right).filter(|(is, ought)| is != ought);
                self.wrong += differ.count() as u64;
            }
            self.bytes += chunk.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    fn stream(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at % PERIOD) as u8).collect()
    }

    #[test]
    fn the_pattern_is_right_however_it_is_cut() {
        let bytes = stream(100_000);
        for cut in [1, 7, 250, 251, 252, 1448, 4095, 4096, 4097, 65_536] {
            let mut tally = Tally::default();
            bytes.chunks(cut).for_each(|chunk| tally.take(chunk));
            assert_eq!(tally, Tally { bytes: 100_000, wrong: 0 }, "cut into {cut}");
        }
    }

    #[test]
    fn every_wrong_byte_is_counted() {
        let mut bytes = stream(20_000);
        for at in [0, 4095, 4096, 19_999] {
            bytes[at] ^= 0x80;
        }
        let mut tally = Tally::default();
        tally.take(&bytes);
        assert_eq!(tally, Tally { bytes: 20_000, wrong: 4 });
        // A page that is missing.
        let mut tally = Tally::default();
        let bytes = stream(20_000);
        tally.take(&bytes[..4096]);
        tally.take(&bytes[8192..]);
        assert!(tally.wrong > 10_000);
    }
}

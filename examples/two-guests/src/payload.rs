//! Bytes that cannot be mistaken for others, and a sum that notices when they are.

use std::sync::LazyLock;

use crate::random::Random;

const POOL: usize = 256 * 1024;
/// Where a payload may begin: twice the largest packet before the end.
const STARTS: usize = POOL - 128 * 1024;

static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random::new(0x7061_796c_6f61_6400);
    (0..POOL / 8).flat_map(|_| random.draw().to_le_bytes()).collect()
});

/// Fills `to` (up to 128 KiB) with bytes that depend on `which`, at about the cost of a copy.
pub(crate) fn fill(to: &mut [u8], which: u64) {
    let start = (which.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % STARTS;
    if let Some(from) = BYTES.get(start..start + to.len()) {
        to.copy_from_slice(from);
    }
}

/// A sum of 64 bits over bytes, their order and their number. It guards against accident, not against intent.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x9fb2_1c65_1e98_df25;
    let mix = |sum: u64, word: u64| (sum.rotate_left(23) ^ word).wrapping_mul(PRIME);
    let (longs, tail) = bytes.as_chunks::<8>();
    // Two lanes, or the multiplications wait for each other.
    let (pairs, last) = longs.as_chunks::<2>();
    let (mut even, mut odd) = (bytes.len() as u64, PRIME);
    for [one, other] in pairs {
        even = mix(even, u64::from_le_bytes(*one));
        odd = mix(odd, u64::from_le_bytes(*other));
    }
    for long in last {
        even = mix(even, u64::from_le_bytes(*long));
    }
    let mut end = [0; 8];
    for (to, from) in end.iter_mut().zip(tail) {
        *to = *from;
    }
    let sum = mix(mix(even, odd), u64::from_le_bytes(end));
    sum ^ sum >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flipped_bit_or_two_swapped_words_change_the_sum() {
        for len in [1, 7, 8, 9, 16, 60, 1514, 9000] {
            let mut bytes = vec![0; len];
            fill(&mut bytes, len as u64);
            let good = sum(&bytes);
            for at in [0, len / 2, len - 1] {
                let mut bad = bytes.clone();
                if let Some(byte) = bad.get_mut(at) {
                    *byte ^= 0x10;
                }
                assert_ne!(sum(&bad), good, "byte {at} of {len}");
            }
            assert_ne!(sum(bytes.split_last().map_or(&[][..], |(_, rest)| rest)), good);
        }
        let words: Vec<u8> = (0..64).collect();
        let (head, tail) = words.split_at(16);
        assert_ne!(sum(&[tail, head].concat()), sum(&words), "order counts");
    }
}

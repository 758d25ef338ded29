//! The bytes that streams are made of.

/// Pseudo-random bytes from a seed: Marsaglia's xorshift64 with the shifts 13, 7 and 17. The state begins as the seed (a seed
/// of 0 stands for 0x9e3779b97f4a7c15); each step is `x ^= x << 13; x ^= x >> 7; x ^= x << 17` and gives the state's eight
/// bytes, the lowest first.
#[derive(Clone, Debug)]
pub struct Generator {
    state: u64,
    /// Bytes of the last step that were not asked for yet, at its end.
    left: usize,
}

impl Generator {
    /// The bytes of a seed, from the first.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        let state = if seed == 0 { 0x9e37_79b9_7f4a_7c15 } else { seed };
        Self { state, left: 0 }
    }

    const fn step(&mut self) -> [u8; 8] {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state.to_le_bytes()
    }

    /// The next bytes, as many as there is room for.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        let last = self.state.to_le_bytes();
        let (_, left) = last.split_at(last.len().saturating_sub(self.left));
        let (head, rest) = bytes.split_at_mut(left.len().min(bytes.len()));
        head.iter_mut().zip(left).for_each(|(to, from)| *to = *from);
        self.left -= head.len();
        let (words, tail) = rest.as_chunks_mut::<8>();
        for word in words {
            *word = self.step();
        }
        if !tail.is_empty() {
            let last = self.step();
            tail.iter_mut().zip(last).for_each(|(to, from)| *to = from);
            self.left = last.len() - tail.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::*;

    #[test]
    fn the_first_words_are_those_of_the_definition() {
        let mut bytes = [0; 16];
        Generator::new(1).fill(&mut bytes);
        let mut x = 1_u64;
        for word in bytes.chunks(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            assert_eq!(word, x.to_le_bytes());
        }
        assert_eq!(&bytes[..8], &0x4082_2041_u64.to_le_bytes());
        let mut zero = [0; 8];
        Generator::new(0).fill(&mut zero);
        assert_ne!(zero, [0; 8]);
    }

    #[test]
    fn the_bytes_are_the_same_however_they_are_asked_for() {
        let mut whole = vec![0; 1000];
        Generator::new(42).fill(&mut whole);
        for part in 1..40 {
            let mut parts = vec![0; 1000];
            let mut generator = Generator::new(42);
            parts.chunks_mut(part).for_each(|part| generator.fill(part));
            assert_eq!(parts, whole, "in parts of {part}");
        }
    }
}

//! dom0's capture ring, taken from the machine's memory at the end of a run and written as a pcap file.
//!
//! A 32-byte header (magic, bytes ever written, bytes of the area, offset of the oldest record; 64-bit little-endian
//! each), then the area: records of four 32-bit words (seconds, microseconds, bytes kept, bytes on the wire) and the
//! bytes, padded to four. A record does not wrap; one of length `SKIP` says that the next is at the start,
//! and what it skips counts as written.

use anyhow::{Context as _, Result, bail, ensure};

const MAGIC: u64 = 0x5041_4352_5049_4e47;
const HEADER: usize = 32;
const RECORD: usize = 16;
const SKIP: u32 = 0xffff_ffff;

fn long(bytes: &[u8], at: usize) -> Result<u64> {
    let part = bytes.get(at..at + 8).context("truncated capture ring")?;
    Ok(u64::from_le_bytes(part.try_into()?))
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let part = bytes.get(at..at + 4).context("truncated capture ring")?;
    Ok(u32::from_le_bytes(part.try_into()?))
}

/// The pcap file of a ring, and how many frames it has.
pub fn pcap(ring: &[u8]) -> Result<(Vec<u8>, usize)> {
    ensure!(long(ring, 0)? == MAGIC, "no capture ring where dom0 said it would be");
    let (written, capacity) = (long(ring, 8)?, usize::try_from(long(ring, 16)?)?);
    let oldest = usize::try_from(long(ring, 24)?)?;
    let area = ring.get(HEADER..HEADER + capacity).context("capture ring larger than it says")?;

    let mut out = Vec::new();
    // Magic, version 2.4, time zone, accuracy, largest frame, Ethernet.
    for value in [0xa1b2_c3d4_u32, 2 | 4 << 16, 0, 0, 65_535, 1] {
        out.extend(value.to_le_bytes());
    }
    if written == 0 {
        return Ok((out, 0));
    }
    let next = usize::try_from(written % u64::try_from(capacity)?)?;
    let (mut at, mut frames) = (oldest, 0);
    for _ in 0..capacity / RECORD + 2 {
        let kept = word(area, at + 8)?;
        if kept == SKIP {
            at = 0;
        } else {
            let size = usize::try_from(kept)?;
            let end = at + RECORD + size;
            let record = area
                .get(at..end)
                .with_context(|| format!("a record of {size} bytes at {at} in the capture ring"))?;
            out.extend(record);
            frames += 1;
            at += RECORD + size.next_multiple_of(4);
        }
        if at == next {
            return Ok((out, frames));
        }
    }
    bail!("the capture ring has no end")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The writer's side, for tests.
    struct Ring {
        area: Vec<u8>,
        written: u64,
        next: usize,
        oldest: usize,
        live: std::collections::VecDeque<(usize, usize)>,
    }

    impl Ring {
        fn new(capacity: usize) -> Self {
            Self {
                area: vec![0; capacity],
                written: 0,
                next: 0,
                oldest: 0,
                live: Default::default(),
            }
        }

        fn make_room(&mut self, from: usize, to: usize) {
            while self.live.front().is_some_and(|(at, end)| *at < to && from < *end) {
                self.live.pop_front();
            }
        }

        fn push(&mut self, data: &[u8]) {
            let size = RECORD + data.len().next_multiple_of(4);
            let mut at = self.next;
            let left = self.area.len() - at;
            // A mark needs a record's head of its own.
            if size + RECORD > left {
                self.make_room(at, self.area.len());
                self.area[at + 8..at + 12].copy_from_slice(&SKIP.to_le_bytes());
                self.written += left as u64;
                at = 0;
            }
            self.make_room(at, at + size);
            let words = [1, 2, data.len() as u32, data.len() as u32 + 1];
            for (i, w) in words.iter().enumerate() {
                self.area[at + i * 4..at + i * 4 + 4].copy_from_slice(&w.to_le_bytes());
            }
            self.area[at + RECORD..at + RECORD + data.len()].copy_from_slice(data);
            self.written += size as u64;
            self.next = at + size;
            self.live.push_back((at, at + size));
            self.oldest = self.live[0].0;
        }

        fn bytes(&self) -> Vec<u8> {
            let mut out = Vec::new();
            for v in [MAGIC, self.written, self.area.len() as u64, self.oldest as u64] {
                out.extend(v.to_le_bytes());
            }
            out.extend(&self.area);
            out
        }
    }

    #[test]
    fn every_live_record_comes_out_in_order_at_every_fill() {
        for capacity in [256, 300, 512] {
            let mut ring = Ring::new(capacity);
            for n in 0..200_u8 {
                ring.push(&vec![n.max(1); usize::from(n % 61)]);
                let (file, frames) = pcap(&ring.bytes()).unwrap();
                assert_eq!(frames, ring.live.len(), "after {n} in {capacity}");
                if n % 61 > 0 {
                    assert_eq!(file.last(), Some(&n));
                }
            }
        }
    }

    #[test]
    fn garbage_is_an_error() {
        assert!(pcap(&[0; 64]).is_err());
        let mut ring = Ring::new(256);
        ring.push(b"frame");
        let mut bytes = ring.bytes();
        bytes[HEADER + 8..HEADER + 12].copy_from_slice(&0x1000_u32.to_le_bytes());
        assert!(pcap(&bytes).is_err());
        assert_eq!(pcap(&Ring::new(256).bytes()).unwrap().1, 0);
    }
}

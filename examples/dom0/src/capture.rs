//! The last packets that were switched, or that went by the network card, kept in memory that a debugger on the outside can read.
//!
//! A dom0 on Arm is direct-mapped, so the frame that is printed at start is the machine frame. Layout: 32 bytes of header
//! (magic, bytes ever written, capacity, offset of the oldest record, each 64 bits, little endian), then a circular
//! area of records: seconds, microseconds, bytes captured, bytes of the packet, each 32 bits, then the bytes, padded to 4.
//! A record never wraps: one whose length is all ones says that the next is at the start.

use core::num::NonZeroUsize;

use grant::{BufferSize, Frame, FramePool};
use hypercall::Instant;
use runtime::Hv;

/// Pages of the ring.
const SIZE: BufferSize = BufferSize::Pages(NonZeroUsize::MIN.saturating_add(255));
/// Bytes kept of each packet.
const SNAP: usize = 128;
const HEADER: usize = 32;
const RECORD: usize = 16;
const MAGIC: u64 = 0x5041_4352_5049_4e47;
const SKIP: u32 = u32::MAX;

pub(crate) struct Capture {
    frame: Frame<Hv>,
    /// Where the next record goes, and where the oldest is, both within the area.
    next: usize,
    oldest: usize,
    written: u64,
}

impl Capture {
    /// `None` if there is no memory for it.
    pub(crate) fn new(hv: &Hv) -> Option<Self> {
        let frame = FramePool::new(hv, NonZeroUsize::MIN, SIZE).take()?;
        let mut capture = Self { frame, next: 0, oldest: 0, written: 0 };
        capture.write_header();
        let (at, size) = (capture.frame.gfn().address(), capture.frame.size());
        log::info!("dom0: capture ring at machine {at:#x} size {size:#x}");
        Some(capture)
    }

    fn area(&mut self) -> &mut [u8] {
        self.frame.bytes_mut().get_mut(HEADER..).unwrap_or_default()
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.area().get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    fn word(&self, at: usize) -> u32 {
        let area = self.frame.bytes().get(HEADER..).unwrap_or_default();
        area.get(at..)
            .and_then(|rest| rest.first_chunk())
            .map_or(SKIP, |word| u32::from_le_bytes(*word))
    }

    fn write_header(&mut self) {
        let capacity = self.frame.size() - HEADER;
        let words = [MAGIC, self.written, capacity as u64, self.oldest as u64];
        for (place, word) in self.frame.bytes_mut().chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Where the record after the one at `at` begins.
    fn following(&self, at: usize) -> usize {
        match self.word(at + 8) {
            SKIP => 0,
            len => at + RECORD + (len as usize).next_multiple_of(4),
        }
    }

    /// Makes `size` bytes free from `next` on, giving up the oldest records.
    fn make_room(&mut self, size: usize) {
        while self.written > 0 && self.oldest >= self.next && self.oldest < self.next + size {
            self.oldest = self.following(self.oldest);
            if self.oldest == 0 {
                break;
            }
        }
    }

    /// Keeps the beginning of a packet of `len` bytes, of which these are the first.
    pub(crate) fn record(&mut self, first: &[u8], len: usize, now: Instant) {
        let kept = first.get(..SNAP).unwrap_or(first);
        let size = RECORD + kept.len().next_multiple_of(4);
        let capacity = self.frame.size() - HEADER;
        // A mark that says "skip" needs a record's head of its own.
        if self.next + size + RECORD > capacity {
            self.make_room(capacity - self.next);
            self.put(self.next + 8, &SKIP.to_le_bytes());
            // Counted, so that a reader knows where the next record would go.
            self.written += (capacity - self.next) as u64;
            self.next = 0;
        }
        self.make_room(size);
        let nanos = now.0;
        let words = [
            u32::try_from(nanos / 1_000_000_000).unwrap_or(u32::MAX),
            (nanos / 1_000 % 1_000_000) as u32,
            kept.len() as u32,
            u32::try_from(len).unwrap_or(u32::MAX),
        ];
        for (index, word) in words.into_iter().enumerate() {
            self.put(self.next + index * 4, &word.to_le_bytes());
        }
        self.put(self.next + RECORD, kept);
        self.next += size;
        self.written += size as u64;
        self.write_header();
    }
}

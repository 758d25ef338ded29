//! The ring in which a guest prints (io/console.h).

use core::sync::atomic::Ordering;

use grant::SharedMemory;
use hypercall::abi::console as layout;

/// This end of a console.
#[derive(Debug)]
pub struct ConsoleRing<M>(M);

impl<M: SharedMemory> ConsoleRing<M> {
    pub const fn new(page: M) -> Self {
        Self(page)
    }

    /// Puts in as many bytes as there is room for, and says how many.
    pub fn put(&self, text: &[u8]) -> usize {
        let (taken, end) = (self.taken(), self.end());
        // Indices that the other end broke leave no room.
        let room = layout::OUT_SIZE.saturating_sub(end.wrapping_sub(taken) as usize);
        let text = text.get(..room).unwrap_or(text);
        let at = end as usize % layout::OUT_SIZE;
        let (head, tail) = text.split_at(text.len().min(layout::OUT_SIZE - at));
        self.0.write_bytes(layout::OUT + at, head);
        self.0.write_bytes(layout::OUT, tail);
        self.0.store_u32(layout::OUT_PROD, end.wrapping_add(text.len() as u32), Ordering::Release);
        text.len()
    }

    /// Whether the other end has read everything.
    pub fn is_drained(&self) -> bool {
        self.taken() == self.end()
    }

    fn taken(&self) -> u32 {
        // Acquire: what the other end read it has read before we write there.
        self.0.load_u32(layout::OUT_CONS, Ordering::Acquire)
    }

    fn end(&self) -> u32 {
        self.0.load_u32(layout::OUT_PROD, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::ptr::NonNull;
    use grant::SharedPage;
    use std::vec::Vec;

    #[repr(align(4096))]
    struct Page([u8; 4096]);

    fn ring(start: u32) -> ConsoleRing<SharedPage> {
        let page = std::boxed::Box::leak(std::boxed::Box::new(Page([0; 4096])));
        // SAFETY: leaked, so it is there for good, and no reference to it is left.
        let page = unsafe { SharedPage::new(NonNull::from(&mut page.0).cast()) };
        page.store_u32(layout::OUT_CONS, start, Ordering::Relaxed);
        page.store_u32(layout::OUT_PROD, start, Ordering::Relaxed);
        ConsoleRing::new(page)
    }

    /// The other end.
    fn take(ring: &ConsoleRing<SharedPage>, most: usize) -> Vec<u8> {
        let mut cons = ring.0.load_u32(layout::OUT_CONS, Ordering::Relaxed);
        let prod = ring.0.load_u32(layout::OUT_PROD, Ordering::Acquire);
        let mut got = Vec::new();
        while cons != prod && got.len() < most {
            let mut byte = [0];
            ring.0.read_bytes(layout::OUT + cons as usize % layout::OUT_SIZE, &mut byte);
            got.push(byte[0]);
            cons = cons.wrapping_add(1);
        }
        ring.0.store_u32(layout::OUT_CONS, cons, Ordering::Release);
        got
    }

    #[test]
    fn text_comes_out_as_it_went_in_wherever_the_indices_wrap() {
        for start in [0, 2_000, u32::MAX - 700] {
            let ring = ring(start);
            let text: Vec<u8> = (0..20_000u32).map(|n| (n % 251) as u8).collect();
            let (mut rest, mut got) = (&text[..], Vec::new());
            while !rest.is_empty() {
                let put = ring.put(&rest[..rest.len().min(777)]);
                rest = &rest[put..];
                got.extend(take(&ring, 500));
            }
            got.extend(take(&ring, usize::MAX));
            assert!(got == text, "from {start}");
            assert!(ring.is_drained());
        }
    }

    #[test]
    fn a_full_ring_takes_nothing_and_a_broken_one_neither() {
        let ring = ring(5);
        assert_eq!(ring.put(&[b'a'; 3_000]), 2048);
        assert_eq!(ring.put(b"more"), 0);
        assert!(!ring.is_drained());
        assert_eq!(take(&ring, 3).len(), 3);
        assert_eq!(ring.put(b"more"), 3);
        ring.0.store_u32(layout::OUT_CONS, 1 << 30, Ordering::Relaxed);
        assert_eq!(ring.put(b"more"), 0);
    }
}

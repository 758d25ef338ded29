//! A page in plain memory, which both ends share by reference.

use std::sync::atomic::{AtomicU32, Ordering, fence};

use grant::SharedMemory;

#[derive(Debug)]
pub struct Page(Vec<AtomicU32>);

impl Page {
    pub fn new() -> Self {
        Self((0..1024).map(|_| AtomicU32::new(0)).collect())
    }
}

impl SharedMemory for Page {
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.0[offset / 4].load(order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.0[offset / 4].store(value, order);
    }
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
    fn read_bytes(&self, _: usize, _: &mut [u8]) {}
    fn write_bytes(&self, _: usize, _: &[u8]) {}
}

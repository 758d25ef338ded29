//! A page of plain memory with a ring in it.

use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use grant::SharedMemory;
use hypercall::PAGE_SIZE;

/// A page that both ends and the test share by reference.
#[derive(Clone, Debug)]
pub struct Page(Rc<[AtomicU32]>);

impl Default for Page {
    fn default() -> Self {
        Self((0..PAGE_SIZE / 4).map(|_| AtomicU32::new(0)).collect())
    }
}

impl SharedMemory for Page {
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.0[offset % PAGE_SIZE / 4].load(order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.0[offset % PAGE_SIZE / 4].store(value, order);
    }
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
    // No ring moves bytes.
    fn read_bytes(&self, _: usize, _: &mut [u8]) {}
    fn write_bytes(&self, _: usize, _: &[u8]) {}
}

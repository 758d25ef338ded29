//! Memory of ours that a device reads and writes by itself, at any moment.

use core::num::NonZeroUsize;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use grant::{SharedMemory, SharedPage};
use hypercall::{Hypervisor, PAGE_SIZE};

use super::platform;

/// A page that is the device's to look into, for good: what a device has been told of is never used for anything else.
///
/// The device finds it by its guest-physical address, so this is for domains in which that is the machine address too.
#[derive(Debug)]
pub struct DmaPage {
    base: NonNull<u8>,
    address: u64,
    memory: SharedPage,
    coherent: bool,
}

// SAFETY: the pointer is to memory that belongs to the page, as if it were a box; all access is by atomics.
unsafe impl Send for DmaPage {}

impl DmaPage {
    /// A page of zeroes, for a device that sees what the processor has in its caches, or one that does not. `None` if memory
    /// is short.
    pub fn new<H: Hypervisor>(hv: &H, coherent: bool) -> Option<Self> {
        let base = hv.alloc_pages(NonZeroUsize::MIN)?;
        // SAFETY: ours alone, aligned to a page, and never given back; only this page's methods reach it, by atomics.
        let memory = unsafe { SharedPage::new(base) };
        let page = Self { base, address: hv.virt_to_gfn(base).address(), memory, coherent };
        page.show(0, PAGE_SIZE);
        Some(page)
    }

    /// Where the device finds the byte at `offset`.
    pub const fn bus(&self, offset: usize) -> u64 {
        self.address + (offset % PAGE_SIZE) as u64
    }

    /// Has the device see what was written.
    fn show(&self, offset: usize, len: usize) {
        if !self.coherent {
            platform::clean_cache(self.base.expose_provenance().get() + offset, len);
        }
    }

    /// Has us see what the device wrote. Nothing of ours is in those cache lines: it would be written back over it.
    fn look(&self, offset: usize, len: usize) {
        if !self.coherent {
            platform::discard_cache(self.base.expose_provenance().get() + offset, len);
        }
    }

    /// A word that the device writes.
    pub fn load(&self, offset: usize, order: Ordering) -> u32 {
        self.look(offset, 4);
        u32::from_le(self.memory.load_u32(offset, order))
    }

    /// Writes a word for the device.
    pub fn store(&self, offset: usize, value: u32, order: Ordering) {
        self.memory.store_u32(offset, value.to_le(), order);
        self.show(offset, 4);
    }

    /// Bytes that the device wrote.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        self.look(offset, to.len());
        self.memory.read_bytes(offset, to);
    }

    /// Writes bytes for the device.
    pub fn write(&self, offset: usize, from: &[u8]) {
        self.memory.write_bytes(offset, from);
        self.show(offset, from.len());
    }

    /// What was stored before is visible before what is loaded after.
    pub fn fence(&self) {
        self.memory.fence();
    }

    /// Zeroes, as at first. The device must have stopped.
    pub fn clear(&self) {
        self.write(0, &[0; PAGE_SIZE]);
    }
}

//! Windows with real protection: each domain has addresses of its own for what it maps, so a write through a mapping for
//! reading, and any access after the unmap, ends the process with SIGSEGV.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::ptr::{NonNull, null_mut};

use hypercall::{DomId, PAGE_SIZE};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Addresses taken from the host.
#[derive(Debug)]
struct Region {
    base: NonNull<c_void>,
    len: usize,
}

impl Region {
    fn new(base: *mut c_void, len: usize) -> Result<Self, Errno> {
        Ok(Self { base: NonNull::new(base).ok_or(Errno::NOMEM)?, len })
    }

    fn at(&self, index: usize) -> Option<NonNull<u8>> {
        let offset = index.checked_mul(PAGE_SIZE).filter(|offset| *offset < self.len)?;
        // SAFETY: within the region.
        Some(unsafe { self.base.cast::<u8>().add(offset) })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by whoever made this, and gone with the machine: nobody can reach it any more. Should it fail, the
        // addresses stay taken, which harms nobody.
        let _ = unsafe { munmap(self.base.as_ptr(), self.len) };
    }
}

/// The machine's memory as a file that can be mapped again and again, and the domains' windows.
#[derive(Debug)]
pub(crate) struct Strict {
    file: OwnedFd,
    chunks: Vec<Region>,
    windows: HashMap<DomId, Region>,
}

// SAFETY: the addresses are used under the machine's lock alone, to map and unmap.
unsafe impl Send for Strict {}

impl Strict {
    pub(crate) fn new() -> Result<Self, Errno> {
        let file = memfd_create("machine", MemfdFlags::CLOEXEC)?;
        Ok(Self { file, chunks: Vec::new(), windows: HashMap::new() })
    }

    /// Makes memory: `pages` from page `first` of the machine on.
    pub(crate) fn chunk(&mut self, first: u64, pages: usize) -> Result<NonNull<u8>, Errno> {
        let (from, len) = (first * PAGE_SIZE as u64, pages * PAGE_SIZE);
        ftruncate(&self.file, from + len as u64)?;
        let both = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the system chooses an address at which nothing is.
        let base = unsafe { mmap(null_mut(), len, both, MapFlags::SHARED, &self.file, from)? };
        let chunk = Region::new(base, len)?;
        let base = chunk.base.cast();
        self.chunks.push(chunk);
        Ok(base)
    }

    /// Where a domain has its window number `index` of `count`.
    pub(crate) fn window(
        &mut self,
        id: DomId,
        index: usize,
        count: usize,
    ) -> Result<NonNull<u8>, Errno> {
        let region = match self.windows.entry(id) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(free) => {
                let len = count * PAGE_SIZE;
                let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
                // SAFETY: as above.
                let base = unsafe { mmap_anonymous(null_mut(), len, ProtFlags::empty(), flags)? };
                free.insert(Region::new(base, len)?)
            }
        };
        region.at(index).ok_or(Errno::NOMEM)
    }

    /// Shows a page of the machine at a window.
    pub(crate) fn show(
        &self,
        window: NonNull<u8>,
        page: u64,
        read_only: bool,
    ) -> Result<(), Errno> {
        let write = if read_only { ProtFlags::empty() } else { ProtFlags::WRITE };
        let (at, from) = (window.as_ptr().cast(), page * PAGE_SIZE as u64);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the address is that of a window, so what this replaces is nothing or what was mapped there before.
        unsafe { mmap(at, PAGE_SIZE, ProtFlags::READ | write, flags, &self.file, from)? };
        Ok(())
    }

    /// Shows nothing at a window: whoever looks there dies.
    pub(crate) fn hide(window: NonNull<u8>) -> Result<(), Errno> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let at = window.as_ptr().cast();
        // SAFETY: as above.
        unsafe { mmap_anonymous(at, PAGE_SIZE, ProtFlags::empty(), flags)? };
        Ok(())
    }
}

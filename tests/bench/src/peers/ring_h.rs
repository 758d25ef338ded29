//! Xen's own ring.h in C (csrc/ring_h.c): both ends, as a driver in C has them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::{self, NonNull};
use std::slice;

use anyhow::{Context as _, Result};
use hypercall::abi::{
    GRANT_RESERVED_ENTRIES, GTF_PERMIT_ACCESS, GTF_READONLY, GrantCopy, GrantEntryV1,
};
use hypercall::{Hypervisor, PAGE_SIZE};

use crate::duel::{Control, Half, Subject};
use crate::peers::{IDS, Packets, SPREAD};
use crate::xen::{Hv, machine};

type Copy = unsafe extern "C" fn(*const c_void, *mut GrantCopy, u32) -> i32;

/// `struct work` of ring_h.c
#[repr(C)]
struct Work {
    size: u32,
    written: u32,
    batch: u32,
    spread: u32,
    ring: *mut u8,
    pages: *const *mut u8,
    buffers: *mut u8,
    payload: *const u8,
    refs: *const u32,
    frames: *const u64,
    domain: u16,
    xen: *const c_void,
    copy: Option<Copy>,
}

unsafe extern "C" {
    fn ring_h_front_size() -> usize;
    fn ring_h_back_size() -> usize;
    fn ring_h_init(work: *const Work, front: *mut u8, back: *mut u8);
    fn ring_h_front(work: *const Work, front: *mut u8, over: *const bool);
    fn ring_h_step(work: *const Work, front: *mut u8, back: *mut u8) -> u64;
    fn ring_h_back(work: *const Work, back: *mut u8, over: *const bool, done: *mut u64);
}

/// `GNTTABOP_copy` of our Xen for the consumer in C.
///
/// # Safety
/// `xen` is an [`Hv`], and `ops` that many operations whose own ends are the consumer's buffers.
unsafe extern "C" fn grant_copy(xen: *const c_void, ops: *mut GrantCopy, count: u32) -> i32 {
    // SAFETY: the caller says so.
    let done = unsafe {
        let (hv, ops) = (&*xen.cast::<Hv>(), slice::from_raw_parts_mut(ops, count as usize));
        hv.grant_copy(ops)
    };
    if done.is_ok() { 0 } else { -1 }
}

/// Whole pages, zeroed.
struct Block(NonNull<u8>, Layout);

impl Block {
    fn new(bytes: usize) -> Result<Self> {
        let layout = Layout::from_size_align(bytes.next_multiple_of(PAGE_SIZE), PAGE_SIZE)?;
        // SAFETY: no caller asks for none.
        let base = unsafe { alloc_zeroed(layout) };
        Ok(Self(NonNull::new(base).unwrap_or_else(|| handle_alloc_error(layout)), layout))
    }

    fn at(&self) -> *mut u8 {
        self.0.as_ptr()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated so.
        unsafe { dealloc(self.at(), self.1) };
    }
}

/// What the copies are Xen's with.
struct Granted {
    hv: Box<Hv>,
    domain: u16,
    pages: Vec<*mut u8>,
    refs: Vec<u32>,
    frames: Vec<u64>,
    /// What is behind the first of the frames.
    #[cfg(test)]
    first: NonNull<u8>,
}

impl Granted {
    /// Pages of a guest's, granted for reading, and as many of domain 0's to copy to.
    fn new() -> Result<Self> {
        let [hv, guest] = machine([1024, 1024]);
        let page = |hv: &Hv| hv.alloc_pages(NonZeroUsize::MIN).context("no page");
        let table = guest.grant_table_frame(0)?.cast::<GrantEntryV1>();
        let (mut pages, mut refs, mut frames) = (Vec::new(), Vec::new(), Vec::new());
        #[cfg(test)]
        let mut first = None;
        for gref in (GRANT_RESERVED_ENTRIES..).take(IDS) {
            let lent = page(&guest)?;
            let frame = u32::try_from(guest.virt_to_gfn(lent).0)?;
            let flags = GTF_PERMIT_ACCESS | GTF_READONLY;
            let entry = GrantEntryV1 { flags, domid: hv.id(), frame };
            // SAFETY: within the frame, which nobody looks at yet.
            unsafe { table.add(gref as usize).write(entry) };
            pages.push(lent.as_ptr());
            refs.push(gref);
            let to = page(&hv)?;
            frames.push(hv.virt_to_gfn(to).0);
            #[cfg(test)]
            first.get_or_insert(to);
        }
        Ok(Self {
            #[cfg(test)]
            first: first.context("no page")?,
            hv: Box::new(hv),
            domain: guest.id().0,
            pages,
            refs,
            frames,
        })
    }
}

/// Both ends.
pub struct RingH {
    work: Work,
    front: Block,
    back: Block,
    done: u64,
    /// What `work` points to.
    _blocks: [Block; 4],
    _pages: Vec<*mut u8>,
    _granted: Option<Granted>,
}

// SAFETY: all that the pointers lead to is the value's own.
unsafe impl Send for RingH {}

/// A pointer that one thread has at a time.
struct Owned<T>(T);

// SAFETY: each end is run by one thread alone; what both read is not written while they run, apart from the ring and the pages,
// whose use the ring orders.
unsafe impl<T> Send for Owned<T> {}

impl RingH {
    /// Bytes copied by the consumer itself.
    pub fn packets(packets: Packets) -> Result<Self> {
        Self::new(Some(packets), packets.batch, false)
    }

    /// Bytes copied by our Xen, which checks the grants.
    pub fn granted(packets: Packets) -> Result<Self> {
        Self::new(Some(packets), packets.batch, true)
    }

    pub fn descriptors(batch: usize) -> Result<Self> {
        Self::new(None, batch, false)
    }

    fn new(packets: Option<Packets>, batch: usize, by_xen: bool) -> Result<Self> {
        let (size, written) = packets.map_or((0, 0), |packets| (packets.size, packets.written));
        let blocks = [
            Block::new(PAGE_SIZE)?,
            Block::new(IDS * PAGE_SIZE)?,
            Block::new(IDS * PAGE_SIZE)?,
            Block::new(1 << 16)?,
        ];
        let [ring, pages, buffers, payload] = &blocks;
        // SAFETY: these two read nothing.
        let (front, back) = unsafe { (ring_h_front_size(), ring_h_back_size()) };
        let (front, back) = (Block::new(front)?, Block::new(back)?);
        let mut work = Work {
            size: size as u32,
            written: written as u32,
            batch: batch as u32,
            spread: SPREAD as u32,
            ring: ring.at(),
            pages: ptr::null(),
            buffers: buffers.at(),
            payload: payload.at(),
            refs: ptr::null(),
            frames: ptr::null(),
            domain: 0,
            xen: ptr::null(),
            copy: None,
        };
        let granted = by_xen.then(Granted::new).transpose()?;
        let pages = match &granted {
            Some(granted) => {
                work.domain = granted.domain;
                (work.refs, work.frames) = (granted.refs.as_ptr(), granted.frames.as_ptr());
                (work.xen, work.copy) =
                    (ptr::from_ref(&*granted.hv).cast(), Some(grant_copy as Copy));
                granted.pages.clone()
            }
            // SAFETY: within the block.
            None => (0..IDS).map(|id| unsafe { pages.at().add(id * PAGE_SIZE) }).collect(),
        };
        work.pages = pages.as_ptr();
        // SAFETY: the work is whole, and the two blocks as large as C says; a page is aligned enough for anything.
        unsafe { ring_h_init(&raw const work, front.at(), back.at()) };
        Ok(Self { work, front, back, done: 0, _blocks: blocks, _pages: pages, _granted: granted })
    }
}

impl Subject for RingH {
    fn halves(&mut self) -> [Half<'_>; 2] {
        let work = Owned(&raw const self.work);
        let front = Owned(self.front.at());
        let front = move |control: &Control| {
            let (work, front) = (&work, &front);
            let (over, _) = control.raw();
            // SAFETY: made by `ring_h_init`, and used by this thread alone.
            unsafe { ring_h_front(work.0, front.0, over) };
        };
        let work = Owned(&raw const self.work);
        let back = Owned((self.back.at(), &raw mut self.done));
        let back = move |control: &Control| {
            let (work, back) = (&work, &back);
            let (over, done) = control.raw();
            // SAFETY: as above; the count is read by this object only after the threads have ended.
            unsafe {
                ring_h_back(work.0, back.0.0, over, done);
                *back.0.1 = control.done();
            }
        };
        [Box::new(front), Box::new(back)]
    }

    fn begin(&mut self) -> u64 {
        self.done
    }

    fn step(&mut self) -> bool {
        // SAFETY: both ends were made by `ring_h_init`, and no thread has them.
        self.done = unsafe { ring_h_step(&raw const self.work, self.front.at(), self.back.at()) };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that the consumer has of the first packet.
    fn consumed(subject: &RingH) -> Vec<u8> {
        let [.., buffers, _] = &subject._blocks;
        let first = match &subject._granted {
            Some(granted) => granted.first.as_ptr(),
            None => buffers.at(),
        };
        // SAFETY: a page of the subject's own.
        unsafe { slice::from_raw_parts(first, 64) }.to_vec()
    }

    #[test]
    fn packets_arrive_by_either_copy() {
        let packets = Packets::headers(64, 32);
        for mut subject in [RingH::packets(packets).unwrap(), RingH::granted(packets).unwrap()] {
            let [.., payload] = &subject._blocks;
            // SAFETY: nobody reads it yet.
            unsafe { payload.at().write_bytes(0x5a, packets.written) };
            assert_eq!(consumed(&subject), [0; 64]);
            for turn in 1..20 {
                assert!(subject.step());
                assert_eq!(subject.begin(), turn * 32);
            }
            let bytes = consumed(&subject);
            let (header, rest) = bytes.split_at(packets.written);
            assert!(header.iter().all(|byte| *byte == 0x5a), "{bytes:?}");
            assert!(rest.iter().all(|byte| *byte == 0));
        }
    }
}

//! Our own grant table: lending pages to peers, version 1.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::num::NonZeroUsize;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicUsize, Ordering};

use crossbeam_queue::{ArrayQueue, SegQueue};
use hypercall::abi::{
    GRANT_RESERVED_ENTRIES, GTF_PERMIT_ACCESS, GTF_READING, GTF_READONLY, GTF_WRITING,
};
use hypercall::{DomId, Errno, Gfn, GrantRef, Hypervisor, PAGE_SIZE};

use crate::shared::SharedPage;

const ONE: NonZeroUsize = NonZeroUsize::MIN;
/// Bytes in a version 1 entry.
const ENTRY: usize = 8;
/// Entries in a frame of the table.
const PER_FRAME: u32 = (PAGE_SIZE / ENTRY) as u32;
/// How often ending a grant is tried while Xen changes the entry under our hands.
const END_TRIES: usize = 16;

/// Why a page could not be granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrantError {
    /// Every reference is in use and the table is as large as Xen allows.
    #[error("no grant reference is free")]
    TableFull,
    /// No page could be had.
    #[error("no memory for a page to share")]
    NoMemory,
    /// The page lies beyond what a version 1 entry can name.
    #[error("{0:?} does not fit a version 1 grant entry")]
    FrameTooHigh(Gfn),
    /// Xen refused to grow the table.
    #[error("cannot grow the grant table: {0}")]
    Grow(Errno),
}

struct Table<H: Hypervisor> {
    hv: H,
    /// Where each frame of the table is; null until grown that far.
    frames: Box<[core::sync::atomic::AtomicPtr<u8>]>,
    /// First in, first out, so that a reference just given back is the last to be used again.
    free: ArrayQueue<u32>,
    granted: AtomicUsize,
    /// References whose pages the peer still held when we were done with them, with those pages.
    parked: SegQueue<Parked>,
}

/// A page that is kept with its reference until the peer has let go.
struct Parked {
    base: NonNull<u8>,
    gref: GrantRef,
}

// SAFETY: the owner of a page; nothing is done with the address but to free the page, once.
unsafe impl Send for Parked {}

/// This domain's grant table.
pub struct GrantTable<H: Hypervisor>(Arc<Table<H>>);

impl<H: Hypervisor> Clone for GrantTable<H> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// An entry's two words, which Xen reads and writes at any time.
struct Entry {
    base: NonNull<u8>,
}

impl Entry {
    fn flags(&self) -> &AtomicU16 {
        // SAFETY: `Table::entry` made `base` from a frame of the table, which lives as long as the table; flags are the
        // first two bytes of an entry (`struct grant_entry_v1`), and aligned.
        unsafe { self.base.cast().as_ref() }
    }

    fn domid(&self) -> &AtomicU16 {
        // SAFETY: as above, the next two bytes.
        unsafe { self.base.add(2).cast().as_ref() }
    }

    fn frame(&self) -> &AtomicU32 {
        // SAFETY: as above, the next four.
        unsafe { self.base.add(4).cast().as_ref() }
    }
}

impl<H: Hypervisor> Table<H> {
    fn entry(&self, gref: GrantRef) -> Option<Entry> {
        let frame = self.frames.get((gref.0 / PER_FRAME) as usize)?.load(Ordering::Acquire);
        let offset = (gref.0 % PER_FRAME) as usize * ENTRY;
        // SAFETY: the offset is within the frame.
        NonNull::new(frame).map(|frame| Entry { base: unsafe { frame.add(offset) } })
    }

    /// Adds a frame of references to the pool.
    fn grow(&self) -> Result<(), GrantError> {
        let missing =
            self.frames.iter().zip(0..).find(|(slot, _)| slot.load(Ordering::Acquire).is_null());
        let (slot, index) = missing.ok_or(GrantError::TableFull)?;
        let frame = self.hv.grant_table_frame(index).map_err(GrantError::Grow)?;
        // Several threads may have asked for the same frame, and got the same answer: one of them adds its references.
        let placed = slot.compare_exchange(
            ptr::null_mut(),
            frame.as_ptr(),
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        if placed.is_ok() {
            let first = if index == 0 { GRANT_RESERVED_ENTRIES } else { 0 };
            for entry in first..PER_FRAME {
                // There is room: the queue holds every reference of the largest table.
                let _ = self.free.push(index * PER_FRAME + entry);
            }
        }
        Ok(())
    }

    fn take(&self) -> Result<GrantRef, GrantError> {
        loop {
            if let Some(gref) = self.free.pop() {
                return Ok(GrantRef(gref));
            }
            self.grow()?;
        }
    }

    /// Closes an entry if nobody uses the page any more; says whether it is closed.
    fn end(&self, gref: GrantRef) -> bool {
        let Some(entry) = self.entry(gref) else { return false };
        let mut flags = entry.flags().load(Ordering::Relaxed);
        for _ in 0..END_TRIES {
            if flags & (GTF_READING | GTF_WRITING) != 0 {
                return false;
            }
            // grant_table.h: compare and exchange, since Xen may begin to use the entry this very moment.
            match entry.flags().compare_exchange(flags, 0, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => flags = now,
            }
        }
        false
    }

    /// Ends a grant and frees its page and its reference, or gives both back if the peer still uses them.
    fn release(&self, page: Parked) -> Result<(), Parked> {
        if !self.end(page.gref) {
            return Err(page);
        }
        // SAFETY: the grant has ended and this was the page's owner, so nobody can reach it.
        unsafe { self.hv.free_pages(page.base, ONE) };
        let _ = self.free.push(page.gref.0);
        Ok(())
    }
}

impl<H: Hypervisor> GrantTable<H> {
    /// This domain's table; grows as references are needed, to the size Xen allows.
    ///
    /// # Errors
    /// As Xen answers when asked for the size.
    pub fn new(hv: &H) -> Result<Self, Errno> {
        let max = hv.grant_table_size()?.max_frames;
        let entries = max.saturating_mul(PER_FRAME) as usize;
        Ok(Self(Arc::new(Table {
            hv: hv.clone(),
            frames: (0..max).map(|_| Default::default()).collect(),
            free: ArrayQueue::new(entries.max(1)),
            granted: AtomicUsize::new(0),
            parked: SegQueue::new(),
        })))
    }

    /// Grants `domain` a zeroed page of our own, whole.
    ///
    /// # Errors
    /// As [`GrantError`] says.
    pub fn share(&self, domain: DomId, read_only: bool) -> Result<GrantedPage<H>, GrantError> {
        let table = &self.0;
        let gref = table.take()?;
        let refuse = |error| {
            let _ = table.free.push(gref.0);
            Err(error)
        };
        let Some(base) = table.hv.alloc_pages(ONE) else { return refuse(GrantError::NoMemory) };
        let gfn = table.hv.virt_to_gfn(base);
        let (Some(entry), Ok(frame)) = (table.entry(gref), u32::try_from(gfn.0)) else {
            // SAFETY: just allocated, and told nobody.
            unsafe { table.hv.free_pages(base, ONE) };
            return refuse(GrantError::FrameTooHigh(gfn));
        };
        entry.frame().store(frame, Ordering::Relaxed);
        entry.domid().store(domain.0, Ordering::Relaxed);
        let flags = GTF_PERMIT_ACCESS | if read_only { GTF_READONLY } else { 0 };
        // grant_table.h: the flags last, after a barrier.
        entry.flags().store(flags, Ordering::Release);
        table.granted.fetch_add(1, Ordering::Relaxed);
        // SAFETY: a page of ours, given up to sharing; it is freed only after the grant has ended.
        let page = unsafe { SharedPage::new(base) };
        Ok(GrantedPage { page, base, gref, table: Arc::clone(table) })
    }

    /// References that are granted now, parked ones not counted.
    #[must_use]
    pub fn granted(&self) -> usize {
        self.0.granted.load(Ordering::Relaxed)
    }

    /// Pages that a peer still held when we were done with them: kept with their references, until
    /// [`retry_parked`](Self::retry_parked) finds that it has let go.
    #[must_use]
    pub fn parked(&self) -> usize {
        self.0.parked.len()
    }

    /// Looks at up to `budget` parked pages, those that were not looked at for longest first, and frees what its peer has let
    /// go of. The number of pages freed. Xen does not say when a peer lets go, so this is for a slow timer.
    pub fn retry_parked(&self, budget: usize) -> usize {
        let table = &self.0;
        let mut freed = 0;
        for _ in 0..budget.min(table.parked.len()) {
            let Some(parked) = table.parked.pop() else { break };
            match table.release(parked) {
                Ok(()) => freed += 1,
                Err(parked) => table.parked.push(parked),
            }
        }
        freed
    }

    /// Asks Xen for the table anew, after this domain was restored elsewhere: there it begins empty, and every reference
    /// given out before is void. What was granted ends as ever when it is dropped. Nobody may grant anything meanwhile.
    ///
    /// # Errors
    /// As Xen answers. The table cannot be used then.
    pub fn resumed(&self) -> Result<(), Errno> {
        for (slot, index) in self.0.frames.iter().zip(0..) {
            if !slot.load(Ordering::Acquire).is_null() {
                let frame = self.0.hv.grant_table_frame(index)?;
                slot.store(frame.as_ptr(), Ordering::Release);
            }
        }
        Ok(())
    }

    /// References that could be granted without growing the table.
    #[must_use]
    pub fn free(&self) -> usize {
        self.0.free.len()
    }
}

impl<H: Hypervisor> fmt::Debug for GrantTable<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GrantTable({} granted, {} parked)", self.granted(), self.parked())
    }
}

/// A page of ours that a peer may use. Dropping it ends the grant; where the peer still uses it, page and reference are
/// parked together.
pub struct GrantedPage<H: Hypervisor> {
    page: SharedPage,
    base: NonNull<u8>,
    gref: GrantRef,
    table: Arc<Table<H>>,
}

// SAFETY: the page is reached through `SharedPage`, whose accesses are atomic; `base` is used only to free it.
unsafe impl<H: Hypervisor> Send for GrantedPage<H> {}
// SAFETY: as above.
unsafe impl<H: Hypervisor> Sync for GrantedPage<H> {}

impl<H: Hypervisor> GrantedPage<H> {
    /// What to tell the peer.
    #[must_use]
    pub fn gref(&self) -> GrantRef {
        self.gref
    }

    /// The page.
    #[must_use]
    pub fn page(&self) -> &SharedPage {
        &self.page
    }
}

impl<H: Hypervisor> Drop for GrantedPage<H> {
    fn drop(&mut self) {
        let table = &self.table;
        table.granted.fetch_sub(1, Ordering::Relaxed);
        if let Err(parked) = table.release(Parked { base: self.base, gref: self.gref }) {
            table.parked.push(parked);
            // A peer that keeps hundreds is not to fill a console: whoever lent them says how many.
            log::debug!("grant: reference {} is still in use by its peer; parked", self.gref);
        }
    }
}

impl<H: Hypervisor> fmt::Debug for GrantedPage<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GrantedPage({})", self.gref)
    }
}

//! What `GNTTABOP_copy` does, for a Xen that has no such operation: map the peers' pages, copy by the processor, unmap.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::slice;

use hypercall::abi::{
    CopyEnd, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GrantCopy, GrantMap, GrantUnmap,
};
use hypercall::{Errno, GrantRef, GrantStatus, Hypervisor, Window};

use crate::map::{MapRequest, Mapper};
use crate::parked::{Books, unmap_op};
use crate::shared::{SharedMemory, SharedPage};
use crate::span::Page;

/// One end of a copy.
#[derive(Clone, Copy, Debug)]
enum End {
    Own,
    /// The peer's page that is mapped by this operation of the round.
    Mapped(usize),
}

/// What a batch of copies needs to be done so.
#[derive(Debug)]
pub(crate) struct ByMapping {
    books: Arc<Books>,
    /// For each copy, the page of ours at one end of it.
    own: Vec<Option<Page>>,
    /// For each copy of a round, its source and destination.
    ends: Vec<(End, End)>,
    maps: Vec<GrantMap>,
    /// Where each of `maps` goes.
    windows: Vec<Window>,
    unmaps: Vec<GrantUnmap>,
}

impl ByMapping {
    pub(crate) fn new<H: Hypervisor>(capacity: usize, mapper: &Mapper<H>) -> Self {
        // Both ends of a copy may be peers'.
        let pages = capacity.saturating_mul(2);
        Self {
            books: Arc::clone(mapper.books()),
            own: Vec::with_capacity(capacity),
            ends: Vec::with_capacity(capacity),
            maps: Vec::with_capacity(pages),
            windows: Vec::with_capacity(pages),
            unmaps: Vec::with_capacity(pages),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.own.clear();
    }

    /// One more copy, with this page of ours at one end.
    pub(crate) fn push(&mut self, own: Option<Page>) {
        self.own.push(own);
    }

    /// Does all copies, as many in a round as there is space to map for; answers how many pages were parked.
    ///
    /// # Errors
    /// A call to map failed: some copies may have been done.
    ///
    /// # Safety
    /// As for [`Hypervisor::grant_copy`], and each copy's page of ours is the one that was pushed for it.
    pub(crate) unsafe fn copy<H: Hypervisor>(
        &mut self,
        hv: &H,
        ops: &mut [GrantCopy],
    ) -> Result<usize, Errno> {
        let mut parked = 0;
        let mut first = 0;
        while let Some(rest) = ops.get_mut(first..).filter(|rest| !rest.is_empty()) {
            self.plan(hv, rest);
            let count = self.ends.len();
            if count == 0 {
                // Not even one fits.
                if let Some(op) = rest.first_mut() {
                    op.status = GrantStatus::NO_SPACE;
                }
                first += 1;
                continue;
            }
            // SAFETY: every address is that of a window taken just now, which is therefore free.
            let called = unsafe { hv.grant_map(&mut self.maps) };
            if called.is_ok() {
                let own = self.own.get(first..).unwrap_or_default();
                for ((op, own), (source, dest)) in rest.iter_mut().zip(own).zip(&self.ends) {
                    // SAFETY: as promised to us; the round's pages are mapped.
                    op.status = unsafe { self.copy_one(hv, op, *own, *source, *dest) };
                }
            }
            parked += self.unmap(hv);
            called?;
            first += count;
        }
        Ok(parked)
    }

    /// Prepares as many copies as there is space to map for.
    fn plan<H: Hypervisor>(&mut self, hv: &H, ops: &[GrantCopy]) {
        self.ends.clear();
        self.maps.clear();
        for op in ops {
            let before = self.maps.len();
            let source = self.place(hv, &op.source, op.flags & GNTCOPY_SOURCE_GREF != 0, true);
            let dest = self.place(hv, &op.dest, op.flags & GNTCOPY_DEST_GREF != 0, false);
            if let (Some(source), Some(dest)) = (source, dest) {
                self.ends.push((source, dest));
                continue;
            }
            self.maps.truncate(before);
            for window in self.windows.drain(before..) {
                hv.release_window(window);
            }
            return;
        }
    }

    /// Has an end's page mapped, if it is a peer's; `None` if there is no space left.
    fn place<H: Hypervisor>(
        &mut self,
        hv: &H,
        end: &CopyEnd,
        granted: bool,
        read_only: bool,
    ) -> Option<End> {
        if !granted {
            return Some(End::Own);
        }
        // The structure holds a 32-bit reference in a union with a 64-bit frame.
        let request = MapRequest { domain: end.domid, gref: GrantRef(end.u as u32), read_only };
        // Of one page there are often several copies in a row: its pieces, or the pages of ours that it goes to.
        let near = self.maps.len().saturating_sub(2);
        let same = self.maps.iter().enumerate().skip(near).find(|(_, map)| request.is_of(map));
        if let Some((index, _)) = same {
            return Some(End::Mapped(index));
        }
        let window = hv.window()?;
        self.maps.push(request.op(&window));
        self.windows.push(window);
        Some(End::Mapped(self.maps.len() - 1))
    }

    /// The page of an operation to map, or its status if it is not there.
    ///
    /// # Safety
    /// What the operation mapped has not been unmapped, nor is it before the page is dropped.
    unsafe fn page<H: Hypervisor>(&self, hv: &H, index: usize) -> Result<SharedPage, GrantStatus> {
        let (Some(op), Some(window)) = (self.maps.get(index), self.windows.get(index)) else {
            return Err(GrantStatus::UNTOUCHED);
        };
        if !op.status.is_ok() {
            return Err(op.status);
        }
        // SAFETY: Xen has mapped a page here; that it stays is the caller's promise. The destinations among them are
        // mapped to be written, and only they are.
        Ok(unsafe { SharedPage::new(hv.mapped(window)) })
    }

    /// # Safety
    /// As for [`copy`](Self::copy), and the pages of the round are mapped.
    unsafe fn copy_one<H: Hypervisor>(
        &self,
        hv: &H,
        op: &GrantCopy,
        own: Option<Page>,
        source: End,
        dest: End,
    ) -> GrantStatus {
        let (from, to) = (usize::from(op.source.offset), usize::from(op.dest.offset));
        let len = usize::from(op.len);
        let done = || {
            // SAFETY: the pages are mapped until after this; `own` is the frame of ours that the operation names, of
            // which the caller holds a borrow, shared for a source and unique for a destination, and offset and
            // length lie within.
            unsafe {
                match (source, dest, own) {
                    (End::Mapped(page), End::Own, Some(own)) => {
                        let page = self.page(hv, page)?;
                        let to = slice::from_raw_parts_mut(own.base.add(to).as_ptr(), len);
                        page.read_bytes(from, to);
                    }
                    (End::Own, End::Mapped(page), Some(own)) => {
                        let page = self.page(hv, page)?;
                        page.write_bytes(
                            to,
                            slice::from_raw_parts(own.base.add(from).as_ptr(), len),
                        );
                    }
                    (End::Mapped(source), End::Mapped(dest), _) => {
                        let (source, dest) = (self.page(hv, source)?, self.page(hv, dest)?);
                        SharedPage::copy_between(&source, from, &dest, to, len);
                    }
                    (End::Own, ..) | (_, End::Own, None) => return Err(GrantStatus::UNTOUCHED),
                }
            }
            Ok(())
        };
        done().map_or_else(|status| status, |()| GrantStatus::OKAY)
    }

    /// Unmaps what the round has mapped; answers how much of it was parked.
    fn unmap<H: Hypervisor>(&mut self, hv: &H) -> usize {
        self.unmaps.clear();
        for (op, window) in self.maps.iter().zip(&self.windows) {
            if op.status.is_ok() {
                self.books.mapped();
                self.unmaps.push(unmap_op(window, op.handle));
            }
        }
        if !self.unmaps.is_empty() {
            // SAFETY: the pages were used in `copy_one` only. Where the call fails the statuses stay untouched, and
            // that parks the lot.
            let _ = unsafe { hv.grant_unmap(&mut self.unmaps) };
        }
        let mut unmaps = self.unmaps.iter();
        let mut parked = 0;
        for (op, window) in self.maps.iter().zip(self.windows.drain(..)) {
            if !op.status.is_ok() {
                hv.release_window(window);
                continue;
            }
            let status = unmaps.next().map_or(GrantStatus::UNTOUCHED, |unmap| unmap.status);
            let ended = self.books.unmapped(hv, window, op.handle, status);
            parked += usize::from(ended.is_err());
        }
        parked
    }
}

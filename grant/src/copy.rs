//! Grant copy in batches: many copies, one hypercall.

use alloc::vec::Vec;
use core::marker::PhantomData;

use hypercall::abi::{CopyEnd, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GrantCopy};
use hypercall::{DomId, Errno, GrantRef, GrantStatus, Hypervisor, PageOffset};

use crate::by_mapping::ByMapping;
use crate::map::Mapper;
use crate::span::{Extent, Page, Span, SpanMut};

/// Whether this Xen has no `GNTTABOP_copy` (grant_table.h): asked by a call with no operations, which does nothing where
/// the operation exists. Any other answer than [`Errno::NOSYS`] means that it does.
#[must_use]
pub fn copy_is_missing<H: Hypervisor>(hv: &H) -> bool {
    // SAFETY: no operations, so no pages.
    unsafe { hv.grant_copy(&mut []) == Err(Errno::NOSYS) }
}

/// Bytes in a page that a peer granted us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerSpan {
    /// Whose page.
    pub domain: DomId,
    /// Its reference.
    pub gref: GrantRef,
    /// Where in the page the bytes begin.
    pub offset: PageOffset,
}

/// Room for a batch of copies, allocated once.
#[derive(Debug)]
pub struct CopyOps {
    ops: Vec<GrantCopy>,
    capacity: usize,
    /// Where Xen does not copy.
    by_mapping: Option<ByMapping>,
}

/// Some copies of a batch, one after another: what [`CopyBatch`] answers when they are added, and
/// [`CopyResults::of`] takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CopyRange {
    first: u32,
    end: u32,
}

impl CopyRange {
    /// This range with one that was added right after it.
    #[must_use]
    pub const fn with(self, later: Self) -> Self {
        if self.first == self.end { later } else { Self { first: self.first, end: later.end } }
    }

    /// How many copies.
    #[must_use]
    pub const fn len(self) -> usize {
        self.end.saturating_sub(self.first) as usize
    }

    /// Whether it is none at all.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Why copies were not added to a batch; the batch is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The batch has no room for them.
    #[error("the batch of copies is full")]
    Full,
    /// The bytes do not all lie in the peer's page.
    #[error("a copy may not cross the end of a peer's page")]
    CrossesPage,
}

impl CopyOps {
    /// Room for `capacity` copies.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { ops: Vec::with_capacity(capacity), capacity, by_mapping: None }
    }

    /// Room for `capacity` copies where Xen does not copy (see [`copy_is_missing`]): the peers' pages of a batch are
    /// mapped in one hypercall, copied from and to by the processor, and unmapped in another. Where space to map at runs
    /// out before the batch is done, that is repeated. `mapper` counts what cannot be unmapped; it is of
    /// the domain that the batches are submitted by.
    #[must_use]
    pub fn by_mapping<H: Hypervisor>(capacity: usize, mapper: &Mapper<H>) -> Self {
        let by_mapping = Some(ByMapping::new(capacity, mapper));
        Self { ops: Vec::with_capacity(capacity), capacity, by_mapping }
    }

    /// An empty batch. The frames it copies from and to stay borrowed until it has been submitted or dropped.
    pub fn begin<'f>(&mut self) -> CopyBatch<'_, 'f> {
        self.ops.clear();
        if let Some(by_mapping) = &mut self.by_mapping {
            by_mapping.clear();
        }
        CopyBatch { ops: self, frames: PhantomData }
    }
}

/// Copies not yet done.
#[derive(Debug)]
pub struct CopyBatch<'b, 'f> {
    ops: &'b mut CopyOps,
    frames: PhantomData<&'f mut [u8]>,
}

impl<'b, 'f> CopyBatch<'b, 'f> {
    /// Adds a copy; `own` is the page of ours at one end of it.
    #[inline]
    fn push(&mut self, source: CopyEnd, dest: CopyEnd, len: u16, flags: u16, own: Option<Page>) {
        self.ops.ops.push(GrantCopy { source, dest, len, flags, status: GrantStatus::UNTOUCHED });
        if let Some(by_mapping) = &mut self.ops.by_mapping {
            by_mapping.push(own);
        }
    }

    /// Adds a copy for each page of ours that the bytes touch.
    #[inline]
    fn push_local(
        &mut self,
        peer: PeerSpan,
        mut own: Extent,
        flags: u16,
        ends: impl Fn(CopyEnd, CopyEnd) -> (CopyEnd, CopyEnd),
    ) -> Result<CopyRange, CopyError> {
        if own.len() > peer.offset.room() {
            return Err(CopyError::CrossesPage);
        }
        let one = own.in_one_page();
        if one.map_or_else(|| own.pages(), |_| 1) > self.room() {
            return Err(CopyError::Full);
        }
        let first = self.next();
        // Mostly they touch one.
        if let Some((page, within, len)) = one {
            let theirs = CopyEnd::granted(peer.domain, peer.gref, peer.offset.get());
            let (source, dest) = ends(theirs, CopyEnd::own(page.gfn, within));
            self.push(source, dest, len, flags, Some(page));
            return Ok(CopyRange { first, end: self.next() });
        }
        let mut offset = peer.offset.get();
        while let Some((page, within, len)) = own.next_page() {
            let theirs = CopyEnd::granted(peer.domain, peer.gref, offset);
            let (source, dest) = ends(theirs, CopyEnd::own(page.gfn, within));
            self.push(source, dest, len, flags, Some(page));
            if own.len() == 0 {
                break;
            }
            offset += len;
        }
        Ok(CopyRange { first, end: self.next() })
    }

    /// From a peer's page into a buffer of ours, as many bytes as `to` has.
    ///
    /// # Errors
    /// As [`CopyError`] says.
    #[inline]
    pub fn pull(&mut self, from: PeerSpan, to: SpanMut<'f>) -> Result<CopyRange, CopyError> {
        self.push_local(from, to.0, GNTCOPY_SOURCE_GREF, |theirs, ours| (theirs, ours))
    }

    /// From a buffer of ours into a peer's page, all of `from`.
    ///
    /// # Errors
    /// As [`CopyError`] says.
    #[inline]
    pub fn deliver(&mut self, from: Span<'f>, to: PeerSpan) -> Result<CopyRange, CopyError> {
        self.push_local(to, from.0, GNTCOPY_DEST_GREF, |theirs, ours| (ours, theirs))
    }

    /// From one peer's page into another's; the bytes never pass through memory of ours.
    ///
    /// # Errors
    /// As [`CopyError`] says.
    pub fn relay(
        &mut self,
        from: PeerSpan,
        to: PeerSpan,
        len: u16,
    ) -> Result<CopyRange, CopyError> {
        if usize::from(len) > from.offset.room().min(to.offset.room()) {
            return Err(CopyError::CrossesPage);
        }
        if self.room() == 0 {
            return Err(CopyError::Full);
        }
        let first = self.next();
        let source = CopyEnd::granted(from.domain, from.gref, from.offset.get());
        let dest = CopyEnd::granted(to.domain, to.gref, to.offset.get());
        self.push(source, dest, len, GNTCOPY_SOURCE_GREF | GNTCOPY_DEST_GREF, None);
        Ok(CopyRange { first, end: self.next() })
    }

    /// The number of the copy that is added next.
    fn next(&self) -> u32 {
        // A batch of 2^32 copies has no place in memory.
        self.ops.ops.len() as u32
    }

    /// How many more copies there is room for.
    #[must_use]
    pub fn room(&self) -> usize {
        self.ops.capacity.saturating_sub(self.ops.ops.len())
    }

    /// Copies added so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ops.ops.len()
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.ops.is_empty()
    }

    /// Does all of them in one hypercall, or in two for [`CopyOps::by_mapping`] (none, if there is nothing to do).
    ///
    /// # Errors
    /// Xen refused the batch as a whole: no copy counts as done.
    pub fn submit<H: Hypervisor>(self, hv: &H) -> Result<CopyResults<'b>, Errno> {
        let CopyOps { ops, by_mapping, .. } = self.ops;
        let mut parked = 0;
        if !ops.is_empty() {
            // SAFETY: each local end came from a `Span` or `SpanMut`, so it lies within a frame that is borrowed for
            // 'f, which has not ended while `self` lives: shared for a source, unique for a destination.
            unsafe {
                match by_mapping {
                    None => hv.grant_copy(ops)?,
                    Some(by_mapping) => parked = by_mapping.copy(hv, ops)?,
                }
            }
        }
        Ok(CopyResults { ops, parked })
    }
}

/// How each copy of a batch ended.
#[derive(Clone, Copy, Debug)]
pub struct CopyResults<'b> {
    ops: &'b [GrantCopy],
    parked: usize,
}

impl CopyResults<'_> {
    /// How these copies ended: well only if all did. A range from another batch reads as untouched.
    ///
    /// # Errors
    /// The first failure's status.
    pub fn of(&self, range: CopyRange) -> Result<(), GrantStatus> {
        let ops =
            self.ops.get(range.first as usize..range.end as usize).ok_or(GrantStatus::UNTOUCHED)?;
        match ops.iter().find(|op| !op.status.is_ok()) {
            None => Ok(()),
            Some(op) => Err(op.status),
        }
    }

    /// How many of the peers' pages could not be unmapped afterwards, which only [`CopyOps::by_mapping`] does. The
    /// copies are done all the same.
    #[must_use]
    pub fn parked(&self) -> usize {
        self.parked
    }
}

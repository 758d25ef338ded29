//! Grant copy in batches: many copies, one hypercall.

use alloc::vec::Vec;
use core::marker::PhantomData;

use hypercall::abi::{CopyEnd, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GrantCopy};
use hypercall::{DomId, Errno, GrantRef, GrantStatus, Hypervisor, PageOffset};

use crate::frame::{Span, SpanMut};

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
}

/// Which copy of its batch: what [`CopyBatch`] answers when one is added, and [`CopyResults::status`] takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CopyIndex(usize);

/// The batch has no room for another copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the batch of copies is full")]
pub struct BatchFull;

impl CopyOps {
    /// Room for `capacity` copies.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { ops: Vec::with_capacity(capacity), capacity }
    }

    /// An empty batch. The frames it copies from and to stay borrowed until it has been submitted or dropped.
    pub fn begin<'f>(&mut self) -> CopyBatch<'_, 'f> {
        self.ops.clear();
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
    fn push(
        &mut self,
        source: CopyEnd,
        dest: CopyEnd,
        len: u16,
        flags: u16,
    ) -> Result<CopyIndex, BatchFull> {
        let at = self.ops.ops.len();
        if at >= self.ops.capacity {
            return Err(BatchFull);
        }
        self.ops.ops.push(GrantCopy { source, dest, len, flags, status: GrantStatus::UNTOUCHED });
        Ok(CopyIndex(at))
    }

    /// From a peer's page into one of ours, as many bytes as `to` has.
    ///
    /// # Errors
    /// [`BatchFull`].
    pub fn pull(&mut self, from: PeerSpan, to: SpanMut<'f>) -> Result<CopyIndex, BatchFull> {
        let (gfn, offset, len) = to.place();
        let source = CopyEnd::granted(from.domain, from.gref, from.offset.get());
        self.push(source, CopyEnd::own(gfn, offset), len, GNTCOPY_SOURCE_GREF)
    }

    /// From one of our pages into a peer's, all of `from`.
    ///
    /// # Errors
    /// [`BatchFull`].
    pub fn deliver(&mut self, from: Span<'f>, to: PeerSpan) -> Result<CopyIndex, BatchFull> {
        let (gfn, offset, len) = from.place();
        let dest = CopyEnd::granted(to.domain, to.gref, to.offset.get());
        self.push(CopyEnd::own(gfn, offset), dest, len, GNTCOPY_DEST_GREF)
    }

    /// From one peer's page into another's; the bytes never pass through memory of ours.
    ///
    /// # Errors
    /// [`BatchFull`].
    pub fn relay(
        &mut self,
        from: PeerSpan,
        to: PeerSpan,
        len: u16,
    ) -> Result<CopyIndex, BatchFull> {
        let source = CopyEnd::granted(from.domain, from.gref, from.offset.get());
        let dest = CopyEnd::granted(to.domain, to.gref, to.offset.get());
        self.push(source, dest, len, GNTCOPY_SOURCE_GREF | GNTCOPY_DEST_GREF)
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

    /// Does all of them in one hypercall (none, if there is nothing to do).
    ///
    /// # Errors
    /// Xen refused the batch as a whole: no copy counts as done.
    pub fn submit<H: Hypervisor>(self, hv: &H) -> Result<CopyResults<'b>, Errno> {
        let ops = &mut self.ops.ops;
        if !ops.is_empty() {
            // SAFETY: each local end came from a `Span` or `SpanMut`, so it lies within a frame that is borrowed for
            // 'f, which has not ended while `self` lives: shared for a source, unique for a destination.
            unsafe { hv.grant_copy(ops)? };
        }
        Ok(CopyResults { ops })
    }
}

/// How each copy of a batch ended.
#[derive(Clone, Copy, Debug)]
pub struct CopyResults<'b> {
    ops: &'b [GrantCopy],
}

impl CopyResults<'_> {
    /// The status of one copy. An index from another batch reads as untouched, which is not success.
    #[must_use]
    pub fn status(&self, index: CopyIndex) -> GrantStatus {
        self.ops.get(index.0).map_or(GrantStatus::UNTOUCHED, |op| op.status)
    }

    /// The first failure among the copies from `first` up to, but without, `end`.
    ///
    /// # Errors
    /// That failure's status.
    pub fn all_ok(&self, first: CopyIndex, end: CopyIndex) -> Result<(), GrantStatus> {
        let ops = self.ops.get(first.0..end.0).ok_or(GrantStatus::UNTOUCHED)?;
        match ops.iter().find(|op| !op.status.is_ok()) {
            None => Ok(()),
            Some(op) => Err(op.status),
        }
    }
}

impl CopyIndex {
    /// The index after this one: the end of a range that ends with this copy.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The index that the next copy added to `batch` will have.
    #[must_use]
    pub fn upcoming(batch: &CopyBatch<'_, '_>) -> Self {
        Self(batch.len())
    }
}

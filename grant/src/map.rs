//! Mapping what peers granted us, and the frames of other domains that only dom0 may map.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::slice;
use core::sync::atomic::Ordering;

use hypercall::abi::{GNTMAP_HOST_MAP, GNTMAP_READONLY, GrantMap, GrantUnmap};
use hypercall::{
    BusAddr, DomId, Errno, Gfn, GrantRef, GrantStatus, Hypervisor, MapHandle, Toolstack, Window,
};

use crate::parked::{Books, Parked, unmap_op};
use crate::shared::{SharedMemory, SharedPage};

/// Why something could not be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// There is no guest-physical space left to map at.
    #[error("no space left to map at")]
    NoWindow,
    /// Xen refused this mapping.
    #[error("mapping refused: {0}")]
    Refused(GrantStatus),
    /// Xen refused the call.
    #[error("map call failed: {0}")]
    Call(Errno),
}

/// Maps grants, and knows how many mappings there are.
pub struct Mapper<H: Hypervisor> {
    hv: H,
    books: Arc<Books>,
}

impl<H: Hypervisor> Clone for Mapper<H> {
    fn clone(&self) -> Self {
        Self { hv: self.hv.clone(), books: Arc::clone(&self.books) }
    }
}

/// What to map: the reference, whose it is, and whether we mean to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRequest {
    /// Who granted the page.
    pub domain: DomId,
    /// Its reference.
    pub gref: GrantRef,
    /// Map it for reading only.
    pub read_only: bool,
}

impl MapRequest {
    pub(crate) fn op(&self, window: &Window) -> GrantMap {
        GrantMap {
            host_addr: window.gfn().address(),
            flags: GNTMAP_HOST_MAP | if self.read_only { GNTMAP_READONLY } else { 0 },
            gref: self.gref,
            dom: self.domain,
            status: GrantStatus::UNTOUCHED,
            handle: MapHandle::INVALID,
            dev_bus_addr: 0,
        }
    }

    /// Whether `op` is for this.
    pub(crate) fn is_of(&self, op: &GrantMap) -> bool {
        (op.dom, op.gref) == (self.domain, self.gref)
            && (op.flags & GNTMAP_READONLY != 0) == self.read_only
    }
}

/// Room for a batch of mappings, or of mappings to end, allocated once.
pub struct MapOps<H: Hypervisor> {
    capacity: usize,
    maps: Vec<GrantMap>,
    /// Where each request of a batch is to go; `None` where there was no space left.
    windows: Vec<Option<Window>>,
    unmaps: Vec<GrantUnmap>,
    leaving: Vec<Mapping<H>>,
    again: Vec<Parked>,
}

impl<H: Hypervisor> MapOps<H> {
    /// Room for `capacity` operations in one hypercall (for one, if that is 0).
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.max(1);
        Self {
            capacity,
            maps: Vec::with_capacity(capacity),
            windows: Vec::with_capacity(capacity),
            unmaps: Vec::with_capacity(capacity),
            leaving: Vec::with_capacity(capacity),
            again: Vec::with_capacity(capacity),
        }
    }
}

impl<H: Hypervisor> fmt::Debug for MapOps<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MapOps({})", self.capacity)
    }
}

impl<H: Hypervisor> Mapper<H> {
    /// A mapper with no mappings.
    #[must_use]
    pub fn new(hv: &H) -> Self {
        Self { hv: hv.clone(), books: Arc::new(Books::new()) }
    }

    /// Maps one page.
    ///
    /// # Errors
    /// As [`MapError`] says.
    pub fn map(&self, request: MapRequest) -> Result<Mapping<H>, MapError> {
        let window = self.hv.window().ok_or(MapError::NoWindow)?;
        let mut op = request.op(&window);
        // SAFETY: the window was taken just now, so it is free.
        let called = unsafe { self.hv.grant_map(slice::from_mut(&mut op)) };
        self.mapped(window, &op, called)
    }

    /// What came of an operation to map at `window`.
    fn mapped(
        &self,
        window: Window,
        op: &GrantMap,
        called: Result<(), Errno>,
    ) -> Result<Mapping<H>, MapError> {
        // Where the call failed, what it had mapped by then is mapped.
        if !op.status.is_ok() {
            self.hv.release_window(window);
            return Err(called.err().map_or(MapError::Refused(op.status), MapError::Call));
        }
        self.books.mapped();
        // SAFETY: Xen has mapped a page here, and it stays until `Mapping` is unmapped; nobody makes references to it,
        // since only this pointer names it.
        let page = unsafe { SharedPage::new(self.hv.mapped(&window)) };
        let bus = BusAddr(op.dev_bus_addr);
        Ok(Mapping { page, window: Some(window), handle: op.handle, bus, mapper: self.clone() })
    }

    /// Maps several pages in one hypercall (or one for each time that `ops` is full) and hands each result to `each`,
    /// in order. A page that fails does not take the others with it.
    pub fn map_batch(
        &self,
        ops: &mut MapOps<H>,
        requests: impl IntoIterator<Item = MapRequest>,
        mut each: impl FnMut(Result<Mapping<H>, MapError>),
    ) {
        let mut requests = requests.into_iter();
        loop {
            ops.maps.clear();
            for request in requests.by_ref().take(ops.capacity) {
                let window = self.hv.window();
                ops.maps.extend(window.as_ref().map(|window| request.op(window)));
                ops.windows.push(window);
            }
            if ops.windows.is_empty() {
                return;
            }
            let called = if ops.maps.is_empty() {
                Ok(())
            } else {
                // SAFETY: every address is that of a window taken just now, which is therefore free.
                unsafe { self.hv.grant_map(&mut ops.maps) }
            };
            let mut done = ops.maps.iter();
            for window in ops.windows.drain(..) {
                let mapped = window.and_then(|window| Some((window, done.next()?)));
                each(match mapped {
                    Some((window, op)) => self.mapped(window, op, called),
                    None => Err(MapError::NoWindow),
                });
            }
        }
    }

    /// Unmaps several pages as [`unmap_each`](Self::unmap_each) does; answers how many were parked.
    pub fn unmap_batch(
        &self,
        ops: &mut MapOps<H>,
        mappings: impl IntoIterator<Item = Mapping<H>>,
    ) -> usize {
        let mut parked = 0;
        self.unmap_each(ops, mappings, |unmapped| parked += usize::from(unmapped.is_err()));
        parked
    }

    /// Unmaps several pages in one hypercall (or one for each time that `ops` is full) and tells `each`, in order, of
    /// each mapping whether it is gone. What Xen will not unmap is parked: its space is not used
    /// again until it is unmapped after all.
    pub fn unmap_each(
        &self,
        ops: &mut MapOps<H>,
        mappings: impl IntoIterator<Item = Mapping<H>>,
        mut each: impl FnMut(Result<(), GrantStatus>),
    ) {
        let mut mappings = mappings.into_iter();
        loop {
            ops.unmaps.clear();
            ops.leaving.extend(mappings.by_ref().take(ops.capacity));
            if ops.leaving.is_empty() {
                return;
            }
            ops.unmaps.extend(ops.leaving.iter().filter_map(Mapping::unmap_op));
            // SAFETY: each `Mapping` was given up to us, so nobody uses its page. Where the call fails the statuses
            // stay as they are, untouched, and that parks the lot.
            let _ = unsafe { self.hv.grant_unmap(&mut ops.unmaps) };
            // Whoever gives a mapping up has not unmapped it yet, so there is an operation for each.
            for (mut mapping, op) in ops.leaving.drain(..).zip(&ops.unmaps) {
                each(mapping.finish(op.status));
            }
        }
    }

    /// Tries once more, in one hypercall, to unmap what is parked, as much of it as fits `ops`; answers how many were
    /// unmapped. To be called now and then while something is [`parked`](Self::parked): each mapping is tried a few
    /// times, at most 64 wait for that, and the rest is lost for good.
    pub fn retry_parked(&self, ops: &mut MapOps<H>) -> usize {
        let count = self.books.waiting().min(ops.capacity);
        ops.again.extend((0..count).map_while(|_| self.books.next()));
        if ops.again.is_empty() {
            return 0;
        }
        ops.unmaps.clear();
        ops.unmaps.extend(ops.again.iter().map(Parked::unmap_op));
        // SAFETY: what is parked is out of everybody's hands, and its handle cannot stand for another mapping that is in
        // use: Xen compares the address, at which we have put nothing else. Where the call fails the statuses stay
        // untouched.
        let _ = unsafe { self.hv.grant_unmap(&mut ops.unmaps) };
        let ended = ops.again.drain(..).zip(&ops.unmaps);
        ended
            .filter_map(|(parked, op)| {
                self.books.retried(&self.hv, parked, op.status).then_some(())
            })
            .count()
    }

    /// Kept by all clones, and by those who map for themselves.
    pub(crate) fn books(&self) -> &Arc<Books> {
        &self.books
    }

    /// Mappings that are in place.
    #[must_use]
    pub fn live(&self) -> usize {
        self.books.live()
    }

    /// Mappings that Xen would not unmap, whether they are to be [tried again](Self::retry_parked) or are given up.
    #[must_use]
    pub fn parked(&self) -> usize {
        self.books.parked()
    }
}

impl<H: Hypervisor> fmt::Debug for Mapper<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapper({} live, {} parked)", self.live(), self.parked())
    }
}

/// A page that a peer granted us, where we can see it. Dropping it unmaps it; several at once go by
/// [`Mapper::unmap_batch`].
pub struct Mapping<H: Hypervisor> {
    page: SharedPage,
    /// `None` once unmapped or parked.
    window: Option<Window>,
    handle: MapHandle,
    bus: BusAddr,
    mapper: Mapper<H>,
}

impl<H: Hypervisor> Mapping<H> {
    /// The page. For a mapping that is read-only, nothing may be stored.
    #[must_use]
    pub fn page(&self) -> &SharedPage {
        &self.page
    }

    /// The machine address that Xen gave for the page (`dev_bus_addr`). Whether a device may use it is another
    /// question: see the platform's DMA rules.
    #[must_use]
    pub fn machine_address(&self) -> BusAddr {
        self.bus
    }

    /// Where it is mapped.
    #[must_use]
    pub fn gfn(&self) -> Option<Gfn> {
        self.window.as_ref().map(Window::gfn)
    }

    fn unmap_op(&self) -> Option<GrantUnmap> {
        self.window.as_ref().map(|window| unmap_op(window, self.handle))
    }

    /// Settles the books after an attempt to unmap; answers whether it worked.
    fn finish(&mut self, status: GrantStatus) -> Result<(), GrantStatus> {
        let Some(window) = self.window.take() else { return Ok(()) };
        self.mapper.books.unmapped(&self.mapper.hv, window, self.handle, status)
    }
}

impl<H: Hypervisor> Drop for Mapping<H> {
    fn drop(&mut self) {
        let Some(mut op) = self.unmap_op() else { return };
        // SAFETY: we are the last to hold the mapping.
        let _ = unsafe { self.mapper.hv.grant_unmap(slice::from_mut(&mut op)) };
        // Counted and logged there.
        let _ = self.finish(op.status);
    }
}

impl<H: Hypervisor> fmt::Debug for Mapping<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({})", self.handle)
    }
}

/// A holder of a page is the page, as far as access goes.
macro_rules! shared_memory {
    ($holder:ident, $bound:ident) => {
        impl<H: $bound> SharedMemory for $holder<H> {
            fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
                self.page.load_u32(offset, order)
            }
            fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
                self.page.store_u32(offset, value, order);
            }
            fn load_words<const N: usize>(&self, offset: usize) -> [u32; N] {
                self.page.load_words(offset)
            }
            fn store_words<const N: usize>(&self, offset: usize, words: [u32; N]) {
                self.page.store_words(offset, words);
            }
            fn fence(&self) {
                self.page.fence();
            }
            fn read_bytes(&self, offset: usize, to: &mut [u8]) {
                self.page.read_bytes(offset, to);
            }
            fn write_bytes(&self, offset: usize, from: &[u8]) {
                self.page.write_bytes(offset, from);
            }
        }
    };
}

shared_memory!(Mapping, Hypervisor);
shared_memory!(ForeignPage, Toolstack);

/// A frame of another domain's, mapped by right rather than by grant: how dom0 reaches a guest's store ring.
pub struct ForeignPage<H: Toolstack> {
    hv: H,
    page: SharedPage,
    window: Option<Window>,
}

impl<H: Toolstack> ForeignPage<H> {
    /// Maps `frame` of `domain`.
    ///
    /// # Errors
    /// As [`MapError`] says.
    pub fn map(hv: &H, domain: DomId, frame: Gfn) -> Result<Self, MapError> {
        let window = hv.window().ok_or(MapError::NoWindow)?;
        // SAFETY: a window just taken is free.
        if let Err(errno) = unsafe { hv.map_foreign(domain, frame, &window) } {
            hv.release_window(window);
            return Err(MapError::Call(errno));
        }
        // SAFETY: Xen has mapped a page here, and it stays until we are dropped.
        let page = unsafe { SharedPage::new(hv.mapped(&window)) };
        Ok(Self { hv: hv.clone(), page, window: Some(window) })
    }

    /// The page.
    #[must_use]
    pub fn page(&self) -> &SharedPage {
        &self.page
    }
}

impl<H: Toolstack> Drop for ForeignPage<H> {
    fn drop(&mut self) {
        let Some(window) = self.window.take() else { return };
        // SAFETY: we are the last to hold the page.
        match unsafe { self.hv.unmap_foreign(&window) } {
            Ok(()) => self.hv.release_window(window),
            Err(errno) => {
                log::warn!("grant: cannot unmap a foreign page: {errno}; its space is lost")
            }
        }
    }
}

impl<H: Toolstack> fmt::Debug for ForeignPage<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForeignPage").finish_non_exhaustive()
    }
}

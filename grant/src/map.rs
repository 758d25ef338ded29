//! Mapping what peers granted us, and the frames of other domains that only dom0 may map.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

use hypercall::abi::{GNTMAP_HOST_MAP, GNTMAP_READONLY, GrantMap, GrantUnmap};
use hypercall::{
    BusAddr, DomId, Errno, Gfn, GrantRef, GrantStatus, Hypervisor, MapHandle, Toolstack, Window,
};

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

#[derive(Default)]
struct Counts {
    live: AtomicUsize,
    parked: AtomicUsize,
}

/// Maps grants, and knows how many mappings there are.
pub struct Mapper<H: Hypervisor> {
    hv: H,
    counts: Arc<Counts>,
}

impl<H: Hypervisor> Clone for Mapper<H> {
    fn clone(&self) -> Self {
        Self { hv: self.hv.clone(), counts: Arc::clone(&self.counts) }
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

impl<H: Hypervisor> Mapper<H> {
    /// A mapper with no mappings.
    #[must_use]
    pub fn new(hv: &H) -> Self {
        Self { hv: hv.clone(), counts: Arc::default() }
    }

    /// Maps one page.
    ///
    /// # Errors
    /// As [`MapError`] says.
    pub fn map(&self, request: MapRequest) -> Result<Mapping<H>, MapError> {
        let mut got = None;
        self.map_batch(&[request], |result| got = Some(result));
        got.unwrap_or(Err(MapError::Refused(GrantStatus::UNTOUCHED)))
    }

    /// Maps several pages in one hypercall and hands each result to `each`, in order. A page that fails does not take
    /// the others with it.
    pub fn map_batch(
        &self,
        requests: &[MapRequest],
        mut each: impl FnMut(Result<Mapping<H>, MapError>),
    ) {
        let mut windows = Vec::with_capacity(requests.len());
        let mut ops = Vec::with_capacity(requests.len());
        for request in requests {
            let window = self.hv.window();
            if let Some(window) = &window {
                ops.push(GrantMap {
                    host_addr: window.gfn().address(),
                    flags: GNTMAP_HOST_MAP | if request.read_only { GNTMAP_READONLY } else { 0 },
                    gref: request.gref,
                    dom: request.domain,
                    status: GrantStatus::UNTOUCHED,
                    handle: MapHandle::INVALID,
                    dev_bus_addr: 0,
                });
            }
            windows.push(window);
        }
        let called = if ops.is_empty() {
            Ok(())
        } else {
            // SAFETY: every address is that of a window taken just now, which is therefore free.
            unsafe { self.hv.grant_map(&mut ops) }
        };
        let mut ops = ops.into_iter();
        for window in windows {
            let Some(window) = window else {
                each(Err(MapError::NoWindow));
                continue;
            };
            let op = ops.next();
            let status = op.map_or(GrantStatus::UNTOUCHED, |op| op.status);
            match (op, called) {
                (Some(op), _) if status.is_ok() => {
                    self.counts.live.fetch_add(1, Ordering::Relaxed);
                    // SAFETY: Xen has mapped a page here, and it stays until `Mapping` is unmapped; nobody makes
                    // references to it, since only this pointer names it.
                    let page = unsafe { SharedPage::new(self.hv.mapped(&window)) };
                    each(Ok(Mapping {
                        page,
                        window: Some(window),
                        handle: op.handle,
                        bus: BusAddr(op.dev_bus_addr),
                        mapper: self.clone(),
                    }));
                }
                (_, Err(errno)) => {
                    self.hv.release_window(window);
                    each(Err(MapError::Call(errno)));
                }
                (_, Ok(())) => {
                    self.hv.release_window(window);
                    each(Err(MapError::Refused(status)));
                }
            }
        }
    }

    /// Unmaps several pages in one hypercall. What Xen will not unmap is parked: its space is never used again.
    /// Answers how many were.
    pub fn unmap_batch(&self, mappings: impl IntoIterator<Item = Mapping<H>>) -> usize {
        let mut mappings: Vec<_> = mappings.into_iter().collect();
        let mut ops: Vec<_> = mappings.iter().filter_map(Mapping::unmap_op).collect();
        if !ops.is_empty() {
            // SAFETY: each `Mapping` was given up to us, so nobody uses its page. Where the call fails the statuses
            // stay as they are, untouched, and that parks the lot.
            let _ = unsafe { self.hv.grant_unmap(&mut ops) };
        }
        mappings
            .iter_mut()
            .zip(ops)
            .map(|(mapping, op)| usize::from(!mapping.finish(op.status)))
            .sum()
    }

    /// Mappings that are in place.
    #[must_use]
    pub fn live(&self) -> usize {
        self.counts.live.load(Ordering::Relaxed)
    }

    /// Mappings that Xen would not unmap.
    #[must_use]
    pub fn parked(&self) -> usize {
        self.counts.parked.load(Ordering::Relaxed)
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
        self.window.as_ref().map(|window| GrantUnmap {
            host_addr: window.gfn().address(),
            dev_bus_addr: 0,
            handle: self.handle,
            status: GrantStatus::UNTOUCHED,
        })
    }

    /// Settles the books after an attempt to unmap; says whether it worked.
    fn finish(&mut self, status: GrantStatus) -> bool {
        let Some(window) = self.window.take() else { return true };
        self.mapper.counts.live.fetch_sub(1, Ordering::Relaxed);
        if status.is_ok() {
            self.mapper.hv.release_window(window);
            return true;
        }
        // Parked: the window is not given back, so nothing is ever mapped over what may still be there.
        self.mapper.counts.parked.fetch_add(1, Ordering::Relaxed);
        log::warn!("grant: cannot unmap {:?}: {status}; its space is lost", self.handle);
        false
    }
}

impl<H: Hypervisor> Drop for Mapping<H> {
    fn drop(&mut self) {
        let Some(mut op) = self.unmap_op() else { return };
        // SAFETY: we are the last to hold the mapping.
        let _ = unsafe { self.mapper.hv.grant_unmap(core::slice::from_mut(&mut op)) };
        self.finish(op.status);
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

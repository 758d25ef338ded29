//! The books of a mapper: what is mapped, and what Xen would not unmap.

use core::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_queue::ArrayQueue;
use hypercall::abi::GrantUnmap;
use hypercall::{GrantStatus, Hypervisor, MapHandle, Window};

/// How often unmapping is tried again before a mapping is given up.
const RETRIES: u8 = 8;
/// How many mappings are kept to be tried again; those beyond are given up at once.
const KEPT: usize = 64;

pub(crate) fn unmap_op(window: &Window, handle: MapHandle) -> GrantUnmap {
    GrantUnmap {
        host_addr: window.gfn().address(),
        dev_bus_addr: 0,
        handle,
        status: GrantStatus::UNTOUCHED,
    }
}

/// A mapping that nobody uses and Xen would not unmap. Its window is kept with it, so nothing is ever mapped over what
/// may still be there.
#[derive(Debug)]
pub(crate) struct Parked {
    window: Window,
    handle: MapHandle,
    tries: u8,
}

impl Parked {
    pub(crate) fn unmap_op(&self) -> GrantUnmap {
        unmap_op(&self.window, self.handle)
    }
}

#[derive(Debug)]
pub(crate) struct Books {
    live: AtomicUsize,
    parked: AtomicUsize,
    /// Those of the parked that are worth another try.
    again: ArrayQueue<Parked>,
}

impl Books {
    pub(crate) fn new() -> Self {
        let (live, parked) = Default::default();
        Self { live, parked, again: ArrayQueue::new(KEPT) }
    }

    pub(crate) fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    pub(crate) fn parked(&self) -> usize {
        self.parked.load(Ordering::Relaxed)
    }

    pub(crate) fn mapped(&self) {
        self.live.fetch_add(1, Ordering::Relaxed);
    }

    /// After an attempt to unmap; answers whether it worked.
    pub(crate) fn unmapped<H: Hypervisor>(
        &self,
        hv: &H,
        window: Window,
        handle: MapHandle,
        status: GrantStatus,
    ) -> Result<(), GrantStatus> {
        self.live.fetch_sub(1, Ordering::Relaxed);
        if status.is_ok() {
            hv.release_window(window);
            return Ok(());
        }
        self.parked.fetch_add(1, Ordering::Relaxed);
        log::warn!("grant: cannot unmap {handle:?}: {status}; parked");
        self.keep(Parked { window, handle, tries: 0 }, status);
        Err(status)
    }

    /// How many of the parked may be tried again.
    pub(crate) fn waiting(&self) -> usize {
        self.again.len()
    }

    /// The one that has waited longest.
    pub(crate) fn next(&self) -> Option<Parked> {
        self.again.pop()
    }

    /// After another attempt; answers whether it worked.
    pub(crate) fn retried<H: Hypervisor>(
        &self,
        hv: &H,
        parked: Parked,
        status: GrantStatus,
    ) -> bool {
        if status.is_ok() {
            hv.release_window(parked.window);
            self.parked.fetch_sub(1, Ordering::Relaxed);
            return true;
        }
        self.keep(Parked { tries: parked.tries.saturating_add(1), ..parked }, status);
        false
    }

    fn keep(&self, parked: Parked, status: GrantStatus) {
        // Xen has no such mapping, and what it has at the window is unknown: no try will ever tell.
        let hopeless = status == GrantStatus::BAD_HANDLE || parked.tries >= RETRIES;
        let lost = if hopeless { Err(parked) } else { self.again.push(parked) };
        if let Err(Parked { handle, window, .. }) = lost {
            log::warn!("grant: {handle:?} is given up, and with it the space at {}", window.gfn());
        }
    }
}

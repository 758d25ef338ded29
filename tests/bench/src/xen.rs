//! The least of a Xen that checks grants: what a benchmark of packets per second can stand on.
//!
//! `tests/sim` keeps a ledger of everything under one lock, and so costs more than what is to be measured. Here are
//! memory, grant tables, windows and two-level events, without a lock on the way of a packet. What Xen checks of a grant is
//! checked for each operation and in Xen's way: the entry is read, who may use it and how is looked at, and it is marked as in
//! use by a compare-and-exchange before its page is touched, and unmarked after.
//!
//! What is left out: death, suspend, aliases, faults, FIFO events, more than one domain that maps and copies.

mod domain;
mod grants;

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hypercall::abi::{CacheFlush, GrantCopy, GrantMap, GrantUnmap};
use hypercall::{DomId, Errno, Gfn, GrantTableSize, Hypervisor, Port, VcpuId, Virq, Window};

pub use domain::Counts;
use domain::Domain;

/// `XENFEAT_auto_translated_physmap`
const FEATURES: u32 = 1 << 2;

struct Machine {
    domains: Box<[Domain]>,
    /// Nanoseconds that each hypercall costs beyond what it does.
    cost: AtomicU64,
}

/// Xen as one domain sees it.
#[derive(Clone)]
pub struct Hv {
    machine: Arc<Machine>,
    own: DomId,
}

/// A machine with domains of so many pages, numbered from 0.
pub fn machine<const N: usize>(pages: [usize; N]) -> [Hv; N] {
    let mut id = 0;
    let domains = pages.map(|pages| {
        id += 1;
        Domain::new(DomId(id - 1), pages)
    });
    let machine = Arc::new(Machine { domains: Box::new(domains), cost: AtomicU64::new(0) });
    std::array::from_fn(|own| Hv { machine: Arc::clone(&machine), own: DomId(own as u16) })
}

impl Hv {
    pub fn id(&self) -> DomId {
        self.own
    }

    /// What this domain has asked for so far.
    pub fn counts(&self) -> Counts {
        self.domain(self.own).map(|domain| domain.tally.read()).unwrap_or_default()
    }

    /// Has each hypercall of any domain take so much longer from now on.
    pub fn set_cost(&self, cost: Duration) {
        self.machine.cost.store(cost.as_nanos() as u64, Ordering::Relaxed);
    }

    fn domain(&self, id: DomId) -> Result<&Domain, Errno> {
        let id = if id == DomId::SELF { self.own } else { id };
        self.machine.domains.get(usize::from(id.0)).ok_or(Errno::SRCH)
    }

    /// The caller, who has come in by a hypercall.
    fn enter(&self) -> Result<&Domain, Errno> {
        let cost = self.machine.cost.load(Ordering::Relaxed);
        if cost > 0 {
            let end = Instant::now() + Duration::from_nanos(cost);
            while Instant::now() < end {}
        }
        self.domain(self.own)
    }
}

// SAFETY: pages lie in a block of host memory of the domain's own, are zeroed, and are handed out once until they are freed
// (domain.rs); frame numbers are positions in that block; windows are handed out once until released, from numbers at which
// no memory is. Memory goes back to the host with the last handle of the machine.
unsafe impl Hypervisor for Hv {
    fn features(&self, submap: u32) -> Result<u32, Errno> {
        if submap == 0 { Ok(FEATURES) } else { Err(Errno::INVAL) }
    }

    fn notify(&self, port: Port) -> Result<(), Errno> {
        let own = self.enter()?;
        own.tally.notified();
        let (remote, port) = own.peer(port).ok_or(Errno::INVAL)?;
        self.domain(remote)?.raise(port);
        Ok(())
    }

    fn alloc_unbound(&self, remote: DomId) -> Result<Port, Errno> {
        self.domain(self.own)?.offer(remote)
    }

    fn bind_interdomain(&self, remote: DomId, remote_port: Port) -> Result<Port, Errno> {
        let own = self.domain(self.own)?;
        let port = own.join(remote, remote_port)?;
        self.domain(remote)?.accept(remote_port, self.own, port)?;
        own.raise(port);
        Ok(port)
    }

    fn bind_virq(&self, _: Virq, _: VcpuId) -> Result<Port, Errno> {
        Err(Errno::NOSYS)
    }

    fn unmask(&self, port: Port) -> Result<(), Errno> {
        self.enter()?.unmask(port);
        Ok(())
    }

    fn close(&self, port: Port) -> Result<(), Errno> {
        self.domain(self.own)?.close(port);
        Ok(())
    }

    unsafe fn init_control(&self, _: VcpuId, _: Gfn) -> Result<(), Errno> {
        Err(Errno::NOSYS)
    }

    unsafe fn expand_array(&self, _: Gfn) -> Result<(), Errno> {
        Err(Errno::NOSYS)
    }

    fn shared_info(&self) -> NonNull<u8> {
        self.domain(self.own).map_or(NonNull::dangling(), Domain::shared_info)
    }

    unsafe fn grant_copy(&self, ops: &mut [GrantCopy]) -> Result<(), Errno> {
        let own = self.enter()?;
        let mut bytes = 0;
        for op in ops.iter_mut() {
            op.status = self.copy(own, op).err().unwrap_or(hypercall::GrantStatus::OKAY);
            bytes += u64::from(op.len);
        }
        own.tally.copied(ops.len(), bytes);
        Ok(())
    }

    unsafe fn grant_map(&self, ops: &mut [GrantMap]) -> Result<(), Errno> {
        let own = self.enter()?;
        own.tally.mapped(ops.len());
        self.map(own, ops);
        Ok(())
    }

    unsafe fn grant_unmap(&self, ops: &mut [GrantUnmap]) -> Result<(), Errno> {
        let own = self.enter()?;
        own.tally.unmapped(ops.len());
        self.unmap(own, ops);
        Ok(())
    }

    fn cache_flush(&self, _: &mut [CacheFlush]) -> Result<(), Errno> {
        Err(Errno::NOSYS)
    }

    fn grant_table_size(&self) -> Result<GrantTableSize, Errno> {
        Ok(GrantTableSize { frames: 1, max_frames: domain::TABLE_FRAMES })
    }

    fn grant_table_frame(&self, index: u32) -> Result<NonNull<u8>, Errno> {
        self.domain(self.own)?.table_frame(index).ok_or(Errno::NOSPC)
    }

    fn alloc_pages(&self, count: NonZeroUsize) -> Option<NonNull<u8>> {
        self.domain(self.own).ok()?.alloc(count.get())
    }

    unsafe fn free_pages(&self, pages: NonNull<u8>, count: NonZeroUsize) {
        if let Ok(own) = self.domain(self.own) {
            own.free(pages, count.get());
        }
    }

    fn virt_to_gfn(&self, page: NonNull<u8>) -> Gfn {
        self.domain(self.own).ok().and_then(|own| own.gfn_of(page)).unwrap_or(Gfn::INVALID)
    }

    fn window(&self) -> Option<Window> {
        self.domain(self.own).ok()?.take_window().map(Window::new)
    }

    fn release_window(&self, window: Window) {
        if let Ok(own) = self.domain(self.own) {
            own.release_window(window.gfn());
        }
    }

    fn mapped(&self, window: &Window) -> NonNull<u8> {
        let shown = self.domain(self.own).ok().and_then(|own| own.shown(window.gfn()));
        shown.unwrap_or_else(|| self.shared_info())
    }
}

//! A domain's handle: `Hypervisor` and `Toolstack` on the simulated Xen.

use std::fmt;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use hypercall::abi::{CacheFlush, GNTTAB_CACHE_CLEAN, GNTTAB_CACHE_INVAL};
use hypercall::abi::{GrantCopy, GrantMap, GrantUnmap};
use hypercall::{
    BusAddr, DomId, DomainInfo, Errno, Gfn, GrantStatus, GrantTableSize, Hypervisor, PAGE_SIZE,
    Port, Toolstack, VcpuId, Virq, Window,
};

use crate::domain::Handle;
use crate::faults::{Fault, Hypercalls, Kind};
use crate::machine::{Maintenance, Mfn};
use crate::memory::{Shown, ShownBy};
use crate::{Shared, State, wake};

/// The simulated Xen as one domain sees it.
#[derive(Clone)]
pub struct SimHv {
    shared: Arc<Shared>,
    own: Arc<Handle>,
}

impl fmt::Debug for SimHv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimHv(d{})", self.own.id)
    }
}

/// A call that Xen has begun to look at.
struct Entered<'s> {
    state: MutexGuard<'s, State>,
    /// It fails after so many operations.
    fails: Option<(usize, Errno)>,
}

impl SimHv {
    pub(crate) fn new(shared: Arc<Shared>, own: Arc<Handle>) -> Self {
        Self { shared, own }
    }

    /// Which domain this is.
    #[must_use]
    pub fn id(&self) -> DomId {
        self.own.id
    }

    pub(crate) fn own_handle(&self) -> Arc<Handle> {
        Arc::clone(&self.own)
    }

    /// What the domain has asked for so far.
    #[must_use]
    pub fn hypercalls(&self) -> Hypercalls {
        self.own.tally.read()
    }

    /// Sleeps until an upcall is pending on the first virtual CPU, as `SCHEDOP_block` does; `false` if none was in time.
    #[must_use]
    pub fn wait_for_upcall(&self, timeout: Duration) -> bool {
        self.own.wait(VcpuId(0), timeout)
    }

    /// Has `callback` called whenever Xen makes an upcall pending, on the thread that caused it: the upcall vector. Not
    /// called for what the domain raises itself.
    pub fn on_upcall(&self, callback: impl Fn() + Send + Sync + 'static) {
        self.own.set_callback(Some(Arc::new(callback)));
    }

    /// Has `hook` called before each call of a kind, on the calling thread: what a peer, or another thread of the
    /// domain, does at the worst moment.
    pub fn before(&self, kind: Kind, hook: impl Fn() + Send + Sync + 'static) {
        self.own.hook(kind, Arc::new(hook));
    }

    /// Writes to DRAM what the CPUs changed in `len` bytes at a guest-physical address of the domain's (`dc cvac`): its own
    /// memory, a window, or an alias. `false`, and a violation, where nothing is: real hardware would raise an abort.
    pub fn clean_cache(&self, address: u64, len: usize) -> bool {
        self.maintain(address, len, Maintenance::Clean)
    }

    /// Has the CPUs see what is in DRAM for `len` bytes at a guest-physical address (`dc ivac`, which in a virtual machine writes
    /// changed lines back first, as `dc civac` does). Otherwise as [`clean_cache`](Self::clean_cache).
    pub fn invalidate_cache(&self, address: u64, len: usize) -> bool {
        self.maintain(address, len, Maintenance::CleanInvalidate)
    }

    fn maintain(&self, address: u64, len: usize, what: Maintenance) -> bool {
        let mut state = self.shared.lock();
        let (mut at, end) = (address, address.saturating_add(len as u64));
        let mut all = true;
        while at < end {
            let frame = Gfn::of_address(at);
            let from = (at - frame.address()) as usize;
            let to = PAGE_SIZE.min((end - frame.address()) as usize);
            let domain = state.domains.get(&self.own.id);
            match domain.and_then(|domain| domain.memory.lookup(frame)) {
                Some((mfn, _)) => state.machine.maintain(mfn, from..to, what),
                None => {
                    all = false;
                    let frame = frame.0;
                    let what =
                        format_args!("{what:?}s the cache at gfn {frame:#x}, where nothing is");
                    state.violation(self.own.id, what);
                }
            }
            at += (to - from) as u64;
        }
        all
    }

    fn enter(&self, kind: Kind, ops: usize) -> Result<Entered<'_>, Errno> {
        self.own.tally.call(kind, ops);
        self.own.before(kind);
        let mut state = self.shared.lock();
        let domain = state.domains.get_mut(&self.own.id).filter(|domain| !domain.dying);
        // A domain that is gone makes no hypercalls; what its objects still try comes to nothing.
        let domain = domain.ok_or(Errno::SRCH)?;
        if self.own.is_suspended() {
            state.violation(self.own.id, format_args!("makes a call while suspended: {kind:?}"));
            return Err(Errno::SRCH);
        }
        let fails = match domain.faults.call(kind) {
            Some(Fault::Errno(errno)) => return Err(errno),
            Some(Fault::Partial(done, errno)) => Some((done, errno)),
            Some(Fault::Status(_) | Fault::Untouched | Fault::Natural) | None => None,
        };
        Ok(Entered { state, fails })
    }

    /// A call that is no batch.
    fn single(&self, kind: Kind) -> Result<MutexGuard<'_, State>, Errno> {
        let entered = self.enter(kind, 1)?;
        match entered.fails {
            None => Ok(entered.state),
            Some((_, errno)) => Err(errno),
        }
    }

    /// A call for toolstacks only.
    fn privileged(&self, kind: Kind) -> Result<MutexGuard<'_, State>, Errno> {
        let state = self.single(kind)?;
        if state.domains.get(&self.own.id).is_some_and(|domain| domain.privileged) {
            Ok(state)
        } else {
            Err(Errno::PERM)
        }
    }

    /// A batch of operations, each of which `each` does and answers the status of, to be put where `status` says.
    fn batch<T>(
        &self,
        kind: Kind,
        ops: &mut [T],
        mut each: impl FnMut(&mut State, &mut T) -> GrantStatus,
        status: impl Fn(&mut T) -> &mut GrantStatus,
    ) -> Result<(), Errno> {
        let mut entered = self.enter(kind, ops.len())?;
        let state = &mut *entered.state;
        let looked_at = entered.fails.map_or(usize::MAX, |(done, _)| done);
        for op in ops.iter_mut().take(looked_at) {
            let own = state.domains.get_mut(&self.own.id);
            let fault = own.and_then(|domain| domain.faults.op(kind));
            *status(op) = match fault {
                None => each(state, op),
                Some(Fault::Status(injected)) => injected,
                Some(_) => continue,
            };
        }
        entered.fails.map_or(Ok(()), |(_, errno)| Err(errno))
    }

    fn violation(&self, what: fmt::Arguments<'_>) {
        self.shared.lock().violation(self.own.id, what);
    }
}

// SAFETY: pages come from the host's allocator, zeroed and aligned, and are handed out once until they are freed
// (memory.rs); the p2m is kept beside it; windows are handed out once until released, from a range that no memory of the
// domain is in. Pages are given back to the host only with the last handle, so every pointer stays valid while a handle
// lives, and the machine itself accesses them by atomics alone. Where windows have addresses of their own (strict.rs), these
// show the page for exactly as long as it is mapped.
unsafe impl Hypervisor for SimHv {
    fn features(&self, submap: u32) -> Result<u32, Errno> {
        drop(self.single(Kind::Features)?);
        if submap == 0 { Ok(self.own.features()) } else { Err(Errno::INVAL) }
    }

    fn notify(&self, port: Port) -> Result<(), Errno> {
        let woken = self.single(Kind::Notify)?.notify(self.own.id, port)?;
        wake(woken);
        Ok(())
    }

    fn alloc_unbound(&self, remote: DomId) -> Result<Port, Errno> {
        self.single(Kind::AllocUnbound)?.alloc_unbound(self.own.id, remote)
    }

    fn bind_interdomain(&self, remote: DomId, remote_port: Port) -> Result<Port, Errno> {
        let bound =
            self.single(Kind::BindInterdomain)?.bind_interdomain(self.own.id, remote, remote_port);
        let (port, woken) = bound?;
        wake(woken);
        Ok(port)
    }

    fn bind_virq(&self, virq: Virq, vcpu: VcpuId) -> Result<Port, Errno> {
        self.single(Kind::BindVirq)?.bind_virq(self.own.id, virq, vcpu)
    }

    fn unmask(&self, port: Port) -> Result<(), Errno> {
        let woken = self.single(Kind::Unmask)?.unmask(self.own.id, port)?;
        wake(woken);
        Ok(())
    }

    fn close(&self, port: Port) -> Result<(), Errno> {
        self.single(Kind::Close)?.close(self.own.id, port)
    }

    unsafe fn init_control(&self, vcpu: VcpuId, control: Gfn) -> Result<(), Errno> {
        self.single(Kind::InitControl)?.init_control(self.own.id, vcpu, control)
    }

    unsafe fn expand_array(&self, page: Gfn) -> Result<(), Errno> {
        let woken = self.single(Kind::ExpandArray)?.expand_array(self.own.id, page)?;
        wake(woken);
        Ok(())
    }

    fn shared_info(&self) -> NonNull<u8> {
        self.own.bits.0.base()
    }

    unsafe fn grant_copy(&self, ops: &mut [GrantCopy]) -> Result<(), Errno> {
        let copy = |state: &mut State, op: &mut GrantCopy| {
            let status = state.copy(self.own.id, op);
            if status.is_ok() {
                self.own.tally.copied(op.len);
            }
            status
        };
        self.batch(Kind::Copy, ops, copy, |op| &mut op.status)
    }

    unsafe fn grant_map(&self, ops: &mut [GrantMap]) -> Result<(), Errno> {
        self.batch(Kind::Map, ops, |state, op| state.map(self.own.id, op), |op| &mut op.status)
    }

    unsafe fn grant_unmap(&self, ops: &mut [GrantUnmap]) -> Result<(), Errno> {
        self.batch(Kind::Unmap, ops, |state, op| state.unmap(self.own.id, op), |op| &mut op.status)
    }

    fn cache_flush(&self, ops: &mut [CacheFlush]) -> Result<(), Errno> {
        let mut entered = self.enter(Kind::CacheFlush, ops.len())?;
        let state = &mut *entered.state;
        if !state.domains.get(&self.own.id).is_some_and(|domain| domain.cache_flush) {
            return Err(Errno::NOSYS);
        }
        if state.domains.get(&self.own.id).is_some_and(|domain| domain.flushes_nothing) {
            return Ok(());
        }
        let looked_at = entered.fails.map_or(usize::MAX, |(done, _)| done);
        for op in ops.iter().take(looked_at) {
            let end = usize::from(op.offset) + usize::from(op.length);
            let known = GNTTAB_CACHE_CLEAN | GNTTAB_CACHE_INVAL;
            if usize::from(op.offset) >= PAGE_SIZE || end > PAGE_SIZE || op.op & !known != 0 {
                return Err(Errno::INVAL);
            }
            if op.length == 0 || op.op == 0 {
                continue;
            }
            let mfn = Mfn::of_bus(BusAddr(op.dev_bus_addr));
            let owner = state.machine.owner(mfn).ok_or(Errno::INVAL)?;
            let own = state.domains.get(&self.own.id).ok_or(Errno::SRCH)?;
            if owner != self.own.id && own.grants.mapped(mfn).is_none() {
                return Err(Errno::INVAL);
            }
            let what = match op.op {
                GNTTAB_CACHE_CLEAN => Maintenance::Clean,
                GNTTAB_CACHE_INVAL => Maintenance::Invalidate,
                _ => Maintenance::CleanInvalidate,
            };
            state.machine.maintain(mfn, usize::from(op.offset)..end, what);
        }
        entered.fails.map_or(Ok(()), |(_, errno)| Err(errno))
    }

    fn grant_table_size(&self) -> Result<GrantTableSize, Errno> {
        let state = self.single(Kind::TableSize)?;
        state.domains.get(&self.own.id).map(|domain| domain.grants.size()).ok_or(Errno::SRCH)
    }

    fn grant_table_frame(&self, index: u32) -> Result<NonNull<u8>, Errno> {
        let mut guard = self.single(Kind::TableFrame)?;
        let state = &mut *guard;
        let domain = state.domains.get_mut(&self.own.id).ok_or(Errno::SRCH)?;
        domain.grants.frame(&mut state.machine, self.own.id, index).map(|page| page.base())
    }

    fn alloc_pages(&self, count: NonZeroUsize) -> Option<NonNull<u8>> {
        let mut guard = self.single(Kind::AllocPages).ok()?;
        let state = &mut *guard;
        let domain = state.domains.get_mut(&self.own.id)?;
        domain.memory.alloc(&mut state.machine, self.own.id, count)
    }

    unsafe fn free_pages(&self, pages: NonNull<u8>, count: NonZeroUsize) {
        let freed = {
            let mut guard = self.shared.lock();
            let state = &mut *guard;
            let domain = state.domains.get_mut(&self.own.id).filter(|domain| !domain.dying);
            let Some(domain) = domain else { return };
            let frame = domain.memory.gfn_of(&state.machine, pages);
            let freed = domain.memory.free(&mut state.machine, pages, count);
            match (&domain.events.fifo, frame) {
                (Some(fifo), Some(frame)) if fifo.holds(frame) => {
                    Err(format!("frees gfn {:#x}, in which Xen has its events", frame.0))
                }
                _ => freed,
            }
        };
        if let Err(what) = freed {
            self.violation(format_args!("{what}"));
        }
    }

    fn virt_to_gfn(&self, page: NonNull<u8>) -> Gfn {
        let mut state = self.shared.lock();
        let domain = state.domains.get(&self.own.id).filter(|domain| !domain.dying);
        let Some(domain) = domain else { return Gfn::INVALID };
        domain.memory.gfn_of(&state.machine, page).unwrap_or_else(|| {
            state.violation(self.own.id, format_args!("asks for the frame of a page it has not"));
            Gfn::INVALID
        })
    }

    fn window(&self) -> Option<Window> {
        let mut state = self.single(Kind::Window).ok()?;
        state.domains.get_mut(&self.own.id)?.memory.take_window()
    }

    fn release_window(&self, window: Window) {
        let released = {
            let mut state = self.shared.lock();
            let domain = state.domains.get_mut(&self.own.id);
            domain.map_or(Ok(()), |domain| domain.memory.release_window(window.gfn()))
        };
        if let Err(what) = released {
            self.violation(format_args!("{what}"));
        }
    }

    fn mapped(&self, window: &Window) -> NonNull<u8> {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        let Some(domain) = state.domains.get(&self.own.id) else { return self.shared.hole.base() };
        let own_address = domain.memory.window_address(&mut state.machine, window.gfn());
        let shown = domain.memory.shown(window.gfn());
        let page = shown.and_then(|shown| state.machine.page(shown.mfn));
        if page.is_none() {
            let gfn = window.gfn().0;
            state.violation(self.own.id, format_args!("looks at {gfn:#x}, where nothing is"));
        }
        own_address.unwrap_or_else(|| page.unwrap_or(self.shared.hole).base())
    }
}

// SAFETY: as above.
unsafe impl Toolstack for SimHv {
    fn domain_info(&self, domain: DomId) -> Result<DomainInfo, Errno> {
        let state = self.privileged(Kind::DomainInfo)?;
        let found = state.domains.get(&domain).ok_or(Errno::SRCH)?;
        Ok(DomainInfo {
            domain,
            dying: found.dying,
            shutdown: found.shutdown,
            cpu_time: 0,
            pages: found.memory.pages() as u64,
            vcpus: found.vcpus,
        })
    }

    fn destroy_domain(&self, domain: DomId) -> Result<(), Errno> {
        let told = {
            let mut state = self.privileged(Kind::DestroyDomain)?;
            if domain == self.own.id {
                return Err(Errno::INVAL);
            }
            state.destroy(domain).ok_or(Errno::SRCH)?
        };
        wake(told);
        Ok(())
    }

    fn hvm_param(&self, domain: DomId, index: u32) -> Result<u64, Errno> {
        let state = self.privileged(Kind::HvmParam)?;
        let found = state.domains.get(&domain).ok_or(Errno::SRCH)?;
        Ok(found.params.get(&index).copied().unwrap_or(0))
    }

    fn set_hvm_param(&self, domain: DomId, index: u32, value: u64) -> Result<(), Errno> {
        let mut state = self.privileged(Kind::SetHvmParam)?;
        let found = state.domains.get_mut(&domain).ok_or(Errno::SRCH)?;
        if domain == self.own.id {
            return Err(Errno::PERM);
        }
        found.params.insert(index, value);
        Ok(())
    }

    fn populate(&self, domain: DomId, frame: Gfn) -> Result<(), Errno> {
        let mut guard = self.privileged(Kind::Populate)?;
        let state = &mut *guard;
        let found = state.domains.get_mut(&domain).ok_or(Errno::SRCH)?;
        if found.dying || !found.memory.populate(&mut state.machine, domain, frame) {
            return Err(Errno::NOMEM);
        }
        Ok(())
    }

    unsafe fn map_foreign(&self, domain: DomId, frame: Gfn, window: &Window) -> Result<(), Errno> {
        let mut guard = self.privileged(Kind::MapForeign)?;
        let state = &mut *guard;
        if domain == self.own.id {
            return Err(Errno::PERM);
        }
        let found = state.domains.get(&domain).ok_or(Errno::SRCH)?;
        let mfn = found.memory.translate(frame).ok_or(Errno::INVAL)?;
        let by = ShownBy::Foreign(domain, frame, found.life);
        let own = state.domains.get_mut(&self.own.id).ok_or(Errno::SRCH)?;
        if !own.memory.show(&mut state.machine, window.gfn(), Shown { mfn, by }) {
            let at = window.gfn().0;
            state.violation(
                self.own.id,
                format_args!("maps at gfn {at:#x}, which is no free window"),
            );
            return Err(Errno::INVAL);
        }
        state.machine.hold(mfn);
        Ok(())
    }

    unsafe fn unmap_foreign(&self, window: &Window) -> Result<(), Errno> {
        let mut guard = self.privileged(Kind::UnmapForeign)?;
        let state = &mut *guard;
        let own = state.domains.get_mut(&self.own.id).ok_or(Errno::SRCH)?;
        let shown = own.memory.shown(window.gfn());
        let foreign = |shown: &Shown| matches!(shown.by, ShownBy::Foreign(..));
        let shown = shown.filter(foreign).ok_or(Errno::NOENT)?;
        own.memory.hide(&mut state.machine, window.gfn());
        state.release(&shown);
        Ok(())
    }
}

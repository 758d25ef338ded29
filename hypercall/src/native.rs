//! The real Xen, by hypercall, for any kernel that can say where its memory is.

use core::fmt;
use core::num::NonZeroUsize;
use core::ptr::{NonNull, from_mut};

use crate::abi::{self, call, op};
use crate::arch::hypercall5;
use crate::hypervisor::{
    DomainInfo, GrantTableSize, Hypervisor, Shutdown, ShutdownReason, Suspended, Toolstack, Window,
};
use crate::{DomId, Errno, Gfn, GrantStatus, PAGE_SIZE, Port, VcpuId, Virq};

/// What the kernel that links this crate says of its own memory.
///
/// # Safety
/// As for [`Hypervisor`]: the methods of the same name have the same contract.
pub unsafe trait Platform: Copy + Send + Sync + 'static {
    /// Zeroed pages, adjacent in virtual memory and in frame numbers.
    fn alloc_pages(&self, count: NonZeroUsize) -> Option<NonNull<u8>>;
    /// Takes pages back.
    ///
    /// # Safety
    /// They came from [`alloc_pages`](Self::alloc_pages) with this count and nothing uses them.
    unsafe fn free_pages(&self, pages: NonNull<u8>, count: NonZeroUsize);
    /// The frame behind a virtual address of the kernel's own memory.
    fn virt_to_gfn(&self, address: NonNull<u8>) -> Gfn;
    /// Where the shared info page is mapped.
    fn shared_info(&self) -> NonNull<u8>;
    /// Where frame `index` of the grant table shall appear, guest-physical, if there is room for it.
    fn grant_table_gfn(&self, index: u32) -> Option<Gfn>;
    /// Guest-physical space for one page of somebody else's.
    fn window(&self) -> Option<Window>;
    /// Takes such space back.
    fn release_window(&self, window: Window);
    /// The virtual address at which the kernel sees a window, or a frame of the grant table.
    fn gfn_to_virt(&self, gfn: Gfn) -> NonNull<u8>;
}

/// A handle to the Xen underneath.
#[derive(Clone, Copy, Debug)]
pub struct Xen<P>(P);

fn arg<T>(value: &mut T) -> u64 {
    from_mut(value).expose_provenance() as u64
}

/// Any hypercall of up to three arguments.
///
/// # Safety
/// As for [`hypercall5`].
unsafe fn hypercall(number: u64, a0: u64, a1: u64, a2: u64) -> Result<u64, Errno> {
    // SAFETY: the caller's promise is the same.
    Errno::check(unsafe { hypercall5(number, [a0, a1, a2, 0, 0]) })
}

impl<P: Platform> Xen<P> {
    /// A handle for the domain that runs this code.
    ///
    /// # Safety
    /// It runs under Xen, as a domain with translated memory (Arm, HVM or PVH).
    pub const unsafe fn new(platform: P) -> Self {
        Self(platform)
    }

    /// Shows the shared info page at `gfn`.
    ///
    /// # Errors
    /// As Xen answers.
    ///
    /// # Safety
    /// Nothing of the caller's lives at `gfn`.
    pub unsafe fn map_shared_info(&self, gfn: Gfn) -> Result<(), Errno> {
        // SAFETY: the caller's promise.
        unsafe { add_to_physmap(abi::XENMAPSPACE_SHARED_INFO, 0, gfn) }
    }

    /// Writes to Xen's console (`CONSOLEIO_write`), which non-debug builds of Xen allow dom0 only.
    pub fn console_write(&self, text: &[u8]) {
        // SAFETY: Xen only reads `len` bytes from the slice. A failure has nowhere to be reported.
        let _ = unsafe {
            hypercall(
                call::CONSOLE_IO,
                op::CONSOLEIO_WRITE,
                text.len() as u64,
                text.as_ptr().expose_provenance() as u64,
            )
        };
    }

    /// Takes what was typed at Xen's console while the input was this domain's (`CONSOLEIO_read`), and says how many bytes
    /// that is. Xen lets dom0 alone read it, and keeps 128 bytes.
    pub fn console_read(&self, bytes: &mut [u8]) -> usize {
        // SAFETY: Xen writes at most `len` bytes, to the slice.
        let read = unsafe {
            hypercall(
                call::CONSOLE_IO,
                op::CONSOLEIO_READ,
                bytes.len() as u64,
                bytes.as_mut_ptr().expose_provenance() as u64,
            )
        };
        // To whoever may not read, nothing was typed.
        read.map_or(0, |read| bytes.len().min(usize::try_from(read).unwrap_or(0)))
    }

    /// Ends this domain.
    pub fn shutdown(&self, how: Shutdown) -> ! {
        let mut reason: u32 = match how {
            Shutdown::PowerOff => 0,
            Shutdown::Reboot => 1,
            Shutdown::Crash => 3,
        };
        loop {
            // SAFETY: `struct sched_shutdown` is the one word that `reason` is.
            let _ = unsafe { hypercall(call::SCHED_OP, op::SCHED_SHUTDOWN, arg(&mut reason), 0) };
        }
    }

    /// Asks to be suspended: to be saved, moved or copied (`SHUTDOWN_suspend`). Returns when this domain goes on.
    ///
    /// # Errors
    /// As Xen answers.
    ///
    /// # Safety
    /// The domain may go on as another one: the shared info page is nowhere, the callback, all ports, grants of the grant
    /// table and timers are gone. The caller sets up anew what it uses.
    pub unsafe fn suspend(&self) -> Result<Suspended, Errno> {
        let mut reason: u32 = 2;
        // SAFETY: `struct sched_shutdown` is the one word that `reason` is; what follows is the caller's promise.
        match unsafe { hypercall(call::SCHED_OP, op::SCHED_SHUTDOWN, arg(&mut reason), 0)? } {
            0 => Ok(Suspended::Resumed),
            _ => Ok(Suspended::Cancelled),
        }
    }

    /// Lets others run first (`SCHEDOP_yield`).
    pub fn yield_now(&self) {
        // SAFETY: changes nothing. There is nothing to be done about a failure.
        let _ = unsafe { hypercall(call::SCHED_OP, op::SCHED_YIELD, 0, 0) };
    }

    /// Has [`Virq::TIMER`] raised once for a virtual CPU, when its system time is `nanos`, or at once where that is past. An
    /// earlier alarm is forgotten. Only for the CPU that asks.
    ///
    /// # Errors
    /// As Xen answers; [`Errno::NOSYS`] on Arm, where the processor has its own timer.
    pub fn set_alarm(&self, vcpu: VcpuId, nanos: u64) -> Result<(), Errno> {
        let mut alarm = abi::SetSingleshotTimer { timeout_abs_ns: nanos, flags: 0 };
        self.vcpu_op(op::VCPU_SET_SINGLESHOT_TIMER, vcpu, arg(&mut alarm))
    }

    /// Has [`Virq::TIMER`] no longer raised every so often, as some domains begin with.
    ///
    /// # Errors
    /// As Xen answers.
    pub fn stop_ticks(&self, vcpu: VcpuId) -> Result<(), Errno> {
        self.vcpu_op(op::VCPU_STOP_PERIODIC_TIMER, vcpu, 0)
    }

    fn vcpu_op(&self, cmd: u64, vcpu: VcpuId, operand: u64) -> Result<(), Errno> {
        // SAFETY: Xen only reads the operand, which callers above make of the structure of the command.
        unsafe { hypercall(call::VCPU_OP, cmd, vcpu.0.into(), operand)? };
        Ok(())
    }

    /// An event channel operation.
    ///
    /// # Safety
    /// `T` is the structure that `cmd` takes.
    unsafe fn evtchn<T>(&self, cmd: u64, mut operand: T) -> Result<T, Errno> {
        // SAFETY: Xen reads and writes only the structure, which is ours; its meaning is the caller's promise.
        unsafe { hypercall(call::EVENT_CHANNEL_OP, cmd, arg(&mut operand), 0)? };
        Ok(operand)
    }

    /// A batch of grant operations.
    ///
    /// # Safety
    /// `T` is the structure that `cmd` takes, and the caller answers for the operations.
    unsafe fn grant_op<T>(&self, cmd: u64, ops: &mut [T]) -> Result<(), Errno> {
        let count = u32::try_from(ops.len()).map_err(|_| Errno::INVAL)?;
        // SAFETY: Xen reads and writes `count` structures from the start of the slice; the rest is the caller's promise.
        unsafe {
            hypercall(
                call::GRANT_TABLE_OP,
                cmd,
                ops.as_mut_ptr().expose_provenance() as u64,
                count.into(),
            )?;
        }
        Ok(())
    }

    fn domctl(&self, cmd: u32, domain: DomId, u: abi::DomctlPayload) -> Result<abi::Domctl, Errno> {
        let mut domctl = abi::Domctl {
            cmd,
            interface_version: abi::DOMCTL_INTERFACE_VERSION,
            domain,
            pad: [0; 3],
            u,
        };
        // SAFETY: the structure is at least as large as Xen's, and the commands of this file take no pointers.
        unsafe { hypercall(call::DOMCTL, arg(&mut domctl), 0, 0)? };
        Ok(domctl)
    }
}

/// Shows a page of Xen's at one of our frames.
///
/// # Safety
/// Nothing of the caller's lives at `gpfn`.
unsafe fn add_to_physmap(space: u32, idx: u64, gpfn: Gfn) -> Result<(), Errno> {
    let mut add = abi::AddToPhysmap { domid: DomId::SELF, size: 0, space, idx, gpfn };
    // SAFETY: Xen only reads the structure; what appears at `gpfn` is the caller's promise.
    unsafe { hypercall(call::MEMORY_OP, op::MEM_ADD_TO_PHYSMAP, arg(&mut add), 0)? };
    Ok(())
}

// SAFETY: the promises about memory are `Platform`'s, word for word; the others are kept by passing each call on to Xen.
unsafe impl<P: Platform> Hypervisor for Xen<P> {
    fn features(&self, submap: u32) -> Result<u32, Errno> {
        let mut info = [submap, 0];
        // SAFETY: `struct xen_feature_info` is these two words.
        unsafe { hypercall(call::XEN_VERSION, op::XENVER_GET_FEATURES, arg(&mut info), 0)? };
        let [_, bits] = info;
        Ok(bits)
    }

    fn notify(&self, port: Port) -> Result<(), Errno> {
        // SAFETY: `struct evtchn_send` is the port.
        unsafe { self.evtchn(op::EVTCHN_SEND, port) }.map(|_| ())
    }

    fn alloc_unbound(&self, remote: DomId) -> Result<Port, Errno> {
        let ask = abi::EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: remote, port: Port(0) };
        // SAFETY: the structure is that of the command.
        unsafe { self.evtchn(op::EVTCHN_ALLOC_UNBOUND, ask) }.map(|got| got.port)
    }

    fn bind_interdomain(&self, remote: DomId, remote_port: Port) -> Result<Port, Errno> {
        let ask =
            abi::EvtchnBindInterdomain { remote_dom: remote, remote_port, local_port: Port(0) };
        // SAFETY: the structure is that of the command.
        unsafe { self.evtchn(op::EVTCHN_BIND_INTERDOMAIN, ask) }.map(|got| got.local_port)
    }

    fn bind_virq(&self, virq: Virq, vcpu: VcpuId) -> Result<Port, Errno> {
        let ask = abi::EvtchnBindVirq { virq, vcpu, port: Port(0) };
        // SAFETY: the structure is that of the command.
        unsafe { self.evtchn(op::EVTCHN_BIND_VIRQ, ask) }.map(|got| got.port)
    }

    fn unmask(&self, port: Port) -> Result<(), Errno> {
        // SAFETY: `struct evtchn_unmask` is the port.
        unsafe { self.evtchn(op::EVTCHN_UNMASK, port) }.map(|_| ())
    }

    fn close(&self, port: Port) -> Result<(), Errno> {
        // SAFETY: `struct evtchn_close` is the port.
        unsafe { self.evtchn(op::EVTCHN_CLOSE, port) }.map(|_| ())
    }

    unsafe fn init_control(&self, vcpu: VcpuId, control: Gfn) -> Result<(), Errno> {
        let ask = abi::EvtchnInitControl {
            control_gfn: control,
            offset: 0,
            vcpu,
            link_bits: 0,
            pad: [0; 7],
        };
        // SAFETY: the structure is that of the command; the page is the caller's promise.
        unsafe { self.evtchn(op::EVTCHN_INIT_CONTROL, ask) }.map(|_| ())
    }

    unsafe fn expand_array(&self, page: Gfn) -> Result<(), Errno> {
        // SAFETY: `struct evtchn_expand_array` is the frame; the page is the caller's promise.
        unsafe { self.evtchn(op::EVTCHN_EXPAND_ARRAY, page) }.map(|_| ())
    }

    fn shared_info(&self) -> NonNull<u8> {
        self.0.shared_info()
    }

    unsafe fn grant_copy(&self, ops: &mut [abi::GrantCopy]) -> Result<(), Errno> {
        // SAFETY: the structure is that of the command; the pages are the caller's promise.
        unsafe { self.grant_op(op::GNTTAB_COPY, ops) }
    }

    unsafe fn grant_map(&self, ops: &mut [abi::GrantMap]) -> Result<(), Errno> {
        // SAFETY: the structure is that of the command; the windows are the caller's promise.
        unsafe { self.grant_op(op::GNTTAB_MAP, ops) }
    }

    unsafe fn grant_unmap(&self, ops: &mut [abi::GrantUnmap]) -> Result<(), Errno> {
        // SAFETY: the structure is that of the command; that nothing uses the mappings is the caller's promise.
        unsafe { self.grant_op(op::GNTTAB_UNMAP, ops) }
    }

    fn cache_flush(&self, ops: &mut [abi::CacheFlush]) -> Result<(), Errno> {
        // SAFETY: the structure is that of the command, which changes no contents of memory.
        unsafe { self.grant_op(op::GNTTAB_CACHE_FLUSH, ops) }
    }

    fn grant_table_size(&self) -> Result<GrantTableSize, Errno> {
        let mut query = [abi::GrantQuerySize {
            dom: DomId::SELF,
            nr_frames: 0,
            max_nr_frames: 0,
            status: GrantStatus::UNTOUCHED,
        }];
        // SAFETY: the structure is that of the command.
        unsafe { self.grant_op(op::GNTTAB_QUERY_SIZE, &mut query)? };
        let [abi::GrantQuerySize { nr_frames, max_nr_frames, status, .. }] = query;
        if status.is_ok() {
            Ok(GrantTableSize { frames: nr_frames, max_frames: max_nr_frames })
        } else {
            Err(Errno::INVAL)
        }
    }

    fn grant_table_frame(&self, index: u32) -> Result<NonNull<u8>, Errno> {
        let gfn = self.0.grant_table_gfn(index).ok_or(Errno::NOSPC)?;
        // SAFETY: the platform promises that `gfn` is kept free for this.
        unsafe { add_to_physmap(abi::XENMAPSPACE_GRANT_TABLE, index.into(), gfn)? };
        Ok(self.0.gfn_to_virt(gfn))
    }

    fn alloc_pages(&self, count: NonZeroUsize) -> Option<NonNull<u8>> {
        self.0.alloc_pages(count)
    }

    unsafe fn free_pages(&self, pages: NonNull<u8>, count: NonZeroUsize) {
        // SAFETY: the caller's promise is the same.
        unsafe { self.0.free_pages(pages, count) }
    }

    fn virt_to_gfn(&self, page: NonNull<u8>) -> Gfn {
        self.0.virt_to_gfn(page)
    }

    fn window(&self) -> Option<Window> {
        self.0.window()
    }

    fn release_window(&self, window: Window) {
        self.0.release_window(window);
    }

    fn mapped(&self, window: &Window) -> NonNull<u8> {
        self.0.gfn_to_virt(window.gfn())
    }
}

// SAFETY: as above.
unsafe impl<P: Platform> Toolstack for Xen<P> {
    fn domain_info(&self, domain: DomId) -> Result<DomainInfo, Errno> {
        let got =
            self.domctl(op::DOMCTL_GETDOMAININFO, domain, abi::DomctlPayload { pad: [0; 32] })?;
        // SAFETY: any bytes are a valid `GetDomainInfo`: it is integers only.
        let info = unsafe { got.u.info };
        if info.domain != domain {
            // Xen answers with the next domain there is.
            return Err(Errno::SRCH);
        }
        let reason = (info.flags >> abi::DOMINF_SHUTDOWN_SHIFT) as u8;
        Ok(DomainInfo {
            domain,
            dying: info.flags & abi::DOMINF_DYING != 0,
            shutdown: (info.flags & abi::DOMINF_SHUTDOWN != 0)
                .then(|| ShutdownReason::from(reason)),
            cpu_time: info.cpu_time,
            pages: info.tot_pages,
            vcpus: info.max_vcpu_id.saturating_add(1),
        })
    }

    fn destroy_domain(&self, domain: DomId) -> Result<(), Errno> {
        self.domctl(op::DOMCTL_DESTROY, domain, abi::DomctlPayload { pad: [0; 32] }).map(|_| ())
    }

    fn hvm_param(&self, domain: DomId, index: u32) -> Result<u64, Errno> {
        let mut param = abi::HvmParam { domid: domain, pad: 0, index, value: 0 };
        // SAFETY: the structure is that of the command.
        unsafe { hypercall(call::HVM_OP, op::HVM_GET_PARAM, arg(&mut param), 0)? };
        Ok(param.value)
    }

    fn set_hvm_param(&self, domain: DomId, index: u32, value: u64) -> Result<(), Errno> {
        let mut param = abi::HvmParam { domid: domain, pad: 0, index, value };
        // SAFETY: the structure is that of the command.
        unsafe { hypercall(call::HVM_OP, op::HVM_SET_PARAM, arg(&mut param), 0)? };
        Ok(())
    }

    fn populate(&self, domain: DomId, frame: Gfn) -> Result<(), Errno> {
        // A domain is created with all the memory it may have.
        let got =
            self.domctl(op::DOMCTL_GETDOMAININFO, domain, abi::DomctlPayload { pad: [0; 32] })?;
        // SAFETY: any bytes are a valid `GetDomainInfo`: it is integers only.
        let info = unsafe { got.u.info };
        if info.domain != domain {
            return Err(Errno::SRCH);
        }
        let pages = info.tot_pages.saturating_add(1);
        if pages > info.max_pages {
            let mut limit = abi::DomctlPayload { pad: [0; 32] };
            limit.max_mem = pages.saturating_mul(PAGE_SIZE as u64 / 1024);
            self.domctl(op::DOMCTL_MAX_MEM, domain, limit)?;
        }
        let mut frame = frame;
        let mut ask = abi::MemoryReservation {
            extent_start: &raw mut frame,
            nr_extents: 1,
            extent_order: 0,
            mem_flags: 0,
            domid: domain,
        };
        // SAFETY: one extent, at `frame`, which outlives the call; the memory is the other domain's.
        match unsafe { hypercall(call::MEMORY_OP, op::MEM_POPULATE_PHYSMAP, arg(&mut ask), 0)? } {
            1 => Ok(()),
            _ => Err(Errno::NOMEM),
        }
    }

    unsafe fn map_foreign(&self, domain: DomId, frame: Gfn, window: &Window) -> Result<(), Errno> {
        let (idx, gpfn) = (frame.0, window.gfn());
        let mut error: i32 = 0;
        let mut ask = abi::AddToPhysmapBatch {
            domid: DomId::SELF,
            space: abi::XENMAPSPACE_GMFN_FOREIGN,
            size: 1,
            foreign_domid: domain,
            idxs: &raw const idx,
            gpfns: &raw const gpfn,
            errs: &raw mut error,
        };
        // SAFETY: arrays of one element each, which outlive the call; the window is the caller's promise.
        unsafe { hypercall(call::MEMORY_OP, op::MEM_ADD_TO_PHYSMAP_BATCH, arg(&mut ask), 0)? };
        Errno::check(error.into()).map(|_| ())
    }

    unsafe fn unmap_foreign(&self, window: &Window) -> Result<(), Errno> {
        let mut ask = abi::RemoveFromPhysmap { domid: DomId::SELF, gpfn: window.gfn() };
        // SAFETY: Xen only reads the structure; that nothing uses the page is the caller's promise.
        unsafe { hypercall(call::MEMORY_OP, op::MEM_REMOVE_FROM_PHYSMAP, arg(&mut ask), 0)? };
        Ok(())
    }
}

impl fmt::Debug for abi::Domctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domctl")
            .field("cmd", &self.cmd)
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}

//! The seam: everything above it is the same code on every architecture and on a simulated Xen.

use core::fmt;
use core::num::NonZeroUsize;
use core::ptr::NonNull;

use crate::abi::{CacheFlush, GrantCopy, GrantMap, GrantUnmap};
use crate::{DomId, Errno, Gfn, Port, VcpuId, Virq};

/// Guest-physical space of one page in which nothing of ours lives: somewhere to map another's page.
///
/// Not `Clone`: whoever holds it decides what is mapped there.
#[derive(Debug, PartialEq, Eq)]
pub struct Window {
    gfn: Gfn,
}

impl Window {
    /// For implementers of [`Hypervisor`]: each frame may be handed out once at a time.
    #[must_use]
    pub const fn new(gfn: Gfn) -> Self {
        Self { gfn }
    }

    /// The frame.
    #[must_use]
    pub const fn gfn(&self) -> Gfn {
        self.gfn
    }
}

/// How large this domain's grant table is, in frames of 512 version 1 entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantTableSize {
    /// Frames it has.
    pub frames: u32,
    /// Frames it may grow to.
    pub max_frames: u32,
}

/// Xen, as one domain sees it.
///
/// A handle is cheap to clone: zero-sized on bare metal, an `Arc` in a simulator. There is no global state, so two
/// domains can live in one process. Operations come in batches of ABI structures, each of which carries a status of
/// its own; the return value of a call says only whether Xen looked at the batch at all.
///
/// # Safety
/// Implementers promise that pages from [`alloc_pages`](Self::alloc_pages) are the caller's alone, zeroed and aligned
/// to a page; that [`virt_to_gfn`](Self::virt_to_gfn) names the frame behind such a page and no other; that
/// [`window`](Self::window) never hands out a frame that is in use; that the pointers from
/// [`mapped`](Self::mapped), [`grant_table_frame`](Self::grant_table_frame) and [`shared_info`](Self::shared_info) are
/// valid for a page of atomic access for as long as their docs say.
pub unsafe trait Hypervisor: Clone + Send + Sync + 'static {
    /// 32 XENFEAT bits that Xen offers this domain (`XENVER_get_features`, version.h). Submap 0 holds all that exist.
    ///
    /// # Errors
    /// As Xen answers.
    fn features(&self, submap: u32) -> Result<u32, Errno>;

    /// Raises the other end of `port` (`EVTCHNOP_send`).
    ///
    /// # Errors
    /// As Xen answers; a peer that has closed its end is not an error.
    fn notify(&self, port: Port) -> Result<(), Errno>;

    /// A new port of ours that `remote` may bind to (`EVTCHNOP_alloc_unbound`).
    ///
    /// # Errors
    /// As Xen answers; [`Errno::NOSPC`] when there are no ports left.
    fn alloc_unbound(&self, remote: DomId) -> Result<Port, Errno>;

    /// A new port of ours, joined to the one that `remote` offered us (`EVTCHNOP_bind_interdomain`).
    ///
    /// # Errors
    /// As Xen answers: [`Errno::INVAL`] when it is not offered to us.
    fn bind_interdomain(&self, remote: DomId, remote_port: Port) -> Result<Port, Errno>;

    /// A new port on which a virtual interrupt arrives (`EVTCHNOP_bind_virq`).
    ///
    /// # Errors
    /// As Xen answers.
    fn bind_virq(&self, virq: Virq, vcpu: VcpuId) -> Result<Port, Errno>;

    /// Clears the mask of a port and has Xen deliver it again if it is pending (`EVTCHNOP_unmask`).
    ///
    /// # Errors
    /// As Xen answers.
    fn unmask(&self, port: Port) -> Result<(), Errno>;

    /// Lets go of a port (`EVTCHNOP_close`).
    ///
    /// # Errors
    /// As Xen answers.
    fn close(&self, port: Port) -> Result<(), Errno>;

    /// Has Xen deliver the events of a virtual CPU through queues that begin in the control block at the start of frame
    /// `control` (`EVTCHNOP_init_control`), and all events of the domain through an event array, which is empty at first.
    ///
    /// # Errors
    /// As Xen answers: [`Errno::NOSYS`] or [`Errno::PERM`] where there is none of that, [`Errno::INVAL`] when the CPU has a
    /// control block already.
    ///
    /// # Safety
    /// The page behind `control` is one of the caller's own, and stays so: from now on Xen writes there, as long as this
    /// domain lives on this machine. Nothing may reach it but by atomics.
    unsafe fn init_control(&self, vcpu: VcpuId, control: Gfn) -> Result<(), Errno>;

    /// Adds a page to the event array (`EVTCHNOP_expand_array`): the words of the next 1,024 ports.
    ///
    /// # Errors
    /// As Xen answers: [`Errno::NOSPC`] when the array has all the pages there can be.
    ///
    /// # Safety
    /// As for [`init_control`](Self::init_control).
    unsafe fn expand_array(&self, page: Gfn) -> Result<(), Errno>;

    /// The page that holds this domain's event bits, laid out as [`arch::shared_info`](crate::arch::shared_info) says.
    /// Valid as long as any handle lives.
    fn shared_info(&self) -> NonNull<u8>;

    /// `GNTTABOP_copy`. On `Ok` each operation has its status; on `Err` none may have been done.
    ///
    /// # Errors
    /// As Xen answers.
    ///
    /// # Safety
    /// Every local end of an operation must lie in pages of the caller's, which nobody else reads (for a destination)
    /// or writes during the call.
    unsafe fn grant_copy(&self, ops: &mut [GrantCopy]) -> Result<(), Errno>;

    /// `GNTTABOP_map_grant_ref`, statuses as in [`grant_copy`](Self::grant_copy).
    ///
    /// # Errors
    /// As Xen answers.
    ///
    /// # Safety
    /// Every `host_addr` must be that of a [`Window`] which the caller holds and at which nothing is mapped.
    unsafe fn grant_map(&self, ops: &mut [GrantMap]) -> Result<(), Errno>;

    /// `GNTTABOP_unmap_grant_ref`, statuses as in [`grant_copy`](Self::grant_copy).
    ///
    /// # Errors
    /// As Xen answers.
    ///
    /// # Safety
    /// Nothing may use the mapping any more.
    unsafe fn grant_unmap(&self, ops: &mut [GrantUnmap]) -> Result<(), Errno>;

    /// `GNTTABOP_cache_flush`. An operation of length 0 and no bits is a probe.
    ///
    /// # Errors
    /// As Xen answers; [`Errno::NOSYS`] where it does not exist.
    fn cache_flush(&self, ops: &mut [CacheFlush]) -> Result<(), Errno>;

    /// The size of this domain's grant table (`GNTTABOP_query_size`).
    ///
    /// # Errors
    /// As Xen answers.
    fn grant_table_size(&self) -> Result<GrantTableSize, Errno>;

    /// Makes a frame of this domain's grant table visible, growing the table if need be, and says where it is. Asking
    /// again gives the same answer. Valid as long as any handle lives.
    ///
    /// # Errors
    /// As Xen answers; [`Errno::NOSPC`] where there is no room to show it.
    fn grant_table_frame(&self, index: u32) -> Result<NonNull<u8>, Errno>;

    /// Pages of this domain, zeroed, adjacent in virtual memory and in frame numbers. `None` when memory is short.
    fn alloc_pages(&self, count: NonZeroUsize) -> Option<NonNull<u8>>;

    /// Gives pages back.
    ///
    /// # Safety
    /// They came from [`alloc_pages`](Self::alloc_pages) of this domain with this count, and nothing uses them:
    /// neither we nor, by grant, anyone else.
    unsafe fn free_pages(&self, pages: NonNull<u8>, count: NonZeroUsize);

    /// The frame behind a page from [`alloc_pages`](Self::alloc_pages).
    fn virt_to_gfn(&self, page: NonNull<u8>) -> Gfn;

    /// Space to map another's page at, if there is any left.
    fn window(&self) -> Option<Window>;

    /// Gives space back. Only when nothing is mapped there.
    fn release_window(&self, window: Window);

    /// Where we see what is mapped at `window`; valid while it is mapped.
    fn mapped(&self, window: &Window) -> NonNull<u8>;
}

/// What a domain knows of another that it looks after (`struct xen_domctl_getdomaininfo`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// Whom this is about.
    pub domain: DomId,
    /// It is being destroyed.
    pub dying: bool,
    /// It has shut down, and why.
    pub shutdown: Option<ShutdownReason>,
    /// Nanoseconds of CPU that it has used.
    pub cpu_time: u64,
    /// Pages it has.
    pub pages: u64,
    /// Virtual CPUs it may have.
    pub vcpus: u32,
}

/// Why a domain shut down (`SHUTDOWN_*`, sched.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownReason {
    /// It is done.
    PowerOff,
    /// It wants to start again.
    Reboot,
    /// It waits to be saved.
    Suspend,
    /// It broke.
    Crash,
    /// Its watchdog barked.
    Watchdog,
    /// It wants to be set up anew in place.
    SoftReset,
    /// A reason this crate does not know.
    Other(u8),
}

impl From<u8> for ShutdownReason {
    fn from(code: u8) -> Self {
        match code {
            0 => Self::PowerOff,
            1 => Self::Reboot,
            2 => Self::Suspend,
            3 => Self::Crash,
            4 => Self::Watchdog,
            5 => Self::SoftReset,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for ShutdownReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("power off"),
            Self::Reboot => f.write_str("reboot"),
            Self::Suspend => f.write_str("suspend"),
            Self::Crash => f.write_str("crash"),
            Self::Watchdog => f.write_str("watchdog"),
            Self::SoftReset => f.write_str("soft reset"),
            Self::Other(code) => write!(f, "reason {code}"),
        }
    }
}

/// How a domain ends itself (`SCHEDOP_shutdown`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Done.
    PowerOff,
    /// To be started again.
    Reboot,
    /// Broken.
    Crash,
}

/// How a suspend ended (`SHUTDOWN_suspend`, sched.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspended {
    /// In another domain: Xen knows nothing of what this one had set up.
    Resumed,
    /// In the same domain, with all that it had: whoever asked for the suspend took that back, or wanted a copy only.
    Cancelled,
}

/// What Xen allows the domain that starts and looks after the others (dom0) beyond [`Hypervisor`].
///
/// # Safety
/// As for [`Hypervisor`].
pub unsafe trait Toolstack: Hypervisor {
    /// What Xen knows of a domain, ourselves included (`XEN_DOMCTL_getdomaininfo`).
    ///
    /// # Errors
    /// [`Errno::SRCH`] when there is no such domain.
    fn domain_info(&self, domain: DomId) -> Result<DomainInfo, Errno>;

    /// Ends a domain (`XEN_DOMCTL_destroydomain`).
    ///
    /// # Errors
    /// As Xen answers.
    fn destroy_domain(&self, domain: DomId) -> Result<(), Errno>;

    /// A parameter of a domain (`HVMOP_get_param`; hvm/params.h). A guest may ask for its own.
    ///
    /// # Errors
    /// As Xen answers.
    fn hvm_param(&self, domain: DomId, index: u32) -> Result<u64, Errno>;

    /// Sets a parameter of a domain (`HVMOP_set_param`).
    ///
    /// # Errors
    /// As Xen answers.
    fn set_hvm_param(&self, domain: DomId, index: u32, value: u64) -> Result<(), Errno>;

    /// Gives a domain a page at `frame` (`XENMEM_populate_physmap`), beyond its limit if need be. What is in the page
    /// is whatever was there: whoever shares it has to clear it.
    ///
    /// # Errors
    /// [`Errno::NOMEM`] when Xen has no memory left, or as Xen answers.
    fn populate(&self, domain: DomId, frame: Gfn) -> Result<(), Errno>;

    /// Shows a domain's frame at `window` (`XENMAPSPACE_gmfn_foreign`).
    ///
    /// # Errors
    /// As Xen answers.
    ///
    /// # Safety
    /// Nothing may be mapped at the window.
    unsafe fn map_foreign(&self, domain: DomId, frame: Gfn, window: &Window) -> Result<(), Errno>;

    /// Takes away what [`map_foreign`](Self::map_foreign) shows (`XENMEM_remove_from_physmap`).
    ///
    /// # Errors
    /// As Xen answers.
    ///
    /// # Safety
    /// Nothing may use the page any more.
    unsafe fn unmap_foreign(&self, window: &Window) -> Result<(), Errno>;
}

//! Structures and numbers of Xen's public headers, as laid out on 64-bit domains.
//!
//! Field names follow the headers; `tests/conformance` compiles C against them to check sizes and offsets.

use crate::types::{DomId, GrantRef, MapHandle, Port, VcpuId, Virq};
use crate::{Gfn, GrantStatus};

/// Hypercall numbers (`__HYPERVISOR_*`, xen.h).
pub mod call {
    /// `__HYPERVISOR_memory_op`
    pub const MEMORY_OP: u64 = 12;
    /// `__HYPERVISOR_xen_version`
    pub const XEN_VERSION: u64 = 17;
    /// `__HYPERVISOR_console_io`
    pub const CONSOLE_IO: u64 = 18;
    /// `__HYPERVISOR_grant_table_op`
    pub const GRANT_TABLE_OP: u64 = 20;
    /// `__HYPERVISOR_vcpu_op`
    pub const VCPU_OP: u64 = 24;
    /// `__HYPERVISOR_sched_op`
    pub const SCHED_OP: u64 = 29;
    /// `__HYPERVISOR_event_channel_op`
    pub const EVENT_CHANNEL_OP: u64 = 32;
    /// `__HYPERVISOR_hvm_op`
    pub const HVM_OP: u64 = 34;
    /// `__HYPERVISOR_domctl`
    pub const DOMCTL: u64 = 36;
}

/// Sub-operations, each named after its header's constant.
pub mod op {
    /// `XENVER_get_features` (version.h)
    pub const XENVER_GET_FEATURES: u64 = 6;
    /// `CONSOLEIO_write` (xen.h)
    pub const CONSOLEIO_WRITE: u64 = 0;
    /// `CONSOLEIO_read`
    pub const CONSOLEIO_READ: u64 = 1;
    /// `EVTCHNOP_bind_interdomain` (event_channel.h)
    pub const EVTCHN_BIND_INTERDOMAIN: u64 = 0;
    /// `EVTCHNOP_bind_virq`
    pub const EVTCHN_BIND_VIRQ: u64 = 1;
    /// `EVTCHNOP_close`
    pub const EVTCHN_CLOSE: u64 = 3;
    /// `EVTCHNOP_send`
    pub const EVTCHN_SEND: u64 = 4;
    /// `EVTCHNOP_alloc_unbound`
    pub const EVTCHN_ALLOC_UNBOUND: u64 = 6;
    /// `EVTCHNOP_unmask`
    pub const EVTCHN_UNMASK: u64 = 9;
    /// `EVTCHNOP_init_control`
    pub const EVTCHN_INIT_CONTROL: u64 = 11;
    /// `EVTCHNOP_expand_array`
    pub const EVTCHN_EXPAND_ARRAY: u64 = 12;
    /// `GNTTABOP_map_grant_ref` (grant_table.h)
    pub const GNTTAB_MAP: u64 = 0;
    /// `GNTTABOP_unmap_grant_ref`
    pub const GNTTAB_UNMAP: u64 = 1;
    /// `GNTTABOP_copy`
    pub const GNTTAB_COPY: u64 = 5;
    /// `GNTTABOP_query_size`
    pub const GNTTAB_QUERY_SIZE: u64 = 6;
    /// `GNTTABOP_cache_flush`
    pub const GNTTAB_CACHE_FLUSH: u64 = 12;
    /// `XENMEM_populate_physmap` (memory.h)
    pub const MEM_POPULATE_PHYSMAP: u64 = 6;
    /// `XENMEM_add_to_physmap`
    pub const MEM_ADD_TO_PHYSMAP: u64 = 7;
    /// `XENMEM_remove_from_physmap`
    pub const MEM_REMOVE_FROM_PHYSMAP: u64 = 15;
    /// `XENMEM_add_to_physmap_batch`
    pub const MEM_ADD_TO_PHYSMAP_BATCH: u64 = 23;
    /// `SCHEDOP_yield` (sched.h)
    pub const SCHED_YIELD: u64 = 0;
    /// `SCHEDOP_shutdown`
    pub const SCHED_SHUTDOWN: u64 = 2;
    /// `VCPUOP_stop_periodic_timer` (vcpu.h)
    pub const VCPU_STOP_PERIODIC_TIMER: u64 = 7;
    /// `VCPUOP_set_singleshot_timer`
    pub const VCPU_SET_SINGLESHOT_TIMER: u64 = 8;
    /// `HVMOP_set_param` (hvm/hvm_op.h)
    pub const HVM_SET_PARAM: u64 = 0;
    /// `HVMOP_get_param`
    pub const HVM_GET_PARAM: u64 = 1;
    /// `XEN_DOMCTL_destroydomain` (domctl.h)
    pub const DOMCTL_DESTROY: u32 = 2;
    /// `XEN_DOMCTL_getdomaininfo`
    pub const DOMCTL_GETDOMAININFO: u32 = 5;
    /// `XEN_DOMCTL_max_mem`
    pub const DOMCTL_MAX_MEM: u32 = 11;
}

/// HVM parameters (hvm/params.h).
pub mod hvm_param {
    /// `HVM_PARAM_CALLBACK_IRQ`: how the domain is told of events.
    pub const CALLBACK_IRQ: u32 = 0;
    /// `HVM_PARAM_STORE_PFN`: where the guest finds its store ring.
    pub const STORE_PFN: u32 = 1;
    /// `HVM_PARAM_STORE_EVTCHN`: the guest's port to the store.
    pub const STORE_EVTCHN: u32 = 2;
    /// `HVM_PARAM_CONSOLE_PFN`: where the guest finds its console ring.
    pub const CONSOLE_PFN: u32 = 17;
    /// `HVM_PARAM_CONSOLE_EVTCHN`: the guest's port to its console.
    pub const CONSOLE_EVTCHN: u32 = 18;
}

/// `HVM_PARAM_CALLBACK_TYPE_VECTOR`, in the top byte of [`hvm_param::CALLBACK_IRQ`] on x86: the lowest byte is the vector.
pub const CALLBACK_TYPE_VECTOR: u64 = 2;

/// Byte offsets in the console's page (`struct xencons_interface`, io/console.h).
pub mod console {
    /// Of the ring of what the domain prints.
    pub const OUT: usize = 1024;
    /// Bytes in that ring.
    pub const OUT_SIZE: usize = 2048;
    /// Of `out_cons`: what the other end has read, in bytes since the beginning.
    pub const OUT_CONS: usize = 3080;
    /// Of `out_prod`: what the domain has printed.
    pub const OUT_PROD: usize = 3084;
}

/// `XENMAPSPACE_shared_info` (memory.h)
pub const XENMAPSPACE_SHARED_INFO: u32 = 0;
/// `XENMAPSPACE_grant_table`
pub const XENMAPSPACE_GRANT_TABLE: u32 = 1;
/// `XENMAPSPACE_gmfn_foreign`
pub const XENMAPSPACE_GMFN_FOREIGN: u16 = 4;

/// The version of domctl.h this crate speaks (`XEN_DOMCTL_INTERFACE_VERSION`): Xen 4.16 to 4.18.
pub const DOMCTL_INTERFACE_VERSION: u32 = 0x15;

/// An entry of a version 1 grant table (`struct grant_entry_v1`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct GrantEntryV1 {
    /// `GTF_*`
    pub flags: u16,
    /// Who may use the page.
    pub domid: DomId,
    /// The page, as a frame number of the granting domain.
    pub frame: u32,
}

/// `GTF_permit_access`: the grant is open.
pub const GTF_PERMIT_ACCESS: u16 = 1;
/// `GTF_readonly`
pub const GTF_READONLY: u16 = 1 << 2;
/// `GTF_reading`, set by Xen while the page is in use.
pub const GTF_READING: u16 = 1 << 3;
/// `GTF_writing`, set by Xen while the page is in use for writing.
pub const GTF_WRITING: u16 = 1 << 4;
/// `GNTTAB_NR_RESERVED_ENTRIES`: references that belong to toolstacks.
pub const GRANT_RESERVED_ENTRIES: u32 = 8;

/// `GNTCOPY_source_gref`
pub const GNTCOPY_SOURCE_GREF: u16 = 1;
/// `GNTCOPY_dest_gref`
pub const GNTCOPY_DEST_GREF: u16 = 2;
/// `GNTMAP_host_map`
pub const GNTMAP_HOST_MAP: u32 = 1 << 1;
/// `GNTMAP_readonly`
pub const GNTMAP_READONLY: u32 = 1 << 2;
/// `GNTTAB_CACHE_CLEAN`
pub const GNTTAB_CACHE_CLEAN: u32 = 1;
/// `GNTTAB_CACHE_INVAL`
pub const GNTTAB_CACHE_INVAL: u32 = 2;

/// One end of a grant copy (`struct gnttab_copy_ptr`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyEnd {
    /// A grant reference, or a frame of ours: the flags of the operation say which.
    pub u: u64,
    /// Whose page.
    pub domid: DomId,
    /// Byte offset within the page.
    pub offset: u16,
    #[doc(hidden)]
    pub pad: u32,
}

impl CopyEnd {
    /// A page that `domain` granted us.
    #[must_use]
    pub const fn granted(domain: DomId, gref: GrantRef, offset: u16) -> Self {
        Self { u: gref.0 as u64, domid: domain, offset, pad: 0 }
    }

    /// A page of our own.
    #[must_use]
    pub const fn own(frame: Gfn, offset: u16) -> Self {
        Self { u: frame.0, domid: DomId::SELF, offset, pad: 0 }
    }
}

/// `struct gnttab_copy`
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantCopy {
    /// Where the bytes are.
    pub source: CopyEnd,
    /// Where they go.
    pub dest: CopyEnd,
    /// How many; neither end may cross its page.
    pub len: u16,
    /// `GNTCOPY_*`
    pub flags: u16,
    /// Out. Put [`GrantStatus::UNTOUCHED`] here before the call.
    pub status: GrantStatus,
}

/// `struct gnttab_map_grant_ref`
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantMap {
    /// The guest-physical address to map at, for a domain with translated memory.
    pub host_addr: u64,
    /// `GNTMAP_*`
    pub flags: u32,
    /// What to map,
    pub gref: GrantRef,
    /// and whose it is.
    pub dom: DomId,
    /// Out. Put [`GrantStatus::UNTOUCHED`] here before the call.
    pub status: GrantStatus,
    /// Out: names the mapping.
    pub handle: MapHandle,
    /// Out: the machine address of the page.
    pub dev_bus_addr: u64,
}

/// `struct gnttab_unmap_grant_ref`
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantUnmap {
    /// Where it was mapped.
    pub host_addr: u64,
    /// 0, unless it was mapped for a device.
    pub dev_bus_addr: u64,
    /// Which mapping.
    pub handle: MapHandle,
    /// Out. Put [`GrantStatus::UNTOUCHED`] here before the call.
    pub status: GrantStatus,
}

/// `struct gnttab_query_size`
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantQuerySize {
    /// Whose table.
    pub dom: DomId,
    /// Out: frames it has,
    pub nr_frames: u32,
    /// and may have.
    pub max_nr_frames: u32,
    /// Out.
    pub status: GrantStatus,
}

/// `struct gnttab_cache_flush`
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheFlush {
    /// The page, by bus address.
    pub dev_bus_addr: u64,
    /// First byte within it,
    pub offset: u16,
    /// and how many.
    pub length: u16,
    /// `GNTTAB_CACHE_*`
    pub op: u32,
}

/// `struct evtchn_alloc_unbound`
#[repr(C)]
#[derive(Debug)]
pub struct EvtchnAllocUnbound {
    /// Whose port it will be.
    pub dom: DomId,
    /// Who may bind to it.
    pub remote_dom: DomId,
    /// Out.
    pub port: Port,
}

/// `struct evtchn_bind_interdomain`
#[repr(C)]
#[derive(Debug)]
pub struct EvtchnBindInterdomain {
    /// Whose port,
    pub remote_dom: DomId,
    /// and which, to bind to.
    pub remote_port: Port,
    /// Out: ours.
    pub local_port: Port,
}

/// `struct evtchn_bind_virq`
#[repr(C)]
#[derive(Debug)]
pub struct EvtchnBindVirq {
    /// Which line.
    pub virq: Virq,
    /// On which processor.
    pub vcpu: VcpuId,
    /// Out.
    pub port: Port,
}

/// `struct evtchn_init_control`
#[repr(C)]
#[derive(Debug)]
pub struct EvtchnInitControl {
    /// The frame of the control block,
    pub control_gfn: Gfn,
    /// and where in there it begins, in bytes.
    pub offset: u32,
    /// Whose it is.
    pub vcpu: VcpuId,
    /// Out: bits in a link.
    pub link_bits: u8,
    /// Not used.
    pub pad: [u8; 7],
}

/// Where Xen says which queues have events (`struct evtchn_fifo_control_block`).
#[repr(C)]
#[derive(Debug)]
pub struct FifoControlBlock {
    /// A bit for each queue that was empty and is no longer.
    pub ready: u32,
    /// Not used.
    pub rsvd: u32,
    /// The first port in each.
    pub head: [u32; FIFO_QUEUES],
}

/// `EVTCHN_FIFO_MAX_QUEUES`: one for each priority; 0 comes first.
pub const FIFO_QUEUES: usize = 16;
/// `EVTCHN_FIFO_PRIORITY_DEFAULT`
pub const FIFO_PRIORITY_DEFAULT: u32 = 7;
/// `EVTCHN_FIFO_NR_CHANNELS`
pub const FIFO_PORTS: u32 = 1 << 17;
/// `EVTCHN_FIFO_PENDING`, of the word of an event.
pub const FIFO_PENDING: u32 = 1 << 31;
/// `EVTCHN_FIFO_MASKED`
pub const FIFO_MASKED: u32 = 1 << 30;
/// `EVTCHN_FIFO_LINKED`: in a queue.
pub const FIFO_LINKED: u32 = 1 << 29;
/// `EVTCHN_FIFO_BUSY`: Xen links it, and nobody else may unmask it.
pub const FIFO_BUSY: u32 = 1 << 28;
/// `EVTCHN_FIFO_LINK_MASK`: the next port in the queue.
pub const FIFO_LINK_MASK: u32 = FIFO_PORTS - 1;

/// `struct xen_add_to_physmap`
#[repr(C)]
#[derive(Debug)]
pub struct AddToPhysmap {
    /// Whose memory map changes.
    pub domid: DomId,
    /// Unused here.
    pub size: u16,
    /// `XENMAPSPACE_*`
    pub space: u32,
    /// Index into that space.
    pub idx: u64,
    /// Where it shall appear.
    pub gpfn: Gfn,
}

/// `struct xen_add_to_physmap_batch`
#[repr(C)]
#[derive(Debug)]
pub struct AddToPhysmapBatch {
    /// Whose memory map changes.
    pub domid: DomId,
    /// `XENMAPSPACE_*`
    pub space: u16,
    /// Elements in each array.
    pub size: u16,
    /// For `XENMAPSPACE_gmfn_foreign`: whose frames `idxs` are.
    pub foreign_domid: DomId,
    /// Array of indices into the space.
    pub idxs: *const u64,
    /// Array of frames where they shall appear.
    pub gpfns: *const Gfn,
    /// Out: array of negative errnos.
    pub errs: *mut i32,
}

/// `struct xen_remove_from_physmap`
#[repr(C)]
#[derive(Debug)]
pub struct RemoveFromPhysmap {
    /// Whose memory map changes.
    pub domid: DomId,
    /// What goes.
    pub gpfn: Gfn,
}

/// `struct xen_memory_reservation`
#[repr(C)]
#[derive(Debug)]
pub struct MemoryReservation {
    /// Array of frames.
    pub extent_start: *mut Gfn,
    /// Its length.
    pub nr_extents: u64,
    /// log2 of the pages in each.
    pub extent_order: u32,
    /// `XENMEMF_*`
    pub mem_flags: u32,
    /// Whose memory.
    pub domid: DomId,
}

/// `struct xen_hvm_param`
#[repr(C)]
#[derive(Debug)]
pub struct HvmParam {
    /// Whose.
    pub domid: DomId,
    #[doc(hidden)]
    pub pad: u16,
    /// Which.
    pub index: u32,
    /// In or out.
    pub value: u64,
}

/// `struct vcpu_set_singleshot_timer`
#[repr(C)]
#[derive(Debug)]
pub struct SetSingleshotTimer {
    /// When, in nanoseconds of system time.
    pub timeout_abs_ns: u64,
    /// `VCPU_SSHOTTMR_*`
    pub flags: u32,
}

/// `struct vcpu_time_info` (xen.h): what makes system time out of x86's time stamp counter.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuTimeInfo {
    /// Odd while the rest is being changed.
    pub version: u32,
    #[doc(hidden)]
    pub pad0: u32,
    /// The counter at `system_time`,
    pub tsc_timestamp: u64,
    /// in nanoseconds.
    pub system_time: u64,
    /// Nanoseconds in a tick, shifted by `tsc_shift`, in units of 2^-32.
    pub tsc_to_system_mul: u32,
    /// Shifts a difference of ticks to the left; negative: to the right.
    pub tsc_shift: i8,
    /// `XEN_PVCLOCK_*`
    pub flags: u8,
    #[doc(hidden)]
    pub pad1: [u8; 2],
}

/// What a PVH guest is started with (`struct hvm_start_info`, arch-x86/hvm/start_info.h). Addresses are guest-physical.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HvmStartInfo {
    /// [`HVM_START_MAGIC`]
    pub magic: u32,
    /// 1 or more where there is a memory map.
    pub version: u32,
    /// `SIF_*`
    pub flags: u32,
    /// Modules passed along.
    pub nr_modules: u32,
    /// Where they are listed.
    pub modlist_paddr: u64,
    /// Where the command line is, ending with a zero; or 0.
    pub cmdline_paddr: u64,
    /// Where the ACPI tables begin; or 0.
    pub rsdp_paddr: u64,
    /// Where the memory map is: [`HvmMemmapEntry`]s,
    pub memmap_paddr: u64,
    /// and how many.
    pub memmap_entries: u32,
    /// Not used.
    pub reserved: u32,
}

/// `struct hvm_memmap_table_entry`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HvmMemmapEntry {
    /// The first byte,
    pub addr: u64,
    /// and how many.
    pub size: u64,
    /// `XEN_HVM_MEMMAP_TYPE_*`
    pub kind: u32,
    /// Not used.
    pub reserved: u32,
}

/// `XEN_HVM_START_MAGIC_VALUE`
pub const HVM_START_MAGIC: u32 = 0x336e_c578;
/// `XEN_HVM_MEMMAP_TYPE_RAM`: memory of the domain's own.
pub const HVM_MEMMAP_RAM: u32 = 1;

/// `struct xen_domctl`, with the payloads this crate uses.
#[repr(C, align(8))]
pub struct Domctl {
    /// `XEN_DOMCTL_*`
    pub cmd: u32,
    /// [`DOMCTL_INTERFACE_VERSION`]
    pub interface_version: u32,
    /// On whom.
    pub domain: DomId,
    #[doc(hidden)]
    pub pad: [u16; 3],
    /// The operation's own structure.
    pub u: DomctlPayload,
}

/// The union in `struct xen_domctl`: 128 bytes at least, so that Xen never writes past it.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub union DomctlPayload {
    /// Of `XEN_DOMCTL_max_mem`: KiB that the domain may have.
    pub max_mem: u64,
    /// Out, of `XEN_DOMCTL_getdomaininfo`.
    pub info: GetDomainInfo,
    /// All of it.
    pub pad: [u64; 32],
}

/// The architecture-independent head of `struct xen_domctl_getdomaininfo`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GetDomainInfo {
    /// The domain this is about.
    pub domain: DomId,
    #[doc(hidden)]
    pub pad1: u16,
    /// `XEN_DOMINF_*`
    pub flags: u32,
    /// Pages it has,
    pub tot_pages: u64,
    /// and may have.
    pub max_pages: u64,
    /// Claimed, not yet allocated.
    pub outstanding_pages: u64,
    /// Shared.
    pub shr_pages: u64,
    /// Paged out.
    pub paged_pages: u64,
    /// Its shared info page.
    pub shared_info_frame: u64,
    /// Nanoseconds of CPU that its virtual CPUs used.
    pub cpu_time: u64,
    /// Virtual CPUs that are up.
    pub nr_online_vcpus: u32,
    /// The highest id of a virtual CPU.
    pub max_vcpu_id: u32,
}

/// `XEN_DOMINF_dying`
pub const DOMINF_DYING: u32 = 1;
/// `XEN_DOMINF_shutdown`
pub const DOMINF_SHUTDOWN: u32 = 1 << 2;
/// `XEN_DOMINF_shutdownshift`: the reason, in the bits from here on.
pub const DOMINF_SHUTDOWN_SHIFT: u32 = 16;

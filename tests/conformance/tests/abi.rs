//! Sizes, offsets, constants and encoded slots, ours and Xen's.
//!
//! One table holds each C expression with our value for it; C is made from the table, so neither side can have a row that
//! the other has not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::vec_init_then_push)]

mod common;

use core::mem::offset_of;
use std::fmt::Write as _;
use std::process::Command;

use features::XenFeatures;
use hypercall::abi::{self, call, hvm_param, op};
use hypercall::arch::shared_info;
use hypercall::{DomId, Errno, GrantRef, GrantStatus, MapHandle, ShutdownReason, Virq};
use netif::ctrl::{CtrlBackRing, CtrlRequest, CtrlResponse, CtrlStatus, CtrlType, StaticGrant};
use netif::mac::MacAddr;
use netif::ring::{RxBackRing, TxBackRing, layout};
use netif::slot::{
    Extra, ExtraInfo, GsoType, RxFlags, RxId, RxRequest, RxResponse, RxStatus, Slot, TxFlags, TxId,
    TxRequest, TxResponse, TxStatus,
};
use xenbus::device::State;
use xenbus::wire;

const INCLUDES: &str = "
#include <stdint.h>
#include <stddef.h>
#include <xen/xen.h>
#include <xen/grant_table.h>
#include <xen/event_channel.h>
#include <xen/version.h>
#include <xen/memory.h>
#include <xen/sched.h>
#include <xen/vcpu.h>
#include <xen/features.h>
#include <xen/domctl.h>
#include <xen/errno.h>
#include <xen/hvm/hvm_op.h>
#include <xen/hvm/params.h>
#include <xen/arch-x86/hvm/start_info.h>
#include <xen/io/console.h>
#include <xen/io/netif.h>
#include <xen/io/xenbus.h>
#include <xen/io/xs_wire.h>
";

/// A C expression, and what it is here.
type Row = (String, i128);

fn field_size<S, F>(_: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! structures {
    ($rows:ident: $($c:literal = $ours:ty { $($field:ident = $member:literal),* $(,)? })*) => {$(
        $rows.push((format!("sizeof({})", $c), size_of::<$ours>() as i128));
        structures!(@fields $rows: $c = $ours { $($field = $member),* });
    )*};
    (@fields $rows:ident: $c:literal = $ours:ty { $($field:ident = $member:literal),* }) => {$(
        $rows.push((format!("offsetof({}, {})", $c, $member), offset_of!($ours, $field) as i128));
        $rows.push((
            format!("sizeof((({} *)0)->{})", $c, $member),
            field_size(|it: &$ours| &it.$field) as i128,
        ));
    )*};
}

macro_rules! numbers {
    ($rows:ident: $($c:literal = $ours:expr),* $(,)?) => {
        $($rows.push(($c.to_string(), i128::try_from($ours).unwrap()));)*
    };
}

fn layouts() -> Vec<Row> {
    let mut rows = Vec::new();
    structures! { rows:
        "struct grant_entry_v1" = abi::GrantEntryV1 { flags = "flags", domid = "domid", frame = "frame" }
        "struct gnttab_copy" = abi::GrantCopy {
            source = "source", dest = "dest", len = "len", flags = "flags", status = "status",
        }
        "struct gnttab_map_grant_ref" = abi::GrantMap {
            host_addr = "host_addr", flags = "flags", gref = "ref", dom = "dom", status = "status",
            handle = "handle", dev_bus_addr = "dev_bus_addr",
        }
        "struct gnttab_unmap_grant_ref" = abi::GrantUnmap {
            host_addr = "host_addr", dev_bus_addr = "dev_bus_addr", handle = "handle", status = "status",
        }
        "struct gnttab_query_size" = abi::GrantQuerySize {
            dom = "dom", nr_frames = "nr_frames", max_nr_frames = "max_nr_frames", status = "status",
        }
        "struct gnttab_cache_flush" = abi::CacheFlush {
            dev_bus_addr = "a.dev_bus_addr", offset = "offset", length = "length", op = "op",
        }
        "struct evtchn_alloc_unbound" = abi::EvtchnAllocUnbound {
            dom = "dom", remote_dom = "remote_dom", port = "port",
        }
        "struct evtchn_bind_interdomain" = abi::EvtchnBindInterdomain {
            remote_dom = "remote_dom", remote_port = "remote_port", local_port = "local_port",
        }
        "struct evtchn_bind_virq" = abi::EvtchnBindVirq { virq = "virq", vcpu = "vcpu", port = "port" }
        "struct evtchn_init_control" = abi::EvtchnInitControl {
            control_gfn = "control_gfn", offset = "offset", vcpu = "vcpu", link_bits = "link_bits",
        }
        "struct evtchn_fifo_control_block" = abi::FifoControlBlock { ready = "ready", head = "head" }
        "struct xen_add_to_physmap" = abi::AddToPhysmap {
            domid = "domid", size = "size", space = "space", idx = "idx", gpfn = "gpfn",
        }
        "struct xen_add_to_physmap_batch" = abi::AddToPhysmapBatch {
            domid = "domid", space = "space", size = "size", foreign_domid = "u.foreign_domid",
            idxs = "idxs", gpfns = "gpfns", errs = "errs",
        }
        "struct xen_remove_from_physmap" = abi::RemoveFromPhysmap { domid = "domid", gpfn = "gpfn" }
        "struct xen_memory_reservation" = abi::MemoryReservation {
            extent_start = "extent_start", nr_extents = "nr_extents", extent_order = "extent_order",
            mem_flags = "mem_flags", domid = "domid",
        }
        "struct vcpu_set_singleshot_timer" = abi::SetSingleshotTimer {
            timeout_abs_ns = "timeout_abs_ns", flags = "flags",
        }
        "struct vcpu_time_info" = abi::VcpuTimeInfo {
            version = "version", tsc_timestamp = "tsc_timestamp", system_time = "system_time",
            tsc_to_system_mul = "tsc_to_system_mul", tsc_shift = "tsc_shift", flags = "flags",
        }
        "struct hvm_start_info" = abi::HvmStartInfo {
            magic = "magic", version = "version", flags = "flags", nr_modules = "nr_modules",
            modlist_paddr = "modlist_paddr", cmdline_paddr = "cmdline_paddr", rsdp_paddr = "rsdp_paddr",
            memmap_paddr = "memmap_paddr", memmap_entries = "memmap_entries", reserved = "reserved",
        }
        "struct hvm_memmap_table_entry" = abi::HvmMemmapEntry {
            addr = "addr", size = "size", kind = "type", reserved = "reserved",
        }
        "struct xen_hvm_param" = abi::HvmParam { domid = "domid", index = "index", value = "value" }
    }
    structures! { @fields rows: "struct gnttab_copy" = abi::GrantCopy { source = "source" } }
    let copy_end = offset_of!(abi::GrantCopy, source);
    numbers! { rows:
        "offsetof(struct gnttab_copy, source.u)" = copy_end + offset_of!(abi::CopyEnd, u),
        "offsetof(struct gnttab_copy, source.domid)" = copy_end + offset_of!(abi::CopyEnd, domid),
        "offsetof(struct gnttab_copy, source.offset)" = copy_end + offset_of!(abi::CopyEnd, offset),
    }
    // Ours are larger: the union at its end, and the head of one that goes on.
    structures! { @fields rows: "struct xen_domctl" = abi::Domctl {
        cmd = "cmd", interface_version = "interface_version", domain = "domain"
    } }
    structures! { @fields rows: "struct xen_domctl_getdomaininfo" = abi::GetDomainInfo {
        domain = "domain", flags = "flags", tot_pages = "tot_pages", max_pages = "max_pages",
        outstanding_pages = "outstanding_pages", shr_pages = "shr_pages", paged_pages = "paged_pages",
        shared_info_frame = "shared_info_frame", cpu_time = "cpu_time",
        nr_online_vcpus = "nr_online_vcpus", max_vcpu_id = "max_vcpu_id"
    } }
    numbers! { rows:
        "offsetof(struct xen_domctl, u)" = offset_of!(abi::Domctl, u),
        "sizeof(struct xen_domctl) <= 4096" = 1,
    }
    rows
}

/// The code of a shutdown reason, by asking for each.
fn shutdown(reason: ShutdownReason) -> u8 {
    (0..=u8::MAX).find(|&code| ShutdownReason::from(code) == reason).unwrap()
}

fn hypervisor() -> Vec<Row> {
    let mut rows = Vec::new();
    numbers! { rows:
        "__HYPERVISOR_memory_op" = call::MEMORY_OP,
        "__HYPERVISOR_xen_version" = call::XEN_VERSION,
        "__HYPERVISOR_console_io" = call::CONSOLE_IO,
        "__HYPERVISOR_grant_table_op" = call::GRANT_TABLE_OP,
        "__HYPERVISOR_vcpu_op" = call::VCPU_OP,
        "__HYPERVISOR_sched_op" = call::SCHED_OP,
        "__HYPERVISOR_event_channel_op" = call::EVENT_CHANNEL_OP,
        "__HYPERVISOR_hvm_op" = call::HVM_OP,
        "__HYPERVISOR_domctl" = call::DOMCTL,
        "XENVER_get_features" = op::XENVER_GET_FEATURES,
        "CONSOLEIO_write" = op::CONSOLEIO_WRITE,
        "CONSOLEIO_read" = op::CONSOLEIO_READ,
        "EVTCHNOP_bind_interdomain" = op::EVTCHN_BIND_INTERDOMAIN,
        "EVTCHNOP_bind_virq" = op::EVTCHN_BIND_VIRQ,
        "EVTCHNOP_close" = op::EVTCHN_CLOSE,
        "EVTCHNOP_send" = op::EVTCHN_SEND,
        "EVTCHNOP_alloc_unbound" = op::EVTCHN_ALLOC_UNBOUND,
        "EVTCHNOP_unmask" = op::EVTCHN_UNMASK,
        "EVTCHNOP_init_control" = op::EVTCHN_INIT_CONTROL,
        "EVTCHNOP_expand_array" = op::EVTCHN_EXPAND_ARRAY,
        "sizeof(struct evtchn_expand_array)" = size_of::<hypercall::Gfn>(),
        "EVTCHN_FIFO_MAX_QUEUES" = abi::FIFO_QUEUES,
        "EVTCHN_FIFO_PRIORITY_DEFAULT" = abi::FIFO_PRIORITY_DEFAULT,
        "EVTCHN_FIFO_NR_CHANNELS" = abi::FIFO_PORTS,
        "1u << EVTCHN_FIFO_PENDING" = abi::FIFO_PENDING,
        "1u << EVTCHN_FIFO_MASKED" = abi::FIFO_MASKED,
        "1u << EVTCHN_FIFO_LINKED" = abi::FIFO_LINKED,
        "1u << EVTCHN_FIFO_BUSY" = abi::FIFO_BUSY,
        "EVTCHN_FIFO_LINK_MASK" = abi::FIFO_LINK_MASK,
        "GNTTABOP_map_grant_ref" = op::GNTTAB_MAP,
        "GNTTABOP_unmap_grant_ref" = op::GNTTAB_UNMAP,
        "GNTTABOP_copy" = op::GNTTAB_COPY,
        "GNTTABOP_query_size" = op::GNTTAB_QUERY_SIZE,
        "GNTTABOP_cache_flush" = op::GNTTAB_CACHE_FLUSH,
        "XENMEM_populate_physmap" = op::MEM_POPULATE_PHYSMAP,
        "XENMEM_add_to_physmap" = op::MEM_ADD_TO_PHYSMAP,
        "XENMEM_remove_from_physmap" = op::MEM_REMOVE_FROM_PHYSMAP,
        "XENMEM_add_to_physmap_batch" = op::MEM_ADD_TO_PHYSMAP_BATCH,
        "SCHEDOP_yield" = op::SCHED_YIELD,
        "VCPUOP_stop_periodic_timer" = op::VCPU_STOP_PERIODIC_TIMER,
        "VCPUOP_set_singleshot_timer" = op::VCPU_SET_SINGLESHOT_TIMER,
        "SCHEDOP_shutdown" = op::SCHED_SHUTDOWN,
        "HVMOP_set_param" = op::HVM_SET_PARAM,
        "HVMOP_get_param" = op::HVM_GET_PARAM,
        "XEN_DOMCTL_destroydomain" = op::DOMCTL_DESTROY,
        "XEN_DOMCTL_getdomaininfo" = op::DOMCTL_GETDOMAININFO,
        "XEN_DOMCTL_INTERFACE_VERSION" = abi::DOMCTL_INTERFACE_VERSION,
        "HVM_PARAM_CALLBACK_IRQ" = hvm_param::CALLBACK_IRQ,
        "HVM_PARAM_CONSOLE_PFN" = hvm_param::CONSOLE_PFN,
        "HVM_PARAM_CONSOLE_EVTCHN" = hvm_param::CONSOLE_EVTCHN,
        "offsetof(struct xencons_interface, out)" = abi::console::OUT,
        "sizeof(((struct xencons_interface *)0)->out)" = abi::console::OUT_SIZE,
        "offsetof(struct xencons_interface, out_cons)" = abi::console::OUT_CONS,
        "offsetof(struct xencons_interface, out_prod)" = abi::console::OUT_PROD,
        "XEN_HVM_START_MAGIC_VALUE" = abi::HVM_START_MAGIC,
        "XEN_HVM_MEMMAP_TYPE_RAM" = abi::HVM_MEMMAP_RAM,
        "HVM_PARAM_STORE_PFN" = hvm_param::STORE_PFN,
        "HVM_PARAM_STORE_EVTCHN" = hvm_param::STORE_EVTCHN,
        "XENMAPSPACE_shared_info" = abi::XENMAPSPACE_SHARED_INFO,
        "XENMAPSPACE_grant_table" = abi::XENMAPSPACE_GRANT_TABLE,
        "XENMAPSPACE_gmfn_foreign" = abi::XENMAPSPACE_GMFN_FOREIGN,
        "GTF_permit_access" = abi::GTF_PERMIT_ACCESS,
        "GTF_readonly" = abi::GTF_READONLY,
        "GTF_reading" = abi::GTF_READING,
        "GTF_writing" = abi::GTF_WRITING,
        "GNTTAB_NR_RESERVED_ENTRIES" = abi::GRANT_RESERVED_ENTRIES,
        "GNTCOPY_source_gref" = abi::GNTCOPY_SOURCE_GREF,
        "GNTCOPY_dest_gref" = abi::GNTCOPY_DEST_GREF,
        "GNTMAP_host_map" = abi::GNTMAP_HOST_MAP,
        "GNTMAP_readonly" = abi::GNTMAP_READONLY,
        "GNTTAB_CACHE_CLEAN" = abi::GNTTAB_CACHE_CLEAN,
        "GNTTAB_CACHE_INVAL" = abi::GNTTAB_CACHE_INVAL,
        "XEN_DOMINF_dying" = abi::DOMINF_DYING,
        "XEN_DOMINF_shutdown" = abi::DOMINF_SHUTDOWN,
        "XEN_DOMINF_shutdownshift" = abi::DOMINF_SHUTDOWN_SHIFT,
        "SHUTDOWN_poweroff" = shutdown(ShutdownReason::PowerOff),
        "SHUTDOWN_reboot" = shutdown(ShutdownReason::Reboot),
        "SHUTDOWN_suspend" = shutdown(ShutdownReason::Suspend),
        "SHUTDOWN_crash" = shutdown(ShutdownReason::Crash),
        "SHUTDOWN_watchdog" = shutdown(ShutdownReason::Watchdog),
        "SHUTDOWN_soft_reset" = shutdown(ShutdownReason::SoftReset),
        "DOMID_SELF" = DomId::SELF.0,
        "DOMID_FIRST_RESERVED" = DomId::FIRST_RESERVED.0,
        "VIRQ_TIMER" = Virq::TIMER.0,
        "VIRQ_CONSOLE" = Virq::CONSOLE.0,
        "VIRQ_DOM_EXC" = Virq::DOM_EXC.0,
        "(grant_handle_t)~0U" = MapHandle::INVALID.0,
        "XEN_EPERM" = Errno::PERM.0,
        "XEN_ENOENT" = Errno::NOENT.0,
        "XEN_ESRCH" = Errno::SRCH.0,
        "XEN_ENOMEM" = Errno::NOMEM.0,
        "XEN_EACCES" = Errno::ACCES.0,
        "XEN_EFAULT" = Errno::FAULT.0,
        "XEN_EBUSY" = Errno::BUSY.0,
        "XEN_EINVAL" = Errno::INVAL.0,
        "XEN_ENOSPC" = Errno::NOSPC.0,
        "XEN_ENOSYS" = Errno::NOSYS.0,
        "XEN_EOPNOTSUPP" = Errno::OPNOTSUPP.0,
        "GNTST_okay" = GrantStatus::OKAY.0,
        "GNTST_general_error" = GrantStatus::GENERAL_ERROR.0,
        "GNTST_bad_domain" = GrantStatus::BAD_DOMAIN.0,
        "GNTST_bad_gntref" = GrantStatus::BAD_GNTREF.0,
        "GNTST_bad_handle" = GrantStatus::BAD_HANDLE.0,
        "GNTST_bad_virt_addr" = GrantStatus::BAD_VIRT_ADDR.0,
        "GNTST_bad_dev_addr" = GrantStatus::BAD_DEV_ADDR.0,
        "GNTST_no_device_space" = GrantStatus::NO_DEVICE_SPACE.0,
        "GNTST_permission_denied" = GrantStatus::PERMISSION_DENIED.0,
        "GNTST_bad_page" = GrantStatus::BAD_PAGE.0,
        "GNTST_bad_copy_arg" = GrantStatus::BAD_COPY_ARG.0,
        "GNTST_address_too_big" = GrantStatus::ADDRESS_TOO_BIG.0,
        "GNTST_eagain" = GrantStatus::EAGAIN.0,
        "GNTST_no_space" = GrantStatus::NO_SPACE.0,
    }
    rows
}

fn feature_bits() -> Vec<Row> {
    let mut rows = Vec::new();
    // The headers keep the number of bit 12 in a comment only, since the feature was taken out.
    let named = XenFeatures::all() - XenFeatures::GRANT_MAP_IDENTITY;
    for (name, bit) in named.iter_names() {
        // The header's names are in lower case but for one word.
        let name = name.to_lowercase().replace("arm_smccc", "ARM_SMCCC");
        rows.push((format!("1 << XENFEAT_{name}"), bit.bits().into()));
    }
    assert_eq!(rows.len(), 17);
    rows
}

fn network() -> Vec<Row> {
    let mut rows = Vec::new();
    for (c, ring) in [
        ("netif_tx", TxBackRing::<&grant::SharedPage>::ENTRIES),
        ("netif_rx", RxBackRing::<&grant::SharedPage>::ENTRIES),
        ("xen_netif_ctrl", CtrlBackRing::<&grant::SharedPage>::ENTRIES),
    ] {
        rows.push((format!("__CONST_RING_SIZE({c}, 4096)"), ring.into()));
        for (member, at) in [
            ("req_prod", layout::REQ_PROD),
            ("req_event", layout::REQ_EVENT),
            ("rsp_prod", layout::RSP_PROD),
            ("rsp_event", layout::RSP_EVENT),
            ("ring", layout::SLOTS),
        ] {
            rows.push((format!("offsetof(struct {c}_sring, {member})"), at as i128));
        }
    }
    numbers! { rows:
        "sizeof(struct netif_tx_request)" = TxRequest::SIZE,
        "sizeof(struct netif_tx_response)" = TxResponse::SIZE,
        "sizeof(struct netif_rx_request)" = RxRequest::SIZE,
        "sizeof(struct netif_rx_response)" = RxResponse::SIZE,
        "sizeof(struct netif_extra_info)" = RxResponse::SIZE,
        "sizeof(struct xen_netif_ctrl_request)" = CtrlRequest::SIZE,
        "sizeof(struct xen_netif_ctrl_response)" = CtrlResponse::SIZE,
        "sizeof(struct xen_netif_gref)" = StaticGrant::SIZE,
        "1 + XEN_NETIF_NR_SLOTS_MIN" = netif::tx::MAX_SLOTS,
        "NETTXF_csum_blank" = TxFlags::CSUM_BLANK.bits(),
        "NETTXF_data_validated" = TxFlags::DATA_VALIDATED.bits(),
        "NETTXF_more_data" = TxFlags::MORE_DATA.bits(),
        "NETTXF_extra_info" = TxFlags::EXTRA_INFO.bits(),
        "NETRXF_data_validated" = RxFlags::DATA_VALIDATED.bits(),
        "NETRXF_csum_blank" = RxFlags::CSUM_BLANK.bits(),
        "NETRXF_more_data" = RxFlags::MORE_DATA.bits(),
        "NETRXF_extra_info" = RxFlags::EXTRA_INFO.bits(),
        "NETRXF_gso_prefix" = RxFlags::GSO_PREFIX.bits(),
        "NETIF_RSP_DROPPED" = TxStatus::DROPPED.0,
        "NETIF_RSP_ERROR" = TxStatus::ERROR.0,
        "NETIF_RSP_OKAY" = TxStatus::OKAY.0,
        "NETIF_RSP_NULL" = TxStatus::NULL.0,
        "NETIF_RSP_DROPPED" = RxStatus::DROPPED.0,
        "NETIF_RSP_ERROR" = RxStatus::ERROR.0,
        "XEN_NETIF_EXTRA_TYPE_GSO" = Extra::GSO,
        "XEN_NETIF_EXTRA_TYPE_MCAST_ADD" = Extra::MCAST_ADD,
        "XEN_NETIF_EXTRA_TYPE_MCAST_DEL" = Extra::MCAST_DEL,
        "XEN_NETIF_EXTRA_TYPE_HASH" = Extra::HASH,
        "XEN_NETIF_EXTRA_FLAG_MORE" = Extra::FLAG_MORE,
        "XEN_NETIF_GSO_TYPE_NONE" = GsoType::NONE.0,
        "XEN_NETIF_GSO_TYPE_TCPV4" = GsoType::TCPV4.0,
        "XEN_NETIF_GSO_TYPE_TCPV6" = GsoType::TCPV6.0,
        "XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS" = CtrlType::GET_HASH_FLAGS.0,
        "XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS" = CtrlType::SET_HASH_FLAGS.0,
        "XEN_NETIF_CTRL_TYPE_SET_HASH_KEY" = CtrlType::SET_HASH_KEY.0,
        "XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE" = CtrlType::GET_HASH_MAPPING_SIZE.0,
        "XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE" = CtrlType::SET_HASH_MAPPING_SIZE.0,
        "XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING" = CtrlType::SET_HASH_MAPPING.0,
        "XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM" = CtrlType::SET_HASH_ALGORITHM.0,
        "XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE" = CtrlType::GET_GREF_MAPPING_SIZE.0,
        "XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING" = CtrlType::ADD_GREF_MAPPING.0,
        "XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING" = CtrlType::DEL_GREF_MAPPING.0,
        "XEN_NETIF_CTRL_STATUS_SUCCESS" = CtrlStatus::SUCCESS.0,
        "XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED" = CtrlStatus::NOT_SUPPORTED.0,
        "XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER" = CtrlStatus::INVALID_PARAMETER.0,
        "XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW" = CtrlStatus::BUFFER_OVERFLOW.0,
        "XEN_NETIF_CTRLF_GREF_readonly" = StaticGrant::READONLY,
    }
    rows
}

fn store() -> Vec<Row> {
    use wire::{Kind, interface as page};
    let mut rows = Vec::new();
    numbers! { rows:
        "sizeof(struct xsd_sockmsg)" = wire::HEADER_LEN,
        "XENSTORE_PAYLOAD_MAX" = wire::PAYLOAD_MAX,
        "XENSTORE_ABS_PATH_MAX" = wire::ABS_PATH_MAX,
        "XENSTORE_REL_PATH_MAX" = wire::REL_PATH_MAX,
        "XENSTORE_RING_SIZE" = page::RING_SIZE,
        "offsetof(struct xenstore_domain_interface, req)" = page::REQ,
        "offsetof(struct xenstore_domain_interface, rsp)" = page::RSP,
        "offsetof(struct xenstore_domain_interface, req_cons)" = page::REQ_CONS,
        "offsetof(struct xenstore_domain_interface, req_prod)" = page::REQ_PROD,
        "offsetof(struct xenstore_domain_interface, rsp_cons)" = page::RSP_CONS,
        "offsetof(struct xenstore_domain_interface, rsp_prod)" = page::RSP_PROD,
        "offsetof(struct xenstore_domain_interface, server_features)" = page::SERVER_FEATURES,
        "offsetof(struct xenstore_domain_interface, connection)" = page::CONNECTION,
        "offsetof(struct xenstore_domain_interface, error)" = page::ERROR,
        "XENSTORE_SERVER_FEATURE_RECONNECTION" = page::FEATURE_RECONNECTION,
        "XENSTORE_SERVER_FEATURE_ERROR" = page::FEATURE_ERROR,
        "XENSTORE_CONNECTED" = page::CONNECTED,
        "XENSTORE_RECONNECT" = page::RECONNECT,
        "XENSTORE_ERROR_NONE" = page::ERROR_NONE,
        "XENSTORE_ERROR_COMM" = page::ERROR_COMM,
        "XENSTORE_ERROR_RINGIDX" = page::ERROR_RINGIDX,
        "XENSTORE_ERROR_PROTO" = page::ERROR_PROTO,
        "XS_CONTROL" = Kind::Control.raw(),
        "XS_DIRECTORY" = Kind::Directory.raw(),
        "XS_READ" = Kind::Read.raw(),
        "XS_GET_PERMS" = Kind::GetPerms.raw(),
        "XS_WATCH" = Kind::Watch.raw(),
        "XS_UNWATCH" = Kind::Unwatch.raw(),
        "XS_TRANSACTION_START" = Kind::TransactionStart.raw(),
        "XS_TRANSACTION_END" = Kind::TransactionEnd.raw(),
        "XS_INTRODUCE" = Kind::Introduce.raw(),
        "XS_RELEASE" = Kind::Release.raw(),
        "XS_GET_DOMAIN_PATH" = Kind::GetDomainPath.raw(),
        "XS_WRITE" = Kind::Write.raw(),
        "XS_MKDIR" = Kind::Mkdir.raw(),
        "XS_RM" = Kind::Rm.raw(),
        "XS_SET_PERMS" = Kind::SetPerms.raw(),
        "XS_WATCH_EVENT" = Kind::WatchEvent.raw(),
        "XS_ERROR" = Kind::Error.raw(),
        "XS_IS_DOMAIN_INTRODUCED" = Kind::IsDomainIntroduced.raw(),
        "XS_RESUME" = Kind::Resume.raw(),
        "XS_SET_TARGET" = Kind::SetTarget.raw(),
        "XS_RESET_WATCHES" = Kind::ResetWatches.raw(),
        "XS_DIRECTORY_PART" = Kind::DirectoryPart.raw(),
    }
    for state in State::ALL {
        rows.push((format!("XenbusState{state:?}"), state as i128));
    }
    rows
}

/// What depends on the processor that the test runs on.
fn of_this_processor() -> Vec<Row> {
    let mut rows = Vec::new();
    numbers! { rows:
        "sizeof(struct vcpu_info)" = shared_info::VCPU_INFO_SIZE,
        "XEN_LEGACY_MAX_VCPUS" = shared_info::VCPUS,
        "offsetof(struct vcpu_info, evtchn_upcall_pending)" = shared_info::UPCALL_PENDING,
        "offsetof(struct vcpu_info, evtchn_pending_sel)" = shared_info::PENDING_SEL,
        "offsetof(struct vcpu_info, time)" = shared_info::TIME,
        "offsetof(struct shared_info, evtchn_pending)" = shared_info::PENDING,
        "offsetof(struct shared_info, evtchn_mask)" = shared_info::MASK,
    }
    #[cfg(target_arch = "x86_64")]
    numbers! { rows: "HVM_PARAM_CALLBACK_TYPE_VECTOR" = abi::CALLBACK_TYPE_VECTOR }
    rows
}

fn of_all_processors() -> Vec<Row> {
    [layouts(), hypervisor(), feature_bits(), network(), store()].concat()
}

fn hex(words: &[u32]) -> String {
    words.iter().flat_map(|word| word.to_le_bytes()).fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// A C structure with each field set, and our encoding of the same.
fn slots() -> Vec<(&'static str, &'static str, String)> {
    let extra = |more, info| hex(&Extra { more, info }.encode());
    let mac = MacAddr([1, 2, 3, 4, 5, 6]);
    let ctrl = CtrlRequest { id: 0x1122, kind: CtrlType(0x3344), data: [5, 6, 0x778899aa] };
    vec![
        (
            "struct netif_tx_request",
            ".gref = 0x01020304, .offset = 0x0506, .flags = 0x0708, .id = 0x090a, .size = 0x0b0c",
            hex(&TxRequest {
                gref: GrantRef(0x0102_0304),
                offset: 0x0506,
                flags: TxFlags::from_bits_retain(0x0708),
                id: TxId(0x090a),
                size: 0x0b0c,
            }
            .encode()),
        ),
        (
            "struct netif_tx_response",
            ".id = 0x0102, .status = -2",
            hex(&TxResponse { id: TxId(0x0102), status: TxStatus::DROPPED }.encode()),
        ),
        (
            "struct netif_rx_request",
            ".id = 0x0102, .gref = 0x03040506",
            hex(&RxRequest { id: RxId(0x0102), gref: GrantRef(0x0304_0506) }.encode()),
        ),
        (
            "struct netif_rx_response",
            ".id = 0x0102, .offset = 0x0304, .flags = 0x0506, .status = -1",
            hex(&RxResponse {
                id: RxId(0x0102),
                offset: 0x0304,
                flags: RxFlags::from_bits_retain(0x0506),
                status: RxStatus::ERROR,
            }
            .encode()),
        ),
        (
            "struct netif_extra_info",
            ".type = 1, .flags = 1, .u.gso = { .size = 0x0102, .type = 2, .features = 0x0304 }",
            extra(true, ExtraInfo::Gso { size: 0x0102, kind: GsoType::TCPV6, features: 0x0304 }),
        ),
        (
            "struct netif_extra_info",
            ".type = 2, .u.mcast.addr = { 1, 2, 3, 4, 5, 6 }",
            extra(false, ExtraInfo::McastAdd(mac)),
        ),
        (
            "struct netif_extra_info",
            ".type = 3, .flags = 1, .u.mcast.addr = { 1, 2, 3, 4, 5, 6 }",
            extra(true, ExtraInfo::McastDel(mac)),
        ),
        (
            "struct netif_extra_info",
            ".type = 4, .u.hash = { .type = 1, .algorithm = 2, .value = { 3, 4, 5, 6 } }",
            extra(false, ExtraInfo::Hash { kind: 1, algorithm: 2, value: [3, 4, 5, 6] }),
        ),
        (
            "struct xen_netif_ctrl_request",
            ".id = 0x1122, .type = 0x3344, .data = { 5, 6, 0x778899aa }",
            hex(&ctrl.encode()),
        ),
        (
            "struct xen_netif_ctrl_response",
            ".id = 0x1122, .type = 0x3344, .status = 0x55667788, .data = 9",
            hex(&CtrlResponse {
                id: 0x1122,
                kind: CtrlType(0x3344),
                status: CtrlStatus(0x5566_7788),
                data: 9,
            }
            .encode()),
        ),
        (
            "struct xen_netif_gref",
            ".ref = 0x01020304, .flags = 1, .status = 3",
            hex(&StaticGrant {
                gref: GrantRef(0x0102_0304),
                readonly: true,
                status: CtrlStatus::BUFFER_OVERFLOW,
            }
            .encode()),
        ),
    ]
}

#[test]
fn numbers_and_slots_are_those_of_the_headers() {
    let rows = [of_all_processors(), of_this_processor()].concat();
    let slots = slots();
    let mut source = String::from("#include <stdio.h>\n#include <string.h>\n");
    source.push_str(INCLUDES);
    source.push_str("int main(void) {\n");
    for (expression, _) in &rows {
        writeln!(source, "printf(\"%lld\\n\", (long long)({expression}));").unwrap();
    }
    for (kind, fields, _) in &slots {
        writeln!(
            source,
            "{{ {kind} it = {{ {fields} }}; unsigned char raw[sizeof it]; memcpy(raw, &it, sizeof it);\n\
             for (size_t at = 0; at < sizeof it; at++) printf(\"%02x\", raw[at]);\n\
             puts(\"\"); }}"
        )
        .unwrap();
    }
    source.push_str("}\n");
    let program = common::path("abi");
    common::compile("abi", &source, Some(&program), &[]);
    let output = Command::new(&program).output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let mut lines = output.lines();
    let mut wrong = Vec::new();
    let ours = rows.iter().map(|(name, value)| (name.clone(), value.to_string()));
    let slots =
        slots.into_iter().map(|(kind, fields, hex)| (format!("{kind} {{ {fields} }}"), hex));
    for (name, ours) in ours.chain(slots) {
        let xen = lines.next().unwrap();
        if xen != ours {
            wrong.push(format!("{name}: Xen has {xen}, we have {ours}"));
        }
    }
    assert_eq!(lines.next(), None);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The other processor's headers with this one's compiler: both have 64-bit longs and pointers, aligned alike, so only
/// what the headers themselves say can differ.
#[test]
fn numbers_are_the_same_on_the_other_processor() {
    let other = if cfg!(target_arch = "x86_64") {
        ["-U__x86_64__", "-D__aarch64__"]
    } else {
        ["-U__aarch64__", "-D__x86_64__"]
    };
    let mut source = String::from(INCLUDES);
    for (expression, ours) in of_all_processors() {
        writeln!(source, "_Static_assert((long long)({expression}) == {ours}LL, \"\");").unwrap();
    }
    common::compile(
        "other",
        &source,
        None,
        &[&other[..], &["-ffreestanding", "-fsyntax-only"]].concat(),
    );
}

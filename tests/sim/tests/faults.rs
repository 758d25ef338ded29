//! Everything can be made to go wrong, and the k-th thing of a trace for every k.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::{frame, granted, map_op, pages};
use hypercall::abi::{
    CacheFlush, CopyEnd, GNTCOPY_SOURCE_GREF, GTF_PERMIT_ACCESS, GrantCopy, GrantMap, GrantUnmap,
    hvm_param,
};
use hypercall::{
    DomId, Errno, Gfn, GrantRef, GrantStatus, Hypervisor, MapHandle, Port, Toolstack, VcpuId, Virq,
};
use sim::{DomainConfig, Fault, FaultPlan, Kind, Sim, SimHv};

struct Setting {
    sim: Sim,
    dom0: SimHv,
    guest: SimHv,
    doomed: DomId,
    offered: Port,
    to: Gfn,
    page: Gfn,
}

fn setting() -> Setting {
    let sim = Sim::new();
    let (dom0, guest) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    let doomed = sim.create(DomainConfig::guest()).id();
    let page = granted(&sim, &guest, dom0.id(), 8);
    let offered = guest.alloc_unbound(dom0.id()).unwrap();
    let to = frame(&dom0);
    Setting { sim, dom0, guest, doomed, offered, to, page }
}

fn copies(of: DomId, to: Gfn, count: usize) -> Vec<GrantCopy> {
    let op = GrantCopy {
        source: CopyEnd::granted(of, GrantRef(8), 0),
        dest: CopyEnd::own(to, 0),
        len: 8,
        flags: GNTCOPY_SOURCE_GREF,
        status: GrantStatus::UNTOUCHED,
    };
    vec![op; count]
}

fn unmap_op(op: &GrantMap) -> GrantUnmap {
    let (host_addr, handle) = (op.host_addr, op.handle);
    GrantUnmap { host_addr, dev_bus_addr: 0, handle, status: GrantStatus::UNTOUCHED }
}

/// Does something of every kind, and goes on whatever fails; answers what did.
#[allow(clippy::too_many_lines)]
fn everything(s: &Setting) -> Vec<String> {
    let mut failed = Vec::new();
    let mut check = |kind: Kind, what: Option<String>| {
        failed.extend(what.map(|what| format!("{}: {what}", kind.name())));
    };
    fn err<T>(result: Result<T, Errno>) -> Option<String> {
        result.err().map(|errno| errno.to_string())
    }
    fn bad(statuses: impl IntoIterator<Item = GrantStatus>) -> Option<String> {
        let bad: Vec<_> = statuses.into_iter().filter(|status| !status.is_ok()).collect();
        (!bad.is_empty()).then(|| format!("{bad:?}"))
    }
    let hv = &s.dom0;
    check(Kind::Features, err(hv.features(0)));
    let port = hv.bind_interdomain(s.guest.id(), s.offered);
    check(Kind::BindInterdomain, err(port));
    let port = port.or_else(|_| hv.alloc_unbound(s.guest.id())).unwrap();
    check(Kind::AllocUnbound, err(hv.alloc_unbound(s.guest.id())));
    check(Kind::BindVirq, err(hv.bind_virq(Virq::DOM_EXC, VcpuId(0))));
    check(Kind::Notify, err(hv.notify(port)));
    check(Kind::Unmask, err(hv.unmask(port)));
    check(Kind::Close, err(hv.close(port)));
    // SAFETY: nobody has references to this page, and nothing else is done with what is in there.
    let queues = unsafe { hv.init_control(VcpuId(0), s.to) };
    if queues.is_ok() {
        // SAFETY: as above.
        check(Kind::ExpandArray, err(unsafe { hv.expand_array(s.to) }));
    }
    check(Kind::InitControl, err(queues));
    let mut ops = copies(s.guest.id(), s.to, 3);
    // SAFETY: nobody has references to these pages.
    let copied = unsafe { hv.grant_copy(&mut ops) };
    check(Kind::Copy, err(copied).or_else(|| bad(ops.iter().map(|op| op.status))));
    let windows = [(); 2].map(|()| hv.window());
    let none = |missing: bool| missing.then(|| String::from("none"));
    check(Kind::Window, none(windows.iter().any(Option::is_none)));
    let windows: Vec<_> = windows.into_iter().flatten().collect();
    let mut maps: Vec<_> =
        windows.iter().map(|window| map_op(s.guest.id(), 8, window, 0)).collect();
    // SAFETY: the windows are held above.
    let mapped = unsafe { hv.grant_map(&mut maps) };
    check(Kind::Map, err(mapped).or_else(|| bad(maps.iter().map(|op| op.status))));
    let mut unmaps: Vec<_> = maps.iter().filter(|op| op.status.is_ok()).map(unmap_op).collect();
    // SAFETY: nobody looks at the windows.
    let unmapped = unsafe { hv.grant_unmap(&mut unmaps) };
    check(Kind::Unmap, err(unmapped).or_else(|| bad(unmaps.iter().map(|op| op.status))));
    let flush = CacheFlush { dev_bus_addr: 0, offset: 0, length: 0, op: 0 };
    check(Kind::CacheFlush, err(hv.cache_flush(&mut [flush, flush])));
    check(Kind::TableSize, err(hv.grant_table_size()));
    check(Kind::TableFrame, err(hv.grant_table_frame(0)));
    check(Kind::AllocPages, none(hv.alloc_pages(pages(1)).is_none()));
    check(Kind::DomainInfo, err(hv.domain_info(s.guest.id())));
    check(Kind::HvmParam, err(hv.hvm_param(s.guest.id(), hvm_param::STORE_PFN)));
    check(Kind::SetHvmParam, err(hv.set_hvm_param(s.guest.id(), hvm_param::STORE_PFN, 1)));
    check(Kind::Populate, err(hv.populate(s.guest.id(), Gfn(0x39000))));
    if let Some(window) = hv.window() {
        // SAFETY: the window is new.
        let mapped = unsafe { hv.map_foreign(s.guest.id(), s.page, &window) };
        let there = mapped.is_ok();
        check(Kind::MapForeign, err(mapped));
        // SAFETY: nobody looks at it.
        let unmapped = unsafe { hv.unmap_foreign(&window) };
        check(Kind::UnmapForeign, err(unmapped).filter(|_| there));
    } else {
        check(Kind::Window, none(true));
    }
    check(Kind::DestroyDomain, err(hv.destroy_domain(s.doomed)));
    failed
}

#[test]
fn every_step_of_a_trace_can_fail_and_then_just_that_does() {
    let s = setting();
    let before = s.dom0.hypercalls();
    assert_eq!(everything(&s), Vec::<String>::new());
    let trace = s.dom0.hypercalls() - before;
    assert!(Kind::ALL.iter().all(|kind| trace.calls(*kind) != 0), "of every kind:\n{trace}");
    assert_eq!(trace.steps(), trace.all_calls() + trace.all_ops());
    assert_eq!(trace.all_ops(), 3 + 2 + 2);
    let mut seen = Vec::new();
    for step in 0..trace.steps() {
        let s = setting();
        s.sim.inject(s.dom0.id(), FaultPlan::step(step));
        let failed = everything(&s);
        assert_eq!(failed.len(), 1, "step {step}: {failed:?}");
        assert_eq!(s.sim.faults_left(s.dom0.id()), 0);
        seen.extend(failed);
    }
    let s = setting();
    s.sim.inject(s.dom0.id(), FaultPlan::step(trace.steps()));
    assert_eq!((everything(&s).len(), s.sim.clear_faults(s.dom0.id())), (0, 1), "there is no more");
    for kind in Kind::ALL {
        let times = seen.iter().filter(|what| what.starts_with(kind.name())).count() as u64;
        let steps = trace.calls(*kind) + if kind.is_batch() { trace.ops(*kind) } else { 0 };
        assert!(times == steps, "{}: {times} of {steps}", kind.name());
    }
}

#[test]
fn a_batch_is_a_step_and_each_of_its_operations_is_one() {
    let s = setting();
    let run = |step| {
        s.sim.inject(s.dom0.id(), FaultPlan::step(step));
        let mut ops = copies(s.guest.id(), s.to, 3);
        // SAFETY: nobody has references to these pages.
        let done = unsafe { s.dom0.grant_copy(&mut ops) };
        (done, ops.iter().map(|op| op.status.is_ok()).collect::<Vec<_>>(), ops[0].status)
    };
    let untouched = GrantStatus::UNTOUCHED;
    assert_eq!(run(0), (Err(Errno::FAULT), vec![false; 3], untouched));
    assert_eq!(run(1), (Ok(()), vec![false, true, true], GrantStatus::GENERAL_ERROR));
    assert_eq!(run(3), (Ok(()), vec![true, true, false], GrantStatus::OKAY));
    let entry = s.sim.grant_entry(s.guest.id(), GrantRef(8)).unwrap();
    assert_eq!(entry.flags, GTF_PERMIT_ACCESS, "no failure leaves it in use");
}

#[test]
fn any_counts_calls_or_operations_of_all_kinds() {
    let s = setting();
    s.sim.inject(s.dom0.id(), FaultPlan::any(3, Fault::Status(GrantStatus::EAGAIN)));
    let mut ops = copies(s.guest.id(), s.to, 2);
    // SAFETY: nobody has references to these pages.
    unsafe { s.dom0.grant_copy(&mut ops).unwrap() };
    let windows = [(); 3].map(|()| s.dom0.window().unwrap());
    let mut maps = windows.each_ref().map(|window| map_op(s.guest.id(), 8, window, 0));
    // SAFETY: the windows are held above.
    unsafe { s.dom0.grant_map(&mut maps).unwrap() };
    let statuses = maps.map(|op| op.status);
    assert_eq!(statuses, [GrantStatus::OKAY, GrantStatus::EAGAIN, GrantStatus::OKAY]);
    assert_eq!((ops[0].status, maps[1].handle), (GrantStatus::OKAY, MapHandle::INVALID));
}

#[test]
fn every_status_and_every_errno_can_be_had_from_everything() {
    let statuses = (-14..0).chain([1, i16::MIN, i16::MAX]).map(GrantStatus);
    for status in statuses {
        for kind in Kind::ALL.iter().filter(|kind| kind.is_batch()) {
            let s = setting();
            s.sim.inject(s.dom0.id(), FaultPlan::nth(*kind, 1, Fault::Status(status)));
            let failed = everything(&s);
            assert_eq!(failed.len(), 1, "{} {status}: {failed:?}", kind.name());
            assert_eq!(s.sim.faults_left(s.dom0.id()), 0);
        }
    }
    for errno in (1..=133).map(Errno) {
        for kind in Kind::ALL {
            let s = setting();
            s.sim.inject(s.dom0.id(), FaultPlan::next(*kind, Fault::Errno(errno)));
            let failed = everything(&s);
            let expected = if matches!(*kind, Kind::Window | Kind::AllocPages) {
                String::from("none")
            } else {
                errno.to_string()
            };
            assert_eq!(failed, [format!("{}: {expected}", kind.name())]);
        }
    }
}

#[test]
fn each_kind_has_a_natural_fault_of_the_right_sort() {
    for kind in Kind::ALL {
        match kind.natural_fault() {
            Fault::Status(status) => assert!(kind.is_batch() && !status.is_ok()),
            Fault::Errno(_) => assert!(!kind.is_batch()),
            other => panic!("{other:?}"),
        }
    }
}

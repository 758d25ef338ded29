//! The simulated Xen itself: it refuses what Xen refuses, and notices what Xen does not tell.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{copy_in, frame, granted, map, pages, unmap};
use hypercall::abi::{GTF_PERMIT_ACCESS, GrantEntryV1, hvm_param};
use hypercall::{
    DomId, Errno, Gfn, GrantRef, GrantStatus, Hypervisor, Port, ShutdownReason, Toolstack, VcpuId,
    Virq, Window,
};
use sim::{DomainConfig, Fault, FaultPlan, Item, Kind, PortState, Sim};

#[test]
fn frames_are_adjacent_within_a_block_and_mean_something_else_to_everyone() {
    let sim = Sim::new();
    let (dom0, guest) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    for hv in [&dom0, &guest] {
        let base = hv.alloc_pages(pages(3)).unwrap();
        let first = hv.virt_to_gfn(base);
        // SAFETY: within the three pages.
        let third = unsafe { base.add(2 * 4096) };
        assert_eq!(hv.virt_to_gfn(third), Gfn(first.0 + 2));
        let other = if hv.id() == guest.id() { &dom0 } else { &guest };
        assert!(!sim.write(other.id(), first, 0, b"x"), "nothing is there for the other");
        assert!(!sim.write(hv.id(), Gfn(first.0 + 3), 0, b"x"), "nor behind the block");
        assert!(sim.write(hv.id(), Gfn(first.0 + 2), 4095, b"x"));
    }
    let frame = granted(&sim, &dom0, dom0.id(), 8);
    let window = dom0.window().unwrap();
    let op = map(&dom0, dom0.id(), 8, &window);
    assert_eq!(op.dev_bus_addr, frame.address(), "direct-mapped: bus addresses are its own");
    assert_eq!(unmap(&dom0, &op), GrantStatus::OKAY);
}

#[test]
fn what_breaks_the_contract_is_noticed() {
    let sim = Sim::new();
    let (dom0, guest) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    let page = guest.alloc_pages(pages(1)).unwrap();
    let frame = guest.virt_to_gfn(page);
    guest.grant_table_frame(0).unwrap();
    let entry = GrantEntryV1 {
        flags: GTF_PERMIT_ACCESS,
        domid: dom0.id(),
        frame: frame.0.try_into().unwrap(),
    };
    sim.set_grant_entry(guest.id(), GrantRef(8), entry);
    let window = dom0.window().unwrap();
    let op = map(&dom0, guest.id(), 8, &window);
    assert_eq!(op.status, GrantStatus::OKAY);
    assert!(sim.violations().is_empty());
    assert_eq!(map(&dom0, guest.id(), 8, &window).status, GrantStatus::GENERAL_ERROR);
    assert_eq!(sim.violations().len(), 1, "mapped over");
    assert_eq!(sim.grant_users(guest.id(), GrantRef(8)), 1, "and that left no pin");
    // SAFETY: this is the violation; the simulator keeps the memory.
    unsafe { guest.free_pages(page, pages(1)) };
    assert_eq!(sim.violations().len(), 2, "freed while mapped");
    dom0.release_window(Window::new(window.gfn()));
    assert_eq!(sim.violations().len(), 3, "released while mapped");
    assert_eq!(unmap(&dom0, &op), GrantStatus::OKAY);
    assert_eq!(unmap(&dom0, &op), GrantStatus::BAD_HANDLE);
    assert_eq!(sim.violations().len(), 4, "unmapped twice");
    let _ = dom0.mapped(&window);
    assert_eq!(sim.violations().len(), 5, "looked at after the unmap");
}

#[test]
fn mappings_are_bounded_by_maptrack_and_by_the_pin_count() {
    let sim = Sim::new();
    let (dom0, guest) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    granted(&sim, &guest, dom0.id(), 8);
    sim.set_maptrack_limit(dom0.id(), 3);
    let windows: Vec<_> = (0..200).map(|_| dom0.window().unwrap()).collect();
    let try_all =
        || -> Vec<_> { windows.iter().map(|window| map(&dom0, guest.id(), 8, window)).collect() };
    let ops = try_all();
    assert!(ops.iter().take(3).all(|op| op.status.is_ok()));
    assert!(ops.iter().skip(3).all(|op| op.status == GrantStatus::NO_SPACE));
    for op in &ops[..3] {
        assert!(unmap(&dom0, op).is_ok());
    }
    assert_eq!(sim.grant_entry(guest.id(), GrantRef(8)).unwrap().flags, GTF_PERMIT_ACCESS);
    sim.set_maptrack_limit(dom0.id(), 1000);
    let ops = try_all();
    assert!(ops.iter().take(128).all(|op| op.status.is_ok()));
    assert!(ops.iter().skip(128).all(|op| op.status == GrantStatus::GENERAL_ERROR));
}

#[test]
fn a_grant_that_is_taken_back_before_the_copy_fails_it() {
    let sim = Sim::new();
    let (dom0, guest) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    granted(&sim, &guest, dom0.id(), 8);
    let to = frame(&dom0);
    let (peer, id) = (sim.clone(), guest.id());
    dom0.before(Kind::Copy, move || {
        peer.set_grant_entry(id, GrantRef(8), GrantEntryV1::default());
    });
    assert_eq!(copy_in(&dom0, guest.id(), 8, to), GrantStatus::GENERAL_ERROR);
}

#[test]
fn ports_close_from_either_end_and_go_with_their_domain() {
    let sim = Sim::new();
    let dom0 = sim.create(DomainConfig::dom0());
    let guest = sim.create(DomainConfig { store_port: true, ..DomainConfig::guest() });
    let offered = dom0.hvm_param(guest.id(), hvm_param::STORE_EVTCHN).unwrap();
    let offered = Port(offered.try_into().unwrap());
    assert_eq!(dom0.hvm_param(guest.id(), hvm_param::STORE_PFN), Ok(Gfn::INVALID.0));
    assert_eq!(guest.hvm_param(guest.id(), hvm_param::STORE_PFN), Err(Errno::PERM));
    let port = dom0.bind_interdomain(guest.id(), offered).unwrap();
    dom0.close(port).unwrap();
    assert_eq!(sim.port(guest.id(), offered), PortState::Unbound(dom0.id()));
    assert_eq!(guest.notify(offered), Ok(()), "silently lost");
    let port = dom0.bind_interdomain(guest.id(), offered).unwrap();
    let exc = dom0.bind_virq(Virq::DOM_EXC, VcpuId(0)).unwrap();
    assert_eq!(dom0.bind_virq(Virq::DOM_EXC, VcpuId(0)), Err(Errno(17)));
    sim.shut_down(guest.id(), ShutdownReason::Crash);
    assert_eq!(dom0.domain_info(guest.id()).unwrap().shutdown, Some(ShutdownReason::Crash));
    assert_eq!(sim.port_bits(dom0.id(), exc).map(|(pending, _)| pending), Some(true));
    dom0.destroy_domain(guest.id()).unwrap();
    assert_eq!(sim.port(dom0.id(), port), PortState::Unbound(guest.id()));
    assert_eq!(dom0.domain_info(guest.id()), Err(Errno::SRCH));
    assert_eq!(guest.notify(offered), Err(Errno::SRCH), "the dead make no calls");
}

#[test]
fn faults_hit_what_they_were_planned_for() {
    let sim = Sim::new();
    let hv = sim.create(DomainConfig::dom0());
    sim.inject(hv.id(), FaultPlan::any(2, Fault::Errno(Errno::NOSYS)));
    sim.inject(hv.id(), FaultPlan::nth(Kind::Features, 1, Fault::Errno(Errno::FAULT)));
    assert!(hv.features(0).is_ok());
    assert_eq!(hv.features(0), Err(Errno::FAULT));
    assert_eq!(hv.alloc_unbound(DomId(1)), Err(Errno::NOSYS), "the third of any kind");
    assert_eq!(sim.faults_left(hv.id()), 0);
    sim.inject(hv.id(), FaultPlan::every(Kind::AllocPages, Fault::Errno(Errno::NOMEM)));
    assert!((0..3).all(|_| hv.alloc_pages(pages(1)).is_none()));
    assert_eq!(sim.clear_faults(hv.id()), 1);
    assert!(hv.alloc_pages(pages(1)).is_some());
}

#[test]
fn the_ledger_says_what_changed_and_whom_it_concerns() {
    let sim = Sim::new();
    let (dom0, guest) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    let before = sim.ledger();
    let port = guest.alloc_unbound(dom0.id()).unwrap();
    granted(&sim, &guest, dom0.id(), 9);
    let window = dom0.window().unwrap();
    let op = map(&dom0, guest.id(), 9, &window);
    let now = sim.ledger();
    assert_eq!(now.concerning(guest.id()).len(), 4, "{now}");
    assert_eq!(now.held_by(dom0.id()).len(), 1, "{now}");
    assert!(now.entries().any(|(holder, item)| holder == dom0.id()
        && matches!(item, Item::Mapping { handle, .. } if handle == op.handle)));
    let text = now.since(&before).to_string();
    assert_eq!(text.lines().count(), 4, "{text}");
    assert!(text.contains(&format!("+ d1: port {port}, unbound, for d0\n")), "{text}");
    assert!(text.contains("+ d0: mapping 0 of d1's reference 9 at gfn"), "{text}");
    assert!(before.since(&now).to_string().lines().all(|line| line.starts_with("- ")));
}

#[test]
fn an_upcall_wakes_a_thread_and_calls_the_vector_once() {
    let sim = Sim::new();
    let (dom0, guest) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    let port = guest.alloc_unbound(dom0.id()).unwrap();
    let ours = dom0.bind_interdomain(guest.id(), port).unwrap();
    let calls = Arc::new(AtomicU32::new(0));
    let (counted, inside) = (Arc::clone(&calls), Mutex::new(guest.clone()));
    guest.on_upcall(move || {
        // The lock of the machine is free: the vector may make hypercalls.
        assert!(inside.lock().unwrap().features(0).is_ok());
        counted.fetch_add(1, Ordering::SeqCst);
    });
    assert!(!guest.wait_for_upcall(Duration::from_millis(1)));
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| guest.wait_for_upcall(Duration::from_secs(20)));
        dom0.notify(ours).unwrap();
        assert!(sleeper.join().unwrap());
    });
    dom0.notify(ours).unwrap();
    assert_eq!(calls.load(Ordering::SeqCst), 1, "one edge");
    assert!(sim.with_upcall().contains(&guest.id()));
}

//! Suspend, and the two ways to go on.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::{copy_in, frame, grant, granted, map, map_to_read, pages, unmap};
use hypercall::abi::{GTF_PERMIT_ACCESS, hvm_param};
use hypercall::{Errno, Gfn, GrantRef, GrantStatus, Hypervisor, Port, ShutdownReason, Toolstack};
use hypercall::{VcpuId, Virq};
use sim::{DomainConfig, PortState, Sim, SimHv};

fn machine() -> (Sim, SimHv, SimHv) {
    let sim = Sim::new();
    let dom0 = sim.create(DomainConfig::dom0());
    let guest = sim.create(DomainConfig { store_port: true, ..DomainConfig::guest() });
    (sim, dom0, guest)
}

const NEW: u32 = 0x1_7005;

#[test]
fn a_new_life_begins_with_memory_and_nothing_else() {
    let (sim, dom0, guest) = machine();
    let kept = frame(&guest);
    assert!(sim.write(guest.id(), kept, 0, b"kept"));
    granted(&sim, &guest, dom0.id(), 8);
    granted(&sim, &dom0, guest.id(), 8);
    let port = guest.alloc_unbound(dom0.id()).unwrap();
    let theirs = dom0.bind_interdomain(guest.id(), port).unwrap();
    let virq = guest.bind_virq(Virq(0), VcpuId(0)).unwrap();
    dom0.notify(theirs).unwrap();
    let window = guest.window().unwrap();
    let op = map(&guest, dom0.id(), 8, &window);
    assert!(op.status.is_ok());
    guest.grant_table_frame(2).unwrap();
    let table = guest.grant_table_frame(0).unwrap();
    let exc = dom0.bind_virq(Virq::DOM_EXC, VcpuId(0)).unwrap();

    assert!(sim.suspend(guest.id()));
    assert!(!sim.suspend(guest.id()), "it waits already");
    assert_eq!(dom0.domain_info(guest.id()).unwrap().shutdown, Some(ShutdownReason::Suspend));
    assert_eq!(sim.port_bits(dom0.id(), exc).map(|(pending, _)| pending), Some(true));
    assert_eq!(guest.notify(port), Err(Errno::SRCH), "it does not run");
    assert_eq!(sim.violations().len(), 1);

    assert!(sim.resume(guest.id(), NEW));
    assert!(!sim.resume(guest.id(), NEW));
    assert_eq!(dom0.domain_info(guest.id()).unwrap().shutdown, None);
    assert_eq!(guest.features(0), Ok(NEW));
    let mut bytes = [0; 4];
    assert!(sim.read(guest.id(), kept, 0, &mut bytes));
    assert_eq!(&bytes, b"kept");
    // Ports.
    assert_eq!(sim.port(guest.id(), virq), PortState::Free);
    assert_eq!(sim.port(dom0.id(), theirs), PortState::Unbound(guest.id()));
    assert_eq!(sim.port_bits(guest.id(), port), Some((false, false)));
    assert!(!sim.with_upcall().contains(&guest.id()));
    assert_eq!(guest.notify(port), Err(Errno::INVAL));
    assert_eq!(dom0.notify(theirs), Ok(()), "lost");
    let store = dom0.hvm_param(guest.id(), hvm_param::STORE_EVTCHN).unwrap();
    let store = Port(store.try_into().unwrap());
    assert_eq!(sim.port(guest.id(), store), PortState::Unbound(dom0.id()));
    // The grant table.
    assert_eq!(guest.grant_table_size().unwrap().frames, 1);
    assert!(sim.grant_entry(guest.id(), GrantRef(8)).is_none_or(|entry| entry.flags == 0));
    let to = frame(&dom0);
    assert_eq!(copy_in(&dom0, guest.id(), 8, to), GrantStatus::BAD_GNTREF);
    assert_eq!(guest.grant_table_frame(0), Ok(table), "seen where it was");
    assert_eq!(copy_in(&dom0, guest.id(), 8, to), GrantStatus::GENERAL_ERROR);
    grant(&sim, &guest, dom0.id(), 8, kept);
    assert_eq!(copy_in(&dom0, guest.id(), 8, to), GrantStatus::OKAY);
    // What it had mapped.
    assert_eq!(sim.p2m(guest.id(), window.gfn()), None);
    assert_eq!(sim.grant_users(dom0.id(), GrantRef(8)), 0);
    assert_eq!(sim.grant_entry(dom0.id(), GrantRef(8)).unwrap().flags, GTF_PERMIT_ACCESS);
    assert_eq!(unmap(&guest, &op), GrantStatus::BAD_HANDLE);
    assert_eq!(sim.violations().len(), 2, "{:?}", sim.violations());
    assert_eq!(map(&guest, dom0.id(), 8, &window).handle, op.handle, "numbers begin again");
}

#[test]
fn what_others_have_mapped_of_a_former_life_touches_nothing_of_the_new_one() {
    let (sim, dom0, guest) = machine();
    let page = guest.alloc_pages(pages(1)).unwrap();
    let frame = guest.virt_to_gfn(page);
    grant(&sim, &guest, dom0.id(), 8, frame);
    let windows: Vec<_> = (0..3).map(|_| dom0.window().unwrap()).collect();
    let old = map(&dom0, guest.id(), 8, &windows[0]);
    // SAFETY: nothing is mapped there.
    unsafe { dom0.map_foreign(guest.id(), frame, &windows[1]).unwrap() };
    sim.suspend(guest.id());
    sim.resume(guest.id(), NEW);
    grant(&sim, &guest, dom0.id(), 8, frame);
    let new = map_to_read(&dom0, guest.id(), 8, &windows[2]);
    assert_eq!(sim.grant_users(guest.id(), GrantRef(8)), 1);
    assert_eq!(unmap(&dom0, &old), GrantStatus::OKAY);
    // SAFETY: nobody looks at it.
    unsafe { dom0.unmap_foreign(&windows[1]).unwrap() };
    assert_eq!(sim.grant_users(guest.id(), GrantRef(8)), 1, "the new mapping's");
    sim.destroy(guest.id());
    assert!(sim.domains().contains(&guest.id()), "the new mapping keeps it");
    assert!(unmap(&dom0, &new).is_ok());
    assert!(!sim.domains().contains(&guest.id()));
    assert!(sim.violations().is_empty(), "{:?}", sim.violations());
}

#[test]
fn pages_mapped_in_a_former_life_may_be_freed_in_the_new_one() {
    let (sim, dom0, guest) = machine();
    let page = guest.alloc_pages(pages(1)).unwrap();
    grant(&sim, &guest, dom0.id(), 8, guest.virt_to_gfn(page));
    let old = map(&dom0, guest.id(), 8, &dom0.window().unwrap());
    sim.suspend(guest.id());
    sim.resume(guest.id(), NEW);
    // SAFETY: what has it mapped is of a life that is over.
    unsafe { guest.free_pages(page, pages(1)) };
    assert!(sim.violations().is_empty(), "{:?}", sim.violations());
    sim.destroy(guest.id());
    assert!(!sim.domains().contains(&guest.id()), "nothing of this life is mapped");
    assert!(unmap(&dom0, &old).is_ok());
}

#[test]
fn after_a_cancelled_suspend_nothing_is_void() {
    let (sim, dom0, guest) = machine();
    granted(&sim, &guest, dom0.id(), 8);
    granted(&sim, &dom0, guest.id(), 8);
    let port = guest.alloc_unbound(dom0.id()).unwrap();
    let theirs = dom0.bind_interdomain(guest.id(), port).unwrap();
    let window = guest.window().unwrap();
    let op = map(&guest, dom0.id(), 8, &window);
    let upcalls = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&upcalls);
    guest.on_upcall(move || {
        counted.fetch_add(1, Ordering::SeqCst);
    });
    let before = sim.ledger();
    assert!(!sim.cancel_suspend(guest.id()), "it does not wait");
    assert!(sim.suspend(guest.id()));
    dom0.notify(theirs).unwrap();
    assert_eq!(upcalls.load(Ordering::SeqCst), 0, "it does not run");
    assert!(!sim.with_upcall().contains(&guest.id()));
    assert!(!guest.wait_for_upcall(Duration::ZERO));
    assert!(sim.cancel_suspend(guest.id()));
    assert_eq!(upcalls.load(Ordering::SeqCst), 1, "what came meanwhile is there");
    assert!(sim.with_upcall().contains(&guest.id()));
    assert!(guest.wait_for_upcall(Duration::ZERO));
    assert_eq!(sim.ledger(), before);
    assert_eq!(guest.features(0), Ok(DomainConfig::guest().features));
    assert_eq!(guest.notify(port), Ok(()));
    assert_eq!(dom0.domain_info(guest.id()).unwrap().shutdown, None);
    assert!(unmap(&guest, &op).is_ok());
    assert!(sim.violations().is_empty(), "{:?}", sim.violations());
}

#[test]
fn a_domain_that_waits_can_be_destroyed_and_the_dead_do_not_go_on() {
    let (sim, dom0, guest) = machine();
    granted(&sim, &guest, dom0.id(), 8);
    let op = map(&dom0, guest.id(), 8, &dom0.window().unwrap());
    sim.suspend(guest.id());
    assert!(sim.destroy(guest.id()));
    assert!(!sim.resume(guest.id(), NEW) && !sim.cancel_suspend(guest.id()));
    assert!(!sim.suspend(guest.id()));
    assert!(unmap(&dom0, &op).is_ok());
    assert!(!sim.suspend(guest.id()));
    assert_eq!(sim.domains(), [dom0.id()]);
}

#[test]
fn a_crash_leaves_everything_until_the_domain_is_destroyed() {
    let (sim, dom0, guest) = machine();
    granted(&sim, &guest, dom0.id(), 8);
    let op = map(&dom0, guest.id(), 8, &dom0.window().unwrap());
    let before = sim.ledger();
    sim.shut_down(guest.id(), ShutdownReason::Crash);
    assert_eq!(sim.ledger(), before);
    sim.destroy(guest.id());
    assert!(dom0.domain_info(guest.id()).unwrap().dying);
    assert_eq!(sim.p2m(dom0.id(), Gfn::of_address(op.host_addr)).unwrap().bus.0, op.dev_bus_addr);
    assert!(unmap(&dom0, &op).is_ok());
    assert_eq!(dom0.domain_info(guest.id()), Err(Errno::SRCH));
}

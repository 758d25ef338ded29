//! Windows with real protection. What must kill a process is done in a process of its own: this test binary again.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{frame, granted, map, map_to_read, unmap};
use hypercall::{DomId, Gfn, Hypervisor, Toolstack, Window};
use sim::{DomainConfig, Sim, SimHv};

const SIGSEGV: i32 = 11;

/// Runs the test `name` in a process that is told to go too far, and answers which signal ended it.
fn ended_by(name: &str) -> Option<i32> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let told = command.args(["--exact", name, "--nocapture"]).env("GO_TOO_FAR", "1");
    told.output().unwrap().status.signal()
}

fn goes_too_far() -> bool {
    std::env::var_os("GO_TOO_FAR").is_some()
}

fn at(page: NonNull<u8>) -> &'static AtomicU64 {
    // SAFETY: a page of atomic access for as long as the simulator says; the tests are about what happens afterwards.
    unsafe { page.cast().as_ref() }
}

fn machine() -> (Sim, SimHv, SimHv, Gfn, Window) {
    let sim = Sim::strict();
    let (dom0, guest) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    let page = granted(&sim, &guest, dom0.id(), 8);
    assert!(sim.write(guest.id(), page, 0, &7u64.to_ne_bytes()));
    let window = dom0.window().unwrap();
    (sim, dom0, guest, page, window)
}

#[test]
fn mappings_show_the_page_itself() {
    let (sim, dom0, guest, page, window) = machine();
    let reading = map_to_read(&dom0, guest.id(), 8, &window);
    let seen = dom0.mapped(&window);
    assert_eq!(at(seen).load(Ordering::SeqCst), 7);
    sim.write(guest.id(), page, 0, &8u64.to_ne_bytes());
    assert_eq!(at(seen).load(Ordering::SeqCst), 8, "what the owner writes is seen");
    let another = dom0.window().unwrap();
    let writing = map(&dom0, guest.id(), 8, &another);
    let also_seen = dom0.mapped(&another);
    assert_ne!(seen, also_seen);
    at(also_seen).store(9, Ordering::SeqCst);
    let mut bytes = [0; 8];
    assert!(sim.read(guest.id(), page, 0, &mut bytes));
    assert_eq!((u64::from_ne_bytes(bytes), at(seen).load(Ordering::SeqCst)), (9, 9));
    assert!(unmap(&dom0, &reading).is_ok() && unmap(&dom0, &writing).is_ok());
    // The same window, another page.
    granted(&sim, &guest, dom0.id(), 9);
    assert!(map(&dom0, guest.id(), 9, &window).status.is_ok());
    assert_eq!(dom0.mapped(&window), seen);
    assert_eq!(at(seen).load(Ordering::SeqCst), 0);
    assert!(sim.violations().is_empty());
}

#[test]
fn writing_what_is_mapped_for_reading_is_the_end() {
    let (_sim, dom0, guest, _, window) = machine();
    map_to_read(&dom0, guest.id(), 8, &window);
    if goes_too_far() {
        at(dom0.mapped(&window)).store(1, Ordering::SeqCst);
    } else {
        let name = "writing_what_is_mapped_for_reading_is_the_end";
        assert_eq!(ended_by(name), Some(SIGSEGV));
    }
}

#[test]
fn reading_after_the_unmap_is_the_end() {
    let (_sim, dom0, guest, _, window) = machine();
    let op = map(&dom0, guest.id(), 8, &window);
    let seen = dom0.mapped(&window);
    assert_eq!(at(seen).load(Ordering::SeqCst), 7);
    assert!(unmap(&dom0, &op).is_ok());
    if goes_too_far() {
        at(seen).load(Ordering::SeqCst);
    } else {
        assert_eq!(ended_by("reading_after_the_unmap_is_the_end"), Some(SIGSEGV));
    }
}

#[test]
fn so_is_what_a_dead_domain_had_mapped_and_a_foreign_map_that_is_gone() {
    let (sim, dom0, guest, page, window) = machine();
    // SAFETY: nothing is mapped there, and nothing is there again before it is looked at too late.
    unsafe { dom0.map_foreign(guest.id(), page, &window).unwrap() };
    let seen = dom0.mapped(&window);
    at(seen).store(8, Ordering::SeqCst);
    // SAFETY: as above.
    unsafe { dom0.unmap_foreign(&window).unwrap() };
    granted(&sim, &dom0, guest.id(), 8);
    let its_window = guest.window().unwrap();
    map(&guest, dom0.id(), 8, &its_window);
    let seen_by_it = at(guest.mapped(&its_window));
    seen_by_it.store(9, Ordering::SeqCst);
    sim.destroy(guest.id());
    match std::env::var("GO_TOO_FAR").as_deref() {
        Ok("1") => assert_eq!(at(seen).load(Ordering::SeqCst), 8),
        Ok(_) => assert_eq!(seen_by_it.load(Ordering::SeqCst), 9),
        Err(_) => {
            let name = "so_is_what_a_dead_domain_had_mapped_and_a_foreign_map_that_is_gone";
            assert_eq!(ended_by(name), Some(SIGSEGV));
            let mut other = Command::new(std::env::current_exe().unwrap());
            let other = other.args(["--exact", name]).env("GO_TOO_FAR", "2");
            assert_eq!(other.output().unwrap().status.signal(), Some(SIGSEGV));
        }
    }
}

#[test]
fn a_thousand_windows_come_and_go() {
    let (sim, dom0, guest, ..) = machine();
    for gref in 0..400 {
        granted(&sim, &guest, dom0.id(), 8 + gref);
    }
    let windows: Vec<_> = (0..400).map(|_| dom0.window().unwrap()).collect();
    for round in 0..5u64 {
        let ops: Vec<_> = (8..)
            .zip(&windows)
            .map(|(gref, window)| map(&dom0, guest.id(), gref, window))
            .collect();
        for window in &windows {
            let word = at(dom0.mapped(window));
            assert_eq!(word.swap(round + 1, Ordering::SeqCst), round);
        }
        assert!(ops.iter().all(|op| unmap(&dom0, op).is_ok()));
    }
    let own = frame(&dom0);
    assert!(sim.write(dom0.id(), own, 0, b"x"));
    assert_eq!(sim.domains(), [DomId(0), DomId(1)]);
}

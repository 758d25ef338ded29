//! Our own grant table against a simulated Xen.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicBool, Ordering};

use grant::{GrantError, GrantTable, MapRequest, Mapper, SharedMemory};
use hypercall::abi::{GRANT_RESERVED_ENTRIES, GTF_PERMIT_ACCESS, GTF_READONLY, GrantEntryV1};
use hypercall::{DomId, Errno, Gfn, GrantRef};
use sim::{DomainConfig, Fault, FaultPlan, Kind, Sim, SimHv};

const PER_FRAME: usize = 512;

fn two() -> (Sim, SimHv, SimHv) {
    let sim = Sim::new();
    let backend = sim.create(DomainConfig::dom0());
    let guest = sim.create(DomainConfig::guest());
    (sim, backend, guest)
}

#[test]
fn an_entry_says_what_was_granted_and_is_cleared_in_the_end() {
    let (sim, backend, guest) = two();
    let table = GrantTable::new(&guest).unwrap();
    let before = sim.ledger();
    let page = table.share(backend.id(), true).unwrap();
    let entry = sim.grant_entry(guest.id(), page.gref()).unwrap();
    assert_eq!(entry.flags, GTF_PERMIT_ACCESS | GTF_READONLY);
    assert_eq!(entry.domid, backend.id());
    page.page().write_bytes(5, b"shared");
    let mut seen = [0; 6];
    assert!(sim.read(guest.id(), Gfn(entry.frame.into()), 5, &mut seen));
    assert_eq!(&seen, b"shared", "the frame is that of the page");
    let gref = page.gref();
    drop(page);
    assert_eq!(sim.grant_entry(guest.id(), gref).unwrap().flags, 0);
    assert_eq!(sim.ledger().since(&before).to_string(), "");
}

#[test]
fn pages_are_granted_zeroed_even_when_used_before() {
    let (_, backend, guest) = two();
    let table = GrantTable::new(&guest).unwrap();
    for _ in 0..3 {
        let page = table.share(backend.id(), false).unwrap();
        let mut bytes = [1; 4096];
        page.page().read_bytes(0, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 0));
        page.page().write_bytes(0, &[0x5a; 4096]);
    }
}

#[test]
fn the_table_grows_to_its_limit_and_reserved_entries_are_never_used() {
    let sim = Sim::new();
    let guest = sim.create(DomainConfig { grant_frames: 2, ..DomainConfig::guest() });
    let table = GrantTable::new(&guest).unwrap();
    let mut pages = Vec::new();
    let error = loop {
        match table.share(DomId(0), false) {
            Ok(page) => pages.push(page),
            Err(error) => break error,
        }
    };
    assert_eq!(error, GrantError::TableFull);
    assert_eq!(pages.len(), 2 * PER_FRAME - GRANT_RESERVED_ENTRIES as usize);
    let mut refs: Vec<_> = pages.iter().map(|page| page.gref().0).collect();
    refs.sort_unstable();
    refs.dedup();
    assert_eq!(refs.len(), pages.len(), "each once");
    assert!(refs.iter().all(|gref| *gref >= GRANT_RESERVED_ENTRIES));
    assert_eq!(guest.hypercalls().calls(Kind::TableFrame), 2);
    let gref = pages.pop().unwrap().gref();
    assert_eq!(table.share(DomId(0), false).unwrap().gref(), gref, "back-pressure, not the end");
}

#[test]
fn a_reference_given_back_is_the_last_to_be_used_again() {
    let (_, backend, guest) = two();
    let table = GrantTable::new(&guest).unwrap();
    let first = table.share(backend.id(), false).unwrap().gref();
    let others = table.free() - 1;
    for _ in 0..others {
        assert_ne!(table.share(backend.id(), false).unwrap().gref(), first);
    }
    assert_eq!(table.share(backend.id(), false).unwrap().gref(), first);
}

#[test]
fn what_the_peer_still_holds_is_parked_with_its_page() {
    let (sim, backend, guest) = two();
    let table = GrantTable::new(&guest).unwrap();
    let mapper = Mapper::new(&backend);
    let page = table.share(backend.id(), false).unwrap();
    let gref = page.gref();
    let frame = sim.grant_entry(guest.id(), gref).unwrap().frame;
    let request = MapRequest { domain: guest.id(), gref, read_only: false };
    let mapping = mapper.map(request).unwrap();
    drop(page);
    assert_eq!((table.granted(), table.parked()), (0, 1));
    mapping.page().store_u32(0, 0xdead_beef, Ordering::Relaxed);
    let again = (0..table.free() + 20).map(|_| table.share(backend.id(), false).unwrap());
    for page in again {
        assert_ne!(page.gref(), gref, "the reference is never reused");
        assert_ne!(sim.grant_entry(guest.id(), page.gref()).unwrap().frame, frame);
    }
    drop(mapping);
    assert!(sim.violations().is_empty(), "{:?}", sim.violations());
}

#[test]
fn what_was_parked_is_freed_once_the_peer_lets_go() {
    let (sim, backend, guest) = two();
    let table = GrantTable::new(&guest).unwrap();
    let mapper = Mapper::new(&backend);
    let before = sim.ledger();
    let free = table.free();
    let mut mappings = Vec::new();
    for _ in 0..10 {
        let page = table.share(backend.id(), false).unwrap();
        let request = MapRequest { domain: guest.id(), gref: page.gref(), read_only: false };
        mappings.push(mapper.map(request).unwrap());
    }
    assert_eq!((table.granted(), table.parked()), (0, 10));
    assert_eq!(table.retry_parked(100), 0);
    assert_eq!(table.parked(), 10);
    mappings.truncate(7);
    assert_eq!(table.retry_parked(7), 0, "no more than asked for, the oldest first");
    assert_eq!(table.retry_parked(100), 3);
    assert_eq!(table.parked(), 7);
    drop(mappings);
    assert_eq!(table.retry_parked(100), 7);
    assert_eq!((table.parked(), table.retry_parked(100)), (0, 0));
    assert_eq!(table.free(), free.max(PER_FRAME - GRANT_RESERVED_ENTRIES as usize));
    assert_eq!(sim.ledger().since(&before).to_string(), "");
    assert!(sim.violations().is_empty(), "{:?}", sim.violations());
}

#[test]
fn after_a_resume_the_table_is_asked_for_anew_and_old_grants_end() {
    let (sim, backend, guest) = two();
    let table = GrantTable::new(&guest).unwrap();
    let before = sim.ledger();
    let old: Vec<_> = (0..600).map(|_| table.share(backend.id(), false).unwrap()).collect();
    let grown = guest.hypercalls().calls(Kind::TableFrame);
    for page in &old {
        // As where this domain goes on: nothing is granted there.
        assert!(sim.set_grant_entry(guest.id(), page.gref(), GrantEntryV1::default()));
    }
    table.resumed().unwrap();
    assert_eq!(guest.hypercalls().calls(Kind::TableFrame), 2 * grown);
    drop(old);
    assert_eq!((table.granted(), table.parked()), (0, 0));
    drop(table.share(backend.id(), false).unwrap());
    assert_eq!(sim.ledger().since(&before).to_string(), "");
    sim.inject(guest.id(), FaultPlan::next(Kind::TableFrame, Fault::Errno(Errno::NOMEM)));
    assert_eq!(table.resumed(), Err(Errno::NOMEM));
}

#[test]
fn a_frame_beyond_32_bits_cannot_be_granted_and_nothing_leaks() {
    let sim = Sim::new();
    let far = DomainConfig { first_gfn: Some(1 << 32), ..DomainConfig::guest() };
    let guest = sim.create(far);
    let table = GrantTable::new(&guest).unwrap();
    let before = sim.ledger();
    assert_eq!(table.share(DomId(0), false).err(), Some(GrantError::FrameTooHigh(Gfn(1 << 32))),);
    assert_eq!(table.free(), PER_FRAME - GRANT_RESERVED_ENTRIES as usize);
    assert_eq!(sim.ledger().since(&before).to_string(), "");
}

#[test]
fn without_memory_or_growth_nothing_is_lost() {
    let (sim, backend, guest) = two();
    let table = GrantTable::new(&guest).unwrap();
    let before = sim.ledger();
    let next = |kind| sim.inject(guest.id(), FaultPlan::next(kind, Fault::Errno(Errno::NOMEM)));
    next(Kind::TableFrame);
    assert_eq!(table.share(backend.id(), false).err(), Some(GrantError::Grow(Errno::NOMEM)));
    next(Kind::AllocPages);
    assert_eq!(table.share(backend.id(), false).err(), Some(GrantError::NoMemory));
    assert_eq!(table.free(), PER_FRAME - GRANT_RESERVED_ENTRIES as usize);
    assert_eq!(table.share(backend.id(), false).unwrap().gref(), GrantRef(9), "8 went round");
    assert_eq!(sim.ledger().since(&before).to_string(), "");
    sim.inject(guest.id(), FaultPlan::next(Kind::TableSize, Fault::Errno(Errno::NOSYS)));
    assert_eq!(GrantTable::new(&guest).err(), Some(Errno::NOSYS));
}

#[test]
fn two_threads_that_grow_the_table_get_each_reference_once() {
    let (sim, backend, guest) = two();
    let table = GrantTable::new(&guest).unwrap();
    // The first thread is about to ask for more references when a second one gets some, and then fails.
    sim.inject(guest.id(), FaultPlan::nth(Kind::TableFrame, 1, Fault::Errno(Errno::NOMEM)));
    let (second, asked) = (table.clone(), AtomicBool::new(false));
    let to = backend.id();
    guest.before(Kind::TableFrame, move || {
        if !asked.swap(true, Ordering::SeqCst) {
            let second = second.clone();
            std::thread::spawn(move || drop(second.share(to, false).unwrap())).join().unwrap();
        }
    });
    assert_eq!(table.share(to, false).err(), Some(GrantError::Grow(Errno::NOMEM)));
    let pages: Vec<_> = (0..2 * PER_FRAME).map(|_| table.share(to, false).unwrap()).collect();
    let mut refs: Vec<_> = pages.iter().map(|page| page.gref().0).collect();
    refs.sort_unstable();
    refs.dedup();
    assert_eq!(refs.len(), pages.len(), "no reference twice");
}

//! XENFEAT_grant_map_identity: what is mapped is at its machine frame number too.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::{IDENTITY, copy_in, frame, grant, granted, map, map_to_read, unmap};
use hypercall::{Gfn, GrantStatus, Hypervisor, PAGE_SIZE};
use sim::{DomainConfig, Item, P2mKind, Sim, SimHv};

fn machine() -> (Sim, SimHv, SimHv) {
    let sim = Sim::new();
    let config = DomainConfig::dom0();
    let dom0 = sim.create(DomainConfig { features: config.features | IDENTITY, ..config });
    let guest = sim.create(DomainConfig::guest());
    (sim, dom0, guest)
}

/// Whether a page of another's is at this frame, and then whether for writing.
fn alias(sim: &Sim, of: &SimHv, at: Gfn) -> Option<bool> {
    let entry = sim.p2m(of.id(), at)?;
    assert_eq!(entry.bus.0, at.address());
    (entry.kind == P2mKind::Alias).then_some(entry.writable)
}

#[test]
fn it_is_for_writing_while_any_mapping_is_and_goes_with_the_last() {
    let (sim, dom0, guest) = machine();
    let page = granted(&sim, &guest, dom0.id(), 8);
    grant(&sim, &guest, dom0.id(), 9, page);
    let windows: Vec<_> = (0..4).map(|_| dom0.window().unwrap()).collect();
    let read = map_to_read(&dom0, guest.id(), 8, &windows[0]);
    let at = Gfn::of_address(read.dev_bus_addr);
    assert_eq!(alias(&sim, &dom0, at), Some(false));
    assert!(!sim.write(dom0.id(), at, 0, b"no"));
    let write = map(&dom0, guest.id(), 8, &windows[1]);
    let another = map(&dom0, guest.id(), 9, &windows[2]);
    assert_eq!((write.dev_bus_addr, another.dev_bus_addr), (read.dev_bus_addr, read.dev_bus_addr));
    assert!(sim.write(dom0.id(), at, PAGE_SIZE - 3, b"yes"));
    let mut seen = [0; 3];
    assert!(sim.read(guest.id(), page, PAGE_SIZE - 3, &mut seen));
    assert_eq!(&seen, b"yes");
    assert_eq!(unmap(&dom0, &write), GrantStatus::OKAY);
    assert_eq!(alias(&sim, &dom0, at), Some(true), "one that writes is left");
    assert_eq!(unmap(&dom0, &another), GrantStatus::OKAY);
    assert_eq!(alias(&sim, &dom0, at), Some(false), "only one that reads is left");
    let item = Item::Alias { of: guest.id(), at, read_only: true };
    let ledger = sim.ledger();
    assert!(ledger.concerning(guest.id()).entries().any(|entry| entry == (dom0.id(), item)));
    assert!(ledger.to_string().contains("alias of d1's page at gfn"), "{ledger}");
    assert_eq!(unmap(&dom0, &read), GrantStatus::OKAY);
    assert_eq!(sim.p2m(dom0.id(), at), None);
    assert!(sim.ledger().mappings().is_empty());
}

#[test]
fn withdrawal_leaves_what_is_there_and_enters_no_more() {
    let (sim, dom0, guest) = machine();
    let page = granted(&sim, &guest, dom0.id(), 8);
    granted(&sim, &guest, dom0.id(), 9);
    let windows: Vec<_> = (0..4).map(|_| dom0.window().unwrap()).collect();
    let before = map_to_read(&dom0, guest.id(), 8, &windows[0]);
    let at = Gfn::of_address(before.dev_bus_addr);
    sim.set_features(dom0.id(), DomainConfig::dom0().features);
    let same = map(&dom0, guest.id(), 8, &windows[1]);
    let other = map(&dom0, guest.id(), 9, &windows[2]);
    let also = map_to_read(&dom0, guest.id(), 8, &windows[3]);
    assert_eq!(same.dev_bus_addr, common::bus(&sim, &guest, page).0, "the address as ever");
    assert_eq!(alias(&sim, &dom0, at), Some(false), "not this mapping's doing");
    assert_eq!(sim.p2m(dom0.id(), Gfn::of_address(other.dev_bus_addr)), None);
    sim.set_features(dom0.id(), DomainConfig::dom0().features | IDENTITY);
    assert_eq!(unmap(&dom0, &same), GrantStatus::OKAY);
    assert_eq!(unmap(&dom0, &also), GrantStatus::OKAY);
    assert_eq!(
        alias(&sim, &dom0, at),
        Some(false),
        "they had entered none, so they take none away"
    );
    assert_eq!(unmap(&dom0, &before), GrantStatus::OKAY);
    assert_eq!(alias(&sim, &dom0, at), None);
    let again = map(&dom0, guest.id(), 8, &windows[0]);
    assert_eq!(alias(&sim, &dom0, at), Some(true));
    assert!(unmap(&dom0, &again).is_ok() && unmap(&dom0, &other).is_ok());
    assert!(sim.violations().is_empty(), "{:?}", sim.violations());
}

#[test]
fn only_a_direct_mapped_domain_has_it_and_not_for_its_own_pages() {
    let (sim, dom0, guest) = machine();
    let config = DomainConfig::guest();
    let other = sim.create(DomainConfig { features: config.features | IDENTITY, ..config });
    granted(&sim, &guest, other.id(), 8);
    let op = map(&other, guest.id(), 8, &other.window().unwrap());
    assert!(op.status.is_ok());
    assert_eq!(sim.p2m(other.id(), Gfn::of_address(op.dev_bus_addr)), None);
    let own = granted(&sim, &dom0, dom0.id(), 8);
    let op = map(&dom0, dom0.id(), 8, &dom0.window().unwrap());
    assert_eq!(sim.p2m(dom0.id(), own).unwrap().kind, P2mKind::Ram);
    assert!(!sim.ledger().to_string().contains("alias"));
    assert!(unmap(&dom0, &op).is_ok());
    assert_eq!(sim.p2m(dom0.id(), own).unwrap().kind, P2mKind::Ram);
    assert!(!sim.ledger().to_string().contains("alias"));
}

#[test]
fn what_is_anothers_cannot_be_granted_on_nor_be_an_end_of_a_copy() {
    let (sim, dom0, guest) = machine();
    let third = sim.create(DomainConfig::guest());
    granted(&sim, &guest, dom0.id(), 8);
    let window = dom0.window().unwrap();
    let op = map(&dom0, guest.id(), 8, &window);
    let at = Gfn::of_address(op.dev_bus_addr);
    assert_eq!(alias(&sim, &dom0, at), Some(true));
    let to = frame(&third);
    for foreign in [at, window.gfn()] {
        grant(&sim, &dom0, third.id(), 20, foreign);
        let mapped = map(&third, dom0.id(), 20, &third.window().unwrap());
        assert_eq!(mapped.status, GrantStatus::BAD_PAGE);
        assert_eq!(copy_in(&third, dom0.id(), 20, to), GrantStatus::BAD_PAGE);
        assert_eq!(copy_in(&dom0, guest.id(), 8, foreign), GrantStatus::BAD_PAGE);
        assert_eq!(sim.grant_users(dom0.id(), hypercall::GrantRef(20)), 0);
    }
    grant(&sim, &dom0, third.id(), 20, frame(&dom0));
    assert_eq!(copy_in(&third, dom0.id(), 20, to), GrantStatus::OKAY);
}

#[test]
fn a_domain_that_ends_leaves_no_alias() {
    let (sim, dom0, guest) = machine();
    granted(&sim, &guest, dom0.id(), 8);
    let op = map(&dom0, guest.id(), 8, &dom0.window().unwrap());
    sim.destroy(guest.id());
    assert!(sim.domains().contains(&guest.id()), "dom0 has a page of it");
    assert_eq!(alias(&sim, &dom0, Gfn::of_address(op.dev_bus_addr)), Some(true));
    assert!(unmap(&dom0, &op).is_ok());
    assert!(!sim.domains().contains(&guest.id()));
    assert_eq!(sim.p2m(dom0.id(), Gfn::of_address(op.dev_bus_addr)), None);
}

//! References that come to mean something else.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::{copy_in, frame, grant, map, map_to_read, unmap};
use hypercall::abi::GrantEntryV1;
use hypercall::{GrantRef, GrantStatus, Hypervisor};
use sim::{DomainConfig, GrantUse, Kind, Sim};

const GREF: GrantRef = GrantRef(8);

#[test]
fn a_generation_ends_when_somebody_sees_something_else() {
    let sim = Sim::new();
    let (dom0, guest) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    let (one, other, to) = (frame(&guest), frame(&guest), frame(&dom0));
    grant(&sim, &guest, dom0.id(), 8, one);
    sim.watch_grants(guest.id());
    let told = sim.grant_generation(guest.id(), GREF);
    assert!(copy_in(&dom0, guest.id(), 8, to).is_ok());
    let window = dom0.window().unwrap();
    let op = map(&dom0, guest.id(), 8, &window);
    assert!(unmap(&dom0, &op).is_ok());
    assert_eq!(sim.grant_generation(guest.id(), GREF), told, "use changes nothing");
    let uses = sim.grant_uses(guest.id());
    let made = |kind, read_only, status, generation| GrantUse {
        by: dom0.id(),
        gref: GREF,
        kind,
        read_only,
        status,
        generation,
    };
    let okay = GrantStatus::OKAY;
    assert_eq!(uses, [made(Kind::Copy, true, okay, told), made(Kind::Map, false, okay, told)]);
    // Reused for another frame: who still believes in the old meaning copies the wrong page, and Xen does not mind.
    grant(&sim, &guest, dom0.id(), 8, other);
    assert!(copy_in(&dom0, guest.id(), 8, to).is_ok());
    let uses = sim.grant_uses(guest.id());
    assert_eq!(uses, [made(Kind::Copy, true, okay, told + 1)], "but it shows");
    assert_eq!(sim.refused_grants(guest.id()), 0);
    // Closed.
    sim.set_grant_entry(guest.id(), GREF, GrantEntryV1::default());
    assert_eq!(copy_in(&dom0, guest.id(), 8, to), GrantStatus::GENERAL_ERROR);
    assert_eq!(sim.refused_grants(guest.id()), 1);
    grant(&sim, &guest, dom0.id(), 8, other);
    assert_eq!(sim.grant_generation(guest.id(), GREF), told + 3, "closed, seen so, and opened");
    // For another domain.
    grant(&sim, &guest, guest.id(), 8, other);
    assert_eq!(map_to_read(&dom0, guest.id(), 8, &window).status, GrantStatus::GENERAL_ERROR);
    assert_eq!(sim.refused_grants(guest.id()), 2);
    assert_eq!(copy_in(&dom0, guest.id(), 100_000, to), GrantStatus::BAD_GNTREF);
    assert_eq!(sim.refused_grants(guest.id()), 3);
    assert_eq!(sim.grant_uses(guest.id()).len(), 3);
    assert!(sim.grant_uses(guest.id()).is_empty());
    assert!(sim.grant_uses(dom0.id()).is_empty(), "nobody watches those");
}

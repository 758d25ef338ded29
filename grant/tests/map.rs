//! Mapping others' grants against a simulated Xen.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use grant::{
    ForeignPage, GrantTable, GrantedPage, MapError, MapOps, MapRequest, Mapper, Mapping,
    SharedMemory,
};
use hypercall::{DomId, Errno, Gfn, GrantRef, GrantStatus, Toolstack};
use sim::{DomainConfig, Fault, FaultPlan, Kind, Ledger, Sim, SimHv};

struct World {
    sim: Sim,
    backend: SimHv,
    guest: SimHv,
    mapper: Mapper<SimHv>,
    pages: Vec<GrantedPage<SimHv>>,
    /// Before any mapping.
    start: Ledger,
}

fn world(pages: usize, config: DomainConfig) -> World {
    let sim = Sim::new();
    let backend = sim.create(config);
    let guest = sim.create(DomainConfig::guest());
    let table = GrantTable::new(&guest).unwrap();
    let pages = (0..pages).map(|_| table.share(backend.id(), false).unwrap()).collect();
    let (mapper, start) = (Mapper::new(&backend), sim.ledger());
    World { sim, backend, guest, mapper, pages, start }
}

impl World {
    fn requests(&self) -> Vec<MapRequest> {
        let request = |page: &GrantedPage<SimHv>| MapRequest {
            domain: self.guest.id(),
            gref: page.gref(),
            read_only: false,
        };
        self.pages.iter().map(request).collect()
    }

    fn map_all(&self, requests: &[MapRequest]) -> Vec<Result<Mapping<SimHv>, MapError>> {
        let mut results = Vec::new();
        let mut ops = MapOps::new(requests.len());
        self.mapper.map_batch(&mut ops, requests.iter().copied(), |result| results.push(result));
        results
    }

    fn unmap_all(&self, mappings: Vec<Mapping<SimHv>>) -> usize {
        self.mapper.unmap_batch(&mut MapOps::new(mappings.len()), mappings)
    }

    fn assert_clean(&self) {
        assert_eq!(self.sim.ledger().since(&self.start).to_string(), "");
        assert_eq!(self.sim.violations(), Vec::<String>::new());
        assert_eq!((self.mapper.live(), self.mapper.parked()), (0, 0));
    }
}

#[test]
fn a_mapping_shows_the_granters_page_both_ways() {
    let w = world(3, DomainConfig::dom0());
    let mapped = w.map_all(&w.requests());
    let mappings: Vec<_> = mapped.into_iter().map(Result::unwrap).collect();
    assert_eq!(w.mapper.live(), 3);
    for (number, (page, mapping)) in (1..).zip(w.pages.iter().zip(&mappings)) {
        page.page().store_u32(8, number, Ordering::Relaxed);
        assert_eq!(mapping.page().load_u32(8, Ordering::Relaxed), number);
        mapping.page().store_u32(12, !number, Ordering::Relaxed);
        assert_eq!(page.page().load_u32(12, Ordering::Relaxed), !number);
        assert_eq!(w.sim.grant_users(w.guest.id(), page.gref()), 1);
    }
    let before = w.backend.hypercalls();
    assert_eq!(w.unmap_all(mappings), 0);
    let asked = w.backend.hypercalls() - before;
    assert_eq!((asked.calls(Kind::Unmap), asked.ops(Kind::Unmap)), (1, 3));
    w.assert_clean();
}

#[test]
fn hostile_82_what_fails_in_a_batch_takes_nothing_with_it() {
    let w = world(3, DomainConfig::dom0());
    let mut requests = w.requests();
    requests.insert(1, MapRequest { gref: GrantRef(100), ..requests[0] });
    requests.push(MapRequest { domain: DomId(9), ..requests[0] });
    w.sim.inject(w.backend.id(), FaultPlan::nth(Kind::Map, 2, Fault::Untouched));
    w.sim.inject(w.backend.id(), FaultPlan::nth(Kind::Map, 3, Fault::Status(GrantStatus(3))));
    let results = w.map_all(&requests);
    let outcome: Vec<_> = results.iter().map(|result| result.as_ref().err().copied()).collect();
    let refused = |status| Some(MapError::Refused(status));
    let expected = [
        None,
        refused(GrantStatus::GENERAL_ERROR),
        refused(GrantStatus::UNTOUCHED),
        refused(GrantStatus(3)),
        refused(GrantStatus::BAD_DOMAIN),
    ];
    assert_eq!(outcome, expected);
    assert_eq!(w.mapper.live(), 1);
    drop(results);
    w.assert_clean();
}

#[test]
fn without_windows_or_handles_the_rest_is_still_mapped() {
    let w = world(4, DomainConfig { windows: 3, maptrack: 2, ..DomainConfig::dom0() });
    let results = w.map_all(&w.requests());
    let outcome: Vec<_> = results.iter().map(|result| result.as_ref().err().copied()).collect();
    let full = Some(MapError::Refused(GrantStatus::NO_SPACE));
    assert_eq!(outcome, [None, None, full, Some(MapError::NoWindow)]);
    drop(results);
    w.assert_clean();
}

#[test]
fn a_call_that_fails_half_way_keeps_what_was_mapped() {
    let w = world(3, DomainConfig::dom0());
    w.sim.inject(w.backend.id(), FaultPlan::next(Kind::Map, Fault::Partial(1, Errno::FAULT)));
    let results = w.map_all(&w.requests());
    let outcome: Vec<_> = results.iter().map(|result| result.as_ref().err().copied()).collect();
    let failed = Some(MapError::Call(Errno::FAULT));
    assert_eq!(outcome, [None, failed, failed], "the first is mapped, and must be unmapped again");
    drop(results);
    w.assert_clean();
}

#[test]
fn hostile_83_what_cannot_be_unmapped_is_parked_with_its_window() {
    let w = world(2, DomainConfig { windows: 2, ..DomainConfig::dom0() });
    let mappings: Vec<_> = w.map_all(&w.requests()).into_iter().map(Result::unwrap).collect();
    let fault = Fault::Status(GrantStatus::GENERAL_ERROR);
    w.sim.inject(w.backend.id(), FaultPlan::nth(Kind::Unmap, 1, fault));
    assert_eq!(w.unmap_all(mappings), 1);
    assert_eq!((w.mapper.live(), w.mapper.parked()), (0, 1));
    let requests = w.requests();
    let one = w.mapper.map(requests[0]).unwrap();
    assert_eq!(w.mapper.map(requests[1]).err(), Some(MapError::NoWindow), "never mapped over");
    w.sim.inject(w.backend.id(), FaultPlan::next(Kind::Unmap, Fault::Errno(Errno::FAULT)));
    drop(one);
    assert_eq!((w.mapper.live(), w.mapper.parked()), (0, 2));
    assert_eq!(w.sim.ledger().held_by(w.backend.id()).mappings().len(), 2);
    assert_eq!(w.sim.violations(), Vec::<String>::new());
}

#[test]
fn an_unmap_that_fails_half_way_parks_only_the_rest() {
    let w = world(3, DomainConfig::dom0());
    let mappings: Vec<_> = w.map_all(&w.requests()).into_iter().map(Result::unwrap).collect();
    let fault = Fault::Partial(2, Errno::FAULT);
    w.sim.inject(w.backend.id(), FaultPlan::next(Kind::Unmap, fault));
    assert_eq!(w.unmap_all(mappings), 1);
    assert_eq!(w.sim.ledger().mappings().len(), 1);
    assert_eq!(w.sim.violations(), Vec::<String>::new());
}

#[test]
fn a_read_only_grant_is_mapped_for_reading_only() {
    let w = world(0, DomainConfig::dom0());
    let table = GrantTable::new(&w.guest).unwrap();
    let page = table.share(w.backend.id(), true).unwrap();
    let request = MapRequest { domain: w.guest.id(), gref: page.gref(), read_only: false };
    let refused = MapError::Refused(GrantStatus::GENERAL_ERROR);
    assert_eq!(w.mapper.map(request).err(), Some(refused));
    let mapping = w.mapper.map(MapRequest { read_only: true, ..request }).unwrap();
    page.page().write_bytes(0, b"read me");
    let mut seen = [0; 7];
    mapping.page().read_bytes(0, &mut seen);
    assert_eq!(&seen, b"read me");
    drop(mapping);
    drop(page);
    w.assert_clean();
}

#[test]
fn a_destroyed_granter_lasts_until_its_pages_are_unmapped() {
    let w = world(2, DomainConfig::dom0());
    let requests = w.requests();
    let mapping = w.mapper.map(requests[0]).unwrap();
    w.pages[0].page().write_bytes(0, b"last words");
    assert!(w.sim.destroy(w.guest.id()));
    assert_eq!(w.sim.domains(), [w.backend.id(), w.guest.id()], "a zombie");
    let mut seen = [0; 10];
    mapping.page().read_bytes(0, &mut seen);
    assert_eq!(&seen, b"last words");
    assert!(w.mapper.map(requests[1]).is_err());
    drop(mapping);
    assert_eq!(w.sim.domains(), [w.backend.id()]);
    assert_eq!(w.mapper.map(requests[1]).err(), Some(MapError::Refused(GrantStatus::BAD_DOMAIN)));
    assert_eq!(w.sim.violations(), Vec::<String>::new());
}

#[test]
fn a_foreign_page_is_the_other_domains() {
    let w = world(0, DomainConfig::dom0());
    let frame = Gfn(0x3_9000);
    let missing = ForeignPage::map(&w.backend, w.guest.id(), frame);
    assert_eq!(missing.err(), Some(MapError::Call(Errno::INVAL)));
    w.backend.populate(w.guest.id(), frame).unwrap();
    let page = ForeignPage::map(&w.backend, w.guest.id(), frame).unwrap();
    page.page().write_bytes(100, b"for the guest");
    let mut seen = [0; 13];
    assert!(w.sim.read(w.guest.id(), frame, 100, &mut seen));
    assert_eq!(&seen, b"for the guest");
    drop(page);
    w.assert_clean();
    let page = ForeignPage::map(&w.backend, w.guest.id(), frame).unwrap();
    w.sim.inject(w.backend.id(), FaultPlan::next(Kind::UnmapForeign, Fault::Errno(Errno::FAULT)));
    drop(page);
    assert_eq!(w.sim.ledger().mappings().len(), 1, "kept, and its window with it");
    assert_eq!(w.sim.violations(), Vec::<String>::new());
}

#[test]
fn what_does_not_fit_one_call_takes_several() {
    let w = world(5, DomainConfig { windows: 4, ..DomainConfig::dom0() });
    let before = w.backend.hypercalls();
    let mut ops = MapOps::new(2);
    let mut mappings = Vec::new();
    w.sim.inject(w.backend.id(), FaultPlan::nth(Kind::Map, 1, Fault::Errno(Errno::FAULT)));
    let mut failed = Vec::new();
    w.mapper.map_batch(&mut ops, w.requests(), |result| match result {
        Ok(mapping) => mappings.push(mapping),
        Err(error) => failed.push(error),
    });
    assert_eq!(failed, [MapError::Call(Errno::FAULT); 2], "the second call's two");
    assert_eq!(mappings.len(), 3);
    let fault = Fault::Status(GrantStatus::GENERAL_ERROR);
    w.sim.inject(w.backend.id(), FaultPlan::nth(Kind::Unmap, 2, fault));
    let mut ends = Vec::new();
    w.mapper.unmap_each(&mut ops, mappings, |end| ends.push(end));
    assert_eq!(ends, [Ok(()), Ok(()), Err(GrantStatus::GENERAL_ERROR)]);
    let asked = w.backend.hypercalls() - before;
    assert_eq!((asked.calls(Kind::Map), asked.ops(Kind::Map)), (3, 5));
    assert_eq!((asked.calls(Kind::Unmap), asked.ops(Kind::Unmap)), (2, 3));
    assert_eq!((w.mapper.live(), w.mapper.parked()), (0, 1));
    assert_eq!(w.sim.violations(), Vec::<String>::new());
}

#[test]
fn hostile_82_the_good_ones_of_a_batch_are_unmapped_in_one_call() {
    let w = world(4, DomainConfig::dom0());
    w.sim.inject(w.backend.id(), FaultPlan::nth(Kind::Map, 2, Fault::Status(GrantStatus::EAGAIN)));
    let good: Vec<_> = w.map_all(&w.requests()).into_iter().flatten().collect();
    assert_eq!(good.len(), 3);
    let before = w.backend.hypercalls();
    assert_eq!(w.unmap_all(good), 0);
    let asked = w.backend.hypercalls() - before;
    assert_eq!((asked.calls(Kind::Unmap), asked.ops(Kind::Unmap)), (1, 3));
    w.assert_clean();
}

#[test]
fn hostile_83_what_is_parked_is_unmapped_later_if_xen_will() {
    let w = world(3, DomainConfig { windows: 3, ..DomainConfig::dom0() });
    let mappings: Vec<_> = w.map_all(&w.requests()).into_iter().map(Result::unwrap).collect();
    w.sim.inject(w.backend.id(), FaultPlan::next(Kind::Unmap, Fault::Errno(Errno::FAULT)));
    assert_eq!(w.unmap_all(mappings), 3);
    let mut ops = MapOps::new(2);
    let fault = Fault::Status(GrantStatus::GENERAL_ERROR);
    w.sim.inject(w.backend.id(), FaultPlan::next(Kind::Unmap, fault));
    assert_eq!(w.mapper.retry_parked(&mut ops), 1, "of two that fit");
    assert_eq!((w.mapper.live(), w.mapper.parked()), (0, 2));
    assert!(w.mapper.map(w.requests()[0]).is_ok(), "its space is free again");
    assert_eq!(w.mapper.retry_parked(&mut ops), 2);
    let before = w.backend.hypercalls();
    assert_eq!(w.mapper.retry_parked(&mut ops), 0);
    assert_eq!(w.backend.hypercalls(), before, "nothing to try");
    w.assert_clean();
}

#[test]
fn hostile_83_what_is_parked_is_not_tried_for_ever() {
    let mut ops = MapOps::new(4);
    for (status, tries) in [(GrantStatus::GENERAL_ERROR, 9), (GrantStatus::BAD_HANDLE, 1)] {
        let w = world(1, DomainConfig { windows: 1, ..DomainConfig::dom0() });
        let mapping = w.mapper.map(w.requests()[0]).unwrap();
        let before = w.backend.hypercalls();
        w.sim.inject(w.backend.id(), FaultPlan::every(Kind::Unmap, Fault::Status(status)));
        drop(mapping);
        for _ in 0..20 {
            assert_eq!(w.mapper.retry_parked(&mut ops), 0);
        }
        assert_eq!((w.backend.hypercalls() - before).ops(Kind::Unmap), tries, "{status}");
        assert_eq!((w.mapper.live(), w.mapper.parked()), (0, 1), "and still counted");
        let lost = w.mapper.map(w.requests()[0]).err();
        assert_eq!(lost, Some(MapError::NoWindow), "never mapped over");
        assert_eq!(w.sim.violations(), Vec::<String>::new());
    }
}

#[test]
fn hostile_83_no_more_than_some_are_kept_to_be_tried_again() {
    let w = world(80, DomainConfig { windows: 80, ..DomainConfig::dom0() });
    let mappings: Vec<_> = w.map_all(&w.requests()).into_iter().map(Result::unwrap).collect();
    w.sim.inject(w.backend.id(), FaultPlan::next(Kind::Unmap, Fault::Errno(Errno::FAULT)));
    assert_eq!(w.unmap_all(mappings), 80);
    assert_eq!(w.mapper.retry_parked(&mut MapOps::new(100)), 64);
    assert_eq!(w.mapper.parked(), 16, "lost, and counted");
    assert_eq!(w.sim.ledger().held_by(w.backend.id()).mappings().len(), 16);
    assert_eq!(w.sim.violations(), Vec::<String>::new());
}

//! Grant copy without `GNTTABOP_copy`: what Xen's own copy would have done, by mapping.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::num::NonZeroUsize;

use grant::{
    BufferSize, CopyOps, CopyRange, Frame, FramePool, GrantTable, GrantedPage, MapOps, Mapper,
    PeerSpan, SharedMemory,
};
use hypercall::{DomId, Errno, GrantRef, GrantStatus, PAGE_SIZE, PageOffset};
use sim::{DomainConfig, Fault, FaultPlan, Kind, Ledger, Sim, SimHv};

struct World {
    sim: Sim,
    backend: SimHv,
    guest: DomId,
    /// The first half is granted to be written, the second to be read.
    pages: Vec<GrantedPage<SimHv>>,
    pool: FramePool<SimHv>,
    mapper: Mapper<SimHv>,
    start: Ledger,
}

fn some(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

fn world(config: DomainConfig) -> World {
    let sim = Sim::new();
    let (backend, guest) = (sim.create(config), sim.create(DomainConfig::guest()));
    let table = GrantTable::new(&guest).unwrap();
    let pages: Vec<_> = (0..8).map(|n| table.share(backend.id(), n >= 4).unwrap()).collect();
    for (page, seed) in pages.iter().zip(0..) {
        page.page().write_bytes(0, &pattern(PAGE_SIZE, seed));
    }
    let pool = FramePool::new(&backend, some(4), BufferSize::Pages(some(2)));
    let (mapper, guest) = (Mapper::new(&backend), guest.id());
    let start = sim.ledger();
    World { sim, backend, guest, pages, pool, mapper, start }
}

impl World {
    fn ops(&self) -> CopyOps {
        CopyOps::by_mapping(16, &self.mapper)
    }

    fn at(&self, page: usize, offset: u16) -> PeerSpan {
        let gref = self.pages.get(page).map_or(GrantRef(500 + page as u32), GrantedPage::gref);
        PeerSpan { domain: self.guest, gref, offset: PageOffset::new(offset).unwrap() }
    }

    /// Pulls 16 bytes from each of these pages into a frame, one after the other.
    fn pull(
        &self,
        ops: &mut CopyOps,
        frame: &mut Frame<SimHv>,
        pages: &[usize],
    ) -> Result<(Vec<Result<(), GrantStatus>>, usize), Errno> {
        let mut batch = ops.begin();
        let mut rest = Some(frame.span_mut());
        let mut pull = |page: &usize| {
            let (to, more) = rest.take().unwrap().split_at(16);
            rest = Some(more);
            batch.pull(self.at(*page, 100), to).unwrap()
        };
        let ranges: Vec<_> = pages.iter().map(&mut pull).collect();
        let results = batch.submit(&self.backend)?;
        Ok((ranges.into_iter().map(|range| results.of(range)).collect(), results.parked()))
    }

    fn assert_clean(&self) {
        assert_eq!(self.sim.ledger().since(&self.start).to_string(), "");
        assert_eq!(self.sim.violations(), Vec::<String>::new());
        assert_eq!((self.mapper.live(), self.mapper.parked()), (0, 0));
    }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251 + seed * 77) as u8).collect()
}

/// A small generator, the same on every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) as usize % end
    }
}

/// A random batch; answers how each copy ended, and what is in the frames and the peer's pages after it.
fn random_batch(w: &World, mut ops: CopyOps, seed: u64) -> (Vec<Result<(), GrantStatus>>, Vec<u8>) {
    let mut numbers = Numbers(seed);
    let mut frames: Vec<_> = std::iter::from_fn(|| w.pool.take()).collect();
    for (frame, seed) in frames.iter_mut().zip(50..) {
        frame.bytes_mut().copy_from_slice(&pattern(2 * PAGE_SIZE, seed));
    }
    let (into, from) = frames.split_at_mut(2);
    let mut batch = ops.begin();
    let mut targets: Vec<_> = into.iter_mut().map(|frame| Some(frame.span_mut())).collect();
    let mut ranges: Vec<CopyRange> = Vec::new();
    for _ in 0..12 {
        let offset = numbers.below(PAGE_SIZE);
        let len = numbers.below((PAGE_SIZE - offset).min(1500)) + 1;
        // Some references are of nothing, and some pages may only be read.
        let page = numbers.below(9);
        let peer = w.at(page, offset as u16);
        let range = match numbers.below(3) {
            0 => {
                let target = &mut targets[numbers.below(2)];
                let (_, rest) = target.take().unwrap().split_at(numbers.below(900));
                let (to, rest) = rest.split_at(len);
                *target = Some(rest);
                batch.pull(peer, to)
            }
            1 => {
                let (_, rest) = from[numbers.below(2)].span().split_at(numbers.below(6000));
                batch.deliver(rest.split_at(len).0, peer)
            }
            _ => {
                let to_offset = numbers.below(PAGE_SIZE - len + 1).min(PAGE_SIZE - 1);
                // Another page: of a copy onto itself, a part is as good as another.
                let to = (page + 1 + numbers.below(8)) % 9;
                batch.relay(peer, w.at(to, to_offset as u16), len as u16)
            }
        };
        ranges.extend(range);
    }
    let results = batch.submit(&w.backend).unwrap();
    let ends = ranges.into_iter().map(|range| results.of(range)).collect();
    let mut bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.bytes().to_vec()).collect();
    for page in &w.pages {
        let mut own = vec![0; PAGE_SIZE];
        page.page().read_bytes(0, &mut own);
        bytes.extend(own);
    }
    (ends, bytes)
}

#[test]
fn it_does_what_xen_would_have_done() {
    for seed in 0..40 {
        let (by_xen, by_mapping) = (world(DomainConfig::dom0()), world(DomainConfig::dom0()));
        let expected = random_batch(&by_xen, CopyOps::new(16), seed);
        let got = random_batch(&by_mapping, by_mapping.ops(), seed);
        assert_eq!(got.0, expected.0, "seed {seed}");
        assert!(got.1 == expected.1, "seed {seed}");
        assert!(got.0.iter().any(Result::is_ok));
        assert_eq!(by_mapping.backend.hypercalls().calls(Kind::Copy), 0);
        by_mapping.assert_clean();
    }
}

#[test]
fn a_batch_is_one_call_to_map_and_one_to_unmap() {
    let w = world(DomainConfig::dom0());
    let mut frame = w.pool.take().unwrap();
    let mut ops = w.ops();
    for _ in 0..3 {
        let before = w.backend.hypercalls();
        let (ends, parked) = w.pull(&mut ops, &mut frame, &[0, 0, 1, 4, 4, 4]).unwrap();
        assert_eq!((ends, parked), (vec![Ok(()); 6], 0));
        let asked = w.backend.hypercalls() - before;
        assert_eq!((asked.calls(Kind::Map), asked.ops(Kind::Map)), (1, 3), "each page once");
        assert_eq!((asked.calls(Kind::Unmap), asked.ops(Kind::Unmap)), (1, 3));
        w.assert_clean();
    }
    let before = w.backend.hypercalls();
    ops.begin().submit(&w.backend).unwrap();
    assert_eq!(w.backend.hypercalls(), before, "nothing to do");
}

#[test]
fn where_there_is_little_space_a_batch_takes_rounds() {
    let w = world(DomainConfig { windows: 2, ..DomainConfig::dom0() });
    let mut frame = w.pool.take().unwrap();
    let mut ops = w.ops();
    let before = w.backend.hypercalls();
    let (ends, _) = w.pull(&mut ops, &mut frame, &[0, 1, 2, 3, 4]).unwrap();
    assert_eq!(ends, vec![Ok(()); 5]);
    for (page, got) in frame.bytes().chunks(16).take(5).enumerate() {
        assert_eq!(got, &pattern(PAGE_SIZE, page)[100..116]);
    }
    assert_eq!((w.backend.hypercalls() - before).calls(Kind::Map), 3);
    let held = w.mapper.map(grant::MapRequest {
        domain: w.guest,
        gref: w.pages[0].gref(),
        read_only: true,
    });
    let mut batch = ops.begin();
    let relay = batch.relay(w.at(4, 0), w.at(0, 0), 8).unwrap();
    let pull = batch.pull(w.at(4, 100), frame.span_mut().split_at(16).0).unwrap();
    let results = batch.submit(&w.backend).unwrap();
    assert_eq!(results.of(relay), Err(GrantStatus::NO_SPACE), "two pages, and space for one");
    assert_eq!(results.of(pull), Ok(()));
    drop(held);
    w.assert_clean();
}

#[test]
fn a_call_that_fails_means_no_copy_counts_and_nothing_stays_mapped() {
    let w = world(DomainConfig::dom0());
    let mut frame = w.pool.take().unwrap();
    let mut ops = w.ops();
    for fault in [Fault::Errno(Errno::NOSYS), Fault::Partial(2, Errno::NOSYS)] {
        w.sim.inject(w.backend.id(), FaultPlan::next(Kind::Map, fault));
        assert_eq!(w.pull(&mut ops, &mut frame, &[0, 1, 2, 3]).err(), Some(Errno::NOSYS));
        w.assert_clean();
    }
    assert_eq!(w.pull(&mut ops, &mut frame, &[0]).unwrap().0, [Ok(())]);
}

#[test]
fn hostile_82_a_page_that_cannot_be_mapped_is_not_copied_and_the_others_are_unmapped() {
    let faults = [
        (Fault::Status(GrantStatus::NO_DEVICE_SPACE), GrantStatus::NO_DEVICE_SPACE),
        (Fault::Status(GrantStatus::EAGAIN), GrantStatus::EAGAIN),
        (Fault::Status(GrantStatus(1)), GrantStatus(1)),
        (Fault::Untouched, GrantStatus::UNTOUCHED),
    ];
    let w = world(DomainConfig::dom0());
    let mut ops = w.ops();
    for (fault, status) in faults {
        let mut frame = w.pool.take().unwrap();
        frame.bytes_mut().fill(0xaa);
        w.sim.inject(w.backend.id(), FaultPlan::nth(Kind::Map, 1, fault));
        let (ends, parked) = w.pull(&mut ops, &mut frame, &[0, 1, 2]).unwrap();
        assert_eq!((ends, parked), (vec![Ok(()), Err(status), Ok(())], 0));
        assert_eq!(frame.bytes()[..16], pattern(PAGE_SIZE, 0)[100..116]);
        assert_eq!(frame.bytes()[16..32], [0xaa; 16], "not touched");
        assert_eq!(frame.bytes()[32..48], pattern(PAGE_SIZE, 2)[100..116]);
        w.assert_clean();
    }
    // Either end of a relay.
    for failing in 0..2 {
        let mut batch = ops.begin();
        let range = batch.relay(w.at(4, 0), w.at(0, 0), 8).unwrap();
        let fault = Fault::Status(GrantStatus::EAGAIN);
        w.sim.inject(w.backend.id(), FaultPlan::nth(Kind::Map, failing, fault));
        let results = batch.submit(&w.backend).unwrap();
        assert_eq!(results.of(range), Err(GrantStatus::EAGAIN));
        w.assert_clean();
    }
}

#[test]
fn hostile_83_a_page_that_cannot_be_unmapped_is_parked_and_told_of() {
    let w = world(DomainConfig { windows: 3, ..DomainConfig::dom0() });
    let mut frame = w.pool.take().unwrap();
    let mut ops = w.ops();
    let fault = Fault::Status(GrantStatus::GENERAL_ERROR);
    w.sim.inject(w.backend.id(), FaultPlan::nth(Kind::Unmap, 1, fault));
    let (ends, parked) = w.pull(&mut ops, &mut frame, &[0, 1, 2]).unwrap();
    assert_eq!((ends, parked), (vec![Ok(()); 3], 1), "copied all the same");
    assert_eq!((w.mapper.live(), w.mapper.parked()), (0, 1));
    // The window is out of use, so three pages take two rounds.
    let before = w.backend.hypercalls();
    let (ends, parked) = w.pull(&mut ops, &mut frame, &[0, 2, 3]).unwrap();
    assert_eq!((ends, parked), (vec![Ok(()); 3], 0));
    assert_eq!((w.backend.hypercalls() - before).calls(Kind::Map), 2);
    assert_eq!(w.mapper.retry_parked(&mut MapOps::new(4)), 1);
    w.assert_clean();
}

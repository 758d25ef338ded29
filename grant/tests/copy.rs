//! Grant copy against a simulated Xen: the right bytes, one hypercall, and every way to fail.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::num::NonZeroUsize;

use grant::{
    BufferSize, CopyError, CopyOps, CopyRange, FramePool, GrantTable, PeerSpan, SharedMemory,
    copy_is_missing,
};
use hypercall::{DomId, Errno, GrantRef, GrantStatus, PAGE_SIZE, PageOffset};
use sim::{DomainConfig, Fault, FaultPlan, Kind, Sim, SimHv};

struct World {
    sim: Sim,
    backend: SimHv,
    guest: SimHv,
    table: GrantTable<SimHv>,
    pool: FramePool<SimHv>,
}

fn some(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

fn world() -> World {
    let sim = Sim::new();
    let backend = sim.create(DomainConfig::dom0());
    let guest = sim.create(DomainConfig::guest());
    let table = GrantTable::new(&guest).unwrap();
    let pool = FramePool::new(&backend, some(4), BufferSize::Pages(some(3)));
    World { sim, backend, guest, table, pool }
}

fn at(domain: DomId, gref: GrantRef, offset: u16) -> PeerSpan {
    PeerSpan { domain, gref, offset: PageOffset::new(offset).unwrap() }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251 + seed) as u8).collect()
}

#[test]
fn pull_splits_at_our_page_boundaries_and_touches_nothing_else() {
    let w = world();
    let page = w.table.share(w.backend.id(), true).unwrap();
    let bytes = pattern(PAGE_SIZE, 7);
    page.page().write_bytes(0, &bytes);
    let mut frame = w.pool.take().unwrap();
    frame.bytes_mut().fill(0xaa);
    let before = w.backend.hypercalls();
    let mut ops = CopyOps::new(4);
    let mut batch = ops.begin();
    let (_, rest) = frame.span_mut().split_at(4000);
    let (target, _) = rest.split_at(2001);
    let range = batch.pull(at(w.guest.id(), page.gref(), 1003), target).unwrap();
    assert_eq!(range.len(), 2, "the buffer's page ends in the middle");
    batch.submit(&w.backend).unwrap().of(range).unwrap();
    assert_eq!(frame.bytes()[4000..6001], bytes[1003..3004]);
    assert!(frame.bytes()[..4000].iter().chain(&frame.bytes()[6001..]).all(|byte| *byte == 0xaa));
    let asked = w.backend.hypercalls() - before;
    assert_eq!((asked.calls(Kind::Copy), asked.ops(Kind::Copy)), (1, 2));
    assert_eq!(asked.bytes_copied(), 2001);
    assert!(w.sim.violations().is_empty());
}

#[test]
fn deliver_writes_the_peers_page_and_only_if_it_may() {
    let w = world();
    let open = w.table.share(w.backend.id(), false).unwrap();
    let read_only = w.table.share(w.backend.id(), true).unwrap();
    let mut frame = w.pool.take().unwrap();
    let bytes = pattern(PAGE_SIZE * 3, 1);
    frame.bytes_mut().copy_from_slice(&bytes);
    let mut ops = CopyOps::new(8);
    let mut batch = ops.begin();
    let (_, rest) = frame.span().split_at(8000);
    let (source, _) = rest.split_at(4000);
    let good = batch.deliver(source, at(w.guest.id(), open.gref(), 96)).unwrap();
    let bad = batch.deliver(source, at(w.guest.id(), read_only.gref(), 0)).unwrap();
    let results = batch.submit(&w.backend).unwrap();
    assert_eq!(results.of(good), Ok(()));
    assert_eq!(results.of(bad), Err(GrantStatus::GENERAL_ERROR));
    let mut got = vec![0; 4000];
    open.page().read_bytes(96, &mut got);
    assert_eq!(got, bytes[8000..12000]);
    read_only.page().read_bytes(0, &mut got);
    assert!(got.iter().all(|byte| *byte == 0), "nothing was written");
    assert_eq!(w.sim.grant_users(w.guest.id(), open.gref()), 0);
    assert_eq!(w.sim.grant_entry(w.guest.id(), open.gref()).unwrap().flags, 1, "marks are gone");
}

#[test]
fn relay_goes_from_guest_to_guest_without_our_memory() {
    let w = world();
    let other = w.sim.create(DomainConfig::guest());
    let others = GrantTable::new(&other).unwrap();
    let from = w.table.share(w.backend.id(), true).unwrap();
    let to = others.share(w.backend.id(), false).unwrap();
    let bytes = pattern(1500, 3);
    from.page().write_bytes(64, &bytes);
    let mut ops = CopyOps::new(1);
    let mut batch = ops.begin();
    let source = at(w.guest.id(), from.gref(), 64);
    let dest = at(other.id(), to.gref(), 2000);
    assert_eq!(batch.relay(source, dest, 2097), Err(CopyError::CrossesPage));
    let range = batch.relay(source, dest, 1500).unwrap();
    assert_eq!(batch.relay(source, dest, 1), Err(CopyError::Full));
    batch.submit(&w.backend).unwrap().of(range).unwrap();
    let mut got = vec![0; 1500];
    to.page().read_bytes(2000, &mut got);
    assert_eq!(got, bytes);
}

#[test]
fn what_xen_refuses_fails_alone() {
    let w = world();
    let mine = w.table.share(w.backend.id(), true).unwrap();
    let not_mine = w.table.share(DomId(5), true).unwrap();
    let ended = w.table.share(w.backend.id(), true).unwrap();
    let ended_ref = ended.gref();
    drop(ended);
    let elsewhere = w.table.share(w.backend.id(), true).unwrap();
    let mut entry = w.sim.grant_entry(w.guest.id(), elsewhere.gref()).unwrap();
    entry.frame += 1;
    assert!(w.sim.set_grant_entry(w.guest.id(), elsewhere.gref(), entry));
    let guest = w.guest.id();
    let cases = [
        (at(guest, mine.gref(), 0), Ok(())),
        (at(guest, not_mine.gref(), 0), Err(GrantStatus::GENERAL_ERROR)),
        (at(guest, ended_ref, 0), Err(GrantStatus::GENERAL_ERROR)),
        (at(guest, GrantRef(512), 0), Err(GrantStatus::BAD_GNTREF)),
        (at(guest, GrantRef(u32::MAX), 0), Err(GrantStatus::BAD_GNTREF)),
        (at(DomId(77), mine.gref(), 0), Err(GrantStatus::BAD_DOMAIN)),
        (at(guest, elsewhere.gref(), 0), Err(GrantStatus::BAD_PAGE)),
        (at(guest, mine.gref(), 4095), Ok(())),
    ];
    let mut frame = w.pool.take().unwrap();
    let mut ops = CopyOps::new(cases.len());
    let mut batch = ops.begin();
    let mut rest = Some(frame.span_mut());
    let ranges = cases.map(|(from, _)| {
        let (one, more) = rest.take().unwrap().split_at(1);
        rest = Some(more);
        batch.pull(from, one).unwrap()
    });
    let results = batch.submit(&w.backend).unwrap();
    for (range, (from, expected)) in ranges.into_iter().zip(cases) {
        assert_eq!(results.of(range), expected, "{from:?}");
    }
}

#[test]
fn only_status_0_of_a_looked_at_operation_is_success() {
    let w = world();
    let page = w.table.share(w.backend.id(), true).unwrap();
    let from = at(w.guest.id(), page.gref(), 0);
    let faults = [
        (Fault::Untouched, GrantStatus::UNTOUCHED),
        (Fault::Status(GrantStatus(1)), GrantStatus(1)),
        (Fault::Status(GrantStatus::EAGAIN), GrantStatus::EAGAIN),
        (Fault::Status(GrantStatus(-99)), GrantStatus(-99)),
    ];
    for (fault, expected) in faults {
        let (mut a, mut b, mut c) =
            (w.pool.take().unwrap(), w.pool.take().unwrap(), w.pool.take().unwrap());
        let mut ops = CopyOps::new(3);
        let mut batch = ops.begin();
        let ranges = [&mut a, &mut b, &mut c]
            .map(|to| batch.pull(from, to.span_mut().split_at(64).0).unwrap());
        w.sim.inject(w.backend.id(), FaultPlan::nth(Kind::Copy, 1, fault));
        let results = batch.submit(&w.backend).unwrap();
        assert_eq!(ranges.map(|range| results.of(range)), [Ok(()), Err(expected), Ok(())]);
        let all = ranges.into_iter().fold(CopyRange::default(), CopyRange::with);
        assert_eq!(results.of(all), Err(expected), "together they failed");
        assert_eq!(w.sim.faults_left(w.backend.id()), 0);
    }
}

#[test]
fn a_failed_call_means_no_copy_counts_and_the_room_can_be_used_again() {
    let w = world();
    let page = w.table.share(w.backend.id(), true).unwrap();
    let from = at(w.guest.id(), page.gref(), 0);
    let mut frame = w.pool.take().unwrap();
    let mut ops = CopyOps::new(2);
    for fault in [Fault::Errno(Errno::NOSYS), Fault::Partial(1, Errno::NOSYS)] {
        let mut batch = ops.begin();
        let (a, rest) = frame.span_mut().split_at(8);
        batch.pull(from, a).unwrap();
        batch.pull(from, rest.split_at(8).0).unwrap();
        w.sim.inject(w.backend.id(), FaultPlan::next(Kind::Copy, fault));
        assert_eq!(batch.submit(&w.backend).err(), Some(Errno::NOSYS));
    }
    let mut batch = ops.begin();
    let range = batch.pull(from, frame.span_mut().split_at(8).0).unwrap();
    batch.submit(&w.backend).unwrap().of(range).unwrap();
}

#[test]
fn a_copy_that_does_not_fit_leaves_the_batch_as_it_was() {
    let w = world();
    let page = w.table.share(w.backend.id(), true).unwrap();
    let mut frame = w.pool.take().unwrap();
    let mut ops = CopyOps::new(1);
    let before = w.backend.hypercalls();
    {
        let mut batch = ops.begin();
        let (first, rest) = frame.span_mut().split_at(100);
        let crossing = batch.pull(at(w.guest.id(), page.gref(), 3997), first);
        assert_eq!(crossing, Err(CopyError::CrossesPage));
        let (_, rest) = rest.split_at(3990);
        let two_pages = batch.pull(at(w.guest.id(), page.gref(), 0), rest.split_at(100).0);
        assert_eq!(two_pages, Err(CopyError::Full), "needs two operations");
        assert!(batch.is_empty());
        batch.submit(&w.backend).unwrap();
    }
    assert_eq!(w.backend.hypercalls(), before, "an empty batch is no hypercall");
}

#[test]
fn a_range_of_a_longer_batch_is_no_success() {
    let w = world();
    let page = w.table.share(w.backend.id(), true).unwrap();
    let from = at(w.guest.id(), page.gref(), 0);
    let mut ops = CopyOps::new(2);
    let mut frame = w.pool.take().unwrap();
    let second = {
        let mut batch = ops.begin();
        let (a, b) = frame.span_mut().split_at(16);
        batch.pull(from, a).unwrap();
        batch.pull(from, b.split_at(16).0).unwrap()
    };
    let mut batch = ops.begin();
    batch.pull(from, frame.span_mut().split_at(16).0).unwrap();
    assert_eq!(batch.submit(&w.backend).unwrap().of(second), Err(GrantStatus::UNTOUCHED));
}

#[test]
fn a_pool_hands_out_each_buffer_once_and_gives_all_back() {
    let sim = Sim::new();
    let dom = sim.create(DomainConfig::guest());
    let before = sim.ledger();
    {
        let pool = FramePool::new(&dom, some(3), BufferSize::Pages(some(2)));
        assert_eq!((pool.total(), pool.free()), (3, 3));
        let mut frames: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(frames.len(), 3);
        for (seed, frame) in frames.iter_mut().enumerate() {
            assert_eq!(frame.size(), 2 * PAGE_SIZE);
            frame.bytes_mut().copy_from_slice(&pattern(2 * PAGE_SIZE, seed));
        }
        for (seed, frame) in frames.iter().enumerate() {
            assert_eq!(frame.bytes(), pattern(2 * PAGE_SIZE, seed), "buffers do not overlap");
        }
        frames.pop();
        assert_eq!(pool.free(), 1);
        drop(pool);
        assert_eq!(sim.ledger().len(), before.len() + 3, "frames that are out keep the pool");
    }
    assert_eq!(sim.ledger().since(&before).to_string(), "");
    assert!(sim.violations().is_empty());
}

#[test]
fn parts_of_a_page_share_it_and_do_not_overlap() {
    const EACH: usize = PAGE_SIZE / BufferSize::PART;
    let w = world();
    let before = w.sim.ledger();
    let pool = FramePool::new(&w.backend, some(2 * EACH + 1), BufferSize::Part);
    assert_eq!(w.sim.ledger().len(), before.len() + 3, "pages");
    let mut frames: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
    assert_eq!(frames.len(), 2 * EACH + 1);
    frames.sort_by_key(|frame| (frame.gfn(), frame.offset()));
    let shared = frames.chunk_by(|a, b| a.gfn() == b.gfn()).map(|page| {
        let offsets = page.iter().map(|frame| usize::from(frame.offset().get()));
        assert!(offsets.eq((0..).step_by(BufferSize::PART).take(page.len())));
        page.len()
    });
    let mut shared: Vec<_> = shared.collect();
    shared.sort_unstable();
    assert_eq!(shared, [1, EACH, EACH]);
    // Xen writes where the buffer is, and nowhere else.
    let page = w.table.share(w.backend.id(), true).unwrap();
    page.page().write_bytes(0, &pattern(PAGE_SIZE, 9));
    let mut ops = CopyOps::new(frames.len());
    let mut batch = ops.begin();
    for (number, frame) in frames.iter_mut().enumerate() {
        frame.bytes_mut().fill(0xaa);
        let (to, _) = frame.span_mut().split_at(BufferSize::PART - number);
        batch.pull(at(w.guest.id(), page.gref(), number as u16), to).unwrap();
    }
    batch.submit(&w.backend).unwrap();
    for (number, frame) in frames.iter().enumerate() {
        let (filled, rest) = frame.bytes().split_at(BufferSize::PART - number);
        assert_eq!(filled, &pattern(PAGE_SIZE, 9)[number..BufferSize::PART]);
        assert!(rest.iter().all(|byte| *byte == 0xaa));
    }
    drop((frames, pool, page));
    assert_eq!(w.sim.ledger().since(&before).to_string(), "");
    assert!(w.sim.violations().is_empty(), "each page is freed once");
}

#[test]
fn a_pool_makes_do_with_the_memory_there_is() {
    let sim = Sim::new();
    let dom = sim.create(DomainConfig { pages: 5, ..DomainConfig::guest() });
    let pool = FramePool::new(&dom, some(4), BufferSize::Pages(some(2)));
    assert_eq!((pool.total(), pool.free()), (2, 2));
}

#[test]
fn a_missing_copy_is_told_from_one_that_fails() {
    let w = world();
    assert!(!copy_is_missing(&w.backend));
    for (errno, missing) in [(Errno::NOSYS, true), (Errno::FAULT, false), (Errno::PERM, false)] {
        w.sim.inject(w.backend.id(), FaultPlan::next(Kind::Copy, Fault::Errno(errno)));
        assert_eq!(copy_is_missing(&w.backend), missing, "{errno}");
    }
    assert!(!copy_is_missing(&w.backend));
}

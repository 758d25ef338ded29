//! Control rings by hand, on a simulated Xen.

use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec;
use core::sync::atomic::Ordering;

use evtchn::Upcalls;
use grant::{GrantTable, GrantedPage, SharedMemory};
use hypercall::{Errno, GrantStatus, VcpuId};
use netif::ctrl::CtrlFrontRing;
use netif::hash::{HashTypes, Toeplitz};
use netif::ring::layout;
use netif::tx::PeerFault;
use proptest::prelude::*;
use sim::{DomainConfig, Fault, FaultPlan, Kind, Sim, SimHv};

use super::*;

type Page = Rc<GrantedPage<SimHv>>;

struct Shared(Page);

impl SharedMemory for Shared {
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.0.page().load_u32(offset, order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.0.page().store_u32(offset, value, order);
    }
    fn fence(&self) {
        self.0.page().fence();
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        self.0.page().read_bytes(offset, to);
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        self.0.page().write_bytes(offset, from);
    }
}

struct World {
    sim: Sim,
    back: SimHv,
    front: SimHv,
    mapper: Mapper<SimHv>,
    upcalls: Upcalls<SimHv>,
    table: GrantTable<SimHv>,
    page: Page,
    ring: CtrlFrontRing<Shared>,
    channel: Channel<SimHv>,
    control: Control<SimHv>,
    next: u16,
}

fn world() -> World {
    world_at(0)
}

fn world_at(start: u32) -> World {
    let sim = Sim::new();
    let (back, front) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    let (mapper, upcalls) = (Mapper::new(&back), Upcalls::new(&back, VcpuId(0)));
    let table = GrantTable::new(&front).unwrap();
    let page = Rc::new(table.share(back.id(), false).unwrap());
    let ring = CtrlFrontRing::init_at(Shared(page.clone()), start);
    let channel = Upcalls::new(&front, VcpuId(0)).binder().alloc_unbound(back.id()).unwrap();
    let request = ControlRequest { ring: page.gref(), port: channel.port() };
    let control =
        Control::connect(&back, &mapper, &upcalls.binder(), front.id(), request, 3).unwrap();
    World { sim, back, front, mapper, upcalls, table, page, ring, channel, control, next: 0 }
}

const OK: (CtrlStatus, u32) = (CtrlStatus::SUCCESS, 0);
const INVALID: (CtrlStatus, u32) = (CtrlStatus::INVALID_PARAMETER, 0);
const UNSUPPORTED: (CtrlStatus, u32) = (CtrlStatus::NOT_SUPPORTED, 0);

impl World {
    fn share(&self, read_only: bool) -> Page {
        Rc::new(self.table.share(self.back.id(), read_only).unwrap())
    }

    fn filled(&self, words: &[u32]) -> Page {
        let page = self.share(true);
        for (index, word) in words.iter().enumerate() {
            page.page().store_u32(index * 4, *word, Ordering::SeqCst);
        }
        page
    }

    fn send(&mut self, kind: CtrlType, data: [u32; 3]) {
        self.next = self.next.wrapping_add(1);
        self.ring.push(CtrlRequest { id: self.next, kind, data }).unwrap();
    }

    fn poll(&mut self) -> Result<(), VifFault> {
        let _ = self.ring.publish();
        self.control.poll(&self.back, &self.mapper)
    }

    fn ask(&mut self, kind: CtrlType, data: [u32; 3]) -> (CtrlStatus, u32) {
        self.send(kind, data);
        self.poll().unwrap();
        assert_eq!(self.ring.poll(), Ok(1));
        let (_, response) = self.ring.take().unwrap();
        assert_eq!((response.id, response.kind), (self.next, kind));
        (response.status, response.data)
    }

    /// A list of pages, for `ADD_GREF_MAPPING` and the like.
    fn list(&self, grefs: &[(GrantRef, bool)]) -> Page {
        let page = self.share(false);
        let status = CtrlStatus(0xbeef);
        for (index, &(gref, readonly)) in grefs.iter().enumerate() {
            for (word, value) in (0..).zip(StaticGrant { gref, readonly, status }.encode()) {
                page.page().store_u32(index * 8 + word * 4, value, Ordering::SeqCst);
            }
        }
        page
    }

    fn add(&mut self, queue: u32, grefs: &[(GrantRef, bool)]) -> (CtrlStatus, u32) {
        let list = self.list(grefs);
        self.ask(CtrlType::ADD_GREF_MAPPING, [queue, list.gref().0, grefs.len() as u32])
    }

    /// The answer, and each entry's status.
    fn remove(&mut self, queue: u32, grefs: &[GrantRef]) -> ((CtrlStatus, u32), Vec<u32>) {
        let with_flags: Vec<_> = grefs.iter().map(|gref| (*gref, false)).collect();
        let list = self.list(&with_flags);
        let kind = CtrlType::DEL_GREF_MAPPING;
        let answer = self.ask(kind, [queue, list.gref().0, grefs.len() as u32]);
        let status = |index: usize| list.page().load_u32(index * 8 + 4, Ordering::SeqCst) >> 16;
        (answer, (0..grefs.len()).map(status).collect())
    }

    /// Ends it; nothing of the guest's is left anywhere.
    fn end(self) {
        let Self { sim, front, mapper, control, channel, page, ring, .. } = self;
        mapper.unmap_batch(&mut MapOps::new(600), control.disconnect());
        assert_eq!((mapper.live(), mapper.parked()), (0, 0));
        drop((channel, ring, page));
        let ledger = sim.ledger();
        let held = ledger.concerning(front.id());
        let held: Vec<_> = held.entries().filter(|(holder, _)| *holder != front.id()).collect();
        assert!(held.is_empty(), "{held:?}");
        assert_eq!(sim.violations(), Vec::<String>::new());
    }
}

fn tcp(port: u16) -> Vec<u8> {
    let mut frame = [&[2; 12][..], &[8, 0, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0]].concat();
    frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend(port.to_be_bytes());
    frame.extend([0; 18]);
    frame
}

const KEY: [u32; 10] = [0x6d5a_56da, 1, 2, 3, 4, 5, 6, 7, 8, 9];

#[test]
fn steering_is_left_to_us_until_an_algorithm_is_set() {
    let mut w = world();
    assert_eq!(w.control.steer(&tcp(1)), None);
    assert_eq!(w.ask(CtrlType::GET_HASH_FLAGS, [0; 3]), UNSUPPORTED);
    assert_eq!(w.ask(CtrlType::SET_HASH_FLAGS, [3, 0, 0]), INVALID);
    assert_eq!(w.ask(CtrlType::SET_HASH_ALGORITHM, [2, 0, 0]), INVALID);
    assert_eq!(w.ask(CtrlType::SET_HASH_ALGORITHM, [1, 0, 0]), OK);
    // Nothing is hashed yet: all goes where a hash of 0 does.
    assert_eq!(w.control.steer(&tcp(1)), Some(Steering { queue: 0, hash: None }));
    assert_eq!(w.ask(CtrlType::GET_HASH_FLAGS, [0; 3]), (CtrlStatus::SUCCESS, 15));
    assert_eq!(w.ask(CtrlType::SET_HASH_FLAGS, [16, 0, 0]), INVALID);
    assert_eq!(w.ask(CtrlType::SET_HASH_FLAGS, [2, 0, 0]), OK);
    // Without a key every hash is 0, and told.
    let hash = w.control.steer(&tcp(1)).unwrap().hash.unwrap();
    assert_eq!((hash.kind, hash.algorithm, hash.value), (1, 1, 0));
    assert_eq!(w.ask(CtrlType::SET_HASH_ALGORITHM, [0; 3]), OK);
    assert_eq!(w.control.steer(&tcp(1)), None);
    w.end();
}

#[test]
fn packets_go_where_their_hash_says() {
    let mut w = world_at(u32::MAX - 2);
    let key = w.filled(&KEY);
    w.ask(CtrlType::SET_HASH_ALGORITHM, [1, 0, 0]);
    w.ask(CtrlType::SET_HASH_FLAGS, [15, 0, 0]);
    assert_eq!(w.ask(CtrlType::SET_HASH_KEY, [key.gref().0, 40, 0]), OK);
    let bytes: Vec<u8> = KEY.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let toeplitz = Toeplitz::new(&bytes);
    let hash = |port: u16| toeplitz.packet(&tcp(port), HashTypes::all()).unwrap();
    for port in 0..50 {
        let queue = (hash(port).value % 3) as u16;
        assert_eq!(w.control.steer(&tcp(port)), Some(Steering { queue, hash: Some(hash(port)) }));
    }
    assert_eq!(w.ask(CtrlType::GET_HASH_MAPPING_SIZE, [0; 3]), (CtrlStatus::SUCCESS, 128));
    assert_eq!(w.ask(CtrlType::SET_HASH_MAPPING_SIZE, [128, 0, 0]), OK);
    assert!((0..50).all(|port| w.control.steer(&tcp(port)).unwrap().queue == 0));
    let table: Vec<u32> = (0..128).map(|at| at * 7 % 3).collect();
    let (low, high) = (w.filled(&table[..100]), w.filled(&table[100..]));
    assert_eq!(w.ask(CtrlType::SET_HASH_MAPPING, [low.gref().0, 100, 0]), OK);
    assert_eq!(w.ask(CtrlType::SET_HASH_MAPPING, [high.gref().0, 28, 100]), OK);
    for port in 0..50 {
        let queue = table[hash(port).value as usize % 128] as u16;
        assert_eq!(w.control.steer(&tcp(port)).unwrap().queue, queue);
    }
    // What cannot be hashed goes where a hash of 0 would.
    assert_eq!(w.ask(CtrlType::SET_HASH_MAPPING, [w.filled(&[2]).gref().0, 1, 0]), OK);
    assert_eq!(w.control.steer(&[0; 14]), Some(Steering { queue: 2, hash: None }));
    // A new size empties the table; none goes back to counting.
    assert_eq!(w.ask(CtrlType::SET_HASH_MAPPING_SIZE, [5, 0, 0]), OK);
    assert!((0..50).all(|port| w.control.steer(&tcp(port)).unwrap().queue == 0));
    assert_eq!(w.ask(CtrlType::SET_HASH_MAPPING_SIZE, [0, 0, 0]), OK);
    assert!((0..50).any(|port| w.control.steer(&tcp(port)).unwrap().queue != 0));
    // A shorter key clears the rest of the longer, and none at all makes every hash 0.
    assert_eq!(w.ask(CtrlType::SET_HASH_KEY, [key.gref().0, 5, 0]), OK);
    let short = Toeplitz::new(&bytes[..5]).packet(&tcp(9), HashTypes::all());
    assert_eq!(w.control.steer(&tcp(9)).unwrap().hash, short);
    assert_eq!(w.ask(CtrlType::SET_HASH_KEY, [0, 0, 0]), OK);
    assert_eq!(w.control.steer(&tcp(9)).unwrap().hash.unwrap().value, 0);
    w.end();
}

/// Hostile 33: each bad parameter, and that nothing changed by it.
#[test]
fn hostile_33_parameters_that_cannot_be() {
    let mut w = world();
    let page = w.filled(&[2, 1, 2, 1]);
    w.ask(CtrlType::SET_HASH_ALGORITHM, [1, 0, 0]);
    w.ask(CtrlType::SET_HASH_FLAGS, [15, 0, 0]);
    w.ask(CtrlType::SET_HASH_KEY, [page.gref().0, 16, 0]);
    w.ask(CtrlType::SET_HASH_MAPPING_SIZE, [4, 0, 0]);
    w.ask(CtrlType::SET_HASH_MAPPING, [page.gref().0, 4, 0]);
    let outcome = |w: &World| (0..50).map(|port| w.control.steer(&tcp(port))).collect::<Vec<_>>();
    let before = outcome(&w);
    let gref = page.gref().0;
    let pages = [w.filled(&[0, 3, 0, 0]), w.filled(&[0, 0, 0, u32::MAX])];
    let [bad_queue, late_queue] = [&pages[0], &pages[1]].map(|page| page.gref().0);
    let foreign = w.table.share(DomId(7), true).unwrap();
    for (kind, data) in [
        (CtrlType::SET_HASH_KEY, [gref, 41, 0]),
        (CtrlType::SET_HASH_KEY, [gref, u32::MAX, 0]),
        (CtrlType::SET_HASH_KEY, [gref, 0x1_0000, 0]),
        (CtrlType::SET_HASH_KEY, [9999, 40, 0]),
        (CtrlType::SET_HASH_KEY, [u32::MAX, 40, 0]),
        (CtrlType::SET_HASH_KEY, [foreign.gref().0, 40, 0]),
        (CtrlType::SET_HASH_MAPPING_SIZE, [129, 0, 0]),
        (CtrlType::SET_HASH_MAPPING_SIZE, [u32::MAX, 0, 0]),
        (CtrlType::SET_HASH_MAPPING, [gref, 5, 0]),
        (CtrlType::SET_HASH_MAPPING, [gref, 4, 1]),
        (CtrlType::SET_HASH_MAPPING, [gref, 0, 5]),
        (CtrlType::SET_HASH_MAPPING, [gref, 1, u32::MAX]),
        (CtrlType::SET_HASH_MAPPING, [gref, 2, u32::MAX]),
        (CtrlType::SET_HASH_MAPPING, [gref, u32::MAX, 1]),
        (CtrlType::SET_HASH_MAPPING, [gref, u32::MAX, 5]),
        (CtrlType::SET_HASH_MAPPING, [gref, 1025, 0]),
        (CtrlType::SET_HASH_MAPPING, [gref, 0x4000_0001, 0]),
        (CtrlType::SET_HASH_MAPPING, [bad_queue, 4, 0]),
        (CtrlType::SET_HASH_MAPPING, [late_queue, 4, 0]),
        (CtrlType::SET_HASH_MAPPING, [9999, 4, 0]),
        (CtrlType::SET_HASH_MAPPING, [foreign.gref().0, 4, 0]),
        (CtrlType::GET_GREF_MAPPING_SIZE, [3, 0, 0]),
        (CtrlType::ADD_GREF_MAPPING, [3, gref, 1]),
        (CtrlType::ADD_GREF_MAPPING, [0, gref, 513]),
        (CtrlType::ADD_GREF_MAPPING, [0, gref, u32::MAX]),
        (CtrlType::ADD_GREF_MAPPING, [0, gref, 0x2000_0001]),
        (CtrlType::ADD_GREF_MAPPING, [0, 9999, 1]),
        (CtrlType::DEL_GREF_MAPPING, [3, gref, 1]),
        (CtrlType::DEL_GREF_MAPPING, [0, gref, 513]),
        (CtrlType::DEL_GREF_MAPPING, [0, 9999, 1]),
        // The list is read-only to us.
        (CtrlType::DEL_GREF_MAPPING, [0, gref, 1]),
    ] {
        assert_eq!(w.ask(kind, data), INVALID, "{kind:?} {data:?}");
        assert_eq!(outcome(&w), before, "{kind:?} {data:?}");
    }
    for kind in [0, 11, 12, 255, u16::MAX] {
        assert_eq!(w.ask(CtrlType(kind), [0; 3]), UNSUPPORTED);
    }
    assert_eq!(w.control.static_pages(), 0);
    w.end();
}

#[test]
fn a_copy_that_fails_changes_nothing() {
    let mut w = world();
    w.ask(CtrlType::SET_HASH_ALGORITHM, [1, 0, 0]);
    w.ask(CtrlType::SET_HASH_FLAGS, [15, 0, 0]);
    let key = w.filled(&KEY);
    w.ask(CtrlType::SET_HASH_KEY, [key.gref().0, 40, 0]);
    let before = w.control.steer(&tcp(1));
    let other = w.filled(&[7; 10]);
    for fault in [
        Fault::Status(GrantStatus::EAGAIN),
        Fault::Status(GrantStatus(1)),
        Fault::Untouched,
        Fault::Errno(Errno::FAULT),
    ] {
        w.sim.inject(w.back.id(), FaultPlan::next(Kind::Copy, fault));
        assert_eq!(w.ask(CtrlType::SET_HASH_KEY, [other.gref().0, 40, 0]), INVALID, "{fault:?}");
        assert_eq!(w.control.steer(&tcp(1)), before);
    }
    w.end();
}

/// Hostile 32: the producer jumps, or moves back.
#[test]
fn hostile_32_the_producer_jumps() {
    for (start, index) in [(0, 129), (0, u32::MAX), (u32::MAX, 128), (5, 4), (5, 0x8000_0005)] {
        let mut w = world_at(start);
        w.page.page().store_u32(layout::REQ_PROD, index, Ordering::SeqCst);
        let fault = w.poll();
        assert!(matches!(fault, Err(VifFault::Peer(PeerFault::Ring(_)))), "{start} {index}");
        w.end();
    }
}

/// Hostile 32: requests come as fast as they are answered, and a poll ends all the same.
#[test]
fn hostile_32_a_poll_is_bounded() {
    let mut w = world();
    for _ in 0..128 {
        w.send(CtrlType(0), [0; 3]);
    }
    for served in [32, 64, 96, 128] {
        assert!(w.control.is_ready());
        w.poll().unwrap();
        assert_eq!(w.ring.poll(), Ok(served));
    }
    w.poll().unwrap();
    assert!(!w.control.is_ready());
    // Long lists count for more.
    while w.ring.take().is_some() {}
    let list = w.share(false);
    for _ in 0..4 {
        w.send(CtrlType::DEL_GREF_MAPPING, [0, list.gref().0, 300]);
    }
    for served in [2, 4] {
        w.poll().unwrap();
        assert_eq!(w.ring.poll(), Ok(served));
    }
    w.end();
}

#[test]
fn static_pages_are_kept_until_they_are_taken_back() {
    let mut w = world();
    let size = (CtrlStatus::SUCCESS, STATIC_PAGES as u32);
    assert_eq!(w.ask(CtrlType::GET_GREF_MAPPING_SIZE, [2, 0, 0]), size);
    let pages: Vec<_> = (0..4).map(|at| w.share(at == 1)).collect();
    let grefs: Vec<_> = pages.iter().map(|page| page.gref()).collect();
    let (maps, before) = (w.sim.hypercalls(w.back.id()).unwrap(), w.mapper.live());
    assert_eq!(w.add(1, &[(grefs[2], false), (grefs[1], true), (grefs[0], false)]), OK);
    assert_eq!((w.sim.hypercalls(w.back.id()).unwrap() - maps).calls(Kind::Map), 1);
    assert_eq!((w.mapper.live(), w.control.static_pages()), (before + 3, 3));
    pages[2].page().store_u32(8, 77, Ordering::SeqCst);
    let seen = w.control.static_page(1, grefs[2], true).unwrap();
    assert_eq!(seen.page().load_u32(8, Ordering::SeqCst), 77);
    seen.page().store_u32(12, 78, Ordering::SeqCst);
    assert_eq!(pages[2].page().load_u32(12, Ordering::SeqCst), 78);
    // To be read only; of another queue; never added.
    assert!(w.control.static_page(1, grefs[1], false).is_some());
    assert!(w.control.static_page(1, grefs[1], true).is_none());
    assert!(w.control.static_page(0, grefs[2], false).is_none());
    assert!(w.control.static_page(1, grefs[3], false).is_none());
    assert!(w.control.static_page(3, grefs[2], false).is_none());

    // One that is in use stays, one that is listed twice goes once, one that is not there is said so.
    let held = w.control.static_page(1, grefs[0], false).unwrap().clone();
    assert!(w.control.is_in_use());
    let list = [grefs[0], grefs[1], grefs[1], grefs[3]];
    assert_eq!(w.remove(1, &list), ((CtrlStatus::SUCCESS, 1), vec![2, 0, 0, 2]));
    assert_eq!((w.mapper.live(), w.control.static_pages()), (before + 2, 2));
    assert!(w.control.static_page(1, grefs[1], false).is_none());
    drop(held);
    assert!(!w.control.is_in_use());
    assert_eq!(w.remove(1, &grefs[..1]), ((CtrlStatus::SUCCESS, 1), vec![0]));
    assert_eq!(w.remove(0, &grefs[2..3]), ((CtrlStatus::SUCCESS, 0), vec![2]));
    assert_eq!(w.mapper.live(), before + 1);
    // What was taken back can be added again, and the rest goes with the ring.
    assert_eq!(w.add(1, &[(grefs[0], false)]), OK);
    assert!(grefs[2] > grefs[0]);
    assert!([0, 2].iter().all(|at| w.control.static_page(1, grefs[*at], true).is_some()));
    w.end();
}

#[test]
fn static_pages_that_are_not_to_be_used_are_not_mapped_and_come_back() {
    let mut w = world();
    let before = w.mapper.live();
    let pages: Vec<_> = (0..3).map(|index| w.share(index == 0)).collect();
    let grefs: Vec<_> = pages.iter().map(|page| page.gref()).collect();
    let list: Vec<_> = grefs.iter().map(|gref| (*gref, *gref == grefs[0])).collect();
    assert_eq!(w.add(1, &list), OK);
    let page = |w: &World, index: usize, writable| {
        w.control.static_page(1, grefs[index], writable).is_some()
    };
    // One is in use.
    let held = w.control.static_page(1, grefs[2], true).cloned().unwrap();
    w.control.unmap_pages(&w.mapper);
    assert_eq!((w.mapper.live(), w.control.static_pages()), (before + 1, 3));
    assert!(!page(&w, 0, false) && !page(&w, 1, true) && page(&w, 2, true));
    drop(held);
    w.control.unmap_pages(&w.mapper);
    assert_eq!(w.mapper.live(), before);
    // The frontend may take back what is not mapped.
    assert_eq!(w.remove(1, &grefs[1..2]), ((CtrlStatus::SUCCESS, 1), vec![0]));
    w.control.map_pages_again(&w.mapper);
    assert_eq!((w.mapper.live(), w.control.static_pages()), (before + 2, 2));
    assert!(page(&w, 0, false) && !page(&w, 0, true) && !page(&w, 1, false) && page(&w, 2, true));
    assert_eq!(w.remove(1, &grefs), ((CtrlStatus::SUCCESS, 2), vec![0, 2, 0]));
    assert_eq!(w.mapper.live(), before);
}

#[test]
fn static_pages_are_added_all_or_not() {
    let mut w = world();
    let pages: Vec<_> = (0..4).map(|_| w.share(false)).collect();
    let entry = |at: usize| (pages[at].gref(), false);
    assert_eq!(w.add(0, &[]), OK);
    assert_eq!(w.add(0, &[entry(0)]), OK);
    let live = w.mapper.live();
    let read_only = w.share(true);
    for list in [
        &[entry(1), entry(0)][..],
        &[entry(1), entry(2), entry(1)],
        &[entry(1), (GrantRef(9999), false)],
        &[(GrantRef(u32::MAX), true), entry(1)],
        &[entry(1), (read_only.gref(), false)],
    ] {
        assert_eq!(w.add(0, list), INVALID, "{list:?}");
        assert_eq!((w.mapper.live(), w.mapper.parked()), (live, 0), "{list:?}");
        assert_eq!(w.control.static_pages(), 1);
    }
    // Two of three are mapped before it goes wrong, or none.
    let no_space = Fault::Status(GrantStatus::NO_DEVICE_SPACE);
    for (plan, mapped) in [
        (FaultPlan::nth(Kind::Map, 2, no_space), 2),
        (FaultPlan::next(Kind::Map, Fault::Partial(2, Errno::NOMEM)), 2),
        (FaultPlan::next(Kind::Map, Fault::Errno(Errno::NOMEM)), 0),
    ] {
        let before = w.sim.hypercalls(w.back.id()).unwrap();
        w.sim.inject(w.back.id(), plan);
        assert_eq!(w.add(0, &[entry(1), entry(2), entry(3)]), INVALID);
        let calls = w.sim.hypercalls(w.back.id()).unwrap() - before;
        assert_eq!((calls.calls(Kind::Unmap), calls.ops(Kind::Unmap)), (mapped.min(1), mapped));
        assert_eq!((w.mapper.live(), w.control.static_pages()), (live, 1));
    }
    assert_eq!(w.add(0, &[entry(1), entry(2)]), OK);
    // Another queue has pages of its own.
    assert_eq!(w.add(1, &[entry(0)]), OK);
    w.end();
}

#[test]
fn static_pages_are_bounded() {
    let mut w = world();
    let mut pages = Vec::new();
    for part in [300, 212, 1] {
        let new: Vec<_> = (0..part).map(|_| w.share(true)).collect();
        let list: Vec<_> = new.iter().map(|page| (page.gref(), true)).collect();
        pages.extend(new);
        let expected = if part == 1 { INVALID } else { OK };
        assert_eq!(w.add(2, &list), expected, "{part}");
    }
    assert_eq!(w.control.static_pages(), STATIC_PAGES);
    assert!(pages[..512].iter().all(|it| w.control.static_page(2, it.gref(), false).is_some()));
    assert_eq!(w.remove(2, &[pages[100].gref()]).0, (CtrlStatus::SUCCESS, 1));
    assert_eq!(w.add(2, &[(pages[512].gref(), true)]), OK);
    w.end();
}

#[test]
fn a_page_that_is_held_outlives_the_ring() {
    let mut w = world();
    let page = w.share(false);
    w.add(0, &[(page.gref(), false)]);
    let held = w.control.static_page(0, page.gref(), true).unwrap().clone();
    let mapper = w.mapper.clone();
    let World { control, .. } = w;
    assert!(control.is_in_use());
    mapper.unmap_batch(&mut MapOps::new(600), control.disconnect());
    assert_eq!(mapper.live(), 1);
    held.page().store_u32(0, 5, Ordering::SeqCst);
    assert_eq!(page.page().load_u32(0, Ordering::SeqCst), 5);
    drop(held);
    assert_eq!(mapper.live(), 0);
}

#[test]
fn a_ring_that_cannot_be_had_is_refused() {
    let w = world();
    let (mapper, binder) = (&w.mapper, &w.upcalls.binder());
    let domain = w.front.id();
    let fresh = w.share(false);
    let channel = Upcalls::new(&w.front, VcpuId(0)).binder().alloc_unbound(w.back.id()).unwrap();
    let (ring, port) = (fresh.gref(), channel.port());
    let connect = |ring, port| {
        let request = ControlRequest { ring, port };
        let live = mapper.live();
        let refusal = Control::connect(&w.back, mapper, binder, domain, request, 1).err();
        assert_eq!(mapper.live(), live);
        refusal
    };
    let key = keys::CTRL_RING_REF;
    let read_only = w.share(true).gref();
    for ring in [GrantRef(9999), read_only] {
        assert!(matches!(connect(ring, port), Some(Refusal::Map { key: k, .. }) if k == key));
    }
    fresh.page().store_u32(layout::REQ_PROD, 129, Ordering::SeqCst);
    assert!(matches!(connect(ring, port), Some(Refusal::Ring { key: k, .. }) if k == key));
    fresh.page().store_u32(layout::REQ_PROD, 128, Ordering::SeqCst);
    let key = keys::EVENT_CHANNEL_CTRL;
    let bound = w.channel.port();
    for port in [Port(0), Port(9999), bound] {
        assert!(matches!(connect(ring, port), Some(Refusal::Bind { key: k, .. }) if k == key));
    }
    assert_eq!(connect(ring, port), None);
}

#[test]
fn events_for_nothing_are_heard_less_and_less() {
    let mut w = world();
    let mut now = Instant(0);
    w.poll().unwrap();
    for spurious in 0..3 {
        w.control.on_event();
        w.poll().unwrap();
        w.control.end_event(now);
        assert_eq!(w.control.deadline().is_some(), spurious > 0);
        now = w.control.deadline().unwrap_or(now);
        w.control.end_event(now);
        assert_eq!(w.control.deadline(), None);
    }
    w.control.on_event();
    w.send(CtrlType(0), [0; 3]);
    w.poll().unwrap();
    w.control.end_event(now);
    assert_eq!(w.control.deadline(), None);
    w.end();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any requests: one answer each, nothing kept beyond the bounds, and all let go of at the end.
    #[test]
    fn hostile_any_requests_are_survived(
        start in prop_oneof![Just(0_u32), any::<u32>()],
        lists in prop::collection::vec((any::<u8>(), 0_u32..6, any::<bool>()), 0..20),
        requests in prop::collection::vec(
            (0_u16..12, prop::array::uniform3(prop_oneof![0_u32..8, 8_u32..200, any::<u32>()])),
            0..100,
        ),
    ) {
        let mut w = world_at(start);
        // References 8 and up are pages, some of them lists of others.
        let pages: Vec<_> = lists.iter().map(|&(first, len, read_only)| {
            let page = w.share(read_only);
            for at in 0..len {
                let gref = u32::from(first).wrapping_mul(at + 1) % 30;
                page.page().store_u32(at as usize * 8, gref, Ordering::SeqCst);
            }
            page
        }).collect();
        for (kind, data) in requests {
            let (status, _) = w.ask(CtrlType(kind), data);
            prop_assert!(status.0 < 3);
            if let Some(Steering { queue, .. }) = w.control.steer(&tcp(1)) {
                prop_assert!(queue < 3);
            }
        }
        drop(pages);
        w.end();
    }
}

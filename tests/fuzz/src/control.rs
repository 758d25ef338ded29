//! A guest's control ring, served by [`netback::ctrl::Control`]: hashing and pages kept mapped, asked for in any way.

use std::sync::atomic::Ordering;

use evtchn::Upcalls;
use grant::{GrantTable, GrantedPage, MapOps, Mapper, SharedMemory as _};
use hypercall::abi::{GTF_PERMIT_ACCESS, GTF_READONLY};
use hypercall::{Errno, GrantStatus, Instant, VcpuId};
use netback::ctrl::{Control, ControlRequest, STATIC_PAGES};
use netif::ctrl::{CtrlBackRing, CtrlRequest, CtrlType, StaticGrant};
use netif::ring::layout;
use netif::slot::Slot as _;
use sim::{DomainConfig, Fault, FaultPlan, Kind, Sim, SimHv};

use crate::input::Input;
use crate::page::Page;
use crate::world::DOM0;

const QUEUES: u16 = 3;
const PAGES: usize = 6;
const ENTRIES: u32 = CtrlBackRing::<Page>::ENTRIES;

struct World {
    sim: Sim,
    /// The first is the ring.
    pages: Vec<GrantedPage<SimHv>>,
    prod: u32,
    /// The guest has written over the ring's indices.
    scribbled: bool,
}

impl World {
    fn ring(&self) -> &GrantedPage<SimHv> {
        &self.pages[0]
    }

    fn at(index: u32) -> usize {
        layout::SLOTS + (index % ENTRIES) as usize * CtrlRequest::SIZE
    }

    /// One of our references, mostly.
    fn gref(&self, input: &mut Input<'_>) -> u32 {
        let which = input.byte();
        if which == 0xff { input.word() } else { self.pages[usize::from(which) % PAGES].gref().0 }
    }

    fn push(&mut self, input: &mut Input<'_>) {
        let kind = CtrlType(u16::from(input.byte() % 12));
        let small = |input: &mut Input<'_>| match input.byte() {
            0xff => input.word(),
            low => u32::from(low),
        };
        let data = match kind {
            CtrlType::SET_HASH_KEY | CtrlType::SET_HASH_MAPPING => {
                [self.gref(input), small(input), small(input)]
            }
            CtrlType::ADD_GREF_MAPPING | CtrlType::DEL_GREF_MAPPING => {
                [u32::from(input.byte() % 4), self.gref(input), small(input)]
            }
            _ => [small(input), small(input), small(input)],
        };
        CtrlRequest { id: self.prod as u16, kind, data }
            .store(self.ring().page(), Self::at(self.prod));
        self.prod = self.prod.wrapping_add(1);
    }

    fn act(&mut self, control: &mut Control<SimHv>, input: &mut Input<'_>, now: &mut Instant) {
        match input.byte() % 12 {
            0..5 => self.push(input),
            5 => {
                // A list of pages, or a table, or a key.
                let page = 1 + input.below(PAGES - 1);
                let at = usize::from(input.byte()) * 4;
                for entry in 0..usize::from(input.byte() % 8) {
                    let [first, second] = [self.gref(input), u32::from(input.byte() & 1)];
                    let at = at + entry * StaticGrant::SIZE;
                    self.pages[page].page().store_u32(at, first, Ordering::SeqCst);
                    self.pages[page].page().store_u32(at + 4, second, Ordering::SeqCst);
                }
            }
            6 => {
                let (page, at) = (input.below(PAGES), usize::from(input.half() % 4096));
                self.pages[page].page().store_u32(at, input.word(), Ordering::SeqCst);
                self.scribbled |= page == 0;
                self.prod = self.ring().page().load_u32(layout::REQ_PROD, Ordering::SeqCst);
            }
            7 => {
                let (id, gref) =
                    (hypercall::DomId(1), self.pages[1 + input.below(PAGES - 1)].gref());
                let Some(mut entry) = self.sim.grant_entry(id, gref) else { return };
                if self.sim.grant_users(id, gref) == 0 {
                    let flags = [0, GTF_PERMIT_ACCESS, GTF_PERMIT_ACCESS | GTF_READONLY];
                    entry.flags = input.one_of(&flags);
                    self.sim.set_grant_entry(id, gref, entry);
                }
            }
            8 => {
                let kind = input.one_of(&[Kind::Copy, Kind::Map, Kind::Unmap, Kind::Window]);
                let fault = match input.byte() % 4 {
                    0 => Fault::Errno(Errno::NOMEM),
                    1 => Fault::Partial(input.below(4), Errno::INVAL),
                    2 => Fault::Status(GrantStatus(-i16::from(input.byte()) - 1)),
                    _ => Fault::Untouched,
                };
                self.sim.inject(DOM0, FaultPlan::nth(kind, u64::from(input.byte() % 8), fault));
            }
            9 => {
                control.on_event();
                *now = now.after(u64::from(input.half()) * 1000);
                control.end_event(*now);
            }
            10 => {
                let length = usize::from(input.byte());
                if let Some(steering) = control.steer(input.take(length)) {
                    assert!(steering.queue < QUEUES, "{steering:?}");
                }
            }
            _ => control.look(),
        }
    }
}

/// Each request is answered once, what is kept is bounded, and nothing is kept in the end.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let sim = Sim::new();
    let small = |config| DomainConfig { grant_frames: 1, windows: 64, maptrack: 64, ..config };
    let (hv, guest) =
        (sim.create(small(DomainConfig::dom0())), sim.create(small(DomainConfig::guest())));
    let (own, theirs) = (Upcalls::new(&hv, VcpuId(0)), Upcalls::new(&guest, VcpuId(0)));
    let (mapper, table) = (Mapper::new(&hv), GrantTable::new(&guest).unwrap());
    let channel = theirs.binder().alloc_unbound(DOM0).unwrap();
    let pages: Vec<_> = (0..PAGES).map(|_| table.share(DOM0, false).unwrap()).collect();
    let start = if input.flag() { 100_u32.wrapping_neg() } else { 0 };
    for at in [layout::REQ_PROD, layout::RSP_PROD] {
        pages[0].page().store_u32(at, start, Ordering::SeqCst);
    }
    let mut world = World { sim, pages, prod: start, scribbled: false };
    let request = ControlRequest { ring: world.ring().gref(), port: channel.port() };
    let control = Control::connect(&hv, &mapper, &own.binder(), guest.id(), request, QUEUES);
    let mut control = control.unwrap();
    let mut now = Instant(0);
    let mut broken = false;
    while !input.is_empty() && !broken {
        world.act(&mut control, &mut input, &mut now);
        world.ring().page().store_u32(layout::REQ_PROD, world.prod, Ordering::SeqCst);
        for _ in 0..8 {
            if control.is_ready() && !broken {
                broken = control.poll(&hv, &mapper).is_err();
            }
        }
        assert!(control.static_pages() <= usize::from(QUEUES) * STATIC_PAGES);
        control.look();
    }
    if !broken {
        // Nobody but us writes it, unless the guest does.
        let answered = world.ring().page().load_u32(layout::RSP_PROD, Ordering::SeqCst);
        assert!(answered == world.prod || world.scribbled, "{answered} of {}", world.prod);
    }
    world.sim.clear_faults(DOM0);
    let mut ops = MapOps::new(16);
    mapper.unmap_batch(&mut ops, control.disconnect());
    for _ in 0..8 {
        mapper.retry_parked(&mut ops);
    }
    drop(channel);
    let ledger = world.sim.ledger();
    let items = ledger.concerning(guest.id());
    let held: Vec<_> = items.entries().filter(|(holder, _)| *holder == DOM0).collect();
    assert!(held.is_empty(), "{held:?}");
    assert_eq!(world.sim.violations(), Vec::<String>::new());
}

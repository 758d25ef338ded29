//! Once the port is warm, packets cost no memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use netback::datapath::Datapath;
use netback::uplink::{NetHeader, Offers};
use netfront::Meta;
use netif::offload::{Checksum, IpVersion};

use crate::common::frame;
use crate::frames::{Ip, Kind, OUTSIDE, gso};
use crate::{Board, World};

thread_local! {
    static COUNTED: Cell<Option<usize>> = const { Cell::new(None) };
}

struct Counting;

fn count() {
    // A thread that is ending has no counter any more.
    let _ = COUNTED.try_with(|it| it.set(it.get().map(|count| count + 1)));
}

// SAFETY: all is the system's allocator; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often memory was asked for.
fn counted(work: impl FnOnce()) -> usize {
    COUNTED.set(Some(0));
    work();
    COUNTED.replace(None).unwrap()
}

#[test]
fn a_warm_port_allocates_nothing() {
    assert_eq!(counted(|| drop(std::hint::black_box(vec![1]))), 1);
    let mut world = World::new(Board::plain(), Offers::RX_CSUM);
    let ip = Ip::new(IpVersion::V4, Kind::Tcp, 30_000);
    let (bytes, small) = (ip.blank(OUTSIDE, world.guest()), frame(OUTSIDE, world.guest(), 200, 1));
    let meta = Meta { checksum: Checksum::Blank, gso: Some(gso(IpVersion::V4, 1448)) };
    let back = frame(world.guest(), OUTSIDE, 1514, 2);
    let mut total = 0;
    for round in 0..150 {
        world.send(&bytes, meta);
        world.send(&small, Meta::default());
        for _ in 0..5 {
            assert!(world.card().deliver(NetHeader::default(), &back));
        }
        // Sends and receives, and then takes back what was sent.
        for _ in 0..2 {
            world.machine.settle();
            let World { machine, uplink, .. } = &mut world;
            let count = counted(|| {
                uplink.poll(&mut machine.backend, machine.now);
                std::hint::black_box(uplink.deadline());
            });
            total += if round < 50 { 0 } else { count };
            uplink.card_mut().run();
        }
        world.settle();
        world.card().wire.clear();
        assert_eq!(world.machine.guests[0].take().len(), 5);
    }
    assert_eq!(world.uplink.counters().sent(Datapath::Map).packets, 150);
    assert_eq!(total, 0);
    world.assert_right();
}

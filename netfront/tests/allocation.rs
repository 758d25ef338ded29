//! Once a connection is warm, packets cost no memory.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::{World, okay, rx};
use hypercall::Handle;
use netfront::{Config, Meta};
use netif::keys::Features;
use netif::slot::RxFlags;

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
fn warm_queues_allocate_nothing() {
    assert_eq!(counted(|| drop(std::hint::black_box(vec![1]))), 1);
    let config = Config { split: false, ..Config::new(Handle(0)) };
    let mut world = World::plain(config);
    world.offer(&[("feature-sg", "1"), ("feature-gso-tcpv4", "1")]);
    let mut rings = world.attach();
    assert!(world.nic.features().contains(Features::SG));
    let (packet, mut frame) = (vec![7; 60_000], Vec::with_capacity(65_536));
    let mut total = 0;
    for round in 0..600_usize {
        let len = [60, 1500, 9000, 60_000][round % 4];
        let World { nic, guest, now, upcalls, .. } = &mut world;
        let count = counted(|| {
            upcalls.scan(64, |port| _ = nic.on_event(port));
            let queue = nic.queue_for(&packet[..len]);
            nic.send(queue, &packet[..len], Meta::default()).unwrap();
            while nic.receive(0, &mut frame).is_some() {}
            nic.poll(&mut guest.1, *now);
            nic.take_notices().for_each(drop);
            std::hint::black_box(nic.deadline());
        });
        if round >= 300 {
            total += count;
        }
        rings.tx.poll().unwrap();
        while let Some(request) = rings.tx.take() {
            rings.tx.push(okay(request.id.0)).unwrap();
        }
        let _ = rings.tx.publish();
        rings.rx.poll().unwrap();
        for _ in 0..4 {
            let request = rings.rx.take().unwrap();
            rings.rx.push(rx(request.id.0, 0, RxFlags::empty(), 1500)).unwrap();
        }
        let _ = rings.rx.publish();
        rings.channel.notify().unwrap();
    }
    assert_eq!(world.nic.counters().rx.packets, 599 * 4);
    assert_eq!(total, 0);
}

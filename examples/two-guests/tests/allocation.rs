//! Once a connection is warm, packets cost no memory, whichever way they are carried: neither netback nor netfront, nor what
//! they stand on, asks for any. What the simulated Xen needs inside a call is its own.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod bench;
#[path = "bench/board.rs"]
mod board;
mod quiet;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use bench::{Bench, Load};
use netback::datapath::Datapath;
use quiet::Quiet;
use sim::Kind;

const PACKETS: u64 = 10_000;
const SIZES: [usize; 4] = [64, 1500, 9000, 65_535];

thread_local! {
    /// Whether the engine is at work on this thread.
    static WATCHED: Cell<bool> = const { Cell::new(false) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

fn count() {
    // A thread that is ending has no counter any more.
    if WATCHED.try_with(Cell::get).unwrap_or(false) {
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
    }
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

/// Nothing is counted in the calls of the simulated Xen.
fn inside<T>(call: impl FnOnce() -> T) -> T {
    let watched = WATCHED.replace(false);
    let result = call();
    WATCHED.set(watched);
    result
}

/// How often memory was asked for while so many packets were carried.
fn allocations(load: Load) -> u64 {
    let mut bench =
        Bench::new(load, board::domain(load.path), Quiet, |watched| WATCHED.set(watched));
    COUNT.set(0);
    let (before, made) = (bench.arrived.0, bench.dom0.hypercalls());
    while bench.arrived.0 - before < PACKETS {
        bench.turn();
    }
    let id = bench.guests[0].hv.id();
    let sender = bench.backend.vifs().find(|vif| vif.id.domain == id).unwrap().counters;
    let path =
        if load.size <= 128 && load.path != Datapath::Static { Datapath::Copy } else { load.path };
    assert!(sender.tx_paths.of(path).packets >= PACKETS, "{load:?}: {:?}", sender.tx_paths);
    let made = bench.dom0.hypercalls() - made;
    assert_eq!(made.calls(Kind::Copy) == 0, load.path == Datapath::Static, "{load:?}");
    assert_eq!(bench.sim.violations(), Vec::<String>::new());
    COUNT.get()
}

#[test]
fn what_is_asked_for_is_counted() {
    WATCHED.set(true);
    drop(std::hint::black_box(vec![1]));
    inside(|| drop(std::hint::black_box(vec![1])));
    WATCHED.set(false);
    drop(std::hint::black_box(vec![1]));
    assert_eq!(COUNT.get(), 1);
}

#[test]
fn packets_cost_no_memory_whichever_way_they_go() {
    for path in Datapath::ALL {
        for size in SIZES {
            for first_index in [0, 0_u32.wrapping_sub(1000)] {
                let load = Load { path, size, first_index };
                assert_eq!(allocations(load), 0, "{load:?}");
            }
        }
    }
}

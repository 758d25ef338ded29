//! Once a connection is warm, packets cost no memory, whichever way they are carried: neither netback nor netfront, nor what
//! they stand on, asks for any. What the simulated Xen needs inside a call is its own.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod bench;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use bench::{Bench, Load};
use hypercall::abi::{CacheFlush, GrantCopy, GrantMap, GrantUnmap};
use hypercall::{DomId, Errno, Gfn, GrantTableSize, Hypervisor, Port, VcpuId, Virq, Window};
use netback::datapath::Datapath;
use sim::{Kind, SimHv};

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

/// The simulated Xen, in whose calls nothing is counted.
#[derive(Clone)]
struct Quiet(SimHv);

fn inside<T>(call: impl FnOnce() -> T) -> T {
    let watched = WATCHED.replace(false);
    let result = call();
    WATCHED.set(watched);
    result
}

// SAFETY: it is the one within.
unsafe impl Hypervisor for Quiet {
    fn features(&self, submap: u32) -> Result<u32, Errno> {
        inside(|| self.0.features(submap))
    }

    fn notify(&self, port: Port) -> Result<(), Errno> {
        inside(|| self.0.notify(port))
    }

    fn alloc_unbound(&self, remote: DomId) -> Result<Port, Errno> {
        inside(|| self.0.alloc_unbound(remote))
    }

    fn bind_interdomain(&self, remote: DomId, remote_port: Port) -> Result<Port, Errno> {
        inside(|| self.0.bind_interdomain(remote, remote_port))
    }

    fn bind_virq(&self, virq: Virq, vcpu: VcpuId) -> Result<Port, Errno> {
        inside(|| self.0.bind_virq(virq, vcpu))
    }

    fn unmask(&self, port: Port) -> Result<(), Errno> {
        inside(|| self.0.unmask(port))
    }

    fn close(&self, port: Port) -> Result<(), Errno> {
        inside(|| self.0.close(port))
    }

    unsafe fn init_control(&self, vcpu: VcpuId, control: Gfn) -> Result<(), Errno> {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.init_control(vcpu, control) })
    }

    unsafe fn expand_array(&self, page: Gfn) -> Result<(), Errno> {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.expand_array(page) })
    }

    fn shared_info(&self) -> NonNull<u8> {
        inside(|| self.0.shared_info())
    }

    unsafe fn grant_copy(&self, ops: &mut [GrantCopy]) -> Result<(), Errno> {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.grant_copy(ops) })
    }

    unsafe fn grant_map(&self, ops: &mut [GrantMap]) -> Result<(), Errno> {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.grant_map(ops) })
    }

    unsafe fn grant_unmap(&self, ops: &mut [GrantUnmap]) -> Result<(), Errno> {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.grant_unmap(ops) })
    }

    fn cache_flush(&self, ops: &mut [CacheFlush]) -> Result<(), Errno> {
        inside(|| self.0.cache_flush(ops))
    }

    fn grant_table_size(&self) -> Result<GrantTableSize, Errno> {
        inside(|| self.0.grant_table_size())
    }

    fn grant_table_frame(&self, index: u32) -> Result<NonNull<u8>, Errno> {
        inside(|| self.0.grant_table_frame(index))
    }

    fn alloc_pages(&self, count: NonZeroUsize) -> Option<NonNull<u8>> {
        inside(|| self.0.alloc_pages(count))
    }

    unsafe fn free_pages(&self, pages: NonNull<u8>, count: NonZeroUsize) {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.free_pages(pages, count) });
    }

    fn virt_to_gfn(&self, page: NonNull<u8>) -> Gfn {
        inside(|| self.0.virt_to_gfn(page))
    }

    fn window(&self) -> Option<Window> {
        inside(|| self.0.window())
    }

    fn release_window(&self, window: Window) {
        inside(|| self.0.release_window(window));
    }

    fn mapped(&self, window: &Window) -> NonNull<u8> {
        inside(|| self.0.mapped(window))
    }
}

/// How often memory was asked for while so many packets were carried.
fn allocations(load: Load) -> u64 {
    let mut bench = Bench::new(load, Quiet, |watched| WATCHED.set(watched));
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

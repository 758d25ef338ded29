//! What the simulator itself costs. Run with `cargo test -p sim --release --test speed -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::hint::black_box;
use std::time::{Duration, Instant};

use common::{IDENTITY, bus, frame, granted, map_op, take_upcall};
use hypercall::abi::{
    CacheFlush, CopyEnd, GNTCOPY_SOURCE_GREF, GNTMAP_READONLY, GNTTAB_CACHE_CLEAN, GrantCopy,
    GrantUnmap,
};
use hypercall::{GrantRef, GrantStatus, Hypervisor};
use sim::{DmaConfig, DmaDevice, DomainConfig, Sim, SimHv};

fn per_op(name: &str, ops: usize, rounds: usize, mut round: impl FnMut()) -> Duration {
    round();
    let begin = Instant::now();
    for _ in 0..rounds {
        round();
    }
    let each = begin.elapsed() / (ops * rounds) as u32;
    println!("{name:40}{each:>12.1?}");
    each
}

fn three(sim: &Sim) -> [SimHv; 3] {
    let dom0 = DomainConfig::dom0();
    [
        sim.create(DomainConfig { features: dom0.features | IDENTITY, ..dom0 }),
        sim.create(DomainConfig::guest()),
        sim.create(DomainConfig::guest()),
    ]
}

#[test]
#[ignore = "timings mean something with optimisation and nothing else running"]
fn costs() {
    let micro = Duration::from_micros(1);
    let each = per_op("a machine with 3 domains", 1, 1000, || {
        let sim = Sim::new();
        black_box(three(&sim));
    });
    assert!(each < 1000 * micro);
    per_op("a strict one", 1, 300, || {
        let sim = Sim::strict();
        black_box(three(&sim));
    });
    let sim = Sim::new();
    let [dom0, guest, _] = three(&sim);
    let grefs: Vec<u32> = (8..72).collect();
    for gref in &grefs {
        granted(&sim, &guest, dom0.id(), *gref);
    }
    let to = frame(&dom0);
    for len in [64, 1500, 4096] {
        let mut ops: Vec<_> = grefs
            .iter()
            .map(|gref| GrantCopy {
                source: CopyEnd::granted(guest.id(), GrantRef(*gref), 0),
                dest: CopyEnd::own(to, 0),
                len,
                flags: GNTCOPY_SOURCE_GREF,
                status: GrantStatus::UNTOUCHED,
            })
            .collect();
        let each = per_op(&format!("grant copy of {len} bytes, in 64s"), 64, 2000, || {
            // SAFETY: nobody has references to these pages.
            unsafe { dom0.grant_copy(&mut ops).unwrap() };
        });
        assert!(ops.iter().all(|op| op.status.is_ok()));
        assert!(len > 64 || each < micro);
    }
    for (name, sim) in [("", Sim::new()), (" (strict)", Sim::strict())] {
        let [dom0, guest, _] = three(&sim);
        for gref in &grefs {
            granted(&sim, &guest, dom0.id(), *gref);
        }
        // Beside many mappings that stay.
        granted(&sim, &guest, dom0.id(), 100);
        let windows: Vec<_> = (0..64).map(|_| dom0.window().unwrap()).collect();
        let each = per_op(&format!("grant map and unmap, in 64s{name}"), 64, 500, || {
            let mut maps: Vec<_> = grefs
                .iter()
                .zip(&windows)
                .map(|(gref, window)| map_op(guest.id(), *gref, window, GNTMAP_READONLY))
                .collect();
            // SAFETY: the windows are held above.
            unsafe { dom0.grant_map(&mut maps).unwrap() };
            let mut unmaps: Vec<_> = maps
                .iter()
                .map(|op| GrantUnmap {
                    host_addr: op.host_addr,
                    dev_bus_addr: 0,
                    handle: op.handle,
                    status: GrantStatus::UNTOUCHED,
                })
                .collect();
            // SAFETY: nobody looks at the windows.
            unsafe { dom0.grant_unmap(&mut unmaps).unwrap() };
            assert!(unmaps.iter().all(|op| op.status.is_ok()));
        });
        assert!(!name.is_empty() || each < 2 * micro);
    }
    let theirs = guest.alloc_unbound(dom0.id()).unwrap();
    let ours = dom0.bind_interdomain(guest.id(), theirs).unwrap();
    per_op("notify and take the upcall", 1, 100_000, || {
        dom0.notify(ours).unwrap();
        black_box(take_upcall(&guest));
    });
    per_op("features", 1, 100_000, || {
        black_box(dom0.features(0).unwrap());
    });
    let device = DmaDevice::new(&sim, dom0.id(), DmaConfig::BARE);
    let at = bus(&sim, &dom0, to);
    let mut packet = [0; 1500];
    per_op("cache clean and DMA read of 1500 bytes", 1, 20_000, || {
        let op = GNTTAB_CACHE_CLEAN;
        let flush = CacheFlush { dev_bus_addr: at.0, offset: 0, length: 1500, op };
        dom0.cache_flush(&mut [flush]).unwrap();
        assert!(device.read(at, &mut packet));
    });
    per_op("page taken and given back", 1, 20_000, || {
        let page = dom0.alloc_pages(common::pages(1)).unwrap();
        // SAFETY: nobody else knows of it.
        unsafe { dom0.free_pages(page, common::pages(1)) };
    });
    per_op("ledger", 1, 500, || drop(black_box(sim.ledger())));
    let end = Instant::now();
    let many = Sim::new();
    let [_, many_pages, _] = three(&many);
    for _ in 0..10_000 {
        many_pages.alloc_pages(common::pages(1)).unwrap();
    }
    println!("{:40}{:>12.1?}", "10,000 pages, each", end.elapsed() / 10_000);
    let end = Instant::now();
    many.destroy(many_pages.id());
    println!("{:40}{:>12.1?}", "and their end", end.elapsed());
}

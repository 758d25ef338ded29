//! The cases. Each does [`instructions::ITEMS`] of its things.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]
#![allow(missing_docs, unused_qualifications, reason = "what the macros make")]

#[path = "../../../examples/two-guests/tests/bench/mod.rs"]
#[expect(dead_code, reason = "the tests of costs look at more of it")]
mod bench;
#[cfg(peer)]
mod peer;
#[path = "../../../examples/two-guests/tests/quiet/mod.rs"]
mod quiet;
mod ring;
mod small;

use std::sync::atomic::{AtomicBool, Ordering};

use bench::{Bench, Load};
use gungraun::{
    Callgrind, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group, main,
};
use instructions::ITEMS;
use netback::datapath::{Arch, Datapath, Facts, Nic};
use quiet::Quiet;
use ring::rings;
use sim::DomainConfig;
use small::parts;

/// Whether a case is under way.
static COUNTING: AtomicBool = AtomicBool::new(false);

/// What happens in here is not counted.
pub fn inside<T>(call: impl FnOnce() -> T) -> T {
    if COUNTING.load(Ordering::Relaxed) { uncounted(call) } else { call() }
}

/// The collection is toggled where this begins and where it ends, so it is to be called while a case is under way alone.
#[inline(never)]
fn uncounted<T>(call: impl FnOnce() -> T) -> T {
    call()
}

/// A case, in whose calls of [`inside`] nothing is counted.
pub fn counted(case: impl FnOnce()) {
    COUNTING.store(true, Ordering::Relaxed);
    case();
    COUNTING.store(false, Ordering::Relaxed);
}

/// Two guests and the backend between them, under load.
fn connected(path: Datapath, size: usize) -> Bench<Quiet> {
    let facts = Facts {
        arch: Arch::Arm,
        grant_copy: true,
        cache_flush: true,
        iommu_maps: false,
        uplink: Some(Nic { coherent: false }),
    };
    Bench::new(Load { path, size, first_index: 0 }, (DomainConfig::dom0(), facts), Quiet, |_| {})
}

#[library_benchmark(setup = connected)]
#[bench::copy_64(Datapath::Copy, 64)]
#[bench::copy_1500(Datapath::Copy, 1500)]
#[bench::copy_65535(Datapath::Copy, 65_535)]
#[bench::direct_1500(Datapath::Direct, 1500)]
#[bench::direct_65535(Datapath::Direct, 65_535)]
#[bench::static_64(Datapath::Static, 64)]
#[bench::static_1500(Datapath::Static, 1500)]
#[bench::static_65535(Datapath::Static, 65_535)]
#[bench::map_1500(Datapath::Map, 1500)]
#[bench::map_65535(Datapath::Map, 65_535)]
fn carry(mut bench: Bench<Quiet>) -> Bench<Quiet> {
    let end = bench.arrived.0 + ITEMS;
    counted(|| {
        while bench.arrived.0 < end {
            bench.turn();
        }
    });
    assert_eq!(bench.arrived.0, end, "so many in whole turns");
    bench
}

library_benchmark_group!(name = packets, benchmarks = [carry]);

/// Which `memcpy` the C library takes would depend on the processor and its caches: it takes the plainest that there is on x86_64.
const TUNABLES: &str = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX2,-AVX_Fast_Unaligned_Load,-ERMS,-SSSE3:\
                        glibc.cpu.x86_non_temporal_threshold=0x1000000";

main!(
    config = LibraryBenchmarkConfig::default().env("GLIBC_TUNABLES", TUNABLES).tool(
        Callgrind::with_args(["--toggle-collect=instructions::uncounted*", "--cache-sim=no"])
    ),
    library_benchmark_groups = [packets, rings, parts]
);

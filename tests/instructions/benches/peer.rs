//! The same by Xen's ring.h, in C.

use std::ffi::{c_int, c_uint};

use gungraun::library_benchmark;
use instructions::ITEMS;

use crate::ring::BATCH;

// SAFETY: as in peer.c.
unsafe extern "C" {
    /// To be called first, once, and by no two threads.
    fn peer_init();
    /// `packet` and `to` have `size` bytes, at most a page. By no two threads at a time.
    fn peer_batch(count: c_uint, packet: *const u8, size: c_uint, to: *mut u8) -> c_int;
}

fn peer(size: usize) -> (Vec<u8>, Vec<u8>) {
    // SAFETY: a case has a process and a thread of its own.
    unsafe { peer_init() };
    (vec![0x5a; size], vec![0; size])
}

#[library_benchmark(setup = peer)]
#[bench::descriptors(0)]
#[bench::copy_64(64)]
#[bench::copy_1500(1500)]
fn ring_h((packet, mut to): (Vec<u8>, Vec<u8>)) -> (Vec<u8>, Vec<u8>) {
    for _ in 0..ITEMS / u64::from(BATCH) {
        let size = packet.len() as c_uint;
        // SAFETY: `peer` came before, and both have `size` bytes.
        let done = unsafe { peer_batch(BATCH.into(), packet.as_ptr(), size, to.as_mut_ptr()) };
        assert!(done >= 0);
    }
    (packet, to)
}

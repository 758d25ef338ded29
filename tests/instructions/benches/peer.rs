//! The same by Xen's ring.h, in C.

use std::ffi::{c_int, c_uint};

use gungraun::library_benchmark;
use instructions::ITEMS;

use crate::ring::BATCH;

/// Sends, takes, answers and reaps so many packets.
type Batch = unsafe extern "C" fn(count: c_uint, packet: *const u8, to: *mut u8) -> c_int;

// SAFETY: as in peer.c.
unsafe extern "C" {
    /// To be called first, once, and by no two threads.
    fn peer_init();
    /// No bytes are looked at. By no two threads at a time, as the others.
    fn peer_descriptors(count: c_uint, packet: *const u8, to: *mut u8) -> c_int;
    /// `packet` and `to` have as many bytes as the name says.
    fn peer_copy_64(count: c_uint, packet: *const u8, to: *mut u8) -> c_int;
    /// Likewise.
    fn peer_copy_1500(count: c_uint, packet: *const u8, to: *mut u8) -> c_int;
}

struct Peer {
    batch: Batch,
    packet: Vec<u8>,
    to: Vec<u8>,
}

fn peer(batch: Batch, size: usize) -> Peer {
    // SAFETY: a case has a process and a thread of its own.
    unsafe { peer_init() };
    Peer { batch, packet: vec![0x5a; size], to: vec![0; size] }
}

#[library_benchmark(setup = peer)]
#[bench::descriptors(peer_descriptors, 0)]
#[bench::copy_64(peer_copy_64, 64)]
#[bench::copy_1500(peer_copy_1500, 1500)]
fn ring_h(mut peer: Peer) -> Peer {
    for _ in 0..ITEMS / u64::from(BATCH) {
        // SAFETY: `peer_init` came before, and both have as many bytes as this one takes.
        let done =
            unsafe { (peer.batch)(BATCH.into(), peer.packet.as_ptr(), peer.to.as_mut_ptr()) };
        assert!(done >= 0);
    }
    peer
}

//! Both ends of a TX ring in one thread: what a ring costs, with nothing above it. The peer in C does the same.

use std::ptr::NonNull;

use grant::{SharedMemory, SharedPage};
use gungraun::{library_benchmark, library_benchmark_group};
use hypercall::{GrantRef, PAGE_SIZE};
use instructions::ITEMS;
use netif::ring::{TxBackRing, TxFrontRing};
use netif::slot::{TxFlags, TxId, TxRequest, TxResponse, TxStatus};

#[cfg(peer)]
use crate::peer::ring_h;

/// Packets for each publish.
pub const BATCH: u16 = 32;

/// Bytes of a page, where a page is to begin.
#[repr(align(4096))]
struct Aligned(#[expect(dead_code, reason = "used through its address")] [u8; PAGE_SIZE]);

/// Shared pages, each seen by two ends.
fn pages(count: usize) -> [Vec<SharedPage>; 2] {
    let ours: &'static mut [Aligned] =
        Vec::leak((0..count).map(|_| Aligned([0; PAGE_SIZE])).collect());
    let bases: Vec<NonNull<u8>> = ours.iter_mut().map(|page| NonNull::from(page).cast()).collect();
    // SAFETY: each is a page, aligned, never given back, and from here on reached through these alone.
    [0, 1].map(|_| bases.iter().map(|base| unsafe { SharedPage::new(*base) }).collect())
}

/// Two ends, and the pages of packets.
pub struct Pair {
    front: TxFrontRing<SharedPage>,
    free: Vec<u16>,
    sent: Vec<SharedPage>,
    back: TxBackRing<SharedPage>,
    seen: Vec<SharedPage>,
    packet: Vec<u8>,
    to: Vec<u8>,
}

fn pair(size: usize) -> Pair {
    let [mut sent, mut seen] = pages(257);
    let (front, back) = (sent.pop().unwrap(), seen.pop().unwrap());
    Pair {
        front: TxFrontRing::init(front),
        back: TxBackRing::attach(back).unwrap(),
        free: (0..256).collect(),
        sent,
        seen,
        packet: vec![0x5a; size],
        to: vec![0; size],
    }
}

impl Pair {
    fn send(&mut self) {
        for _ in 0..BATCH {
            let id = self.free.pop().unwrap();
            if !self.packet.is_empty() {
                self.sent[usize::from(id)].write_bytes(0, &self.packet);
            }
            let request = TxRequest {
                gref: GrantRef(id.into()),
                offset: 0,
                flags: TxFlags::empty(),
                id: TxId(id),
                size: self.packet.len() as u16,
            };
            self.front.push(request).unwrap();
        }
        let _ = self.front.publish();
    }

    fn serve(&mut self) {
        self.back.poll().unwrap();
        loop {
            while let Some(request) = self.back.take() {
                assert!(usize::from(request.offset) + usize::from(request.size) <= PAGE_SIZE);
                if request.size > 0 {
                    let to = &mut self.to[..request.size.into()];
                    self.seen[request.gref.0 as usize].read_bytes(request.offset.into(), to);
                }
                self.back.push(TxResponse { id: request.id, status: TxStatus::OKAY }).unwrap();
            }
            if !self.back.arm().unwrap() {
                break;
            }
        }
        let _ = self.back.publish();
    }

    fn reap(&mut self) {
        self.front.poll().unwrap();
        loop {
            while let Some((_, response)) = self.front.take() {
                assert_eq!(response.status, TxStatus::OKAY);
                self.free.push(response.id.0);
            }
            if !self.front.arm().unwrap() {
                break;
            }
        }
    }
}

#[library_benchmark(setup = pair)]
#[bench::descriptors(0)]
#[bench::copy_64(64)]
#[bench::copy_1500(1500)]
fn ring(mut pair: Pair) -> Pair {
    for _ in 0..ITEMS / u64::from(BATCH) {
        pair.send();
        pair.serve();
        pair.reap();
    }
    pair
}

#[cfg(peer)]
library_benchmark_group!(name = rings, benchmarks = [ring, ring_h]);
#[cfg(not(peer))]
library_benchmark_group!(name = rings, benchmarks = [ring]);

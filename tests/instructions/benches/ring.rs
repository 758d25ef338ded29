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

/// Packets that can be on their way.
const SLOTS: usize = 256;

type Pages = Box<[SharedPage; SLOTS]>;

/// Shared pages, each seen by two ends.
fn pages<const COUNT: usize>() -> [Box<[SharedPage; COUNT]>; 2] {
    let ours: &'static mut [Aligned] =
        Vec::leak((0..COUNT).map(|_| Aligned([0; PAGE_SIZE])).collect());
    let bases: Vec<NonNull<u8>> = ours.iter_mut().map(|page| NonNull::from(page).cast()).collect();
    [0, 1].map(|_| {
        // SAFETY: each is a page, aligned, never given back, and from here on reached through these alone.
        let pages: Box<[_]> = bases.iter().map(|base| unsafe { SharedPage::new(*base) }).collect();
        pages.try_into().unwrap()
    })
}

/// Two ends, and the pages of packets, whose size the compiler knows as C's does.
pub struct Pair<const SIZE: usize> {
    front: TxFrontRing<SharedPage>,
    free: [u16; SLOTS],
    nr_free: usize,
    sent: Pages,
    back: TxBackRing<SharedPage>,
    seen: Pages,
    packet: [u8; SIZE],
    to: [u8; SIZE],
}

fn pair<const SIZE: usize>() -> Box<dyn Ends> {
    let [[front], [back]] = pages::<1>().map(|page| *page);
    let [sent, seen] = pages();
    Box::new(Pair {
        front: TxFrontRing::init(front),
        back: TxBackRing::attach(back).unwrap(),
        free: std::array::from_fn(|slot| slot as u16),
        nr_free: SLOTS,
        sent,
        seen,
        packet: [0x5a; SIZE],
        to: [0; SIZE],
    })
}

impl<const SIZE: usize> Pair<SIZE> {
    fn send(&mut self) {
        for _ in 0..BATCH {
            self.nr_free -= 1;
            let id = self.free[self.nr_free];
            if SIZE > 0 {
                self.sent[usize::from(id)].write_bytes(0, &self.packet);
            }
            let request = TxRequest {
                gref: GrantRef(id.into()),
                offset: 0,
                flags: TxFlags::empty(),
                id: TxId(id),
                size: SIZE as u16,
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
                assert!(usize::from(request.size) == SIZE);
                if SIZE > 0 {
                    let page = &self.seen[request.gref.0 as usize];
                    page.read_bytes(request.offset.into(), &mut self.to);
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
                assert!(response.status == TxStatus::OKAY);
                self.free[self.nr_free] = response.id.0;
                self.nr_free += 1;
            }
            if !self.front.arm().unwrap() {
                break;
            }
        }
    }
}

/// A pair of any size.
pub trait Ends {
    /// Sends [`BATCH`] packets, takes them, answers them, and takes the answers.
    fn batch(&mut self);
}

impl<const SIZE: usize> Ends for Pair<SIZE> {
    fn batch(&mut self) {
        self.send();
        self.serve();
        self.reap();
    }
}

#[library_benchmark]
#[bench::descriptors(pair::<0>())]
#[bench::copy_64(pair::<64>())]
#[bench::copy_1500(pair::<1500>())]
fn ring(mut pair: Box<dyn Ends>) -> Box<dyn Ends> {
    for _ in 0..ITEMS / u64::from(BATCH) {
        pair.batch();
    }
    pair
}

#[cfg(peer)]
library_benchmark_group!(name = rings, benchmarks = [ring, ring_h]);
#[cfg(not(peer))]
library_benchmark_group!(name = rings, benchmarks = [ring]);

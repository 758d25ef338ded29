//! The ring under a model checker: no wake-up is lost, and either fence left out loses one.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p netif --release --test loom`
//!
//! Two items are published one by one while the other end drains twice. One against one is too small to show anything:
//! the event index then never changes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
#![cfg(loom)]

use core::sync::atomic::Ordering;

use grant::SharedMemory;
use hypercall::GrantRef;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU32, fence};
use netif::ring::{Notify, RxBackRing, RxFrontRing, TxBackRing, TxFrontRing};
use netif::slot::{RxId, RxRequest, RxResponse, TxId, TxRequest, TxResponse, TxStatus};

const ITEMS: u32 = 2;

/// The four indices and the two slots that are used.
#[derive(Debug)]
struct Page {
    indices: [AtomicU32; 4],
    slots: [AtomicU32; 4],
}

/// One end's view of the page; a twin's has no fence.
#[derive(Clone, Debug)]
struct End {
    page: Arc<Page>,
    fenced: bool,
}

impl End {
    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        match offset / 4 {
            index @ 0..4 => Some(&self.page.indices[index]),
            index @ 16..20 => Some(&self.page.slots[index - 16]),
            // Padding, which the frontend clears.
            _ => None,
        }
    }
}

impl SharedMemory for End {
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.word(offset).unwrap().load(order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        if let Some(word) = self.word(offset) {
            word.store(value, order);
        }
    }
    fn fence(&self) {
        if self.fenced {
            fence(Ordering::SeqCst);
        }
    }
    fn read_bytes(&self, _: usize, _: &mut [u8]) {}
    fn write_bytes(&self, _: usize, _: &[u8]) {}
}

/// An event channel: pending, or not.
#[derive(Clone)]
struct Event(Arc<AtomicBool>);

impl Event {
    fn new() -> Self {
        Self(Arc::new(AtomicBool::new(false)))
    }
    fn send(&self, notify: Notify) {
        if notify.is_needed() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
    fn pending(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

struct Fences {
    publish: bool,
    arm: bool,
}

fn ends(front: bool, back: bool) -> (RxFrontRing<End>, RxBackRing<End>) {
    let page = Arc::new(Page {
        indices: core::array::from_fn(|_| AtomicU32::new(0)),
        slots: core::array::from_fn(|_| AtomicU32::new(0)),
    });
    let front = RxFrontRing::init(End { page: page.clone(), fenced: front });
    let back = RxBackRing::attach(End { page, fenced: back }).unwrap();
    (front, back)
}

fn request(number: u32) -> RxRequest {
    RxRequest { id: RxId(number as u16), gref: GrantRef(number + 7) }
}

/// The frontend publishes requests, the backend drains.
fn requests(fences: Fences) {
    loom::model(move || {
        let (mut front, mut back) = ends(fences.publish, fences.arm);
        let event = Event::new();
        let sender = event.clone();
        let producer = loom::thread::spawn(move || {
            for number in 0..ITEMS {
                front.push(request(number)).unwrap();
                sender.send(front.publish());
            }
        });
        let mut seen = 0;
        let mut asleep = false;
        for _ in 0..2 {
            event.clear();
            back.poll().unwrap();
            while let Some(taken) = back.take() {
                assert_eq!(taken, request(seen));
                seen += 1;
            }
            asleep = !back.arm().unwrap();
        }
        producer.join().unwrap();
        assert!(!asleep || seen == ITEMS || event.pending(), "lost wake-up");
    });
}

/// The backend publishes responses, the frontend drains.
fn responses(fences: Fences) {
    loom::model(move || {
        let (mut front, mut back) = ends(fences.arm, fences.publish);
        for number in 0..ITEMS {
            front.push(request(number)).unwrap();
        }
        let _ = front.publish();
        assert_eq!(back.poll(), Ok(ITEMS));
        let taken: Vec<_> = back.requests().collect();
        assert_eq!(taken, [request(0), request(1)]);
        let response = |id| RxResponse { id, offset: 64, ..RxResponse::default() };
        let event = Event::new();
        let sender = event.clone();
        let producer = loom::thread::spawn(move || {
            for request in taken {
                back.push(response(request.id)).unwrap();
                sender.send(back.publish());
            }
        });
        let mut seen = 0;
        let mut asleep = false;
        for _ in 0..2 {
            event.clear();
            front.poll().unwrap();
            while let Some((slot, taken)) = front.take() {
                assert_eq!((slot, taken), (seen, response(RxId(seen))));
                seen += 1;
            }
            asleep = !front.arm().unwrap();
        }
        producer.join().unwrap();
        assert!(!asleep || u32::from(seen) == ITEMS || event.pending(), "lost wake-up");
    });
}

#[test]
fn requests_lose_no_wake_up() {
    requests(Fences { publish: true, arm: true });
}

#[test]
#[should_panic(expected = "lost wake-up")]
fn requests_without_the_publish_fence_lose_one() {
    requests(Fences { publish: false, arm: true });
}

#[test]
#[should_panic(expected = "lost wake-up")]
fn requests_without_the_arm_fence_lose_one() {
    requests(Fences { publish: true, arm: false });
}

#[test]
fn responses_lose_no_wake_up() {
    responses(Fences { publish: true, arm: true });
}

#[test]
#[should_panic(expected = "lost wake-up")]
fn responses_without_the_publish_fence_lose_one() {
    responses(Fences { publish: false, arm: true });
}

#[test]
#[should_panic(expected = "lost wake-up")]
fn responses_without_the_arm_fence_lose_one() {
    responses(Fences { publish: true, arm: false });
}

/// A TX ring of two slots in a page: the ring's 256 come to lie on two, of which no more are in use at once. Slots are used
/// again as often as in a ring of two.
#[derive(Debug)]
struct SmallPage {
    indices: [AtomicU32; 4],
    slots: [AtomicU32; 6],
}

/// One end's view of it; a twin's loads of the indices order nothing.
#[derive(Clone, Debug)]
struct SmallEnd {
    page: Arc<SmallPage>,
    acquires: bool,
}

impl SmallEnd {
    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        match offset / 4 {
            index @ 0..4 => Some(&self.page.indices[index]),
            4..16 => None,
            index => Some(&self.page.slots[(index - 16) % 6]),
        }
    }
}

impl SharedMemory for SmallEnd {
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        let order = if self.acquires { order } else { Ordering::Relaxed };
        self.word(offset).unwrap().load(order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        if let Some(word) = self.word(offset) {
            word.store(value, order);
        }
    }
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
    fn read_bytes(&self, _: usize, _: &mut [u8]) {}
    fn write_bytes(&self, _: usize, _: &[u8]) {}
}

/// Requests in all, so that each slot is used three times.
const RECYCLED: u32 = 6;

/// The frontend's end, and what it has in flight.
struct Sender {
    ring: TxFrontRing<SmallEnd>,
    /// By id: the number of the request that is out, if one is.
    out: [Option<u32>; 2],
    sent: u32,
    done: u32,
}

impl Sender {
    /// Takes responses, and sends again with their ids and slots.
    fn turn(&mut self) {
        self.ring.poll().unwrap();
        while let Some((_, response)) = self.ring.take() {
            let out = self.out.get_mut(usize::from(response.id.0)).and_then(Option::take);
            let number = out.expect("mangled");
            assert_eq!(response.status, TxStatus(number as i16), "mangled");
            self.done += 1;
        }
        while self.sent < RECYCLED && self.ring.outstanding() < 2 {
            let Some(id) = self.out.iter().position(Option::is_none) else { break };
            self.out[id] = Some(self.sent);
            self.ring.push(numbered(self.sent, id)).unwrap();
            self.sent += 1;
        }
        let _ = self.ring.publish();
    }
}

fn numbered(number: u32, id: usize) -> TxRequest {
    let (gref, offset) = (GrantRef(number + 7), number as u16 + 1);
    TxRequest { gref, offset, id: TxId(id as u16), size: 100, ..TxRequest::default() }
}

/// The backend's end.
struct Answerer {
    ring: TxBackRing<SmallEnd>,
    taken: u32,
}

impl Answerer {
    /// Takes all there is, and answers the last first.
    fn turn(&mut self) {
        self.ring.poll().unwrap();
        let requests: Vec<_> = self.ring.requests().collect();
        let first = self.taken;
        for request in &requests {
            assert_eq!(*request, numbered(self.taken, request.id.0.into()), "mangled");
            self.taken += 1;
        }
        for (number, request) in (first..self.taken).zip(&requests).rev() {
            let status = TxStatus(number as i16);
            self.ring.push(TxResponse { id: request.id, status }).unwrap();
        }
        let _ = self.ring.publish();
    }
}

/// Both ends at work at once on two slots; in the end each request has been answered once.
fn recycling(acquires: bool) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let page = Arc::new(SmallPage {
            indices: core::array::from_fn(|_| AtomicU32::new(0)),
            slots: core::array::from_fn(|_| AtomicU32::new(0)),
        });
        let end = SmallEnd { page, acquires };
        // The indices wrap on the way.
        let ring = TxFrontRing::init_at(end.clone(), 2_u32.wrapping_neg());
        let mut sender = Sender { ring, out: [None; 2], sent: 0, done: 0 };
        let mut answerer = Answerer { ring: TxBackRing::attach(end).unwrap(), taken: 0 };
        sender.turn();
        let other = loom::thread::spawn(move || {
            for _ in 0..2 {
                answerer.turn();
            }
            answerer
        });
        for _ in 0..2 {
            sender.turn();
        }
        let mut answerer = other.join().unwrap();
        while sender.done < RECYCLED {
            answerer.turn();
            sender.turn();
        }
        assert_eq!((sender.sent, answerer.taken, sender.ring.outstanding()), (6, 6, 0));
    });
}

#[test]
fn responses_out_of_order_free_slots_for_requests() {
    recycling(true);
}

#[test]
#[should_panic(expected = "mangled")]
fn indices_that_are_read_without_order_mangle_slots() {
    recycling(false);
}

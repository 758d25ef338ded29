//! Both ends of the ring over one page: accounting, wrap-around, and what a peer can write into it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use core::sync::atomic::Ordering::Relaxed;
use std::collections::VecDeque;

use common::Page;
use grant::SharedMemory;
use hypercall::GrantRef;
use netif::ring::{Full, RingFault, TxBackRing, TxFrontRing, layout};
use netif::slot::{TxFlags, TxId, TxRequest, TxResponse, TxStatus};
use proptest::prelude::*;

const STARTS: [u32; 3] = [0, 1_000, 3_u32.wrapping_neg()];

fn request(number: u32) -> TxRequest {
    TxRequest {
        gref: GrantRef(number ^ 0xa5a5_5a5a),
        offset: number as u16,
        flags: TxFlags::from_bits_retain(!number as u16),
        id: TxId(number as u16),
        size: (number >> 3) as u16,
    }
}

fn ends(page: &Page, start: u32) -> (TxFrontRing<&Page>, TxBackRing<&Page>) {
    let front = TxFrontRing::init_at(page, start);
    (front, TxBackRing::attach(page).unwrap())
}

fn set(page: &Page, at: usize, value: u32) {
    page.store_u32(at, value, Relaxed);
}

#[test]
fn a_page_holds_256_slots() {
    assert_eq!(TxBackRing::<Page>::ENTRIES, 256);
    assert_eq!(netif::ring::RxBackRing::<Page>::ENTRIES, 256);
    assert_eq!(netif::ctrl::CtrlBackRing::<Page>::ENTRIES, 128);
}

#[test]
fn hostile_01_producer_too_far_ahead() {
    for start in STARTS {
        let page = Page::new();
        let (_front, mut back) = ends(&page, start);
        set(&page, layout::REQ_PROD, start.wrapping_add(256));
        assert_eq!(back.poll(), Ok(256));
        set(&page, layout::REQ_PROD, start.wrapping_add(257));
        assert!(matches!(back.poll(), Err(RingFault::Overrun { ahead: 257, limit: 256, .. })));
    }
}

#[test]
fn hostile_02_producer_moves_back() {
    for start in STARTS {
        let page = Page::new();
        let (_front, mut back) = ends(&page, start);
        set(&page, layout::REQ_PROD, start.wrapping_add(5));
        assert_eq!(back.poll(), Ok(5));
        let _ = back.take();
        // Back, but not behind what was taken: still no producer does this.
        let to = start.wrapping_add(3);
        set(&page, layout::REQ_PROD, to);
        assert_eq!(back.poll(), Err(RingFault::MovedBack { from: start.wrapping_add(5), to }));
        set(&page, layout::REQ_PROD, start.wrapping_sub(1));
        assert!(matches!(back.poll(), Err(RingFault::MovedBack { .. })));
    }
}

#[test]
fn hostile_03_refuses_a_ring_that_cannot_be() {
    for start in STARTS {
        let page = Page::new();
        let _ = TxFrontRing::init_at(&page, start);
        set(&page, layout::REQ_PROD, start.wrapping_add(256));
        assert!(TxBackRing::attach(&page).is_ok());
        for ahead in [257, 1 << 31, u32::MAX] {
            set(&page, layout::REQ_PROD, start.wrapping_add(ahead));
            assert!(TxBackRing::attach(&page).is_err());
        }
    }
}

#[test]
fn hostile_05_own_indices_are_private() {
    let page = Page::new();
    let (mut front, mut back) = ends(&page, 0);
    for number in 0..4 {
        front.push(request(number)).unwrap();
    }
    assert!(front.publish().is_needed());
    assert_eq!(back.poll(), Ok(4));
    for at in (layout::REQ_EVENT..layout::SLOTS).step_by(4) {
        set(&page, at, 0xdead_beef);
    }
    for number in 0..4 {
        assert_eq!(back.take(), Some(request(number)));
        back.push(TxResponse { id: TxId(number as u16), status: TxStatus::OKAY }).unwrap();
    }
    let _ = back.publish();
    assert_eq!(page.load_u32(layout::RSP_PROD, Relaxed), 4);
    assert_eq!(front.poll(), Ok(4));
}

#[test]
fn hostile_31_takes_no_more_than_it_can_answer() {
    let page = Page::new();
    let (_front, mut back) = ends(&page, 0);
    set(&page, layout::REQ_PROD, 256);
    assert_eq!(back.poll(), Ok(256));
    assert_eq!(back.requests().count(), 256);
    set(&page, layout::REQ_PROD, 512);
    assert_eq!(back.poll(), Ok(0));
    assert_eq!(back.take(), None);
    assert_eq!(back.arm(), Ok(false));
    back.push(TxResponse::default()).unwrap();
    assert_eq!(back.poll(), Ok(1));
}

#[test]
fn hostile_42_43_backend_answers_what_was_not_asked() {
    for start in STARTS {
        let page = Page::new();
        let (mut front, _back) = ends(&page, start);
        front.push(request(0)).unwrap();
        front.push(request(1)).unwrap();
        let _ = front.publish();
        front.push(request(2)).unwrap(); // pushed, not published: not asked yet
        set(&page, layout::RSP_PROD, start.wrapping_add(3));
        assert!(matches!(front.poll(), Err(RingFault::Overrun { ahead: 3, limit: 2, .. })));
        set(&page, layout::RSP_PROD, start.wrapping_add(2));
        assert_eq!(front.poll(), Ok(2));
        set(&page, layout::RSP_PROD, start.wrapping_add(1));
        assert!(matches!(front.poll(), Err(RingFault::MovedBack { .. })));
    }
}

#[test]
fn a_response_needs_a_request() {
    let page = Page::new();
    let (mut front, mut back) = ends(&page, 0);
    assert_eq!(back.push(TxResponse::default()), Err(Full));
    front.push(request(0)).unwrap();
    let _ = front.publish();
    assert_eq!(back.poll(), Ok(1));
    assert_eq!(back.push(TxResponse::default()), Err(Full));
    let _ = back.take();
    assert_eq!(back.unanswered(), 1);
    back.push(TxResponse::default()).unwrap();
    assert_eq!(back.push(TxResponse::default()), Err(Full));
    assert!(back.publish().is_needed());
    assert!(!back.publish().is_needed());
}

#[test]
fn wakes_when_as_many_as_needed_are_there() {
    for start in STARTS {
        let page = Page::new();
        let (mut front, mut back) = ends(&page, start);
        assert_eq!(back.arm_for(3), Ok(false));
        for (number, needed) in [(0, false), (1, false), (2, true), (3, false)] {
            front.push(request(number)).unwrap();
            assert_eq!(front.publish().is_needed(), needed);
        }
        assert_eq!(back.arm_for(4), Ok(true));
        assert_eq!(back.arm_for(5), Ok(false));
    }
}

#[test]
fn a_new_backend_takes_up_where_responses_end() {
    let page = Page::new();
    let (mut front, mut back) = ends(&page, u32::MAX);
    for number in 0..3 {
        front.push(request(number)).unwrap();
    }
    let _ = front.publish();
    assert_eq!(back.poll(), Ok(3));
    assert_eq!(back.requests().count(), 3);
    back.push(TxResponse::default()).unwrap();
    let _ = back.publish();
    let page = back.into_inner();
    let mut next = TxBackRing::attach(page).unwrap();
    assert_eq!(next.poll(), Ok(2));
    assert_eq!(next.take(), Some(request(1)));
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Push(u8),
    PublishRequests,
    TakeRequests(u8),
    Answer(u8),
    PublishResponses,
    TakeResponses(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<u8>().prop_map(Step::Push),
        Just(Step::PublishRequests),
        any::<u8>().prop_map(Step::TakeRequests),
        any::<u8>().prop_map(Step::Answer),
        Just(Step::PublishResponses),
        any::<u8>().prop_map(Step::TakeResponses),
    ]
}

proptest! {
    /// Against queues: every request arrives once, unchanged and in order, and so does every response.
    #[test]
    fn behaves_as_queues(
        start in prop_oneof![Just(0), Just(1_000), Just(3_u32.wrapping_neg()), any::<u32>()],
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let page = Page::new();
        let (mut front, mut back) = ends(&page, start);
        let (mut pushed, mut published) = (VecDeque::new(), VecDeque::new());
        let (mut taken, mut answered, mut visible) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
        let mut number = 0;
        let mut outstanding = 0;
        for step in steps {
            match step {
                Step::Push(count) => for _ in 0..count {
                    let fits = outstanding < 256;
                    prop_assert_eq!(u32::from(front.next_slot()), start.wrapping_add(number) % 256);
                    prop_assert_eq!(front.push(request(number)).is_ok(), fits);
                    if fits {
                        pushed.push_back(request(number));
                        number += 1;
                        outstanding += 1;
                    }
                },
                Step::PublishRequests => {
                    let _ = front.publish();
                    published.append(&mut pushed);
                }
                Step::TakeRequests(count) => {
                    prop_assert_eq!(back.poll(), Ok(published.len() as u32));
                    for request in back.requests().take(count.into()) {
                        prop_assert_eq!(Some(request), published.pop_front());
                        taken.push_back(request.id);
                    }
                }
                Step::Answer(count) => for _ in 0..count {
                    let id = taken.pop_front();
                    let response = TxResponse { id: id.unwrap_or_default(), status: TxStatus::OKAY };
                    prop_assert_eq!(back.push(response).is_ok(), id.is_some());
                    answered.extend(id);
                },
                Step::PublishResponses => {
                    let _ = back.publish();
                    visible.append(&mut answered);
                }
                Step::TakeResponses(count) => {
                    prop_assert_eq!(front.poll(), Ok(visible.len() as u32));
                    for (_, response) in front.responses().take(count.into()) {
                        prop_assert_eq!(Some(response.id), visible.pop_front());
                        outstanding -= 1;
                    }
                }
            }
            prop_assert_eq!(back.unanswered(), taken.len() as u32);
            prop_assert_eq!(front.free(), 256 - outstanding);
        }
    }

    /// Whatever a peer writes into the indices, an end refuses it or stays within the ring.
    #[test]
    fn survives_any_index(writes in prop::collection::vec((0_usize..4, any::<u32>(), any::<bool>()), 1..60)) {
        let page = Page::new();
        let (mut front, mut back) = ends(&page, 0);
        let mut near = 0_u32;
        for (index, far, is_far) in writes {
            near = near.wrapping_add(far % 300);
            set(&page, index * 4, if is_far { far } else { near });
            if back.poll().is_ok() {
                let taken = back.requests().count() as u32;
                prop_assert!(back.unanswered() <= 256);
                for _ in 0..taken / 2 {
                    back.push(TxResponse::default()).unwrap();
                }
                let _ = back.publish();
                let _ = back.arm();
            }
            let _ = front.push(request(0));
            let _ = front.publish();
            if front.poll().is_ok() {
                let _ = front.responses().count();
                prop_assert!(front.outstanding() <= 256);
                let _ = front.arm();
            }
        }
    }
}

//! A frontend's TX ring: its indices and slots are the input.

use std::sync::atomic::Ordering;

use grant::SharedMemory as _;
use netif::offload::ETHERNET_HEADER;
use netif::ring::{TxBackRing, TxFrontRing, layout};
use netif::slot::{Slot as _, TxRequest, TxResponse, TxStatus};
use netif::tx::{MAX_SLOTS, Packet, Verdict, assemble};

use crate::input::Input;
use crate::page::Page;

/// Bytes of a slot in the ring.
const ENTRY: usize = TxRequest::SIZE;
const ENTRIES: u32 = TxBackRing::<Page>::ENTRIES;

fn at(index: u32) -> usize {
    layout::SLOTS + (index % ENTRIES) as usize * ENTRY
}

fn check(packet: &Packet) {
    let sizes: usize = packet.slots.iter().map(|slot| usize::from(slot.size)).sum();
    assert_eq!(sizes, usize::from(packet.size));
    assert!((1..=MAX_SLOTS).contains(&packet.slots.len()));
    assert!(packet.slots[0].size >= ETHERNET_HEADER);
    for slot in &packet.slots {
        assert!(usize::from(slot.offset) + usize::from(slot.size) <= 4096, "{slot:?}");
    }
}

/// Requests in batches, answered at once or later; every slot taken is answered once, in the form it is owed.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let start = if input.flag() { 1000_u32.wrapping_neg() } else { input.word() };
    let page = Page::default();
    drop(TxFrontRing::init_at(page.clone(), start));
    let mut back = TxBackRing::attach(page.clone()).map_err(|(fault, _)| fault).unwrap();
    let mut prod = start;
    let mut answered = start;
    let mut owed = Vec::new();
    while !input.is_empty() {
        let command = input.byte();
        if command == 0xff {
            // Anywhere in the page, the backend's own indices included.
            let place = usize::from(input.half() % 1024) * 4;
            page.store_u32(place, input.word(), Ordering::Relaxed);
            prod = page.load_u32(layout::REQ_PROD, Ordering::Relaxed);
        } else {
            for _ in 0..command % 32 {
                TxRequest::decode(input.words()).store(&page, at(prod));
                prod = prod.wrapping_add(1);
            }
            page.store_u32(layout::REQ_PROD, prod, Ordering::Relaxed);
        }
        let Ok(available) = back.poll() else { return };
        assert!(available + back.unanswered() <= ENTRIES);
        loop {
            let mut requests = Vec::new();
            let before = back.unanswered();
            let verdict = assemble(&mut back.requests().inspect(|request| requests.push(*request)));
            let Ok(verdict) = verdict else { return };
            let Some(verdict) = verdict else { break };
            let taken = back.unanswered() - before;
            assert_eq!(verdict.slots(), taken as usize);
            assert_eq!(requests.len(), taken as usize);
            let extras = extras_of(&requests);
            let (answers, status) = match verdict {
                Verdict::Packet(packet) => {
                    check(&packet);
                    assert_eq!(packet.size, requests[0].size);
                    assert_eq!(packet.slots.len() + extras, requests.len());
                    (packet.answers, TxStatus::OKAY)
                }
                Verdict::Multicast { answers, .. } => {
                    assert_eq!(requests.len(), 1 + extras);
                    (answers, TxStatus::OKAY)
                }
                Verdict::Drop { answers, .. } => (answers, TxStatus::ERROR),
            };
            owed.push((requests, extras, answers, status));
        }
        if command & 0x40 != 0 {
            continue;
        }
        let before = answered;
        for (requests, extras, answers, status) in owed.drain(..) {
            back.answer(answers, status).unwrap();
            for (number, request) in requests.iter().enumerate() {
                let response = TxResponse::load(&page, at(answered));
                answered = answered.wrapping_add(1);
                if (1..=extras).contains(&number) {
                    assert_eq!(response.status, TxStatus::NULL);
                } else {
                    assert_eq!(response, TxResponse { id: request.id, status });
                }
            }
        }
        assert_eq!(back.unanswered(), 0);
        assert!(back.push(TxResponse::default()).is_err(), "nothing is owed");
        let _ = back.publish();
        if answered != before {
            assert_eq!(page.load_u32(layout::RSP_PROD, Ordering::Relaxed), answered);
        }
        let _ = back.arm();
    }
}

/// How many of a packet's requests are extras: those right behind the first that say so of each other.
fn extras_of(requests: &[TxRequest]) -> usize {
    const EXTRA_INFO: u32 = 8 << 16;
    const MORE_EXTRAS: u32 = 1 << 8;
    let [_, flags, _] = requests[0].encode();
    if flags & EXTRA_INFO == 0 {
        return 0;
    }
    let last = requests[1..].iter().position(|request| request.encode()[0] & MORE_EXTRAS == 0);
    1 + last.unwrap()
}

//! The control ring, both ways: messages keep every bit that means something, and both ends stay within the ring.

use std::sync::atomic::Ordering;

use grant::SharedMemory as _;
use netif::ctrl::{
    CtrlBackRing, CtrlFrontRing, CtrlRequest, CtrlResponse, CtrlStatus, StaticGrant,
};
use netif::slot::{Extra, TxRequest};

use crate::input::Input;
use crate::page::Page;

/// Messages as they come, then both ends on a page into which anything is written.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let start = input.word();
    let page = Page::default();
    let mut front = CtrlFrontRing::init_at(page.clone(), start);
    let mut back = CtrlBackRing::attach(page.clone()).map_err(|(fault, _)| fault).unwrap();
    while !input.is_empty() {
        match input.byte() % 4 {
            0 => codec(&mut input),
            1 => {
                let free = front.free();
                let pushed = front.push(CtrlRequest::decode(input.words()));
                assert_eq!(pushed.is_ok(), free > 0);
                let _ = front.publish();
            }
            2 => page.store_u32(usize::from(input.byte()) * 4, input.word(), Ordering::Relaxed),
            _ => {
                if back.poll().is_ok() {
                    while let Some(CtrlRequest { id, kind, data }) = back.take() {
                        let [data, ..] = data;
                        let status = CtrlStatus(u32::from(input.byte()));
                        back.push(CtrlResponse { id, kind, status, data }).unwrap();
                    }
                    let _ = back.publish();
                    let _ = back.arm();
                }
                assert_eq!(back.unanswered(), 0);
                if front.poll().is_ok() {
                    assert!(front.available() <= front.outstanding());
                    let _ = front.responses().count();
                    let _ = front.arm();
                }
                assert!(front.outstanding() <= CtrlFrontRing::<Page>::ENTRIES);
            }
        }
    }
}

fn codec(input: &mut Input<'_>) {
    let words = input.words::<4>();
    assert_eq!(CtrlRequest::decode(words).encode(), words);
    let [a, b, c, _] = words;
    assert_eq!(CtrlResponse::decode([a, b, c]).encode(), [a, b, c]);
    // Of the flags only one has a meaning.
    let entry = StaticGrant::decode([a, b]);
    let known = 0xffff_0000 | u32::from(StaticGrant::READONLY);
    assert_eq!(entry.encode(), [a, b & known]);
    if let Ok(extra) = TxRequest::decode([a, b, c]).as_extra() {
        assert_eq!(Extra::decode(extra.encode()), Ok(extra));
    }
}

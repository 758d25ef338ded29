extern crate std;

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::AtomicU32;

use proptest::prelude::*;

use super::*;
use crate::wire::interface::{ERROR_PROTO, FEATURE_RECONNECTION};

/// A page in ordinary memory; a byte is written by one side only, so a read-modify-write of its word is enough.
struct Page(Vec<AtomicU32>);

impl Page {
    fn starting_at(index: u32) -> Arc<Self> {
        let page = Self((0..1024).map(|_| AtomicU32::new(0)).collect());
        for offset in [REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD] {
            page.0[offset / 4].store(index, Ordering::Relaxed);
        }
        Arc::new(page)
    }
}

#[derive(Clone)]
struct Shared(Arc<Page>);

impl SharedMemory for Shared {
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.0.0[offset / 4].load(order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.0.0[offset / 4].store(value, order);
    }
    fn fence(&self) {
        core::sync::atomic::fence(Ordering::SeqCst);
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        for (at, to) in (offset..).zip(to) {
            *to = self.load_u32(at, Ordering::Relaxed).to_le_bytes()[at % 4];
        }
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        for (at, byte) in (offset..).zip(from) {
            let mut word = self.load_u32(at, Ordering::Relaxed).to_le_bytes();
            word[at % 4] = *byte;
            self.store_u32(at, u32::from_le_bytes(word), Ordering::Relaxed);
        }
    }
}

type Ends = (StoreRing<Shared, ClientEnd>, StoreRing<Shared, ServerEnd>);

fn ends(index: u32) -> (Shared, Ends) {
    let page = Shared(Page::starting_at(index));
    let ends = (StoreRing::attach(page.clone()), StoreRing::attach(page.clone()));
    (page, ends)
}

#[test]
fn layout_is_the_header_s() {
    let (page, (mut client, mut server)) = ends(0);
    assert_eq!(client.write(b"abcd"), Ok(4));
    assert_eq!(server.write(b"xy"), Ok(2));
    assert_eq!(page.load_u32(0, Ordering::Relaxed), u32::from_le_bytes(*b"abcd"));
    assert_eq!(page.load_u32(1024, Ordering::Relaxed), u32::from_le_bytes(*b"xy\0\0"));
    let indices = [2048, 2052, 2056, 2060].map(|at| page.load_u32(at, Ordering::Relaxed));
    assert_eq!(indices, [0, 4, 0, 2]);
    let mut buffer = [0; 8];
    assert_eq!(server.read(&mut buffer), Ok(4));
    assert_eq!(client.read(&mut buffer), Ok(2));
    let indices = [2048, 2052, 2056, 2060].map(|at| page.load_u32(at, Ordering::Relaxed));
    assert_eq!(indices, [4, 4, 2, 2]);
}

#[test]
fn a_full_ring_takes_no_more() {
    let (_, (mut client, mut server)) = ends(u32::MAX - 100);
    let bytes: Vec<u8> = (0..1500u32).map(|i| i.to_le_bytes()[0]).collect();
    assert_eq!(client.write(&bytes), Ok(1024));
    assert_eq!(client.write(&bytes), Ok(0));
    let mut buffer = vec![0; 2000];
    assert_eq!(server.read(&mut buffer[..10]), Ok(10));
    assert_eq!(client.write(&bytes[1024..]), Ok(10));
    assert_eq!(server.read(&mut buffer[10..]), Ok(1024));
    assert_eq!(buffer[..1034], bytes[..1034]);
    assert_eq!(server.read(&mut buffer), Ok(0));
}

#[test]
fn impossible_indices_break_the_ring_for_good() {
    // One byte more than a ring, and further: ahead for a producer, behind for a consumer.
    for at in [REQ_PROD, RSP_CONS] {
        for distance in [1025, 1 << 31, u32::MAX] {
            let value = if at == REQ_PROD { distance } else { 0u32.wrapping_sub(distance) };
            let (page, (_, mut server)) = ends(0);
            page.store_u32(at, value, Ordering::Relaxed);
            let mut buffer = [0; 8];
            let result = if at == REQ_PROD { server.read(&mut buffer) } else { server.write(&[1]) };
            assert!(matches!(result, Err(BadIndex { .. })));
            page.store_u32(at, 0, Ordering::Relaxed);
            assert!(server.read(&mut buffer).is_err() && server.write(&[1]).is_err());
        }
    }
}

#[test]
fn what_the_peer_writes_over_our_indices_is_ignored() {
    let (page, (mut client, mut server)) = ends(0);
    assert_eq!(client.write(b"ab"), Ok(2));
    let mut buffer = [0; 8];
    assert_eq!(server.read(&mut buffer[..1]), Ok(1));
    page.store_u32(REQ_CONS, 77, Ordering::Relaxed);
    assert_eq!(server.read(&mut buffer), Ok(1));
    assert_eq!(buffer[0], b'b');
    assert_eq!(page.load_u32(REQ_CONS, Ordering::Relaxed), 2);
    page.store_u32(RSP_PROD, 77, Ordering::Relaxed);
    assert_eq!(server.write(b"z"), Ok(1));
    assert_eq!(client.read(&mut buffer), Ok(1));
}

#[test]
fn a_reset_makes_the_ring_usable_again() {
    let (page, (mut client, mut server)) = ends(5);
    server.offer(FEATURE_RECONNECTION);
    assert_eq!(client.server_features(), FEATURE_RECONNECTION);
    assert_eq!(client.write(b"half a mess"), Ok(11));
    server.report(ERROR_PROTO);
    assert_eq!(client.server_error(), ERROR_PROTO);
    client.request_reset();
    assert!(!server.is_connected() && !client.is_connected());
    assert!(matches!(client.write(b"x"), Err(BadIndex { .. })));
    server.reset();
    let mut client = StoreRing::<_, ClientEnd>::attach(page);
    assert!(client.is_connected());
    assert_eq!(client.server_error(), 0);
    let mut buffer = [0; 8];
    assert_eq!(server.read(&mut buffer), Ok(0));
    assert_eq!(client.write(b"x"), Ok(1));
    assert_eq!(server.read(&mut buffer), Ok(1));
}

#[test]
fn a_client_talks_through_the_ring() {
    let (_, (mut ring, mut server)) = ends(0);
    let mut client = Client::new();
    assert!(!ring.exchange(&mut client).unwrap().notify());
    client.read_many((0..100).map(|i| alloc::format!("/some/rather/long/path/number/{i}")));
    let moved = ring.exchange(&mut client).unwrap();
    assert!(moved.notify());
    assert_eq!((moved.read, moved.written), (0, client_bytes(&mut server)));
    server.write(&[0xff; 16]).unwrap();
    assert!(matches!(ring.exchange(&mut client), Err(ExchangeError::Protocol(_))));
    assert!(client.is_dead());
}

fn client_bytes(server: &mut StoreRing<Shared, ServerEnd>) -> usize {
    server.read(&mut [0; 2000]).unwrap()
}

#[test]
fn bytes_keep_their_order_between_threads() {
    const TOTAL: usize = 200_000;
    let (_, (mut client, mut server)) = ends(u32::MAX - 5000);
    let byte = |at: usize| (at * 31 + at / 251) as u8;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut sent = 0;
            while sent < TOTAL {
                let chunk: Vec<u8> = (sent..TOTAL.min(sent + 300)).map(byte).collect();
                sent += client.write(&chunk).unwrap();
                std::thread::yield_now();
            }
        });
        let mut got = 0;
        let mut buffer = [0; 700];
        while got < TOTAL {
            let count = server.read(&mut buffer).unwrap();
            assert!((got..).zip(&buffer[..count]).all(|(at, read)| byte(at) == *read));
            got += count;
            std::thread::yield_now();
        }
    });
}

proptest! {
    #[test]
    fn a_ring_is_a_queue(
        start: u32,
        steps in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..1500), 0..1500usize), 0..30),
    ) {
        let (_, (mut client, mut server)) = ends(start);
        let mut model = alloc::collections::VecDeque::new();
        for (bytes, count) in steps {
            let written = server.write(&bytes).unwrap();
            prop_assert_eq!(written, bytes.len().min(1024 - model.len()));
            model.extend(&bytes[..written]);
            let mut buffer = vec![0; count];
            let read = client.read(&mut buffer).unwrap();
            prop_assert_eq!(read, count.min(model.len()));
            prop_assert_eq!(&buffer[..read], model.drain(..read).collect::<Vec<u8>>());
        }
    }

    #[test]
    fn garbage_in_the_page_never_panics(words: Vec<(u16, u32)>) {
        let (page, (mut client, mut server)) = ends(0);
        for (at, value) in words {
            page.store_u32(2048 + usize::from(at % 7) * 4, value, Ordering::Relaxed);
            let mut buffer = [0; 100];
            let _ = (server.read(&mut buffer), server.write(&buffer));
            let _ = (client.read(&mut buffer), client.write(&buffer));
        }
    }
}

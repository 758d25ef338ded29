//! Access to shared pages: the right bytes and no others, at every alignment.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use grant::{GrantTable, GrantedPage, SharedMemory, SharedPage};
use hypercall::PAGE_SIZE;
use sim::{DomainConfig, Sim, SimHv};

fn pages() -> (Sim, [GrantedPage<SimHv>; 2]) {
    let sim = Sim::new();
    let (peer, guest) = (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
    let table = GrantTable::new(&guest).unwrap();
    let pages = [(); 2].map(|()| table.share(peer.id(), false).unwrap());
    (sim, pages)
}

/// Offsets and lengths around every boundary between pieces, and at the end of the page.
fn cases() -> impl Iterator<Item = (usize, usize)> {
    // Where long pieces begin to go in bulk, with what lies before and behind them: at 512 or 1,024 bytes.
    let bulk = [512, 1024].into_iter().flat_map(|from| from - 1..=from + 16);
    let bulk = bulk.chain([575, 576, 1087, 1088, 1500, 2040, 2113]);
    let lengths = (0..=26).chain([63, 64]).chain(bulk).chain([PAGE_SIZE - 9, PAGE_SIZE]);
    let at =
        |len| (0..9).map(move |offset| (offset, len)).chain([(PAGE_SIZE.wrapping_sub(len), len)]);
    lengths.flat_map(at).filter(|(offset, len)| offset + len <= PAGE_SIZE)
}

fn pattern(seed: usize) -> Vec<u8> {
    (0..PAGE_SIZE).map(|i| (i * 31 + i / 251 + seed) as u8).collect()
}

fn whole(page: &SharedPage) -> Vec<u8> {
    let word = |at| page.load_u32(at, Ordering::Relaxed).to_ne_bytes();
    (0..PAGE_SIZE).step_by(4).flat_map(word).collect()
}

fn fill(page: &SharedPage, bytes: &[u8]) {
    for (at, word) in (0..).step_by(4).zip(bytes.as_chunks().0) {
        page.store_u32(at, u32::from_ne_bytes(*word), Ordering::Relaxed);
    }
}

#[test]
fn reading_gives_the_bytes_asked_for() {
    let (_sim, [page, _]) = pages();
    let bytes = pattern(1);
    fill(page.page(), &bytes);
    let mut buffer = vec![0; PAGE_SIZE + 16];
    for ((offset, len), shift) in cases().flat_map(|case| (0..8).map(move |shift| (case, shift))) {
        buffer.fill(0xa5);
        page.page().read_bytes(offset, &mut buffer[shift..shift + len]);
        let (before, got) = buffer.split_at(shift);
        let (got, behind) = got.split_at(len);
        assert_eq!(got, &bytes[offset..offset + len], "{len} at {offset} to {shift}");
        assert!(before.iter().chain(behind).all(|byte| *byte == 0xa5), "{len} at {offset}");
    }
}

#[test]
fn writing_changes_the_bytes_meant_and_no_others() {
    let (_sim, [page, _]) = pages();
    let (before, new) = (pattern(1), pattern(9));
    for ((offset, len), shift) in cases().flat_map(|case| (0..8).map(move |shift| (case, shift))) {
        let shift = shift.min(PAGE_SIZE - len);
        fill(page.page(), &before);
        page.page().write_bytes(offset, &new[shift..shift + len]);
        let mut expected = before.clone();
        expected[offset..offset + len].copy_from_slice(&new[shift..shift + len]);
        assert_eq!(whole(page.page()), expected, "{len} at {offset} from {shift}");
    }
}

#[test]
fn copying_between_pages_works_at_every_shift() {
    let (_sim, [from, to]) = pages();
    let (before, new) = (pattern(1), pattern(9));
    fill(from.page(), &new);
    for ((offset, len), shift) in cases().flat_map(|case| (0..8).map(move |shift| (case, shift))) {
        let to_offset = (offset + shift).min(PAGE_SIZE - len);
        fill(to.page(), &before);
        SharedPage::copy_between(from.page(), offset, to.page(), to_offset, len);
        let mut expected = before.clone();
        expected[to_offset..to_offset + len].copy_from_slice(&new[offset..offset + len]);
        assert_eq!(whole(to.page()), expected, "{len} from {offset} to {to_offset}");
    }
}

#[test]
fn nothing_goes_beyond_the_end_of_the_page() {
    let (_sim, [from, to]) = pages();
    let bytes = pattern(3);
    fill(from.page(), &bytes);
    for offset in [PAGE_SIZE - 5, PAGE_SIZE, PAGE_SIZE + 3, usize::MAX - 2, usize::MAX] {
        let room = PAGE_SIZE.saturating_sub(offset);
        let mut got = [0xa5; 16];
        from.page().read_bytes(offset, &mut got);
        assert_eq!(got[..room], bytes[PAGE_SIZE - room..]);
        assert_eq!(got[room..], [0xa5; 16][room..]);
        from.page().write_bytes(offset, &bytes[PAGE_SIZE - room..]);
        from.page().write_bytes(offset, &[]);
        SharedPage::copy_between(from.page(), offset, to.page(), 8, 16);
        SharedPage::copy_between(from.page(), 8, to.page(), offset, usize::MAX);
        assert_eq!(whole(from.page()), bytes);
    }
    let mut expected = vec![0; PAGE_SIZE];
    expected[8..13].copy_from_slice(&bytes[PAGE_SIZE - 5..]);
    expected[PAGE_SIZE - 5..].copy_from_slice(&bytes[8..13]);
    assert_eq!(whole(to.page()), expected);
}

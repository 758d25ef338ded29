//! How a packet that goes from guest to guest by reference lies in its receiver's pages: as in its sender's, where that takes few slots.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::raw::Raw;
use common::{Machine, frame};
use grant::SharedMemory;
use netback::datapath::Datapath;
use netif::slot::{RxFlags, TxFlags, TxStatus};

/// A page's worth of bytes, and so many are copied privately.
const PAGE: u16 = 4096;
const HEADER: usize = 128;

/// How a packet came, and what it took.
#[derive(PartialEq, Debug)]
struct Came {
    /// Bytes in each page.
    lens: Vec<u16>,
    /// Copies into them.
    copies: u64,
}

/// Sends a packet whose sender has it in pieces of such sizes, and looks at what its receiver gets.
fn send(sizes: &[u16]) -> Came {
    send_to(sizes, &[])
}

/// To a receiver with more keys.
fn send_to(sizes: &[u16], keys: &[(&'static str, String)]) -> Came {
    let mut machine = Machine::new();
    let receiver = machine.bare_guest();
    let mut to = Raw::new(&machine.guests[receiver], 0);
    machine.offer(receiver, &[to.keys(), keys.to_vec()].concat(), "4");
    assert!(machine.is_connected(receiver));
    // Known to the switch.
    let hello = frame([0xff; 6], machine.guests[receiver].mac(), 60, 0);
    to.data.write_bytes(0, &hello);
    to.push_plain(0, 60);
    to.go();
    machine.settle();
    to.post(&machine.guests[receiver], 40);
    to.go();
    machine.settle();

    let (sender, mut from) = machine.raw();
    let (dst, src) = (machine.guests[receiver].mac(), machine.guests[sender].mac());
    let size = sizes.iter().sum::<u16>();
    let packet = frame(dst, src, size.into(), 9);
    let (mut bytes, mut pages) = (&*packet, Vec::new());
    for (id, len) in (0..).zip(sizes) {
        let (piece, rest) = bytes.split_at((*len).into());
        bytes = rest;
        // At the end of its page, as odd as it may be.
        let (page, offset) = (machine.guests[sender].page(true), PAGE - len);
        page.write_bytes(offset.into(), piece);
        let last = usize::from(id) + 1 == sizes.len();
        let flags = if last { TxFlags::empty() } else { TxFlags::MORE_DATA };
        let size = if id == 0 { size } else { *len };
        let request = from.request(id, offset, size, flags);
        from.push(netif::slot::TxRequest { gref: page.gref(), ..request });
        pages.push(page);
    }
    from.go();
    machine.settle();
    assert!(from.responses().iter().all(|response| response.status == TxStatus::OKAY));
    let paths = machine.status(sender).unwrap().counters.tx_paths;
    assert_eq!(paths.of(Datapath::Direct).packets, 1);

    to.rx.poll().unwrap();
    let responses: Vec<_> = to.rx.responses().map(|(_, response)| response).collect();
    let data = responses.iter().zip(&to.rx_data).filter(|(response, _)| response.status.0 > 4);
    let (mut got, mut lens) = (Vec::new(), Vec::new());
    for (response, page) in data {
        let len = response.status.bytes().unwrap();
        let mut bytes = vec![0; len.into()];
        page.read_bytes(response.offset.into(), &mut bytes);
        got.extend(bytes);
        lens.push(len);
    }
    assert!(got == packet);
    let more = |flags: RxFlags| flags.contains(RxFlags::MORE_DATA);
    assert_eq!(responses.iter().filter(|response| more(response.flags)).count() + 1, lens.len());
    machine.assert_no_buffer_out();
    Came { lens, copies: paths.of(Datapath::Direct).copies }
}

/// Copies of headers out of the first two pieces and into the first page come on top of those of the rest.
fn headers(sizes: &[u16]) -> u64 {
    if usize::from(sizes[0]) < HEADER { 3 } else { 2 }
}

#[test]
fn pieces_stay_as_they_are_and_take_one_copy_each() {
    let sizes = [66, PAGE, 4000, 3000, 4000];
    let came = send(&sizes);
    assert_eq!(came.lens, [128, 4034, 4000, 3000, 4000]);
    assert_eq!(came.copies, headers(&sizes) + 4);
}

#[test]
fn what_fits_into_a_page_whole_shares_it() {
    let came = send(&[1000, 1500, 1500, 2000, 2000, 500]);
    assert_eq!(came.lens, [4000, 4000, 500]);
}

#[test]
fn a_packet_of_many_small_pieces_takes_no_more_slots_than_it_must() {
    // No two of them fit into a page, and full pages are half as many.
    let came = send(&[2100; 17]);
    assert_eq!(came.lens, [[PAGE; 8].as_slice(), &[17 * 2100 - 8 * PAGE]].concat());
}

#[test]
fn linux_has_room_for_eighteen_if_the_first_is_small() {
    let most = [[66, PAGE].as_slice(), &[3800; 16]].concat();
    let came = send(&most);
    assert_eq!(came.lens, [[128, 4034].as_slice(), &[3800; 16]].concat());
    let large = [[300, PAGE].as_slice(), &[3800; 16]].concat();
    let came = send(&large);
    assert_eq!(came.lens[..15], [PAGE; 15]);
    assert_eq!(came.lens.len(), 16);
}

#[test]
fn with_room_left_free_pages_are_filled() {
    let keys = [("xdp-headroom", "256".to_string())];
    let came = send_to(&[66, 4000, 4000], &keys);
    assert_eq!(came.lens, [PAGE - 256, PAGE - 256, 8066 - 2 * (PAGE - 256)]);
}

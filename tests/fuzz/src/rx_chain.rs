//! Packets to a guest: what a backend builds, and what a frontend makes of responses that are the input.

use hypercall::PageOffset;
use netif::offload::{Checksum, ETHERNET_HEADER, Gso};
use netif::rx::{RxDrop, RxPacket, Taken, assemble};
use netif::slot::{GsoType, RxId, RxResponse};
use netif::tx::{MAX_SLOTS, PacketHash};

use crate::input::Input;

const ENTRIES: u16 = 256;

/// Either a packet that is described and read again, or responses that are anything.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    if input.flag() {
        while !input.is_empty() {
            describe(&mut input);
        }
    } else {
        read(&mut input);
    }
}

/// The parts of a packet lie end to end, and a frontend reads what was meant.
fn describe(input: &mut Input<'_>) {
    let kinds = input.byte();
    let len = input.half();
    let headroom = PageOffset::new(input.half() % 4096).unwrap();
    let headroom = if kinds & 1 == 0 { PageOffset::ZERO } else { headroom };
    let gso =
        if kinds & 2 == 0 { None } else { Gso::new(input.half(), GsoType(input.byte())).ok() };
    let hash = (kinds & 4 != 0).then(|| PacketHash {
        kind: input.byte(),
        algorithm: input.byte(),
        value: input.word(),
    });
    let checksum = [Checksum::Unverified, Checksum::Validated, Checksum::Blank];
    let packet = RxPacket {
        pieces: &[],
        len,
        headroom,
        checksum: checksum[usize::from(kinds >> 3) % 3],
        gso,
        hash,
    };
    let first = u16::from(input.byte());
    let slots = packet.slots();
    if slots > ENTRIES.into() {
        // No ring has so many.
        return;
    }
    let mut next = 0;
    let mut parts = Vec::new();
    for at in 0..slots {
        let Some(part) = packet.part(at) else { continue };
        assert_eq!(u32::from(part.start), next);
        assert!(usize::from(part.offset.get()) + usize::from(part.len) <= 4096);
        next += u32::from(part.len);
        parts.push(part);
    }
    assert_eq!(next, u32::from(len));
    assert_eq!(packet.part(slots), None);
    let slot_of = |at: usize| (usize::from(first) + at) as u16 % ENTRIES;
    let responses: Vec<_> = (0..slots)
        .map(|at| (slot_of(at), packet.response(at, RxId(slot_of(at))).unwrap()))
        .collect();
    assert_eq!(packet.response(slots, RxId(0)), None);
    let mut rest = responses.iter().copied();
    let verdict = assemble(&mut rest).unwrap().unwrap();
    assert_eq!(verdict.taken, Taken { first, count: slots as u16 });
    assert_eq!(rest.next(), None);
    match verdict.packet {
        Ok(received) => {
            assert_eq!(received.size, u32::from(len));
            assert_eq!(
                (received.checksum, received.gso, received.hash),
                (packet.checksum, packet.gso, packet.hash)
            );
            assert_eq!(received.slots.len(), parts.len());
            for (slot, part) in received.slots.iter().zip(parts) {
                assert_eq!((slot.offset, slot.size), (part.offset.get(), part.len));
            }
        }
        Err(RxDrop::Short) => assert!(len < ETHERNET_HEADER),
        Err(RxDrop::TooManySlots) => assert!(parts.len() > MAX_SLOTS),
        Err(other) => panic!("{other}: {packet:?}"),
    }
}

/// Every slot is accounted for, and a packet lies within its pages.
fn read(input: &mut Input<'_>) {
    let named = input.flag();
    let mut slot = input.half() % ENTRIES;
    let mut responses = Vec::new();
    while !input.is_empty() && responses.len() < 300 {
        let mut response = RxResponse::decode(input.words());
        if named {
            response.id = RxId(slot);
        }
        responses.push((slot, response));
        slot = (slot + 1) % ENTRIES;
    }
    let mut rest = responses.iter().copied();
    let mut expected = responses.first().map_or(0, |(slot, _)| *slot);
    let mut taken = 0;
    while let Ok(Some(verdict)) = assemble(&mut rest) {
        assert_eq!(verdict.taken.first, expected);
        expected = (expected + verdict.taken.count) % ENTRIES;
        taken += usize::from(verdict.taken.count);
        assert_eq!(taken, responses.len() - rest.len());
        let Ok(packet) = verdict.packet else { continue };
        let sizes: u32 = packet.slots.iter().map(|slot| u32::from(slot.size)).sum();
        assert_eq!(sizes, packet.size);
        assert!(packet.size >= ETHERNET_HEADER.into());
        assert!((1..=MAX_SLOTS).contains(&packet.slots.len()));
        for slot in &packet.slots {
            assert!(usize::from(slot.offset) + usize::from(slot.size) <= 4096, "{slot:?}");
            let (_, response) = responses.iter().rev().find(|(at, _)| *at == slot.slot).unwrap();
            assert!(!named || response.id.0 == slot.slot);
        }
    }
}

//! RX packets: what the backend writes is what the frontend reads, and what else may be there.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use hypercall::PageOffset;
use netif::offload::{Checksum, Gso, GsoFault};
use netif::rx::{RxDrop, RxPacket, RxVerdict, Taken, WrongId, assemble, failed};
use netif::slot::{Extra, ExtraInfo, GsoType, RxFlags, RxId, RxResponse, RxStatus};
use netif::tx::PacketHash;
use proptest::prelude::*;

const MORE: RxFlags = RxFlags::MORE_DATA;
const EXTRA: RxFlags = RxFlags::EXTRA_INFO;

fn plain(len: u16) -> RxPacket<'static> {
    let headroom = PageOffset::ZERO;
    RxPacket { pieces: &[], len, headroom, checksum: Checksum::Unverified, gso: None, hash: None }
}

fn data(slot: u16, size: i16, flags: RxFlags) -> (u16, RxResponse) {
    (slot, RxResponse { id: RxId(slot), offset: 0, flags, status: RxStatus(size) })
}

fn gso(slot: u16, size: u16, kind: u8, more: bool) -> (u16, RxResponse) {
    let info = ExtraInfo::Gso { size, kind: GsoType(kind), features: 0 };
    (slot, RxResponse::from_extra(Extra { more, info }))
}

fn judge(responses: &[(u16, RxResponse)]) -> Result<RxVerdict, WrongId> {
    let mut rest = responses.iter().copied();
    let verdict = assemble(&mut rest)?.unwrap();
    assert_eq!(usize::from(verdict.taken.count), responses.len() - rest.len());
    assert_eq!(verdict.taken.first, responses[0].0);
    Ok(verdict)
}

/// Takes all that is given, and drops it.
fn dropped(responses: &[(u16, RxResponse)]) -> RxDrop {
    let verdict = judge(responses).unwrap();
    assert_eq!(usize::from(verdict.taken.count), responses.len());
    verdict.packet.unwrap_err()
}

#[test]
fn hostile_37_slots_are_counted_exactly() {
    let gso = Gso::new(1448, GsoType::TCPV4).ok();
    let headroom = PageOffset::new(256).unwrap();
    for (packet, slots) in [
        (plain(0), 1),
        (plain(60), 1),
        (plain(4096), 1),
        (plain(4097), 2),
        (plain(65_535), 16),
        (RxPacket { gso, ..plain(65_535) }, 17),
        (RxPacket { headroom, ..plain(3840) }, 2),
        (RxPacket { headroom, ..plain(3841) }, 3),
        (RxPacket { headroom, gso, ..plain(3841) }, 4),
    ] {
        assert_eq!(packet.slots(), slots, "{packet:?}");
        assert!(packet.response(slots - 1, RxId(0)).is_some());
        assert_eq!(packet.response(slots, RxId(0)), None);
        assert_eq!(packet.part(slots), None);
    }
}

#[test]
fn hostile_38_39_a_failed_packet_is_so_many_single_errors() {
    let responses: Vec<_> = (0..3).map(|slot| (slot, failed(RxId(slot)))).collect();
    for at in 0..3 {
        let verdict = judge(&responses[at..]).unwrap();
        assert_eq!(verdict.taken, Taken { first: at as u16, count: 1 });
        assert_eq!(verdict.packet, Err(RxDrop::Status(RxStatus::ERROR)));
    }
}

#[test]
fn hostile_48_a_response_names_its_slot() {
    let (_, response) = data(3, 60, RxFlags::empty());
    assert_eq!(judge(&[(4, response)]), Err(WrongId { slot: 4, id: RxId(3) }));
    let responses = [data(3, 60, MORE), (4, response)];
    assert_eq!(judge(&responses), Err(WrongId { slot: 4, id: RxId(3) }));
}

#[test]
fn hostile_49_50_51_52_drops() {
    let none = RxFlags::empty();
    assert_eq!(dropped(&[data(0, -2, none)]), RxDrop::Status(RxStatus::DROPPED));
    let responses = [data(0, 60, MORE), data(1, -1, MORE), data(2, 60, none)];
    assert_eq!(dropped(&responses), RxDrop::Status(RxStatus::ERROR));
    assert_eq!(dropped(&[data(0, 4097, none)]), RxDrop::CrossesPage { offset: 0, size: 4097 });
    let (slot, mut response) = data(0, 100, none);
    response.offset = 65_535;
    let crosses = RxDrop::CrossesPage { offset: 65_535, size: 100 };
    assert_eq!(dropped(&[(slot, response)]), crosses);
    assert_eq!(dropped(&[data(0, 60, MORE)]), RxDrop::Missing);
    for slots in [19_u16, 20, 21, 40] {
        let responses: Vec<_> =
            (0..slots).map(|at| data(at, 60, if at + 1 < slots { MORE } else { none })).collect();
        if slots > 19 {
            assert_eq!(dropped(&responses), RxDrop::TooManySlots);
        } else {
            assert_eq!(judge(&responses).unwrap().packet.unwrap().size, 19 * 60);
        }
    }
    assert_eq!(dropped(&[data(0, 13, none)]), RxDrop::Short);
}

#[test]
fn hostile_54_55_extras() {
    assert_eq!(dropped(&[data(0, 60, EXTRA)]), RxDrop::Missing);
    assert_eq!(dropped(&[data(0, 60, EXTRA), gso(1, 100, 1, true)]), RxDrop::Missing);
    let unknown =
        |kind, more: u16| (1, RxResponse { id: RxId(kind | more << 8), ..RxResponse::default() });
    for kind in [0, 6, 255] {
        assert_eq!(
            dropped(&[data(0, 60, EXTRA), unknown(kind, 0)]),
            RxDrop::UnknownExtra(kind as u8)
        );
        // What follows it is still an extra of this packet.
        let responses = [data(0, 60, EXTRA), unknown(kind, 1), gso(2, 100, 1, false)];
        assert_eq!(dropped(&responses), RxDrop::UnknownExtra(kind as u8));
    }
    let judged = |size, kind| dropped(&[data(0, 60, EXTRA), gso(1, size, kind, false)]);
    assert_eq!(judged(0, 1), RxDrop::Gso(GsoFault::SizeZero));
    assert_eq!(judged(100, 0), RxDrop::Gso(GsoFault::UnknownType(0)));
    assert_eq!(judged(100, 3), RxDrop::Gso(GsoFault::UnknownType(3)));
}

prop_compose! {
    fn packets()(
        len in prop_oneof![14_u16..200, 14_u16..9000, 14_u16..=65_535],
        room in prop_oneof![Just(0_u16), Just(256), 0_u16..500],
        checksum in prop_oneof![Just(Checksum::Unverified), Just(Checksum::Validated), Just(Checksum::Blank)],
        gso in prop::option::of((1_u16.., 1_u8..3)),
        hash in prop::option::of(any::<(u8, u8, u32)>()),
    ) -> RxPacket<'static> {
        RxPacket {
            pieces: &[],
            len,
            headroom: PageOffset::new(room).unwrap(),
            checksum,
            gso: gso.map(|(size, kind)| Gso::new(size, GsoType(kind)).unwrap()),
            hash: hash.map(|(kind, algorithm, value)| PacketHash { kind, algorithm, value }),
        }
    }
}

proptest! {
    #[test]
    fn the_frontend_reads_what_the_backend_wrote(packet in packets(), first: u16) {
        let first = first % 256;
        let responses: Vec<_> = (0..packet.slots())
            .map(|at| {
                let slot = (first + at as u16) % 256;
                (slot, packet.response(at, RxId(slot)).unwrap())
            })
            .collect();
        let RxVerdict { taken, packet: received } = judge(&responses).unwrap();
        prop_assert_eq!(taken, Taken { first, count: packet.slots() as u16 });
        let received = received.unwrap();
        prop_assert_eq!(received.size, u32::from(packet.len));
        prop_assert_eq!(received.checksum, packet.checksum);
        prop_assert_eq!((received.gso, received.hash), (packet.gso, packet.hash));
        // The parts follow each other without a gap, each in the page of its slot.
        let mut parts = (0..packet.slots()).filter_map(|at| Some((at, packet.part(at)?)));
        let mut next = 0;
        for slot in &received.slots {
            let (at, part) = parts.next().unwrap();
            prop_assert_eq!(slot.slot, (first + at as u16) % 256);
            prop_assert_eq!((slot.offset, slot.size), (part.offset.get(), part.len));
            prop_assert_eq!(slot.offset, packet.headroom.get());
            prop_assert_eq!(part.start, next);
            next = part.start.wrapping_add(part.len);
        }
        prop_assert_eq!(parts.next(), None);
        prop_assert_eq!(next, packet.len);
    }

    #[test]
    fn any_responses_are_taken_and_bounded(words in prop::collection::vec(any::<[u32; 2]>(), 1..300), named: bool) {
        let responses: Vec<_> = words
            .iter()
            .enumerate()
            .map(|(at, &words)| {
                let slot = at as u16 % 256;
                let mut response = RxResponse::decode(words);
                if named {
                    response.id = RxId(slot);
                }
                (slot, response)
            })
            .collect();
        let mut rest = responses.iter().copied();
        let mut taken = 0;
        while let Ok(Some(verdict)) = assemble(&mut rest) {
            taken += usize::from(verdict.taken.count);
            prop_assert_eq!(taken, responses.len() - rest.len());
            if let Ok(packet) = verdict.packet {
                prop_assert!(packet.slots.iter().all(|it| it.offset + it.size <= 4096));
                let sum: u32 = packet.slots.iter().map(|it| u32::from(it.size)).sum();
                prop_assert_eq!(sum, packet.size);
            }
        }
    }
}

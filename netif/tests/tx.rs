//! TX chains: each verdict by name, and any bytes against a second reading of the rules.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use netif::mac::MacAddr;
use netif::offload::{Checksum, Gso, GsoFault, IpVersion};
use netif::slot::{Extra, ExtraInfo, GsoType, TxFlags, TxId, TxRequest, TxResponse, TxStatus};
use netif::tx::{Answers, DropReason, MulticastChange, PeerFault, Verdict, assemble};
use proptest::prelude::*;

use hypercall::GrantRef;

const MORE: TxFlags = TxFlags::MORE_DATA;
const EXTRA: TxFlags = TxFlags::EXTRA_INFO;

fn request(id: u16, offset: u16, size: u16, flags: TxFlags) -> TxRequest {
    TxRequest { gref: GrantRef(u32::from(id) + 100), offset, flags, id: TxId(id), size }
}

fn gso(size: u16, kind: u8, more: bool) -> TxRequest {
    let info = ExtraInfo::Gso { size, kind: GsoType(kind), features: 0 };
    TxRequest::from_extra(Extra { more, info })
}

/// A packet of `slots` slots that hold `each` bytes.
fn chain(slots: u16, each: u16) -> Vec<TxRequest> {
    (0..slots)
        .map(|at| {
            let flags = if at + 1 < slots { MORE } else { TxFlags::empty() };
            request(at, 0, if at == 0 { slots * each } else { each }, flags)
        })
        .collect()
}

fn judge(requests: &[TxRequest]) -> Result<Option<Verdict>, PeerFault> {
    let mut rest = requests.iter().copied();
    let verdict = assemble(&mut rest)?;
    let taken = requests.len() - rest.len();
    assert_eq!(verdict.as_ref().map_or(0, Verdict::slots), taken);
    Ok(verdict)
}

fn packet(requests: &[TxRequest]) -> netif::tx::Packet {
    match judge(requests) {
        Ok(Some(Verdict::Packet(packet))) => packet,
        other => panic!("{other:?}"),
    }
}

fn dropped(requests: &[TxRequest]) -> (DropReason, Answers) {
    match judge(requests) {
        Ok(Some(Verdict::Drop { reason, answers })) => (reason, answers),
        other => panic!("{other:?}"),
    }
}

fn fatal(requests: &[TxRequest]) -> PeerFault {
    judge(requests).unwrap_err()
}

#[test]
fn nothing_is_nothing() {
    assert_eq!(judge(&[]), Ok(None));
}

#[test]
fn flags_say_what_the_checksum_is() {
    for (flags, checksum) in [
        (TxFlags::empty(), Checksum::Unverified),
        (TxFlags::DATA_VALIDATED, Checksum::Validated),
        (TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED, Checksum::Blank),
        (TxFlags::CSUM_BLANK, Checksum::Blank),
        (TxFlags::from_bits_retain(0xfff0), Checksum::Unverified),
    ] {
        assert_eq!(packet(&[request(1, 0, 60, flags)]).checksum, checksum);
    }
}

#[test]
fn hostile_06_07_slots_that_cross_their_page() {
    let fault = |offset, size| Err(PeerFault::CrossesPage { offset, size });
    let none = TxFlags::empty();
    assert!(judge(&[request(0, 4096 - 60, 60, none)]).is_ok());
    assert_eq!(judge(&[request(0, 4096 - 59, 60, none)]), fault(4096 - 59, 60));
    assert_eq!(judge(&[request(0, 65_535, 65_535, none)]), fault(65_535, 65_535));
    // The first slot's own share is what the follow-ons leave.
    assert!(judge(&[request(0, 0, 8192, MORE), request(1, 0, 4096, none)]).is_ok());
    assert_eq!(judge(&[request(0, 0, 8193, MORE), request(1, 0, 4096, none)]), fault(0, 4097));
    assert_eq!(judge(&[request(0, 0, 100, MORE), request(1, 4090, 7, none)]), fault(4090, 7));
    // Also in a packet that is to be dropped.
    let requests = [request(0, 0, 20, MORE), request(1, 0, 30, MORE), request(2, 4090, 7, none)];
    assert_eq!(judge(&requests), fault(4090, 7));
}

#[test]
fn hostile_08_more_data_that_is_not_there() {
    assert_eq!(fatal(&[request(0, 0, 100, MORE)]), PeerFault::MissingSlot);
    assert_eq!(fatal(&chain(19, 60)[..18]), PeerFault::MissingSlot);
}

#[test]
fn hostile_09_10_11_how_many_slots() {
    for slots in 1..=19 {
        let packet = packet(&chain(slots, 60));
        assert_eq!(packet.slots.len(), usize::from(slots));
        assert_eq!(packet.size, slots * 60);
        assert!(packet.slots.iter().all(|slot| slot.size == 60));
    }
    for slots in 20..=21 {
        let (reason, answers) = dropped(&chain(slots, 60));
        assert_eq!(reason, DropReason::TooManySlots);
        let ids: Vec<_> = answers.responses(TxStatus::ERROR).map(|it| it.id.0).collect();
        assert_eq!(ids, (0..slots).collect::<Vec<_>>());
    }
    for slots in [22, 23, 200] {
        assert_eq!(fatal(&chain(slots, 60)), PeerFault::TooManySlots);
    }
}

#[test]
fn extras_are_no_slots_of_the_packet() {
    let mut requests = chain(19, 60);
    requests[0].flags |= EXTRA;
    requests.insert(1, gso(1000, 1, true));
    requests.insert(2, gso(900, 2, false));
    let packet = packet(&requests);
    assert_eq!(packet.slots.len(), 19);
    assert_eq!(packet.answers.slots(), 21);
    // Two of one type: the last one counts.
    assert_eq!(packet.gso, Gso::new(900, GsoType::TCPV6).ok());
}

#[test]
fn hostile_12_follow_ons_hold_more_than_the_packet() {
    let requests = [request(0, 0, 100, MORE), request(1, 0, 101, MORE), request(2, 0, 9, EXTRA)];
    assert_eq!(dropped(&requests).0, DropReason::FollowOnsTooLong);
}

#[test]
fn hostile_13_14_too_short() {
    let none = TxFlags::empty();
    for size in 0..14 {
        assert_eq!(dropped(&[request(0, 0, size, none)]).0, DropReason::Short);
        let requests = [request(0, 0, 100 + size, MORE), request(1, 0, 100, none)];
        assert_eq!(dropped(&requests).0, DropReason::Short);
    }
    assert_eq!(packet(&[request(0, 0, 14, none)]).size, 14);
}

#[test]
fn hostile_15_one_byte_per_slot() {
    let mut requests = chain(19, 1);
    requests[0].size = 14 + 18;
    let packet = packet(&requests);
    let sizes: Vec<_> = packet.slots.iter().map(|slot| slot.size).collect();
    assert_eq!(sizes[0], 14);
    assert!(sizes[1..].iter().all(|&size| size == 1));
}

#[test]
fn hostile_16_unknown_extras() {
    for kind in [0, 6, 7, 255] {
        let extra = TxRequest { gref: GrantRef(kind), ..TxRequest::default() };
        let fault = fatal(&[request(0, 0, 60, EXTRA), extra]);
        assert_eq!(fault, PeerFault::UnknownExtra(kind as u8));
    }
}

#[test]
fn hostile_17_extras_that_are_not_there() {
    assert_eq!(fatal(&[request(0, 0, 60, EXTRA)]), PeerFault::MissingExtra);
    let requests = [request(0, 0, 60, EXTRA), gso(1000, 1, true)];
    assert_eq!(fatal(&requests), PeerFault::MissingExtra);
}

#[test]
fn hostile_18_extra_flag_on_a_follow_on() {
    let packet = packet(&[request(0, 0, 100, MORE), request(1, 0, 50, EXTRA)]);
    assert_eq!(packet.answers.slots(), 2);
}

#[test]
fn hostile_19_20_segmentation_that_means_nothing() {
    let judged = |size, kind| judge(&[request(0, 0, 60, EXTRA), gso(size, kind, false)]);
    assert_eq!(judged(0, 1), Err(PeerFault::Gso(GsoFault::SizeZero)));
    for kind in [0, 3, 255] {
        assert_eq!(judged(1, kind), Err(PeerFault::Gso(GsoFault::UnknownType(kind))));
    }
    let packet = packet(&[request(0, 0, 60, EXTRA), gso(1448, 2, false)]);
    let gso = packet.gso.unwrap();
    assert_eq!((gso.size.get(), gso.version), (1448, IpVersion::V6));
    assert_eq!(gso.info(), ExtraInfo::Gso { size: 1448, kind: GsoType::TCPV6, features: 0 });
}

#[test]
fn hostile_23_multicast() {
    let mac = MacAddr([1, 0, 0x5e, 0, 0, 1]);
    let extra = |info| TxRequest::from_extra(Extra { more: false, info });
    for (info, expected) in [
        (ExtraInfo::McastAdd(mac), MulticastChange::Add(mac)),
        (ExtraInfo::McastDel(mac), MulticastChange::Remove(mac)),
    ] {
        let requests = [request(7, 0, 0, EXTRA), extra(info)];
        let Ok(Some(Verdict::Multicast { change, answers })) = judge(&requests) else { panic!() };
        assert_eq!(change, expected);
        let responses: Vec<_> = answers.responses(TxStatus::OKAY).collect();
        let null = TxResponse { id: TxId(0), status: TxStatus::NULL };
        assert_eq!(responses, [TxResponse { id: TxId(7), status: TxStatus::OKAY }, null]);
        let requests = [request(7, 0, 60, EXTRA | MORE), extra(info), request(8, 0, 10, MORE)];
        assert_eq!(fatal(&requests), PeerFault::MulticastWithData);
    }
}

#[test]
fn answers_come_in_the_order_of_the_requests() {
    let mut requests = chain(3, 60);
    requests[0].flags |= EXTRA;
    requests.insert(1, gso(1000, 1, true));
    requests.insert(2, gso(1000, 1, false));
    let answers = packet(&requests).answers;
    let responses: Vec<_> =
        answers.responses(TxStatus::DROPPED).map(|it| (it.id.0, it.status.0)).collect();
    assert_eq!(responses, [(0, -2), (0, 1), (0, 1), (1, -2), (2, -2)]);
}

#[derive(Debug, PartialEq)]
enum Expected {
    Nothing,
    Packet { sizes: Vec<i64> },
    Multicast,
    Drop,
    Close,
}

/// The rules once more, by other means: first split the slots as the flags say, then look at the sums.
fn oracle(words: &[[u32; 3]]) -> (Expected, usize, Vec<bool>) {
    let size = |word: &[u32; 3]| i64::from(word[2] >> 16);
    let offset = |word: &[u32; 3]| i64::from(word[1] & 0xffff);
    let flag = |word: &[u32; 3], bit: u32| word[1] >> (16 + bit) & 1 == 1;
    let Some(first) = words.first() else { return (Expected::Nothing, 0, vec![]) };
    let close = || (Expected::Close, 0, vec![]);

    let mut extras = Vec::new();
    let mut at = 1;
    let mut expects_extra = flag(first, 3);
    while expects_extra {
        let Some(extra) = words.get(at) else { return close() };
        let kind = extra[0] & 0xff;
        if !(1..=5).contains(&kind) {
            return close();
        }
        extras.push(*extra);
        expects_extra = extra[0] >> 8 & 1 == 1;
        at += 1;
    }
    let is_extra = |slots: usize| (0..slots).map(|it| (1..=extras.len()).contains(&it)).collect();
    let has = |kind: u32| extras.iter().rev().find(|extra| extra[0] & 0xff == kind);
    if has(2).or(has(3)).is_some() {
        return if flag(first, 2) { close() } else { (Expected::Multicast, at, is_extra(at)) };
    }

    let rest = &words[at..];
    let chained = if flag(first, 2) {
        rest.iter().position(|it| !flag(it, 2)).map_or(usize::MAX, |last| last + 1)
    } else {
        0
    };
    if chained > 20 {
        return close();
    }
    let follow = &rest[..chained];
    if follow.iter().any(|it| offset(it) + size(it) > 4096) {
        return close();
    }
    let taken = at + chained;
    let head = size(first) - follow.iter().map(size).sum::<i64>();
    if chained > 18 || head < 14 {
        return (Expected::Drop, taken, is_extra(taken));
    }
    if offset(first) + head > 4096 {
        return close();
    }
    if let Some(gso) = has(1)
        && (gso[0] >> 16 == 0 || !(1..=2).contains(&(gso[1] & 0xff)))
    {
        return close();
    }
    let sizes = std::iter::once(head).chain(follow.iter().map(size)).collect();
    (Expected::Packet { sizes }, taken, is_extra(taken))
}

/// Requests that often, but not always, make sense.
fn words() -> impl Strategy<Value = [u32; 3]> {
    let size = prop_oneof![0_u32..80, 0_u32..4200, any::<u16>().prop_map(u32::from)];
    let offset = prop_oneof![8 => Just(0_u32), 2 => 0_u32..4100];
    let flags =
        prop_oneof![3 => Just(0_u32), 5 => Just(4), 1 => Just(8), 1 => Just(12), 1 => 0_u32..32];
    let data = (any::<u32>(), offset, flags, any::<u16>(), size).prop_map(
        |(gref, offset, flags, id, size)| [gref, offset | flags << 16, u32::from(id) | size << 16],
    );
    let extra = (0_u32..7, 0_u32..2, 0_u32..3, 0_u32..4)
        .prop_map(|(kind, more, size, gso)| [kind | more << 8 | size << 16, gso, 0]);
    prop_oneof![6 => data, 2 => extra, 1 => any::<[u32; 3]>()]
}

fn run(words: &[[u32; 3]]) -> Result<(), TestCaseError> {
    let requests: Vec<_> = words.iter().map(|&it| TxRequest::decode(it)).collect();
    let (expected, taken, is_extra) = oracle(words);
    let mut rest = requests.iter();
    let verdict = assemble(&mut rest.by_ref().copied());
    let (seen, answers) = match verdict {
        Ok(None) => (Expected::Nothing, None),
        Ok(Some(Verdict::Packet(packet))) => {
            let sizes: Vec<_> = packet.slots.iter().map(|slot| i64::from(slot.size)).collect();
            prop_assert_eq!(sizes.iter().sum::<i64>(), i64::from(packet.size));
            prop_assert!(packet.slots.iter().all(|it| it.offset + it.size <= 4096));
            (Expected::Packet { sizes }, Some(packet.answers))
        }
        Ok(Some(Verdict::Multicast { answers, .. })) => (Expected::Multicast, Some(answers)),
        Ok(Some(Verdict::Drop { answers, .. })) => (Expected::Drop, Some(answers)),
        Err(_) => (Expected::Close, None),
    };
    prop_assert_eq!(seen, expected);
    if let Some(answers) = answers {
        prop_assert_eq!(requests.len() - rest.len(), taken);
        prop_assert_eq!(answers.slots(), taken);
        let owed: Vec<_> = requests[..taken]
            .iter()
            .zip(is_extra)
            .map(
                |(request, extra)| {
                    if extra { (TxId(0), TxStatus::NULL) } else { (request.id, TxStatus::ERROR) }
                },
            )
            .collect();
        let responses = answers.responses(TxStatus::ERROR);
        prop_assert_eq!(responses.map(|it| (it.id, it.status)).collect::<Vec<_>>(), owed);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn agrees_with_the_oracle(words in prop::collection::vec(words(), 0..30)) {
        run(&words)?;
    }

    /// Long chains of small slots, which the mix above hardly makes.
    #[test]
    fn agrees_on_long_chains(
        size in 0_u32..3000, extras in 0_usize..3, sizes in prop::collection::vec(0_u32..150, 0..24), missing: bool,
    ) {
        let more = |at: usize| u32::from(at < sizes.len() || missing) << 2;
        let mut words = vec![[1, (more(0) | u32::from(extras > 0) << 3) << 16, size << 16]];
        for at in 1..=extras {
            words.push([1 | u32::from(at < extras) << 8 | 100 << 16, 1, 0]);
        }
        for (at, size) in sizes.iter().enumerate() {
            words.push([2, more(at + 1) << 16, at as u32 | size << 16]);
        }
        run(&words)?;
    }

    #[test]
    fn agrees_on_any_bytes(words in prop::collection::vec(any::<[u32; 3]>(), 0..300)) {
        run(&words)?;
    }
}

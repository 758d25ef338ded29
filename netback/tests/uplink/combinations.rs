//! Every frame, by every way, with every offer.

use netback::datapath::Datapath;
use netback::uplink::{Offers, UplinkCounters};

use crate::frames::{Case, cases};
use crate::{Board, World};

fn boards() -> [(Board, Datapath); 7] {
    [
        (Board::arm(true, false, false), Datapath::Map),
        (Board::arm(false, true, false), Datapath::Map),
        (Board::arm(false, true, true), Datapath::Map),
        (Board::arm(false, false, true), Datapath::MapIdentity),
        (Board::arm(false, false, false), Datapath::Copy),
        (Board::server(true), Datapath::Map),
        (Board::server(false), Datapath::Copy),
    ]
}

fn sending() -> impl Iterator<Item = Offers> {
    (0..8).map(Offers::from_bits_truncate)
}

/// Sends everything; answers what was wrong.
fn send_all(world: &mut World) -> Vec<String> {
    let mut wrong = Vec::new();
    for Case { name, frame, meta, expected } in cases(world.guest()) {
        world.send(&frame, meta);
        world.settle();
        let got = world.take_wire();
        if got != expected {
            wrong.push(format!("{name}: {} frames for {}", got.len(), expected.len()));
        }
    }
    wrong
}

fn assert_counts(counters: &UplinkCounters, offers: Offers, board: Board, path: Datapath) {
    let offloads = counters.offloads;
    let tso = offers.contains(Offers::CSUM) && offers.intersects(Offers::TSO4 | Offers::TSO6);
    let both = Offers::CSUM | Offers::TSO4 | Offers::TSO6;
    assert_eq!(offloads.card_segmented > 0, tso);
    assert_eq!(offloads.segments == 0, offers.contains(both));
    assert_eq!(offloads.card_checksums > 0, offers.contains(Offers::CSUM));
    // Those with something behind them are done here in any case.
    assert!(offloads.checksums >= 6);
    for mapped in [Datapath::Map, Datapath::MapIdentity] {
        assert_eq!(counters.sent(mapped).packets > 20, mapped == path, "{mapped}");
    }
    let coherent = board.facts.uplink.is_some_and(|nic| nic.coherent);
    let cleaned = counters.cleaned;
    assert_eq!(cleaned.by_xen > 20, path == Datapath::Map && !coherent);
    assert_eq!(cleaned.at_machine_address > 20, path == Datapath::MapIdentity);
    assert_eq!(counters.copied, Default::default());
    assert_eq!(counters.send_drops, Default::default());
    assert_eq!(counters.hardware, Default::default());
}

#[test]
fn whatever_the_card_offers_every_frame_goes_out_right_by_every_way() {
    for (board, path) in boards() {
        for offers in sending() {
            let mut world = World::new(board, offers);
            assert_eq!(send_all(&mut world), Vec::<String>::new(), "{offers:?} {board:?}");
            assert_counts(world.uplink.counters(), offers, board, path);
            world.assert_right();
        }
    }
}

/// The twin: the backend goes by a rule that is not this machine's.
#[test]
fn a_wrong_rule_sends_wrong_bytes() {
    // The card's addresses are the domain's, and it is given the machine's.
    let server = Board::server(true);
    let lie = Board { facts: Board::plain().facts, ..server };
    let mut domain = server.domain;
    domain.features = Board::plain().domain.features;
    let machine_address = Board { domain, ..lie };
    // It is given the address at which the page was mapped, and goes by the machine's.
    let mut domain = Board::plain().domain;
    domain.features = server.domain.features;
    let mapped_address = Board { domain, facts: server.facts, ..Board::plain() };
    for board in [machine_address, mapped_address] {
        for offers in sending() {
            let mut world = World::new(board, offers);
            let wrong = send_all(&mut world);
            assert!(wrong.len() > 20, "{offers:?} {wrong:?}");
            assert!(world.card().device.counts().faults > 0);
        }
    }
    // The card sees no caches, and its driver does not clean them.
    let mut world = World::new(Board::arm(false, false, true), Offers::empty());
    world.card().cleans = false;
    assert!(send_all(&mut world).len() > 20);
    assert!(world.card().device.counts().stale > 0);
}

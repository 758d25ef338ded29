#![cfg(feature = "server")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by a panic"
)]
//! Transactions of the server.

mod server_support;

use hypercall::DomId;
use xenbus::server::Quotas;
use xenbus::wire::Kind;

use server_support::Lab;

fn lab() -> Lab {
    Lab::new(Quotas::default(), &[1, 2])
}

#[test]
fn a_transaction_sees_its_start_and_its_own_changes() {
    let mut lab = lab();
    lab.ask(1, Kind::Write, 0, "a|old");
    lab.ask(1, Kind::Write, 0, "b|old");
    let tx = lab.start(1);
    lab.ask(1, Kind::Write, tx, "a|mine");
    lab.ask(1, Kind::Write, 0, "b|new");
    lab.ask(1, Kind::Write, 0, "c|new");
    lab.ask(1, Kind::Write, tx, "d|mine");
    assert_eq!(lab.ask(1, Kind::Read, tx, "a|"), "mine");
    assert_eq!(lab.ask(1, Kind::Read, tx, "b|"), "old");
    assert_eq!(lab.ask(1, Kind::Read, tx, "c|"), "ENOENT");
    assert_eq!(lab.ask(1, Kind::Directory, tx, "/local/domain/1|"), "a|b|d|");
    assert_eq!(lab.ask(1, Kind::Read, 0, "a|"), "old");
    assert_eq!(lab.ask(1, Kind::Read, 0, "d|"), "ENOENT");
    // What it read has changed since.
    assert_eq!(lab.commit(1, tx), "EAGAIN");
    assert_eq!(lab.ask(1, Kind::Read, 0, "a|"), "old");
    assert_eq!(lab.commit(1, tx), "ENOENT");
}

#[test]
fn a_transaction_happens_at_its_end() {
    let mut lab = lab();
    lab.ask(1, Kind::Write, 0, "gone/below|1");
    lab.ask(0, Kind::Watch, 0, "/local/domain/1|t|");
    lab.events(0);
    let tx = lab.start(1);
    lab.ask(1, Kind::Write, tx, "z|1");
    lab.ask(1, Kind::Write, tx, "a|1");
    lab.ask(1, Kind::Write, tx, "z|2");
    lab.ask(1, Kind::Rm, tx, "gone|");
    lab.ask(1, Kind::Write, tx, "brief|1");
    lab.ask(1, Kind::Rm, tx, "brief|");
    assert_eq!(lab.events(0), [""; 0]);
    assert_eq!(lab.commit(1, tx), "OK|");
    let home = "/local/domain/1";
    assert_eq!(
        lab.events(0),
        [format!("{home}/z|t|"), format!("{home}/a|t|"), format!("{home}/gone|t|")]
    );
    assert_eq!(lab.ask(1, Kind::Directory, 0, &format!("{home}|")), "a|z|");
    assert_eq!(lab.ask(1, Kind::Read, 0, "z|"), "2");
}

#[test]
fn an_event_for_all_replaces_one_for_exact_watches() {
    let mut lab = lab();
    lab.ask(1, Kind::Write, 0, "a/b|1");
    lab.ask(0, Kind::Watch, 0, "/local/domain/1|t|");
    lab.events(0);
    let tx = lab.start(1);
    lab.ask(1, Kind::Rm, tx, "a|");
    lab.ask(1, Kind::Write, tx, "a/b|2");
    assert_eq!(lab.commit(1, tx), "OK|");
    assert_eq!(lab.events(0), ["/local/domain/1/a/b|t|", "/local/domain/1/a|t|"]);
    assert_eq!(lab.ask(1, Kind::Read, 0, "a/b|"), "2");
}

#[test]
fn a_discarded_transaction_never_was() {
    let mut lab = lab();
    let before = lab.server.usage(DomId(1));
    let tx = lab.start(1);
    lab.ask(1, Kind::Write, tx, "a/b|1");
    assert_ne!(lab.server.usage(DomId(1)).memory, before.memory);
    assert_eq!(lab.ask(1, Kind::TransactionEnd, tx, "F|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Directory, 0, "/local/domain/1|"), "");
    assert_eq!(lab.server.usage(DomId(1)), before);
}

#[test]
fn of_two_that_change_one_node_the_second_tries_again() {
    let mut lab = lab();
    lab.ask(1, Kind::Write, 0, "a|0");
    let (first, second) = (lab.start(1), lab.start(0));
    lab.ask(1, Kind::Write, first, "a|1");
    lab.ask(0, Kind::Write, second, "/local/domain/1/a|2");
    assert_eq!(lab.commit(1, first), "OK|");
    assert_eq!(lab.commit(0, second), "EAGAIN");
    assert_eq!(lab.ask(1, Kind::Read, 0, "a|"), "1");
}

#[test]
fn two_may_create_different_children_of_one_node() {
    let mut lab = lab();
    let (first, second) = (lab.start(0), lab.start(0));
    lab.ask(0, Kind::Write, first, "/backend/vif/1|1");
    lab.ask(0, Kind::Write, second, "/tool/x|2");
    assert_eq!(lab.commit(0, first), "OK|");
    assert_eq!(lab.commit(0, second), "OK|");
    assert_eq!(lab.ask(0, Kind::Directory, 0, "/|"), "backend|local|tool|");
    // But one that listed them saw something that is no more.
    let third = lab.start(0);
    lab.ask(0, Kind::Directory, third, "/|");
    lab.ask(0, Kind::Write, 0, "/vm|");
    assert_eq!(lab.commit(0, third), "EAGAIN");
}

#[test]
fn absence_counts_as_read() {
    let mut lab = lab();
    let tx = lab.start(1);
    assert_eq!(lab.ask(1, Kind::Read, tx, "a/b|"), "ENOENT");
    lab.ask(0, Kind::Write, 0, "/local/domain/1/a|");
    assert_eq!(lab.commit(1, tx), "EAGAIN");
}

/// A guest that hammers its own nodes cannot keep the control plane from writing beside them.
#[test]
fn hammering_ones_own_nodes_starves_nobody() {
    let mut lab = lab();
    lab.ask(1, Kind::Write, 0, "device/noise|0");
    let tx = lab.start(0);
    for (path, value) in [
        ("backend", "/local/domain/0/backend/vif/1/0"),
        ("state", "1"),
        ("mac", "00:16:3e:00:00:01"),
    ] {
        lab.ask(0, Kind::Write, tx, &format!("/local/domain/1/device/vif/0/{path}|{value}"));
        lab.ask(0, Kind::Write, tx, &format!("/local/domain/0/backend/vif/1/0/{path}|{value}"));
        for round in 0..200 {
            lab.ask(1, Kind::Write, 0, &format!("device/noise|{round}"));
            lab.ask(1, Kind::Write, 0, &format!("device/n{round}/x|"));
            lab.ask(1, Kind::Rm, 0, &format!("device/n{round}|"));
        }
    }
    assert_eq!(lab.commit(0, tx), "OK|");
    assert_eq!(lab.ask(0, Kind::Directory, 0, "/local/domain/1/device|"), "noise|vif|");
}

#[test]
fn transactions_are_their_connections_own() {
    let mut lab = lab();
    let tx = lab.start(1);
    assert_eq!(lab.ask(2, Kind::Read, tx, "a|"), "ENOENT");
    assert_eq!(lab.ask(1, Kind::TransactionStart, tx, "|"), "EBUSY");
    assert_eq!(lab.ask(1, Kind::TransactionEnd, 0, "T|"), "ENOENT");
    assert_eq!(lab.ask(1, Kind::TransactionEnd, tx, "X|"), "EINVAL");
    assert_eq!(lab.commit(1, tx), "OK|");
}

/// The versions that transactions keep for themselves do not add up: not those of nodes that came after the start, and not
/// more than one of each node.
#[test]
fn an_open_transaction_keeps_at_most_what_was_there() {
    let mut lab = lab();
    lab.ask(1, Kind::Write, 0, "a|1");
    let tx = lab.start(1);
    lab.ask(1, Kind::Write, 0, "a|2");
    lab.ask(1, Kind::Write, 0, "a/b|");
    let kept = lab.server.usage(DomId(1)).snapshots;
    assert_ne!(kept, 0);
    for round in 0..1000 {
        lab.ask(1, Kind::Write, 0, &format!("a|{round}"));
        lab.ask(1, Kind::Write, 0, &format!("a/n{round}|"));
        lab.ask(1, Kind::Rm, 0, &format!("a/n{round}|"));
    }
    assert_eq!(lab.server.usage(DomId(1)).snapshots, kept);
    assert_eq!(lab.ask(1, Kind::Read, tx, "a|"), "1");
    lab.commit(1, tx);
    assert_eq!(lab.server.usage(DomId(1)).snapshots, 0);
}

/// Starting a transaction costs the same whatever the store holds.
#[test]
fn starting_copies_nothing() {
    let mut lab = lab();
    for number in 0..800 {
        lab.ask(1, Kind::Write, 0, &format!("n{}/{number}|x", number % 20));
    }
    let before = lab.server.usage(DomId(1)).memory;
    lab.start(1);
    let usage = lab.server.usage(DomId(1));
    assert_eq!((usage.memory, usage.snapshots), (before, 0));
}

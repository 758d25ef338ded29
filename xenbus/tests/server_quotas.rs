#![cfg(feature = "server")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by a panic"
)]
//! Quotas and back-pressure of the server.

mod server_support;

use hypercall::DomId;
use xenbus::server::Quotas;
use xenbus::wire::Kind;

use server_support::{Lab, encode};

fn lab(change: impl FnOnce(&mut Quotas)) -> Lab {
    let mut quotas = Quotas::default();
    change(&mut quotas);
    Lab::new(quotas, &[1, 2])
}

#[test]
fn nodes_are_charged_to_their_owner_and_given_back() {
    let mut lab = lab(|quotas| quotas.nodes = 4);
    assert_eq!(lab.ask(1, Kind::Write, 0, "a/b|"), "OK|");
    // Two more would be one too many, and none of them is made.
    assert_eq!(lab.ask(1, Kind::Write, 0, "c/d|"), "ENOSPC");
    assert_eq!(lab.ask(1, Kind::Write, 0, "c|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Mkdir, 0, "d|"), "ENOSPC");
    assert_eq!(lab.ask(1, Kind::Write, 0, "c|1"), "OK|");
    assert_eq!(lab.ask(1, Kind::Rm, 0, "a|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Write, 0, "c/d|"), "OK|");
    assert_eq!(lab.server.usage(DomId(1)).nodes, 3);
    // Another's quota is another's, and the privileged have none.
    assert_eq!(lab.ask(2, Kind::Write, 0, "a|"), "OK|");
    assert_eq!(lab.ask(0, Kind::Write, 0, "/local/domain/1/e/f|"), "OK|");
    assert_eq!(lab.server.usage(DomId(1)).nodes, 5);
    // Given to another, a node is that one's charge.
    assert_eq!(lab.ask(0, Kind::SetPerms, 0, "/local/domain/1/e/f|n2|"), "OK|");
    assert_eq!(lab.server.usage(DomId(1)).nodes, 4);
    assert_eq!(lab.server.usage(DomId(2)).nodes, 3);
}

#[test]
fn nodes_count_inside_transactions_too() {
    let mut lab = lab(|quotas| quotas.nodes = 4);
    let tx = lab.start(1);
    assert_eq!(lab.ask(1, Kind::Write, tx, "a/b/c|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Write, tx, "d|"), "ENOSPC");
    assert_eq!(lab.ask(1, Kind::Rm, tx, "a/b|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Write, tx, "d|"), "OK|");
    assert_eq!(lab.server.usage(DomId(1)).nodes, 1);
    // Two transactions, each within the quota, are over it together.
    let other = lab.start(1);
    assert_eq!(lab.ask(1, Kind::Write, other, "e/f|"), "OK|");
    assert_eq!(lab.commit(1, tx), "OK|");
    assert_eq!(lab.server.usage(DomId(1)).nodes, 3);
    assert_eq!(lab.commit(1, other), "ENOSPC");
    assert_eq!(lab.server.usage(DomId(1)).nodes, 3);
}

#[test]
fn sizes_are_limited() {
    let mut lab = lab(|_| {});
    let value = "x".repeat(2048 - 24 - 8 - 1);
    assert_eq!(lab.ask(1, Kind::Write, 0, &format!("a|{value}x")), "ENOSPC");
    assert_eq!(lab.ask(1, Kind::Write, 0, &format!("a|{value}")), "OK|");
    assert_eq!(lab.ask(1, Kind::Write, 0, &format!("a|{value}x")), "ENOSPC");
    assert_eq!(lab.ask(1, Kind::Write, 0, "a/b|"), "ENOSPC");
    assert_eq!(lab.ask(1, Kind::SetPerms, 0, "a|n1|r2|"), "ENOSPC");
    assert_eq!(lab.ask(0, Kind::Write, 0, &format!("/b|{value}{value}")), "OK|");
    assert_eq!(lab.ask(1, Kind::Write, 0, "p|"), "OK|");
    assert_eq!(lab.ask(1, Kind::SetPerms, 0, "p|n1|r2|r3|r4|r5|"), "OK|");
    assert_eq!(lab.ask(1, Kind::SetPerms, 0, "p|n1|r2|r3|r4|r5|r6|"), "ENOSPC");
}

#[test]
fn watches_and_transactions_are_limited() {
    let mut lab = lab(|quotas| (quotas.watches, quotas.transactions) = (3, 2));
    for token in 0..3 {
        assert_eq!(lab.ask(1, Kind::Watch, 0, &format!("a|{token}|")), "OK|");
    }
    assert_eq!(lab.ask(1, Kind::Watch, 0, "a|3|"), "E2BIG");
    lab.ask(1, Kind::Unwatch, 0, "a|1|");
    assert_eq!(lab.ask(1, Kind::Watch, 0, "a|3|"), "OK|");
    let (first, _) = (lab.start(1), lab.start(1));
    assert_eq!(lab.ask(1, Kind::TransactionStart, 0, "|"), "ENOSPC");
    lab.commit(1, first);
    lab.start(1);
    for _ in 0..50 {
        lab.start(0);
    }
}

#[test]
fn memory_is_limited_whatever_it_is_for() {
    let mut lab = lab(|quotas| quotas.memory = 10_000);
    let before = lab.server.usage(DomId(1));
    let value = "x".repeat(1500);
    let mut written = 0;
    while lab.ask(1, Kind::Write, 0, &format!("n{written}|{value}")) == "OK|" {
        written += 1;
    }
    assert_eq!(written, 5);
    assert_eq!(lab.ask(1, Kind::Write, 0, "n0|"), "OK|");
    let token = "t".repeat(2000);
    assert_eq!(lab.ask(1, Kind::Watch, 0, &format!("a|{token}|")), "OK|");
    assert_eq!(lab.ask(1, Kind::Watch, 0, &format!("b|{token}|")), "ENOMEM");
    lab.ask(1, Kind::Unwatch, 0, &format!("a|{token}|"));
    // A transaction that goes over it is lost.
    let tx = lab.start(1);
    assert_eq!(lab.ask(1, Kind::Write, tx, &format!("m|{value}")), "OK|");
    assert_eq!(lab.ask(1, Kind::Write, tx, &format!("n|{value}")), "ENOSPC");
    assert_eq!(lab.commit(1, tx), "ENOMEM");
    // Nor may another one's right to write make its owner go over it.
    lab.ask(1, Kind::SetPerms, 0, "n0|b1|");
    assert_eq!(lab.ask(1, Kind::Write, 0, &format!("m|{value}")), "OK|");
    assert_eq!(lab.ask(2, Kind::Write, 0, "/local/domain/1/n0|small"), "OK|");
    assert_eq!(lab.ask(2, Kind::Write, 0, &format!("/local/domain/1/n0|{value}")), "ENOSPC");
    lab.ask(1, Kind::Rm, 0, "m|");
    for number in 0..written {
        lab.ask(1, Kind::Rm, 0, &format!("n{number}|"));
    }
    assert_eq!(lab.server.usage(DomId(1)), before);
}

#[test]
fn a_transaction_reaches_its_limit_of_paths() {
    let mut lab = lab(|quotas| quotas.transaction_nodes = 10);
    let tx = lab.start(1);
    let reads = (0..20).map(|number| lab.ask(1, Kind::Read, tx, &format!("n{number}|")));
    assert_eq!(reads.filter(|reply| reply == "ENOENT").count(), 9, "and their parent");
    assert_eq!(lab.commit(1, tx), "ENOMEM");
}

/// A transaction that would keep too much of the past gives it up, and ends in a conflict.
#[test]
fn the_past_is_limited() {
    let mut lab = lab(|quotas| quotas.memory = 10_000);
    let value = "x".repeat(1500);
    for number in 0..5 {
        lab.ask(0, Kind::Write, 0, &format!("/shared/n{number}|{value}"));
    }
    let tx = lab.start(1);
    let control = lab.start(0);
    for number in 0..5 {
        lab.ask(0, Kind::Write, 0, &format!("/shared/n{number}|{value}"));
    }
    assert_ne!(lab.server.usage(DomId(1)).snapshots, 0);
    for number in 0..5 {
        lab.ask(0, Kind::Write, 0, &format!("/shared/m{number}|{value}"));
    }
    let second = lab.start(1);
    for name in ["n", "m"] {
        for number in 0..5 {
            lab.ask(0, Kind::Write, 0, &format!("/shared/{name}{number}|"));
        }
    }
    assert!(lab.server.usage(DomId(1)).snapshots <= 10_000);
    assert_eq!(lab.ask(1, Kind::Write, second, "a|1"), "OK|");
    assert_eq!(lab.commit(1, second), "EAGAIN");
    assert_eq!(lab.commit(1, tx), "OK|");
    assert_eq!(lab.commit(0, control), "OK|");
    assert_eq!(lab.server.usage(DomId(1)).snapshots, 0);
}

#[test]
fn who_does_not_read_is_not_served() {
    let mut lab = lab(|_| {});
    let conn = lab.conn(1);
    let request = encode(Kind::Write.raw(), 1, 0, b"a\0x");
    let ring = request.repeat(50);
    let taken = lab.server.receive(conn, &ring).unwrap();
    assert_eq!(taken, 20 * request.len());
    assert!(!lab.server.wants_input(conn));
    assert_eq!(lab.server.receive(conn, &ring[taken..]), Ok(0));
    assert_eq!(lab.ask(2, Kind::Write, 0, "a|"), "OK|");
    // One reply read, one request done.
    let first = lab.server.pending_output(conn).len();
    lab.server.consume_output(conn, first - 1);
    assert!(!lab.server.wants_input(conn));
    lab.server.consume_output(conn, 1);
    assert!(lab.server.wants_input(conn));
    assert_eq!(lab.server.receive(conn, &ring[taken..]), Ok(request.len()));
    assert_eq!(lab.drain(1).len(), 20);
}

/// Events for one that does not read stay within bounds, and none is lost: its watch tells that something happened.
#[test]
fn events_that_are_not_read_are_merged() {
    let mut lab = lab(|quotas| quotas.event_bytes = 2000);
    lab.ask(1, Kind::Watch, 0, "device|t|");
    lab.ask(1, Kind::Watch, 0, "device/n5|u|");
    for number in 0..900 {
        lab.ask(0, Kind::Write, 0, &format!("/local/domain/1/device/n{number}|"));
        lab.ask(0, Kind::Write, 0, &format!("/local/domain/1/device/n5/m{number}|"));
    }
    let stats = lab.server.stats();
    assert!(stats.pending_output < 2200, "{stats:?}");
    let events = lab.events(1);
    assert!(events.contains(&"device|t|".to_owned()));
    assert!(events.contains(&"device/n5|u|".to_owned()));
    assert_eq!(lab.server.stats().pending_events, 0);
    lab.ask(0, Kind::Write, 0, "/local/domain/1/device/n1|");
    assert_eq!(lab.events(1), ["device/n1|t|"]);
}

/// Whatever a guest does with everything it may have, the server holds no more than it is allowed.
#[test]
fn a_greedy_guest_stays_within_its_bounds() {
    let mut lab = lab(|quotas| quotas.memory = 100_000);
    let mut seed = 1u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % below
    };
    let mut open = vec![0];
    for round in 0..6000 {
        let tx = open[random(open.len() as u64) as usize];
        let path = format!("{}/{}", random(40), random(40));
        match random(12) {
            0 => {
                let reply = lab.ask(1, Kind::TransactionStart, 0, "|");
                open.extend(reply.trim_end_matches('|').parse::<u32>());
            }
            1 if tx != 0 => {
                lab.commit(1, tx);
                open.retain(|other| *other != tx);
            }
            2 => drop(lab.ask(1, Kind::Rm, tx, &format!("{path}|"))),
            3 => drop(lab.ask(1, Kind::Watch, 0, &format!("{path}|{round}|"))),
            4 => drop(lab.ask(1, Kind::Directory, tx, &format!("{path}|"))),
            _ => drop(lab.ask(
                1,
                Kind::Write,
                tx,
                &format!("{path}|{}", "x".repeat(random(2000) as usize)),
            )),
        }
        let usage = lab.server.usage(DomId(1));
        assert!(usage.memory <= 100_000 && usage.snapshots <= 100_000, "{usage:?}");
        assert!(usage.nodes <= 1000 && usage.watches <= 128 && usage.transactions <= 10);
    }
    lab.server.domain_gone(DomId(1));
    assert_eq!(lab.server.usage(DomId(1)), Default::default());
    assert_eq!(lab.ask(2, Kind::Write, 0, "a|"), "OK|");
}

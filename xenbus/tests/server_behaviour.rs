#![cfg(feature = "server")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by a panic"
)]
//! One behaviour of the server each.

mod server_support;

use hypercall::DomId;
use xenbus::server::{Action, Fault, Quotas};
use xenbus::wire::Kind;

use server_support::{Lab, decode, encode};

fn lab() -> Lab {
    Lab::new(Quotas::default(), &[1, 2])
}

#[test]
fn paths_start_from_the_callers_home() {
    let mut lab = lab();
    assert_eq!(lab.ask(1, Kind::Write, 0, "device/vif/0/state|1"), "OK|");
    assert_eq!(lab.ask(1, Kind::Read, 0, "/local/domain/1/device/vif/0/state|"), "1");
    assert_eq!(lab.ask(0, Kind::Read, 0, "/local/domain/1/device/vif/0/state|"), "1");
    assert_eq!(lab.ask(0, Kind::Write, 0, "name|dom0"), "OK|");
    assert_eq!(lab.ask(0, Kind::Read, 0, "/local/domain/0/name|"), "dom0");
    assert_eq!(lab.ask(1, Kind::GetDomainPath, 0, "7|"), "/local/domain/7|");
}

#[test]
fn missing_parents_are_made_and_owned_by_their_maker() {
    let mut lab = lab();
    lab.ask(0, Kind::SetPerms, 0, "/local/domain/1|n0|b1|r2|");
    assert_eq!(lab.ask(1, Kind::Mkdir, 0, "a/b|"), "OK|");
    assert_eq!(lab.ask(1, Kind::GetPerms, 0, "a|"), "n1|b1|r2|");
    assert_eq!(lab.ask(1, Kind::Directory, 0, "a|"), "b|");
    assert_eq!(lab.ask(1, Kind::Read, 0, "a|"), "");
    assert_eq!(lab.ask(0, Kind::Mkdir, 0, "/local/domain/1/a/c|"), "OK|");
    assert_eq!(lab.ask(0, Kind::GetPerms, 0, "/local/domain/1/a/c|"), "n1|b1|r2|");
}

#[test]
fn mkdir_of_an_existing_node_changes_nothing() {
    let mut lab = lab();
    lab.ask(1, Kind::Write, 0, "a|1");
    lab.ask(0, Kind::Watch, 0, "/|t|");
    lab.events(0);
    assert_eq!(lab.ask(1, Kind::Mkdir, 0, "a|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Read, 0, "a|"), "1");
    assert_eq!(lab.events(0), [""; 0]);
}

#[test]
fn rm_takes_all_below_and_forgives_a_missing_node_in_an_existing_one() {
    let mut lab = lab();
    lab.ask(1, Kind::Write, 0, "a/b/c|1");
    lab.ask(1, Kind::Write, 0, "a-b|1");
    assert_eq!(lab.ask(1, Kind::Rm, 0, "a|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Read, 0, "a/b/c|"), "ENOENT");
    assert_eq!(lab.ask(1, Kind::Directory, 0, "/local/domain/1|"), "a-b|");
    assert_eq!(lab.ask(1, Kind::Rm, 0, "a|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Rm, 0, "a/b|"), "ENOENT");
    assert_eq!(lab.ask(0, Kind::Rm, 0, "/|"), "EINVAL");
}

#[test]
fn values_are_bytes() {
    let mut lab = lab();
    assert_eq!(lab.ask(1, Kind::Write, 0, "a|x||y|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Read, 0, "a|"), "x||y|");
}

#[test]
fn malformed_requests_are_einval() {
    let mut lab = lab();
    for (kind, payload) in [
        (Kind::Read, ""),
        (Kind::Read, "a"),
        (Kind::Read, "a||"),
        (Kind::Read, "|"),
        (Kind::Read, "a//b|"),
        (Kind::Read, "a/|"),
        (Kind::Read, "/a b|"),
        (Kind::Read, "@releaseDomain|"),
        (Kind::Write, "a"),
        (Kind::Watch, "a|"),
        (Kind::Watch, "a|t|1|"),
        (Kind::Watch, "a/|t|"),
        (Kind::SetPerms, "a|"),
        (Kind::SetPerms, "a|x1|"),
        (Kind::SetPerms, "a|r-1|"),
        (Kind::SetPerms, "a|r1"),
        (Kind::SetPerms, "a|r65536|"),
        (Kind::SetPerms, "@unknown|n0|"),
        (Kind::DirectoryPart, "a|"),
        (Kind::DirectoryPart, "a|x|"),
        (Kind::GetDomainPath, "65536|"),
        (Kind::TransactionEnd, "|"),
    ] {
        assert_eq!(lab.ask(0, kind, 0, payload), "EINVAL", "{kind:?} {payload}");
    }
    let long = format!("/{}|", "a".repeat(2048));
    assert_eq!(lab.ask(0, Kind::Read, 0, &long), "EINVAL");
}

#[test]
fn what_the_protocol_does_not_have_is_enosys() {
    let mut lab = lab();
    let conn = lab.conn(1);
    for kind in [Kind::WatchEvent.raw(), Kind::Error.raw(), 20, 23, 0xffff] {
        lab.server.receive(conn, &encode(kind, 5, 0, b"\0")).unwrap();
        let out = lab.drain(1);
        assert_eq!((out[0].kind, out[0].req, out[0].text()), (Kind::Error, 5, "ENOSYS|".into()));
    }
}

#[test]
fn one_guest_sees_and_changes_nothing_of_anothers() {
    let mut lab = lab();
    lab.ask(2, Kind::Write, 0, "secret|2");
    let path = "/local/domain/2/secret";
    for kind in [Kind::Read, Kind::Directory, Kind::GetPerms, Kind::Rm, Kind::Mkdir] {
        assert_eq!(lab.ask(1, kind, 0, &format!("{path}|")), "EACCES", "{kind:?}");
    }
    assert_eq!(lab.ask(1, Kind::Write, 0, &format!("{path}|1")), "EACCES");
    assert_eq!(lab.ask(1, Kind::SetPerms, 0, &format!("{path}|n1|")), "EACCES");
    // Nor whether something exists.
    assert_eq!(lab.ask(1, Kind::Read, 0, "/local/domain/2/none|"), "EACCES");
    lab.ask(1, Kind::Watch, 0, "/local/domain/2|t|");
    lab.ask(1, Kind::Watch, 0, "/|t|");
    lab.events(1);
    lab.ask(2, Kind::Write, 0, "secret|3");
    lab.ask(2, Kind::Rm, 0, "secret|");
    assert_eq!(lab.events(1), [""; 0]);
}

#[test]
fn permissions_by_list_then_by_default() {
    let mut lab = Lab::new(Quotas::default(), &[1, 2, 3]);
    lab.ask(1, Kind::Write, 0, "a|1");
    assert_eq!(lab.ask(1, Kind::SetPerms, 0, "a|r1|n2|"), "OK|");
    assert_eq!(lab.ask(2, Kind::Read, 0, "/local/domain/1/a|"), "EACCES");
    assert_eq!(lab.ask(3, Kind::Read, 0, "/local/domain/1/a|"), "1");
    assert_eq!(lab.ask(3, Kind::Write, 0, "/local/domain/1/a|3"), "EACCES");
    assert_eq!(lab.ask(1, Kind::SetPerms, 0, "a|n1|w2|b3|"), "OK|");
    assert_eq!(lab.ask(2, Kind::Write, 0, "/local/domain/1/a|2"), "OK|");
    assert_eq!(lab.ask(2, Kind::Read, 0, "/local/domain/1/a|"), "EACCES");
    assert_eq!(lab.ask(3, Kind::Read, 0, "/local/domain/1/a|"), "2");
    // Neither the right to write nor ownership lets one give a node away.
    assert_eq!(lab.ask(3, Kind::SetPerms, 0, "/local/domain/1/a|n3|"), "EACCES");
    assert_eq!(lab.ask(1, Kind::SetPerms, 0, "a|n3|"), "EPERM");
    assert_eq!(lab.ask(0, Kind::SetPerms, 0, "/local/domain/1/a|n3|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Read, 0, "a|"), "EACCES");
}

#[test]
fn a_target_lends_its_rights() {
    let mut lab = lab();
    lab.ask(1, Kind::Write, 0, "a|1");
    assert_eq!(lab.ask(2, Kind::SetTarget, 0, "2|1|"), "EACCES");
    assert_eq!(lab.ask(0, Kind::SetTarget, 0, "2|1|"), "OK|");
    assert_eq!(lab.ask(2, Kind::Read, 0, "/local/domain/1/a|"), "1");
    assert_eq!(lab.ask(0, Kind::SetTarget, 0, "2|9|"), "ENOENT");
    // A later domain 1 is another domain.
    lab.server.domain_gone(DomId(1));
    lab.conns.insert(1, lab.server.introduce(DomId(1)));
    lab.ask(0, Kind::Write, 0, "/local/domain/1/a|1");
    lab.ask(0, Kind::SetPerms, 0, "/local/domain/1/a|n1|");
    assert_eq!(lab.ask(2, Kind::Read, 0, "/local/domain/1/a|"), "EACCES");
}

#[test]
fn a_watch_fires_when_set_and_names_paths_as_it_was_set() {
    let mut lab = lab();
    assert_eq!(lab.ask(1, Kind::Watch, 0, "a|rel|"), "OK|");
    let request = lab.send(1, Kind::Watch, 0, "/local/domain/1/a|abs|");
    let out = lab.drain(1);
    // Confirmed first, then fired.
    assert_eq!((out[0].req, out[1].req), (request, 0));
    assert_eq!(out[1].text(), "/local/domain/1/a|abs|");
    assert_eq!(lab.ask(1, Kind::Watch, 0, "a|rel|"), "EEXIST");
    lab.ask(0, Kind::Write, 0, "/local/domain/1/a/b|1");
    assert_eq!(lab.events(1), ["a/b|rel|", "/local/domain/1/a/b|abs|"]);
    assert_eq!(lab.ask(1, Kind::Unwatch, 0, "a|rel|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Unwatch, 0, "a|rel|"), "ENOENT");
    lab.ask(0, Kind::Write, 0, "/local/domain/1/a|1");
    assert_eq!(lab.events(1), ["/local/domain/1/a|abs|"]);
    lab.ask(0, Kind::Write, 0, "/local/domain/1/ab|1");
    assert_eq!(lab.events(1), [""; 0]);
}

#[test]
fn who_may_list_a_node_hears_of_its_children() {
    let mut lab = lab();
    lab.ask(1, Kind::Write, 0, "a/b|1");
    lab.ask(1, Kind::SetPerms, 0, "a|n1|r2|");
    lab.ask(2, Kind::Watch, 0, "/local/domain/1/a|t|");
    lab.events(2);
    lab.ask(1, Kind::Write, 0, "a/b|2");
    assert_eq!(lab.events(2), ["/local/domain/1/a/b|t|"]);
    assert_eq!(lab.ask(2, Kind::Read, 0, "/local/domain/1/a/b|"), "EACCES");
    // The change that takes the right away is the last it hears of.
    lab.ask(1, Kind::SetPerms, 0, "a|n1|");
    lab.ask(1, Kind::Write, 0, "a/b|3");
    lab.ask(1, Kind::Write, 0, "a|3");
    assert_eq!(lab.events(2), ["/local/domain/1/a|t|"]);
}

#[test]
fn the_end_of_a_node_reaches_watches_below_and_above() {
    let mut lab = lab();
    lab.ask(0, Kind::Write, 0, "/local/domain/1/a/b/c|1");
    lab.ask(1, Kind::Watch, 0, "a/b|b|");
    lab.ask(1, Kind::Watch, 0, "a/b/c|c|");
    lab.ask(1, Kind::Watch, 0, "a/b/d|d|");
    lab.ask(0, Kind::Watch, 0, "/local|0|");
    lab.events(0);
    lab.events(1);
    lab.ask(0, Kind::Rm, 0, "/local/domain/1/a|");
    assert_eq!(lab.events(1), ["a/b/c|c|", "a/b|b|"]);
}

#[test]
fn an_event_waits_once() {
    let mut lab = lab();
    lab.ask(1, Kind::Watch, 0, "a|t|");
    for value in 0..1000 {
        lab.ask(0, Kind::Write, 0, &format!("/local/domain/1/a|{value}"));
    }
    assert_eq!(lab.events(1), ["a|t|"]);
    lab.ask(0, Kind::Write, 0, "/local/domain/1/a|x");
    assert_eq!(lab.events(1), ["a|t|"]);
}

#[test]
fn a_half_sent_event_outlives_its_watch() {
    let mut lab = lab();
    lab.ask(1, Kind::Watch, 0, "a|t|");
    lab.ask(0, Kind::Write, 0, "/local/domain/1/a|1");
    lab.ask(0, Kind::Write, 0, "/local/domain/1/a/b|1");
    let conn = lab.conn(1);
    let mut sent = lab.server.pending_output(conn)[..5].to_vec();
    lab.server.consume_output(conn, 5);
    lab.send(1, Kind::Unwatch, 0, "a|t|");
    sent.extend_from_slice(lab.server.pending_output(conn));
    let rest = lab.server.pending_output(conn).len();
    lab.server.consume_output(conn, rest);
    assert_eq!(decode(&sent)[0].text(), "a|t|");
    let out = lab.drain(1);
    assert_eq!(out.len(), 1);
    assert_eq!(out[0].kind, Kind::Unwatch);
    assert_eq!(lab.server.stats().pending_events, 0);
}

#[test]
fn domains_that_come_and_go_are_announced() {
    let mut lab = lab();
    lab.ask(0, Kind::Watch, 0, "@introduceDomain|i|");
    lab.ask(0, Kind::Watch, 0, "@releaseDomain|r|");
    lab.ask(1, Kind::Watch, 0, "@introduceDomain|i|");
    assert_eq!(lab.events(1), [""; 0], "read with the reply");
    let third = lab.server.introduce(DomId(3));
    assert_eq!(lab.events(0), ["@introduceDomain|i|"]);
    assert_eq!(lab.server.introduce(DomId(3)), third);
    assert_eq!(lab.events(0), [""; 0]);
    lab.server.domain_shut_down(DomId(3));
    lab.server.domain_shut_down(DomId(3));
    assert_eq!(lab.events(0), ["@releaseDomain|r|"]);
    lab.server.domain_shut_down(DomId(3));
    assert_eq!(lab.events(0), [""; 0]);
    assert_eq!(lab.ask(0, Kind::Resume, 0, "3|"), "OK|");
    lab.server.domain_shut_down(DomId(3));
    assert_eq!(lab.events(0), ["@releaseDomain|r|"]);
    assert_eq!(lab.events(1), [""; 0], "a guest needs permission");
    assert_eq!(lab.ask(1, Kind::SetPerms, 0, "@introduceDomain|n0|r1|"), "EACCES");
    assert_eq!(lab.ask(0, Kind::SetPerms, 0, "@introduceDomain|n0|r1|"), "OK|");
    lab.server.introduce(DomId(4));
    assert_eq!(lab.events(1), ["@introduceDomain|i|"]);
    lab.server.domain_gone(DomId(3));
    assert_eq!(lab.server.receive(third, b"x"), Err(Fault::Closed));
}

#[test]
fn a_toolstack_introduces_and_releases() {
    let mut lab = lab();
    assert_eq!(lab.ask(1, Kind::Introduce, 0, "5|1000|3|"), "EACCES");
    assert_eq!(lab.ask(0, Kind::IsDomainIntroduced, 0, "5|"), "F|");
    assert_eq!(lab.ask(0, Kind::Introduce, 0, "5|1000|3|"), "OK|");
    let conn = lab.server.connection_of(DomId(5)).unwrap();
    let action = Action::Introduced { domid: DomId(5), conn, gfn: 1000, port: 3 };
    assert_eq!(lab.server.take_action(), Some(action));
    assert_eq!(lab.ask(0, Kind::IsDomainIntroduced, 0, "5|"), "T|");
    assert_eq!(lab.ask(0, Kind::Release, 0, "5|"), "OK|");
    assert_eq!(lab.server.take_action(), Some(Action::Released { domid: DomId(5) }));
    assert_eq!(lab.server.take_action(), None);
    assert_eq!(lab.ask(0, Kind::Release, 0, "5|"), "ENOENT");
    for payload in ["0|1|1|", "32752|1|1|", "5|1|0|", "5|1|", "5|x|1|"] {
        assert_eq!(lab.ask(0, Kind::Introduce, 0, payload), "EINVAL", "{payload}");
    }
}

#[test]
fn a_domain_leaves_nothing_behind() {
    let mut lab = lab();
    let before = lab.server.stats();
    let third = lab.server.introduce(DomId(3));
    lab.conns.insert(3, third);
    lab.ask(0, Kind::Mkdir, 0, "/local/domain/3|");
    lab.ask(0, Kind::SetPerms, 0, "/local/domain/3|n3|");
    lab.ask(0, Kind::SetPerms, 0, "/local/domain/1|n1|r3|");
    lab.ask(3, Kind::Write, 0, "a/b/c|1");
    lab.ask(3, Kind::Watch, 0, "a|t|");
    let tx = lab.start(3);
    lab.ask(3, Kind::Write, tx, "a/b/c|2");
    lab.ask(0, Kind::Write, 0, "/local/domain/3/a/b/c|3");
    lab.ask(0, Kind::Watch, 0, "/local/domain/3/a|w|");
    assert_ne!(lab.server.usage(DomId(3)).snapshots, 0);
    lab.events(0);
    lab.server.domain_gone(DomId(3));
    assert_eq!(lab.events(0), ["/local/domain/3/a|w|"]);
    assert_eq!(lab.server.usage(DomId(3)), Default::default());
    assert_eq!(lab.ask(0, Kind::GetPerms, 0, "/local/domain/1|"), "n1|");
    lab.ask(0, Kind::Unwatch, 0, "/local/domain/3/a|w|");
    assert_eq!(lab.server.stats(), before);
}

#[test]
fn reset_watches_ends_watches_and_transactions() {
    let mut lab = lab();
    let before = lab.server.usage(DomId(1));
    lab.ask(1, Kind::Watch, 0, "a|t|");
    let tx = lab.start(1);
    assert_eq!(lab.ask(1, Kind::ResetWatches, 0, "|"), "OK|");
    assert_eq!(lab.ask(1, Kind::Read, tx, "a|"), "ENOENT");
    assert_eq!(lab.server.usage(DomId(1)), before);
}

#[test]
fn long_lists_come_in_parts() {
    let mut lab = lab();
    let names: Vec<_> = (0..1000).map(|number| format!("child{number:04}")).collect();
    for name in &names {
        lab.ask(0, Kind::Write, 0, &format!("/big/{name}|"));
    }
    assert_eq!(lab.ask(0, Kind::Directory, 0, "/big|"), "E2BIG");
    // As libxenstore's xs_directory_part() does it.
    let (mut list, mut version) = (String::new(), None);
    loop {
        let part = lab.ask(0, Kind::DirectoryPart, 0, &format!("/big|{}|", list.len()));
        assert!(part.len() <= 4096);
        let (seen, rest) = part.split_once('|').unwrap();
        assert_eq!(*version.get_or_insert(seen.to_owned()), seen);
        list += rest;
        if list.ends_with("||") {
            break;
        }
    }
    assert_eq!(list, names.join("|") + "||");
    assert_eq!(
        lab.ask(0, Kind::DirectoryPart, 0, "/big|999999|"),
        format!("{}||", version.clone().unwrap())
    );
    lab.ask(0, Kind::Rm, 0, "/big/child0500|");
    assert!(
        !lab.ask(0, Kind::DirectoryPart, 0, "/big|0|")
            .starts_with(&format!("{}|", version.unwrap()))
    );
}

#[test]
fn control_answers_the_privileged() {
    let mut lab = lab();
    assert_eq!(lab.ask(1, Kind::Control, 0, "help|"), "EACCES");
    assert!(lab.ask(0, Kind::Control, 0, "help|").contains("quota"));
    assert!(lab.ask(0, Kind::Control, 0, "quota|1|").contains("nodes"));
    assert!(lab.ask(0, Kind::Control, 0, "quota|").contains("1000"));
    assert_eq!(lab.ask(0, Kind::Control, 0, "live-update|"), "EINVAL");
}

#[test]
fn an_overlong_payload_ends_the_connection_and_no_other() {
    let mut lab = lab();
    lab.ask(1, Kind::Watch, 0, "a|t|");
    lab.start(1);
    let conn = lab.conn(1);
    let mut header = [0; 16];
    header[0] = 2;
    header[12..].copy_from_slice(&4097u32.to_le_bytes());
    assert_eq!(lab.server.receive(conn, &header), Err(Fault::PayloadTooLong));
    assert_eq!(lab.server.receive(conn, b"more"), Err(Fault::PayloadTooLong));
    assert!(!lab.server.wants_input(conn));
    let usage = lab.server.usage(DomId(1));
    assert_eq!((usage.watches, usage.transactions), (0, 0));
    assert_eq!(lab.ask(2, Kind::Write, 0, "a|2"), "OK|");
    // A ring that starts anew is served again.
    assert_eq!(lab.server.introduce(DomId(1)), conn);
    assert_eq!(lab.ask(1, Kind::Write, 0, "a|1"), "OK|");
}

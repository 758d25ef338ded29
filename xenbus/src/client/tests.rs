use alloc::format;
use alloc::string::ToString;
use alloc::vec;

use proptest::prelude::*;

use super::*;
use crate::wire::{Access, Header, PAYLOAD_MAX};

fn sent(client: &mut Client) -> Vec<Message> {
    let bytes = client.take_output();
    let (mut framer, mut rest) = (Framer::new(), bytes.as_slice());
    let mut messages = vec![];
    while let Some(message) = framer.next(&mut rest).unwrap() {
        messages.push(message);
    }
    assert!(framer.is_idle());
    messages
}

fn raw(kind: u32, req_id: ReqId, tx_id: TxId, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![];
    wire::write_message(&mut out, kind, req_id, tx_id, &[payload]).unwrap();
    out
}

fn answer(client: &mut Client, to: &Message, payload: &[u8]) {
    let Header { raw_kind, req_id, tx_id, .. } = to.header;
    client.receive(&raw(raw_kind, req_id, tx_id, payload)).unwrap();
}

fn refuse(client: &mut Client, to: &Message, error: XsError) {
    let text = format!("{}\0", error.text());
    let kind = Kind::Error.raw();
    client.receive(&raw(kind, to.header.req_id, to.header.tx_id, text.as_bytes())).unwrap();
}

fn fire(client: &mut Client, path: &str, token: &str) {
    let payload = format!("{path}\0{token}\0");
    client.receive(&raw(Kind::WatchEvent.raw(), ReqId(0), TxId::NONE, payload.as_bytes())).unwrap();
}

/// What is sent, as kind, transaction and payload.
fn said(messages: &[Message]) -> Vec<(Kind, u32, String)> {
    messages
        .iter()
        .map(|m| {
            let text = String::from_utf8(m.payload.clone()).unwrap();
            (m.header.kind().unwrap(), m.header.tx_id.0, text.replace('\0', "|"))
        })
        .collect()
}

/// The only message sent.
fn one(client: &mut Client) -> Message {
    let mut messages = sent(client);
    assert_eq!(messages.len(), 1, "{messages:?}");
    messages.remove(0)
}

fn events(client: &mut Client) -> Vec<Event> {
    core::iter::from_fn(|| client.poll_event()).collect()
}

fn done(job: JobId, result: Result<Outcome, Error>) -> Vec<Event> {
    vec![Event::Done { job, result }]
}

fn write(path: &str, value: &str) -> Change {
    Change::Write { path: path.into(), value: value.into() }
}

fn update(path: &str, value: &str) -> Change {
    Change::Update { path: path.into(), value: value.into() }
}

fn assert_empty(client: &Client) {
    assert!(client.jobs.is_empty() && client.requests.is_empty() && client.ready.is_empty());
    assert!(client.commits.is_empty() && client.events.is_empty());
    assert!(client.pending_output().is_empty());
}

#[test]
fn reads_are_pipelined_and_answered_in_any_order() {
    let mut client = Client::new();
    let job = client.read_many(["/a", "/b", "rel/c", "/hidden"]);
    let requests = sent(&mut client);
    assert_eq!(
        said(&requests),
        [
            (Kind::Read, 0, "/a|".into()),
            (Kind::Read, 0, "/b|".into()),
            (Kind::Read, 0, "rel/c|".into()),
            (Kind::Read, 0, "/hidden|".into())
        ]
    );
    refuse(&mut client, &requests[3], XsError::EACCES);
    answer(&mut client, &requests[2], b"3");
    refuse(&mut client, &requests[1], XsError::ENOENT);
    assert_eq!(events(&mut client), []);
    answer(&mut client, &requests[0], b"");
    let values = vec![Some(vec![]), None, Some(b"3".to_vec()), None];
    assert_eq!(events(&mut client), done(job, Ok(Outcome::Values(values))));
    assert_empty(&client);
}

#[test]
fn a_read_that_is_refused_fails_its_job_and_no_other() {
    let mut client = Client::new();
    let bad = client.read_many(["/a", "/b"]);
    let good = client.read_many(["/c"]);
    let requests = sent(&mut client);
    let by_path = |path: &str| requests.iter().find(|m| m.payload == path.as_bytes()).unwrap();
    refuse(&mut client, by_path("/b\0"), XsError::EIO);
    answer(&mut client, by_path("/c\0"), b"v");
    let values = Outcome::Values(vec![Some(b"v".to_vec())]);
    assert_eq!(events(&mut client), done(good, Ok(values)));
    answer(&mut client, by_path("/a\0"), b"x");
    let error = Error::Store { error: XsError::EIO, at: 1 };
    assert_eq!(events(&mut client), done(bad, Err(error)));
    assert_empty(&client);
}

#[test]
fn requests_on_the_wire_are_bounded_and_shared_fairly() {
    let mut client = Client::new();
    let long = client.read_many((0..100).map(|i| format!("/long/{i}")));
    let short = client.read_many(["/short"]);
    let mut first = None;
    let mut total = 0;
    while !client.jobs.is_empty() {
        let requests = sent(&mut client);
        assert!(client.requests.len() <= REQUESTS_MAX);
        total += requests.len();
        requests.iter().for_each(|request| answer(&mut client, request, b""));
        for event in events(&mut client) {
            let Event::Done { job, result } = event else { panic!() };
            assert!(result.is_ok());
            first = first.or(Some(job));
        }
    }
    assert_eq!((first, total), (Some(short), 101));
    assert_ne!(first, Some(long));
    assert_empty(&client);
}

#[test]
fn a_commit_is_one_transaction_retried_on_conflict() {
    let mut client = Client::new();
    let perms = vec![
        Perm::new(Access::None, hypercall::DomId(0)),
        Perm::new(Access::Read, hypercall::DomId(5)),
    ];
    let job = client.commit([
        Change::Mkdir { path: "/d".into() },
        write("/d/a", "1"),
        Change::SetPerms { path: "/d".into(), perms },
        Change::Rm { path: "/gone/x".into() },
    ]);
    for (tx, verdict) in [(7u32, XsError::EAGAIN), (9, XsError::EAGAIN), (8, XsError::EINVAL)] {
        let start = one(&mut client);
        assert_eq!(said(core::slice::from_ref(&start)), [(Kind::TransactionStart, 0, "|".into())]);
        answer(&mut client, &start, format!("{tx}\0").as_bytes());
        let changes = sent(&mut client);
        assert_eq!(
            said(&changes),
            [
                (Kind::Mkdir, tx, "/d|".into()),
                (Kind::Write, tx, "/d/a|1".into()),
                (Kind::SetPerms, tx, "/d|n0|r5|".into()),
                (Kind::Rm, tx, "/gone/x|".into()),
            ]
        );
        changes[..3].iter().for_each(|change| answer(&mut client, change, b"OK\0"));
        assert!(sent(&mut client).is_empty(), "ended before all changes were answered");
        refuse(&mut client, &changes[3], XsError::ENOENT);
        let end = one(&mut client);
        assert_eq!(said(core::slice::from_ref(&end)), [(Kind::TransactionEnd, tx, "T|".into())]);
        if verdict == XsError::EAGAIN {
            refuse(&mut client, &end, verdict);
            assert_eq!(events(&mut client), []);
        } else {
            answer(&mut client, &end, b"OK\0");
        }
    }
    assert_eq!(events(&mut client), done(job, Ok(Outcome::Committed)));
    assert_empty(&client);
}

#[test]
fn conflicts_without_end_are_an_error() {
    let mut client = Client::new();
    let job = client.commit([write("/a", "1"), write("/b", "1")]);
    let mut tries = 0;
    while !client.jobs.is_empty() {
        for request in sent(&mut client) {
            match request.header.kind().unwrap() {
                Kind::TransactionStart => answer(&mut client, &request, b"1\0"),
                Kind::TransactionEnd => {
                    tries += 1;
                    refuse(&mut client, &request, XsError::EAGAIN);
                }
                _ => answer(&mut client, &request, b"OK\0"),
            }
        }
    }
    assert_eq!(tries, RETRIES_MAX + 1);
    assert_eq!(events(&mut client), done(job, Err(Error::Conflict)));
    assert_empty(&client);
}

#[test]
fn a_refused_change_aborts_the_transaction() {
    for (error, expected) in [
        (XsError::EACCES, Error::Store { error: XsError::EACCES, at: 1 }),
        (XsError::ENOSPC, Error::Store { error: XsError::ENOSPC, at: 1 }),
    ] {
        let mut client = Client::new();
        let job = client.commit([write("/a", "1"), write("/b", "1")]);
        let start = one(&mut client);
        answer(&mut client, &start, b"3\0");
        let changes = sent(&mut client);
        refuse(&mut client, &changes[1], error);
        answer(&mut client, &changes[0], b"OK\0");
        let end = one(&mut client);
        assert_eq!(said(core::slice::from_ref(&end)), [(Kind::TransactionEnd, 3, "F|".into())]);
        assert_eq!(events(&mut client), []);
        answer(&mut client, &end, b"OK\0");
        assert_eq!(events(&mut client), done(job, Err(expected)));
        assert_empty(&client);
    }
}

#[test]
fn a_transaction_that_cannot_start_fails_the_commit() {
    let mut client = Client::new();
    let job = client.commit([update("/s", "4")]);
    let start = one(&mut client);
    refuse(&mut client, &start, XsError::ENOSPC);
    let error = Error::Store { error: XsError::ENOSPC, at: 0 };
    assert_eq!(events(&mut client), done(job, Err(error)));
    assert_empty(&client);
}

#[test]
fn commits_take_effect_in_order() {
    let mut client = Client::new();
    let first = client.commit([write("/a", "1"), write("/b", "1")]);
    let second = client.commit([write("/a", "2")]);
    let start = one(&mut client);
    answer(&mut client, &start, b"1\0");
    for _ in 0..2 {
        for request in sent(&mut client) {
            assert_ne!(request.payload, b"/a\x002");
            answer(&mut client, &request, b"OK\0");
        }
    }
    assert_eq!(events(&mut client), done(first, Ok(Outcome::Committed)));
    // Alone, it needs no transaction.
    let request = one(&mut client);
    assert_eq!(said(core::slice::from_ref(&request)), [(Kind::Write, 0, "/a|2".into())]);
    answer(&mut client, &request, b"OK\0");
    assert_eq!(events(&mut client), done(second, Ok(Outcome::Committed)));
    assert_empty(&client);
}

#[test]
fn an_update_neither_creates_nor_repeats() {
    for (found, written) in [(None, false), (Some("4"), false), (Some("5"), true)] {
        let mut client = Client::new();
        let job = client.commit([update("/s", "4"), write("/after", "x")]);
        let start = one(&mut client);
        answer(&mut client, &start, b"1\0");
        let read = one(&mut client);
        assert_eq!(said(core::slice::from_ref(&read)), [(Kind::Read, 1, "/s|".into())]);
        match found {
            Some(value) => answer(&mut client, &read, value.as_bytes()),
            None => refuse(&mut client, &read, XsError::ENOENT),
        }
        let changes = sent(&mut client);
        let mut expected = vec![(Kind::Write, 1, "/after|x".to_string())];
        if written {
            expected.insert(0, (Kind::Write, 1, "/s|4".into()));
        }
        assert_eq!(said(&changes), expected);
        changes.iter().for_each(|change| answer(&mut client, change, b"OK\0"));
        let end = one(&mut client);
        answer(&mut client, &end, b"OK\0");
        assert_eq!(events(&mut client), done(job, Ok(Outcome::Committed)));
    }
}

#[test]
fn a_commit_that_meets_what_it_does_not_expect_changes_nothing() {
    for (found, met) in [(None, false), (Some(""), false), (Some("suspend"), true)] {
        let mut client = Client::new();
        let expect = Change::Expect { path: "/order".into(), value: b"suspend".to_vec() };
        let job = client.commit([expect, write("/order", "")]);
        let start = one(&mut client);
        answer(&mut client, &start, b"1\0");
        let read = one(&mut client);
        assert_eq!(said(core::slice::from_ref(&read)), [(Kind::Read, 1, "/order|".into())]);
        match found {
            Some(value) => answer(&mut client, &read, value.as_bytes()),
            None => refuse(&mut client, &read, XsError::ENOENT),
        }
        if met {
            let write = one(&mut client);
            assert_eq!(said(core::slice::from_ref(&write)), [(Kind::Write, 1, "/order|".into())]);
            answer(&mut client, &write, b"OK\0");
        }
        let end = one(&mut client);
        let how = if met { "T|" } else { "F|" };
        assert_eq!(said(core::slice::from_ref(&end)), [(Kind::TransactionEnd, 1, how.to_string())]);
        answer(&mut client, &end, b"OK\0");
        let result = if met { Ok(Outcome::Committed) } else { Err(Error::Unexpected { at: 0 }) };
        assert_eq!(events(&mut client), done(job, result));
        assert_empty(&client);
    }
}

#[test]
fn what_cannot_be_said_is_not_sent() {
    let mut client = Client::new();
    let long = "x".repeat(PAYLOAD_MAX);
    let jobs = [
        (client.read_many(["/a", "/b/"]), 1),
        (client.list("/a//b"), 0),
        (client.get_perms("/a b"), 0),
        (client.commit([write("/a", "1"), write("/b", &long)]), 1),
        (client.commit([write("/a\0/b", "1")]), 0),
        (client.commit([update("@introduceDomain", "1")]), 0),
    ];
    for (job, at) in jobs {
        assert_eq!(client.poll_event(), done(job, Err(Error::Invalid { at })).pop());
    }
    let watch = client.watch("/a b");
    let error = Error::Invalid { at: 0 };
    assert_eq!(events(&mut client), [Event::WatchFailed { watch, error }]);
    let nothing = client.commit([]);
    assert_eq!(events(&mut client), done(nothing, Ok(Outcome::Committed)));
    assert_empty(&client);
}

#[test]
fn lists_and_permissions() {
    let mut client = Client::new();
    for (payload, names) in
        [(&b""[..], vec![]), (b"0\0queue-1\0", vec!["0".into(), "queue-1".into()])]
    {
        let job = client.list("/d");
        let request = one(&mut client);
        answer(&mut client, &request, payload);
        assert_eq!(events(&mut client), done(job, Ok(Outcome::Names(Some(names)))));
    }
    let job = client.list("/d");
    let request = one(&mut client);
    refuse(&mut client, &request, XsError::ENOENT);
    assert_eq!(events(&mut client), done(job, Ok(Outcome::Names(None))));

    for (payload, result) in [
        (&b"b3\0"[..], Ok(Outcome::Perms(vec![Perm::new(Access::Both, hypercall::DomId(3))]))),
        (b"n99999999\0", Err(Error::Malformed)),
        (b"", Err(Error::Malformed)),
    ] {
        let job = client.get_perms("/d");
        let request = one(&mut client);
        answer(&mut client, &request, payload);
        assert_eq!(events(&mut client), done(job, result));
    }
    assert!(!client.is_dead());
    assert_empty(&client);
}

#[test]
fn long_lists_come_in_parts_of_one_generation() {
    let mut client = Client::new();
    let job = client.list("/d");
    let request = one(&mut client);
    refuse(&mut client, &request, XsError::E2BIG);
    for (offset, part) in
        [(0, &b"7\0aa\0b\0"[..]), (5, b"8\0ccc\0\0"), (0, b"8\0aa\0ccc\0"), (7, b"8\0d\0\0")]
    {
        let request = one(&mut client);
        assert_eq!(
            said(core::slice::from_ref(&request)),
            [(Kind::DirectoryPart, 0, format!("/d|{offset}|"))]
        );
        answer(&mut client, &request, part);
    }
    let names = ["aa", "ccc", "d"].map(String::from).to_vec();
    assert_eq!(events(&mut client), done(job, Ok(Outcome::Names(Some(names)))));
    assert_empty(&client);
}

#[test]
fn a_list_without_end_is_an_error() {
    for (part, expected) in [(&b"7\0x\0"[..], Error::TooManyChildren), (b"", Error::Conflict)] {
        let mut client = Client::new();
        let job = client.list("/d");
        let request = one(&mut client);
        refuse(&mut client, &request, XsError::E2BIG);
        let mut generation = 0;
        while !client.jobs.is_empty() {
            let request = one(&mut client);
            generation += 1;
            let changing = format!("{generation}\0x\0");
            let payload = if part.is_empty() { changing.as_bytes() } else { part };
            answer(&mut client, &request, payload);
        }
        assert_eq!(events(&mut client), done(job, Err(expected)));
    }
}

#[test]
fn watches_fire_by_token() {
    let mut client = Client::new();
    let a = client.watch("/dir");
    let b = client.watch("/dir");
    let special = client.watch("@releaseDomain");
    assert_ne!(a, b);
    let requests = sent(&mut client);
    assert_eq!(said(&requests)[0], (Kind::Watch, 0, "/dir|1|".into()));
    requests.iter().for_each(|request| answer(&mut client, request, b"OK\0"));
    fire(&mut client, "/dir/x", "2");
    fire(&mut client, "@releaseDomain/4", "3");
    assert_eq!(
        events(&mut client),
        [
            Event::Watch { watch: b, path: "/dir/x".into() },
            Event::Watch { watch: special, path: "@releaseDomain/4".into() }
        ]
    );
    // Tokens that are not ours, or not where we watch, are somebody's mistake.
    for (path, token) in
        [("/dir/x", "9"), ("/dir/x", "1x"), ("/dir/x", ""), ("/dirt", "1"), ("/", "1")]
    {
        fire(&mut client, path, token);
    }
    assert_eq!(events(&mut client), []);
    assert_eq!(client.stats().stray_events, 5);

    fire(&mut client, "/dir", "1");
    fire(&mut client, "/dir/y", "2");
    client.unwatch(a);
    assert_eq!(events(&mut client), [Event::Watch { watch: b, path: "/dir/y".into() }]);
    let request = one(&mut client);
    assert_eq!(said(core::slice::from_ref(&request)), [(Kind::Unwatch, 0, "/dir|1|".into())]);
    fire(&mut client, "/dir", "1");
    refuse(&mut client, &request, XsError::ENOENT);
    assert_eq!(events(&mut client), []);
    assert!(!client.is_dead());
    assert_empty(&client);
}

#[test]
fn a_refused_watch_says_so() {
    let mut client = Client::new();
    let watch = client.watch("/dir");
    let request = one(&mut client);
    refuse(&mut client, &request, XsError::ENOSPC);
    let error = Error::Store { error: XsError::ENOSPC, at: 0 };
    assert_eq!(events(&mut client), [Event::WatchFailed { watch, error }]);
    client.unwatch(watch);
    assert_empty(&client);
}

#[test]
fn event_storms_are_coalesced() {
    let mut client = Client::new();
    let watch = client.watch("/d");
    let request = one(&mut client);
    answer(&mut client, &request, b"OK\0");
    for _ in 0..100_000 {
        fire(&mut client, "/d/state", "1");
    }
    fire(&mut client, "/d/other", "1");
    let told = |path: &str| Event::Watch { watch, path: path.into() };
    assert_eq!(events(&mut client), [told("/d/state"), told("/d/other")]);

    for i in 0..100_000 {
        fire(&mut client, &format!("/d/{i}"), "1");
    }
    assert_eq!(events(&mut client), [told("/d")]);
    assert_eq!(client.stats().collapsed_events, 1);
    fire(&mut client, "/d/again", "1");
    assert_eq!(events(&mut client), [told("/d/again")]);
}

#[test]
fn reconnecting_fails_jobs_and_keeps_watches() {
    let mut client = Client::new();
    let kept = client.watch("/kept");
    let gone = client.watch("/gone");
    let requests = sent(&mut client);
    requests.iter().for_each(|request| answer(&mut client, request, b"OK\0"));
    client.unwatch(gone);
    let read = client.read_many(["/a"]);
    let commit = client.commit([write("/a", "1"), write("/b", "1")]);
    sent(&mut client);
    client.receive(&[1, 2, 3]).unwrap();
    client.reconnect();
    let lost = Err(Error::Disconnected);
    let ended = [done(read, lost.clone()), done(commit, lost)].concat();
    assert_eq!(events(&mut client), ended);
    let requests = sent(&mut client);
    assert_eq!(
        said(&requests),
        [(Kind::Unwatch, 0, "/gone|2|".into()), (Kind::Watch, 0, "/kept|1|".into())]
    );
    refuse(&mut client, &requests[0], XsError::ENOENT);
    // The store remembered it: what changed meanwhile is not known, so it fires.
    refuse(&mut client, &requests[1], XsError::EEXIST);
    assert_eq!(events(&mut client), [Event::Watch { watch: kept, path: "/kept".into() }]);
    let job = client.commit([write("/a", "1")]);
    let request = one(&mut client);
    answer(&mut client, &request, b"OK\0");
    assert_eq!(events(&mut client), done(job, Ok(Outcome::Committed)));
    assert_empty(&client);
}

#[test]
fn replies_that_fit_no_request_kill_the_connection() {
    let id = ReqId(1);
    let cases = [
        (raw(Kind::Read.raw(), ReqId(9), TxId::NONE, b""), ProtocolError::UnknownRequest(ReqId(9))),
        (raw(Kind::Read.raw(), id, TxId(1), b""), ProtocolError::WrongTransaction(id)),
        (
            raw(Kind::Write.raw(), id, TxId::NONE, b"OK\0"),
            ProtocolError::WrongKind { expected: Kind::Read, got: Kind::Write },
        ),
        (raw(99, id, TxId::NONE, b""), ProtocolError::UnknownKind(99)),
        (raw(16, id, TxId::NONE, b"ENOENT"), ProtocolError::Malformed(Kind::Error)),
        (raw(15, ReqId(0), TxId::NONE, b"/a\0t"), ProtocolError::Malformed(Kind::WatchEvent)),
        (raw(15, ReqId(0), TxId::NONE, b""), ProtocolError::Malformed(Kind::WatchEvent)),
        (vec![0xff; 16], ProtocolError::TooLong(wire::PayloadTooLong)),
    ];
    for (bytes, error) in cases {
        let mut client = Client::new();
        let read = client.read_many(["/a"]);
        let commit = client.commit([write("/b", "1")]);
        let watch = client.watch("/w");
        assert_eq!(client.receive(&bytes), Err(error));
        assert!(client.is_dead());
        let later = client.list("/a");
        let lost = |job| Event::Done { job, result: Err(Error::Disconnected) };
        assert_eq!(events(&mut client), [lost(read), lost(commit), lost(later)]);
        assert_eq!(client.receive(&[]), Err(error));
        assert_eq!(sent(&mut client), []);
        client.unwatch(watch);
        assert_empty(&client);
    }
}

#[test]
fn malformed_acknowledgements_kill_the_connection() {
    let changes: [Vec<Change>; 2] =
        [vec![write("/a", "1")], vec![write("/a", "1"), write("/b", "1")]];
    for (changes, payload) in changes.into_iter().zip([&b"NO\0"[..], b"0\0"]) {
        let mut client = Client::new();
        client.commit(changes);
        let request = one(&mut client);
        let Header { raw_kind, req_id, tx_id, .. } = request.header;
        let result = client.receive(&raw(raw_kind, req_id, tx_id, payload));
        assert_eq!(result, Err(ProtocolError::Malformed(request.header.kind().unwrap())));
    }
}

#[test]
fn output_can_be_sent_in_pieces() {
    let mut client = Client::new();
    client.read_many(["/abc"]);
    let whole = client.pending_output().to_vec();
    let mut pieces = vec![];
    while !client.pending_output().is_empty() {
        let count = client.pending_output().len().min(3);
        pieces.extend_from_slice(&client.pending_output()[..count]);
        client.consume_output(count);
    }
    assert_eq!(pieces, whole);
    client.consume_output(100);
    assert!(client.pending_output().is_empty());
}

proptest! {
    #[test]
    fn garbage_never_panics(chunks: Vec<Vec<u8>>, headers: Vec<(u8, u8, bool, Vec<u8>)>) {
        let mut client = Client::new();
        client.read_many(["/a", "/b"]);
        client.commit([write("/a", "1"), update("/b", "1")]);
        client.list("/d");
        client.watch("/w");
        for (kind, id, tx, payload) in headers {
            let tx = TxId(u32::from(tx));
            let _ = client.receive(&raw(kind.into(), ReqId(id.into()), tx, &payload));
        }
        for chunk in chunks {
            let _ = client.receive(&chunk);
        }
        prop_assert!(client.requests.len() <= REQUESTS_MAX);
        while client.poll_event().is_some() {}
    }

    #[test]
    fn replies_may_be_cut_anywhere(values: Vec<Vec<u8>>, sizes in prop::collection::vec(1..40usize, 1..20)) {
        let mut client = Client::new();
        let job = client.read_many((0..values.len()).map(|i| format!("/{i}")));
        let mut sizes = sizes.iter().cycle();
        let mut answered = values.iter();
        loop {
            let mut bytes = vec![];
            for request in sent(&mut client) {
                let id = request.header.req_id;
                let value = answered.next().unwrap();
                bytes.extend(raw(Kind::Read.raw(), id, TxId::NONE, value));
            }
            if bytes.is_empty() {
                break;
            }
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
                client.receive(now).unwrap();
                rest = later;
            }
        }
        let values = values.into_iter().map(Some).collect();
        prop_assert_eq!(events(&mut client), done(job, Ok(Outcome::Values(values))));
    }
}

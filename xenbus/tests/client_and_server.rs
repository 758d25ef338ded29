//! The client against the crate's own server: what two clients do to each other, and to each other's transactions.

// The lints know tests by their attribute; what follows is all tests.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::VecDeque;

use hypercall::DomId;
use proptest::prelude::*;
use xenbus::client::{Change, Client, Error, Event, JobId, Outcome, WatchId};
use xenbus::server::{ConnId, Quotas, Server};
use xenbus::wire::{Access, Perm, XsError};

/// A store with some clients, whose bytes move in small steps that a test can interleave.
struct World {
    server: Server,
    ends: Vec<(ConnId, Client)>,
}

impl World {
    fn new(clients: usize) -> Self {
        let mut server = Server::new(Quotas::default());
        let ends = (0..clients).map(|_| (server.connect(DomId(0), true), Client::new())).collect();
        Self { server, ends }
    }

    /// Adds an unprivileged domain, with a directory of its own.
    fn add_domain(&mut self, domid: u16) -> usize {
        let path = format!("/local/domain/{domid}");
        let perms = vec![Perm::new(Access::None, DomId(domid))];
        let job = self
            .client(0)
            .commit([Change::Mkdir { path: path.clone() }, Change::SetPerms { path, perms }]);
        assert_eq!(self.run(0, job), Ok(Outcome::Committed));
        let conn = self.server.introduce(DomId(domid));
        self.ends.push((conn, Client::new()));
        self.ends.len() - 1
    }

    fn client(&mut self, end: usize) -> &mut Client {
        &mut self.ends[end].1
    }

    /// Moves at most `count` bytes each way between one client and the server; tells whether any moved.
    fn step(&mut self, end: usize, count: usize) -> bool {
        let (conn, client) = &mut self.ends[end];
        let output = client.pending_output();
        let taken = self.server.receive(*conn, &output[..output.len().min(count)]).unwrap();
        client.consume_output(taken);
        let input = self.server.pending_output(*conn);
        let input = input[..input.len().min(count)].to_vec();
        self.server.consume_output(*conn, input.len());
        client.receive(&input).unwrap();
        taken > 0 || !input.is_empty()
    }

    fn settle(&mut self) {
        loop {
            let moved = (0..self.ends.len()).filter(|end| self.step(*end, 4096)).count();
            if moved == 0 {
                break;
            }
        }
    }

    /// Runs everything until this client's job has ended; its other events are lost.
    fn run(&mut self, end: usize, job: JobId) -> Result<Outcome, Error> {
        self.settle();
        let client = self.client(end);
        while let Some(event) = client.poll_event() {
            match event {
                Event::Done { job: ended, result } if ended == job => return result,
                _ => {}
            }
        }
        panic!("job has not ended");
    }

    fn values(&mut self, end: usize, paths: &[&str]) -> Vec<Option<String>> {
        let job = self.client(end).read_many(paths.iter().copied());
        match self.run(end, job) {
            Ok(Outcome::Values(values)) => values
                .into_iter()
                .map(|value| value.map(|v| String::from_utf8(v).unwrap()))
                .collect(),
            other => panic!("{other:?}"),
        }
    }
}

fn write(path: &str, value: &str) -> Change {
    Change::Write { path: path.into(), value: value.into() }
}

fn update(path: &str, value: &str) -> Change {
    Change::Update { path: path.into(), value: value.into() }
}

fn watched(client: &mut Client) -> Vec<(WatchId, String)> {
    std::iter::from_fn(|| client.poll_event())
        .filter_map(|event| match event {
            Event::Watch { watch, path } => Some((watch, path)),
            _ => None,
        })
        .collect()
}

#[test]
fn conflicting_transactions_are_retried() {
    let mut world = World::new(2);
    let setup = world.client(0).commit([write("/a", "0"), write("/b", "0")]);
    assert_eq!(world.run(0, setup), Ok(Outcome::Committed));

    // Both have begun before either ends: an Update reads what the other changes.
    let jobs = [0, 1].map(|end| {
        let value = format!("{end}");
        world.client(end).commit([update("/a", &format!("x{value}")), write("/b", &value)])
    });
    let mut starts = 0;
    for end in [0, 1] {
        world.step(end, 4096);
        starts += world.server.stats().transactions;
    }
    assert_eq!(starts, 1 + 2, "both transactions are open at once");
    world.settle();
    for (end, job) in jobs.into_iter().enumerate() {
        let event = world.client(end).poll_event();
        assert_eq!(event, Some(Event::Done { job, result: Ok(Outcome::Committed) }));
    }
    let values = world.values(0, &["/a", "/b"]);
    let either = [["x0", "0"], ["x1", "1"]].map(|pair| pair.map(|v| Some(v.to_string())).to_vec());
    assert!(either.contains(&values), "{values:?} is of one transaction");
    assert_eq!(world.server.stats().transactions, 0);
}

/// What was somebody else's and is gone with the permissions on it cannot be told from what may not be seen.
#[test]
fn what_may_not_be_seen_is_not_there() {
    let mut world = World::new(1);
    let guest = world.add_domain(5);
    let hidden = "/local/domain/0/hidden/node";
    let job = world.client(0).commit([write(hidden, "1")]);
    assert_eq!(world.run(0, job), Ok(Outcome::Committed));
    for path in [hidden, "/local/domain/0/hidden/none"] {
        assert_eq!(world.values(guest, &[path]), [None]);
        let job = world.client(guest).list(path);
        assert_eq!(world.run(guest, job), Ok(Outcome::Names(None)));
        let update = Change::Update { path: path.into(), value: b"6".to_vec() };
        let job = world.client(guest).commit([update]);
        assert_eq!(world.run(guest, job), Ok(Outcome::Committed));
    }
    assert_eq!(world.values(0, &[hidden]), [Some("1".into())]);
}

#[test]
fn a_commit_that_fails_changes_nothing() {
    let mut world = World::new(1);
    let guest = world.add_domain(5);
    let job = world.client(guest).commit([write("mine", "1"), write("/not/mine", "1")]);
    let error = Error::Store { error: XsError::EACCES, at: 1 };
    assert_eq!(world.run(guest, job), Err(error));
    assert_eq!(world.values(guest, &["mine"]), [None]);
    assert_eq!(world.server.stats().transactions, 0);

    let job = world.client(guest).commit([write("mine", "1")]);
    assert_eq!(world.run(guest, job), Ok(Outcome::Committed));
    assert_eq!(world.values(0, &["/local/domain/5/mine"]), [Some("1".into())]);
}

#[test]
fn permissions_removal_and_lists() {
    let mut world = World::new(1);
    let perms = vec![Perm::new(Access::None, DomId(0)), Perm::new(Access::Read, DomId(5))];
    let job = world.client(0).commit([
        write("/d/a", "1"),
        Change::Mkdir { path: "/d/b".into() },
        Change::SetPerms { path: "/d".into(), perms: perms.clone() },
        Change::Rm { path: "/d/a".into() },
        Change::Rm { path: "/no/such/parent".into() },
    ]);
    assert_eq!(world.run(0, job), Ok(Outcome::Committed));
    let job = world.client(0).get_perms("/d");
    assert_eq!(world.run(0, job), Ok(Outcome::Perms(perms)));
    let job = world.client(0).list("/d");
    assert_eq!(world.run(0, job), Ok(Outcome::Names(Some(vec!["b".into()]))));
    let job = world.client(0).list("/no");
    assert_eq!(world.run(0, job), Ok(Outcome::Names(None)));
}

#[test]
fn a_list_longer_than_a_message() {
    let mut world = World::new(1);
    let mut expected: Vec<String> = (0..900).map(|i| format!("child-{i:04}")).collect();
    let changes: Vec<_> = expected.iter().map(|name| write(&format!("/d/{name}"), "")).collect();
    let job = world.client(0).commit(changes);
    assert_eq!(world.run(0, job), Ok(Outcome::Committed));
    let job = world.client(0).list("/d");
    let Ok(Outcome::Names(Some(mut names))) = world.run(0, job) else { panic!() };
    names.sort();
    expected.sort();
    assert_eq!(names, expected);
}

#[test]
fn an_update_does_not_bring_a_removed_device_back() {
    let mut world = World::new(2);
    let job = world.client(0).commit([write("/vif/state", "4")]);
    assert_eq!(world.run(0, job), Ok(Outcome::Committed));
    let watch = world.client(1).watch("/vif/state");
    world.settle();
    assert_eq!(watched(world.client(1)), [(watch, "/vif/state".into())]);

    for (value, events) in [("4", 0), ("5", 1), ("5", 0)] {
        let job = world.client(0).commit([update("/vif/state", value)]);
        assert_eq!(world.run(0, job), Ok(Outcome::Committed));
        assert_eq!(watched(world.client(1)).len(), events, "state {value}");
    }
    let job = world.client(0).commit([Change::Rm { path: "/vif".into() }]);
    assert_eq!(world.run(0, job), Ok(Outcome::Committed));
    let job = world.client(0).commit([update("/vif/state", "6")]);
    assert_eq!(world.run(0, job), Ok(Outcome::Committed));
    assert_eq!(world.values(0, &["/vif/state"]), [None]);
}

#[test]
fn watches_come_back_after_a_reconnect() {
    let mut world = World::new(1);
    let guest = world.add_domain(5);
    let watch = world.client(guest).watch("data");
    world.settle();
    assert_eq!(watched(world.client(guest)), [(watch, "data".into())]);
    // Half a request is on its way when the connection is reset.
    let lost = world.client(guest).read_many(["data"]);
    world.step(guest, 5);
    world.server.introduce(DomId(5));
    world.client(guest).reconnect();
    assert_eq!(world.run(guest, lost), Err(Error::Disconnected));
    let job = world.client(0).commit([write("/local/domain/5/data/x", "1")]);
    assert_eq!(world.run(0, job), Ok(Outcome::Committed));
    let events: Vec<_> = watched(world.client(guest)).into_iter().map(|(_, path)| path).collect();
    assert!(events.contains(&"data/x".into()) || events.contains(&"data".into()), "{events:?}");
    // A suspend that was cancelled: the store still has the watch.
    world.client(guest).reconnect();
    world.settle();
    assert_eq!(watched(world.client(guest)), [(watch, "data".into())]);
    world.client(guest).unwatch(watch);
    world.settle();
    assert_eq!(world.server.stats().watches, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Clients that write the same nodes, cut and interleaved at random: every commit is whole, none is lost, and each
    /// client's own come in order.
    #[test]
    fn commits_are_whole_however_they_interleave(
        commits in prop::collection::vec((0..3usize, 1..4usize), 1..12),
        steps in prop::collection::vec((0..3usize, 1..200usize), 1..100),
    ) {
        let mut world = World::new(3);
        let mut expected: [VecDeque<JobId>; 3] = Default::default();
        let mut last = [const { None }; 3];
        for (number, (end, nodes)) in commits.into_iter().enumerate() {
            let value = format!("{end}:{number}");
            let mut changes: Vec<_> = (0..nodes).map(|n| write(&format!("/n{n}"), &value)).collect();
            changes.push(write(&format!("/own{end}"), &value));
            // Reads what the others write, so that transactions conflict.
            changes.insert(0, update("/n0", "marker"));
            expected[end].push_back(world.client(end).commit(changes));
            last[end] = Some(value);
        }
        for (end, count) in steps {
            world.step(end, count);
        }
        world.settle();
        for (end, jobs) in expected.into_iter().enumerate() {
            for job in jobs {
                let event = world.client(end).poll_event();
                prop_assert_eq!(event, Some(Event::Done { job, result: Ok(Outcome::Committed) }));
            }
            prop_assert_eq!(world.client(end).poll_event(), None);
            let own = world.values(end, &[&format!("/own{end}")]);
            prop_assert_eq!(&own, &[last[end].clone()]);
        }
        // The node that all write holds what one client wrote last.
        let n0 = world.values(0, &["/n0"]);
        prop_assert!(last.contains(&n0[0]), "{:?} is not of {:?}", n0, last);
        prop_assert_eq!(world.server.stats().transactions, 0);
    }
}

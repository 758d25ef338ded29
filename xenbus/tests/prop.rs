//! The client against the real server, with everything between them that a store may do: bytes cut anywhere, answers to
//! independent requests in another order, events in between, refusals and conflicts. And the parsers of what others write.
//!
//! Each property also runs with something between the two that no store may do, and has to notice.

#![cfg(feature = "server")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeMap;

use hypercall::DomId;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use xenbus::client::{Change, Client, Error, Event, JobId, Outcome, WatchId};
use xenbus::device::State;
use xenbus::server::{ConnId, Quotas, Server};
use xenbus::wire::{Framer, Kind, Message, ReqId, TxId, XsError, parse_u32, write_message};

const NODES: usize = 4;

fn node(number: usize) -> String {
    format!("/n/{number}")
}

/// What no store does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lie {
    None,
    /// Two reads get each other's value.
    SwappedValues,
    /// Events are lost.
    NoEvents,
    /// A commit that was dropped is said to have happened.
    FalseCommit,
    /// Commits, as they come, that are in conflict are said to be refused for good.
    Refused,
}

#[derive(Clone, Debug)]
enum Step {
    Commit(Vec<(usize, u8)>),
    Read(Vec<usize>),
    Watch(usize),
    /// Moves so many bytes each way.
    Move(usize),
    /// Lets the answers to reads that wait come last first.
    Reverse,
    /// An event for a watch of this number, or for none.
    Event(u8),
    /// The next read is refused.
    Refuse(usize),
    /// The next transaction is in conflict.
    Conflict,
    /// Until nothing is under way.
    Settle,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = (0..NODES, 1..250_u8);
    prop::collection::vec(
        prop_oneof![
            3 => prop::collection::vec(write, 1..4).prop_map(Step::Commit),
            3 => prop::collection::vec(0..NODES, 1..6).prop_map(Step::Read),
            1 => (0..NODES).prop_map(Step::Watch),
            4 => (1..300_usize).prop_map(Step::Move),
            2 => Just(Step::Reverse),
            1 => any::<u8>().prop_map(Step::Event),
            1 => (0..XsError::ALL.len()).prop_map(Step::Refuse),
            1 => Just(Step::Conflict),
            2 => Just(Step::Settle),
        ],
        1..60,
    )
}

/// The values that a read has to bring, if they are known.
type Exact = Option<Vec<Option<u8>>>;

/// The client, the server, and what sits between them.
struct World {
    server: Server,
    conn: ConnId,
    client: Client,
    lie: Lie,
    /// What the client has said, message by message, and what it is to hear, whole messages.
    said: Framer,
    told: Framer,
    waiting: Vec<Message>,
    /// Bytes on their way to the client.
    bytes: Vec<u8>,
    refuse: Option<XsError>,
    conflict: bool,
    /// Requests whose answer is to be a conflict.
    conflicting: Vec<ReqId>,
    commits: BTreeMap<JobId, Vec<(usize, u8)>>,
    /// Reads, and whether they may be exact: nothing else was under way.
    reads: BTreeMap<JobId, (Vec<usize>, Exact)>,
    refused: usize,
    refusals: usize,
    values: [Option<u8>; NODES],
    watches: BTreeMap<WatchId, usize>,
    /// Watches with a change that they have not told of since it was asked for.
    due: Vec<WatchId>,
}

type Verdict = Result<(), TestCaseError>;

impl World {
    fn new(lie: Lie) -> Self {
        let mut server = Server::new(Quotas::default());
        let conn = server.connect(DomId(0), true);
        Self {
            server,
            conn,
            client: Client::new(),
            lie,
            said: Framer::new(),
            told: Framer::new(),
            waiting: Vec::new(),
            bytes: Vec::new(),
            refuse: None,
            conflict: false,
            conflicting: Vec::new(),
            commits: BTreeMap::new(),
            reads: BTreeMap::new(),
            refused: 0,
            refusals: 0,
            values: [None; NODES],
            watches: BTreeMap::new(),
            due: Vec::new(),
        }
    }

    /// Passes at most `count` bytes of the client's on, request by request.
    fn up(&mut self, count: usize) -> bool {
        let output = self.client.pending_output();
        let now = output[..output.len().min(count)].to_vec();
        self.client.consume_output(now.len());
        let mut rest = now.as_slice();
        while let Some(mut message) = self.said.next(&mut rest).unwrap() {
            let header = message.header;
            let mut refusal = None;
            if header.kind() == Some(Kind::Read) && header.tx_id == TxId::NONE {
                refusal = self.refuse.take();
            }
            let ends = header.kind() == Some(Kind::TransactionEnd);
            if ends && message.payload == b"T\0" && std::mem::take(&mut self.conflict) {
                // The server forgets it, and the client hears of a conflict.
                message.payload = b"F\0".to_vec();
                self.conflicting.push(header.req_id);
            }
            if let Some(error) = refusal {
                let text = format!("{}\0", error.text());
                let header = xenbus::wire::Header { raw_kind: Kind::Error.raw(), ..header };
                self.waiting.push(Message { header, payload: text.into_bytes() });
                // A node that is not there is no refusal.
                self.refused += usize::from(error != XsError::ENOENT);
                continue;
            }
            let mut bytes = Vec::new();
            let (kind, payload) = (header.raw_kind, &message.payload);
            write_message(&mut bytes, kind, header.req_id, header.tx_id, &[payload]).unwrap();
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let taken = self.server.receive(self.conn, rest).unwrap();
                rest = &rest[taken..];
                self.hear();
            }
        }
        !now.is_empty()
    }

    /// Takes what the server has to say.
    fn hear(&mut self) {
        loop {
            let bytes = self.server.pending_output(self.conn).to_vec();
            if bytes.is_empty() {
                break;
            }
            self.server.consume_output(self.conn, bytes.len());
            let mut rest = bytes.as_slice();
            while let Some(mut message) = self.told.next(&mut rest).unwrap() {
                let id = message.header.req_id;
                if self.lie == Lie::NoEvents && message.header.kind() == Some(Kind::WatchEvent) {
                    continue;
                }
                if self.conflicting.contains(&id) && self.lie != Lie::FalseCommit {
                    let error = if self.lie == Lie::Refused { "EINVAL\0" } else { "EAGAIN\0" };
                    message.header.raw_kind = Kind::Error.raw();
                    message.payload = error.into();
                }
                self.waiting.push(message);
            }
        }
        if self.lie == Lie::SwappedValues {
            let reads: Vec<_> = (0..self.waiting.len()).filter(|at| self.is_read(*at)).collect();
            if let [.., a, b] = reads[..] {
                let payload = std::mem::take(&mut self.waiting[a].payload);
                self.waiting[a].payload = std::mem::replace(&mut self.waiting[b].payload, payload);
            }
        }
    }

    fn is_read(&self, at: usize) -> bool {
        let header = self.waiting[at].header;
        header.kind() == Some(Kind::Read) && header.tx_id == TxId::NONE
    }

    /// Answers to reads outside of transactions change places; all else stays where it is.
    fn reverse(&mut self) {
        let reads: Vec<_> = (0..self.waiting.len()).filter(|at| self.is_read(*at)).collect();
        for (a, b) in reads.iter().zip(reads.iter().rev()).take(reads.len() / 2) {
            self.waiting.swap(*a, *b);
        }
    }

    /// Gives the client at most `count` bytes.
    fn down(&mut self, count: usize) -> Result<bool, TestCaseError> {
        for message in self.waiting.drain(..) {
            let header = message.header;
            let (kind, id, tx) = (header.raw_kind, header.req_id, header.tx_id);
            write_message(&mut self.bytes, kind, id, tx, &[&message.payload]).unwrap();
        }
        let now: Vec<_> = self.bytes.drain(..self.bytes.len().min(count)).collect();
        let result = self.client.receive(&now);
        prop_assert!(result.is_ok(), "{result:?}");
        self.drain()?;
        Ok(!now.is_empty())
    }

    fn drain(&mut self) -> Verdict {
        while let Some(event) = self.client.poll_event() {
            match event {
                Event::Done { job, result } if self.commits.contains_key(&job) => {
                    prop_assert_eq!(result, Ok(Outcome::Committed));
                    for (at, value) in self.commits.remove(&job).unwrap() {
                        self.values[at] = Some(value);
                    }
                }
                Event::Done { job, result } => {
                    let Some((nodes, exact)) = self.reads.remove(&job) else {
                        return Err(TestCaseError::fail("a job ended twice"));
                    };
                    self.read(&nodes, exact, result)?;
                }
                Event::Watch { watch, .. } => {
                    prop_assert!(self.watches.contains_key(&watch));
                    self.due.retain(|due| *due != watch);
                }
                other => return Err(TestCaseError::fail(format!("{other:?}"))),
            }
        }
        Ok(())
    }

    fn read(&mut self, nodes: &[usize], exact: Exact, result: Result<Outcome, Error>) -> Verdict {
        let values = match result {
            Ok(Outcome::Values(values)) => values,
            Err(Error::Store { at, .. }) => {
                prop_assert!(at < nodes.len());
                self.refusals += 1;
                prop_assert!(self.refusals <= self.refused, "refused by nobody");
                return Ok(());
            }
            other => return Err(TestCaseError::fail(format!("{other:?}"))),
        };
        prop_assert_eq!(values.len(), nodes.len());
        for (index, (at, value)) in nodes.iter().zip(&values).enumerate() {
            let Some(value) = value else { continue };
            // Each value names its node.
            prop_assert_eq!(usize::from(value[0]), *at);
            if let Some(exact) = &exact {
                prop_assert_eq!(Some(value[1]), exact[index]);
            }
        }
        Ok(())
    }

    fn settle(&mut self) -> Verdict {
        loop {
            let up = self.up(usize::MAX);
            self.hear();
            if !self.down(usize::MAX)? && !up {
                break;
            }
        }
        prop_assert!(self.commits.is_empty() && self.reads.is_empty(), "a job has not ended");
        Ok(())
    }

    fn step(&mut self, step: Step) -> Verdict {
        match step {
            Step::Commit(writes) => {
                let changes = writes.iter().map(|(at, value)| Change::Write {
                    path: node(*at),
                    value: vec![*at as u8, *value],
                });
                let job = self.client.commit(changes.collect::<Vec<_>>());
                // Events come before the answer does.
                let due =
                    self.watches.iter().filter(|(_, at)| writes.iter().any(|it| it.0 == **at));
                self.due.extend(due.map(|(watch, _)| *watch));
                self.commits.insert(job, writes);
            }
            Step::Read(nodes) => {
                let quiet = self.commits.is_empty();
                let exact = quiet.then(|| nodes.iter().map(|at| self.values[*at]).collect());
                // A later commit may overtake a read, so only those that end alone are exact.
                let job = self.client.read_many(nodes.iter().map(|at| node(*at)));
                self.reads.insert(job, (nodes, exact));
                if quiet {
                    self.settle()?;
                }
            }
            Step::Watch(at) => {
                let watch = self.client.watch(node(at));
                self.watches.insert(watch, at);
                self.due.push(watch);
            }
            Step::Move(count) => {
                self.up(count);
                self.hear();
                self.down(count)?;
            }
            Step::Reverse => {
                self.up(usize::MAX);
                self.hear();
                self.reverse();
            }
            Step::Event(number) => {
                let at = usize::from(number) % NODES;
                let mut bytes = Vec::new();
                let parts = format!("{}\0{}\0", node(at), number);
                let kind = Kind::WatchEvent.raw();
                write_message(&mut bytes, kind, ReqId(0), TxId::NONE, &[parts.as_bytes()]).unwrap();
                let mut rest = bytes.as_slice();
                // No watch has a number so high: it is a stray.
                let stray = usize::from(number) > self.watches.len();
                if let (true, Ok(Some(message))) = (stray, Framer::new().next(&mut rest)) {
                    self.waiting.push(message);
                }
            }
            Step::Refuse(error) => self.refuse = Some(XsError::ALL[error]),
            Step::Conflict => self.conflict = true,
            Step::Settle => self.settle()?,
        }
        Ok(())
    }
}

/// Every job ends once and as the store says; commits are not lost, and neither is a change that is watched.
fn store(steps: Vec<Step>, lie: Lie) -> Verdict {
    let mut world = World::new(lie);
    for step in steps {
        world.step(step)?;
    }
    world.settle()?;
    prop_assert!(world.due.is_empty(), "a change was not told of: {:?}", world.due);
    world.refuse = None;
    world.step(Step::Read((0..NODES).collect()))?;
    world.settle()
}

fn run(cases: u32, lie: Lie) -> Result<(), String> {
    let mut runner =
        TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(cases) });
    runner.run(&steps(), |steps| store(steps, lie)).map_err(|error| error.to_string())
}

#[test]
fn a_client_gets_what_the_store_says_in_any_order_and_in_any_pieces() {
    assert_eq!(run(400, Lie::None), Ok(()));
}

#[test]
fn a_store_that_lies_is_noticed() {
    for lie in [Lie::SwappedValues, Lie::NoEvents, Lie::FalseCommit, Lie::Refused] {
        assert!(run(2000, lie).is_err(), "{lie:?}");
    }
}

/// Text that is a number, or nearly.
fn numbers() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any::<u32>().prop_map(|number| number.to_string().into_bytes()),
        (any::<u64>(), 0..3_usize)
            .prop_map(|(number, zeros)| { format!("{}{number}", "0".repeat(zeros)).into_bytes() }),
        (any::<u16>(), "[ +\\-0x\t\n\0]{0,2}", "[ a-f.\0\n]{0,2}")
            .prop_map(|(number, before, after)| format!("{before}{number}{after}").into_bytes()),
        prop::collection::vec(any::<u8>(), 0..12),
    ]
}

/// A number is digits alone, ten at most, and fits.
fn decimal(text: &[u8], parse: fn(&[u8]) -> Option<u32>) -> Verdict {
    let digits = !text.is_empty() && text.len() <= 10 && text.iter().all(u8::is_ascii_digit);
    let number = str::from_utf8(text).ok().filter(|_| digits).and_then(|text| text.parse().ok());
    prop_assert_eq!(parse(text), number);
    Ok(())
}

fn fails(parse: fn(&[u8]) -> Option<u32>) -> bool {
    let mut runner =
        TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(2000) });
    runner.run(&numbers(), |text| decimal(&text, parse)).is_err()
}

#[test]
fn decimals_are_strict() {
    assert!(!fails(parse_u32));
    assert!(fails(|it| str::from_utf8(it).ok()?.trim().parse().ok()), "blanks");
    assert!(fails(|it| str::from_utf8(it).ok()?.trim_start_matches('+').parse().ok()), "signs");
    assert!(fails(|it| it.split(|byte| *byte == 0).next().and_then(parse_u32)), "NULs");
}

proptest! {
    #[test]
    fn states_are_numbers_up_to_8(text in numbers()) {
        let state = State::parse(Some(&text));
        let expected = parse_u32(&text).filter(|number| *number <= 8).unwrap_or(0);
        prop_assert_eq!(state as u32, expected);
    }
}

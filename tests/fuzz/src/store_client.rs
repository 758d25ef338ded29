//! A store's server that says anything to a [`Client`], in pieces of any size.

use std::collections::BTreeSet;

use xenbus::client::{Change, Client, Error, Event, JobId, REQUESTS_MAX, WATCH_PATHS_MAX, WatchId};
use xenbus::wire::{
    Access, Framer, HEADER_LEN, Header, Kind, PAYLOAD_MAX, Perm, ReqId, TxId, XsError,
    write_message,
};

use hypercall::DomId;

use crate::input::Input;

const PATHS: &[&str] = &["/a", "/a/b", "rel", "rel/x", "/", "", "//", "@releaseDomain", "/a/b/c"];
/// Jobs and watches of one run: what they need is bounded by their number.
const JOBS_MAX: usize = 64;

struct World {
    client: Client,
    /// What the server has heard.
    framer: Framer,
    /// What the client waits for, if all was heard.
    asked: Vec<Header>,
    jobs: BTreeSet<JobId>,
    watches: Vec<WatchId>,
    submitted: usize,
    cut: usize,
}

impl World {
    /// Sends bytes to the client in pieces, and looks after what it makes of them.
    fn say(&mut self, bytes: &[u8]) {
        let was_dead = self.client.is_dead();
        for piece in bytes.chunks(self.cut.max(1)) {
            let result = self.client.receive(piece);
            assert_eq!(result.is_err(), self.client.is_dead());
        }
        if self.client.is_dead() && !was_dead {
            self.drain();
            assert!(self.jobs.is_empty(), "every job ends with the connection");
            self.asked.clear();
        }
    }

    /// Takes what the client has to say.
    fn listen(&mut self) {
        let bytes = self.client.take_output();
        let mut rest = bytes.as_slice();
        while let Some(message) = self.framer.next(&mut rest).unwrap() {
            assert!(message.header.kind().is_some());
            self.asked.push(message.header);
        }
        assert!(self.framer.is_idle(), "only whole requests");
    }

    fn drain(&mut self) {
        let mut reports = 0;
        while let Some(event) = self.client.poll_event() {
            match event {
                Event::Done { job, result } => {
                    assert!(self.jobs.remove(&job), "a job ends once");
                    assert!(!self.client.is_dead() || result.is_err() || reports == 0);
                    if let Err(Error::Disconnected) = result {
                        assert!(!self.jobs.contains(&job));
                    }
                }
                Event::Watch { watch, .. } => {
                    assert!(self.watches.contains(&watch));
                    reports += 1;
                    assert!(reports <= JOBS_MAX * WATCH_PATHS_MAX, "reports without end");
                }
                Event::WatchFailed { watch, .. } => {
                    self.watches.retain(|known| *known != watch);
                }
            }
        }
    }

    fn check(&self) {
        assert!(self.jobs.len() <= self.submitted);
        // No more than what is on the wire at once, for a client that is read.
        let most = REQUESTS_MAX * (HEADER_LEN + PAYLOAD_MAX);
        assert!(self.client.pending_output().len() <= most);
    }
}

fn path(input: &mut Input<'_>) -> String {
    input.one_of(PATHS).into()
}

fn change(input: &mut Input<'_>) -> Change {
    let path = path(input);
    let perms = vec![Perm::new(Access::Read, DomId(input.half()))];
    match input.byte() % 5 {
        0 => Change::Write { path, value: input.take(3).into() },
        1 => Change::Update { path, value: input.take(3).into() },
        2 => Change::Mkdir { path },
        3 => Change::Rm { path },
        _ => Change::SetPerms { path, perms },
    }
}

/// A payload that the client may expect, or not.
fn payload(input: &mut Input<'_>) -> Vec<u8> {
    match input.byte() % 8 {
        0 | 1 => b"OK\0".into(),
        2 => [input.one_of(XsError::ALL).text().as_bytes(), b"\0"].concat(),
        3 => [(input.byte() % 4).to_string().as_bytes(), b"\0"].concat(),
        4 => b"n0\0r5\0".into(),
        // Children, in parts or in one.
        5 => [&b"1\0"[..], input.take(3), b"\0", input.take(2), b"\0"].concat(),
        6 => vec![b'x'; usize::from(input.half() % 4097)],
        _ => {
            let length = usize::from(input.byte());
            input.take(length).into()
        }
    }
}

fn act(world: &mut World, input: &mut Input<'_>) {
    let client = &mut world.client;
    match input.byte() % 16 {
        command @ 0..5 if world.submitted < JOBS_MAX => {
            world.submitted += 1;
            let job = match command {
                0 => {
                    let count = input.byte() % 24;
                    client.read_many((0..count).map(|_| path(input)).collect::<Vec<_>>())
                }
                1 => client.list(path(input)),
                2 => client.get_perms(path(input)),
                _ => {
                    let count = input.byte() % 6;
                    client.commit((0..count).map(|_| change(input)).collect::<Vec<_>>())
                }
            };
            assert!(world.jobs.insert(job));
        }
        5 if world.submitted < JOBS_MAX => {
            world.submitted += 1;
            let watch = client.watch(path(input));
            world.watches.push(watch);
        }
        6 if !world.watches.is_empty() => {
            let at = input.below(world.watches.len());
            client.unwatch(world.watches.swap_remove(at));
        }
        7 => {
            client.reconnect();
            world.framer = Framer::new();
            world.asked.clear();
            world.drain();
            assert!(world.jobs.is_empty() && !world.client.is_dead());
        }
        8 => {
            let length = usize::from(input.byte());
            world.say(input.take(length));
        }
        9 => world.cut = usize::from(input.byte()),
        10 => {
            // An event for a watch, or for none.
            let token = [(input.byte() % 8).to_string().as_bytes(), b"\0"].concat();
            let mut bytes = Vec::new();
            let path = path(input);
            let parts = [path.as_bytes(), input.take(2), b"\0", &token];
            let kind = Kind::WatchEvent.raw();
            write_message(&mut bytes, kind, ReqId(0), TxId::NONE, &parts).unwrap();
            world.say(&bytes);
        }
        11 => world.drain(),
        // An answer to one of the requests, in any order; sometimes to none.
        command => {
            world.listen();
            let mut header = if world.asked.is_empty() {
                Header { raw_kind: input.word(), req_id: ReqId(1), tx_id: TxId(0), len: 0 }
            } else {
                world.asked.swap_remove(input.below(world.asked.len()))
            };
            if command == 12 {
                header.raw_kind = Kind::Error.raw();
            } else if command == 13 {
                header.tx_id.0 ^= u32::from(input.flag());
                header.req_id.0 ^= u32::from(input.flag());
            }
            let payload = payload(input);
            let (mut bytes, Header { raw_kind, req_id, tx_id, .. }) = (Vec::new(), header);
            write_message(&mut bytes, raw_kind, req_id, tx_id, &[&payload]).unwrap();
            world.say(&bytes);
        }
    }
    // A ring takes what there is to take before it gives more.
    world.listen();
    world.check();
}

/// Each job ends once, what waits is bounded, and a dead connection says so.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut world = World {
        client: Client::new(),
        framer: Framer::new(),
        asked: Vec::new(),
        jobs: BTreeSet::new(),
        watches: Vec::new(),
        submitted: 0,
        cut: 4096,
    };
    while !input.is_empty() {
        act(&mut world, &mut input);
        if world.client.is_dead() {
            world.drain();
            assert!(world.jobs.is_empty());
        }
    }
    world.client.reconnect();
    world.drain();
    assert!(world.jobs.is_empty(), "every job ends");
}

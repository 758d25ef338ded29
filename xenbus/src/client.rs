//! The client's end of a store connection: bytes in, bytes out, no waiting.
//!
//! Drivers submit jobs ([`Client::read_many`], [`Client::commit`], ...) and watches, and learn of their ends and events
//! from [`Client::poll_event`]. Several drivers share one client: ids tell each which events are its own. The embedder moves
//! bytes between the client and the store, through a [`StoreRing`](crate::ring::StoreRing) or a socket.
//!
//! The store's server is trusted no further than the connection: a reply that fits no request ends it, and everything
//! outstanding fails. What other domains write into the store reaches drivers as plain bytes, and cannot end it.

mod job;
mod watch;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;

use crate::wire::{self, Framer, Kind, Message, Perm, ReqId, TxId, XsError};
use job::Job;
use watch::{WatchOp, Watches};

/// Requests on the wire at once. Under the 20 that xenstored lets an unprivileged domain have outstanding.
pub const REQUESTS_MAX: usize = 16;
/// Times a transaction, or a listing in parts, is begun anew because somebody else changed the store meanwhile.
pub const RETRIES_MAX: u32 = 32;
/// Distinct paths that wait to be reported per watch; with more, the watch reports its own path instead.
pub const WATCH_PATHS_MAX: usize = 16;
/// Bytes of names in one listing.
pub const LIST_MAX: usize = 64 * 1024;

/// Names a job of this client, for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(u64);

/// Names a watch of this client; on the wire, its token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WatchId(u32);

/// One change of a [`Client::commit`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Sets a value; makes the node and its parents if they are missing.
    Write {
        /// The node.
        path: String,
        /// Its new value.
        value: Vec<u8>,
    },
    /// Sets a value if the node exists (and may be seen) and the value differs: how states are switched, so that a removed device does
    /// not come back and an unchanged state wakes nobody.
    Update {
        /// The node.
        path: String,
        /// Its new value.
        value: Vec<u8>,
    },
    /// Changes nothing; unless the node has this value, the commit fails with [`Error::Unexpected`] and changes nothing
    /// either. How an order is acknowledged that may be taken back, or a node removed that may be made anew.
    Expect {
        /// The node.
        path: String,
        /// What it has to hold.
        value: Vec<u8>,
    },
    /// Makes a node, and its parents, if they are missing.
    Mkdir {
        /// The node.
        path: String,
    },
    /// Removes a node and all below it, if it exists.
    Rm {
        /// The node.
        path: String,
    },
    /// Sets a node's permissions.
    SetPerms {
        /// The node.
        path: String,
        /// The new list; its first entry names the owner.
        perms: Vec<Perm>,
    },
}

/// What a job that succeeded brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Of [`Client::read_many`]: a value per path, in order; `None` for a node that does not exist, or that this domain
    /// may not see, as the store does not tell which.
    Values(Vec<Option<Vec<u8>>>),
    /// Of [`Client::list`]: the children's names; `None` as for a value.
    Names(Option<Vec<String>>),
    /// Of [`Client::get_perms`].
    Perms(Vec<Perm>),
    /// Of [`Client::commit`].
    Committed,
}

/// Why a job or a watch failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The store refused the path or change of this index.
    #[error("store refused item {at}: {error}")]
    Store {
        /// The store's reason.
        error: XsError,
        /// Index of the path or change.
        at: usize,
    },
    /// The path or change of this index cannot be said on the wire: a malformed path, or too long.
    #[error("item {at} is malformed or too long")]
    Invalid {
        /// Index of the path or change.
        at: usize,
    },
    /// The node of the [`Change::Expect`] of this index holds something else, or is not there.
    #[error("item {at} is not as expected")]
    Unexpected {
        /// Index of the change.
        at: usize,
    },
    /// Others changed the same nodes [`RETRIES_MAX`] times in a row.
    #[error("gave up after too many conflicting changes")]
    Conflict,
    /// More names than [`LIST_MAX`] holds.
    #[error("too many children")]
    TooManyChildren,
    /// Somebody stored permissions that make no sense.
    #[error("malformed permissions")]
    Malformed,
    /// The connection died or was reset. Whether a commit took effect is not known.
    #[error("not connected to the store")]
    Disconnected,
}

/// What killed the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A payload over the limit.
    #[error(transparent)]
    TooLong(#[from] wire::PayloadTooLong),
    /// A message type that does not exist.
    #[error("unknown message type {0}")]
    UnknownKind(u32),
    /// A reply to nothing that was asked.
    #[error("reply to unknown request {0:?}")]
    UnknownRequest(ReqId),
    /// A reply in another transaction than its request.
    #[error("reply to {0:?} in the wrong transaction")]
    WrongTransaction(ReqId),
    /// A reply of another type than its request.
    #[error("reply of type {got:?} to a request of type {expected:?}")]
    WrongKind {
        /// The request's.
        expected: Kind,
        /// The reply's.
        got: Kind,
    },
    /// A payload that is none of its type.
    #[error("malformed payload of type {0:?}")]
    Malformed(Kind),
}

/// What [`Client::poll_event`] tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A job has ended. Every job ends exactly once.
    Done {
        /// Which.
        job: JobId,
        /// How.
        result: Result<Outcome, Error>,
    },
    /// Something changed at `path`, or may have. Every watch fires once by itself when it is established.
    Watch {
        /// The watch.
        watch: WatchId,
        /// The path that changed: the watched one or one below it.
        path: String,
    },
    /// A watch could not be established, and is gone.
    WatchFailed {
        /// The watch.
        watch: WatchId,
        /// Why.
        error: Error,
    },
}

/// What a client has put up with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Watch events that belonged to no watch.
    pub stray_events: u64,
    /// Times a watch's waiting paths collapsed to its own.
    pub collapsed_events: u64,
}

/// What a request on the wire was sent for.
#[derive(Debug)]
enum Target {
    Job { job: JobId, at: usize },
    Watch(WatchOp),
}

#[derive(Debug)]
struct Pending {
    kind: Kind,
    tx_id: TxId,
    target: Target,
}

/// A store client. See the [module](self).
#[derive(Debug, Default)]
pub struct Client {
    framer: Framer,
    output: Vec<u8>,
    /// Bytes at the front of `output` that have been taken.
    taken: usize,
    dead: Option<ProtocolError>,
    requests: BTreeMap<ReqId, Pending>,
    last_req: u32,
    jobs: BTreeMap<JobId, Job>,
    last_job: u64,
    /// Jobs that may have a request to send, each at most once.
    ready: VecDeque<JobId>,
    /// Commits, in the order they take effect; only the first is at work.
    commits: VecDeque<JobId>,
    watches: Watches,
    events: VecDeque<Event>,
}

impl Client {
    /// A client at the start of a connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads values, pipelined. Ends in [`Outcome::Values`].
    pub fn read_many<P: Into<String>>(&mut self, paths: impl IntoIterator<Item = P>) -> JobId {
        self.submit(Job::read(paths.into_iter().map(Into::into).collect()))
    }

    /// Lists a node's children, however many [`LIST_MAX`] holds. Ends in [`Outcome::Names`].
    pub fn list(&mut self, path: impl Into<String>) -> JobId {
        self.submit(Job::list(path.into()))
    }

    /// Reads a node's permissions. Ends in [`Outcome::Perms`].
    pub fn get_perms(&mut self, path: impl Into<String>) -> JobId {
        self.submit(Job::get_perms(path.into()))
    }

    /// Applies all changes or none, in one transaction that is retried while it conflicts. Ends in
    /// [`Outcome::Committed`]. A client's commits take effect in the order they were submitted.
    pub fn commit(&mut self, changes: impl IntoIterator<Item = Change>) -> JobId {
        self.submit(Job::commit(changes.into_iter().collect()))
    }

    /// Watches a path and all below it. A watch lives until [`Client::unwatch`], across [`Client::reconnect`].
    pub fn watch(&mut self, path: impl Into<String>) -> WatchId {
        let (watch, failed) = self.watches.add(path.into());
        if failed {
            self.events.push_back(Event::WatchFailed { watch, error: Error::Invalid { at: 0 } });
        }
        self.pump();
        watch
    }

    /// Ends a watch. None of its events come after this.
    pub fn unwatch(&mut self, watch: WatchId) {
        self.watches.remove(watch);
        self.events
            .retain(|event| !matches!(event, Event::WatchFailed { watch: w, .. } if *w == watch));
        self.pump();
    }

    /// The next event, if any.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events
            .pop_front()
            .or_else(|| self.watches.next_event().map(|(watch, path)| Event::Watch { watch, path }))
    }

    /// Bytes to be sent; after sending `n` of them, call [`Client::consume_output`] with `n`.
    pub fn pending_output(&self) -> &[u8] {
        self.output.get(self.taken..).unwrap_or_default()
    }

    /// Drops bytes that have been sent from the front of the pending output.
    pub fn consume_output(&mut self, count: usize) {
        self.taken = self.taken.saturating_add(count).min(self.output.len());
        if self.taken == self.output.len() {
            self.output.clear();
            self.taken = 0;
        }
    }

    /// Takes all pending output.
    pub fn take_output(&mut self) -> Vec<u8> {
        let bytes = self.pending_output().to_vec();
        self.consume_output(bytes.len());
        bytes
    }

    /// Takes bytes that came from the store, cut anywhere.
    ///
    /// # Errors
    /// They are no answer to what was asked, or the client was dead before. It is dead now: every job ends in
    /// [`Error::Disconnected`], also those submitted later, until [`Client::reconnect`].
    pub fn receive(&mut self, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        let result = match self.dead {
            Some(error) => Err(error),
            None => self.take_messages(&mut bytes),
        };
        match result {
            Ok(()) => self.pump(),
            Err(error) if self.dead.is_none() => {
                log::error!("store connection lost: {error}");
                self.dead = Some(error);
                self.disconnect();
            }
            Err(_) => {}
        }
        result
    }

    /// Whether the connection has died of a [`ProtocolError`].
    pub fn is_dead(&self) -> bool {
        self.dead.is_some()
    }

    /// Starts over on a new connection, as after a resume: jobs end in [`Error::Disconnected`], watches are established
    /// again and fire again, as what changed meanwhile is not known.
    pub fn reconnect(&mut self) {
        self.disconnect();
        self.dead = None;
        self.watches.establish_all();
        self.pump();
    }

    /// What the client has put up with.
    pub fn stats(&self) -> Stats {
        self.watches.stats()
    }

    fn submit(&mut self, job: Job) -> JobId {
        self.last_job = self.last_job.wrapping_add(1);
        let id = JobId(self.last_job);
        let is_commit = job.is_commit();
        self.jobs.insert(id, job);
        if self.dead.is_some() {
            self.end(id, Err(Error::Disconnected));
            return id;
        }
        if is_commit {
            self.commits.push_back(id);
        }
        if !is_commit || self.commits.front() == Some(&id) {
            self.wake(id);
        }
        self.pump();
        id
    }

    fn end(&mut self, id: JobId, result: Result<Outcome, Error>) {
        self.jobs.remove(&id);
        self.events.push_back(Event::Done { job: id, result });
        if self.commits.front() == Some(&id) {
            self.commits.pop_front();
            if let Some(&next) = self.commits.front() {
                self.wake(next);
            }
        }
    }

    fn wake(&mut self, id: JobId) {
        if !self.ready.contains(&id) {
            self.ready.push_back(id);
        }
    }

    /// Sends what can be sent: watches first, then one request of each job in turn.
    fn pump(&mut self) {
        while self.dead.is_none() && self.requests.len() < REQUESTS_MAX {
            if let Some(op) = self.watches.next_op() {
                let token = op.token();
                let parts = [op.path.as_bytes(), b"\0", token.as_bytes(), b"\0"];
                self.send(op.kind, TxId::NONE, &parts, Target::Watch(op.clone()));
            } else if let Some(id) = self.ready.pop_front() {
                let Some(job) = self.jobs.get_mut(&id) else { continue };
                if let Some(request) = job.next_request() {
                    self.ready.push_back(id);
                    let target = Target::Job { job: id, at: request.at };
                    self.send(request.kind, request.tx_id, &[&request.payload], target);
                } else if let Some(result) = job.take_result() {
                    self.end(id, result);
                }
            } else {
                break;
            }
        }
    }

    fn send(&mut self, kind: Kind, tx_id: TxId, parts: &[&[u8]], target: Target) {
        let req_id = loop {
            self.last_req = self.last_req.wrapping_add(1);
            let id = ReqId(self.last_req);
            if id != ReqId(0) && !self.requests.contains_key(&id) {
                break id;
            }
        };
        // Jobs and watches check their lengths before they ask.
        if wire::write_message(&mut self.output, kind.raw(), req_id, tx_id, parts).is_ok() {
            self.requests.insert(req_id, Pending { kind, tx_id, target });
        }
    }

    fn take_messages(&mut self, bytes: &mut &[u8]) -> Result<(), ProtocolError> {
        while let Some(message) = self.framer.next(bytes)? {
            self.handle(message)?;
        }
        Ok(())
    }

    fn handle(&mut self, Message { header, payload }: Message) -> Result<(), ProtocolError> {
        let got = header.kind().ok_or(ProtocolError::UnknownKind(header.raw_kind))?;
        if got == Kind::WatchEvent {
            return self.watches.event(&payload).ok_or(ProtocolError::Malformed(got));
        }
        let Pending { kind, tx_id, target } = self
            .requests
            .remove(&header.req_id)
            .ok_or(ProtocolError::UnknownRequest(header.req_id))?;
        if header.tx_id != tx_id {
            return Err(ProtocolError::WrongTransaction(header.req_id));
        }
        let reply = if got == Kind::Error {
            let name = wire::single_string(&payload).ok_or(ProtocolError::Malformed(got))?;
            // A newer server may know more errors; Linux takes them for EINVAL as well.
            Err(XsError::from_text(name).unwrap_or(XsError::EINVAL))
        } else if got == kind {
            Ok(payload)
        } else {
            return Err(ProtocolError::WrongKind { expected: kind, got });
        };
        match target {
            Target::Watch(op) => {
                if let Some(error) =
                    self.watches.reply(&op, reply).map_err(ProtocolError::Malformed)?
                {
                    self.events.push_back(Event::WatchFailed { watch: op.watch, error });
                }
            }
            Target::Job { job: id, at } => {
                // A job outlives its requests.
                if let Some(job) = self.jobs.get_mut(&id) {
                    job.reply(kind, at, reply).map_err(ProtocolError::Malformed)?;
                    self.wake(id);
                }
            }
        }
        Ok(())
    }

    fn disconnect(&mut self) {
        self.framer = Framer::new();
        self.output.clear();
        self.taken = 0;
        self.ready.clear();
        self.commits.clear();
        for pending in core::mem::take(&mut self.requests).into_values() {
            if let Target::Watch(op) = pending.target {
                self.watches.undo(op);
            }
        }
        for id in core::mem::take(&mut self.jobs).into_keys() {
            self.events.push_back(Event::Done { job: id, result: Err(Error::Disconnected) });
        }
    }
}

/// The payload of a plain acknowledgement.
fn is_ok(payload: &[u8]) -> bool {
    payload.strip_suffix(b"\0").unwrap_or(payload) == b"OK"
}

#[cfg(test)]
mod tests;

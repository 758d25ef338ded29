//! Jobs: what they ask of the store next, and what they make of the answers.

use alloc::string::String;
use alloc::vec::Vec;

use super::{Change, Error, LIST_MAX, Outcome, RETRIES_MAX, is_ok};
use crate::wire::{self, Kind, PAYLOAD_MAX, TxId, XsError};

/// A request a job wants sent.
pub(super) struct Request {
    pub(super) kind: Kind,
    pub(super) tx_id: TxId,
    pub(super) payload: Vec<u8>,
    /// Index of the path or change it is for.
    pub(super) at: usize,
}

type Reply = Result<Vec<u8>, XsError>;

#[derive(Debug)]
pub(super) struct Job {
    work: Work,
    /// Requests on the wire: a job ends when all have been answered.
    outstanding: usize,
    error: Option<Error>,
}

#[derive(Debug)]
enum Work {
    Read { paths: Vec<String>, next: usize, values: Vec<Option<Vec<u8>>> },
    List(List),
    Perms { path: String, sent: bool, perms: Vec<wire::Perm> },
    Commit(Commit),
}

#[derive(Debug)]
struct List {
    path: String,
    /// Something is to be asked: all children, or from `offset` on in parts.
    ask: bool,
    in_parts: bool,
    /// The node's generation, of the first part.
    generation: Vec<u8>,
    offset: usize,
    tries: u32,
    names: Option<Vec<String>>,
}

#[derive(Debug)]
struct Commit {
    changes: Vec<Change>,
    phase: Phase,
    tx_id: TxId,
    conflict: bool,
    tries: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Start,
    Starting,
    /// Changes before `next` have been sent.
    Apply {
        next: usize,
        look: Look,
    },
    Ending {
        commit: bool,
    },
    Done,
}

/// How far the change that is next has come, if it goes by what its node holds. Nothing is sent beside it, so that changes stay
/// in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Unknown,
    Reading,
    /// The value has to be written.
    Write,
}

impl Job {
    pub(super) fn read(paths: Vec<String>) -> Self {
        let error = first_invalid(paths.iter().map(|path| is_path(path)));
        let values = paths.iter().map(|_| None).collect();
        Self::new(Work::Read { paths, next: 0, values }, error)
    }

    pub(super) fn list(path: String) -> Self {
        let error = first_invalid([is_path(&path)]);
        let list = List {
            path,
            ask: true,
            in_parts: false,
            generation: Vec::new(),
            offset: 0,
            tries: 0,
            names: None,
        };
        Self::new(Work::List(list), error)
    }

    pub(super) fn get_perms(path: String) -> Self {
        let error = first_invalid([is_path(&path)]);
        Self::new(Work::Perms { path, sent: false, perms: Vec::new() }, error)
    }

    pub(super) fn commit(changes: Vec<Change>) -> Self {
        let error = first_invalid(
            changes
                .iter()
                .map(|change| is_path(change.path()) && change.request().1.len() <= PAYLOAD_MAX),
        );
        // One request is a whole by itself.
        let phase = match changes.as_slice() {
            [] => Phase::Done,
            [change] if change.looks() => Phase::Start,
            [_, _, ..] => Phase::Start,
            [_] => Phase::Apply { next: 0, look: Look::Unknown },
        };
        let commit = Commit { changes, phase, tx_id: TxId::NONE, conflict: false, tries: 0 };
        Self::new(Work::Commit(commit), error)
    }

    fn new(work: Work, error: Option<Error>) -> Self {
        Self { work, outstanding: 0, error }
    }

    pub(super) fn is_commit(&self) -> bool {
        matches!(self.work, Work::Commit(_))
    }

    /// The next request that can go out now.
    pub(super) fn next_request(&mut self) -> Option<Request> {
        let idle = self.outstanding == 0;
        let failed = self.error.is_some();
        let request = match &mut self.work {
            Work::Commit(commit) => commit.next_request(idle, failed),
            _ if failed => None,
            Work::Read { paths, next, .. } => paths.get(*next).map(|path| {
                let at = *next;
                *next += 1;
                plain(Kind::Read, terminated(path), at)
            }),
            Work::List(list) => list.next_request(),
            Work::Perms { path, sent, .. } => (!core::mem::replace(sent, true))
                .then(|| plain(Kind::GetPerms, terminated(path), 0)),
        }?;
        self.outstanding += 1;
        Some(request)
    }

    /// Takes the answer to one of its requests; the error is the kind whose payload is malformed.
    pub(super) fn reply(&mut self, kind: Kind, at: usize, reply: Reply) -> Result<(), Kind> {
        self.outstanding = self.outstanding.saturating_sub(1);
        let error = match &mut self.work {
            Work::Read { values, .. } => match reply {
                Ok(value) => {
                    if let Some(place) = values.get_mut(at) {
                        *place = Some(value);
                    }
                    None
                }
                Err(error) if is_absent(error) => None,
                Err(error) => Some(Error::Store { error, at }),
            },
            Work::List(list) => list.reply(reply).ok_or(kind)?,
            Work::Perms { perms, .. } => match reply.map(|payload| wire::parse_perms(&payload)) {
                Ok(Some(list)) => {
                    *perms = list;
                    None
                }
                // Any domain may have set them, so it is no fault of the connection.
                Ok(None) => Some(Error::Malformed),
                Err(error) => Some(Error::Store { error, at }),
            },
            Work::Commit(commit) => commit.reply(kind, at, reply, self.error.is_some())?,
        };
        self.error = self.error.or(error);
        Ok(())
    }

    /// How the job ended, once it has.
    pub(super) fn take_result(&mut self) -> Option<Result<Outcome, Error>> {
        if self.outstanding > 0 {
            return None;
        }
        let outcome = match &mut self.work {
            Work::Commit(Commit { phase: Phase::Done, .. }) => Outcome::Committed,
            // A transaction that is open has to be ended first.
            Work::Commit(_) => return None,
            Work::Read { values, .. } => Outcome::Values(core::mem::take(values)),
            Work::List(list) => Outcome::Names(list.names.take()),
            Work::Perms { perms, .. } => Outcome::Perms(core::mem::take(perms)),
        };
        Some(self.error.map_or(Ok(outcome), Err))
    }
}

impl List {
    fn next_request(&mut self) -> Option<Request> {
        if !core::mem::replace(&mut self.ask, false) {
            return None;
        }
        let mut payload = terminated(&self.path);
        if self.in_parts {
            payload.extend_from_slice(alloc::format!("{}\0", self.offset).as_bytes());
            Some(plain(Kind::DirectoryPart, payload, 0))
        } else {
            Some(plain(Kind::Directory, payload, 0))
        }
    }

    /// `None` if the payload is malformed; else the error that ends the job, if any.
    fn reply(&mut self, reply: Reply) -> Option<Option<Error>> {
        match reply {
            Ok(payload) if self.in_parts => self.part(&payload),
            Ok(payload) => {
                push_names(self.names.insert(Vec::new()), &payload)?;
                Some(None)
            }
            Err(XsError::E2BIG) if !self.in_parts => {
                self.in_parts = true;
                self.ask = true;
                Some(None)
            }
            Err(error) if is_absent(error) => {
                self.names = None;
                Some(None)
            }
            Err(error) => Some(Some(Error::Store { error, at: 0 })),
        }
    }

    fn part(&mut self, payload: &[u8]) -> Option<Option<Error>> {
        let (generation, list) = wire::split_nul(payload)?;
        if self.offset > 0 && self.generation != generation {
            // The children changed while we read them: the offsets mean something else now.
            self.offset = 0;
            self.tries += 1;
            self.ask = true;
            return Some((self.tries > RETRIES_MAX).then_some(Error::Conflict));
        }
        if self.offset == 0 {
            self.generation = generation.to_vec();
            self.names = Some(Vec::new());
        }
        let end = push_names(self.names.get_or_insert_default(), list)?;
        self.offset += list.len();
        self.ask = !end;
        if self.ask && list.is_empty() {
            return None;
        }
        Some((self.offset > LIST_MAX).then_some(Error::TooManyChildren))
    }
}

/// Whether a node that was to be read counts as missing. The store does not tell a domain that may not look at a node's
/// parents whether it exists (Xen, tools/xenstore, `errno_from_parents`), so that a directory of somebody else's which
/// goes with the permissions on it is, to a driver domain, forbidden from then on.
fn is_absent(error: XsError) -> bool {
    matches!(error, XsError::ENOENT | XsError::EACCES)
}

/// Appends names from a payload, and tells whether the empty one ended it; `None` if the payload is malformed.
fn push_names(names: &mut Vec<String>, mut list: &[u8]) -> Option<bool> {
    while !list.is_empty() {
        let (name, rest) = wire::split_nul(list)?;
        if name.is_empty() {
            return rest.is_empty().then_some(true);
        }
        match core::str::from_utf8(name) {
            Ok(name) if !name.contains('/') => names.push(name.into()),
            // No path can name it.
            _ => log::debug!("store lists a child with an impossible name"),
        }
        list = rest;
    }
    Some(false)
}

impl Commit {
    fn next_request(&mut self, idle: bool, failed: bool) -> Option<Request> {
        let in_transaction = self.tx_id != TxId::NONE;
        match self.phase {
            Phase::Start if failed => {
                self.phase = Phase::Done;
                None
            }
            Phase::Start => {
                self.phase = Phase::Starting;
                Some(plain(Kind::TransactionStart, alloc::vec![0], 0))
            }
            Phase::Apply { next, look } => {
                let change = self.changes.get(next).filter(|_| !failed && !self.conflict);
                let Some(change) = change else {
                    if !idle {
                        return None;
                    }
                    if !in_transaction {
                        self.phase = Phase::Done;
                        return None;
                    }
                    let commit = !failed && !self.conflict;
                    self.phase = Phase::Ending { commit };
                    let payload = if commit { b"T\0" } else { b"F\0" };
                    return Some(Request {
                        kind: Kind::TransactionEnd,
                        tx_id: self.tx_id,
                        payload: payload.to_vec(),
                        at: next,
                    });
                };
                let mut request = match look {
                    Look::Reading => return None,
                    Look::Unknown if change.looks() => {
                        self.phase = Phase::Apply { next, look: Look::Reading };
                        plain(Kind::Read, terminated(change.path()), next)
                    }
                    _ => {
                        self.phase = Phase::Apply { next: next + 1, look: Look::Unknown };
                        let (kind, payload) = change.request();
                        plain(kind, payload, next)
                    }
                };
                request.tx_id = self.tx_id;
                Some(request)
            }
            Phase::Starting | Phase::Ending { .. } | Phase::Done => None,
        }
    }

    /// The error that ends the commit, if any; or the kind of a malformed payload.
    fn reply(
        &mut self,
        kind: Kind,
        at: usize,
        reply: Reply,
        failed: bool,
    ) -> Result<Option<Error>, Kind> {
        match (self.phase, reply) {
            (Phase::Starting, Ok(payload)) => {
                let id = wire::single_string(&payload).and_then(wire::parse_u32).map(TxId);
                self.tx_id = id.filter(|id| *id != TxId::NONE).ok_or(kind)?;
                self.phase = Phase::Apply { next: 0, look: Look::Unknown };
            }
            (Phase::Starting, Err(error)) => {
                self.phase = Phase::Done;
                return Ok(Some(Error::Store { error, at }));
            }
            (Phase::Apply { .. }, Ok(value)) if kind == Kind::Read => {
                return Ok(self.looked(at, Some(&value)));
            }
            (Phase::Apply { .. }, Err(error)) if kind == Kind::Read && is_absent(error) => {
                return Ok(self.looked(at, None));
            }
            // Its parent does not exist either.
            (Phase::Apply { .. }, Err(XsError::ENOENT)) if kind == Kind::Rm => {}
            (Phase::Ending { commit: true }, Ok(payload)) if is_ok(&payload) => {
                self.phase = Phase::Done;
            }
            // The store may have forgotten a transaction that failed; it is over in either case.
            (Phase::Ending { commit: false }, _) => return Ok(self.begin_anew(failed)),
            (Phase::Ending { .. }, Err(XsError::EAGAIN)) => return Ok(self.begin_anew(failed)),
            (Phase::Ending { .. }, Err(error)) => {
                self.phase = Phase::Done;
                return Ok(Some(Error::Store { error, at }));
            }
            (Phase::Apply { .. }, Ok(payload)) if is_ok(&payload) => {}
            (_, Ok(_)) => return Err(kind),
            (_, Err(XsError::EAGAIN)) if self.tx_id != TxId::NONE => self.conflict = true,
            (_, Err(error)) => return Ok(Some(Error::Store { error, at })),
        }
        Ok(None)
    }

    /// What the node of a change holds; the error that ends the commit, if any.
    fn looked(&mut self, at: usize, value: Option<&[u8]>) -> Option<Error> {
        let (look, error) = match (self.changes.get(at), value) {
            (Some(Change::Expect { value: wanted, .. }), found) => {
                let met = found == Some(wanted);
                (Look::Unknown, (!met).then_some(Error::Unexpected { at }))
            }
            (Some(Change::Update { value: wanted, .. }), Some(found)) if wanted != found => {
                (Look::Write, None)
            }
            _ => (Look::Unknown, None),
        };
        let next = if look == Look::Write { at } else { at + 1 };
        self.phase = Phase::Apply { next, look };
        error
    }

    fn begin_anew(&mut self, failed: bool) -> Option<Error> {
        self.tx_id = TxId::NONE;
        self.conflict = false;
        self.tries += 1;
        let give_up = self.tries > RETRIES_MAX;
        self.phase = if failed || give_up { Phase::Done } else { Phase::Start };
        (give_up && !failed).then_some(Error::Conflict)
    }
}

impl Change {
    fn path(&self) -> &str {
        match self {
            Self::Write { path, .. }
            | Self::Update { path, .. }
            | Self::Expect { path, .. }
            | Self::Mkdir { path }
            | Self::Rm { path }
            | Self::SetPerms { path, .. } => path,
        }
    }

    /// Whether it goes by what its node holds, which is read first.
    fn looks(&self) -> bool {
        matches!(self, Self::Update { .. } | Self::Expect { .. })
    }

    fn request(&self) -> (Kind, Vec<u8>) {
        let mut payload = terminated(self.path());
        let kind = match self {
            Self::Expect { .. } => Kind::Read,
            Self::Write { value, .. } | Self::Update { value, .. } => {
                payload.extend_from_slice(value);
                Kind::Write
            }
            Self::Mkdir { .. } => Kind::Mkdir,
            Self::Rm { .. } => Kind::Rm,
            Self::SetPerms { perms, .. } => {
                payload.extend_from_slice(wire::format_perms(perms).as_bytes());
                Kind::SetPerms
            }
        };
        (kind, payload)
    }
}

fn plain(kind: Kind, payload: Vec<u8>, at: usize) -> Request {
    Request { kind, tx_id: TxId::NONE, payload, at }
}

fn terminated(path: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len() + 1);
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    out
}

fn is_path(path: &str) -> bool {
    wire::valid_path(path.as_bytes()) || wire::valid_relative_path(path.as_bytes())
}

fn first_invalid(valid: impl IntoIterator<Item = bool>) -> Option<Error> {
    valid.into_iter().position(|valid| !valid).map(|at| Error::Invalid { at })
}

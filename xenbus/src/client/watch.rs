//! The watches of a client: which exist, which have to be said to the store, and which paths wait to be reported.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::{Error, Stats, WATCH_PATHS_MAX, WatchId, is_ok};
use crate::wire::{self, Kind, XsError};

/// A watch or unwatch to be sent.
#[derive(Debug, Clone)]
pub(super) struct WatchOp {
    pub(super) kind: Kind,
    pub(super) watch: WatchId,
    pub(super) path: String,
}

impl WatchOp {
    pub(super) fn token(&self) -> String {
        self.watch.0.to_string()
    }
}

#[derive(Debug)]
struct Watch {
    path: String,
    /// Distinct paths to report, oldest first.
    waiting: Vec<String>,
}

#[derive(Debug, Default)]
pub(super) struct Watches {
    watches: BTreeMap<WatchId, Watch>,
    last: u32,
    ops: VecDeque<WatchOp>,
    /// Watches with something to report, each once.
    fired: VecDeque<WatchId>,
    stats: Stats,
}

impl Watches {
    /// A new watch, and whether its path is malformed (then there is none).
    pub(super) fn add(&mut self, path: String) -> (WatchId, bool) {
        let watch = loop {
            self.last = self.last.wrapping_add(1);
            if !self.watches.contains_key(&WatchId(self.last)) {
                break WatchId(self.last);
            }
        };
        let bytes = path.as_bytes();
        if !(wire::valid_path(bytes)
            || wire::valid_relative_path(bytes)
            || wire::valid_special_path(bytes))
        {
            return (watch, true);
        }
        self.ops.push_back(WatchOp { kind: Kind::Watch, watch, path: path.clone() });
        self.watches.insert(watch, Watch { path, waiting: Vec::new() });
        (watch, false)
    }

    pub(super) fn remove(&mut self, watch: WatchId) {
        let Some(Watch { path, .. }) = self.watches.remove(&watch) else { return };
        self.fired.retain(|id| *id != watch);
        let unsent = self.ops.len();
        self.ops.retain(|op| op.watch != watch);
        if self.ops.len() == unsent {
            self.ops.push_back(WatchOp { kind: Kind::Unwatch, watch, path });
        }
    }

    /// What to say to the store next.
    pub(super) fn next_op(&mut self) -> Option<WatchOp> {
        self.ops.pop_front()
    }

    /// The store's answer; an error if the watch failed and is gone.
    pub(super) fn reply(
        &mut self,
        op: &WatchOp,
        reply: Result<Vec<u8>, XsError>,
    ) -> Result<Option<Error>, Kind> {
        match reply {
            Ok(payload) if is_ok(&payload) => Ok(None),
            Ok(_) => Err(op.kind),
            Err(error) if op.kind == Kind::Unwatch => {
                log::debug!("unwatch of {} failed: {error}", op.path);
                Ok(None)
            }
            // The store kept the watch over a reconnect, and will not fire it by itself.
            Err(XsError::EEXIST) => {
                self.fire(op.watch, &op.path);
                Ok(None)
            }
            Err(error) => {
                self.fired.retain(|id| *id != op.watch);
                Ok(self.watches.remove(&op.watch).map(|_| Error::Store { error, at: 0 }))
            }
        }
    }

    /// A watch event from the store; `None` if it has not the form of one.
    pub(super) fn event(&mut self, payload: &[u8]) -> Option<()> {
        let (path, rest) = wire::split_nul(payload)?;
        let token = wire::single_string(rest)?;
        let fired = wire::parse_u32(token)
            .zip(core::str::from_utf8(path).ok())
            .is_some_and(|(token, path)| self.fire(WatchId(token), path));
        if !fired {
            self.stats.stray_events = self.stats.stray_events.saturating_add(1);
        }
        Some(())
    }

    fn fire(&mut self, id: WatchId, path: &str) -> bool {
        let Some(watch) = self.watches.get_mut(&id) else { return false };
        if !is_within(path, &watch.path) {
            return false;
        }
        if watch.waiting.is_empty() {
            self.fired.push_back(id);
        }
        // The watch's own path stands for all below it.
        if watch.waiting.iter().any(|waiting| waiting == path || *waiting == watch.path) {
            return true;
        }
        if path == watch.path {
            watch.waiting.clear();
        } else if watch.waiting.len() >= WATCH_PATHS_MAX {
            self.stats.collapsed_events = self.stats.collapsed_events.saturating_add(1);
            watch.waiting.clear();
            watch.waiting.push(watch.path.clone());
            return true;
        }
        watch.waiting.push(path.into());
        true
    }

    /// The next path to report, each watch in turn.
    pub(super) fn next_event(&mut self) -> Option<(WatchId, String)> {
        let id = self.fired.pop_front()?;
        let watch = self.watches.get_mut(&id)?;
        let path = (!watch.waiting.is_empty()).then(|| watch.waiting.remove(0))?;
        if watch.waiting.is_empty() {
            watch.waiting = Vec::new();
        } else {
            self.fired.push_back(id);
        }
        Some((id, path))
    }

    /// An operation was on the wire when the connection was lost: an unwatch is still owed, in case the store remembers.
    pub(super) fn undo(&mut self, op: WatchOp) {
        if op.kind == Kind::Unwatch {
            self.ops.push_back(op);
        }
    }

    /// Says every watch again.
    pub(super) fn establish_all(&mut self) {
        self.ops.retain(|op| op.kind == Kind::Unwatch);
        self.ops.extend(self.watches.iter().map(|(&watch, Watch { path, .. })| WatchOp {
            kind: Kind::Watch,
            watch,
            path: path.clone(),
        }));
    }

    pub(super) fn stats(&self) -> Stats {
        self.stats
    }
}

fn is_within(path: &str, parent: &str) -> bool {
    path.strip_prefix(parent)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || parent == "/")
}

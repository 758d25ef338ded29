//! Watches, found by the path they are on.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;

use hypercall::DomId;

use super::ConnId;
use super::tree::{NodePath, parent_str};
use crate::wire::{self, XsError};

/// Watches are numbered in the order in which they were set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct WatchId(u64);

#[derive(Debug, Clone)]
pub(super) struct Watch {
    pub conn: ConnId,
    /// Absolute, or special.
    pub path: Arc<str>,
    /// How many bytes of the paths are left out in its events: those of the home directory, if the path was given relative
    /// to it.
    hidden: usize,
    pub token: Arc<[u8]>,
}

impl Watch {
    /// Reads the path of a WATCH or UNWATCH request.
    pub fn parse(conn: ConnId, domid: DomId, path: &[u8], token: &[u8]) -> Result<Self, XsError> {
        let token = Arc::from(token);
        if path.starts_with(b"@") {
            let text = str::from_utf8(path).ok().filter(|_| wire::valid_special_path(path));
            let path = Arc::from(text.ok_or(XsError::EINVAL)?);
            return Ok(Self { conn, path, hidden: 0, token });
        }
        let home = NodePath::home(domid).as_str().len() + 1;
        let hidden = if path.starts_with(b"/") { 0 } else { home };
        Ok(Self { conn, path: NodePath::parse(path, domid)?.shared(), hidden, token })
    }

    /// The form in which an event of this watch names a path.
    pub fn shown<'a>(&self, path: &'a str) -> &'a str {
        path.get(self.hidden..).unwrap_or(path)
    }

    /// Bytes of it that its owner chose.
    pub fn len(&self) -> usize {
        self.path.len() + self.token.len()
    }
}

#[derive(Debug, Default)]
pub(super) struct Watches {
    last: u64,
    by_id: BTreeMap<WatchId, Watch>,
    by_path: BTreeMap<Arc<str>, BTreeSet<WatchId>>,
}

impl Watches {
    pub fn count(&self) -> usize {
        self.by_id.len()
    }

    pub fn find(&self, watch: &Watch) -> Option<WatchId> {
        let same = |id: &&WatchId| {
            self.by_id
                .get(id)
                .is_some_and(|known| known.conn == watch.conn && known.token == watch.token)
        };
        self.by_path.get(&watch.path)?.iter().find(same).copied()
    }

    pub fn add(&mut self, watch: Watch) -> WatchId {
        self.last += 1;
        let id = WatchId(self.last);
        self.by_path.entry(watch.path.clone()).or_default().insert(id);
        self.by_id.insert(id, watch);
        id
    }

    pub fn remove(&mut self, id: WatchId) -> Option<Watch> {
        let watch = self.by_id.remove(&id)?;
        if let Some(ids) = self.by_path.get_mut(&watch.path) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_path.remove(&watch.path);
            }
        }
        Some(watch)
    }

    pub fn of_connection(&self, conn: ConnId) -> Vec<WatchId> {
        self.by_id.iter().filter(|(_, watch)| watch.conn == conn).map(|(id, _)| *id).collect()
    }

    /// The watches on a path and, unless `exact`, above it, in the order in which they were set.
    pub fn matching(&self, path: &str, exact: bool) -> Vec<(WatchId, Watch)> {
        let steps = if exact { 1 } else { usize::MAX };
        let mut ids: Vec<_> = core::iter::successors(Some(path), |path| parent_str(path))
            .take(steps)
            .filter_map(|path| self.by_path.get(path))
            .flatten()
            .copied()
            .collect();
        ids.sort_unstable();
        ids.into_iter().filter_map(|id| Some((id, self.by_id.get(&id)?.clone()))).collect()
    }
}

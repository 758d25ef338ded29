//! Nodes: paths, values, permissions, versions.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::borrow::Borrow;

use hypercall::DomId;

use crate::wire::{self, Access, Perm, XsError};

/// A well-formed absolute path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct NodePath(Arc<str>);

impl NodePath {
    pub fn root() -> Self {
        Self(Arc::from("/"))
    }

    /// `/local/domain/<id>`: what that domain's relative paths start from.
    pub fn home(domid: DomId) -> Self {
        Self(Arc::from(format!("/local/domain/{}", domid.0)))
    }

    /// Reads an absolute path, or one relative to the home of `domid`.
    pub fn parse(text: &[u8], domid: DomId) -> Result<Self, XsError> {
        let text = str::from_utf8(text).map_err(|_| XsError::EINVAL)?;
        let path = match text.as_bytes().first() {
            // Special paths are not of the tree.
            Some(b'@') | None => return Err(XsError::EINVAL),
            Some(b'/') => text.to_owned(),
            Some(_) => format!("{}/{text}", Self::home(domid).as_str()),
        };
        wire::valid_path(path.as_bytes()).then(|| Self(Arc::from(path))).ok_or(XsError::EINVAL)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn shared(&self) -> Arc<str> {
        self.0.clone()
    }

    pub fn is_root(&self) -> bool {
        self.as_str() == "/"
    }

    /// The parent; the root has none.
    pub fn parent(&self) -> Option<Self> {
        parent_str(self.as_str()).map(|parent| Self(Arc::from(parent)))
    }

    /// The last component; empty for the root.
    pub fn name(&self) -> &str {
        self.as_str().rsplit_once('/').map_or("", |(_, name)| name)
    }

    pub fn child(&self, name: &str) -> Self {
        let parent = if self.is_root() { "" } else { self.as_str() };
        Self(Arc::from(format!("{parent}/{name}")))
    }

    /// The paths between `ancestor` (left out) and this one (included), from the top.
    pub fn chain_from(&self, ancestor: &Self) -> Vec<Self> {
        let mut chain = Vec::new();
        let mut path = self.clone();
        while path != *ancestor {
            let parent = path.parent();
            chain.push(path);
            match parent {
                Some(parent) => path = parent,
                None => break,
            }
        }
        chain.reverse();
        chain
    }
}

impl Borrow<str> for NodePath {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

/// The parent of an absolute path; the root has none.
pub(super) fn parent_str(path: &str) -> Option<&str> {
    match path.rsplit_once('/') {
        Some((_, "")) | None => None,
        Some(("", _)) => Some("/"),
        Some((parent, _)) => Some(parent),
    }
}

/// When a node last changed. Every change has a number of its own, so equal versions are the same version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub u64);

/// A node. Its name is with its parent and its path with the map that holds it.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub value: Arc<[u8]>,
    /// Never empty: the first names the owner.
    pub perms: Arc<[Perm]>,
    children: Arc<BTreeSet<Arc<str>>>,
    names_len: usize,
    /// Of its existence, value and permissions.
    pub version: Version,
    /// Of the list of its children: apart, so that the comings and goings of siblings are no conflict.
    pub listing: Version,
}

impl Node {
    pub fn new(value: Arc<[u8]>, perms: Arc<[Perm]>, version: Version) -> Self {
        Self { value, perms, children: Arc::default(), names_len: 0, version, listing: version }
    }

    pub fn owner(&self) -> DomId {
        self.perms.first().map_or(DomId(0), |perm| perm.domid)
    }

    /// When anything of it changed last.
    pub fn newest(&self) -> Version {
        self.version.max(self.listing)
    }

    pub fn children(&self) -> impl Iterator<Item = &str> {
        self.children.iter().map(|name| &**name)
    }

    pub fn add_child(&mut self, name: &str, version: Version) {
        if Arc::make_mut(&mut self.children).insert(Arc::from(name)) {
            self.names_len += name.len() + 1;
            self.listing = version;
        }
    }

    pub fn remove_child(&mut self, name: &str, version: Version) {
        if Arc::make_mut(&mut self.children).remove(name) {
            self.names_len = self.names_len.saturating_sub(name.len() + 1);
            self.listing = version;
        }
    }

    /// Bytes of the children's names, each with its NUL.
    pub fn names_len(&self) -> usize {
        self.names_len
    }

    /// The reply to DIRECTORY.
    pub fn listing_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.names_len);
        for name in self.children() {
            out.extend_from_slice(name.as_bytes());
            out.push(0);
        }
        out
    }
}

/// The size that [`super::Quotas::entry_size`] limits: that of xenstored's record, `struct xs_tdb_record_hdr` and what
/// follows it.
pub(super) fn entry_size(value_len: usize, perms: usize, names_len: usize) -> usize {
    24 + 8 * perms + value_len + names_len
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caller {
    pub domid: DomId,
    pub privileged: bool,
    /// The domain it acts for, with that one's rights besides its own (SET_TARGET).
    pub target: Option<DomId>,
}

/// What a caller may do to a node, or what it needs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rights {
    pub read: bool,
    pub write: bool,
    pub own: bool,
}

impl Rights {
    pub const ALL: Self = Self { read: true, write: true, own: true };
    pub const READ: Self = Self { read: true, write: false, own: false };
    pub const WRITE: Self = Self { read: false, write: true, own: false };
    /// For changing permissions.
    pub const OWN: Self = Self { read: false, write: true, own: true };

    /// The rights that these permissions give the caller.
    pub fn of(caller: Caller, perms: &[Perm]) -> Self {
        let is_caller = |domid| domid == caller.domid || Some(domid) == caller.target;
        let Some((owner, listed)) = perms.split_first() else {
            return Self::from_access(Access::None);
        };
        if caller.privileged || is_caller(owner.domid) {
            return Self::ALL;
        }
        let entry = listed.iter().find(|perm| is_caller(perm.domid)).unwrap_or(owner);
        Self::from_access(entry.access)
    }

    fn from_access(access: Access) -> Self {
        Self { read: access.can_read(), write: access.can_write(), own: false }
    }

    pub fn covers(self, need: Self) -> bool {
        (self.read || !need.read) && (self.write || !need.write) && (self.own || !need.own)
    }

    pub fn overlaps(self, need: Self) -> bool {
        (self.read && need.read) || (self.write && need.write) || (self.own && need.own)
    }
}

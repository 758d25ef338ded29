//! A transaction: a view of the store as it was when the transaction started, with its own changes on top.
//!
//! Starting one copies nothing. Whoever changes the store hands the old version of a node to the open transactions that
//! can see it ([`Transaction::preserve`]); nodes are shared, so that costs a reference. What a transaction keeps is bounded
//! by what the store held at its start, and for unprivileged domains by their quota.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use hypercall::DomId;

use super::ConnId;
use super::quota::{Accounts, OVERHEAD, node_cost};
use super::tree::{Caller, Node, NodePath, Version};
use crate::wire::{Perm, TxId, XsError};

/// The nodes by path.
pub(super) type Nodes = BTreeMap<NodePath, Arc<Node>>;

/// A transaction's number is its connection's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TxKey {
    pub conn: ConnId,
    pub id: TxId,
}

/// What of a node was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Aspect {
    /// Whether it exists, its value, its permissions.
    Itself,
    /// The list of its children.
    Listing,
}

#[derive(Debug, Default)]
struct Seen {
    itself: bool,
    listing: bool,
}

#[derive(Debug)]
struct Changed {
    /// `None`: removed.
    node: Option<Arc<Node>>,
    /// Whether the node itself was changed, or only the list of its children.
    itself: bool,
    /// The event this change is worth at commit: its place in the order of events, and whether it is for watches on
    /// exactly this path.
    event: Option<(usize, bool)>,
}

fn changed_cost(path: &NodePath, node: Option<&Node>) -> usize {
    node.map_or(path.as_str().len() + OVERHEAD, |node| node_cost(path, node) + node.names_len())
}

#[derive(Debug)]
pub(super) struct Transaction {
    caller: Caller,
    start: Version,
    seen: BTreeMap<NodePath, Seen>,
    changed: BTreeMap<NodePath, Changed>,
    /// Versions that were current at the start and are no longer.
    before: BTreeMap<NodePath, Arc<Node>>,
    nodes_added: BTreeMap<DomId, i64>,
    events: usize,
    /// Bytes charged for `seen` and `changed`.
    memory: usize,
    /// Bytes charged for `before`.
    snapshot: usize,
    /// It went over a quota: never to be committed.
    failed: bool,
    /// Its view of the past had to be given up: it ends in a conflict.
    stale: bool,
}

impl Transaction {
    pub fn new(caller: Caller, start: Version) -> Self {
        Self {
            caller,
            start,
            seen: BTreeMap::new(),
            changed: BTreeMap::new(),
            before: BTreeMap::new(),
            nodes_added: BTreeMap::new(),
            events: 0,
            memory: 0,
            snapshot: 0,
            failed: false,
            stale: false,
        }
    }

    /// The node as this transaction sees it.
    pub fn peek<'a>(&'a self, nodes: &'a Nodes, path: &str) -> Option<&'a Arc<Node>> {
        match self.changed.get(path) {
            Some(changed) => changed.node.as_ref(),
            None => self.base(nodes, path),
        }
    }

    /// The node as it was at the start.
    fn base<'a>(&'a self, nodes: &'a Nodes, path: &str) -> Option<&'a Arc<Node>> {
        self.before
            .get(path)
            .or_else(|| nodes.get(path).filter(|node| self.stale || node.newest() <= self.start))
    }

    /// How many nodes more a domain would own after the commit.
    pub fn nodes_added(&self, domid: DomId) -> i64 {
        self.nodes_added.get(&domid).copied().unwrap_or(0)
    }

    /// Whether this many paths seen, or changed, are all that it may have.
    fn is_full(&self, accounts: &Accounts, paths: usize) -> bool {
        !self.caller.privileged && paths >= accounts.quotas.transaction_nodes
    }

    fn charge(&mut self, accounts: &mut Accounts, bytes: usize) -> Result<(), XsError> {
        if !accounts.has_memory(self.caller.domid, bytes) {
            self.failed = true;
            return Err(XsError::ENOSPC);
        }
        accounts.change(self.caller.domid, |usage| usage.memory += bytes);
        self.memory += bytes;
        Ok(())
    }

    fn refund(&mut self, accounts: &mut Accounts, bytes: usize) {
        accounts
            .change(self.caller.domid, |usage| usage.memory = usage.memory.saturating_sub(bytes));
        self.memory = self.memory.saturating_sub(bytes);
    }

    /// Remembers that the outcome depends on this path.
    pub fn note(
        &mut self,
        accounts: &mut Accounts,
        path: &NodePath,
        aspect: Aspect,
    ) -> Result<(), XsError> {
        if !self.seen.contains_key(path) {
            if self.is_full(accounts, self.seen.len()) {
                self.failed = true;
                return Err(XsError::ENOSPC);
            }
            self.charge(accounts, path.as_str().len() + OVERHEAD)?;
        }
        let seen = self.seen.entry(path.clone()).or_default();
        match aspect {
            Aspect::Itself => seen.itself = true,
            Aspect::Listing => seen.listing = true,
        }
        Ok(())
    }

    fn put(
        &mut self,
        accounts: &mut Accounts,
        path: &NodePath,
        node: Option<Arc<Node>>,
        itself: bool,
    ) -> Result<(), XsError> {
        let old = self.changed.get(path);
        if old.is_none() && self.is_full(accounts, self.changed.len()) {
            self.failed = true;
            return Err(XsError::ENOSPC);
        }
        let old_cost = old.map_or(0, |old| changed_cost(path, old.node.as_deref()));
        self.charge(accounts, changed_cost(path, node.as_deref()))?;
        self.refund(accounts, old_cost);
        let entry = self.changed.entry(path.clone()).or_insert(Changed {
            node: None,
            itself: false,
            event: None,
        });
        entry.node = node;
        entry.itself |= itself;
        Ok(())
    }

    fn count(&mut self, owner: DomId, more: i64) {
        *self.nodes_added.entry(owner).or_insert(0) += more;
    }

    /// Changes the children's list of the parent of `path`.
    fn put_parent(
        &mut self,
        nodes: &Nodes,
        accounts: &mut Accounts,
        path: &NodePath,
        change: impl FnOnce(&mut Node),
    ) -> Result<(), XsError> {
        let Some(parent) = path.parent() else { return Ok(()) };
        let Some(mut node) = self.peek(nodes, parent.as_str()).cloned() else { return Ok(()) };
        change(Arc::make_mut(&mut node));
        self.put(accounts, &parent, Some(node), false)
    }

    /// Creates or changes a node.
    pub fn set(
        &mut self,
        nodes: &Nodes,
        accounts: &mut Accounts,
        path: &NodePath,
        value: Arc<[u8]>,
        perms: Arc<[Perm]>,
        version: Version,
    ) -> Result<(), XsError> {
        if let Some(mut node) = self.peek(nodes, path.as_str()).cloned() {
            self.count(node.owner(), -1);
            let new = Arc::make_mut(&mut node);
            new.value = value;
            new.perms = perms;
            new.version = version;
            self.count(new.owner(), 1);
            return self.put(accounts, path, Some(node), true);
        }
        let node = Node::new(value, perms, version);
        self.count(node.owner(), 1);
        self.put(accounts, path, Some(Arc::new(node)), true)?;
        self.put_parent(nodes, accounts, path, |parent| parent.add_child(path.name(), version))
    }

    /// Removes a node; its children go before it.
    pub fn remove(
        &mut self,
        nodes: &Nodes,
        accounts: &mut Accounts,
        path: &NodePath,
        version: Version,
    ) -> Result<(), XsError> {
        let Some(owner) = self.peek(nodes, path.as_str()).map(|node| node.owner()) else {
            return Ok(());
        };
        self.count(owner, -1);
        self.put(accounts, path, None, true)?;
        self.put_parent(nodes, accounts, path, |parent| parent.remove_child(path.name(), version))
    }

    /// Asks for an event at commit. One for every watch above replaces one for watches on exactly this path.
    pub fn fire(&mut self, path: &NodePath, exact: bool) {
        if let Some(changed) = self.changed.get_mut(path) {
            match &mut changed.event {
                Some((_, was_exact)) => *was_exact &= exact,
                None => {
                    changed.event = Some((self.events, exact));
                    self.events += 1;
                }
            }
        }
    }

    /// The store is about to replace or remove this version of a node.
    pub fn preserve(&mut self, accounts: &mut Accounts, path: &NodePath, node: &Arc<Node>) {
        if self.stale || node.newest() > self.start {
            return;
        }
        let cost = node_cost(path, node) + node.names_len();
        if !accounts.has_snapshot_memory(self.caller.domid, cost) {
            self.forget_past(accounts);
            self.stale = true;
            return;
        }
        accounts.change(self.caller.domid, |usage| usage.snapshots += cost);
        self.snapshot += cost;
        self.before.insert(path.clone(), node.clone());
    }

    fn forget_past(&mut self, accounts: &mut Accounts) {
        self.before.clear();
        accounts.change(self.caller.domid, |usage| {
            usage.snapshots = usage.snapshots.saturating_sub(self.snapshot);
        });
        self.snapshot = 0;
    }

    /// Gives back what was charged. The last thing done with it.
    pub fn settle(&mut self, accounts: &mut Accounts) {
        self.forget_past(accounts);
        let memory = self.memory;
        self.refund(accounts, memory);
        accounts.change(self.caller.domid, |usage| {
            usage.transactions = usage.transactions.saturating_sub(1);
        });
    }

    /// Whether it may be committed now.
    pub fn check(&self, nodes: &Nodes, accounts: &Accounts) -> Result<(), XsError> {
        if self.failed {
            return Err(XsError::ENOMEM);
        }
        let unchanged = |(path, seen): (&NodePath, &Seen)| {
            let then = self.base(nodes, path.as_str());
            let now = nodes.get(path);
            (!seen.itself || then.map(|node| node.version) == now.map(|node| node.version))
                && (!seen.listing || then.map(|node| node.listing) == now.map(|node| node.listing))
        };
        if self.stale || !self.seen.iter().all(unchanged) {
            return Err(XsError::EAGAIN);
        }
        let added = self.nodes_added(self.caller.domid);
        let after = i64::from(accounts.usage(self.caller.domid).nodes).saturating_add(added);
        if !self.caller.privileged && added > 0 && after > i64::from(accounts.quotas.nodes) {
            return Err(XsError::ENOSPC);
        }
        Ok(())
    }

    /// The paths to tell watchers of, in the order in which they were first changed, and whether each is for exact watches.
    pub fn events(&self) -> Vec<(NodePath, bool)> {
        let mut events: Vec<_> = self
            .changed
            .iter()
            .filter_map(|(path, changed)| changed.event.map(|(order, exact)| (order, path, exact)))
            .collect();
        events.sort_unstable_by_key(|(order, ..)| *order);
        events.into_iter().map(|(_, path, exact)| (path.clone(), exact)).collect()
    }

    /// What changed, parents first; `None` for a removed node.
    pub fn into_changes(self) -> impl DoubleEndedIterator<Item = (NodePath, Option<Arc<Node>>)> {
        self.changed
            .into_iter()
            .filter(|(_, changed)| changed.itself)
            .map(|(path, changed)| (path, changed.node))
    }
}

//! What a domain may take of the store, and what it has taken.

use alloc::collections::{BTreeMap, BTreeSet};

use hypercall::DomId;

use super::tree::{Node, NodePath};

/// What each unprivileged domain may have at once. Privileged domains have no limits, as in xenstored.
///
/// Together they bound what a domain can make the server hold: `memory` twice (once for what it owns, once for the old
/// versions its transactions keep), `event_bytes`, one event per watch beyond that, and `outstanding` replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quotas {
    /// Nodes owned. Reached: ENOSPC.
    pub nodes: u32,
    /// Watches. Reached: E2BIG.
    pub watches: u32,
    /// Transactions open at once. Reached: ENOSPC.
    pub transactions: u32,
    /// Paths one transaction may read, and paths it may change. Exceeded: ENOSPC, and the transaction cannot be committed.
    pub transaction_nodes: usize,
    /// Bytes of one node: 24, 8 for each permission, its value, and its children's names with a NUL each. Reached: ENOSPC.
    pub entry_size: usize,
    /// Permissions of one node. Exceeded: ENOSPC.
    pub perms: usize,
    /// Replies that wait to be read. Reached: no further request of that connection is looked at. Applies to all.
    pub outstanding: usize,
    /// Bytes of nodes owned, watches, and what transactions read and changed. Exceeded: ENOSPC (ENOMEM for a watch).
    pub memory: usize,
    /// Bytes of watch events that wait to be read on one connection. Beyond it, the events of a watch are merged into a
    /// single one that names the watch's own path. Applies to all.
    pub event_bytes: usize,
}

impl Default for Quotas {
    /// The counts are xenstored's; the bytes suit a server that runs in a few tens of MiB.
    fn default() -> Self {
        Self {
            nodes: 1000,
            watches: 128,
            transactions: 10,
            transaction_nodes: 1024,
            entry_size: 2048,
            perms: 5,
            outstanding: 20,
            memory: 1 << 20,
            event_bytes: 1 << 16,
        }
    }
}

/// Bookkeeping of one node, watch, or path that a transaction has read, beyond the bytes its user chose.
pub(super) const OVERHEAD: usize = 128;

/// Bytes charged to the owner of a node. Its children's names are charged with the children.
pub(super) fn node_cost(path: &NodePath, node: &Node) -> usize {
    path.as_str().len() + node.value.len() + 4 * node.perms.len() + OVERHEAD
}

/// What a domain has at the moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Nodes it owns.
    pub nodes: u32,
    /// Its watches.
    pub watches: u32,
    /// Its open transactions.
    pub transactions: u32,
    /// Bytes charged to it.
    pub memory: usize,
    /// Bytes of old versions that its transactions keep.
    pub snapshots: usize,
}

/// The usage of every domain that has any.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    pub quotas: Quotas,
    usage: BTreeMap<DomId, Usage>,
    privileged: BTreeSet<DomId>,
}

impl Accounts {
    pub fn new(quotas: Quotas) -> Self {
        Self { quotas, ..Self::default() }
    }

    pub fn set_privileged(&mut self, domid: DomId) {
        self.privileged.insert(domid);
    }

    pub fn usage(&self, domid: DomId) -> Usage {
        self.usage.get(&domid).copied().unwrap_or_default()
    }

    pub fn iter(&self) -> impl Iterator<Item = (DomId, Usage)> + '_ {
        self.usage.iter().map(|(domid, usage)| (*domid, *usage))
    }

    /// Applies a change, and forgets a domain that has nothing left.
    pub fn change(&mut self, domid: DomId, change: impl FnOnce(&mut Usage)) {
        let usage = self.usage.entry(domid).or_default();
        change(usage);
        if *usage == Usage::default() {
            self.usage.remove(&domid);
        }
    }

    pub fn add_node(&mut self, path: &NodePath, node: &Node) {
        self.change(node.owner(), |usage| {
            usage.nodes += 1;
            usage.memory += node_cost(path, node);
        });
    }

    pub fn drop_node(&mut self, path: &NodePath, node: &Node) {
        self.change(node.owner(), |usage| {
            usage.nodes = usage.nodes.saturating_sub(1);
            usage.memory = usage.memory.saturating_sub(node_cost(path, node));
        });
    }

    /// Whether the domain may hold `more` bytes on top of what it has.
    pub fn has_memory(&self, domid: DomId, more: usize) -> bool {
        self.privileged.contains(&domid)
            || self.usage(domid).memory.saturating_add(more) <= self.quotas.memory
    }

    /// Whether the domain's transactions may keep `more` bytes of old versions.
    pub fn has_snapshot_memory(&self, domid: DomId, more: usize) -> bool {
        self.privileged.contains(&domid)
            || self.usage(domid).snapshots.saturating_add(more) <= self.quotas.memory
    }
}

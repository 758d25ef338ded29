//! The tree of nodes, and the operations on it, inside and outside of transactions.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use hypercall::DomId;

use super::ConnId;
use super::quota::{Accounts, Quotas, node_cost};
use super::transaction::{Aspect, Nodes, Transaction, TxKey};
use super::tree::{Caller, Node, NodePath, Rights, Version, entry_size, parent_str};
use crate::wire::{Access, Perm, TxId, XsError};

/// A change to tell watchers of.
#[derive(Debug)]
pub(super) struct Change {
    pub path: NodePath,
    /// For watches on exactly this path; otherwise also for those above it.
    pub exact: bool,
    existed: bool,
    readers: Vec<Arc<[Perm]>>,
}

impl Change {
    fn before(nodes: &Nodes, path: NodePath, exact: bool) -> Self {
        let existed = nodes.contains_key(&path);
        let mut change = Self { path, exact, existed, readers: Vec::new() };
        change.add_readers(nodes);
        change
    }

    /// `None` if there is nothing to tell: the node was not there and is not.
    fn after(mut self, nodes: &Nodes) -> Option<Self> {
        let happened = self.existed || nodes.contains_key(&self.path);
        self.add_readers(nodes);
        happened.then_some(self)
    }

    /// Whoever may read the node, or may list it in its parent, may learn that it changed; so may one who could until now.
    fn add_readers(&mut self, nodes: &Nodes) {
        let node = nodes.get(&self.path);
        let parent = parent_str(self.path.as_str()).and_then(|parent| nodes.get(parent));
        for perms in [node, parent].into_iter().flatten().map(|node| &node.perms) {
            if !self.readers.iter().any(|known| Arc::ptr_eq(known, perms)) {
                self.readers.push(perms.clone());
            }
        }
    }

    pub fn is_visible_to(&self, caller: Caller) -> bool {
        self.readers.iter().any(|perms| Rights::of(caller, perms).read)
    }
}

#[derive(Debug)]
pub(super) struct Store {
    nodes: Nodes,
    version: Version,
    transactions: BTreeMap<TxKey, Transaction>,
    pub accounts: Accounts,
}

impl Store {
    /// A store with nothing but a root that only privileged domains can use.
    pub fn new(quotas: Quotas) -> Self {
        let perms = [Perm::new(Access::None, DomId(0))];
        let root = Node::new(Arc::default(), Arc::from(perms), Version(0));
        let mut accounts = Accounts::new(quotas);
        accounts.add_node(&NodePath::root(), &root);
        Self {
            nodes: Nodes::from([(NodePath::root(), Arc::new(root))]),
            version: Version(0),
            transactions: BTreeMap::new(),
            accounts,
        }
    }

    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    pub fn transaction_count(&self) -> usize {
        self.transactions.len()
    }

    fn next_version(&mut self) -> Version {
        self.version.0 += 1;
        self.version
    }

    pub fn start(&mut self, key: TxKey, caller: Caller) -> Result<(), XsError> {
        let open = self.accounts.usage(caller.domid).transactions;
        if !caller.privileged && open >= self.accounts.quotas.transactions {
            return Err(XsError::ENOSPC);
        }
        self.accounts.change(caller.domid, |usage| usage.transactions += 1);
        self.transactions.insert(key, Transaction::new(caller, self.version));
        Ok(())
    }

    pub fn has_transaction(&self, key: TxKey) -> bool {
        self.transactions.contains_key(&key)
    }

    /// Discards a transaction.
    pub fn discard(&mut self, key: TxKey) {
        if let Some(mut transaction) = self.transactions.remove(&key) {
            transaction.settle(&mut self.accounts);
        }
    }

    pub fn discard_all(&mut self, conn: ConnId) {
        let range = TxKey { conn, id: TxId(0) }..=TxKey { conn, id: TxId(u32::MAX) };
        while let Some((key, _)) = self.transactions.range(range.clone()).next() {
            let key = *key;
            self.discard(key);
        }
    }

    /// Ends a transaction and makes its changes those of the store, or says why not.
    pub fn commit(&mut self, key: TxKey) -> Result<Vec<Change>, XsError> {
        let mut transaction = self.transactions.remove(&key).ok_or(XsError::ENOENT)?;
        let verdict = transaction.check(&self.nodes, &self.accounts);
        transaction.settle(&mut self.accounts);
        verdict?;
        let changes: Vec<_> = transaction
            .events()
            .into_iter()
            .map(|(path, exact)| Change::before(&self.nodes, path, exact))
            .collect();
        let (removed, set): (Vec<_>, Vec<_>) =
            transaction.into_changes().partition(|(_, node)| node.is_none());
        for (path, _) in removed.iter().rev() {
            self.remove(path);
        }
        for (path, node) in set {
            if let Some(node) = node {
                self.set(&path, node.value.clone(), node.perms.clone());
            }
        }
        Ok(changes.into_iter().filter_map(|change| change.after(&self.nodes)).collect())
    }

    /// Changes a node that exists, after its old version went to the transactions that see it.
    fn modify(&mut self, path: &str, change: impl FnOnce(&mut Node, Version)) {
        let version = self.next_version();
        let Self { nodes, transactions, accounts, .. } = self;
        let Some((path, _)) = nodes.get_key_value(path) else { return };
        let path = path.clone();
        let Some(slot) = nodes.get_mut(&path) else { return };
        for transaction in transactions.values_mut() {
            transaction.preserve(accounts, &path, slot);
        }
        accounts.drop_node(&path, slot);
        let node = Arc::make_mut(slot);
        change(node, version);
        accounts.add_node(&path, node);
    }

    /// Creates or changes a node. Its parent exists.
    fn set(&mut self, path: &NodePath, value: Arc<[u8]>, perms: Arc<[Perm]>) {
        if self.nodes.contains_key(path) {
            self.modify(path.as_str(), |node, version| {
                node.value = value;
                node.perms = perms;
                node.version = version;
            });
            return;
        }
        let node = Node::new(value, perms, self.next_version());
        self.accounts.add_node(path, &node);
        self.nodes.insert(path.clone(), Arc::new(node));
        if let Some(parent) = parent_str(path.as_str()) {
            self.modify(parent, |parent, version| parent.add_child(path.name(), version));
        }
    }

    /// Removes a node. Its children went before it.
    fn remove(&mut self, path: &NodePath) {
        let Some(node) = self.nodes.remove(path) else { return };
        for transaction in self.transactions.values_mut() {
            transaction.preserve(&mut self.accounts, path, &node);
        }
        self.accounts.drop_node(path, &node);
        if let Some(parent) = parent_str(path.as_str()) {
            self.modify(parent, |parent, version| parent.remove_child(path.name(), version));
        }
    }

    /// Removes what a domain owns, with all below it, and takes the domain out of the permissions of what remains, so
    /// that a later domain of the same number does not inherit them.
    pub fn forget_domain(&mut self, domid: DomId) -> Vec<Change> {
        let mut changes = Vec::new();
        let touched: Vec<_> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.perms.iter().any(|perm| perm.domid == domid))
            .map(|(path, _)| path.clone())
            .collect();
        let caller = Caller { domid: DomId(0), privileged: true, target: None };
        for path in touched {
            let Some(node) = self.nodes.get(&path).cloned() else { continue };
            if node.owner() == domid && !path.is_root() {
                let mut space = Space::new(self, None, caller);
                // Outside of a transaction and without quotas, nothing can refuse.
                let _ = space.remove_tree(&path);
                changes.append(&mut space.changes);
                continue;
            }
            self.set(&path, node.value.clone(), without_domain(&node.perms, domid));
        }
        changes
    }
}

/// Permissions without a domain that is gone; what it owned is then domain 0's.
pub(super) fn without_domain(perms: &[Perm], domid: DomId) -> Arc<[Perm]> {
    let Some((owner, listed)) = perms.split_first() else { return Arc::from(perms) };
    let owner = if owner.domid == domid { Perm::new(owner.access, DomId(0)) } else { *owner };
    core::iter::once(owner)
        .chain(listed.iter().copied().filter(|perm| perm.domid != domid))
        .collect()
}

/// What a path leads to.
enum Found {
    Node(Arc<Node>),
    /// Nothing, but the caller has the right in question at the nearest node above.
    Missing {
        nearest: NodePath,
        above: Arc<Node>,
    },
}

/// The store as one request sees it: directly, or through a transaction.
pub(super) struct Space<'a> {
    store: &'a mut Store,
    transaction: Option<TxKey>,
    caller: Caller,
    /// What to tell watchers of; nothing inside a transaction.
    pub changes: Vec<Change>,
}

impl<'a> Space<'a> {
    pub fn new(store: &'a mut Store, transaction: Option<TxKey>, caller: Caller) -> Self {
        Self { store, transaction, caller, changes: Vec::new() }
    }

    fn transaction(&self) -> Option<&Transaction> {
        self.transaction.and_then(|key| self.store.transactions.get(&key))
    }

    fn peek(&self, path: &str) -> Option<&Arc<Node>> {
        match self.transaction() {
            Some(transaction) => transaction.peek(&self.store.nodes, path),
            None => self.store.nodes.get(path),
        }
    }

    fn note(&mut self, path: &NodePath, aspect: Aspect) -> Result<(), XsError> {
        let Store { transactions, accounts, .. } = &mut *self.store;
        match self.transaction.and_then(|key| transactions.get_mut(&key)) {
            Some(transaction) => transaction.note(accounts, path, aspect),
            None => Ok(()),
        }
    }

    fn set(
        &mut self,
        path: &NodePath,
        value: Arc<[u8]>,
        perms: Arc<[Perm]>,
    ) -> Result<(), XsError> {
        let version = self.store.next_version();
        let Store { nodes, transactions, accounts, .. } = &mut *self.store;
        match self.transaction.and_then(|key| transactions.get_mut(&key)) {
            Some(transaction) => transaction.set(nodes, accounts, path, value, perms, version),
            None => {
                self.store.set(path, value, perms);
                Ok(())
            }
        }
    }

    fn remove(&mut self, path: &NodePath) -> Result<(), XsError> {
        let version = self.store.next_version();
        let Store { nodes, transactions, accounts, .. } = &mut *self.store;
        match self.transaction.and_then(|key| transactions.get_mut(&key)) {
            Some(transaction) => transaction.remove(nodes, accounts, path, version),
            None => {
                self.store.remove(path);
                Ok(())
            }
        }
    }

    /// Does something that changes these paths, and records who is to hear of it.
    fn announce(
        &mut self,
        paths: Vec<(NodePath, bool)>,
        act: impl FnOnce(&mut Self) -> Result<(), XsError>,
    ) -> Result<(), XsError> {
        if let Some(key) = self.transaction {
            act(self)?;
            if let Some(transaction) = self.store.transactions.get_mut(&key) {
                for (path, exact) in paths {
                    transaction.fire(&path, exact);
                }
            }
            return Ok(());
        }
        let nodes = &self.store.nodes;
        let changes: Vec<_> =
            paths.into_iter().map(|(path, exact)| Change::before(nodes, path, exact)).collect();
        act(self)?;
        let nodes = &self.store.nodes;
        self.changes.extend(changes.into_iter().filter_map(|change| change.after(nodes)));
        Ok(())
    }

    /// Finds a node to which the caller has the rights it needs.
    ///
    /// That a node does not exist is told only to one who has one of these rights at the nearest node above: for the others
    /// a missing node is EACCES, like one they may not touch.
    fn find(&mut self, path: &NodePath, need: Rights) -> Result<Found, XsError> {
        if let Some(node) = self.peek(path.as_str()).cloned() {
            self.note(path, Aspect::Itself)?;
            let covered = Rights::of(self.caller, &node.perms).covers(need);
            return if covered { Ok(Found::Node(node)) } else { Err(XsError::EACCES) };
        }
        // The answer depends on the nearest node above and on the absence of what would be next below it.
        let mut missing = path.clone();
        let (nearest, above) = loop {
            let parent = missing.parent().ok_or(XsError::EIO)?;
            match self.peek(parent.as_str()).cloned() {
                Some(above) => break (parent, above),
                None => missing = parent,
            }
        };
        self.note(&missing, Aspect::Itself)?;
        self.note(&nearest, Aspect::Itself)?;
        if Rights::of(self.caller, &above.perms).overlaps(need) {
            Ok(Found::Missing { nearest, above })
        } else {
            Err(XsError::EACCES)
        }
    }

    /// A node to read.
    pub fn read(&mut self, path: &NodePath) -> Result<Arc<Node>, XsError> {
        match self.find(path, Rights::READ)? {
            Found::Node(node) => Ok(node),
            Found::Missing { .. } => Err(XsError::ENOENT),
        }
    }

    /// A node whose list of children is to be read.
    pub fn list(&mut self, path: &NodePath) -> Result<Arc<Node>, XsError> {
        let node = self.read(path)?;
        self.note(path, Aspect::Listing)?;
        Ok(node)
    }

    pub fn write(&mut self, path: &NodePath, value: &[u8]) -> Result<(), XsError> {
        match self.find(path, Rights::WRITE)? {
            Found::Node(node) => self.replace(path, &node, Arc::from(value), node.perms.clone()),
            Found::Missing { nearest, above } => self.create(path, &nearest, &above, value),
        }
    }

    pub fn mkdir(&mut self, path: &NodePath) -> Result<(), XsError> {
        match self.find(path, Rights::WRITE)? {
            Found::Node(_) => Ok(()),
            Found::Missing { nearest, above } => self.create(path, &nearest, &above, &[]),
        }
    }

    pub fn set_perms(&mut self, path: &NodePath, perms: Vec<Perm>) -> Result<(), XsError> {
        let Found::Node(node) = self.find(path, Rights::OWN)? else { return Err(XsError::ENOENT) };
        let new_owner = perms.first().map(|perm| perm.domid);
        if !self.caller.privileged && new_owner != Some(node.owner()) {
            return Err(XsError::EPERM);
        }
        self.replace(path, &node, node.value.clone(), Arc::from(perms))
    }

    pub fn rm(&mut self, path: &NodePath) -> Result<(), XsError> {
        match self.find(path, Rights::WRITE)? {
            Found::Node(_) if path.is_root() => Err(XsError::EINVAL),
            Found::Node(_) => self.remove_tree(path),
            Found::Missing { ref nearest, .. } if path.parent().as_ref() == Some(nearest) => Ok(()),
            Found::Missing { .. } => Err(XsError::ENOENT),
        }
    }

    /// Changes an existing node.
    fn replace(
        &mut self,
        path: &NodePath,
        old: &Node,
        value: Arc<[u8]>,
        perms: Arc<[Perm]>,
    ) -> Result<(), XsError> {
        self.check_entry(value.len(), perms.len(), old.names_len())?;
        let new = Node::new(value.clone(), perms.clone(), old.version);
        let growth = node_cost(path, &new).saturating_sub(node_cost(path, old));
        self.check_memory(old.owner(), growth)?;
        self.announce(alloc::vec![(path.clone(), false)], |space| space.set(path, value, perms))
    }

    /// Creates a node, and those missing above it. They inherit the permissions of the nearest one that exists, but an
    /// unprivileged domain owns what it creates.
    fn create(
        &mut self,
        path: &NodePath,
        nearest: &NodePath,
        above: &Node,
        value: &[u8],
    ) -> Result<(), XsError> {
        let mut perms = above.perms.to_vec();
        if let Some(owner) = perms.first_mut().filter(|_| !self.caller.privileged) {
            owner.domid = self.caller.domid;
        }
        let perms: Arc<[Perm]> = Arc::from(perms);
        let chain = path.chain_from(nearest);
        self.check_creation(&chain, above, &perms, value)?;
        self.announce(alloc::vec![(path.clone(), false)], |space| {
            for step in &chain {
                let value = if step == path { Arc::from(value) } else { Arc::default() };
                space.set(step, value, perms.clone())?;
            }
            Ok(())
        })
    }

    /// The quotas that creating these nodes would go over.
    fn check_creation(
        &self,
        chain: &[NodePath],
        above: &Node,
        perms: &Arc<[Perm]>,
        value: &[u8],
    ) -> Result<(), XsError> {
        let name_len = |step: Option<&NodePath>| step.map_or(0, |step| step.name().len() + 1);
        let listed = above.names_len() + name_len(chain.first());
        self.check_entry(above.value.len(), above.perms.len(), listed)?;
        let mut memory = 0;
        for (index, step) in chain.iter().enumerate() {
            let below = chain.get(index + 1);
            let value = if below.is_some() { &[] } else { value };
            self.check_entry(value.len(), perms.len(), name_len(below))?;
            let node = Node::new(Arc::from(value), perms.clone(), Version::default());
            memory += node_cost(step, &node);
        }
        if self.caller.privileged {
            return Ok(());
        }
        let domid = self.caller.domid;
        let added = self.transaction().map_or(0, |transaction| transaction.nodes_added(domid));
        let more = i64::try_from(chain.len()).unwrap_or(i64::MAX);
        let after = i64::from(self.store.accounts.usage(domid).nodes)
            .saturating_add(added)
            .saturating_add(more);
        if after > i64::from(self.store.accounts.quotas.nodes) {
            return Err(XsError::ENOSPC);
        }
        self.check_memory(domid, memory)
    }

    fn check_entry(&self, value: usize, perms: usize, names: usize) -> Result<(), XsError> {
        let full = entry_size(value, perms, names) >= self.store.accounts.quotas.entry_size;
        if full && !self.caller.privileged { Err(XsError::ENOSPC) } else { Ok(()) }
    }

    /// Whether an unprivileged caller may make a domain own `more` bytes. A transaction's are charged as they come.
    fn check_memory(&self, owner: DomId, more: usize) -> Result<(), XsError> {
        let free = self.caller.privileged
            || self.transaction.is_some()
            || self.store.accounts.has_memory(owner, more);
        if free { Ok(()) } else { Err(XsError::ENOSPC) }
    }

    /// Removes a node and all below it, from the bottom. Watches on the nodes below hear of their own; those above and on
    /// the node itself hear of the node.
    fn remove_tree(&mut self, path: &NodePath) -> Result<(), XsError> {
        let mut doomed = alloc::vec![path.clone()];
        let mut next = 0;
        while let Some(parent) = doomed.get(next).cloned() {
            next += 1;
            self.note(&parent, Aspect::Itself)?;
            self.note(&parent, Aspect::Listing)?;
            if let Some(node) = self.peek(parent.as_str()) {
                doomed.extend(node.children().map(|name| parent.child(name)));
            }
        }
        doomed.sort_unstable();
        doomed.reverse();
        let paths = doomed.iter().map(|below| (below.clone(), below != path)).collect();
        self.announce(paths, |space| doomed.iter().try_for_each(|path| space.remove(path)))
    }
}

//! A store that is obviously right: one map, copied whole for every transaction, scanned whole for every list.

use std::collections::{BTreeMap, BTreeSet};

use xenbus::wire::Kind;

use super::Out;

/// `('r', 5)` is `r5`.
pub type Perms = Vec<(char, u16)>;
type Error = &'static str;
/// Paths that changed, and whether only watches on exactly that path are to hear of it.
type Events = Vec<(String, bool)>;

#[derive(Debug, Clone, PartialEq)]
struct Node {
    value: Vec<u8>,
    perms: Perms,
    /// Renewed when the node is created or its value or permissions are set.
    stamp: u64,
    /// Renewed when a child comes or goes.
    listing: u64,
}

type Nodes = BTreeMap<String, Node>;

#[derive(Debug, Clone)]
struct Transaction {
    start: Nodes,
    copy: Nodes,
    /// Paths whose node (false) or list of children (true) mattered.
    seen: BTreeSet<(String, bool)>,
    events: Events,
}

#[derive(Debug, Default)]
struct Client {
    introduced: bool,
    watches: Vec<(u64, String, bool, String)>,
    transactions: BTreeMap<u32, Transaction>,
    last_transaction: u32,
    /// What it has not read; an event has its watch's number and its absolute path.
    queue: Vec<(Option<(u64, String)>, Out)>,
}

#[derive(Debug)]
pub struct Reference {
    nodes: Nodes,
    clients: BTreeMap<u16, Client>,
    special: BTreeMap<String, Perms>,
    stamp: u64,
    watch: u64,
    node_quota: usize,
}

fn parent(path: &str) -> Option<String> {
    if path == "/" {
        return None;
    }
    let cut = path.rfind('/').unwrap();
    Some(if cut == 0 { "/".into() } else { path[..cut].into() })
}

fn is_below(path: &str, top: &str) -> bool {
    top == "/" || path == top || path.starts_with(&format!("{top}/"))
}

fn rights(client: u16, perms: &Perms) -> &'static str {
    if client == 0 || perms[0].1 == client {
        return "rwo";
    }
    let entry = perms[1..].iter().find(|perm| perm.1 == client).unwrap_or(&perms[0]);
    match entry.0 {
        'r' => "r",
        'w' => "w",
        'b' => "rw",
        _ => "",
    }
}

fn children(nodes: &Nodes, path: &str) -> Vec<String> {
    let is_child = |other: &&String| parent(other).as_deref() == Some(path);
    nodes.keys().filter(is_child).map(|path| path[path.rfind('/').unwrap() + 1..].into()).collect()
}

fn owned(nodes: &Nodes, domain: u16) -> i64 {
    nodes.values().filter(|node| node.perms[0].1 == domain).count() as i64
}

pub fn show(perms: &Perms) -> Vec<u8> {
    perms.iter().map(|(letter, domain)| format!("{letter}{domain}\0")).collect::<String>().into()
}

/// Those who may learn of a change of `path`, as far as `nodes` can tell.
fn readers(nodes: &Nodes, path: &str) -> Vec<Perms> {
    let paths = [Some(path.to_owned()), parent(path)];
    paths
        .iter()
        .flatten()
        .filter_map(|path| nodes.get(path))
        .map(|node| node.perms.clone())
        .collect()
}

impl Reference {
    pub fn new(node_quota: usize) -> Self {
        let perms = vec![('n', 0)];
        let root = Node { value: vec![], perms: perms.clone(), stamp: 0, listing: 0 };
        let special =
            ["@introduceDomain", "@releaseDomain"].map(|path| (path.into(), perms.clone()));
        Self {
            nodes: BTreeMap::from([("/".into(), root)]),
            clients: BTreeMap::from([(0, Client::default())]),
            special: BTreeMap::from(special),
            stamp: 0,
            watch: 0,
            node_quota,
        }
    }

    pub fn introduce(&mut self, domain: u16) {
        self.clients.insert(domain, Client { introduced: true, ..Client::default() });
        self.fire_special("@introduceDomain");
    }

    pub fn gone(&mut self, domain: u16) {
        self.clients.remove(&domain);
        let strip = |perms: &mut Perms| {
            if perms[0].1 == domain {
                perms[0].1 = 0;
            }
            perms.retain(|perm| perm.1 != domain);
        };
        self.special.values_mut().for_each(strip);
        for path in self.nodes.keys().cloned().collect::<Vec<_>>() {
            let Some(node) = self.nodes.get_mut(&path) else { continue };
            if node.perms[0].1 == domain && path != "/" {
                let (before, mut after) = (self.nodes.clone(), self.nodes.clone());
                let events = self.remove_tree(&mut after, &path, &mut BTreeSet::new());
                self.nodes = after;
                self.fire(&before, events);
            } else if node.perms.iter().any(|perm| perm.1 == domain) {
                strip(&mut node.perms);
                self.stamp += 1;
                node.stamp = self.stamp;
            }
        }
        self.fire_special("@releaseDomain");
    }

    pub fn transactions(&self, client: u16) -> Vec<u32> {
        self.clients
            .get(&client)
            .map(|c| c.transactions.keys().copied().collect())
            .unwrap_or_default()
    }

    pub fn watches(&self, client: u16) -> usize {
        self.clients.get(&client).map_or(0, |client| client.watches.len())
    }

    pub fn owned(&self, domain: u16) -> usize {
        owned(&self.nodes, domain) as usize
    }

    pub fn drain(&mut self, client: u16, count: usize) -> Vec<Out> {
        let queue = &mut self.clients.get_mut(&client).unwrap().queue;
        queue.drain(..count.min(queue.len())).map(|(_, out)| out).collect()
    }

    /// What a node's version stands for, as its reader sees it.
    pub fn version(&self, client: u16, tx: u32, path: &str) -> Option<(u64, u64)> {
        let copy = self.clients[&client].transactions.get(&tx).map(|tx| &tx.copy);
        let node = copy.unwrap_or(&self.nodes).get(&absolute(client, path)?)?;
        Some((node.stamp, node.listing))
    }

    pub fn request(&mut self, client: u16, req: u32, kind: Kind, tx: u32, args: &[Vec<u8>]) {
        let result = self.answer(client, kind, tx, args);
        let (kind_out, payload) = match result {
            Ok(payload) => (kind, payload),
            Err(error) => (Kind::Error, format!("{error}\0").into_bytes()),
        };
        let out = Out { kind: kind_out, req, tx, payload };
        let state = self.clients.get_mut(&client).unwrap();
        state.queue.push((None, out));
        if kind_out == Kind::Watch {
            let (id, path, ..) = state.watches.last().unwrap().clone();
            self.event(client, id, &path);
        }
    }

    fn answer(
        &mut self,
        client: u16,
        kind: Kind,
        tx: u32,
        args: &[Vec<u8>],
    ) -> Result<Vec<u8>, Error> {
        let text = |index: usize| String::from_utf8(args[index].clone()).unwrap();
        let ok = Ok(b"OK\0".to_vec());
        let state = self.clients.get_mut(&client).unwrap();
        if tx != 0
            && !state.transactions.contains_key(&tx)
            && !matches!(kind, Kind::Watch | Kind::Unwatch)
        {
            return Err("ENOENT");
        }
        match kind {
            Kind::Watch | Kind::Unwatch => {
                let (path, token) = (text(0), text(1));
                let full = if path.starts_with('@') {
                    path.clone()
                } else {
                    absolute(client, &path).ok_or("EINVAL")?
                };
                let same = |w: &(u64, String, bool, String)| w.1 == full && w.3 == token;
                let found = state.watches.iter().position(same);
                match (kind, found) {
                    (Kind::Watch, Some(_)) => return Err("EEXIST"),
                    (Kind::Watch, None) => {
                        self.watch += 1;
                        let relative = !path.starts_with(['/', '@']);
                        state.watches.push((self.watch, full, relative, token));
                    }
                    (_, None) => return Err("ENOENT"),
                    (_, Some(index)) => {
                        let id = state.watches.remove(index).0;
                        state
                            .queue
                            .retain(|(event, _)| event.as_ref().is_none_or(|event| event.0 != id));
                    }
                }
                return ok;
            }
            Kind::ResetWatches => {
                state.watches.clear();
                state.transactions.clear();
                state.queue.retain(|(event, _)| event.is_none());
                return ok;
            }
            Kind::TransactionStart => {
                if tx != 0 {
                    return Err("EBUSY");
                }
                state.last_transaction += 1;
                let (start, copy) = (self.nodes.clone(), self.nodes.clone());
                let new = Transaction { start, copy, seen: BTreeSet::new(), events: vec![] };
                state.transactions.insert(state.last_transaction, new);
                return Ok(format!("{}\0", state.last_transaction).into());
            }
            Kind::TransactionEnd => {
                let transaction = state.transactions.remove(&tx).ok_or("ENOENT")?;
                if text(0) == "T" {
                    self.commit(client, transaction)?;
                }
                return ok;
            }
            Kind::SetPerms if text(0).starts_with('@') => {
                let perms = parse(&args[1..]);
                let special = self.special.get_mut(&text(0)).ok_or("EINVAL")?;
                if !rights(client, special).contains('o') {
                    return Err("EACCES");
                }
                if client != 0 && perms[0].1 != special[0].1 {
                    return Err("EPERM");
                }
                *special = perms;
                return ok;
            }
            _ => {}
        }
        // Operations on nodes: on the transaction's copy, or on the store.
        let path = absolute(client, &text(0)).ok_or("EINVAL")?;
        match state.transactions.remove(&tx) {
            Some(mut transaction) => {
                let pending = owned(&transaction.copy, client) - owned(&transaction.start, client);
                let mine = owned(&self.nodes, client) + pending;
                let mut copy = transaction.copy.clone();
                let result =
                    self.act(&mut copy, &mut transaction.seen, client, mine, kind, &path, args);
                transaction.copy = copy;
                for (path, exact) in
                    result.as_ref().map(|(_, events)| events.clone()).unwrap_or_default()
                {
                    match transaction.events.iter_mut().find(|event| event.0 == path) {
                        Some(event) => event.1 &= exact,
                        None => transaction.events.push((path, exact)),
                    }
                }
                self.clients.get_mut(&client).unwrap().transactions.insert(tx, transaction);
                Ok(result?.0)
            }
            None => {
                let (before, mut after) = (self.nodes.clone(), self.nodes.clone());
                let mine = owned(&before, client);
                let (reply, events) =
                    self.act(&mut after, &mut BTreeSet::new(), client, mine, kind, &path, args)?;
                self.nodes = after;
                self.fire(&before, events);
                Ok(reply)
            }
        }
    }

    fn commit(&mut self, client: u16, transaction: Transaction) -> Result<(), Error> {
        let Transaction { start, copy, seen, events } = transaction;
        for (path, listing) in seen {
            let stamp = |nodes: &Nodes| {
                nodes.get(&path).map(|node| if listing { node.listing } else { node.stamp })
            };
            if stamp(&start) != stamp(&self.nodes) {
                return Err("EAGAIN");
            }
        }
        let added = owned(&copy, client) - owned(&start, client);
        if client != 0 && added > 0 && owned(&self.nodes, client) + added > self.node_quota as i64 {
            return Err("ENOSPC");
        }
        let before = self.nodes.clone();
        for path in start.keys().chain(copy.keys()).collect::<BTreeSet<_>>() {
            let stamp = |nodes: &Nodes| nodes.get(path).map(|node| node.stamp);
            if stamp(&start) == stamp(&copy) {
                continue;
            }
            self.stamp += 1;
            let listing = self.nodes.get(path).map_or(self.stamp, |node| node.listing);
            match copy.get(path) {
                Some(node) => self
                    .nodes
                    .insert(path.clone(), Node { stamp: self.stamp, listing, ..node.clone() }),
                None => self.nodes.remove(path),
            };
        }
        let after = self.nodes.clone();
        for (path, node) in &mut self.nodes {
            if before.contains_key(path) && children(&before, path) != children(&after, path) {
                self.stamp += 1;
                node.listing = self.stamp;
            }
        }
        self.fire(&before, events);
        Ok(())
    }

    /// One operation on nodes; its reply, and the paths to announce.
    #[allow(clippy::too_many_arguments, reason = "a plain function of everything it depends on")]
    fn act(
        &mut self,
        nodes: &mut Nodes,
        seen: &mut BTreeSet<(String, bool)>,
        client: u16,
        mine: i64,
        kind: Kind,
        path: &str,
        args: &[Vec<u8>],
    ) -> Result<(Vec<u8>, Events), Error> {
        let need = match kind {
            Kind::Write | Kind::Mkdir | Kind::Rm => "w",
            Kind::SetPerms => "wo",
            _ => "r",
        };
        let event = vec![(path.to_owned(), false)];
        let ok = b"OK\0".to_vec();
        self.stamp += 1;
        if let Some(node) = nodes.get_mut(path) {
            seen.insert((path.into(), false));
            let have = rights(client, &node.perms);
            if !need.chars().all(|right| have.contains(right)) {
                return Err("EACCES");
            }
            match kind {
                Kind::Read => return Ok((node.value.clone(), vec![])),
                Kind::GetPerms => return Ok((show(&node.perms), vec![])),
                Kind::Mkdir => return Ok((ok, vec![])),
                Kind::Directory | Kind::DirectoryPart => {
                    seen.insert((path.into(), true));
                    let end = if kind == Kind::DirectoryPart { "\0" } else { "" };
                    let names = children(nodes, path)
                        .iter()
                        .map(|name| format!("{name}\0"))
                        .collect::<String>();
                    return Ok(((names + end).into(), vec![]));
                }
                Kind::Write => node.value = args[1].clone(),
                Kind::SetPerms => {
                    let perms = parse(&args[1..]);
                    if client != 0 && perms[0].1 != node.perms[0].1 {
                        return Err("EPERM");
                    }
                    node.perms = perms;
                }
                Kind::Rm if path == "/" => return Err("EINVAL"),
                Kind::Rm => return Ok((ok, self.remove_tree(nodes, path, seen))),
                _ => panic!("{kind:?}"),
            }
            node.stamp = self.stamp;
            return Ok((ok, event));
        }
        let mut missing = vec![path.to_owned()];
        while !nodes.contains_key(&parent(missing.last().unwrap()).unwrap()) {
            missing.push(parent(missing.last().unwrap()).unwrap());
        }
        let top = missing.last().unwrap().clone();
        let above = parent(&top).unwrap();
        seen.insert((top, false));
        seen.insert((above.clone(), false));
        let mut perms = nodes[&above].perms.clone();
        let have = rights(client, &perms);
        if !need.chars().any(|right| have.contains(right)) {
            return Err("EACCES");
        }
        if kind == Kind::Rm && missing.len() == 1 {
            return Ok((ok, vec![]));
        }
        if !matches!(kind, Kind::Write | Kind::Mkdir) {
            return Err("ENOENT");
        }
        if client != 0 {
            perms[0].1 = client;
            if mine + missing.len() as i64 > self.node_quota as i64 {
                return Err("ENOSPC");
            }
        }
        nodes.get_mut(&above).unwrap().listing = self.stamp;
        for new in missing.iter().rev() {
            let value = if new == path && kind == Kind::Write { args[1].clone() } else { vec![] };
            let node = Node { value, perms: perms.clone(), stamp: self.stamp, listing: self.stamp };
            nodes.insert(new.clone(), node);
        }
        Ok((ok, event))
    }

    fn remove_tree(
        &mut self,
        nodes: &mut Nodes,
        path: &str,
        seen: &mut BTreeSet<(String, bool)>,
    ) -> Events {
        self.stamp += 1;
        let below: Vec<_> = nodes.keys().filter(|other| is_below(other, path)).cloned().collect();
        for gone in &below {
            seen.insert((gone.clone(), false));
            seen.insert((gone.clone(), true));
            nodes.remove(gone);
        }
        nodes.get_mut(&parent(path).unwrap()).unwrap().listing = self.stamp;
        below.into_iter().rev().map(|gone| (gone.clone(), gone != path)).collect()
    }

    fn fire(&mut self, before: &Nodes, events: Events) {
        for (path, exact) in events {
            if !before.contains_key(&path) && !self.nodes.contains_key(&path) {
                continue;
            }
            let readers = [readers(before, &path), readers(&self.nodes, &path)].concat();
            self.deliver(&path, exact, &readers);
        }
    }

    fn fire_special(&mut self, path: &str) {
        let readers = vec![self.special[path].clone()];
        self.deliver(path, true, &readers);
    }

    fn deliver(&mut self, path: &str, exact: bool, readers: &[Perms]) {
        for client in self.clients.keys().copied().collect::<Vec<_>>() {
            if !readers.iter().any(|perms| rights(client, perms).contains('r')) {
                continue;
            }
            for (id, watched, ..) in self.clients[&client].watches.clone() {
                if watched == path || !exact && is_below(path, &watched) {
                    self.event(client, id, path);
                }
            }
        }
    }

    fn event(&mut self, client: u16, id: u64, path: &str) {
        let state = self.clients.get_mut(&client).unwrap();
        let key = Some((id, path.to_owned()));
        if state.queue.iter().any(|(event, _)| *event == key) {
            return;
        }
        let (_, _, relative, token) = state.watches.iter().find(|watch| watch.0 == id).unwrap();
        let home = format!("/local/domain/{client}/");
        let shown = if *relative { path.strip_prefix(&home).unwrap() } else { path };
        let payload = format!("{shown}\0{token}\0").into_bytes();
        state.queue.push((key, Out { kind: Kind::WatchEvent, req: 0, tx: 0, payload }));
    }
}

fn parse(texts: &[Vec<u8>]) -> Perms {
    let one = |text: &Vec<u8>| {
        let text = std::str::from_utf8(text).unwrap();
        (text.chars().next().unwrap(), text[1..].parse().unwrap())
    };
    texts.iter().map(one).collect()
}

/// The absolute form of a path; the tests use no malformed ones but `@` ones and those with `//`.
pub fn absolute(client: u16, path: &str) -> Option<String> {
    if path.starts_with('@') || path.contains("//") {
        return None;
    }
    Some(if path.starts_with('/') { path.into() } else { format!("/local/domain/{client}/{path}") })
}

//! A whole store, for the domain that serves it: nodes, permissions, transactions, watches and quotas, as
//! `docs/misc/xenstore.txt` and the behaviour of xenstored have them.
//!
//! [`Server`] does no I/O. Its embedder moves bytes between each domain's ring and [`Server::receive`],
//! [`Server::pending_output`] and [`Server::consume_output`], and tells it of domains that come and go. The embedder's own
//! client is one more connection, a privileged one.
//!
//! A domain that misbehaves hurts itself only. Requests of a domain that does not read its replies stay in its ring; its
//! watch events are merged; what it may own is limited by [`Quotas`]; and a stream that is not the protocol closes its
//! connection ([`Fault`]).
//!
//! Where xenstored leaves a choice, this server does as follows. Children are listed in the order of their names. A
//! transaction sees the store as it was at its start, and conflicts only with changes of what it looked at or changed; the
//! list of a node's children is apart from the node itself, so two transactions may create different children of one node.
//! The end of a watch also ends its events that were not sent.

mod connection;
mod quota;
mod request;
mod store;
mod transaction;
mod tree;
mod watch;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use hypercall::DomId;

pub use self::quota::{Quotas, Usage};

use self::connection::Connection;
use self::quota::OVERHEAD;
use self::store::{Change, Store, without_domain};
use self::tree::{Caller, Rights};
use self::watch::{WatchId, Watches};
use crate::wire::{Access, INTRODUCE_DOMAIN, Perm, RELEASE_DOMAIN, interface};

/// Identifies a connection. Numbers are not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(u64);

/// Why a connection takes no more bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The stream announced a payload longer than the protocol allows: it cannot be told what in it is a request.
    #[error("payload too long")]
    PayloadTooLong,
    /// There is no such connection, or no longer.
    #[error("no such connection")]
    Closed,
}

impl Fault {
    /// What to put into the ring page's error field (`XENSTORE_ERROR_*`).
    pub const fn interface_error(self) -> u32 {
        match self {
            Self::PayloadTooLong => interface::ERROR_PROTO,
            Self::Closed => interface::ERROR_COMM,
        }
    }
}

/// What a request of a privileged client asks of the embedder, who has the rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// INTRODUCE: connect the domain's ring to this connection, which is new or has been reset.
    Introduced {
        /// The domain.
        domid: DomId,
        /// Its connection.
        conn: ConnId,
        /// The guest frame of the ring, as it stood in the request.
        gfn: u64,
        /// The unbound event channel, in the domain.
        port: u32,
    },
    /// RELEASE: let go of the domain's ring.
    Released {
        /// The domain.
        domid: DomId,
    },
}

/// Counters of the whole server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Nodes, the root included.
    pub nodes: usize,
    /// Watches.
    pub watches: usize,
    /// Open transactions.
    pub transactions: usize,
    /// Connections.
    pub connections: usize,
    /// Bytes that wait to be sent.
    pub pending_output: usize,
    /// Watch events that wait to be sent.
    pub pending_events: usize,
}

#[derive(Debug, Default)]
struct Domain {
    conn: Option<ConnId>,
    shut_down: bool,
    target: Option<DomId>,
}

/// Who may watch the coming and going of domains.
#[derive(Debug)]
struct SpecialPerms {
    introduce: Arc<[Perm]>,
    release: Arc<[Perm]>,
}

impl SpecialPerms {
    fn get_mut(&mut self, path: &str) -> Option<&mut Arc<[Perm]>> {
        match path {
            INTRODUCE_DOMAIN => Some(&mut self.introduce),
            RELEASE_DOMAIN => Some(&mut self.release),
            _ => None,
        }
    }
}

/// The server. See the [module](self).
#[derive(Debug)]
pub struct Server {
    store: Store,
    watches: Watches,
    connections: BTreeMap<ConnId, Connection>,
    last_conn: u64,
    domains: BTreeMap<DomId, Domain>,
    special: SpecialPerms,
    actions: VecDeque<Action>,
}

impl Server {
    /// A server whose store holds the root and nothing else.
    pub fn new(quotas: Quotas) -> Self {
        let perms: Arc<[Perm]> = Arc::from([Perm::new(Access::None, DomId(0))]);
        Self {
            store: Store::new(quotas),
            watches: Watches::default(),
            connections: BTreeMap::new(),
            last_conn: 0,
            domains: BTreeMap::new(),
            special: SpecialPerms { introduce: perms.clone(), release: perms },
            actions: VecDeque::new(),
        }
    }

    /// Opens a connection for a client in this domain, besides any that it has. A privileged one may do everything and
    /// has no quotas, and neither has its domain from then on.
    pub fn connect(&mut self, domid: DomId, privileged: bool) -> ConnId {
        self.last_conn += 1;
        let id = ConnId(self.last_conn);
        if privileged {
            self.store.accounts.set_privileged(domid);
        }
        self.connections.insert(id, Connection::new(domid, privileged));
        id
    }

    /// Closes a connection: its watches and transactions go.
    pub fn disconnect(&mut self, conn: ConnId) {
        self.release_resources(conn);
        self.connections.remove(&conn);
        for domain in self.domains.values_mut() {
            domain.conn = domain.conn.filter(|known| *known != conn);
        }
    }

    /// Introduces a domain and opens the connection of its ring. The watchers of `@introduceDomain` hear of it.
    ///
    /// For a domain that is introduced already, this resets its connection, for a ring that starts anew.
    pub fn introduce(&mut self, domid: DomId) -> ConnId {
        if let Some(conn) = self.domains.get(&domid).and_then(|domain| domain.conn) {
            self.reset(conn);
            return conn;
        }
        let conn = self.connect(domid, false);
        self.domains.insert(domid, Domain { conn: Some(conn), ..Domain::default() });
        self.fire_special(INTRODUCE_DOMAIN);
        conn
    }

    /// Starts a connection anew: its watches, transactions, output, unfinished request and fault are gone.
    pub fn reset(&mut self, conn: ConnId) {
        self.release_resources(conn);
        if let Some(connection) = self.connections.get_mut(&conn) {
            *connection = Connection::new(connection.domid, connection.privileged);
        }
    }

    /// A domain has shut down or crashed, but still exists. Once until RESUME, the watchers of `@releaseDomain` hear of it.
    pub fn domain_shut_down(&mut self, domid: DomId) {
        if let Some(domain) = self.domains.get_mut(&domid)
            && !domain.shut_down
        {
            domain.shut_down = true;
            self.fire_special(RELEASE_DOMAIN);
        }
    }

    /// A domain is no more. Its connections, watches and transactions end; the nodes it owned go, with all below them; it is
    /// taken out of the permissions of all other nodes. Then the watchers of `@releaseDomain` hear of it, if it had been
    /// introduced.
    pub fn domain_gone(&mut self, domid: DomId) {
        let conns: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.domid == domid)
            .map(|(id, _)| *id)
            .collect();
        for conn in conns {
            self.disconnect(conn);
        }
        let known = self.domains.remove(&domid).is_some();
        for domain in self.domains.values_mut() {
            domain.target = domain.target.filter(|target| *target != domid);
        }
        self.special.introduce = without_domain(&self.special.introduce, domid);
        self.special.release = without_domain(&self.special.release, domid);
        let changes = self.store.forget_domain(domid);
        self.fire(&changes);
        if known {
            self.fire_special(RELEASE_DOMAIN);
        }
    }

    /// Takes bytes of a connection's stream and does the requests that they complete. Returns how many bytes were taken:
    /// fewer than given when too many replies wait to be read ([`Server::wants_input`]); offer the rest again later.
    ///
    /// # Errors
    /// The stream is no use any more. Everything the connection had is gone by then; [`Server::introduce`] or
    /// [`Server::reset`] starts anew.
    pub fn receive(&mut self, conn: ConnId, bytes: &[u8]) -> Result<usize, Fault> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let connection = self.connections.get_mut(&conn).ok_or(Fault::Closed)?;
            if let Some(fault) = connection.fault {
                return Err(fault);
            }
            if connection.replies() >= self.store.accounts.quotas.outstanding {
                break;
            }
            match connection.framer.next(&mut rest) {
                Ok(Some(message)) => self.process(conn, &message),
                Ok(None) => break,
                Err(_) => {
                    self.reset(conn);
                    if let Some(connection) = self.connections.get_mut(&conn) {
                        connection.fault = Some(Fault::PayloadTooLong);
                    }
                    return Err(Fault::PayloadTooLong);
                }
            }
        }
        Ok(bytes.len() - rest.len())
    }

    /// Whether [`Server::receive`] would take bytes.
    pub fn wants_input(&self, conn: ConnId) -> bool {
        self.connections.get(&conn).is_some_and(|connection| {
            connection.fault.is_none()
                && connection.replies() < self.store.accounts.quotas.outstanding
        })
    }

    /// Bytes to send to the client next: replies and watch events. There may be more once these are consumed.
    pub fn pending_output(&self, conn: ConnId) -> &[u8] {
        self.connections.get(&conn).map(Connection::output).unwrap_or_default()
    }

    /// Bytes of the output have been sent, counted from the front.
    pub fn consume_output(&mut self, conn: ConnId, count: usize) {
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.consume(count);
        }
    }

    /// Connections that have output, in no order of importance.
    pub fn connections_with_output(&self) -> impl Iterator<Item = ConnId> + '_ {
        self.connections
            .iter()
            .filter(|(_, connection)| !connection.output().is_empty())
            .map(|(id, _)| *id)
    }

    /// The next thing that a privileged client asked of the embedder.
    pub fn take_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The connection of an introduced domain's ring.
    pub fn connection_of(&self, domid: DomId) -> Option<ConnId> {
        self.domains.get(&domid).and_then(|domain| domain.conn)
    }

    /// Counters of the whole server.
    pub fn stats(&self) -> Stats {
        Stats {
            nodes: self.store.node_count(),
            watches: self.watches.count(),
            transactions: self.store.transaction_count(),
            connections: self.connections.len(),
            pending_output: self.connections.values().map(Connection::pending_bytes).sum(),
            pending_events: self.connections.values().map(Connection::pending_events).sum(),
        }
    }

    /// What one domain has.
    pub fn usage(&self, domid: DomId) -> Usage {
        self.store.accounts.usage(domid)
    }

    /// What every domain has that has anything.
    pub fn usages(&self) -> impl Iterator<Item = (DomId, Usage)> + '_ {
        self.store.accounts.iter()
    }

    fn release_resources(&mut self, conn: ConnId) {
        for id in self.watches.of_connection(conn) {
            self.remove_watch(id);
        }
        self.store.discard_all(conn);
    }

    fn remove_watch(&mut self, id: WatchId) {
        let Some(watch) = self.watches.remove(id) else { return };
        let Some(connection) = self.connections.get_mut(&watch.conn) else { return };
        connection.forget_events(id);
        self.store.accounts.change(connection.domid, |usage| {
            usage.watches = usage.watches.saturating_sub(1);
            usage.memory = usage.memory.saturating_sub(watch.len() + OVERHEAD);
        });
    }

    fn caller(&self, connection: &Connection) -> Caller {
        Caller {
            domid: connection.domid,
            privileged: connection.privileged,
            target: self.domains.get(&connection.domid).and_then(|domain| domain.target),
        }
    }

    fn fire(&mut self, changes: &[Change]) {
        for change in changes {
            self.fire_path(&change.path.shared(), change.exact, |caller| {
                change.is_visible_to(caller)
            });
        }
    }

    fn fire_special(&mut self, path: &'static str) {
        let Some(perms) = self.special.get_mut(path).cloned() else { return };
        self.fire_path(&Arc::from(path), true, |caller| Rights::of(caller, &perms).read);
    }

    fn fire_path(&mut self, path: &Arc<str>, exact: bool, visible: impl Fn(Caller) -> bool) {
        let limit = self.store.accounts.quotas.event_bytes;
        for (id, watch) in self.watches.matching(path, exact) {
            let Some(connection) = self.connections.get(&watch.conn) else { continue };
            if visible(self.caller(connection))
                && let Some(connection) = self.connections.get_mut(&watch.conn)
            {
                connection.event(id, &watch, path, limit);
            }
        }
    }
}

//! The requests of `io/xs_wire.h`.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write as _;

use hypercall::DomId;

use super::quota::OVERHEAD;
use super::store::Space;
use super::transaction::TxKey;
use super::tree::{Caller, NodePath, Rights};
use super::watch::Watch;
use super::{Action, ConnId, Server};
use crate::wire::{self, Header, Kind, Message, PAYLOAD_MAX, Perm, TxId, XsError};

type Reply = Result<Vec<u8>, XsError>;

fn ok() -> Reply {
    Ok(b"OK\0".to_vec())
}

fn text(text: &str) -> Reply {
    Ok([text.as_bytes(), b"\0"].concat())
}

/// The strings of a payload, each ended by a NUL. Whatever follows the last NUL is reserved by the protocol, and left out.
fn strings(mut payload: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while let Some((string, rest)) = wire::split_nul(payload) {
        found.push(string);
        payload = rest;
    }
    found
}

fn domid(text: &[u8]) -> Result<DomId, XsError> {
    let number = wire::parse_u32(text).ok_or(XsError::EINVAL)?;
    Ok(DomId(u16::try_from(number).map_err(|_| XsError::EINVAL)?))
}

fn only_domid(payload: &[u8]) -> Result<DomId, XsError> {
    domid(wire::single_string(payload).ok_or(XsError::EINVAL)?)
}

/// Requests that are not about nodes ignore the header's transaction.
fn ignores_transaction(kind: Kind) -> bool {
    matches!(kind, Kind::Watch | Kind::Unwatch)
}

fn is_privileged(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Control
            | Kind::Introduce
            | Kind::Release
            | Kind::IsDomainIntroduced
            | Kind::Resume
            | Kind::SetTarget
    )
}

/// A request and who made it.
struct Request<'a> {
    conn: ConnId,
    caller: Caller,
    transaction: Option<TxKey>,
    payload: &'a [u8],
}

impl Request<'_> {
    fn path(&self, text: &[u8]) -> Result<NodePath, XsError> {
        NodePath::parse(text, self.caller.domid)
    }

    fn only_path(&self) -> Result<NodePath, XsError> {
        self.path(wire::single_string(self.payload).ok_or(XsError::EINVAL)?)
    }
}

impl Server {
    /// Does one request, and queues its reply. A watch is confirmed before its first event; any other reply follows the
    /// events that the request caused.
    pub(super) fn process(&mut self, conn: ConnId, message: &Message) {
        let result = self.answer(conn, &message.header, &message.payload);
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.reply(&message.header, result.as_deref().map_err(|error| *error));
        }
        if message.header.kind() == Some(Kind::Watch) && result.is_ok() {
            self.first_event(conn, &message.payload);
        }
    }

    fn answer(&mut self, conn: ConnId, header: &Header, payload: &[u8]) -> Reply {
        let connection = self.connections.get(&conn).ok_or(XsError::EIO)?;
        let caller = self.caller(connection);
        let kind = header.kind().ok_or(XsError::ENOSYS)?;
        if is_privileged(kind) && !caller.privileged {
            return Err(XsError::EACCES);
        }
        let key = TxKey { conn, id: header.tx_id };
        let outside = header.tx_id == TxId::NONE || ignores_transaction(kind);
        if !outside && !self.store.has_transaction(key) {
            return Err(XsError::ENOENT);
        }
        let transaction = (!outside).then_some(key);
        let request = Request { conn, caller, transaction, payload };
        match kind {
            Kind::Directory => self
                .in_space(&request, |space| Ok(space.list(&request.only_path()?)?.listing_bytes())),
            Kind::DirectoryPart => self.directory_part(&request),
            Kind::Read => self
                .in_space(&request, |space| Ok(space.read(&request.only_path()?)?.value.to_vec())),
            Kind::GetPerms => self.in_space(&request, |space| {
                let node = space.read(&request.only_path()?)?;
                Ok(wire::format_perms(&node.perms).into_bytes())
            }),
            Kind::Write => self.in_space(&request, |space| {
                let (path, value) = wire::split_nul(payload).ok_or(XsError::EINVAL)?;
                space.write(&request.path(path)?, value)?;
                ok()
            }),
            Kind::Mkdir => self.in_space(&request, |space| {
                space.mkdir(&request.only_path()?)?;
                ok()
            }),
            Kind::Rm => self.in_space(&request, |space| {
                space.rm(&request.only_path()?)?;
                ok()
            }),
            Kind::SetPerms => self.set_perms(&request),
            Kind::Watch => self.watch(&request),
            Kind::Unwatch => self.unwatch(&request),
            Kind::ResetWatches => {
                self.release_resources(conn);
                ok()
            }
            Kind::TransactionStart => self.transaction_start(&request),
            Kind::TransactionEnd => self.transaction_end(&request),
            Kind::Introduce => self.introduce_request(payload),
            Kind::Release => {
                let domid = self.introduced(only_domid(payload)?)?;
                self.domain_gone(domid);
                self.actions.push_back(Action::Released { domid });
                ok()
            }
            Kind::GetDomainPath => text(NodePath::home(only_domid(payload)?).as_str()),
            Kind::IsDomainIntroduced => {
                let domid = only_domid(payload)?;
                let known = domid == DomId::SELF || self.domains.contains_key(&domid);
                text(if known { "T" } else { "F" })
            }
            Kind::Resume => {
                let domid = self.introduced(only_domid(payload)?)?;
                if let Some(domain) = self.domains.get_mut(&domid) {
                    domain.shut_down = false;
                }
                ok()
            }
            Kind::SetTarget => {
                let strings = strings(payload);
                let [from, target, ..] = strings.as_slice() else { return Err(XsError::EINVAL) };
                let (from, target) = (domid(from)?, self.introduced(domid(target)?)?);
                let domain = self.domains.get_mut(&from).ok_or(XsError::ENOENT)?;
                domain.target = Some(target);
                ok()
            }
            Kind::Control => self.control(payload),
            Kind::WatchEvent | Kind::Error => Err(XsError::ENOSYS),
        }
    }

    /// Does something to the nodes, in the request's transaction, and tells the watchers.
    fn in_space(
        &mut self,
        request: &Request<'_>,
        act: impl FnOnce(&mut Space<'_>) -> Reply,
    ) -> Reply {
        let mut space = Space::new(&mut self.store, request.transaction, request.caller);
        let reply = act(&mut space);
        let changes = core::mem::take(&mut space.changes);
        self.fire(&changes);
        reply
    }

    /// One payload's worth of a list of children: the version of the node, then the names from an offset on. An empty name
    /// says that the list ends.
    fn directory_part(&mut self, request: &Request<'_>) -> Reply {
        self.in_space(request, |space| {
            let strings = strings(request.payload);
            let [path, offset] = strings.as_slice() else { return Err(XsError::EINVAL) };
            let path = request.path(path)?;
            let offset = wire::parse_u32(offset).ok_or(XsError::EINVAL)?;
            let offset = usize::try_from(offset).map_err(|_| XsError::EINVAL)?;
            let node = space.list(&path)?;
            let mut reply = format!("{}\0", node.newest().0).into_bytes();
            let listing = node.listing_bytes();
            let mut rest = listing.get(offset..).unwrap_or_default();
            let room = PAYLOAD_MAX - 1 - reply.len();
            let mut len = 0;
            while let Some((name, after)) = wire::split_nul(rest) {
                len += name.len() + 1;
                if len > room {
                    return Ok(reply);
                }
                reply.extend_from_slice(name);
                reply.push(0);
                rest = after;
            }
            reply.push(0);
            Ok(reply)
        })
    }

    fn set_perms(&mut self, request: &Request<'_>) -> Reply {
        let (path, list) = wire::split_nul(request.payload).ok_or(XsError::EINVAL)?;
        let limit = self.store.accounts.quotas.perms;
        if !request.caller.privileged && strings(list).len() > limit {
            return Err(XsError::ENOSPC);
        }
        let perms = wire::parse_perms(list).ok_or(XsError::EINVAL)?;
        if path.starts_with(b"@") {
            return self.set_special_perms(request.caller, path, perms);
        }
        self.in_space(request, |space| {
            space.set_perms(&request.path(path)?, perms)?;
            ok()
        })
    }

    fn set_special_perms(&mut self, caller: Caller, path: &[u8], perms: Vec<Perm>) -> Reply {
        let path = str::from_utf8(path).map_err(|_| XsError::EINVAL)?;
        let special = self.special.get_mut(path).ok_or(XsError::EINVAL)?;
        if !Rights::of(caller, special).covers(Rights::OWN) {
            return Err(XsError::EACCES);
        }
        let owner = |perms: &[Perm]| perms.first().map(|perm| perm.domid);
        if !caller.privileged && owner(&perms) != owner(special) {
            return Err(XsError::EPERM);
        }
        *special = perms.into();
        ok()
    }

    fn watch(&mut self, request: &Request<'_>) -> Reply {
        let watch = parse_watch(request)?;
        if self.watches.find(&watch).is_some() {
            return Err(XsError::EEXIST);
        }
        let accounts = &mut self.store.accounts;
        let Caller { domid, privileged, .. } = request.caller;
        if !privileged && accounts.usage(domid).watches >= accounts.quotas.watches {
            return Err(XsError::E2BIG);
        }
        let memory = watch.len() + OVERHEAD;
        if !privileged && !accounts.has_memory(domid, memory) {
            return Err(XsError::ENOMEM);
        }
        accounts.change(domid, |usage| {
            usage.watches += 1;
            usage.memory += memory;
        });
        self.watches.add(watch);
        ok()
    }

    /// A watch fires once when it is set.
    fn first_event(&mut self, conn: ConnId, payload: &[u8]) {
        let limit = self.store.accounts.quotas.event_bytes;
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        let strings = strings(payload);
        let [path, token] = strings.as_slice() else { return };
        if let Ok(watch) = Watch::parse(conn, connection.domid, path, token)
            && let Some(id) = self.watches.find(&watch)
        {
            connection.event(id, &watch, &watch.path, limit);
        }
    }

    fn unwatch(&mut self, request: &Request<'_>) -> Reply {
        let watch = parse_watch(request)?;
        let id = self.watches.find(&watch).ok_or(XsError::ENOENT)?;
        self.remove_watch(id);
        ok()
    }

    fn transaction_start(&mut self, request: &Request<'_>) -> Reply {
        if request.transaction.is_some() {
            return Err(XsError::EBUSY);
        }
        let connection = self.connections.get_mut(&request.conn).ok_or(XsError::EIO)?;
        let conn = request.conn;
        let store = &mut self.store;
        let id = connection.next_transaction(|id| store.has_transaction(TxKey { conn, id }));
        store.start(TxKey { conn, id }, request.caller)?;
        text(&format!("{}", id.0))
    }

    fn transaction_end(&mut self, request: &Request<'_>) -> Reply {
        let commit = match wire::single_string(request.payload) {
            Some(b"T") => true,
            Some(b"F") => false,
            _ => return Err(XsError::EINVAL),
        };
        let key = request.transaction.ok_or(XsError::ENOENT)?;
        if commit {
            let changes = self.store.commit(key)?;
            self.fire(&changes);
        } else {
            self.store.discard(key);
        }
        ok()
    }

    fn introduce_request(&mut self, payload: &[u8]) -> Reply {
        let strings = strings(payload);
        let [number, gfn, port, ..] = strings.as_slice() else { return Err(XsError::EINVAL) };
        let domid = domid(number)?;
        let gfn = str::from_utf8(gfn).ok().and_then(|gfn| gfn.parse().ok());
        let gfn = gfn.ok_or(XsError::EINVAL)?;
        let port = wire::parse_u32(port).filter(|port| *port > 0).ok_or(XsError::EINVAL)?;
        if domid.0 == 0 || domid.0 >= DomId::FIRST_RESERVED.0 {
            return Err(XsError::EINVAL);
        }
        let conn = self.introduce(domid);
        self.actions.push_back(Action::Introduced { domid, conn, gfn, port });
        ok()
    }

    /// A domain that is introduced, and not domain 0.
    fn introduced(&self, domid: DomId) -> Result<DomId, XsError> {
        if domid.0 == 0 {
            return Err(XsError::EINVAL);
        }
        self.domains.get(&domid).map(|_| domid).ok_or(XsError::ENOENT)
    }

    fn control(&self, payload: &[u8]) -> Reply {
        let strings = strings(payload);
        match strings.as_slice() {
            [b"help"] => text("help\t\nquota\t[<domid>]\n"),
            [b"quota"] => {
                let quotas = &self.store.accounts.quotas;
                let list = [
                    ("nodes", u64::from(quotas.nodes)),
                    ("watches", u64::from(quotas.watches)),
                    ("transactions", u64::from(quotas.transactions)),
                    ("outstanding", u64::try_from(quotas.outstanding).unwrap_or(u64::MAX)),
                    ("transaction-nodes", count(quotas.transaction_nodes)),
                    ("memory", count(quotas.memory)),
                    ("node-size", count(quotas.entry_size)),
                    ("permissions", count(quotas.perms)),
                ];
                text(&table("Quota", &list))
            }
            [b"quota", of] => {
                let usage = self.usage(domid(of)?);
                let list = [
                    ("nodes", u64::from(usage.nodes)),
                    ("watches", u64::from(usage.watches)),
                    ("transactions", u64::from(usage.transactions)),
                    ("memory", count(usage.memory)),
                    ("snapshots", count(usage.snapshots)),
                ];
                text(&table("Domain", &list))
            }
            _ => Err(XsError::EINVAL),
        }
    }
}

fn parse_watch(request: &Request<'_>) -> Result<Watch, XsError> {
    let strings = strings(request.payload);
    let [path, token] = strings.as_slice() else { return Err(XsError::EINVAL) };
    Watch::parse(request.conn, request.caller.domid, path, token)
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

fn table(title: &str, lines: &[(&str, u64)]) -> String {
    let mut out = format!("{title}:\n");
    for (name, number) in lines {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{name:<18}: {number:>8}");
    }
    out
}

//! One client's byte streams.

use alloc::collections::{BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use hypercall::DomId;

use super::Fault;
use super::watch::{Watch, WatchId};
use crate::wire::{self, Framer, HEADER_LEN, Header, Kind, PAYLOAD_MAX, ReqId, TxId, XsError};

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    /// The watch and path, if it is an event.
    event: Option<(WatchId, Arc<str>)>,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub domid: DomId,
    pub privileged: bool,
    pub framer: Framer,
    pub fault: Option<Fault>,
    last_transaction: u32,
    out: VecDeque<Outgoing>,
    /// Bytes of the first of `out` that are gone already.
    sent: usize,
    replies: usize,
    event_bytes: usize,
    events: BTreeSet<(WatchId, Arc<str>)>,
}

impl Connection {
    pub fn new(domid: DomId, privileged: bool) -> Self {
        Self {
            domid,
            privileged,
            framer: Framer::new(),
            fault: None,
            last_transaction: 0,
            out: VecDeque::new(),
            sent: 0,
            replies: 0,
            event_bytes: 0,
            events: BTreeSet::new(),
        }
    }

    /// A number for a new transaction. `used` tells which are taken.
    pub fn next_transaction(&mut self, used: impl Fn(TxId) -> bool) -> TxId {
        loop {
            self.last_transaction = self.last_transaction.wrapping_add(1);
            let id = TxId(self.last_transaction);
            if id != TxId::NONE && !used(id) {
                return id;
            }
        }
    }

    /// Replies that wait to be read.
    pub fn replies(&self) -> usize {
        self.replies
    }

    pub fn pending_events(&self) -> usize {
        self.events.len()
    }

    pub fn pending_bytes(&self) -> usize {
        self.out.iter().map(|message| message.bytes.len()).sum::<usize>() - self.sent
    }

    pub fn reply(&mut self, request: &Header, result: Result<&[u8], XsError>) {
        let result = result.and_then(|reply| {
            if reply.len() > PAYLOAD_MAX { Err(XsError::E2BIG) } else { Ok(reply) }
        });
        let mut bytes = Vec::new();
        // Neither a reply, whose length was checked, nor the name of an error is too long.
        let _ = match result {
            Ok(reply) => wire::write_message(
                &mut bytes,
                request.raw_kind,
                request.req_id,
                request.tx_id,
                &[reply],
            ),
            Err(error) => wire::write_message(
                &mut bytes,
                Kind::Error.raw(),
                request.req_id,
                request.tx_id,
                &[error.text().as_bytes(), b"\0"],
            ),
        };
        self.replies += 1;
        self.out.push_back(Outgoing { bytes, event: None });
    }

    /// Queues an event, unless the same one waits already: who reads that one learns of both changes.
    ///
    /// With more than `limit` bytes of events waiting, the event names the watch's own path instead, which says that something
    /// there or below has changed; of these there is at most one for each watch.
    pub fn event(&mut self, id: WatchId, watch: &Watch, path: &Arc<str>, limit: usize) {
        let len = |path: &str| watch.shown(path).len() + watch.token.len() + 2;
        let mut key = (id, path.clone());
        if self.events.contains(&key) {
            return;
        }
        let full = self.event_bytes + HEADER_LEN + len(path) > limit;
        if full || len(path) > PAYLOAD_MAX {
            key.1 = watch.path.clone();
            if self.events.contains(&key) {
                return;
            }
        }
        let mut bytes = Vec::with_capacity(HEADER_LEN + len(&key.1));
        let parts: [&[u8]; 4] = [watch.shown(&key.1).as_bytes(), b"\0", &watch.token, b"\0"];
        let kind = Kind::WatchEvent.raw();
        if wire::write_message(&mut bytes, kind, ReqId(0), TxId::NONE, &parts).is_ok() {
            self.event_bytes += bytes.len();
            self.events.insert(key.clone());
            self.out.push_back(Outgoing { bytes, event: Some(key) });
        }
    }

    /// Takes back the events of a watch, but for one that is half sent.
    pub fn forget_events(&mut self, id: WatchId) {
        let half_sent = self.sent > 0;
        let mut index = 0;
        let Self { out, events, event_bytes, .. } = self;
        out.retain_mut(|message| {
            let keep = half_sent && index == 0;
            index += 1;
            if message.event.as_ref().is_none_or(|(watch, _)| *watch != id) || keep {
                return true;
            }
            *event_bytes -= message.bytes.len();
            if let Some(key) = &message.event {
                events.remove(key);
            }
            false
        });
    }

    /// What to send next.
    pub fn output(&self) -> &[u8] {
        self.out.front().and_then(|message| message.bytes.get(self.sent..)).unwrap_or_default()
    }

    pub fn consume(&mut self, mut count: usize) {
        while let Some(first) = self.out.front() {
            let left = first.bytes.len() - self.sent;
            if count < left {
                self.sent += count;
                return;
            }
            count -= left;
            self.sent = 0;
            let Some(message) = self.out.pop_front() else { return };
            match message.event {
                Some(key) => {
                    self.event_bytes -= message.bytes.len();
                    self.events.remove(&key);
                }
                None => self.replies -= 1,
            }
        }
    }
}

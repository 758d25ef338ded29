//! A client for the tests of the store's server: bytes in, bytes out.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod reference;

use std::collections::BTreeMap;

use hypercall::DomId;
use xenbus::server::{ConnId, Quotas, Server};
use xenbus::wire::{self, Framer, Kind, Message, ReqId, TxId};

/// A message as the tests compare it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Out {
    pub kind: Kind,
    pub req: u32,
    pub tx: u32,
    pub payload: Vec<u8>,
}

impl Out {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).replace('\0', "|")
    }
}

pub fn encode(kind: u32, req: u32, tx: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    wire::write_message(&mut bytes, kind, ReqId(req), TxId(tx), &[payload]).unwrap();
    bytes
}

pub fn decode(bytes: &[u8]) -> Vec<Out> {
    let (mut framer, mut rest, mut out) = (Framer::new(), bytes, Vec::new());
    while let Some(Message { header, payload }) = framer.next(&mut rest).unwrap() {
        out.push(Out {
            kind: header.kind().unwrap(),
            req: header.req_id.0,
            tx: header.tx_id.0,
            payload,
        });
    }
    assert!(framer.is_idle(), "output ends within a message");
    out
}

/// A server with dom0's privileged connection and introduced guests.
pub struct Lab {
    pub server: Server,
    pub conns: BTreeMap<u16, ConnId>,
    requests: u32,
}

impl Lab {
    pub fn new(quotas: Quotas, guests: &[u16]) -> Self {
        let mut server = Server::new(quotas);
        let mut conns = BTreeMap::from([(0, server.connect(DomId(0), true))]);
        for &guest in guests {
            conns.insert(guest, server.introduce(DomId(guest)));
        }
        let mut lab = Self { server, conns, requests: 0 };
        for guest in guests {
            let home = format!("/local/domain/{guest}");
            assert_eq!(lab.ask(0, Kind::Write, 0, &format!("{home}|")), "OK|");
            assert_eq!(lab.ask(0, Kind::SetPerms, 0, &format!("{home}|n{guest}|")), "OK|");
        }
        lab
    }

    pub fn conn(&self, domain: u16) -> ConnId {
        self.conns[&domain]
    }

    /// Sends a request without reading anything; `|` in the payload stands for NUL.
    pub fn send(&mut self, domain: u16, kind: Kind, tx: u32, payload: &str) -> u32 {
        self.requests += 1;
        let payload = payload.replace('|', "\0");
        let bytes = encode(kind.raw(), self.requests, tx, payload.as_bytes());
        let conn = self.conn(domain);
        assert_eq!(self.server.receive(conn, &bytes), Ok(bytes.len()));
        self.requests
    }

    /// Everything that waits on a domain's connection.
    pub fn drain(&mut self, domain: u16) -> Vec<Out> {
        let conn = self.conn(domain);
        let mut bytes = Vec::new();
        while !self.server.pending_output(conn).is_empty() {
            let part = self.server.pending_output(conn);
            let part = &part[..part.len().min(1000)];
            bytes.extend_from_slice(part);
            let len = part.len();
            self.server.consume_output(conn, len);
        }
        decode(&bytes)
    }

    /// Sends a request and reads everything; the reply's text, or the error's name.
    pub fn ask(&mut self, domain: u16, kind: Kind, tx: u32, payload: &str) -> String {
        let request = self.send(domain, kind, tx, payload);
        let out = self.drain(domain);
        let reply = out.iter().find(|out| out.req == request && out.kind != Kind::WatchEvent);
        let reply = reply.unwrap_or_else(|| panic!("no reply to {kind:?} {payload}: {out:?}"));
        if reply.kind == Kind::Error {
            return reply.text().trim_end_matches('|').to_owned();
        }
        assert_eq!((reply.kind, reply.tx), (kind, tx));
        reply.text()
    }

    /// The texts of the events that wait.
    pub fn events(&mut self, domain: u16) -> Vec<String> {
        let out = self.drain(domain);
        out.iter().filter(|out| out.kind == Kind::WatchEvent).map(Out::text).collect()
    }

    pub fn start(&mut self, domain: u16) -> u32 {
        let reply = self.ask(domain, Kind::TransactionStart, 0, "|");
        reply.trim_end_matches('|').parse().unwrap_or_else(|_| panic!("no transaction: {reply}"))
    }

    pub fn commit(&mut self, domain: u16, tx: u32) -> String {
        self.ask(domain, Kind::TransactionEnd, tx, "T|")
    }
}

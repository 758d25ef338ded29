//! Clients that say anything to a store's [`Server`], in pieces of any size, while a well-behaved one goes on.

use hypercall::DomId;
use xenbus::client::{Change, Client, Event, Outcome};
use xenbus::server::{ConnId, Quotas, Server, Usage};
use xenbus::wire::{
    Access, Framer, HEADER_LEN, Kind, PAYLOAD_MAX, Perm, ReqId, TxId, write_message,
};

use crate::input::Input;

const KINDS: &[Kind] = &[
    Kind::Write,
    Kind::Read,
    Kind::Mkdir,
    Kind::Rm,
    Kind::SetPerms,
    Kind::GetPerms,
    Kind::Directory,
    Kind::DirectoryPart,
    Kind::Watch,
    Kind::Unwatch,
    Kind::TransactionStart,
    Kind::TransactionEnd,
    Kind::ResetWatches,
    Kind::GetDomainPath,
    Kind::Introduce,
    Kind::Release,
    Kind::Control,
    Kind::SetTarget,
    Kind::WatchEvent,
];
const PATHS: &[&[u8]] = &[
    b"data",
    b"data/a",
    b"data/a/b",
    b"/local/domain/1/data",
    b"/local/domain/2/data/a",
    b"/local/domain/1",
    b"/local",
    b"/",
    b"@releaseDomain",
    b"",
    b"data//a",
];
const ARGUMENTS: &[&[u8]] = &[
    b"",
    b"1",
    b"T\0",
    b"F\0",
    b"token\0",
    b"n1\0b2\0",
    b"r0\0",
    b"0\0",
    b"1\0",
    b"2\0",
    b"value",
];

/// A client of which the server knows nothing good.
struct Rogue {
    domid: DomId,
    conn: ConnId,
    /// Both directions, as the server should see them.
    asked: Framer,
    heard: Framer,
    /// Whole requests that were sent and not answered.
    owed: usize,
}

impl Rogue {
    fn new(server: &mut Server, domid: DomId) -> Self {
        let conn = server.introduce(domid);
        Self { domid, conn, asked: Framer::new(), heard: Framer::new(), owed: 0 }
    }

    fn say(&mut self, server: &mut Server, bytes: &[u8], cut: usize) {
        for piece in bytes.chunks(cut.max(1)) {
            let mut piece = piece;
            while !piece.is_empty() {
                let Ok(taken) = server.receive(self.conn, piece) else {
                    // All that was under way is gone with the connection.
                    self.owed = 0;
                    assert!(!server.wants_input(self.conn));
                    assert!(server.receive(self.conn, b"x").is_err(), "a fault stays");
                    return;
                };
                let (mut now, rest) = piece.split_at(taken);
                while self.asked.next(&mut now).unwrap().is_some() {
                    self.owed += 1;
                }
                piece = rest;
                if taken == 0 {
                    assert!(!server.wants_input(self.conn));
                    self.listen(server, usize::MAX);
                }
            }
        }
    }

    /// Reads up to `count` bytes.
    fn listen(&mut self, server: &mut Server, mut count: usize) {
        loop {
            let output = server.pending_output(self.conn);
            let now = output.len().min(count);
            if now == 0 {
                return;
            }
            let mut bytes = &output[..now];
            while let Some(message) = self.heard.next(&mut bytes).unwrap() {
                if message.header.kind() != Some(Kind::WatchEvent) || message.header.req_id.0 != 0 {
                    assert!(self.owed > 0, "a reply to nothing: {:?}", message.header);
                    self.owed -= 1;
                }
            }
            server.consume_output(self.conn, now);
            count -= now;
        }
    }
}

fn within(usage: Usage, quotas: &Quotas) {
    assert!(usage.nodes <= quotas.nodes, "{usage:?}");
    assert!(usage.watches <= quotas.watches, "{usage:?}");
    assert!(usage.transactions <= quotas.transactions, "{usage:?}");
    assert!(usage.memory <= quotas.memory, "{usage:?}");
    assert!(usage.snapshots <= quotas.memory, "{usage:?}");
}

/// A request that may mean something.
fn request(input: &mut Input<'_>) -> Vec<u8> {
    let kind = input.one_of(KINDS).raw();
    let kind = if input.byte() == 0xff { input.word() } else { kind };
    let tx_id = TxId(u32::from(input.byte() % 4));
    let path = input.one_of(PATHS);
    let separator: &[u8] = if path.is_empty() { b"" } else { b"\0" };
    let argument = input.one_of(ARGUMENTS);
    let length = usize::from(input.byte() >> 4) * 64;
    let long = vec![b'z'; length];
    let mut out = Vec::new();
    let parts = [path, separator, argument, &long];
    write_message(&mut out, kind, ReqId(input.byte().into()), tx_id, &parts).unwrap();
    out
}

/// The toolstack's client does its work whatever the others do.
fn settle(server: &mut Server, conn: ConnId, client: &mut Client) {
    loop {
        let sent = server.receive(conn, client.pending_output()).unwrap();
        client.consume_output(sent);
        let bytes = server.pending_output(conn).to_vec();
        server.consume_output(conn, bytes.len());
        client.receive(&bytes).unwrap();
        if sent + bytes.len() == 0 {
            return;
        }
    }
}

fn home(server: &mut Server, conn: ConnId, client: &mut Client, domid: DomId) {
    let path = format!("/local/domain/{domid}");
    let perms = vec![Perm::new(Access::None, domid)];
    client.commit([Change::Mkdir { path: path.clone() }, Change::SetPerms { path, perms }]);
    settle(server, conn, client);
    while client.poll_event().is_some() {}
}

fn honest(server: &mut Server, conn: ConnId, client: &mut Client, value: u8) {
    let write = client.commit([Change::Write { path: "/honest".into(), value: vec![value] }]);
    let read = client.read_many(["/honest"]);
    settle(server, conn, client);
    let mut ended = Vec::new();
    while let Some(event) = client.poll_event() {
        if let Event::Done { job, result } = event {
            ended.push((job, result.unwrap()));
        }
    }
    ended.sort_by_key(|(job, _)| *job);
    // A read may overtake the commit, which is a request of its own; both come.
    assert_eq!(ended.len(), 2);
    assert_eq!(ended[0], (write, Outcome::Committed));
    assert_eq!(ended[1].0, read);
}

/// No request goes unanswered, nobody has more than the quotas allow, and the end of a domain leaves nothing.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let quotas = Quotas {
        nodes: 40,
        watches: 6,
        transactions: 3,
        transaction_nodes: 16,
        memory: 16_384,
        event_bytes: 2048,
        ..Quotas::default()
    };
    let mut server = Server::new(quotas);
    let (own, mut client) = (server.connect(DomId(0), true), Client::new());
    let mut rogues: Vec<_> =
        [1, 2].map(DomId).into_iter().map(|domid| Rogue::new(&mut server, domid)).collect();
    for rogue in &rogues {
        home(&mut server, own, &mut client, rogue.domid);
    }
    honest(&mut server, own, &mut client, 0);
    let mut cut = PAYLOAD_MAX;
    while !input.is_empty() {
        let command = input.byte();
        let rogue = &mut rogues[usize::from(command >> 7)];
        match command % 16 {
            0..8 => {
                let request = request(&mut input);
                rogue.say(&mut server, &request, cut);
            }
            8 => {
                let length = usize::from(input.byte());
                rogue.say(&mut server, input.take(length), cut);
            }
            9 => {
                let mut message = Vec::new();
                let [kind, id] = [input.byte(), input.byte()].map(u32::from);
                let length = usize::from(input.byte());
                let payload = input.take(length);
                write_message(&mut message, kind, ReqId(id), TxId(0), &[payload]).unwrap();
                rogue.say(&mut server, &message, cut);
            }
            10 => cut = usize::from(input.byte()),
            11 | 12 => rogue.listen(&mut server, usize::from(input.half())),
            13 => honest(&mut server, own, &mut client, input.byte()),
            14 => {
                // Its ring starts anew.
                *rogue = Rogue::new(&mut server, rogue.domid);
            }
            _ => {
                let domid = rogue.domid;
                server.domain_gone(domid);
                assert_eq!(server.usage(domid), Usage::default());
                assert!(server.receive(rogue.conn, b"x").is_err());
                *rogue = Rogue::new(&mut server, domid);
                home(&mut server, own, &mut client, domid);
            }
        }
        for rogue in &rogues {
            within(server.usage(rogue.domid), &quotas);
        }
        let stats = server.stats();
        let replies = quotas.outstanding * (HEADER_LEN + PAYLOAD_MAX);
        let events = quotas.event_bytes + quotas.watches as usize * (HEADER_LEN + PAYLOAD_MAX);
        assert!(stats.pending_output <= rogues.len() * (replies + events));
    }
    while server.take_action().is_some() {}
    for rogue in &mut rogues {
        rogue.listen(&mut server, usize::MAX);
        assert_eq!(rogue.owed, 0, "every request is answered");
    }
    honest(&mut server, own, &mut client, 1);
    for rogue in &rogues {
        server.domain_gone(rogue.domid);
    }
    assert_eq!(server.usages().filter(|(domid, _)| *domid != DomId(0)).count(), 0);
    let stats = server.stats();
    assert_eq!((stats.watches, stats.transactions, stats.connections), (0, 0, 1));
    assert_eq!((stats.pending_output, stats.pending_events), (0, 0));
}

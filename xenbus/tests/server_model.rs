#![cfg(feature = "server")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by a panic"
)]
//! The server against a plain reference: random requests of several domains must get the same replies and the same events.

mod server_support;

use std::collections::BTreeMap;

use hypercall::DomId;
use proptest::prelude::*;
use proptest::sample::select;
use xenbus::server::{Quotas, Server};
use xenbus::wire::Kind;

use server_support::reference::{Perms, Reference, absolute, show};
use server_support::{Lab, Out, decode, encode};

const GUESTS: [u16; 3] = [1, 2, 3];
const NODE_QUOTA: u32 = 9;

#[derive(Debug, Clone)]
enum Step {
    /// A request; the transaction is chosen among the open ones (0: none), the bytes go in pieces of this size.
    Request { client: u16, kind: Kind, tx: usize, args: Vec<Vec<u8>>, piece: usize },
    /// The client reads this many messages.
    Read { client: u16, count: usize },
    /// The domain goes, and another of the same number comes.
    Renew { client: u16 },
}

fn client() -> impl Strategy<Value = u16> {
    select(vec![0, 1, 1, 2, 2, 3])
}

fn path() -> impl Strategy<Value = String> {
    let top = select(vec![
        "",
        "",
        "",
        "/local/domain/1/",
        "/local/domain/1/",
        "/local/domain/2/",
        "/shared/",
        "/shared/",
        "/",
    ]);
    let names = prop::collection::vec(select(vec!["a", "b", "a-b"]), 0..4);
    let odd = select(vec!["/", "/local/domain", "/shared", "/local/domain/1", "@a", "a//b"]);
    prop_oneof![
        12 => (top, names).prop_map(|(top, names)| {
            let path = format!("{top}{}", names.join("/"));
            let path = path.strip_suffix('/').unwrap_or(&path).to_owned();
            if path.is_empty() { "a".to_owned() } else { path }
        }),
        1 => odd.prop_map(str::to_owned),
    ]
}

fn special() -> impl Strategy<Value = String> {
    select(vec!["@introduceDomain", "@releaseDomain", "@other"]).prop_map(str::to_owned)
}

fn perms() -> impl Strategy<Value = Perms> {
    let perm = (select(vec!['n', 'r', 'w', 'b']), select(vec![0u16, 1, 1, 2, 2, 3]));
    prop::collection::vec(perm, 1..4)
}

fn strings(perms: &Perms) -> Vec<Vec<u8>> {
    show(perms)
        .split(|byte| *byte == 0)
        .filter(|text| !text.is_empty())
        .map(<[u8]>::to_vec)
        .collect()
}

fn operation() -> impl Strategy<Value = (Kind, Vec<Vec<u8>>)> {
    let on_path = |kind: Kind| path().prop_map(move |path| (kind, vec![path.into_bytes()]));
    let watched = || prop_oneof![8 => path(), 1 => special()];
    let token = || select(vec!["t", "u"]);
    let watch = |kind: Kind| {
        (watched(), token())
            .prop_map(move |(path, token)| (kind, vec![path.into_bytes(), token.into()]))
    };
    prop_oneof![
        4 => on_path(Kind::Read),
        3 => on_path(Kind::Directory),
        1 => on_path(Kind::DirectoryPart),
        1 => on_path(Kind::GetPerms),
        8 => (path(), select(vec!["", "1", "22"]))
            .prop_map(|(path, value)| (Kind::Write, vec![path.into_bytes(), value.into()])),
        3 => on_path(Kind::Mkdir),
        3 => on_path(Kind::Rm),
        3 => (watched(), perms()).prop_map(|(path, perms)| {
            let mut args = strings(&perms);
            args.insert(0, path.into_bytes());
            (Kind::SetPerms, args)
        }),
        4 => watch(Kind::Watch),
        1 => watch(Kind::Unwatch),
        1 => Just((Kind::ResetWatches, vec![vec![]])),
        4 => Just((Kind::TransactionStart, vec![vec![]])),
        4 => select(vec!["T", "T", "T", "F"]).prop_map(|end| (Kind::TransactionEnd, vec![end.into()])),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let request = (client(), operation(), 0usize..4, select(vec![1usize, 7, 16, 5000]));
    prop_oneof![
        30 => request.prop_map(|(client, (kind, args), tx, piece)| Step::Request { client, kind, tx, args, piece }),
        3 => (client(), 0usize..9).prop_map(|(client, count)| Step::Read { client, count }),
        1 => select(GUESTS.to_vec()).prop_map(|client| Step::Renew { client }),
    ]
}

/// The path of a DIRECTORY_PART, and the reference's version of what it names.
type Asked = (String, Option<(u64, u64)>);

struct Pair {
    lab: Lab,
    reference: Reference,
    requests: u32,
    /// Versions seen in DIRECTORY_PART, by path: ours to the reference's.
    versions: BTreeMap<(String, u64), (u64, u64)>,
    asked: BTreeMap<(u16, u32), Asked>,
}

impl Pair {
    fn new() -> Self {
        let quotas = Quotas {
            nodes: NODE_QUOTA,
            watches: 1000,
            transactions: 1000,
            outstanding: 1000,
            ..Quotas::default()
        };
        let mut pair = Self {
            lab: Lab::new(quotas, &[]),
            reference: Reference::new(NODE_QUOTA as usize),
            requests: 0,
            versions: BTreeMap::new(),
            asked: BTreeMap::new(),
        };
        for guest in GUESTS {
            pair.introduce(guest);
        }
        let set = |path: &str, perms: &[&str]| {
            let mut args = vec![path.as_bytes().to_vec()];
            args.extend(perms.iter().map(|perm| perm.as_bytes().to_vec()));
            args
        };
        // Everyone hears of everything that is theirs to hear of.
        for client in [0, 1, 2, 3] {
            pair.request(client, Kind::Watch, 0, &[b"/".to_vec(), b"all".to_vec()], 5000);
        }
        pair.request(0, Kind::Write, 0, &[b"/shared".to_vec(), b"s".to_vec()], 5000);
        pair.request(0, Kind::SetPerms, 0, &set("/shared", &["r0", "b1", "b2"]), 5000);
        pair
    }

    /// As a toolstack would: the domain is told of, and gets its home.
    fn introduce(&mut self, guest: u16) {
        let conn = self.lab.server.introduce(DomId(guest));
        self.lab.conns.insert(guest, conn);
        self.reference.introduce(guest);
        let home = format!("/local/domain/{guest}").into_bytes();
        self.request(0, Kind::Mkdir, 0, std::slice::from_ref(&home), 5000);
        self.request(0, Kind::SetPerms, 0, &[home, format!("n{guest}").into_bytes()], 5000);
    }

    fn request(&mut self, client: u16, kind: Kind, tx: u32, args: &[Vec<u8>], piece: usize) {
        self.requests += 1;
        let mut payload = args.join(&0);
        if kind == Kind::DirectoryPart {
            payload.extend_from_slice(b"\x000");
        }
        if kind != Kind::Write {
            payload.push(0);
        }
        if kind == Kind::DirectoryPart {
            let path = String::from_utf8(args[0].clone()).unwrap();
            let version = self.reference.version(client, tx, &path);
            let path = absolute(client, &path).unwrap_or_default();
            self.asked.insert((client, self.requests), (path, version));
        }
        let conn = self.lab.conn(client);
        for piece in encode(kind.raw(), self.requests, tx, &payload).chunks(piece) {
            assert_eq!(self.lab.server.receive(conn, piece), Ok(piece.len()));
        }
        self.reference.request(client, self.requests, kind, tx, args);
    }

    fn read(&mut self, client: u16, count: usize) -> Result<(), TestCaseError> {
        let expected = self.reference.drain(client, count);
        let conn = self.lab.conn(client);
        let mut got = Vec::new();
        for _ in 0..count {
            let message = self.lab.server.pending_output(conn).to_vec();
            self.lab.server.consume_output(conn, message.len());
            got.extend(decode(&message));
        }
        for out in &mut got {
            self.check_version(client, out)?;
        }
        prop_assert_eq!(got, expected, "client {}", client);
        Ok(())
    }

    /// The version in a DIRECTORY_PART says the same as the reference's, and is then left out.
    fn check_version(&mut self, client: u16, out: &mut Out) -> Result<(), TestCaseError> {
        if out.kind != Kind::DirectoryPart {
            return Ok(());
        }
        let end = out.payload.iter().position(|byte| *byte == 0).unwrap();
        let version: u64 = std::str::from_utf8(&out.payload[..end]).unwrap().parse().unwrap();
        out.payload.drain(..=end);
        let (path, expected) = self.asked[&(client, out.req)].clone();
        let expected = expected.unwrap();
        let known = *self.versions.entry((path.clone(), version)).or_insert(expected);
        prop_assert_eq!(known, expected);
        let same = self
            .versions
            .iter()
            .filter(|((other, _), known)| *other == path && **known == expected);
        prop_assert_eq!(same.count(), 1);
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Request { client, kind, tx, args, piece } => {
                let open = self.reference.transactions(*client);
                // With transactions open, three of four requests are in one.
                let tx = tx.checked_sub(1).and_then(|index| open.get(index % open.len().max(1)));
                self.request(*client, *kind, tx.copied().unwrap_or(0), args, *piece);
            }
            Step::Read { client, count } => self.read(*client, *count)?,
            Step::Renew { client } => {
                self.lab.server.domain_gone(DomId(*client));
                self.reference.gone(*client);
                self.introduce(*client);
            }
        }
        for client in [0, 1, 2, 3] {
            let usage = self.lab.server.usage(DomId(client));
            prop_assert_eq!(usage.nodes as usize, self.reference.owned(client));
            prop_assert_eq!(usage.watches as usize, self.reference.watches(client));
            prop_assert_eq!(usage.transactions as usize, self.reference.transactions(client).len());
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), TestCaseError> {
        for client in [0, 1, 2, 3] {
            self.read(client, 10_000)?;
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 3000, ..ProptestConfig::default() })]

    #[test]
    fn the_server_does_what_the_reference_does(steps in prop::collection::vec(step(), 1..90)) {
        let mut pair = Pair::new();
        for step in &steps {
            pair.step(step)?;
        }
        pair.finish()?;
    }
}

proptest! {
    /// Bytes that are no requests, and requests with their bytes changed, hurt nobody but their sender.
    #[test]
    fn garbage_on_one_ring_is_nothing_to_the_others(
        garbage in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..60),
                (0u32..24, 0u32..3, prop::collection::vec(select(b"/ab@|\0\0nr1-9".to_vec()), 0..24))
                    .prop_map(|(kind, tx, payload)| encode(kind, 1, tx, &payload)),
            ],
            1..40,
        ),
    ) {
        let mut lab = Lab::new(Quotas::default(), &[1, 2]);
        lab.ask(2, Kind::Write, 0, "secret|2");
        let mine = lab.server.usage(DomId(2));
        for bytes in garbage {
            let conn = lab.conn(1);
            let _ = lab.server.receive(conn, &bytes);
            while !lab.server.pending_output(conn).is_empty() {
                lab.server.consume_output(conn, 7);
            }
        }
        prop_assert_eq!(lab.ask(2, Kind::Read, 0, "secret|"), "2");
        prop_assert_eq!(lab.ask(0, Kind::Read, 0, "/local/domain/2/secret|"), "2");
        prop_assert_eq!(lab.server.usage(DomId(2)), mine);
        lab.server.domain_gone(DomId(1));
        prop_assert_eq!(lab.server.usage(DomId(1)), Default::default());
    }
}

#[test]
fn a_server_is_send() {
    fn is_send<T: Send>() {}
    is_send::<Server>();
}

//! A backend that does anything, and a toolstack that does much, to a [`netfront::Frontend`]. Its guest has another interface,
//! with an honest backend.

use std::sync::atomic::Ordering;

use evtchn::Channel;
use grant::{MapRequest, Mapper, Mapping, SharedMemory as _};
use hypercall::{DomId, Errno, GrantRef, Port};
use netfront::{Frontend, Meta};
use netif::offload::{Checksum, Gso};
use netif::ring::layout;
use netif::slot::GsoType;
use sim::{Fault, FaultPlan, Item, Kind, SimHv};
use xenbus::client::{Change, Client, Event, Outcome};
use xenbus::wire::parse_u32;

use crate::input::Input;
use crate::world::{DOM0, LONGEST_PENALTY, SECOND, World, back, front, vif_nodes, write};

/// The guest under test, and its interface that has the bad backend.
const GUEST: usize = 0;
const HANDLE: u32 = 1;
const KEYS: &[&str] = &[
    "state",
    "feature-rx-copy",
    "feature-sg",
    "feature-gso-tcpv4",
    "feature-gso-tcpv6",
    "feature-no-csum-offload",
    "feature-ipv6-csum-offload",
    "feature-split-event-channels",
    "multi-queue-max-queues",
    "feature-ctrl-ring",
    "feature-multicast-control",
    "feature-dynamic-multicast-control",
    "feature-xdp-headroom",
    "online",
    "carrier",
    "mtu",
];
const VALUES: &[&str] = &["0", "1", "2", "4", "17", "4294967295", "4294967296", "", "-1", "x"];
const STATES: &[&str] = &["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
const FAULTS: &[Kind] =
    &[Kind::AllocPages, Kind::AllocUnbound, Kind::Notify, Kind::TableFrame, Kind::Close];

/// One ring as a backend sees it.
struct Ring {
    page: Mapping<SimHv>,
    prod: u32,
}

impl Ring {
    fn push(&mut self, entry: usize, words: &[u32]) {
        let at = layout::SLOTS + (self.prod % 256) as usize * entry;
        for (index, word) in words.iter().enumerate() {
            self.page.store_u32(at + index * 4, *word, Ordering::SeqCst);
        }
        self.prod = self.prod.wrapping_add(1);
    }

    fn publish(&self) {
        self.page.store_u32(layout::RSP_PROD, self.prod, Ordering::SeqCst);
    }
}

/// What a connected backend has.
struct Rings {
    tx: Ring,
    rx: Ring,
    channels: Vec<Channel<SimHv>>,
}

/// The backend that misbehaves.
struct Bad {
    domain: usize,
    id: DomId,
    mapper: Mapper<SimHv>,
    /// The last is in use; earlier ones may have been kept.
    rings: Vec<Rings>,
}

impl Bad {
    fn new(world: &mut World) -> Self {
        let domain = world.add_guest();
        let id = world.guests[domain].id;
        let mapper = Mapper::new(&world.sim.handle(id).unwrap());
        let mut bad = Self { domain, id, mapper, rings: Vec::new() };
        let nodes = vif_nodes(id, world.guests[GUEST].id, HANDLE);
        world.client.commit(nodes);
        world.settle();
        bad.connect(world);
        bad
    }

    fn dir(&self, world: &World) -> String {
        back(self.id, world.guests[GUEST].id, HANDLE)
    }

    fn say(&self, world: &mut World, changes: Vec<Change>) {
        world.guests[self.domain].client.commit(changes);
        world.settle();
    }

    fn set(&self, world: &mut World, key: &str, value: impl Into<Vec<u8>>) {
        let path = format!("{}/{key}", self.dir(world));
        self.say(world, vec![write(path, value)]);
    }

    /// By the rules, as far as the frontend plays along.
    fn connect(&mut self, world: &mut World) {
        for key in [
            "feature-rx-copy",
            "feature-sg",
            "feature-gso-tcpv4",
            "feature-gso-tcpv6",
            "feature-ipv6-csum-offload",
        ] {
            self.set(world, key, "1");
        }
        self.set(world, "state", "2");
        self.attach(world);
        self.set(world, "state", "4");
    }

    /// Takes the rings of the first queue, if the frontend offers any.
    fn attach(&mut self, world: &mut World) -> Option<()> {
        let domain = world.guests[GUEST].id;
        let dir = front(domain, HANDLE);
        let key = |world: &mut World, name: &str| number(world, format!("{dir}/{name}"));
        let map = |gref| {
            let request = MapRequest { domain, gref: GrantRef(gref), read_only: false };
            self.mapper.map(request).ok()
        };
        let tx = map(key(world, "tx-ring-ref")?)?;
        let rx = map(key(world, "rx-ring-ref")?)?;
        let ring = |page: Mapping<SimHv>| {
            let prod = page.load_u32(layout::RSP_PROD, Ordering::SeqCst);
            Ring { page, prod }
        };
        let (tx, rx) = (ring(tx), ring(rx));
        let mut channels = Vec::new();
        for name in ["event-channel", "event-channel-tx", "event-channel-rx"] {
            let Some(port) = key(world, name) else { continue };
            let binder = world.guests[self.domain].upcalls.binder();
            channels.extend(binder.bind_interdomain(domain, Port(port)));
        }
        self.rings.push(Rings { tx, rx, channels });
        Some(())
    }

    fn kick(&self) {
        for rings in self.rings.iter().rev().take(1) {
            rings.tx.publish();
            rings.rx.publish();
            for channel in &rings.channels {
                let _ = channel.notify();
            }
        }
    }
}

/// Reads a node, past all drivers.
fn number(world: &mut World, path: String) -> Option<u32> {
    let conn = world.server.connect(DOM0, true);
    let mut client = Client::new();
    client.read_many([path]);
    for _ in 0..2 {
        let sent = world.server.receive(conn, client.pending_output()).unwrap();
        client.consume_output(sent);
        let bytes = world.server.pending_output(conn).to_vec();
        world.server.consume_output(conn, bytes.len());
        client.receive(&bytes).unwrap();
    }
    world.server.disconnect(conn);
    let Some(Event::Done { result: Ok(Outcome::Values(values)), .. }) = client.poll_event() else {
        panic!("the read has ended");
    };
    parse_u32(values[0].as_deref()?)
}

fn value(input: &mut Input<'_>) -> Vec<u8> {
    match input.byte() {
        at @ 0..200 => VALUES[usize::from(at) % VALUES.len()].into(),
        at => input.take(usize::from(at - 200)).into(),
    }
}

fn frontend(world: &mut World) -> Option<(&mut Frontend<SimHv>, &mut Client)> {
    let guest = &mut world.guests[GUEST];
    guest.frontends.get_mut(1).map(|frontend| (frontend, &mut guest.client))
}

fn send(world: &mut World, input: &mut Input<'_>) {
    let frame = vec![1; usize::from(input.half())];
    let kind = input.byte();
    let gso = if kind & 4 == 0 { None } else { Gso::new(input.half(), GsoType(kind >> 4)).ok() };
    let checksum = [Checksum::Unverified, Checksum::Validated, Checksum::Blank];
    let meta = Meta { checksum: checksum[usize::from(kind) % 3], gso };
    if let Some((frontend, _)) = frontend(world) {
        let _ = frontend.send(0, &frame, meta);
    }
}

fn toolstack(world: &mut World, bad: &Bad, input: &mut Input<'_>) {
    let id = world.guests[GUEST].id;
    let (front, back) = (front(id, HANDLE), bad.dir(world));
    let changes = match input.byte() % 8 {
        0 => vec![Change::Rm { path: front }],
        1 => vec![Change::Rm { path: back }],
        2 => vec![write(format!("{front}/backend-id"), value(input))],
        3 => vec![write(format!("{front}/backend"), value(input))],
        4 => vec![write(format!("{front}/state"), input.one_of(STATES))],
        5 => vec![write(format!("{front}/mac"), value(input))],
        6 => vec![write(format!("{back}/online"), input.one_of(VALUES))],
        _ => vif_nodes(bad.id, id, HANDLE),
    };
    world.client.commit(changes);
    world.settle();
}

fn act(world: &mut World, bad: &mut Bad, input: &mut Input<'_>) {
    match input.byte() % 24 {
        0 => bad.connect(world),
        command @ 1..6 => {
            let Some(rings) = bad.rings.last_mut() else { return };
            let id = rings.rx.prod & 0xff;
            let low = input.byte();
            match command {
                // Data, small and in its place; or anything; or an extra.
                1 | 2 => {
                    let (flags, size) = (u32::from(low & 0xf), u32::from(low >> 4) * 40);
                    rings.rx.push(8, &[id, flags | size << 16]);
                }
                3 => {
                    let [first, second] = input.words();
                    rings.rx.push(8, &[id | first << 16, second]);
                }
                4 => {
                    let words = input.words::<2>();
                    rings.rx.push(8, &words);
                }
                _ => {
                    let (kind, more) = (u32::from(low % 6), u32::from(low >> 7));
                    let second = input.word();
                    rings.rx.push(8, &[kind | more << 8 | second << 16, second >> 16]);
                }
            }
        }
        6 | 7 => {
            let Some(rings) = bad.rings.last_mut() else { return };
            let at = layout::SLOTS + (rings.tx.prod % 256) as usize * 12 + 8;
            let asked = rings.tx.page.load_u32(at, Ordering::SeqCst) & 0xffff;
            let how = input.byte();
            let id = if how & 0x80 == 0 { asked } else { input.half().into() };
            let status = i16::from(how & 7) - 3;
            rings.tx.push(12, &[id | u32::from(status.cast_unsigned()) << 16]);
        }
        8..11 => {
            bad.kick();
            world.settle();
        }
        11 => {
            let Some(rings) = bad.rings.last_mut() else { return };
            let ring = if input.flag() { &rings.tx } else { &rings.rx };
            let at = usize::from(input.byte()) * 4;
            ring.page.store_u32(at, input.word(), Ordering::SeqCst);
        }
        12 => {
            let key = input.one_of(KEYS);
            let path = format!("{}/{key}", bad.dir(world));
            let change = if input.byte().is_multiple_of(8) {
                Change::Rm { path }
            } else {
                write(path, value(input))
            };
            bad.say(world, vec![change]);
        }
        13 => {
            let state = input.one_of(STATES);
            bad.set(world, "state", state);
        }
        14 | 15 => send(world, input),
        16 => world.pass(u64::from(input.half()) * 100_000),
        17 => {
            // Lets go of what it had: all, or all but what it keeps.
            let keep = input.below(4).min(bad.rings.len());
            bad.rings.drain(keep..);
        }
        18 => toolstack(world, bad, input),
        19 => {
            let fault = Fault::Errno(input.one_of(&[Errno::INVAL, Errno::NOMEM, Errno::NOSPC]));
            let plan = FaultPlan::nth(input.one_of(FAULTS), u64::from(input.byte() % 32), fault);
            world.sim.inject(world.guests[GUEST].id, plan);
        }
        20 => {
            let (now, close) = (world.now, input.flag());
            let Some((frontend, client)) = frontend(world) else { return };
            if close {
                frontend.close(client, now);
            } else {
                frontend.open(client);
            }
        }
        21 => {
            // As a module that is loaded again.
            world.guests[GUEST].frontends.truncate(1);
            world.start(GUEST, HANDLE);
        }
        22 => {
            for state in ["5", "6"] {
                bad.set(world, "state", state);
            }
            world.pass(LONGEST_PENALTY);
            bad.connect(world);
        }
        _ => {
            world.destroy(bad.domain);
            *bad = Bad::new(world);
        }
    }
}

/// Whatever the backend does, the guest's other interface goes on, and in the end nothing is lent to it but what it kept.
pub fn run(bytes: &[u8]) {
    let mut world = World::new();
    world.start(GUEST, HANDLE);
    let mut bad = Bad::new(&mut world);
    let mut input = Input::new(bytes);
    let mut left = 200;
    while !input.is_empty() && left > 0 {
        left -= 1;
        act(&mut world, &mut bad, &mut input);
    }
    let id = world.guests[GUEST].id;
    world.sim.clear_faults(id);
    world.settle();
    world.pass(LONGEST_PENALTY);
    world.assert_carries();
    world.destroy(bad.domain);
    world.client.commit([Change::Rm { path: front(id, HANDLE) }]);
    world.pass(2 * SECOND);
    world.guests[GUEST].frontends.truncate(1);
    world.assert_carries();
    world.assert_clean();
    let ledger = world.sim.ledger();
    let lent = |item: &Item| matches!(item, Item::Grant { to, .. } if *to != DOM0);
    let items: Vec<_> = ledger.held_by(id).entries().map(|(_, item)| item).collect();
    let parked = world.guests[GUEST].table.parked();
    assert_eq!(items.iter().filter(|item| lent(item)).count(), parked);
    assert!(!items.iter().any(|item| matches!(
        item,
        Item::Port { state: sim::PortState::Unbound(to) | sim::PortState::Interdomain(to, _), .. } if *to != DOM0
    )), "{ledger}");
}

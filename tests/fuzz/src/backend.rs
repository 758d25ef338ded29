//! A guest that does anything, and a toolstack that does much, to a [`netback::Backend`].

use std::rc::Rc;
use std::sync::atomic::Ordering;

use evtchn::Channel;
use grant::{GrantedPage, SharedMemory as _, SharedPage};
use hypercall::abi::{GTF_PERMIT_ACCESS, GTF_READONLY};
use hypercall::{DomId, Errno, GrantRef, GrantStatus};
use netif::ring::layout;
use sim::{Fault, FaultPlan, Kind, SimHv};
use xenbus::client::Change;

use crate::input::Input;
use crate::world::{DOM0, LONGEST_PENALTY, SECOND, World, back, front, vif_nodes, write};

/// Keys of the frontend's directory, as a guest might write them.
const KEYS: &[&str] = &[
    "tx-ring-ref",
    "rx-ring-ref",
    "event-channel",
    "event-channel-tx",
    "event-channel-rx",
    "request-rx-copy",
    "feature-rx-notify",
    "feature-sg",
    "feature-gso-tcpv4",
    "feature-gso-tcpv6",
    "feature-no-csum-offload",
    "feature-ipv6-csum-offload",
    "multi-queue-num-queues",
    "queue-0/tx-ring-ref",
    "queue-0/rx-ring-ref",
    "queue-0/event-channel",
    "queue-1/tx-ring-ref",
    "queue-1/rx-ring-ref",
    "queue-1/event-channel",
    "ctrl-ring-ref",
    "event-channel-ctrl",
    "request-multicast-control",
    "xdp-headroom",
    "mac",
    "state",
];
/// Values that mean something, or nearly.
const VALUES: &[&str] = &["0", "1", "2", "3", "256", "4294967295", "4294967296", "", "+1", "x"];
const PAGES: usize = 6;
/// Data pages, after the two rings.
const DATA: usize = 2;
const FAULTS: &[Kind] = &[
    Kind::Copy,
    Kind::Map,
    Kind::Unmap,
    Kind::BindInterdomain,
    Kind::Notify,
    Kind::AllocPages,
    Kind::Window,
    Kind::Close,
];

/// The guest that misbehaves.
struct Raw {
    guest: usize,
    id: DomId,
    pages: Vec<Rc<GrantedPage<SimHv>>>,
    channel: Channel<SimHv>,
    tx_prod: u32,
    rx_prod: u32,
}

impl Raw {
    fn new(world: &mut World) -> Self {
        let guest = world.add_guest();
        let it = &world.guests[guest];
        let id = it.id;
        let pages = (0..PAGES).map(|_| Rc::new(it.table.share(DOM0, false).unwrap())).collect();
        let channel = it.upcalls.binder().alloc_unbound(DOM0).unwrap();
        let mut raw = Self { guest, id, pages, channel, tx_prod: 0, rx_prod: 0 };
        world.client.commit(vif_nodes(DOM0, id, 0));
        world.settle();
        raw.connect(world, 0);
        raw
    }

    fn page(&self, at: usize) -> &SharedPage {
        self.pages[at % PAGES].page()
    }

    fn gref(&self, at: usize) -> GrantRef {
        self.pages[at % PAGES].gref()
    }

    fn say(&self, world: &mut World, changes: Vec<Change>) {
        world.guests[self.guest].client.commit(changes);
    }

    fn set_state(&self, world: &mut World, state: &str) {
        self.say(world, vec![write(format!("{}/state", front(self.id, 0)), state)]);
    }

    /// Offers clean rings, by the rules.
    fn connect(&mut self, world: &mut World, start: u32) {
        let (tx, rx) = (self.page(0), self.page(1));
        for page in [tx, rx] {
            for (at, index) in [
                (layout::REQ_PROD, start),
                (layout::RSP_PROD, start),
                (layout::REQ_EVENT, start.wrapping_add(1)),
                (layout::RSP_EVENT, start.wrapping_add(1)),
            ] {
                page.store_u32(at, index, Ordering::SeqCst);
            }
        }
        (self.tx_prod, self.rx_prod) = (start, start);
        let dir = front(self.id, 0);
        let keys = [
            ("tx-ring-ref", self.gref(0).0),
            ("rx-ring-ref", self.gref(1).0),
            ("event-channel", self.channel.port().0),
            ("request-rx-copy", 1),
            ("feature-rx-notify", 1),
            ("feature-sg", 1),
            ("feature-gso-tcpv4", 1),
            ("feature-gso-tcpv6", 1),
            ("feature-ipv6-csum-offload", 1),
        ];
        let mut changes: Vec<_> = keys
            .iter()
            .map(|(key, value)| write(format!("{dir}/{key}"), value.to_string()))
            .collect();
        changes.push(write(format!("{dir}/state"), "4"));
        self.say(world, changes);
        world.settle();
    }

    /// A request in the TX ring, as raw words but for the reference, which is one of ours.
    fn push_tx(&mut self, input: &mut Input<'_>) {
        let at = layout::SLOTS + (self.tx_prod % 256) as usize * 12;
        let command = input.byte();
        let gref = if command & 0x80 == 0 {
            self.gref(DATA + usize::from(command & 3)).0
        } else {
            input.word()
        };
        // Flags that have a meaning; the size small or any.
        let flags = u32::from(command >> 2 & 0xf);
        let (offset, size) = (u32::from(input.half()), u32::from(input.half()));
        let offset = if command & 0x40 == 0 { offset % 2048 } else { offset };
        self.page(0).store_u32(at, gref, Ordering::SeqCst);
        self.page(0).store_u32(at + 4, offset | flags << 16, Ordering::SeqCst);
        self.page(0).store_u32(at + 8, self.tx_prod & 0xff | size << 16, Ordering::SeqCst);
        self.tx_prod = self.tx_prod.wrapping_add(1);
    }

    /// An extra, or anything, in the TX ring.
    fn push_words(&mut self, words: [u32; 3]) {
        let at = layout::SLOTS + (self.tx_prod % 256) as usize * 12;
        for (index, word) in words.into_iter().enumerate() {
            self.page(0).store_u32(at + index * 4, word, Ordering::SeqCst);
        }
        self.tx_prod = self.tx_prod.wrapping_add(1);
    }

    fn push_rx(&mut self, gref: u32) {
        let at = layout::SLOTS + (self.rx_prod % 256) as usize * 8;
        self.page(1).store_u32(at, self.rx_prod & 0xff, Ordering::SeqCst);
        self.page(1).store_u32(at + 4, gref, Ordering::SeqCst);
        self.rx_prod = self.rx_prod.wrapping_add(1);
    }

    fn publish(&self) {
        self.page(0).store_u32(layout::REQ_PROD, self.tx_prod, Ordering::SeqCst);
        self.page(1).store_u32(layout::REQ_PROD, self.rx_prod, Ordering::SeqCst);
        let _ = self.channel.notify();
    }
}

/// A value of a node: a good one, a near one, or bytes.
fn value(input: &mut Input<'_>, raw: &Raw) -> Vec<u8> {
    match input.byte() {
        at @ 0..32 => raw.gref(usize::from(at)).to_string().into(),
        32..64 => raw.channel.port().to_string().into(),
        at @ 64..200 => VALUES[usize::from(at) % VALUES.len()].into(),
        at => input.take(usize::from(at - 200)).into(),
    }
}

fn fault(input: &mut Input<'_>) -> FaultPlan {
    let kind = input.one_of(FAULTS);
    let fault = match input.byte() % 4 {
        0 => Fault::Errno(input.one_of(&[Errno::INVAL, Errno::NOMEM, Errno::NOSYS, Errno::NOSPC])),
        1 => Fault::Partial(input.below(4), Errno::INVAL),
        2 => Fault::Status(GrantStatus(input.half().cast_signed() | 1)),
        _ => Fault::Untouched,
    };
    FaultPlan::nth(kind, u64::from(input.byte() % 8), fault)
}

fn act(world: &mut World, raw: &mut Raw, input: &mut Input<'_>) {
    match input.byte() % 24 {
        0..5 => raw.push_tx(input),
        5 => raw.push_words(input.words()),
        6 => {
            // An extra that is one.
            let [kind, more] = [input.byte() % 6, input.byte() & 1].map(u32::from);
            let second = input.word();
            raw.push_words([kind | more << 8 | second << 16, second >> 16, 0]);
        }
        7 => {
            for _ in 0..input.byte() % 32 {
                let gref =
                    if input.flag() { raw.gref(DATA + input.below(4)).0 } else { input.word() };
                raw.push_rx(gref);
            }
        }
        8 | 9 => {
            raw.publish();
            world.settle();
        }
        10 => raw.publish(),
        11 => {
            let page = input.below(PAGES);
            let at =
                if page < DATA { input.below(4) * 4 } else { usize::from(input.half() % 4096) };
            raw.page(page).store_u32(at, input.word(), Ordering::SeqCst);
        }
        12 => {
            let (page, at) = (DATA + input.below(4), usize::from(input.half() % 4096));
            let length = usize::from(input.byte());
            raw.page(page).write_bytes(at, input.take(length));
        }
        13 => {
            let gref = raw.gref(input.below(PAGES));
            let Some(mut entry) = world.sim.grant_entry(raw.id, gref) else { return };
            match input.byte() % 4 {
                0 => entry.flags = 0,
                1 => entry.flags = GTF_PERMIT_ACCESS | GTF_READONLY,
                2 => entry.domid = DomId(input.half() % 4),
                _ => (entry.flags, entry.domid) = (GTF_PERMIT_ACCESS, DOM0),
            }
            // What is in use cannot be changed without Xen's knowledge; that is another test's.
            if world.sim.grant_users(raw.id, gref) == 0 {
                world.sim.set_grant_entry(raw.id, gref, entry);
            }
        }
        14 => {
            let path = format!("{}/{}", front(raw.id, 0), input.one_of(KEYS));
            let change = if input.byte().is_multiple_of(8) {
                Change::Rm { path }
            } else {
                write(path, value(input, raw))
            };
            raw.say(world, vec![change]);
        }
        15 => {
            let state = input.one_of(&["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]);
            raw.set_state(world, state);
            world.settle();
        }
        16 => raw.connect(world, if input.flag() { 100_u32.wrapping_neg() } else { input.word() }),
        17 => {
            // By the rules, as a module that is loaded again.
            for state in ["5", "6", "1"] {
                raw.set_state(world, state);
                world.settle();
            }
            world.pass(LONGEST_PENALTY);
            raw.connect(world, input.word());
        }
        18 => {
            let dir = back(DOM0, raw.id, 0);
            let change = match input.byte() % 8 {
                0 => vec![write(format!("{dir}/online"), "0")],
                1 => vec![write(format!("{dir}/online"), "1")],
                2 => vec![Change::Rm { path: dir }],
                3 => vec![Change::Rm { path: front(raw.id, 0) }],
                4 => vec![write(format!("{dir}/state"), input.one_of(VALUES))],
                5 => vec![write(format!("{dir}/rate"), input.take(12))],
                6 => vec![write(format!("{dir}/frontend-id"), input.one_of(VALUES))],
                _ => vif_nodes(DOM0, raw.id, 0),
            };
            world.client.commit(change);
            world.settle();
        }
        19 => world.sim.inject(DOM0, fault(input)),
        20 => world.pass(u64::from(input.half()) * 100_000),
        21 => {
            world.turn();
        }
        22 => {
            world.sim.set_features(DOM0, input.word());
            // An honest sender, whom everybody hears.
            let mut frame = vec![0xff; 6];
            frame.extend([0, 0x16, 0x3e, 0, 0, 1, 8, 0]);
            frame.resize(14 + usize::from(input.half() % 3000), 1);
            let _ = world.guests[0].frontends[0].send(0, &frame, netfront::Meta::default());
            world.settle();
        }
        _ => {
            world.destroy(raw.guest);
            *raw = Raw::new(world);
        }
    }
}

/// Whatever the guest does, it is nobody else's business, and nothing of it is kept.
pub fn run(bytes: &[u8]) {
    let mut world = World::new();
    let mut raw = Raw::new(&mut world);
    let mut input = Input::new(bytes);
    let mut left = 200;
    while !input.is_empty() && left > 0 {
        left -= 1;
        act(&mut world, &mut raw, &mut input);
    }
    world.sim.clear_faults(DOM0);
    world.settle();
    // Faults may have hit the honest as well: they get the time to come back.
    world.pass(LONGEST_PENALTY);
    world.assert_carries();
    world.destroy(raw.guest);
    world.pass(2 * SECOND);
    world.assert_let_go(raw.id);
    world.assert_carries();
    world.assert_clean();
    assert!(!world.sim.domains().contains(&raw.id), "it lingers");
}

//! The switch's address table: which port a station was last heard on.
//!
//! Guests choose the source addresses of what they send, so the table is built to be filled by an enemy: it is allocated
//! once, each port has a share of it that no other port can take, and its hash is keyed.

use alloc::vec::Vec;
use core::fmt;

use hashbrown::HashTable;
use hypercall::Instant;
use netif::mac::MacAddr;

/// A port of the switch: a vif, or one of the backend domain's own. Ports are numbered densely, since each number up to the
/// greatest takes a few bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct PortId(pub u16);

impl PortId {
    /// The backend domain's own stack.
    pub const LOCAL: Self = Self(0);
    /// Its network card, and whoever is behind that.
    pub const UPLINK: Self = Self(1);
    /// Ports that are no vif's; vifs are numbered from here.
    pub(crate) const OWN: u16 = 2;

    pub(crate) const fn is_own(self) -> bool {
        self.0 < Self::OWN
    }
}

/// Where a frame goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Destination {
    /// To this port alone. If that is where it came from, the frame is to be dropped.
    Port(PortId),
    /// To every port but the one it came from.
    Flood,
}

/// What came of a frame's source address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Learned {
    /// It was known on this port; its age begins anew.
    Known,
    /// It is known from now on.
    New,
    /// It was on another port until now: the station moved, or one of the two lies.
    Moved(PortId),
    /// It is not for this port to have: no station's address, the backend's, or one the local port has. The frame is
    /// to be dropped.
    Refused,
    /// There is no room; the station's frames are flooded.
    Full,
}

/// How much of the table there is, and how much of it one port may have. Where every port is to have its share whatever
/// the others do, `total` is at least `per_port` times the number of ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SwitchLimits {
    /// Most addresses in all.
    pub total: u16,
    /// Most addresses of one port.
    pub per_port: u16,
}

impl Default for SwitchLimits {
    fn default() -> Self {
        Self { total: 4096, per_port: 256 }
    }
}

/// How long an address is remembered after it was last heard: 300 s (IEEE 802.1Q, 8.8.3), in nanoseconds.
pub const MAX_AGE: u64 = 300 * 1_000_000_000;

/// The key of the table's hash. It is to be random, and no guest may learn it.
#[derive(Clone, Copy)]
pub struct Seed(pub u64, pub u64);

impl Seed {
    /// SipHash-1-3 (Aumasson and Bernstein) of eight bytes: keyed, so that nobody outside can choose addresses that collide.
    const fn hash(self, word: u64) -> u64 {
        let mut state = [
            self.0 ^ 0x736f_6d65_7073_6575,
            self.1 ^ 0x646f_7261_6e64_6f6d,
            self.0 ^ 0x6c79_6765_6e65_7261,
            self.1 ^ 0x7465_6462_7974_6573 ^ word,
        ];
        state = Self::round(state);
        state[0] ^= word;
        let length = 8 << 56;
        state[3] ^= length;
        state = Self::round(state);
        state[0] ^= length;
        state[2] ^= 0xff;
        state = Self::round(Self::round(Self::round(state)));
        state[0] ^ state[1] ^ state[2] ^ state[3]
    }

    const fn round([mut a, mut b, mut c, mut d]: [u64; 4]) -> [u64; 4] {
        a = a.wrapping_add(b);
        b = b.rotate_left(13) ^ a;
        a = a.rotate_left(32);
        c = c.wrapping_add(d);
        d = d.rotate_left(16) ^ c;
        a = a.wrapping_add(d);
        d = d.rotate_left(21) ^ a;
        c = c.wrapping_add(b);
        b = b.rotate_left(17) ^ c;
        c = c.rotate_left(32);
        [a, b, c, d]
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("Seed(..)")
    }
}

/// No node.
const NONE: u16 = u16::MAX;

/// An end of a list, or a node's neighbours in one; `before` is towards the longest unheard.
#[derive(Clone, Copy, Debug)]
struct Links {
    before: u16,
    after: u16,
}

impl Links {
    const NONE: Self = Self { before: NONE, after: NONE };
}

/// A known address. It is in two lists, each in the order of last hearing: everybody's, and its port's.
#[derive(Clone, Copy, Debug)]
struct Node {
    mac: MacAddr,
    port: PortId,
    heard: Instant,
    /// Neighbours in everybody's list and in the port's; indexed by [`Order`].
    links: [Links; 2],
}

impl Node {
    /// What the local port has stays its own however long it is silent.
    fn is_aged(&self, now: Instant) -> bool {
        self.port != PortId::LOCAL && now.since(self.heard) > MAX_AGE
    }
}

/// Which of a node's two lists.
#[derive(Clone, Copy)]
enum Order {
    All,
    Port,
}

/// A list of nodes: the longest unheard is first.
#[derive(Clone, Copy, Debug)]
struct List {
    first: u16,
    last: u16,
    len: u16,
}

impl List {
    const EMPTY: Self = Self { first: NONE, last: NONE, len: 0 };

    fn links(nodes: &mut [Node], index: u16, order: Order) -> Option<&mut Links> {
        let [all, port] = &mut nodes.get_mut(usize::from(index))?.links;
        Some(match order {
            Order::All => all,
            Order::Port => port,
        })
    }

    fn append(&mut self, nodes: &mut [Node], index: u16, order: Order) {
        if let Some(links) = Self::links(nodes, index, order) {
            *links = Links { before: self.last, after: NONE };
        }
        match Self::links(nodes, self.last, order) {
            Some(last) => last.after = index,
            None => self.first = index,
        }
        self.last = index;
        self.len = self.len.saturating_add(1);
    }

    fn unlink(&mut self, nodes: &mut [Node], index: u16, order: Order) {
        let Some(links) = Self::links(nodes, index, order) else { return };
        let Links { before, after } = core::mem::replace(links, Links::NONE);
        match Self::links(nodes, before, order) {
            Some(node) => node.after = after,
            None => self.first = after,
        }
        match Self::links(nodes, after, order) {
            Some(node) => node.before = before,
            None => self.last = before,
        }
        self.len = self.len.saturating_sub(1);
    }

    fn touch(&mut self, nodes: &mut [Node], index: u16, order: Order) {
        if self.last != index {
            self.unlink(nodes, index, order);
            self.append(nodes, index, order);
        }
    }
}

/// A learning switch's address table. After [`Switch::new`], only the first address of a port numbered higher than any
/// before allocates. Time is expected not to run backwards.
#[derive(Debug)]
pub struct Switch {
    seed: Seed,
    limits: SwitchLimits,
    /// Indices into `nodes`, by address.
    table: HashTable<u16>,
    nodes: Vec<Node>,
    unused: Vec<u16>,
    all: List,
    ports: Vec<List>,
    /// The node of the address that was last looked up: packets come in trains.
    recent: u16,
}

impl Switch {
    /// An empty table; everything it will need for addresses is allocated here.
    #[must_use]
    pub fn new(limits: SwitchLimits, seed: Seed) -> Self {
        let total = usize::from(limits.total);
        Self {
            seed,
            limits,
            // A hash table at most half full gets rid of its tombstones in place; a fuller one grows instead.
            table: HashTable::with_capacity(2 * total),
            nodes: Vec::with_capacity(total),
            unused: Vec::with_capacity(total),
            all: List::EMPTY,
            ports: Vec::new(),
            recent: NONE,
        }
    }

    /// How many addresses are in the table, aged ones that nobody has asked about since among them.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.all.len as usize
    }

    /// Whether nothing is known.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes note that a frame with source address `src` came in by `port`.
    ///
    /// A port that has all it may have loses its own longest unheard address. What the local port has, no other can take,
    /// the uplink as little as a vif.
    pub fn learn(&mut self, src: MacAddr, port: PortId, now: Instant) -> Learned {
        let last = self.ports.get(usize::from(port.0)).map_or(NONE, |list| list.last);
        // Most frames are of whom their port heard last. An address that is in the table may be there.
        if let Some(node) = self.nodes.get_mut(usize::from(last))
            && node.mac == src
            && !node.is_aged(now)
        {
            node.heard = now;
            self.all.touch(&mut self.nodes, last, Order::All);
            return Learned::Known;
        }
        if !src.is_station() || (src == MacAddr::BACKEND && port != PortId::LOCAL) {
            return Learned::Refused;
        }
        let known =
            self.find(src).and_then(|index| Some((index, *self.nodes.get(usize::from(index))?)));
        match known {
            Some((index, node)) if node.is_aged(now) => self.remove(index),
            Some((index, node)) if node.port == port => {
                self.all.touch(&mut self.nodes, index, Order::All);
                if let Some(list) = self.ports.get_mut(usize::from(port.0)) {
                    list.touch(&mut self.nodes, index, Order::Port);
                }
                if let Some(node) = self.nodes.get_mut(usize::from(index)) {
                    node.heard = now;
                }
                return Learned::Known;
            }
            Some((_, node)) if node.port == PortId::LOCAL => return Learned::Refused,
            Some((index, node)) => {
                self.remove(index);
                return match self.insert(src, port, now) {
                    true => Learned::Moved(node.port),
                    false => Learned::Full,
                };
            }
            None => {}
        }
        if self.insert(src, port, now) { Learned::New } else { Learned::Full }
    }

    /// Where a frame for `dst` goes: to one port if the address was heard there within [`MAX_AGE`], or ever on the local one,
    /// else everywhere.
    #[must_use]
    pub fn lookup(&mut self, dst: MacAddr, now: Instant) -> Destination {
        if dst.is_multicast() {
            return Destination::Flood;
        }
        let known = self.holds(self.recent, dst).or_else(|| self.find(dst));
        self.recent = known.unwrap_or(NONE);
        match known.and_then(|index| self.nodes.get(usize::from(index))) {
            Some(node) if !node.is_aged(now) => Destination::Port(node.port),
            _ => Destination::Flood,
        }
    }

    /// Forgets every address heard on `port`: it is gone, or will be somebody else's.
    pub fn forget_port(&mut self, port: PortId) {
        while let Some(first) = self.oldest_of(port) {
            self.remove(first);
        }
    }

    /// Forgets the addresses that were last heard more than [`MAX_AGE`] ago. Nothing depends on this being called: aged
    /// addresses are never answered with, and are the first to go.
    pub fn expire(&mut self, now: Instant) {
        self.pass_over_local();
        while self.nodes.get(usize::from(self.all.first)).is_some_and(|node| node.is_aged(now)) {
            self.remove(self.all.first);
            self.pass_over_local();
        }
    }

    /// Puts the local port's addresses, which do not age, behind those that may have.
    fn pass_over_local(&mut self) {
        let local = self.ports.first().map_or(0, |list| list.len);
        for _ in 0..local {
            let first = self.all.first;
            match self.nodes.get(usize::from(first)) {
                Some(node) if node.port == PortId::LOCAL => {
                    self.all.touch(&mut self.nodes, first, Order::All);
                }
                Some(_) | None => break,
            }
        }
    }

    fn find(&self, mac: MacAddr) -> Option<u16> {
        let hash = self.seed.hash(mac.to_u64());
        let is_it =
            |index: &u16| self.nodes.get(usize::from(*index)).is_some_and(|node| node.mac == mac);
        self.table.find(hash, is_it).copied()
    }

    /// The node, if it is the address's: what is [removed](Self::remove) is in no list, and nobody's.
    fn holds(&self, index: u16, mac: MacAddr) -> Option<u16> {
        self.nodes.get(usize::from(index)).filter(|node| node.mac == mac).map(|_| index)
    }

    fn oldest_of(&self, port: PortId) -> Option<u16> {
        self.ports.get(usize::from(port.0)).map(|list| list.first).filter(|first| *first != NONE)
    }

    /// Adds an address that is not in the table. False if there is no room that is this port's to take.
    fn insert(&mut self, mac: MacAddr, port: PortId, now: Instant) -> bool {
        if self.ports.len() <= usize::from(port.0) {
            self.ports.resize(usize::from(port.0) + 1, List::EMPTY);
        }
        let have = self.ports.get(usize::from(port.0)).map_or(0, |list| list.len);
        if have >= self.limits.per_port || self.all.len >= self.limits.total {
            self.pass_over_local();
            let aged =
                self.nodes.get(usize::from(self.all.first)).is_some_and(|node| node.is_aged(now));
            let going = match aged && have < self.limits.per_port {
                true => Some(self.all.first),
                false => self.oldest_of(port),
            };
            let Some(going) = going else { return false };
            self.remove(going);
        }
        let node = Node { mac, port, heard: now, links: [Links::NONE; 2] };
        let index = match self.unused.pop() {
            Some(index) => index,
            None => {
                let Ok(index) = u16::try_from(self.nodes.len()) else { return false };
                self.nodes.push(node);
                index
            }
        };
        if let Some(place) = self.nodes.get_mut(usize::from(index)) {
            *place = node;
        }
        self.all.append(&mut self.nodes, index, Order::All);
        if let Some(list) = self.ports.get_mut(usize::from(port.0)) {
            list.append(&mut self.nodes, index, Order::Port);
        }
        let Self { seed, nodes, table, .. } = self;
        let hash_of = |index: &u16| {
            nodes.get(usize::from(*index)).map_or(0, |node| seed.hash(node.mac.to_u64()))
        };
        table.insert_unique(seed.hash(mac.to_u64()), index, hash_of);
        true
    }

    fn remove(&mut self, index: u16) {
        let Some(node) = self.nodes.get(usize::from(index)).copied() else { return };
        let hash = self.seed.hash(node.mac.to_u64());
        let Ok(entry) = self.table.find_entry(hash, |other| *other == index) else { return };
        entry.remove();
        self.all.unlink(&mut self.nodes, index, Order::All);
        if let Some(list) = self.ports.get_mut(usize::from(node.port.0)) {
            list.unlink(&mut self.nodes, index, Order::Port);
        }
        self.unused.push(index);
        if self.recent == index {
            self.recent = NONE;
        }
    }
}

#[cfg(test)]
mod tests;

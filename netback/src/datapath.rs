//! How a packet's bytes are carried: which ways there are now, and which one a packet takes.
//!
//! Everything here is a pure function of what Xen advertises, what the platform is, what the operator says and what the
//! packet is, so that all of it can be tested over its whole table. Features go without notice: what may be used is asked
//! anew for each packet, and a packet that is under way ends in the way it began.

use alloc::vec::Vec;
use core::fmt;

use bitflags::bitflags;
use features::XenFeatures;
use hypercall::{Hypervisor, Instant};

use crate::dma;

/// A way to carry bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Datapath {
    /// Grant copy into memory of ours.
    #[default]
    Copy,
    /// Headers by grant copy into memory of ours, the rest by grant copy from guest to guest.
    Direct,
    /// Headers by grant copy, the rest mapped where it is, read-only and for a bounded time.
    Map,
    /// As [`Map`](Self::Map), with a second mapping at the machine address, by which caches can be cleaned
    /// (`XENFEAT_grant_map_identity`).
    MapIdentity,
    /// Pages that the frontend agreed on in advance and that stay mapped: no grant operation at all.
    Static,
}

impl Datapath {
    /// All of them, in the order of [`index`](Self::index).
    pub const ALL: [Self; 5] =
        [Self::Copy, Self::Direct, Self::Map, Self::MapIdentity, Self::Static];

    /// Its place among [`ALL`](Self::ALL).
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Its name in tables and in the operator's word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Direct => "direct",
            Self::Map => "map",
            Self::MapIdentity => "map-identity",
            Self::Static => "static",
        }
    }

    /// The set with this one alone.
    #[must_use]
    pub const fn only(self) -> Datapaths {
        Datapaths::from_bits_truncate(1 << self as u8)
    }
}

impl fmt::Display for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

bitflags! {
    /// Some of the ways.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct Datapaths: u8 {
        /// [`Datapath::Copy`]: always there, and not to be taken away.
        const COPY = 1 << Datapath::Copy as u8;
        /// [`Datapath::Direct`]
        const DIRECT = 1 << Datapath::Direct as u8;
        /// [`Datapath::Map`]
        const MAP = 1 << Datapath::Map as u8;
        /// [`Datapath::MapIdentity`]
        const MAP_IDENTITY = 1 << Datapath::MapIdentity as u8;
        /// [`Datapath::Static`]
        const STATIC = 1 << Datapath::Static as u8;
    }
}

impl Datapaths {
    /// Each by itself.
    pub fn each(self) -> impl Iterator<Item = Datapath> {
        Datapath::ALL.into_iter().filter(move |path| self.contains(path.only()))
    }

    /// The way to map, if there is one. With both, the plain one: it costs less.
    #[must_use]
    pub fn mapping(self) -> Option<Datapath> {
        let found = [Datapath::Map, Datapath::MapIdentity].into_iter();
        found.into_iter().find(|path| self.contains(path.only()))
    }
}

impl fmt::Display for Datapaths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, path) in self.each().enumerate() {
            write!(f, "{}{path}", if index > 0 { " " } else { "" })?;
        }
        Ok(())
    }
}

/// What a domain runs on, as far as mapping is concerned.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Arch {
    /// 32 or 64 bits.
    Arm,
    /// Likewise.
    X86,
}

/// A network card: a device that reads and writes memory by bus address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Nic {
    /// It sees what the processor has in its caches, and the processor sees what it writes.
    pub coherent: bool,
}

/// What Xen's bits do not say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Facts {
    /// What the domain runs on.
    pub arch: Arch,
    /// `GNTTABOP_copy` exists. Where it does not, its work is done by mapping.
    pub grant_copy: bool,
    /// `GNTTABOP_cache_flush` exists.
    pub cache_flush: bool,
    /// What is mapped is entered in the domain's IOMMU tables (CPUID leaf base+4, EAX bit 2). x86 alone.
    pub iommu_maps: bool,
    /// The card behind the switch's uplink, if there is one.
    pub uplink: Option<Nic>,
}

impl Facts {
    /// Asks Xen what can be asked.
    pub fn probe(hv: &impl Hypervisor, arch: Arch, iommu_maps: bool, uplink: Option<Nic>) -> Self {
        Self {
            arch,
            grant_copy: !grant::copy_is_missing(hv),
            cache_flush: dma::has_cache_flush(hv),
            iommu_maps,
            uplink,
        }
    }
}

/// What the operator wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Ways that may be used where they are possible.
    pub allowed: Datapaths,
    /// Bytes from which a packet for another guest goes by [`Datapath::Direct`]. It takes an operation of Xen's more than copying
    /// does, for the headers, and one less for each page.
    pub direct_from: u16,
    /// Bytes from which a packet for the local port or the uplink is mapped: that takes two operations for each page, and one for
    /// the headers.
    pub map_from: u16,
    /// Nanoseconds that a way must have been possible again before it is taken up again: one that comes and goes
    /// does not make packets change their way each time.
    pub settle: u64,
    /// Nanoseconds that a mapped packet may wait at the local port or the uplink before its bytes are copied and the guest
    /// gets its pages back.
    pub hold: u64,
    /// Packets that may be mapped at a time, those among them that the card is sending.
    pub max_lent: u16,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            allowed: Datapaths::all(),
            direct_from: 4096,
            map_from: 4096,
            settle: 100_000_000,
            hold: 1_000_000_000,
            max_lent: 64,
        }
    }
}

/// Ways, by where a packet goes: a card has to find what is mapped, a processor does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ways {
    /// To guests, and to the backend domain's own stack.
    pub local: Datapaths,
    /// To the uplink; none at all if there is none.
    pub uplink: Datapaths,
}

impl Ways {
    /// Both together.
    #[must_use]
    pub fn any(self) -> Datapaths {
        self.local | self.uplink
    }

    fn both_mut(&mut self) -> [&mut Datapaths; 2] {
        [&mut self.local, &mut self.uplink]
    }

    const fn both(self) -> [Datapaths; 2] {
        [self.local, self.uplink]
    }
}

impl core::ops::BitAnd<Datapaths> for Ways {
    type Output = Self;

    fn bitand(self, paths: Datapaths) -> Self {
        Self { local: self.local & paths, uplink: self.uplink & paths }
    }
}

/// The ways that are possible at all.
#[must_use]
pub fn possible(bits: XenFeatures, facts: &Facts) -> Ways {
    // Without translation a map takes the address of a page table entry, which is another story.
    let maps = bits.contains(XenFeatures::AUTO_TRANSLATED_PHYSMAP);
    let mut local = Datapaths::COPY;
    local.set(Datapaths::STATIC, maps);
    let mut uplink = if facts.uplink.is_some() { local } else { Datapaths::empty() };
    // Between guests nothing is ever mapped: no bit says whether it may be done.
    local.set(Datapaths::DIRECT, facts.grant_copy);
    local.set(Datapaths::MAP, maps);
    match dma::rule(bits, facts) {
        Some(rule) if rule.needs_identity() => uplink.insert(Datapaths::MAP_IDENTITY),
        Some(_) => uplink.insert(Datapaths::MAP),
        None => {}
    }
    Ways { local, uplink }
}

/// Where a packet goes, as far as its way is concerned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// One other guest.
    Guest {
        /// It has pages posted for the packet.
        ready: bool,
        /// It takes the packet as it is.
        as_is: bool,
    },
    /// The local port.
    Local {
        /// One more packet may be mapped.
        room: bool,
    },
    /// The uplink.
    Uplink {
        /// Likewise.
        room: bool,
    },
    /// Several ports.
    Many,
}

/// Why a packet that might have gone another way is copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fallback {
    /// The way is withdrawn, or not possible here.
    Withdrawn,
    /// The destination has not posted pages enough.
    NotReady,
    /// The packet has to be changed on the way.
    Changed,
    /// It goes to several ports.
    Many,
    /// As many packets are mapped as may be.
    NoRoom,
}

/// How much of a packet is copied before it is known where it goes.
#[must_use]
pub fn first_look(up: Datapaths, policy: &Policy, size: u16, all_static: bool) -> Datapath {
    let from = |set: Datapaths, bytes: u16| up.intersects(set) && size >= bytes;
    if all_static && up.contains(Datapaths::STATIC) {
        Datapath::Static
    } else if from(Datapaths::DIRECT, policy.direct_from)
        || from(Datapaths::MAP | Datapaths::MAP_IDENTITY, policy.map_from)
    {
        Datapath::Direct
    } else {
        Datapath::Copy
    }
}

/// The way of a packet of `size` bytes whose headers have been looked at.
///
/// # Errors
/// It is to be copied, for this reason. (One that is too small for anything else is not an error: it is copied.)
pub fn choose(up: Ways, policy: &Policy, size: u16, target: Target) -> Result<Datapath, Fallback> {
    let (mapping, room) = match target {
        Target::Local { room } => (up.local.mapping(), room),
        Target::Uplink { room } => (up.uplink.mapping(), room),
        Target::Guest { .. } | Target::Many => (None, false),
    };
    match target {
        Target::Many if size < policy.direct_from.min(policy.map_from) => Ok(Datapath::Copy),
        Target::Many => Err(Fallback::Many),
        Target::Guest { .. } if size < policy.direct_from => Ok(Datapath::Copy),
        Target::Guest { .. } if !up.local.contains(Datapaths::DIRECT) => Err(Fallback::Withdrawn),
        Target::Guest { as_is: false, .. } => Err(Fallback::Changed),
        Target::Guest { ready: false, .. } => Err(Fallback::NotReady),
        Target::Guest { .. } => Ok(Datapath::Direct),
        Target::Local { .. } | Target::Uplink { .. } if size < policy.map_from => {
            Ok(Datapath::Copy)
        }
        Target::Local { .. } | Target::Uplink { .. } => match mapping {
            None => Err(Fallback::Withdrawn),
            Some(_) if !room => Err(Fallback::NoRoom),
            Some(path) => Ok(path),
        },
    }
}

/// The operator's word: what is not to be used, whatever Xen advertises.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Withdrawal {
    /// Ways.
    pub paths: Datapaths,
    /// Feature bits.
    pub bits: XenFeatures,
}

impl Default for Withdrawal {
    fn default() -> Self {
        Self { paths: Datapaths::empty(), bits: XenFeatures::empty() }
    }
}

impl Withdrawal {
    /// Reads a list of words: names of ways, names of feature bits as in features.h without `XENFEAT_`, or their
    /// numbers. Answers the words that are none of these, too; they change nothing.
    #[must_use]
    pub fn parse(text: &str) -> (Self, Vec<&str>) {
        let mut withdrawal = Self::default();
        let words = text.split(|c: char| c.is_ascii_whitespace() || c == ',');
        let unknown = words
            .filter(|word| !word.is_empty())
            .filter(|word| {
                if let Some(path) = Datapath::ALL.into_iter().find(|path| path.name() == *word) {
                    withdrawal.paths |= path.only();
                } else if let Some(bit) = feature(word) {
                    withdrawal.bits |= bit;
                } else {
                    return true;
                }
                false
            })
            .collect();
        (withdrawal, unknown)
    }
}

/// A feature bit by its number or name.
fn feature(word: &str) -> Option<XenFeatures> {
    if let Ok(number) = word.parse::<u32>() {
        return 1_u32.checked_shl(number).map(XenFeatures::from_bits_retain);
    }
    let mut named = XenFeatures::all().iter_names();
    named.find(|(name, _)| name.eq_ignore_ascii_case(word)).map(|(_, bit)| bit)
}

/// The ways that are in use now. A way that goes is gone at once; one that comes back has to stay for a while first.
#[derive(Clone, Debug)]
pub struct Modes {
    up: Ways,
    /// When each way became possible again that is not yet up.
    since: [[Option<Instant>; Datapath::ALL.len()]; 2],
    /// Times that `up` changed.
    switches: u64,
}

impl Modes {
    /// What is possible at the start is up at once.
    #[must_use]
    pub const fn new(wanted: Ways) -> Self {
        Self { up: wanted, since: [[None; Datapath::ALL.len()]; 2], switches: 0 }
    }

    /// Ways that may be taken by new packets.
    #[must_use]
    pub const fn up(&self) -> Ways {
        self.up
    }

    /// How often that changed.
    #[must_use]
    pub const fn switches(&self) -> u64 {
        self.switches
    }

    /// Takes account of what may be used from now on.
    pub fn update(&mut self, wanted: Ways, policy: &Policy, now: Instant) {
        let mut next = self.up;
        for ((up, wanted), since) in
            next.both_mut().into_iter().zip(wanted.both()).zip(&mut self.since)
        {
            let was = *up;
            *up &= wanted;
            for (path, since) in Datapath::ALL.into_iter().zip(since) {
                if !wanted.contains(path.only()) || was.contains(path.only()) {
                    *since = None;
                } else if now >= since.get_or_insert(now).after(policy.settle) {
                    *since = None;
                    *up |= path.only();
                }
            }
        }
        if next != self.up {
            self.up = next;
            self.switches += 1;
        }
    }

    /// When [`update`](Self::update) will have something to do though nothing changes.
    #[must_use]
    pub fn deadline(&self, policy: &Policy) -> Option<Instant> {
        self.since.iter().flatten().flatten().map(|since| since.after(policy.settle)).min()
    }
}

#[cfg(test)]
mod tests;

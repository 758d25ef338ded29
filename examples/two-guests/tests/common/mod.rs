//! A machine whose datapaths come and go while packets fly, and what must be true of it all the time and afterwards.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::num::NonZeroUsize;

use features::XenFeatures;
use hypercall::{DomId, GrantStatus, Handle};
use netback::counters::PathCounters;
use netback::datapath::{Datapath, Datapaths, Policy, Withdrawal};
use sim::{Fault, FaultPlan, Item, Kind};
use two_guests::{Board, Config, GuestConfig, Place, Random, SECOND, Sizes, Tally, World};

/// Nanoseconds of a round.
const TICK: u64 = 10_000;
/// The largest packet that there is.
const LARGEST: usize = 65_535;

/// By whose doing a datapath goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// The operator forbids the way,
    Word,
    /// or a bit that it needs.
    Bit(XenFeatures),
    /// Xen advertises other bits, and the backend looks, as after a resume.
    Xen(XenFeatures),
    /// Xen advertises other bits, and nobody is told.
    Silent(XenFeatures),
    /// There is another Xen after a resume, as in 2014: one that cleans caches and advertises no identity mapping.
    Update,
}

impl Source {
    /// Why `path` may go and leave `other`.
    fn of(path: Datapath, other: Datapath, board: Board) -> Vec<Self> {
        let (translated, identity) =
            (XenFeatures::AUTO_TRANSLATED_PHYSMAP, XenFeatures::GRANT_MAP_IDENTITY);
        let moved = XenFeatures::DIRECT_MAPPED | XenFeatures::NOT_DIRECT_MAPPED;
        let mut all = vec![Self::Word];
        match path {
            Datapath::Copy | Datapath::Direct => return all,
            Datapath::Map if board == Board::Arm => all.push(Self::Xen(moved)),
            Datapath::MapIdentity => {
                all.extend([Self::Bit(identity), Self::Xen(identity), Self::Silent(identity)]);
            }
            Datapath::Map | Datapath::Static => {}
        }
        if matches!(other, Datapath::Copy | Datapath::Direct) {
            all.extend([Self::Bit(translated), Self::Xen(translated)]);
        }
        all
    }
}

/// Two datapaths that take turns.
pub struct Flips {
    pub world: World,
    pair: [Datapath; 2],
    board: Board,
    random: Random,
    /// Which of the two is there, and why the other is not.
    there: usize,
    source: Source,
    domain: DomId,
    /// What Xen advertises when nothing is withdrawn.
    bits: XenFeatures,
}

/// The mappings that are rings: two of each of three queues, and a control ring of each guest.
const RINGS: usize = 8;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub pair: [Datapath; 2],
    pub seed: u64,
    pub first_index: u32,
    pub flips: usize,
}

fn buffers(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

impl Flips {
    /// Two guests and the outside, each of which has flows to the others, connected.
    pub fn new(Plan { pair, seed, first_index, .. }: Plan) -> Self {
        let has = |path| pair.contains(&path);
        let board = match seed % 2 {
            _ if has(Datapath::MapIdentity) => Board::Arm2014,
            0 => Board::Arm,
            _ => Board::Server,
        };
        let mut config = Config { seed, tick: TICK, ..Config::default() }.on(board);
        config.backend.small_buffers = buffers(512);
        config.backend.large_buffers = buffers(64);
        config.backend.policy = Policy {
            allowed: pair[0].only() | pair[1].only() | Datapaths::COPY,
            direct_from: 256,
            map_from: 256,
            settle: TICK,
            ..Policy::default()
        };
        let mut world = World::new(config);
        // The second has pages for two of the largest packets, or several small ones.
        for (queues, posted) in [(2, 256), (1, 40)] {
            let frontend = netfront::Config {
                first_index,
                queues,
                posted,
                static_grants: has(Datapath::Static),
                ..netfront::Config::new(Handle(0))
            };
            let guest = GuestConfig { frontend, max_frame: LARGEST, ..GuestConfig::default() };
            world.add_guest(guest).unwrap();
        }
        world.connect().unwrap();
        let domain = world.backend().unwrap().hv.id();
        let [one, other, outside] = [Place::Guest(0), Place::Guest(1), Place::Outside];
        for (from, to, sizes) in [
            (one, other, Sizes::Spread(LARGEST)),
            (other, one, Sizes::Segmented(LARGEST)),
            (one, outside, Sizes::Segmented(LARGEST)),
            (other, outside, Sizes::Spread(LARGEST)),
            (outside, one, Sizes::Mixed(1514)),
            (outside, other, Sizes::Fixed(64)),
        ] {
            world.flow(from, to, sizes, 3);
        }
        let bits = XenFeatures::from_bits_retain(board.domain().features);
        Self {
            world,
            pair,
            board,
            random: Random::new(seed),
            there: 0,
            source: Source::Word,
            domain,
            bits,
        }
    }

    /// Gives turns to everybody, so often.
    fn rounds(&mut self, count: usize) {
        for _ in 0..count {
            let next = self.world.now.after(TICK);
            self.world.round(next);
        }
    }

    /// The one goes and the other comes. Copy is always there: of a pair with it, the other just goes and comes.
    fn flip(&mut self) {
        let leaves = self.pair[self.there];
        self.there = 1 - self.there;
        // With the same bits only one way to map is possible.
        let updates = self.pair == [Datapath::MapIdentity, Datapath::Map];
        if self.there == 0 && (updates || leaves == Datapath::Copy) {
            self.world.sim.set_cache_flush(self.domain, self.board == Board::Arm);
            return self.set(Withdrawal::default(), self.bits, true);
        }
        let sources = Source::of(leaves, self.pair[self.there], self.board);
        self.source =
            if updates { Source::Update } else { sources[self.random.below(sources.len())] };
        self.withdraw(leaves);
        let (driver, card) = (self.random.once_in(4), self.random.once_in(4));
        self.world.uplink_mut().hold(driver, card);
        if is_map(leaves) && self.random.once_in(8) {
            // When it is back, Xen refuses once.
            let fault = Fault::Status(GrantStatus::NO_SPACE);
            self.world.sim.inject(self.domain, FaultPlan::next(Kind::Map, fault));
        }
    }

    fn withdraw(&mut self, path: Datapath) {
        let word = |paths, bits| Withdrawal { paths, bits };
        let (none, bits) = (Withdrawal::default(), self.bits);
        match self.source {
            Source::Word => self.set(word(path.only(), XenFeatures::empty()), bits, true),
            Source::Bit(bit) => self.set(word(Datapaths::empty(), bit), bits, true),
            Source::Xen(bit) => self.set(none, bits ^ bit, true),
            Source::Silent(bit) => self.set(none, bits ^ bit, false),
            Source::Update => {
                self.world.sim.set_cache_flush(self.domain, true);
                self.set(none, bits - XenFeatures::GRANT_MAP_IDENTITY, true);
            }
        }
    }

    fn set(&mut self, withdrawal: Withdrawal, bits: XenFeatures, look: bool) {
        self.world.sim.set_features(self.domain, bits.bits());
        let backend = &mut self.world.backend_mut().unwrap().backend;
        backend.set_withdrawn(&withdrawal);
        if look {
            backend.refresh_features().unwrap();
        }
    }

    /// Pages of packets that are mapped.
    fn lent(&self) -> usize {
        let kept: usize =
            self.world.guests().map(|guest| guest.nic.frontend().static_grants()).sum();
        mappings(&self.world, self.domain).saturating_sub(RINGS + kept)
    }

    /// What is withdrawn is not in use, once the backend has had its turn.
    fn assert_withdrawn(&self) {
        let withdrawn = self.pair[1 - self.there];
        if withdrawn != Datapath::Copy && !matches!(self.source, Source::Silent(_)) {
            let up = self.world.backend().unwrap().backend.datapaths();
            let up = if is_map(withdrawn) { up.uplink } else { up.local };
            assert!(!up.contains(withdrawn.only()), "{withdrawn} by {:?}", self.source);
        }
    }

    /// What is mapped in a mode that goes is unmapped within a second, though packets fly.
    fn assert_unmapped_soon(&mut self) {
        let withdrawn = self.pair[self.there];
        self.flip();
        self.world.uplink_mut().hold(false, false);
        let since = self.world.now;
        let left = |flips: &Self| match withdrawn {
            Datapath::Map | Datapath::MapIdentity => flips.lent(),
            Datapath::Static if !is_map(flips.pair[flips.there]) => {
                mappings(&flips.world, flips.domain) - RINGS
            }
            // Pages that are mapped for packets come and go.
            Datapath::Static | Datapath::Copy | Datapath::Direct => 0,
        };
        let step = if withdrawn == Datapath::Static { 100 } else { 1 };
        while left(self) > 0 {
            assert!(self.world.now.since(since) < SECOND, "{} pages", left(self));
            self.rounds(step);
        }
    }

    /// What the backend did on behalf of all guests, by a datapath.
    pub fn carried(&self, path: Datapath) -> PathCounters {
        let mut sum = PathCounters::default();
        for guest in 0..2 {
            let counters = self.world.vif(guest).unwrap().counters;
            sum += counters.tx_paths.of(path);
            sum += counters.rx_paths.of(path);
        }
        sum
    }

    fn switches(&self) -> u64 {
        self.world.backend().unwrap().backend.switches()
    }

    /// Everything arrives, and nothing is held by anybody any more.
    fn end(mut self) -> Tally {
        self.world.uplink_mut().hold(false, false);
        let tally = self.world.finish();
        assert!(tally.is_clean(), "{tally}\n{}", self.world.drops());
        assert_eq!(tally.excused, 0);
        assert_eq!(self.lent(), 0, "{}", self.world.ledger());
        let backend = &self.world.backend().unwrap().backend;
        assert_eq!(backend.open(), 0);
        // The card has some to receive into.
        assert_eq!(backend.pools().all().out(), self.world.uplink().posted());
        assert_eq!(self.world.uplink().bad_sums(), 0);
        let dma = self.world.uplink().dma();
        assert_eq!((dma.faults, dma.stray, dma.stale), (0, 0, 0), "{dma:?}");
        let guests: Vec<_> = self.world.guests().map(|guest| guest.id()).collect();
        for id in &guests {
            assert_eq!(self.world.sim.refused_grants(*id), 0);
        }
        assert_eq!(self.world.sim.violations(), Vec::<String>::new());
        for (index, id) in guests.into_iter().enumerate() {
            self.world.kill_guest(index);
            self.rounds(2);
            assert_eq!(self.world.ledger().concerning(id).to_string(), "");
        }
        tally
    }
}

/// How many pages of others a domain has mapped.
fn mappings(world: &World, domain: DomId) -> usize {
    let ledger = world.ledger();
    let is_mapping = |(_, item): &(DomId, Item)| matches!(item, Item::Mapping { .. });
    ledger.held_by(domain).entries().filter(is_mapping).count()
}

/// Whether pages are mapped for a while.
fn is_map(path: Datapath) -> bool {
    matches!(path, Datapath::Map | Datapath::MapIdentity)
}

/// Runs a plan and answers what was sent and arrived.
pub fn run(plan: Plan) -> Tally {
    let mut flips = Flips::new(plan);
    let every = (plan.flips / 8).max(1);
    let mut done = 0;
    while done < plan.flips || flips.switches() < plan.flips as u64 {
        assert!(done < plan.flips * 4, "{} switches", flips.switches());
        flips.flip();
        // Now and then nobody has a chance to notice.
        let rounds = [0, 1, 2, 2, 2, 2, 3, 4][flips.random.below(8)];
        flips.rounds(rounds);
        if rounds > 0 {
            flips.assert_withdrawn();
        }
        if done % every == 0 {
            flips.assert_unmapped_soon();
        }
        done += 1;
    }
    let all: u64 = Datapath::ALL.iter().map(|path| flips.carried(*path).packets).sum();
    println!("{plan:?}: {} switches, {all} packets", flips.switches());
    for path in Datapath::ALL {
        println!("  {path:12} {:?}", flips.carried(path));
    }
    // A driver that is held back for a while hands in no acknowledgements either.
    for path in plan.pair {
        let packets = flips.carried(path).packets;
        assert!(packets > plan.flips as u64 / 8, "{packets} of {all} packets by {path}");
    }
    let unused = Datapath::ALL
        .into_iter()
        .filter(|path| *path != Datapath::Copy && !plan.pair.contains(path));
    for path in unused {
        assert_eq!(flips.carried(path).packets, 0, "{path}");
    }
    flips.end()
}

//! One thread, virtual time, and an order of things that a seed decides: the same seed, the same run.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hypercall::{Instant, VcpuId};

use crate::SimHv;
use crate::domain::Handle;

/// Nanoseconds that a step takes at most.
const LONGEST_STEP: u64 = 2_000;
/// Steps that are told of when a test fails.
const TOLD: usize = 16;

/// Numbers that look random and are decided by a seed (SplitMix64). Not for secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rng(u64);

impl Rng {
    /// The numbers of a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 if that is 0.
    pub const fn below(&mut self, end: u64) -> u64 {
        ((self.bits() as u128 * end as u128) >> 64) as u64
    }

    /// Whether something happens that does so once in `of` times.
    pub const fn once_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    /// One of several.
    pub fn choose<'t, T>(&mut self, from: &'t [T]) -> Option<&'t T> {
        from.get(self.below(from.len() as u64) as usize)
    }

    /// Fills `to` with bytes.
    pub fn fill(&mut self, to: &mut [u8]) {
        for piece in to.chunks_mut(8) {
            for (to, from) in piece.iter_mut().zip(self.bits().to_le_bytes()) {
                *to = from;
            }
        }
    }

    /// Another generator, whose numbers have nothing to do with those to come from this one.
    #[must_use]
    pub const fn fork(&mut self) -> Self {
        Self(self.bits())
    }
}

/// Virtual time. All clones are the same clock.
#[derive(Clone, Debug, Default)]
pub struct Clock(Arc<AtomicU64>);

impl Clock {
    /// What it says.
    #[must_use]
    pub fn now(&self) -> Instant {
        Instant(self.0.load(Ordering::SeqCst))
    }

    /// Time passes.
    pub fn advance(&self, nanos: u64) {
        self.0.fetch_add(nanos, Ordering::SeqCst);
    }

    fn reach(&self, time: Instant) {
        self.0.fetch_max(time.0, Ordering::SeqCst);
    }
}

/// What an actor's turn came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It did something and may have more to do.
    Ran,
    /// It had nothing to do.
    Idle,
    /// It had nothing to do and wants to look again at that time, if nothing else wakes it before.
    IdleUntil(Instant),
    /// It wants no more turns.
    Done,
}

/// Somebody who takes turns: a driver's poll, a peer, a guest's kernel, an operator. Closures are actors.
pub trait Actor {
    /// Takes a turn.
    fn turn(&mut self, now: Instant) -> Turn;
}

impl<F: FnMut(Instant) -> Turn> Actor for F {
    fn turn(&mut self, now: Instant) -> Turn {
        self(now)
    }
}

/// Why a run stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Nobody has anything to do, ever.
    Quiet,
    /// What was waited for has come true.
    Met,
    /// It took as many turns as it was allowed.
    Turns,
}

struct Entry<'a> {
    name: &'static str,
    actor: Box<dyn Actor + 'a>,
    /// How often it is chosen, against others.
    weight: u64,
    last: Turn,
    /// Something happened since its last turn.
    stirred: bool,
    /// Only an upcall of this domain's counts as something.
    upcalls: Option<Arc<Handle>>,
}

impl Entry<'_> {
    fn may_run(&self, now: Instant) -> bool {
        let woken = match &self.upcalls {
            Some(own) => own.takes_upcall(VcpuId(0)),
            None => self.stirred,
        };
        match self.last {
            Turn::Ran => true,
            Turn::Idle => woken,
            Turn::IdleUntil(time) => woken || time <= now,
            Turn::Done => false,
        }
    }
}

/// Actors, and the order in which they take turns. If a test panics while one lives, it prints the seed and the last turns.
pub struct Schedule<'a> {
    seed: u64,
    rng: Rng,
    clock: Clock,
    actors: Vec<Entry<'a>>,
    turns: u64,
    told: [&'static str; TOLD],
}

impl fmt::Debug for Schedule<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, turns, told, .. } = self;
        let now = self.clock.now().0;
        write!(f, "seed {seed:#x}, {now} ns, after {turns} turns, the last of ")?;
        let first = turns.saturating_sub(TOLD as u64);
        let last = (first..*turns).filter_map(|turn| told.get(turn as usize % TOLD).copied());
        f.write_str(&last.collect::<Vec<_>>().join(", "))
    }
}

impl Drop for Schedule<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{self:?}");
        }
    }
}

impl<'a> Schedule<'a> {
    /// A schedule without actors, at time 0.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            rng: Rng::new(seed),
            clock: Clock::default(),
            actors: Vec::new(),
            turns: 0,
            told: [""; TOLD],
        }
    }

    /// Its clock.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// Numbers for an actor or a test, decided by the seed.
    pub fn rng(&mut self) -> Rng {
        self.rng.fork()
    }

    /// Turns taken so far.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.turns
    }

    /// An actor that is polled: after it was idle it gets a turn again whenever another has done something.
    pub fn polled(&mut self, name: &'static str, actor: impl Actor + 'a) -> &mut Self {
        self.add(name, None, Box::new(actor))
    }

    /// An actor that runs in a domain and sleeps when it is idle: nothing but an upcall of the domain's, or the time it asked
    /// for, gives it a turn again. It must take the upcall, and a wake-up that was lost is lost.
    pub fn woken(&mut self, name: &'static str, hv: &SimHv, actor: impl Actor + 'a) -> &mut Self {
        self.add(name, Some(hv.own_handle()), Box::new(actor))
    }

    fn add(
        &mut self,
        name: &'static str,
        upcalls: Option<Arc<Handle>>,
        actor: Box<dyn Actor + 'a>,
    ) -> &mut Self {
        // Some are fast and some are slow, in a way that differs from seed to seed.
        let weight = 1 << self.rng.below(4);
        let entry = Entry { name, actor, weight, last: Turn::Ran, stirred: true, upcalls };
        self.actors.push(entry);
        self
    }

    /// Lets actors take turns until all is quiet, at most so many.
    pub fn run(&mut self, turns: u64) -> Stop {
        self.run_until(turns, || false)
    }

    /// Lets actors take turns until `met` says so, all is quiet, or so many are taken. Asks `met` first, and after each turn.
    pub fn run_until(&mut self, turns: u64, mut met: impl FnMut() -> bool) -> Stop {
        for _ in 0..turns {
            if met() {
                return Stop::Met;
            }
            if !self.turn() {
                return Stop::Quiet;
            }
        }
        if met() { Stop::Met } else { Stop::Turns }
    }

    /// Somebody's turn; `false` if nobody wants one.
    fn turn(&mut self) -> bool {
        let Some(index) = self.next() else { return false };
        if let Some(told) = self.told.get_mut(self.turns as usize % TOLD) {
            *told = self.actors.get(index).map_or("", |entry| entry.name);
        }
        self.turns += 1;
        self.clock.advance(1 + self.rng.below(LONGEST_STEP));
        let Some(entry) = self.actors.get_mut(index) else { return false };
        entry.stirred = false;
        entry.last = entry.actor.turn(self.clock.now());
        if matches!(entry.last, Turn::Ran | Turn::Done) {
            for (_, other) in self.actors.iter_mut().enumerate().filter(|(at, _)| *at != index) {
                other.stirred = true;
            }
        }
        true
    }

    /// Whose turn it is. If nobody has anything to do now, time passes until somebody has.
    fn next(&mut self) -> Option<usize> {
        loop {
            let now = self.clock.now();
            let ready = || self.actors.iter().enumerate().filter(|(_, actor)| actor.may_run(now));
            let all: u64 = ready().map(|(_, actor)| actor.weight).sum();
            if all != 0 {
                let mut drawn = self.rng.clone();
                let mut left = drawn.below(all);
                let chosen = ready().find(|(_, actor)| {
                    let chosen = left < actor.weight;
                    left = left.saturating_sub(actor.weight);
                    chosen
                });
                let chosen = chosen.map(|(index, _)| index);
                self.rng = drawn;
                return chosen;
            }
            let times = self.actors.iter().filter_map(|actor| match actor.last {
                Turn::IdleUntil(time) => Some(time),
                Turn::Ran | Turn::Idle | Turn::Done => None,
            });
            let first = times.min()?;
            self.clock.reach(first);
        }
    }
}

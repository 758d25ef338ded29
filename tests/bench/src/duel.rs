//! Two threads on two processors, and how many packets a second they carry.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// What one thread does until it is over.
pub type Half<'a> = Box<dyn FnMut(&Control) + Send + 'a>;

/// Something whose two halves send each other packets.
pub trait Subject {
    /// What the first processor does, and what the second.
    fn halves(&mut self) -> [Half<'_>; 2];

    /// Packets so far.
    fn begin(&mut self) -> u64 {
        0
    }

    /// Each half has a turn, in this thread; `false` if that cannot be.
    fn step(&mut self) -> bool {
        false
    }

    /// Whether all went as it should, when all runs are over.
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// A line of its own for each, so that nobody pays for another's.
#[repr(align(128))]
struct Line<T>(T);

/// What the two threads share with whoever measures.
pub struct Control {
    over: Line<AtomicBool>,
    done: Line<AtomicU64>,
}

impl Control {
    #[inline]
    pub fn is_over(&self) -> bool {
        self.over.0.load(Ordering::Relaxed)
    }

    /// Packets that arrived, as of now.
    #[inline]
    pub fn set_done(&self, packets: u64) {
        self.done.0.store(packets, Ordering::Relaxed);
    }

    #[inline]
    pub fn done(&self) -> u64 {
        self.done.0.load(Ordering::Relaxed)
    }

    /// Where a program that is not Rust finds the two.
    pub fn raw(&self) -> (*mut bool, *mut u64) {
        (self.over.0.as_ptr(), self.done.0.as_ptr())
    }
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Packets per second.
    pub rate: f64,
    /// The share of the time in which somebody else had one of the processors.
    pub lost: f64,
}

/// Time of the processor's that this thread has used.
fn used() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// How far apart two processors are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Class {
    /// They share a core or a cache.
    Near,
    Far,
}

impl Class {
    pub const ALL: [Self; 2] = [Self::Near, Self::Far];
    /// Nanoseconds of a ping-pong of one cache line, one way, from which processors are far apart: where such machines as
    /// this was written on lie, near ones are at 50 and far ones above 300.
    const FAR: f64 = 130.0;

    pub const fn name(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Far => "far",
        }
    }
}

/// The two processors.
#[derive(Clone, Copy, Debug)]
pub struct Arena {
    pub processors: [usize; 2],
}

impl Arena {
    pub fn find() -> Result<Self> {
        let mine = sched_getaffinity(Pid::from_raw(0)).context("cannot ask for processors")?;
        let mut all = (0..CpuSet::count()).filter(|cpu| mine.is_set(*cpu).unwrap_or(false));
        let two = all.next().zip(all.next());
        let (first, second) = two.ok_or_else(|| anyhow!("two processors are needed"))?;
        Ok(Self { processors: [first, second] })
    }

    fn pin(processor: usize) {
        let mut set = CpuSet::new();
        // Where it cannot be had the figures are worse, and the probe says so.
        let _ = set.set(processor).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    }

    /// Has a subject run for `warm_up` and then for `length`.
    pub fn run(&self, subject: &mut dyn Subject, warm_up: Duration, length: Duration) -> Run {
        let control = Control {
            over: Line(AtomicBool::new(false)),
            done: Line(AtomicU64::new(subject.begin())),
        };
        thread::scope(|scope| {
            let halves =
                subject.halves().into_iter().zip(self.processors).map(|(mut half, cpu)| {
                    let control = &control;
                    scope.spawn(move || {
                        Self::pin(cpu);
                        let (begin, used) = (Instant::now(), used());
                        half(control);
                        let (used, took) = (self::used() - used, begin.elapsed());
                        1.0 - used.as_secs_f64() / took.as_secs_f64()
                    })
                });
            let halves: Vec<_> = halves.collect();
            thread::sleep(warm_up);
            let (begin, first) = (Instant::now(), control.done());
            thread::sleep(length);
            let (last, took) = (control.done(), begin.elapsed());
            control.over.0.store(true, Ordering::Relaxed);
            let lost = halves.into_iter().map(|half| half.join().unwrap_or(1.0));
            Run {
                rate: last.wrapping_sub(first) as f64 / took.as_secs_f64(),
                lost: lost.fold(0.0, f64::max),
            }
        })
    }

    /// Has a subject run in this thread alone until that has used so much of its processor: nanoseconds of that for a packet.
    /// What others do meanwhile, and where the processors are, matters little here.
    pub fn alone(subject: &mut dyn Subject, length: Duration) -> Option<f64> {
        let (begin, first) = (used(), subject.begin());
        let mut took = Duration::ZERO;
        while took < length {
            for _ in 0..16 {
                if !subject.step() {
                    return None;
                }
            }
            took = used() - begin;
        }
        let packets = subject.begin().wrapping_sub(first);
        (packets > 0).then(|| took.as_nanos() as f64 / packets as f64)
    }

    /// A ping-pong of one cache line: nanoseconds one way.
    pub fn probe(&self) -> f64 {
        const ROUNDS: u64 = 4000;
        let ball = Line(AtomicU64::new(0));
        let [first, second] = self.processors;
        thread::scope(|scope| {
            let ball = &ball.0;
            scope.spawn(move || {
                Self::pin(second);
                for round in 0..ROUNDS {
                    while ball.load(Ordering::Acquire) != 2 * round + 1 {
                        std::hint::spin_loop();
                    }
                    ball.store(2 * round + 2, Ordering::Release);
                }
            });
            let server = scope.spawn(move || {
                Self::pin(first);
                let mut begin = Instant::now();
                let mut best = f64::INFINITY;
                for round in 0..ROUNDS {
                    ball.store(2 * round + 1, Ordering::Release);
                    while ball.load(Ordering::Acquire) != 2 * round + 2 {
                        std::hint::spin_loop();
                    }
                    // The best of several stretches: in the others somebody else was on a processor.
                    if round % 500 == 499 {
                        best = best.min(begin.elapsed().as_nanos() as f64 / 1000.0);
                        begin = Instant::now();
                    }
                }
                best
            });
            server.join().unwrap_or(f64::INFINITY)
        })
    }

    /// Near or far, now.
    pub fn class(&self) -> (Class, f64) {
        let nanos = self.probe();
        (if nanos < Class::FAR { Class::Near } else { Class::Far }, nanos)
    }
}

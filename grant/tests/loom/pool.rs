//! The pool of buffers: each has one holder at a time, who sees what the one before did, and the last to know of the pool frees it.
//!
//! As in `frame.rs`, by the same head: how often it changed, how many are out, and what is on top.

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const BOTTOM: u32 = 0xffff;
const OUT: u64 = 1 << 16;
const CHANGE: u64 = 1 << 32;

/// What the pool does that a twin does not.
#[derive(Clone, Copy)]
struct Rules {
    /// Counts the changes of its head.
    counts: bool,
    /// Gives back with release.
    releases: bool,
    /// Is out itself while it has a handle.
    is_out: bool,
}

const RIGHT: Rules = Rules { counts: true, releases: true, is_out: true };

struct Slot {
    below: AtomicU32,
    label: UnsafeCell<u32>,
}

struct Pool {
    head: AtomicU64,
    slots: [Slot; 3],
    freed: AtomicU32,
    rules: Rules,
}

fn top(head: u64) -> u32 {
    head as u32 & 0xffff
}

fn with_top(head: u64, top: u32) -> u64 {
    (head & !0xffff) | u64::from(top)
}

impl Pool {
    fn new(rules: Rules) -> Arc<Self> {
        let slot = |below| Slot { below: AtomicU32::new(below), label: UnsafeCell::new(0) };
        let out = if rules.is_out { OUT } else { 0 };
        Arc::new(Self {
            head: AtomicU64::new(with_top(out, 0)),
            slots: [slot(1), slot(2), slot(BOTTOM)],
            freed: AtomicU32::new(0),
            rules,
        })
    }

    fn change(&self) -> u64 {
        if self.rules.counts { CHANGE } else { 0 }
    }

    fn take(&self) -> Option<u32> {
        let mut head = self.head.load(Acquire);
        loop {
            let number = top(head);
            let below = self.slots.get(number as usize)?.below.load(Relaxed);
            let next = with_top(head, below).wrapping_add(self.change() + OUT);
            match self.head.compare_exchange(head, next, Acquire, Acquire) {
                Ok(_) => {
                    assert_eq!(self.freed.load(Relaxed), 0, "taken of a pool that is gone");
                    // Nobody else has it, and what was done with it is seen.
                    self.slots[number as usize].label.with_mut(|label| unsafe { *label += 1 });
                    return Some(number);
                }
                Err(now) => head = now,
            }
        }
    }

    fn give_back(&self, number: u32) {
        let slot = &self.slots[number as usize];
        slot.label.with_mut(|label| unsafe { *label += 1 });
        let order = if self.rules.releases { AcqRel } else { Ordering::Relaxed };
        let mut head = self.head.load(Relaxed);
        loop {
            slot.below.store(top(head), Relaxed);
            let next = with_top(head, number).wrapping_add(self.change().wrapping_sub(OUT));
            match self.head.compare_exchange(head, next, order, Relaxed) {
                Ok(_) => return self.leave(next),
                Err(now) => head = now,
            }
        }
    }

    fn close(&self) {
        if self.rules.is_out {
            let before = self.head.fetch_sub(OUT, AcqRel);
            self.leave(before - OUT);
        }
    }

    fn leave(&self, head: u64) {
        if (head / OUT) & 0xffff == 0 {
            assert_eq!(self.freed.fetch_add(1, Relaxed), 0, "freed twice");
            // All that was done with any buffer is seen.
            for slot in &self.slots {
                slot.label.with_mut(|label| unsafe { *label += 1 });
            }
        }
    }
}

/// Two threads take and give back, one of them two buffers while it has a third; the handle goes meanwhile.
fn share(rules: Rules) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let pool = Pool::new(rules);
        pool.give_back(pool.take().unwrap());
        let held = pool.take().unwrap();
        let other = {
            let pool = Arc::clone(&pool);
            loom::thread::spawn(move || {
                let (first, second) = (pool.take(), pool.take());
                pool.give_back(held);
                first.into_iter().for_each(|first| pool.give_back(first));
                second
            })
        };
        let mine = pool.take();
        let again = pool.take();
        let theirs = other.join().unwrap();
        let last = [mine, again, theirs];
        for (index, number) in last.iter().enumerate() {
            assert!(
                number.is_none() || !last[..index].contains(number),
                "one that is out is taken"
            );
        }
        let closer = {
            let pool = Arc::clone(&pool);
            loom::thread::spawn(move || pool.close())
        };
        last.into_iter().flatten().for_each(|number| pool.give_back(number));
        closer.join().unwrap();
        assert_eq!(pool.freed.load(Relaxed), 1);
    });
}

#[test]
fn each_buffer_has_one_holder_and_the_last_to_know_frees_them() {
    share(RIGHT);
}

#[test]
#[should_panic(expected = "one that is out is taken")]
fn a_head_without_a_count_of_changes_is_taken_for_what_it_was() {
    share(Rules { counts: false, ..RIGHT });
}

#[test]
#[should_panic]
fn a_buffer_given_back_without_release_is_still_written() {
    share(Rules { releases: false, ..RIGHT });
}

#[test]
#[should_panic(expected = "a pool that is gone")]
fn a_pool_that_is_not_out_itself_goes_with_its_first_frame() {
    share(Rules { is_out: false, ..RIGHT });
}

//! A reference that is given back and used again while Xen looks at it: nobody reaches a page that is no longer granted. The
//! pool of buffers has a model of its own.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p grant --release --test loom`
//!
//! This is a model of what the table does and not the table itself: Xen compares and exchanges an entry's flags and domain as one
//! word, which the table writes as two halves, and no model checker has atomics that overlap. Each twin leaves out one
//! thing that the table does, and fails. The model checker leaves open where a plain store falls among exchanges, so all
//! writes of the word are exchanges here.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
#![cfg(loom)]

#[path = "loom/pool.rs"]
mod pool;

use std::sync::Arc;

use hypercall::abi::{GTF_PERMIT_ACCESS, GTF_READING, GTF_WRITING};
use loom::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use loom::sync::atomic::{AtomicU32, fence};

const PERMIT: u32 = GTF_PERMIT_ACCESS as u32;
const IN_USE: u32 = (GTF_READING | GTF_WRITING) as u32;
const FLAGS: u32 = 0xffff;
/// As often as the table tries.
const END_TRIES: usize = 16;

/// What the guest does that a twin does not.
#[derive(Clone, Copy)]
struct Rules {
    /// Ends a grant by compare and exchange.
    exchange: bool,
    /// Leaves an entry alone that is in use.
    looks: bool,
    /// Writes the flags after frame and domain.
    flags_last: bool,
}

const RIGHT: Rules = Rules { exchange: true, looks: true, flags_last: true };

/// An entry, and what becomes of the pages behind it. The number of a page is also that of the domain it is granted to.
struct World {
    /// Flags, and the domain above them.
    word: AtomicU32,
    frame: AtomicU32,
    /// By number: a page is granted to its domain (1), or not (0).
    granted: [AtomicU32; 3],
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            word: AtomicU32::new(0),
            frame: AtomicU32::new(0),
            granted: core::array::from_fn(|_| AtomicU32::new(0)),
        })
    }

    /// The guest grants a page; `GrantTable::share`.
    fn open(&self, page: u32, rules: Rules) {
        self.granted[page as usize].store(1, SeqCst);
        let word = page << 16;
        if rules.flags_last {
            self.frame.store(page, Relaxed);
            self.word.swap(word, Relaxed);
            self.word.swap(word | PERMIT, Release);
        } else {
            self.word.swap(word | PERMIT, Release);
            self.frame.store(page, Relaxed);
        }
    }

    /// The guest ends a grant, and does what it likes with the page if it could; `Table::end`.
    fn end(&self, page: u32, rules: Rules) -> bool {
        let mut word = self.word.load(Relaxed);
        for _ in 0..END_TRIES {
            if rules.looks && word & IN_USE != 0 {
                return false;
            }
            if !rules.exchange {
                self.word.swap(word & !FLAGS, SeqCst);
            } else if let Err(now) =
                self.word.compare_exchange(word, word & !FLAGS, SeqCst, Relaxed)
            {
                word = now;
                continue;
            }
            self.granted[page as usize].store(0, SeqCst);
            return true;
        }
        false
    }

    /// Xen copies for a domain: `_set_status_v1`, the frame after it, and the release of the entry.
    fn copy(&self, domain: u32) -> bool {
        let word = self.word.load(Acquire);
        if word & FLAGS != PERMIT || word >> 16 != domain {
            return false;
        }
        if self.word.compare_exchange(word, word | IN_USE, SeqCst, Relaxed).is_err() {
            return false;
        }
        fence(SeqCst);
        let page = self.frame.load(Relaxed);
        assert_eq!(page, domain, "another domain's page");
        for _ in 0..2 {
            assert_eq!(self.granted[page as usize].fetch_or(0, SeqCst), 1, "a page that is gone");
        }
        self.word.fetch_and(!IN_USE, SeqCst);
        true
    }
}

/// The guest ends a grant to domain 1 and uses the reference for domain 2, back and forth, while Xen copies for each.
fn recycle(rules: Rules) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let world = World::new();
        world.open(1, rules);
        let copiers = [1, 2].map(|domain| {
            let world = Arc::clone(&world);
            loom::thread::spawn(move || _ = world.copy(domain))
        });
        let mut page = 1;
        for _ in 0..2 {
            // What is in use stays granted, with its page: it is tried again later.
            if world.end(page, rules) {
                page = 3 - page;
                world.open(page, rules);
            }
        }
        for copier in copiers {
            copier.join().unwrap();
        }
        assert!(world.copy(page), "the last grant holds");
        assert!(!world.copy(3 - page));
        assert!(world.end(page, rules), "nothing is in use any more");
    });
}

#[test]
fn a_reference_that_is_used_again_reaches_only_its_page() {
    recycle(RIGHT);
}

#[test]
#[should_panic(expected = "a page that is gone")]
fn ending_by_a_plain_store_takes_a_page_away_under_xen() {
    recycle(Rules { exchange: false, ..RIGHT });
}

#[test]
#[should_panic(expected = "a page that is gone")]
fn ending_what_is_in_use_takes_a_page_away_under_xen() {
    recycle(Rules { looks: false, ..RIGHT });
}

#[test]
#[should_panic(expected = "another domain's page")]
fn flags_before_the_frame_show_the_page_of_before() {
    recycle(Rules { flags_last: false, ..RIGHT });
}

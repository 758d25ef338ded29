//! What holds when several threads change the features at once, over all interleavings.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p features --test loom`

#![cfg(loom)]
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use features::{Epoch, Features, Snapshot, XenFeatures};
use sim::{DomainConfig, Sim};

const IDENTITY: XenFeatures = XenFeatures::GRANT_MAP_IDENTITY;
const DIRECT: XenFeatures = XenFeatures::DIRECT_MAPPED;

/// Two threads each change a domain's features, of which `IDENTITY` is withdrawn if `at_first`.
fn model(at_first: bool, changes: [fn(&Features); 2], check: fn(&Features, Snapshot)) {
    loom::model(move || {
        let bits = (IDENTITY | DIRECT).bits();
        let hv = Sim::new().create(DomainConfig { features: bits, ..DomainConfig::dom0() });
        let features = Features::read(&hv).unwrap();
        if at_first {
            features.withdraw(IDENTITY);
        }
        let before = features.snapshot();
        let features = Arc::new(features);
        let threads = changes.map(|change| {
            let features = Arc::clone(&features);
            loom::thread::spawn(move || change(&features))
        });
        for thread in threads {
            thread.join().unwrap();
        }
        check(&features, before);
    });
}

#[test]
fn the_last_word_holds() {
    let changes: [fn(&Features); 2] =
        [|features| _ = features.withdraw(IDENTITY), |features| _ = features.restore(IDENTITY)];
    for withdrawn_at_first in [false, true] {
        model(withdrawn_at_first, changes, |features, _| {
            let withdrawn = features.withdrawn().contains(IDENTITY);
            assert_eq!(features.snapshot().has(IDENTITY), !withdrawn);
        });
    }
}

#[test]
fn both_changes_hold_and_each_is_a_new_epoch() {
    let changes: [fn(&Features); 2] = [
        |features| assert!(!features.withdraw(IDENTITY).has(IDENTITY)),
        |features| assert!(!features.withdraw(DIRECT).has(DIRECT)),
    ];
    model(false, changes, |features, before| {
        let after = features.snapshot();
        assert!(after.bits().is_empty());
        let epochs = after.epoch().0 - before.epoch().0;
        assert!((1..=2).contains(&epochs), "{:?}", Epoch(epochs));
    });
}

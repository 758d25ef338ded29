//! Every input of the corpus through its target: what was found once stays fixed.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use fuzz::TARGETS;

/// Runs a target on all it has; says which input failed.
fn replay(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut inputs: Vec<_> = fs::read_dir(&dir).unwrap().map(|it| it.unwrap().path()).collect();
    assert!(!inputs.is_empty(), "{} is empty", dir.display());
    inputs.sort();
    for input in inputs {
        let bytes = fs::read(&input).unwrap();
        let outcome = std::panic::catch_unwind(|| (target.run)(&bytes));
        assert!(outcome.is_ok(), "{}", input.display());
    }
}

macro_rules! targets {
    ($($test:ident = $name:literal,)*) => {
        $(#[test]
        fn $test() {
            replay($name);
        })*

        #[test]
        fn every_target_is_replayed() {
            let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(names, [$($name),*]);
        }
    };
}

targets! {
    tx_chain = "tx-chain",
    rx_chain = "rx-chain",
    ctrl_ring = "ctrl-ring",
    control = "control",
    store_client = "store-client",
    store_server = "store-server",
    backend = "backend",
    frontend = "frontend",
}

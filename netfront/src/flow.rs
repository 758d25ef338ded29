//! Which queue a packet belongs on.

use netif::hash::{HashTypes, MAX_KEY, Toeplitz};

/// What is hashed: addresses, and the ports of TCP. Those of UDP are not: its fragments do not have them, and would part
/// from the rest of their flow.
pub(crate) const TYPES: HashTypes = HashTypes::all();

/// The key: two bytes over and over, so that both directions of a flow hash alike and meet in one queue.
pub(crate) fn key() -> [u8; MAX_KEY] {
    let mut key = [0x6d; MAX_KEY];
    key.iter_mut().skip(1).step_by(2).for_each(|byte| *byte = 0x5a);
    key
}

/// Chooses queues by hash.
pub(crate) struct Steering(Toeplitz);

impl Steering {
    pub(crate) fn new() -> Self {
        Self(Toeplitz::new(&key()))
    }

    /// One of `queues` for a frame: the same for all packets of a flow, fragments and all, whatever the queues hold.
    pub(crate) fn queue(&self, frame: &[u8], queues: usize) -> usize {
        if queues < 2 {
            return 0;
        }
        // What is not IP has one order, too. The backend's mapping is laid out to give the same answer.
        let hash = self.0.packet(frame, TYPES).map_or(0, |hash| hash.value);
        hash as usize % MAPPING % queues
    }
}

/// Entries of the backend's mapping from hashes to queues. A power of two, as backends ask for.
pub(crate) const MAPPING: usize = 128;

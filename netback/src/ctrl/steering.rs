//! Which queue a packet to the guest goes to, by what the frontend has set.

use alloc::boxed::Box;

use heapless::Vec;
use netif::ctrl::CtrlStatus;
use netif::hash::{HashAlgorithm, HashTypes, MAX_KEY, Toeplitz};
use netif::tx::PacketHash;

/// Entries of the table from hashes to queues at most (`XEN_NETBK_MAX_HASH_MAPPING_SIZE` of Linux's netback).
pub(super) const MAX_TABLE: usize = 128;

/// Where a packet goes, and the hash that the frontend is told with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Steering {
    /// The queue, less than there are.
    pub queue: u16,
    /// `None`: nothing of the packet is hashed.
    pub hash: Option<PacketHash>,
}

#[derive(Debug)]
pub(super) struct Steer {
    queues: u16,
    algorithm: HashAlgorithm,
    types: HashTypes,
    toeplitz: Box<Toeplitz>,
    /// Empty: the hash, modulo the number of queues, is the queue.
    table: Vec<u16, MAX_TABLE>,
}

/// The statuses are those of Linux (xen-netback/hash.c), which are fewer than io/netif.h allows.
impl Steer {
    pub(super) fn new(queues: u16) -> Self {
        Self {
            queues,
            algorithm: HashAlgorithm::None,
            types: HashTypes::empty(),
            toeplitz: Box::new(Toeplitz::new(&[])),
            table: Vec::new(),
        }
    }

    pub(super) fn set_algorithm(&mut self, number: u32) -> CtrlStatus {
        let Some(algorithm) = HashAlgorithm::from_number(number) else {
            return CtrlStatus::INVALID_PARAMETER;
        };
        self.algorithm = algorithm;
        CtrlStatus::SUCCESS
    }

    /// The types that can be asked for, once there is an algorithm.
    pub(super) fn types(&self) -> Result<HashTypes, CtrlStatus> {
        match self.algorithm {
            HashAlgorithm::None => Err(CtrlStatus::NOT_SUPPORTED),
            HashAlgorithm::Toeplitz => Ok(HashTypes::all()),
        }
    }

    pub(super) fn set_types(&mut self, bits: u32) -> CtrlStatus {
        match HashTypes::from_bits(bits) {
            Some(types) if self.algorithm != HashAlgorithm::None => {
                self.types = types;
                CtrlStatus::SUCCESS
            }
            _ => CtrlStatus::INVALID_PARAMETER,
        }
    }

    /// Takes a key of at most [`MAX_KEY`] bytes.
    pub(super) fn set_key(&mut self, key: &[u8]) -> CtrlStatus {
        if key.len() > MAX_KEY {
            return CtrlStatus::INVALID_PARAMETER;
        }
        *self.toeplitz = Toeplitz::new(key);
        CtrlStatus::SUCCESS
    }

    /// Makes a table of so many entries, all of queue 0.
    pub(super) fn set_table_len(&mut self, len: u32) -> CtrlStatus {
        let Some(len) = usize::try_from(len).ok().filter(|len| *len <= MAX_TABLE) else {
            return CtrlStatus::INVALID_PARAMETER;
        };
        self.table.clear();
        // There is room: the length was checked.
        let _ = self.table.resize(len, 0);
        CtrlStatus::SUCCESS
    }

    /// Whether the table has these entries.
    pub(super) fn has_entries(&self, offset: u32, len: u32) -> bool {
        let end = offset.checked_add(len).and_then(|end| usize::try_from(end).ok());
        end.is_some_and(|end| end <= self.table.len())
    }

    /// Takes a part of the table, whole or not at all.
    pub(super) fn set_entries(
        &mut self,
        offset: u32,
        entries: impl ExactSizeIterator<Item = u32> + Clone,
    ) -> CtrlStatus {
        let valid = |entry: u32| u16::try_from(entry).ok().filter(|queue| *queue < self.queues);
        let checked = entries.clone().all(|entry| valid(entry).is_some());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(entries.len());
        let new = entries.map(|entry| valid(entry).unwrap_or(0));
        match self.table.get_mut(start..end) {
            Some(places) if checked => {
                for (place, queue) in places.iter_mut().zip(new) {
                    *place = queue;
                }
                CtrlStatus::SUCCESS
            }
            _ => CtrlStatus::INVALID_PARAMETER,
        }
    }

    /// Where a packet goes, of whose first bytes 128 hold every header that matters. `None`: the frontend leaves it to us.
    pub(super) fn steer(&self, header: &[u8]) -> Option<Steering> {
        if self.algorithm == HashAlgorithm::None {
            return None;
        }
        let hash = self.toeplitz.packet(header, self.types);
        // What has no hash goes where a hash of 0 does, as in Linux (`xenvif_select_queue`).
        let value = hash.map_or(0, |hash| hash.value);
        let at = |len: usize| {
            u32::try_from(len)
                .ok()
                .and_then(|len| value.checked_rem(len))
                .map_or(0, |at| at as usize)
        };
        let queue = match self.table.get(at(self.table.len())) {
            Some(queue) => *queue,
            None => u16::try_from(at(self.queues.into())).unwrap_or(0),
        };
        Some(Steering { queue, hash })
    }
}

//! The other end of a queue: a device in software, which reads and writes pages by the addresses that it is told.

use std::vec::Vec;

use hypercall::{Gfn, PAGE_SIZE};
use sim::{Sim, SimHv};

use super::queue::Part;

/// What a device does with a queue.
pub struct Device {
    sim: Sim,
    hv: SimHv,
    areas: [u64; 3],
    size: u16,
    /// How much of the available ring it has taken, and how much it has given back.
    taken: u16,
    used: u16,
    pub interrupts: u64,
}

/// A chain as the device finds it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    pub head: u16,
    pub parts: Vec<Part>,
}

impl Device {
    pub fn new(sim: &Sim, hv: &SimHv, areas: [u64; 3], size: u16) -> Self {
        Self { sim: sim.clone(), hv: hv.clone(), areas, size, taken: 0, used: 0, interrupts: 0 }
    }

    /// The device after a reset.
    pub fn renewed(&self) -> Self {
        Self::new(&self.sim, &self.hv, self.areas, self.size)
    }

    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let offset = (at % PAGE_SIZE as u64) as usize;
        assert!(self.sim.read(self.hv.id(), Gfn::of_address(at), offset, &mut bytes), "{at:#x}");
        bytes
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        let offset = (at % PAGE_SIZE as u64) as usize;
        assert!(self.sim.write(self.hv.id(), Gfn::of_address(at), offset, bytes), "{at:#x}");
    }

    pub fn read_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at))
    }

    /// The next chain of the available ring.
    pub fn take(&mut self) -> Option<Found> {
        let [table, available, _] = self.areas;
        if self.read_u16(available + 2) == self.taken {
            return None;
        }
        let head = self.read_u16(available + 4 + 2 * u64::from(self.taken % self.size));
        self.taken = self.taken.wrapping_add(1);
        let (mut parts, mut next) = (Vec::new(), Some(head));
        while let Some(number) = next {
            assert!(number < self.size && parts.len() <= self.size.into(), "a chain without end");
            let at = table + 16 * u64::from(number);
            let flags = self.read_u16(at + 12);
            parts.push(Part {
                address: u64::from_le_bytes(self.read(at)),
                len: u32::from_le_bytes(self.read(at + 8)),
                writable: flags & 2 != 0,
            });
            next = (flags & 1 != 0).then(|| self.read_u16(at + 14));
        }
        Some(Found { head, parts })
    }

    /// Says that it is done with something.
    pub fn say(&mut self, id: u32, len: u32) {
        let used = self.areas[2];
        let at = used + 4 + 8 * u64::from(self.used % self.size);
        self.write(at, &id.to_le_bytes());
        self.write(at + 4, &len.to_le_bytes());
        self.set_index(self.used.wrapping_add(1));
    }

    pub fn set_index(&mut self, index: u16) {
        self.used = index;
        self.write(self.areas[2] + 2, &index.to_le_bytes());
    }

    /// Gives back one chain, and raises the interrupt if that was asked for.
    pub fn give(&mut self, head: u16, len: u32) {
        self.say(head.into(), len);
        let event = self.read_u16(self.areas[1] + 4 + 2 * u64::from(self.size));
        self.interrupts += u64::from(event == self.used.wrapping_sub(1));
    }

    /// Wants to be told once the driver has queued `more` chains than now, and one beyond.
    pub fn wish(&self, more: u16) {
        let event = self.taken.wrapping_add(more);
        self.write(self.areas[2] + 4 + 8 * u64::from(self.size), &event.to_le_bytes());
    }
}

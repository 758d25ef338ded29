//! A device that reads and writes memory by itself, such as a NIC's DMA engine.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use hypercall::{BusAddr, DomId, Gfn, PAGE_SIZE};

use crate::cache::GARBAGE;
use crate::machine::Mfn;
use crate::memory::P2mKind;
use crate::{Sim, State};

/// How a device's addresses come to be machine addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Iommu {
    /// They are: all of memory is within reach, whoever's it is.
    None,
    /// They are, but only what the device's domain owns or has mapped by grant is within reach: a direct-mapped domain on Arm.
    Machine,
    /// They are guest-physical addresses of the device's domain, as on x86: of its own memory, and where it has mapped grants
    /// if Xen maintains those too (CPUID leaf base + 4, EAX bit 2).
    Guest {
        /// Mapped grants are within reach.
        grants: bool,
    },
}

/// What a device is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DmaConfig {
    /// It sees what the CPUs have in their caches, and they see what it writes.
    pub coherent: bool,
    /// What is between it and memory.
    pub iommu: Iommu,
}

impl DmaConfig {
    /// As on the Arm boards of 2014: nothing keeps it from memory, and nothing keeps the caches right.
    pub const BARE: Self = Self { coherent: false, iommu: Iommu::None };
    /// As in a server: coherent, and behind an IOMMU that Xen maintains for grants as well.
    pub const SERVER: Self = Self { coherent: true, iommu: Iommu::Guest { grants: true } };
}

/// What a device did, in pieces that lie within one page each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaCounts {
    /// Pieces read.
    pub reads: u64,
    /// Pieces written.
    pub writes: u64,
    /// Pieces that were at an address where nothing is, or that the IOMMU refused: garbage was read, nothing was written.
    pub faults: u64,
    /// Pieces in pages that the device's domain had no business with at the time: not its own or freed, not mapped by grant, or
    /// written to though mapped for reading. They were read and written all the same.
    pub stray: u64,
    /// Cache lines that were read while the CPUs had a changed copy: nobody cleaned them.
    pub stale: u64,
    /// Cache lines that were written while the CPUs had a changed copy, which may be written back over it at any time.
    pub dirty: u64,
}

/// A device of a domain's.
pub struct DmaDevice {
    sim: Sim,
    owner: DomId,
    config: DmaConfig,
    reads: AtomicU64,
    writes: AtomicU64,
    faults: AtomicU64,
    stray: AtomicU64,
    stale: AtomicU64,
    dirty: AtomicU64,
}

impl fmt::Debug for DmaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaDevice(d{}, {:?}, {:?})", self.owner, self.config, self.counts())
    }
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

impl State {
    /// Whether a device of `owner`'s has any business with a page.
    fn may_reach(&self, owner: DomId, mfn: Mfn, to_write: bool) -> bool {
        if self.machine.owner(mfn) == Some(owner) {
            return !self.machine.is_free(mfn);
        }
        let mapped = self.domains.get(&owner).and_then(|domain| domain.grants.mapped(mfn));
        mapped.is_some_and(|mapped| !to_write || mapped.is_writable())
    }

    /// Which page is at an address of a device, if the device gets at any.
    fn dma(&self, owner: DomId, iommu: Iommu, at: BusAddr, to_write: bool) -> Option<Mfn> {
        let mfn = Mfn::of_bus(at);
        match iommu {
            Iommu::None => Some(mfn),
            Iommu::Machine => {
                let owned = self.domains.get(&owner)?.memory.translate(Gfn(mfn.0)) == Some(mfn);
                (owned || self.may_reach(owner, mfn, to_write)).then_some(mfn)
            }
            Iommu::Guest { grants } => {
                let (mfn, entry) =
                    self.domains.get(&owner)?.memory.lookup(Gfn::of_address(at.0))?;
                let mapped = entry.kind == P2mKind::Ram || entry.kind == P2mKind::Grant && grants;
                (mapped && (entry.writable || !to_write)).then_some(mfn)
            }
        }
    }
}

impl DmaDevice {
    /// A device of `owner`'s.
    #[must_use]
    pub fn new(sim: &Sim, owner: DomId, config: DmaConfig) -> Self {
        Self {
            sim: sim.clone(),
            owner,
            config,
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            stray: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
        }
    }

    /// What it did so far.
    #[must_use]
    pub fn counts(&self) -> DmaCounts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DmaCounts {
            reads: load(&self.reads),
            writes: load(&self.writes),
            faults: load(&self.faults),
            stray: load(&self.stray),
            stale: load(&self.stale),
            dirty: load(&self.dirty),
        }
    }

    /// Reads what is at `at` on the bus, over as many pages as it takes. Where nothing is, or nothing was ever written to DRAM,
    /// that is garbage. `false` if any of it was a fault.
    pub fn read(&self, at: BusAddr, to: &mut [u8]) -> bool {
        let mut state = self.sim.0.lock();
        let mut all = true;
        let mut address = at.0;
        let mut rest = to;
        while !rest.is_empty() {
            let offset = address as usize % PAGE_SIZE;
            let (piece, others) = rest.split_at_mut(rest.len().min(PAGE_SIZE - offset));
            count(&self.reads, 1);
            match self.reach(&state, BusAddr(address), false) {
                Some(mfn) => {
                    let coherent = self.config.coherent;
                    count(&self.stale, state.machine.dma_read(mfn, offset, piece, coherent));
                }
                None => {
                    piece.fill(GARBAGE);
                    all = false;
                }
            }
            address = address.wrapping_add(piece.len() as u64);
            rest = others;
        }
        all
    }

    /// Writes at `at` on the bus, over as many pages as it takes. `false` if any of it was a fault.
    pub fn write(&self, at: BusAddr, from: &[u8]) -> bool {
        let mut state = self.sim.0.lock();
        let mut all = true;
        let mut address = at.0;
        let mut rest = from;
        while !rest.is_empty() {
            let offset = address as usize % PAGE_SIZE;
            let (piece, others) = rest.split_at(rest.len().min(PAGE_SIZE - offset));
            count(&self.writes, 1);
            match self.reach(&state, BusAddr(address), true) {
                Some(mfn) => {
                    let coherent = self.config.coherent;
                    count(&self.dirty, state.machine.dma_write(mfn, offset, piece, coherent));
                }
                None => all = false,
            }
            address = address.wrapping_add(piece.len() as u64);
            rest = others;
        }
        all
    }

    fn reach(&self, state: &State, at: BusAddr, to_write: bool) -> Option<Mfn> {
        let mfn = state.dma(self.owner, self.config.iommu, at, to_write);
        let mfn = mfn.filter(|mfn| state.machine.page(*mfn).is_some());
        match mfn {
            None => count(&self.faults, 1),
            Some(mfn) if !state.may_reach(self.owner, mfn, to_write) => count(&self.stray, 1),
            Some(_) => {}
        }
        mfn
    }
}

//! What a device that reads memory by bus address may be told of a page that a guest granted, and of our own.
//!
//! In 2014 Linux's netback went over to mapping and broke Arm dom0s whose network cards do DMA: the address that the card
//! was given, or the one by which the cache was cleaned, was not that of the page. Here an address exists only if a rule gives one
//! that is right, and [`DmaAddress`] cannot be made in any other way; where there is no rule the bytes are copied.

use features::XenFeatures;
use grant::Mapping;
use hypercall::abi::{CacheFlush, GNTTAB_CACHE_CLEAN};
use hypercall::{BusAddr, Errno, Gfn, Hypervisor, PAGE_SIZE, PageOffset};

use crate::datapath::{Arch, Facts, Nic};

/// Which address of a mapped page a device is to be given.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
enum Address {
    /// The machine address that Xen answers with a map (`dev_bus_addr`).
    Machine,
    /// The guest-physical address at which the page was mapped.
    Mapped,
}

/// What is to be done before a device reads a page. What is the processor's business is the card's driver's to do: it alone
/// knows the moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Maintenance {
    /// Nothing.
    None,
    /// `GNTTABOP_cache_flush` on the machine address: see [`clean`].
    Hypercall,
    /// The processor's own instructions, on the identity mapping: at the guest-physical address that equals the machine
    /// address.
    Identity,
    /// The processor's own instructions, at the guest-physical address of memory of our own, which equals the one on the bus.
    /// Where the device writes, the lines are to be discarded before it is given the buffer, and again before it is read.
    Own,
}

/// How a device is made to see a page that is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct DmaRule {
    address: Address,
    maintenance: Maintenance,
}

impl DmaRule {
    /// Whether it holds only for pages mapped while `XENFEAT_grant_map_identity` is advertised.
    #[must_use]
    pub fn needs_identity(self) -> bool {
        self.maintenance == Maintenance::Identity
    }
}

/// Whether guest-physical addresses are machine addresses. Before 4.16 Xen did not say: then it is so for dom0 on Arm,
/// and for nobody else.
fn direct_mapped(bits: XenFeatures, arch: Arch) -> bool {
    if bits.contains(XenFeatures::DIRECT_MAPPED) {
        return true;
    }
    let says = bits.intersects(XenFeatures::NOT_DIRECT_MAPPED);
    !says && arch == Arch::Arm && bits.contains(XenFeatures::DOM0)
}

/// How the card at the uplink can be made to see what a guest granted; `None` if it cannot, or there is none.
#[must_use]
pub fn rule(bits: XenFeatures, facts: &Facts) -> Option<DmaRule> {
    let Nic { coherent } = facts.uplink?;
    if !bits.contains(XenFeatures::AUTO_TRANSLATED_PHYSMAP) {
        return None;
    }
    let direct = direct_mapped(bits, facts.arch);
    let address = if direct {
        Address::Machine
    } else if facts.arch == Arch::X86 && facts.iommu_maps {
        Address::Mapped
    } else {
        return None;
    };
    let maintenance = if coherent || facts.arch == Arch::X86 {
        Maintenance::None
    } else if facts.cache_flush {
        Maintenance::Hypercall
    } else if direct && bits.contains(XenFeatures::GRANT_MAP_IDENTITY) {
        Maintenance::Identity
    } else {
        return None;
    };
    Some(DmaRule { address, maintenance })
}

/// How a card is made to see memory of our own, and we what it wrote there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct OwnRule {
    maintenance: Maintenance,
}

/// How the card at the uplink is made to see memory of our own; `None` if there is no card. This hangs on no feature bit: Xen
/// gives a device to a domain that is direct-mapped, whose frames have the machine's numbers, or behind an IOMMU, which takes
/// those that the domain knows.
#[must_use]
pub fn own_rule(facts: &Facts) -> Option<OwnRule> {
    let Nic { coherent } = facts.uplink?;
    let seen = coherent || facts.arch == Arch::X86;
    Some(OwnRule { maintenance: if seen { Maintenance::None } else { Maintenance::Own } })
}

/// An address at which a device finds the bytes that it is meant to find.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct DmaAddress(BusAddr);

impl DmaAddress {
    /// The number to write into the device's descriptor.
    #[must_use]
    pub const fn bus(self) -> BusAddr {
        self.0
    }
}

/// Bytes for a device: where, how many, and what must be done before it looks. They stay where they are while the packet
/// lives that they are part of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DmaPiece {
    /// Where.
    pub address: DmaAddress,
    /// How many; they do not cross a page.
    pub len: u16,
    /// What is to be done first.
    pub maintenance: Maintenance,
}

impl DmaPiece {
    pub(crate) fn of<H: Hypervisor>(
        rule: DmaRule,
        page: &Mapping<H>,
        offset: u16,
        len: u16,
    ) -> Option<Self> {
        let start = match rule.address {
            Address::Machine => page.machine_address(),
            Address::Mapped => BusAddr(page.gfn()?.address()),
        };
        let address = DmaAddress(BusAddr(start.0.checked_add(offset.into())?));
        Some(Self { address, len, maintenance: rule.maintenance })
    }

    /// Of our own memory, from there on in a frame.
    pub(crate) fn own(rule: OwnRule, frame: Gfn, offset: PageOffset, len: u16) -> Self {
        let address = DmaAddress(BusAddr(frame.address() + u64::from(offset.get())));
        Self { address, len, maintenance: rule.maintenance }
    }

    /// So many of its bytes, behind the first `skip`; `None` if it has not as many.
    #[must_use]
    pub fn part(self, skip: u16, len: u16) -> Option<Self> {
        let end = skip.checked_add(len)?;
        let start = self.address.0.0.checked_add(skip.into())?;
        (end <= self.len).then_some(Self { address: DmaAddress(BusAddr(start)), len, ..self })
    }
}

/// Whether Xen has `GNTTABOP_cache_flush`: asked with an operation of no length.
pub(crate) fn has_cache_flush(hv: &impl Hypervisor) -> bool {
    let mut nothing = [CacheFlush { dev_bus_addr: 0, offset: 0, length: 0, op: 0 }];
    hv.cache_flush(&mut nothing) != Err(Errno::NOSYS)
}

/// Pieces that one hypercall cleans.
const BATCH: usize = 16;

/// Writes back what the processor's caches hold of these bytes, where that is Xen's business.
///
/// # Errors
/// As Xen answers: then the device must not look.
pub fn clean<H: Hypervisor>(
    hv: &H,
    pieces: impl IntoIterator<Item = DmaPiece>,
) -> Result<(), Errno> {
    let mut ops: heapless::Vec<CacheFlush, BATCH> = heapless::Vec::new();
    let page = !(PAGE_SIZE as u64 - 1);
    for piece in pieces {
        if piece.maintenance != Maintenance::Hypercall {
            continue;
        }
        let at = piece.address.bus().0;
        let offset = u16::try_from(at & !page).unwrap_or(0);
        let op = CacheFlush {
            dev_bus_addr: at & page,
            offset,
            length: piece.len,
            op: GNTTAB_CACHE_CLEAN,
        };
        if ops.push(op).is_err() {
            hv.cache_flush(&mut ops)?;
            ops.clear();
            let _ = ops.push(op);
        }
    }
    if ops.is_empty() { Ok(()) } else { hv.cache_flush(&mut ops) }
}

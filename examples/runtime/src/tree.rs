//! What the device tree says of this domain.

use core::ops::Range;

use flat_device_tree::Fdt;
use flat_device_tree::node::FdtNode;

use crate::ranges::Ranges;

/// The tree. It is parsed anew for each question: there are few, all at boot.
pub struct Tree<'a>(Fdt<'a>);

/// `/hypervisor`, which Xen writes (misc/arm/device-tree/guest.txt).
#[derive(Debug, PartialEq, Eq)]
pub struct Hypervisor {
    /// `reg[0]`: guest-physical space for the grant table. What follows, extended regions, is of no use here: on a
    /// direct-mapped dom0 they cover machine memory of other domains.
    pub grant_table: Range<u64>,
    /// The private interrupt, counted from 0, that says an event channel is pending.
    pub event_ppi: u32,
}

/// The interrupt controller's registers.
#[derive(Debug, PartialEq, Eq)]
pub struct Gic {
    /// The distributor's.
    pub distributor: Range<u64>,
    /// The redistributors', one after the other; the first is vCPU 0's.
    pub redistributors: Range<u64>,
}

/// A virtio device at memory-mapped registers; whether there is one behind them, they say themselves.
#[cfg(any(feature = "virtio-net", test))]
#[derive(Debug, PartialEq, Eq)]
pub struct VirtioDevice {
    pub registers: Range<u64>,
    /// Its shared interrupt, counted from 0.
    pub spi: u32,
    /// It sees what the processor has in its caches.
    pub coherent: bool,
}

impl<'a> Tree<'a> {
    /// `None` if this is not a device tree.
    pub fn new(data: &'a [u8]) -> Option<Self> {
        Fdt::new(data).ok().map(Self)
    }

    pub fn bootargs(&self) -> &'a str {
        let chosen = self.0.find_node("/chosen");
        chosen.and_then(|node| node.property("bootargs")?.as_str()).unwrap_or("")
    }

    /// This domain's memory. `None` if it is in too many pieces.
    pub fn memory(&self) -> Option<Ranges> {
        let mut memory = Ranges::default();
        for node in self.0.all_nodes() {
            let kind = node.property("device_type").and_then(|kind| kind.as_str());
            if kind == Some("memory") {
                registers(node).try_for_each(|range| memory.add(range))?;
            }
        }
        Some(memory)
    }

    /// Memory that is not to be touched.
    pub fn reserved(&self) -> impl Iterator<Item = Range<u64>> {
        let listed = self.0.memory_reservations().map(|reserved| {
            let start = reserved.address().addr() as u64;
            start..start.saturating_add(reserved.size() as u64)
        });
        let nodes = self.0.find_node("/reserved-memory").into_iter().flat_map(FdtNode::children);
        listed.chain(nodes.flat_map(registers))
    }

    pub fn hypervisor(&self) -> Option<Hypervisor> {
        let node = self.0.find_node("/hypervisor")?;
        Some(Hypervisor {
            grant_table: registers(node).next()?,
            event_ppi: interrupt(node, 0, PRIVATE)?,
        })
    }

    pub fn gic(&self) -> Option<Gic> {
        let mut parts = registers(self.0.find_compatible(&["arm,gic-v3"])?);
        Some(Gic { distributor: parts.next()?, redistributors: parts.next()? })
    }

    /// The registers of an SBSA UART, such as Xen emulates for a guest.
    pub fn uart(&self) -> Option<Range<u64>> {
        registers(self.0.find_compatible(&["arm,sbsa-uart"])?).next()
    }

    /// The virtio devices at memory-mapped registers (Linux, bindings/virtio/mmio.yaml).
    #[cfg(any(feature = "virtio-net", test))]
    pub fn virtio(&self) -> impl Iterator<Item = VirtioDevice> {
        let is_virtio = |node: &FdtNode<'_, 'a>| {
            node.compatible().is_some_and(|names| names.all().any(|name| name == "virtio,mmio"))
        };
        self.0.all_nodes().filter(is_virtio).filter_map(|node| {
            Some(VirtioDevice {
                registers: registers(node).next()?,
                spi: interrupt(node, 0, SHARED)?,
                coherent: node.property("dma-coherent").is_some(),
            })
        })
    }

    /// The private interrupt, counted from 0, of the virtual timer: the third of the four in the node (secure,
    /// non-secure, virtual, hypervisor).
    pub fn timer_ppi(&self) -> Option<u32> {
        interrupt(self.0.find_compatible(&["arm,armv8-timer"])?, 2, PRIVATE)
    }

    /// Whether anything in the tree is at these addresses, as far as it can be told without knowing every bus: all
    /// that has registers, and all that buses pass on.
    pub fn mentions(&self, range: &Range<u64>) -> bool {
        let meets = |other: Range<u64>| other.start < range.end && range.start < other.end;
        let extended = |node: &FdtNode<'_, '_>| node.name.starts_with("hypervisor");
        self.0.all_nodes().filter(|node| !extended(node)).any(|node| {
            let passed_on = node
                .ranges()
                .map(|r| r.parent_bus_address as u64..(r.parent_bus_address + r.size) as u64);
            registers(node).any(meets) || passed_on.into_iter().any(meets)
        })
    }
}

/// The node's `reg`, as addresses.
fn registers<'a>(node: FdtNode<'_, 'a>) -> impl Iterator<Item = Range<u64>> + 'a {
    node.reg().filter_map(|region| {
        let start = region.starting_address.addr() as u64;
        Some(start..start.saturating_add(region.size? as u64))
    })
}

/// Kinds of interrupts (Linux, bindings/interrupt-controller/arm,gic-v3.yaml).
#[cfg(any(feature = "virtio-net", test))]
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;

/// The node's interrupt of that index, if it is of this kind: three cells each, kind, number, flags.
fn interrupt(node: FdtNode<'_, '_>, index: usize, kind: u32) -> Option<u32> {
    let value = node.property("interrupts")?.value;
    let mut cells = value
        .chunks_exact(4)
        .skip(index * 3)
        .map(|cell| cell.iter().fold(0u32, |number, byte| number << 8 | u32::from(*byte)));
    (cells.next()? == kind).then(|| cells.next())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// What Xen 4.17 gave a dom0 of 32 MiB on QEMU's `virt` machine.
    const DOM0: &[u8] = include_bytes!("../testdata/dom0-aarch64.dtb");

    /// What it gave a guest of 256 MiB, started from the device tree too.
    const GUEST: &[u8] = include_bytes!("../testdata/guest-aarch64.dtb");

    fn tree() -> Tree<'static> {
        Tree::new(DOM0).unwrap()
    }

    #[test]
    fn the_tree_of_a_dom0_says_all_that_boot_needs() {
        let memory = tree().memory().unwrap();
        let memory: Vec<_> = memory.iter().map(|range| (range.start, range.end)).collect();
        assert_eq!(memory, [(0x4200_0000, 0x4400_0000)]);
        assert_eq!(
            tree().hypervisor(),
            Some(Hypervisor { grant_table: 0x4020_0000..0x4024_0000, event_ppi: 0 })
        );
        assert_eq!(
            tree().gic(),
            Some(Gic {
                distributor: 0x800_0000..0x801_0000,
                redistributors: 0x80a_0000..0x900_0000
            })
        );
        assert_eq!(tree().timer_ppi(), Some(11));
        assert_eq!(tree().uart(), None);
        assert_eq!(tree().bootargs(), "console=hvc0 earlycon=xen rdinit=/init quiet");
    }

    #[test]
    fn the_tree_of_a_guest_says_all_that_boot_needs() {
        let tree = Tree::new(GUEST).unwrap();
        let memory = tree.memory().unwrap();
        let memory: Vec<_> = memory.iter().map(|range| (range.start, range.end)).collect();
        assert_eq!(memory, [(0x4000_0000, 0x5000_0000)]);
        assert_eq!(
            tree.hypervisor(),
            Some(Hypervisor { grant_table: 0x3800_0000..0x3900_0000, event_ppi: 15 })
        );
        assert_eq!(
            tree.gic(),
            Some(Gic {
                distributor: 0x300_1000..0x301_1000,
                redistributors: 0x302_0000..0x402_0000
            })
        );
        assert_eq!(tree.timer_ppi(), Some(11));
        assert_eq!(tree.uart(), Some(0x2200_0000..0x2200_1000));
        assert!(!tree.mentions(&(0x3900_0000..0x3a00_0000)), "where the store's page is put");
        assert!(!tree.mentions(&((1 << 44) - (1 << 30)..1 << 44)));
    }

    #[test]
    fn devices_and_buses_are_mentioned_and_nothing_else() {
        let mentioned = |start: u64, length: u64| tree().mentions(&(start..start + length));
        assert!(mentioned(0xa00_0000, 1), "a register");
        assert!(mentioned(0x40_1000_0000, 1), "PCI configuration space");
        assert!(mentioned(0xff_ffff_ffff, 1), "what the PCI bridge passes on");
        assert!(mentioned(0x4100_0000, 0x100_0001), "memory");
        assert!(!mentioned((1 << 44) - (1 << 30), 1 << 30));
        assert!(!mentioned(0x8000_0000, 1), "an extended region is no device");
    }

    #[test]
    fn virtio_devices_are_found_with_what_it_takes_to_use_one() {
        let devices: Vec<_> = tree().virtio().collect();
        assert_eq!(devices.len(), 32);
        let first = devices.iter().min_by_key(|device| device.registers.start).unwrap();
        assert_eq!(
            *first,
            VirtioDevice { registers: 0xa00_0000..0xa00_0200, spi: 16, coherent: true }
        );
        assert!(devices.iter().all(|device| device.coherent && (16..48).contains(&device.spi)));
        assert_eq!(Tree::new(GUEST).unwrap().virtio().count(), 0);
    }

    #[test]
    fn what_is_not_a_tree_is_refused() {
        assert!(Tree::new(&[]).is_none());
        assert!(Tree::new(&[0; 64]).is_none());
        assert!(Tree::new(DOM0.get(..4096).unwrap()).is_none());
    }
}

//! Devices, caches and addresses: what is wrong delivers wrong bytes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::{IDENTITY, bus, frame, granted, map, map_to_read, pages, unmap};
use hypercall::abi::{CacheFlush, GNTTAB_CACHE_CLEAN, GNTTAB_CACHE_INVAL};
use hypercall::{BusAddr, Errno, Gfn, Hypervisor, PAGE_SIZE};
use sim::{DmaConfig, DmaDevice, DomainConfig, Iommu, Sim, SimHv};

const GARBAGE: [u8; 8] = [0xa5; 8];

fn machine(config: DomainConfig) -> (Sim, SimHv, SimHv) {
    let sim = Sim::new();
    let dom0 = sim.create(config);
    let guest = sim.create(DomainConfig::guest());
    (sim, dom0, guest)
}

fn seen(device: &DmaDevice, at: u64) -> [u8; 8] {
    let mut bytes = [0; 8];
    device.read(BusAddr(at), &mut bytes);
    bytes
}

fn cpu(sim: &Sim, hv: &SimHv, frame: Gfn, offset: usize) -> [u8; 8] {
    let mut bytes = [0; 8];
    assert!(sim.read(hv.id(), frame, offset, &mut bytes));
    bytes
}

fn flush(hv: &SimHv, at: u64, offset: u16, length: u16, op: u32) -> Result<(), Errno> {
    hv.cache_flush(&mut [CacheFlush { dev_bus_addr: at, offset, length, op }])
}

#[test]
fn a_device_that_does_not_snoop_reads_what_was_cleaned_and_nothing_newer() {
    let (sim, dom0, guest) = machine(DomainConfig::dom0());
    let device = DmaDevice::new(&sim, dom0.id(), DmaConfig::BARE);
    let page = granted(&sim, &guest, dom0.id(), 8);
    let op = map_to_read(&dom0, guest.id(), 8, &dom0.window().unwrap());
    sim.write(guest.id(), page, 0, b"packet 1");
    assert_eq!(seen(&device, op.dev_bus_addr), GARBAGE, "it is in the cache only");
    assert_eq!(flush(&dom0, op.dev_bus_addr, 0, 8, GNTTAB_CACHE_CLEAN), Ok(()));
    assert_eq!(&seen(&device, op.dev_bus_addr), b"packet 1");
    assert_eq!(seen(&device, op.dev_bus_addr + 64), GARBAGE, "the next line was not meant");
    sim.write(guest.id(), page, 0, b"packet 2");
    assert_eq!(&seen(&device, op.dev_bus_addr), b"packet 1", "and nobody cleaned it again");
    assert_eq!(flush(&dom0, op.dev_bus_addr, 7, 1, GNTTAB_CACHE_CLEAN), Ok(()));
    assert_eq!(&seen(&device, op.dev_bus_addr), b"packet 2", "lines go as a whole");
    assert_eq!((device.counts().faults, device.counts().stray), (0, 0));
    assert_eq!(device.counts().stale, 3);
    let snooping = DmaConfig { coherent: true, ..DmaConfig::BARE };
    let snooping = DmaDevice::new(&sim, dom0.id(), snooping);
    sim.write(guest.id(), page, 64, b"packet 3");
    assert_eq!(&seen(&snooping, op.dev_bus_addr + 64), b"packet 3");
}

#[test]
fn what_a_device_wrote_is_seen_after_an_invalidation() {
    let (sim, dom0, _) = machine(DomainConfig::dom0());
    let device = DmaDevice::new(&sim, dom0.id(), DmaConfig::BARE);
    let page = frame(&dom0);
    let at = bus(&sim, &dom0, page);
    sim.write(dom0.id(), page, 0, b"old old ");
    assert!(dom0.clean_cache(page.address(), 128));
    assert!(device.write(at, b"received"));
    assert_eq!(device.counts().dirty, 0);
    assert_eq!(&cpu(&sim, &dom0, page, 0), b"old old ", "still in the cache");
    assert!(dom0.invalidate_cache(page.address(), 8));
    assert_eq!(&cpu(&sim, &dom0, page, 0), b"received");
    // Without the cleaning before: the line is written back over what the device wrote.
    sim.write(dom0.id(), page, 8, b"old old ");
    assert!(device.write(at, b"received again"));
    assert_eq!(device.counts().dirty, 1);
    assert!(dom0.invalidate_cache(page.address(), 16));
    assert_eq!(&cpu(&sim, &dom0, page, 8), b"old old ");
    assert_eq!(&cpu(&sim, &dom0, page, 0), b"received");
    sim.write(dom0.id(), page, 64, b"old old ");
    assert!(device.write(BusAddr(at.0 + 64), b"received"));
    assert!(dom0.invalidate_cache(page.address() + 64, 64));
    assert_eq!(&cpu(&sim, &dom0, page, 64), b"old old ", "nor are whole lines thrown away");
    let snooping = DmaConfig { coherent: true, ..DmaConfig::BARE };
    let snooping = DmaDevice::new(&sim, dom0.id(), snooping);
    assert!(snooping.write(at, b"at once!"));
    assert_eq!(&cpu(&sim, &dom0, page, 0), b"at once!");
}

#[test]
fn xen_invalidates_whole_lines_and_cleans_parts_of_them_first() {
    let (sim, dom0, _) = machine(DomainConfig::dom0());
    let device = DmaDevice::new(&sim, dom0.id(), DmaConfig::BARE);
    let page = frame(&dom0);
    let at = bus(&sim, &dom0, page);
    for line in [0, 64, 128] {
        sim.write(dom0.id(), page, line, b"old old ");
    }
    let both = GNTTAB_CACHE_CLEAN | GNTTAB_CACHE_INVAL;
    assert_eq!(flush(&dom0, at.0, 0, 192, both), Ok(()));
    for line in [0, 64, 128] {
        sim.write(dom0.id(), page, line, b"changed!");
        device.write(BusAddr(at.0 + line as u64), b"received");
    }
    assert_eq!(flush(&dom0, at.0, 32, 128, GNTTAB_CACHE_INVAL), Ok(()));
    assert_eq!(&cpu(&sim, &dom0, page, 0), b"changed!", "half of the line");
    assert_eq!(&cpu(&sim, &dom0, page, 64), b"received", "all of it");
    assert_eq!(&cpu(&sim, &dom0, page, 128), b"changed!", "half of it");
    assert_eq!(&seen(&device, at.0 + 128), b"changed!");
}

#[test]
fn a_wrong_address_is_another_page_or_none() {
    let sim = Sim::new();
    let dom0 = sim.create(DomainConfig::dom0());
    let secret = frame(&dom0);
    sim.write(dom0.id(), secret, 0, b"not this");
    // The guest's frame number means a page of domain 0's to the bus.
    let guest = sim.create(DomainConfig { first_gfn: Some(secret.0), ..DomainConfig::guest() });
    let page = granted(&sim, &guest, dom0.id(), 8);
    assert_eq!(page, secret);
    sim.write(guest.id(), page, 0, b"but this");
    let coherent = DmaConfig { coherent: true, ..DmaConfig::BARE };
    let device = DmaDevice::new(&sim, dom0.id(), coherent);
    let window = dom0.window().unwrap();
    let op = map_to_read(&dom0, guest.id(), 8, &window);
    assert_eq!(&seen(&device, op.dev_bus_addr), b"but this");
    assert_eq!(&seen(&device, page.address()), b"not this");
    assert_eq!(device.counts().faults, 0);
    assert_eq!(seen(&device, window.gfn().address()), GARBAGE, "where it is mapped is no address");
    assert_eq!(device.counts().faults, 1);
    assert!(!device.write(BusAddr(window.gfn().address()), b"x"));
    assert_eq!(device.counts().faults, 2);
    assert!(unmap(&dom0, &op).is_ok());
    assert_eq!(device.counts().stray, 0);
    assert_eq!(&seen(&device, op.dev_bus_addr), b"but this", "nothing keeps it from it");
    assert_eq!(device.counts().stray, 1, "but it has no business there any more");
}

#[test]
fn a_page_that_is_only_read_must_not_be_written_nor_one_that_was_freed() {
    let (sim, dom0, guest) = machine(DomainConfig::dom0());
    let device = DmaDevice::new(&sim, dom0.id(), DmaConfig::BARE);
    granted(&sim, &guest, dom0.id(), 8);
    let op = map_to_read(&dom0, guest.id(), 8, &dom0.window().unwrap());
    assert!(device.write(BusAddr(op.dev_bus_addr), b"x"));
    assert_eq!(device.counts().stray, 1);
    let also = map(&dom0, guest.id(), 8, &dom0.window().unwrap());
    assert!(device.write(BusAddr(op.dev_bus_addr), b"x"));
    assert_eq!(device.counts().stray, 1);
    assert!(unmap(&dom0, &also).is_ok());
    assert!(device.write(BusAddr(op.dev_bus_addr), b"x"));
    assert_eq!(device.counts().stray, 2);
    let own = dom0.alloc_pages(pages(1)).unwrap();
    let at = bus(&sim, &dom0, dom0.virt_to_gfn(own));
    assert!(device.write(at, b"x"));
    assert_eq!(device.counts().stray, 2);
    // SAFETY: the pages of the call above; the device is the test's subject.
    unsafe { dom0.free_pages(own, pages(1)) };
    assert!(device.write(at, b"x"));
    assert_eq!(device.counts().stray, 3);
    dom0.alloc_pages(pages(1)).unwrap();
    assert_eq!(seen(&device, at.0), GARBAGE, "what a device left in a freed page is gone");
    assert_eq!(device.counts().stray, 3);
}

#[test]
fn cache_flush_is_for_pages_one_owns_or_has_mapped() {
    let (sim, dom0, guest) = machine(DomainConfig::dom0());
    let page = granted(&sim, &guest, dom0.id(), 8);
    let at = bus(&sim, &guest, page).0;
    let clean = GNTTAB_CACHE_CLEAN;
    assert_eq!(flush(&dom0, 0, 0, 0, 0), Ok(()), "the probe");
    assert_eq!(flush(&dom0, at, 0, 8, clean), Err(Errno::INVAL));
    assert_eq!(flush(&guest, at, 0, 8, clean), Ok(()));
    let ops = [map_to_read(&dom0, guest.id(), 8, &dom0.window().unwrap()); 1];
    let again = map(&dom0, guest.id(), 8, &dom0.window().unwrap());
    assert_eq!(flush(&dom0, at, 0, 8, clean), Ok(()));
    assert!(unmap(&dom0, &again).is_ok());
    assert_eq!(flush(&dom0, at, 0, 8, clean), Ok(()), "one mapping is left");
    assert_eq!(flush(&dom0, at, 4095, 2, clean), Err(Errno::INVAL));
    assert_eq!(flush(&dom0, at, 4096, 0, clean), Err(Errno::INVAL));
    assert_eq!(flush(&dom0, at, 0, 8, 4), Err(Errno::INVAL));
    assert_eq!(flush(&dom0, at + (1 << 40), 0, 8, clean), Err(Errno::INVAL), "no such page");
    // What comes before a bad operation is done.
    let device = DmaDevice::new(&sim, dom0.id(), DmaConfig::BARE);
    sim.write(guest.id(), page, 0, b"a packet");
    let good = CacheFlush { dev_bus_addr: at, offset: 0, length: 8, op: clean };
    let bad = CacheFlush { op: 8, ..good };
    assert_eq!(dom0.cache_flush(&mut [good, bad]), Err(Errno::INVAL));
    assert_eq!(&seen(&device, at), b"a packet");
    assert!(unmap(&dom0, &ops[0]).is_ok());
    assert_eq!(flush(&dom0, at, 0, 8, clean), Err(Errno::INVAL));
    let without = sim.create(DomainConfig { cache_flush: false, ..DomainConfig::guest() });
    assert_eq!(flush(&without, 0, 0, 0, 0), Err(Errno::NOSYS));
}

#[test]
fn the_alias_is_where_the_cpu_cleans_when_xen_does_not() {
    let config = DomainConfig::dom0();
    let config =
        DomainConfig { features: config.features | IDENTITY, cache_flush: false, ..config };
    let (sim, dom0, guest) = machine(config);
    let device = DmaDevice::new(&sim, dom0.id(), DmaConfig::BARE);
    let page = granted(&sim, &guest, dom0.id(), 8);
    sim.write(guest.id(), page, 0, b"a packet");
    let window = dom0.window().unwrap();
    let op = map_to_read(&dom0, guest.id(), 8, &window);
    assert!(dom0.clean_cache(op.dev_bus_addr, 8));
    assert_eq!(&seen(&device, op.dev_bus_addr), b"a packet");
    assert!(sim.violations().is_empty());
    // Without the bit the same address is nothing to the CPU, and nothing is cleaned.
    assert!(unmap(&dom0, &op).is_ok());
    sim.set_features(dom0.id(), DomainConfig::dom0().features);
    sim.write(guest.id(), page, 0, b"a second");
    let op = map_to_read(&dom0, guest.id(), 8, &window);
    assert!(!dom0.clean_cache(op.dev_bus_addr, 8));
    assert_eq!(sim.violations().len(), 1);
    assert_eq!(&seen(&device, op.dev_bus_addr), b"a packet", "sent twice");
    assert!(dom0.clean_cache(window.gfn().address(), 8), "where it is mapped does as well");
    assert_eq!(&seen(&device, op.dev_bus_addr), b"a second");
}

#[test]
fn behind_an_iommu_guest_physical_addresses_are_right_and_others_refused() {
    let (sim, dom0, guest) = machine(DomainConfig { direct_mapped: false, ..DomainConfig::dom0() });
    let device = DmaDevice::new(&sim, dom0.id(), DmaConfig::SERVER);
    let page = granted(&sim, &guest, dom0.id(), 8);
    sim.write(guest.id(), page, 0, b"a packet");
    let window = dom0.window().unwrap();
    let at = window.gfn().address();
    let op = map_to_read(&dom0, guest.id(), 8, &window);
    assert_eq!(&seen(&device, at), b"a packet");
    assert_eq!(seen(&device, op.dev_bus_addr), GARBAGE);
    assert_eq!(device.counts().faults, 1);
    assert!(!device.write(BusAddr(at), b"x"), "it is mapped for reading");
    let own = frame(&dom0);
    assert!(device.write(BusAddr(own.address()), b"received"));
    assert_eq!(&cpu(&sim, &dom0, own, 0), b"received");
    let without = Iommu::Guest { grants: false };
    let without = DmaConfig { iommu: without, ..DmaConfig::SERVER };
    let without = DmaDevice::new(&sim, dom0.id(), without);
    assert_eq!(seen(&without, at), GARBAGE, "this Xen maintains no grants there");
    assert_eq!(&seen(&without, own.address()), b"received");
    assert!(unmap(&dom0, &op).is_ok());
    assert_eq!(seen(&device, at), GARBAGE);
    assert_eq!(device.counts().stray, 0);
}

#[test]
fn behind_an_arm_iommu_machine_addresses_are_right_while_mapped() {
    let (sim, dom0, guest) = machine(DomainConfig::dom0());
    let config = DmaConfig { coherent: true, iommu: Iommu::Machine };
    let device = DmaDevice::new(&sim, dom0.id(), config);
    let page = granted(&sim, &guest, dom0.id(), 8);
    sim.write(guest.id(), page, 0, b"a packet");
    assert_eq!(seen(&device, bus(&sim, &guest, page).0), GARBAGE);
    let op = map_to_read(&dom0, guest.id(), 8, &dom0.window().unwrap());
    assert_eq!(&seen(&device, op.dev_bus_addr), b"a packet", "though no alias is advertised");
    assert!(!device.write(BusAddr(op.dev_bus_addr), b"x"));
    let own = dom0.alloc_pages(pages(1)).unwrap();
    let at = bus(&sim, &dom0, dom0.virt_to_gfn(own));
    assert!(device.write(at, b"x"));
    assert_eq!(device.counts().stray, 0);
    // SAFETY: the page of the call above; the device is the test's subject.
    unsafe { dom0.free_pages(own, pages(1)) };
    assert!(device.write(at, b"x"), "an IOMMU knows nothing of the kernel's allocator");
    assert_eq!(device.counts().stray, 1);
    assert!(unmap(&dom0, &op).is_ok());
    assert_eq!(seen(&device, op.dev_bus_addr), GARBAGE);
    assert_eq!(device.counts().faults, 3);
}

#[test]
fn transfers_go_on_over_the_end_of_a_page() {
    let (sim, dom0, _) = machine(DomainConfig::dom0());
    let config = DmaConfig { coherent: true, ..DmaConfig::BARE };
    let device = DmaDevice::new(&sim, dom0.id(), config);
    let first = dom0.virt_to_gfn(dom0.alloc_pages(pages(2)).unwrap());
    let at = BusAddr(first.address() + PAGE_SIZE as u64 - 3);
    assert!(device.write(at, b"over the edge"));
    let mut back = [0; 13];
    assert!(device.read(at, &mut back));
    assert_eq!(&back, b"over the edge");
    let mut tail = [0; 10];
    assert!(sim.read(dom0.id(), Gfn(first.0 + 1), 0, &mut tail));
    assert_eq!(&tail, b"r the edge");
    assert_eq!((device.counts().reads, device.counts().writes), (2, 2));
    // Behind the block is nothing.
    let end = BusAddr(first.address() + 2 * PAGE_SIZE as u64 - 4);
    let mut bytes = [0; 8];
    assert!(!device.read(end, &mut bytes));
    assert_eq!(bytes, [0, 0, 0, 0, 0xa5, 0xa5, 0xa5, 0xa5]);
}

//! Where the devices are, their interrupt, and the caches, on 64-bit Arm.

use core::arch::asm;
use core::ptr::{NonNull, with_exposed_provenance_mut};
use core::sync::atomic::{AtomicBool, Ordering};

use features::{Features, XenFeatures};
use virtio_drivers::transport::mmio::{MmioError, MmioTransport, MmioVersion, VirtIOHeader};
use virtio_drivers::transport::{DeviceType, DeviceTypeError, Transport};

use super::Net;
use crate::arch;
pub use crate::arch::Interrupt;
use crate::machine::Hv;
use crate::tree::VirtioDevice;

/// The first network card that the device tree has and that can be used, when asked for the first time. A card sees what the
/// processor has in its caches if the tree says so of it, and `coherent` is not false. What is in the way of using one is said
/// in the log.
#[must_use]
pub fn find(hv: &Hv, coherent: bool) -> Option<Net> {
    static FOUND: AtomicBool = AtomicBool::new(false);
    if FOUND.swap(true, Ordering::Relaxed) {
        return None;
    }
    let bits = Features::read(hv).ok()?.snapshot().bits();
    arch::virtio_devices().into_iter().find_map(|device| {
        let transport = transport(&device)?;
        // A card is told of our memory by our addresses.
        if bits.contains(XenFeatures::NOT_DIRECT_MAPPED) {
            log::warn!("virtio: a network card, but this domain's addresses are not the machine's");
            return None;
        }
        let found = match Interrupt::enable(device.spi) {
            Some(interrupt) => Net::new(hv, transport, interrupt, coherent && device.coherent),
            None => Err("an interrupt of its own"),
        };
        found
            .inspect_err(|missing| {
                log::warn!(
                    "virtio: the network card at {:#x} has not {missing}",
                    device.registers.start
                );
            })
            .ok()
    })
}

/// The registers, if there is a network card behind them.
fn transport(device: &VirtioDevice) -> Option<MmioTransport<'static>> {
    let at = device.registers.start;
    let header = NonNull::new(with_exposed_provenance_mut::<VirtIOHeader>(at as usize))?;
    let len = device.registers.end.checked_sub(at)? as usize;
    // SAFETY: boot has mapped what the tree says are a device's registers, for good and as device memory, and those of a virtio
    // device begin with these. Nothing else uses them: there is one caller, which runs once and is shown each device once.
    let transport = match unsafe { MmioTransport::new(header, len) } {
        Ok(transport) => transport,
        Err(MmioError::InvalidDeviceID(DeviceTypeError::InvalidDeviceType(0))) => return None,
        Err(error) => {
            log::warn!("virtio: the device at {at:#x} cannot be used: {error}");
            return None;
        }
    };
    if transport.device_type() != DeviceType::Network {
        return None;
    }
    if transport.version() == MmioVersion::Legacy {
        log::warn!(
            "virtio: the network card at {at:#x} is a legacy device, which is not supported; QEMU makes others with -global virtio-mmio.force-legacy=false"
        );
        return None;
    }
    Some(transport)
}

/// Bytes in the smallest line of any data cache.
fn line() -> usize {
    let kinds: usize;
    // SAFETY: a register that anybody may read.
    unsafe {
        asm!("mrs {}, ctr_el0", out(reg) kinds, options(nomem, nostack, preserves_flags));
    }
    // CTR_EL0.DminLine: the logarithm of its words.
    4 << (kinds >> 16 & 15)
}

/// Has whoever does not see our caches see what we wrote to these bytes, which are mapped.
pub fn clean_cache(start: usize, len: usize) {
    let (line, end) = (line(), start.saturating_add(len));
    let mut at = start & !(line - 1);
    while at < end {
        // SAFETY: to write a line back changes no memory that anybody can tell from here. A fault, where nothing is mapped, ends
        // the domain.
        unsafe { asm!("dc cvac, {}", in(reg) at, options(nostack, preserves_flags)) };
        at += line;
    }
    // Before the device is told.
    // SAFETY: a barrier.
    unsafe { asm!("dsb sy", options(nostack, preserves_flags)) };
}

/// As [`clean_cache`], of bytes in a page of a guest's at their machine address. Answers whether they are there: Xen puts them there
/// when a page is mapped, or does not, and says nothing.
pub fn clean_machine(start: u64, len: usize) -> bool {
    let seen = arch::see_machine(start);
    seen.inspect(|at| clean_cache(*at, len)).is_some()
}

/// Has us see what was written to these bytes, which are mapped, by whoever does not see our caches. We have written to none of
/// the lines since they were cleaned.
pub fn discard_cache(start: usize, len: usize) {
    let (line, end) = (line(), start.saturating_add(len));
    let mut at = start & !(line - 1);
    while at < end {
        // SAFETY: as above; a line that was written to all the same is written back, not lost.
        unsafe { asm!("dc civac, {}", in(reg) at, options(nostack, preserves_flags)) };
        at += line;
    }
    // Before we look.
    // SAFETY: a barrier.
    unsafe { asm!("dsb sy", options(nostack, preserves_flags)) };
}

//! Interrupts, the clock, and sleep.
//!
//! Interrupts stay masked in the processor and are never taken: `WFI` wakes on one all the same, and the interrupt
//! controller is asked what it was. So no handler runs between two instructions of anything else.

use core::ptr::{NonNull, with_exposed_provenance_mut};
use core::sync::atomic::{AtomicBool, Ordering};

use aarch64_cpu::asm::{barrier, wfi};
use aarch64_cpu::registers::{
    CNTFRQ_EL0, CNTV_CTL_EL0, CNTV_CVAL_EL0, CNTVCT_EL0, Readable, Writeable,
};
use arm_gic::gicv3::registers::{Gicd, GicrSgi};
use arm_gic::gicv3::{GicCpuInterface, GicV3};
use arm_gic::{IntId, InterruptGroup, UniqueMmioPointer};
use evtchn::{Binder, Channel};
use hypercall::{Errno, Instant};

use crate::clock;
use crate::machine::Hv;
use crate::tree::Gic;

/// Nanoseconds since Xen created this domain: the virtual counter, which Xen starts at 0. Never goes back.
#[must_use]
pub fn now() -> Instant {
    // Without the barrier the counter may be read before the instructions in front of it are done.
    barrier::isb(barrier::SY);
    clock::instant(CNTVCT_EL0.get(), CNTFRQ_EL0.get())
}

/// Turns on the two interrupts that can end a sleep besides a device's. `None` if the controller will not have it.
///
/// # Safety
/// The registers are mapped as device memory, and nothing else uses them.
pub unsafe fn init(gic: &Gic, event_ppi: u32, timer_ppi: u32) -> Option<()> {
    let at = |address: u64| with_exposed_provenance_mut::<u8>(address as usize);
    let distributor = NonNull::new(at(gic.distributor.start))?.cast::<Gicd>();
    let redistributor = NonNull::new(at(gic.redistributors.start))?.cast::<GicrSgi>();
    CNTV_CTL_EL0.set(0);
    // SAFETY: the caller's promise. The first redistributor is that of vCPU 0, the only one there is.
    let mut gic =
        unsafe { GicV3::new(UniqueMmioPointer::new(distributor), redistributor, 1) }.ok()?;
    gic.setup(0);
    GicCpuInterface::set_priority_mask(0xff);
    for ppi in [event_ppi, timer_ppi] {
        gic.enable_interrupt(IntId::ppi(ppi), Some(0), true).ok()?;
    }
    #[cfg(feature = "virtio-net")]
    device::keep(gic);
    Some(())
}

/// No event channel is the clock's alarm here: the timer has an interrupt of its own.
pub fn bind_timer(_: &Binder<Hv>) -> Result<Option<Channel<Hv>>, Errno> {
    Ok(None)
}

/// Waits for an interrupt, until the deadline at most. Uses no processor time meanwhile.
///
/// No event is missed: interrupts that [`acknowledge`] took note of were raised before the flag was looked at. One that is
/// raised later stays pending until the next round, and `WFI` returns at once while one is, masked or not: Xen blocks the
/// vCPU first and looks for pending interrupts afterwards (`vcpu_block_unless_event_pending`). The same holds for the
/// timer.
///
/// `SCHEDOP_block` would not do: Xen unmasks the caller's interrupts in it.
pub fn wait(until: Option<Instant>) {
    if let Some(deadline) = until {
        CNTV_CVAL_EL0.set(clock::ticks(deadline, CNTFRQ_EL0.get()));
        // Each time anew: when the timer fires, Xen masks it (`vtimer_interrupt`).
        CNTV_CTL_EL0.write(CNTV_CTL_EL0::ENABLE::SET);
    }
    barrier::dsb(barrier::SY);
    wfi();
}

/// Takes note of all interrupts that are pending now. What they mean is looked up elsewhere: in the shared info page, on the
/// clock, and by a device's driver. Answers whether there is one that its driver has not asked about since.
pub fn acknowledge() -> bool {
    // First the timer, or its level would raise the interrupt again.
    CNTV_CTL_EL0.set(0);
    barrier::isb(barrier::SY);
    let take = |interrupt: IntId| {
        if interrupt.is_spi() {
            DEVICE.store(true, Ordering::Relaxed);
        }
    };
    while GicCpuInterface::handle_interrupt(InterruptGroup::Group1, take) {}
    DEVICE.load(Ordering::Relaxed)
}

/// A device has raised its interrupt, and its driver has not asked since. There is at most one device.
static DEVICE: AtomicBool = AtomicBool::new(false);

/// The interrupt of the one device that there may be.
#[cfg(feature = "virtio-net")]
pub mod device {
    use arm_gic::Trigger;
    use spin::Mutex;

    use super::*;

    static GIC: Mutex<Option<GicV3<'static>>> = Mutex::new(None);

    pub fn keep(gic: GicV3<'static>) {
        *GIC.lock() = Some(gic);
    }

    /// A shared interrupt that is enabled as long as this lives.
    #[derive(Debug)]
    pub struct Interrupt(IntId);

    impl Interrupt {
        /// Enables a shared interrupt, counted from 0. `None` if there is none of that number.
        ///
        /// It is taken as an edge, whatever the device makes of its line: as a level it would come again at once, as
        /// [`acknowledge`] does nothing about its cause. So the driver has to quieten the device before it looks at what there
        /// is to do; what comes after that is an edge again.
        pub fn enable(spi: u32) -> Option<Self> {
            let number = (spi < IntId::MAX_SPI_COUNT).then(|| IntId::spi(spi))?;
            let mut gic = GIC.lock();
            let gic = gic.as_mut()?;
            gic.set_trigger(number, None, Trigger::Edge).ok()?;
            gic.enable_interrupt(number, None, true).ok()?;
            Some(Self(number))
        }

        /// Whether it has been raised since the last time.
        pub fn take(&self) -> bool {
            DEVICE.swap(false, Ordering::Relaxed)
        }
    }

    impl Drop for Interrupt {
        fn drop(&mut self) {
            if let Some(gic) = GIC.lock().as_mut() {
                // It has been enabled, so it is one that there is.
                let _ = gic.enable_interrupt(self.0, None, false);
            }
            DEVICE.store(false, Ordering::Relaxed);
        }
    }
}

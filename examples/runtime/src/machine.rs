//! What this domain's memory looks like to the crates above: everything is mapped at its own guest-physical address.

use core::num::NonZeroUsize;
use core::ops::Range;
use core::ptr::{NonNull, with_exposed_provenance_mut};
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use hypercall::{Gfn, PAGE_SIZE, Platform, Window, Xen};
use spin::Mutex;

use crate::pages::Pages;
use crate::windows::{WINDOWS, Windows};

/// The machine this image runs on. There is one, and a handle to it takes no space.
#[derive(Clone, Copy, Debug)]
pub struct Machine(());

/// A zero-sized handle to the Xen underneath.
pub type Hv = Xen<Machine>;

/// The one machine.
pub const MACHINE: Machine = Machine(());

/// Xen, for this crate's own use.
// SAFETY: the image starts only under Xen on Arm, or as a PVH guest: memory is translated.
pub const HV: Hv = unsafe { Xen::new(MACHINE) };

/// This domain's free memory.
pub static PAGES: Mutex<Pages> = Mutex::new(Pages::new());

static FREE_WINDOWS: Windows = Windows::new();
/// Where the windows are. Written once, at boot.
static FIRST_WINDOW: AtomicU64 = AtomicU64::new(0);
/// Where frames of the grant table may be, as two frame numbers. Written once, at boot.
static GRANT_TABLE: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
static SHARED_INFO: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());

/// Bytes of guest-physical space that the windows take.
pub const WINDOW_BYTES: u64 = (WINDOWS * PAGE_SIZE) as u64;

/// Fills in where things are.
///
/// # Safety
/// Called once, before anything else of this module. All three are mapped at their own addresses as normal memory; the
/// windows, [`WINDOW_BYTES`] from `first_window`, and the grant table's space are nobody's memory; the shared info page
/// stays where it is.
pub unsafe fn init(shared_info: NonNull<u8>, first_window: Gfn, grant_table: Range<Gfn>) {
    SHARED_INFO.store(shared_info.as_ptr(), Ordering::Relaxed);
    FIRST_WINDOW.store(first_window.0, Ordering::Relaxed);
    let [start, end] = &GRANT_TABLE;
    start.store(grant_table.start.0, Ordering::Relaxed);
    end.store(grant_table.end.0, Ordering::Relaxed);
}

fn at(address: u64) -> NonNull<u8> {
    NonNull::new(with_exposed_provenance_mut(address as usize)).unwrap_or(NonNull::dangling())
}

// SAFETY: pages come from `PAGES`, which hands each out once, and are zeroed here. Memory is mapped at its own address,
// so an address is its frame. A window is one bit of `FREE_WINDOWS`, taken by one atomic operation, and windows, grant
// table and shared info are mapped at boot where `init`'s caller promised that nothing else is.
unsafe impl Platform for Machine {
    fn alloc_pages(&self, count: NonZeroUsize) -> Option<NonNull<u8>> {
        let pages = PAGES.lock().alloc(count)?;
        // SAFETY: `count` pages from here on are ours alone.
        unsafe { pages.write_bytes(0, count.get() * PAGE_SIZE) };
        Some(pages)
    }

    unsafe fn free_pages(&self, pages: NonNull<u8>, count: NonZeroUsize) {
        if !PAGES.lock().free(pages, count) {
            log::error!("{count} pages at {pages:?} given back that were not taken");
        }
    }

    fn virt_to_gfn(&self, address: NonNull<u8>) -> Gfn {
        Gfn::of_address(address.expose_provenance().get() as u64)
    }

    fn shared_info(&self) -> NonNull<u8> {
        NonNull::new(SHARED_INFO.load(Ordering::Relaxed)).unwrap_or(NonNull::dangling())
    }

    fn grant_table_gfn(&self, index: u32) -> Option<Gfn> {
        let [start, end] = &GRANT_TABLE;
        let gfn = start.load(Ordering::Relaxed).checked_add(index.into())?;
        (gfn < end.load(Ordering::Relaxed)).then_some(Gfn(gfn))
    }

    fn window(&self) -> Option<Window> {
        let number = FREE_WINDOWS.take()? as u64;
        Some(Window::new(Gfn(FIRST_WINDOW.load(Ordering::Relaxed) + number)))
    }

    fn release_window(&self, window: Window) {
        let number = window.gfn().0.wrapping_sub(FIRST_WINDOW.load(Ordering::Relaxed));
        if !usize::try_from(number).is_ok_and(|number| FREE_WINDOWS.give(number)) {
            log::error!("{window:?} given back that was not taken");
        }
    }

    fn gfn_to_virt(&self, gfn: Gfn) -> NonNull<u8> {
        at(gfn.address())
    }
}

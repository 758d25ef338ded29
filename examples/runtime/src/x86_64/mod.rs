//! Bare metal on 64-bit x86, as a PVH guest: everything between Xen's jump to the image and `runtime_main`.

mod boot;
mod console;
mod faults;
mod mmu;
mod time;

use core::ffi::CStr;
use core::ops::Range;
use core::ptr::{NonNull, with_exposed_provenance};

use hypercall::abi::{HvmMemmapEntry, HvmStartInfo};
use hypercall::{Errno, Gfn, PAGE_SIZE, Platform, Suspended, Toolstack};
use spin::Mutex;

pub use console::{last_words, write};
pub use time::{acknowledge, bind_timer, now, wait};

use crate::machine::{self, HV, MACHINE, PAGES, WINDOW_BYTES};
use crate::ranges::Ranges;
use crate::start_info::{self, GRANT_TABLE_BYTES, Missing};
use crate::{BootInfo, Hv};
use mmu::{Tables, Use, pages_of};

const PAGE: u64 = PAGE_SIZE as u64;
/// What a command line may be long, its end included.
const MAX_BOOTARGS: u64 = 4096;

/// The page tables, for what is shown to us later.
static TABLES: Mutex<Option<Tables>> = Mutex::new(None);

unsafe extern "C" {
    safe static __image_start: u8;
    safe static __text_end: u8;
    safe static __rodata_end: u8;
    safe static __guard: u8;
    safe static __stack_bottom: u8;
    safe static __fault_stack_top: u8;
    safe static __image_end: u8;
}

unsafe extern "Rust" {
    /// What [`entry!`](crate::entry) defines.
    safe fn runtime_main(hv: Hv, boot: BootInfo) -> !;
}

fn place(symbol: &u8) -> u64 {
    (&raw const *symbol).expose_provenance() as u64
}

/// Where the assembly goes: in long mode, the first 4 GiB mapped, interrupts masked, on the final stack.
extern "C" fn start(info: u64) -> ! {
    // SAFETY: this runs once.
    unsafe { faults::init() };
    match boot(info) {
        Ok(info) => runtime_main(HV, info),
        Err(missing) => fail(missing),
    }
}

#[expect(clippy::panic, reason = "without any of these there is nothing to run on")]
fn fail(missing: &str) -> ! {
    panic!("cannot start: {missing}")
}

/// Reads what Xen left for us.
///
/// # Safety
/// By the boot protocol there is a `T` at the address, and its memory is mapped. Any bytes make a `T`.
unsafe fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the caller's promise.
    unsafe { with_exposed_provenance::<T>(address as usize).read_unaligned() }
}

/// The command line in place: it stays where Xen put it.
///
/// # Safety
/// The address is one of the start info's, or 0, and the memory is never written to.
unsafe fn command_line(address: u64) -> &'static str {
    if address == 0 {
        return "";
    }
    // SAFETY: the boot protocol ends it with a zero.
    let text = unsafe { CStr::from_ptr(with_exposed_provenance(address as usize)) };
    text.to_str().unwrap_or_default()
}

fn boot(address: u64) -> Result<BootInfo, Missing> {
    // SAFETY: the boot protocol's promise. Xen puts all of it below 4 GiB, where everything is mapped by now.
    let info: HvmStartInfo = unsafe { read(address) };
    let entries = start_info::entries(&info)?;
    // SAFETY: as above; the start info says where they are.
    let map = start_info::map(
        entries.clone().step_by(size_of::<HvmMemmapEntry>()).map(|at| unsafe { read(at) }),
    )?;
    let image = place(&__image_start)..place(&__image_end);
    // What is read later, or was not looked at yet: it stays. So does what is at address 0, where nothing is mapped.
    let kept = [
        0..PAGE,
        image.clone(),
        pages_of(&(address..address + size_of::<HvmStartInfo>() as u64)),
        pages_of(&entries),
        pages_of(&(info.cmdline_paddr..info.cmdline_paddr.saturating_add(MAX_BOOTARGS))),
    ];
    let space = start_info::space(map.end, WINDOW_BYTES, mmu::address_bits())
        .ok_or("guest-physical space above the memory map")?;

    // SAFETY: this runs once.
    let mut tables = unsafe { Tables::new() };
    map_image(&mut tables)
        .and_then(|()| map_memory(&mut tables, &map.memory, &image))
        .and_then(|()| tables.map(&(space.shared_info..space.end), Use::Write))
        .ok_or("fewer pieces of memory to map")?;
    // SAFETY: they map the image and all other memory, with the rights that the linker gave to the image.
    unsafe { tables.enable() };
    *TABLES.lock() = Some(tables);

    let mut free = Ranges::default();
    map.memory
        .iter()
        .try_for_each(|range| free.add(range.clone()))
        .and_then(|()| kept.iter().try_for_each(|used| free.remove(used)))
        .ok_or("memory in fewer pieces")?;
    // SAFETY: mapped above, and used by nobody: what is in use is cut out.
    free.iter().for_each(|range| unsafe { PAGES.lock().add(range) });

    let grant_table = space.grant_table..space.grant_table + GRANT_TABLE_BYTES;
    // SAFETY: the space is mapped, and none of it is memory: the memory map names nothing there.
    unsafe {
        machine::init(
            MACHINE.gfn_to_virt(Gfn::of_address(space.shared_info)),
            Gfn::of_address(space.windows),
            Gfn::of_address(grant_table.start)..Gfn::of_address(grant_table.end),
        );
    }
    attach().map_err(|_| "a shared info page and a callback by vector")?;
    console::init();
    crate::console::init();
    // SAFETY: its pages are kept, and nobody writes there.
    let bootargs = unsafe { command_line(info.cmdline_paddr) };
    Ok(BootInfo { bootargs, memory: map.memory.total() })
}

fn map_image(tables: &mut Tables) -> Option<()> {
    let [text, rodata] = [&__text_end, &__rodata_end].map(place);
    tables.map(&(place(&__image_start)..text), Use::Execute)?;
    tables.map(&(text..rodata), Use::Read)?;
    tables.map(&(rodata..place(&__guard)), Use::Write)?;
    // The page between is the guard: the stack grows down into it, and faults.
    tables.map(&(place(&__stack_bottom)..place(&__image_end)), Use::Write)
}

fn map_memory(tables: &mut Tables, memory: &Ranges, image: &Range<u64>) -> Option<()> {
    let mut rest = Ranges::default();
    memory.iter().try_for_each(|range| rest.add(range.clone()))?;
    rest.remove(image)?;
    // A null pointer is to fault.
    rest.remove(&(0..PAGE))?;
    rest.iter().try_for_each(|range| {
        let whole = range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE;
        tables.map(&whole, Use::Write)
    })
}

/// Shows the shared info page, and has Xen say by an interrupt when there is an event: what Xen forgets of a domain that
/// goes on elsewhere.
fn attach() -> Result<(), Errno> {
    let page = MACHINE.virt_to_gfn(MACHINE.shared_info());
    // SAFETY: kept free for this at boot.
    unsafe { HV.map_shared_info(page)? };
    let vector = hypercall::abi::CALLBACK_TYPE_VECTOR << 56 | u64::from(faults::UPCALL_VECTOR);
    HV.set_hvm_param(hypercall::DomId::SELF, hypercall::abi::hvm_param::CALLBACK_IRQ, vector)
}

/// Whether [`suspend`] can be of use.
pub const CAN_SUSPEND: bool = true;

/// Asks to be suspended: to be saved, moved, or copied. Returns when this domain goes on, be it as another one: then
/// shared info, callback, clock and console are in order again, and all else that Xen knew of the domain is the
/// program's to set up anew.
///
/// # Errors
/// As Xen answers. The domain goes on as it was.
pub fn suspend(hv: &Hv) -> Result<Suspended, Errno> {
    // The clock goes on from here.
    let _ = now();
    // SAFETY: `attach` and what follows it; the rest is said above.
    let how = unsafe { hv.suspend()? };
    if how == Suspended::Resumed {
        if attach().is_err() {
            fail("a shared info page and a callback by vector, after a suspend");
        }
        time::resume();
        console::init();
    }
    Ok(how)
}

/// Where we see a frame of our own that the toolstack set aside, mapped for good.
pub fn show(frame: Gfn) -> Option<NonNull<u8>> {
    let mut tables = TABLES.lock();
    let tables = tables.as_mut()?;
    let page = frame.address()..frame.address().checked_add(PAGE)?;
    if !tables.maps(page.start) {
        tables.map(&page, Use::Write)?;
    }
    Some(MACHINE.gfn_to_virt(frame))
}

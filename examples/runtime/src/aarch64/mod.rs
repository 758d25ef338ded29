//! Bare metal on 64-bit Arm: everything between Xen's jump to the image and `runtime_main`.

mod boot;
mod exceptions;
mod interrupts;
mod mmu;
mod uart;

use core::ops::Range;
use core::ptr::{NonNull, with_exposed_provenance};
use core::slice;
use core::sync::atomic::{AtomicBool, Ordering};

use features::XenFeatures;
use hypercall::{Errno, Gfn, Hypervisor, PAGE_SIZE, Platform, Suspended};

#[cfg(feature = "virtio-net")]
pub use interrupts::device::Interrupt;
pub use interrupts::{acknowledge, bind_timer, now, wait};

use crate::machine::{self, HV, MACHINE, PAGES, WINDOW_BYTES};
use crate::ranges::Ranges;
use crate::tree::Tree;
#[cfg(feature = "virtio-net")]
use crate::tree::VirtioDevice;
use crate::{BootInfo, Hv, console};
use mmu::{Tables, Use};

const PAGE: u64 = PAGE_SIZE as u64;

unsafe extern "C" {
    safe static __image_start: u8;
    safe static __text_end: u8;
    safe static __rodata_end: u8;
    safe static __relro_end: u8;
    safe static __guard: u8;
    safe static __stack_bottom: u8;
    safe static __image_end: u8;
}

unsafe extern "Rust" {
    /// What [`entry!`](crate::entry) defines.
    safe fn runtime_main(hv: Hv, boot: BootInfo) -> !;
}

/// Whether [`suspend`] can be of use: Xen on Arm has no way to save a domain.
pub const CAN_SUSPEND: bool = false;

/// Asks to be suspended: to be saved, moved, or copied.
///
/// # Errors
/// [`Errno::NOSYS`]: nobody could save this domain.
pub fn suspend(_: &Hv) -> Result<Suspended, Errno> {
    Err(Errno::NOSYS)
}

/// Prints on this domain's console: the UART that Xen emulates for a guest, else Xen's own, which it lets dom0 use.
pub fn write(text: &[u8]) {
    if uart::write(text).is_none() {
        HV.console_write(text);
    }
}

/// Prints what is said before the domain ends itself.
pub fn last_words(text: &[u8]) {
    write(text);
}

/// Where a toolstack puts the pages that it shares with a guest: `GUEST_MAGIC_BASE` and `_SIZE` (arch-arm.h).
const SET_ASIDE: Range<u64> = 0x3900_0000..0x3a00_0000;

/// Whether those addresses are mapped. Written once, at boot.
static IS_SET_ASIDE: AtomicBool = AtomicBool::new(false);

/// Where we see a frame of our own that the toolstack set aside, mapped for good. To dom0 nobody gives any.
pub fn show(frame: Gfn) -> Option<NonNull<u8>> {
    let is_shown = IS_SET_ASIDE.load(Ordering::Relaxed) && SET_ASIDE.contains(&frame.address());
    is_shown.then(|| MACHINE.gfn_to_virt(frame))
}

/// Maps what a guest has and dom0 has not: the UART, and the addresses at which pages appear when the toolstack gives them.
fn map_guest(tree: &Tree<'_>, tables: &mut Tables) -> Option<()> {
    if let Some(registers) = tree.uart() {
        tables.map(&pages_of(&registers), Use::Device)?;
        // SAFETY: mapped for good, and the tree says what is there.
        unsafe { uart::init(registers.start) };
    }
    if !tree.mentions(&SET_ASIDE) {
        tables.map(&SET_ASIDE, Use::Write)?;
        IS_SET_ASIDE.store(true, Ordering::Relaxed);
    }
    Some(())
}

fn place(symbol: &u8) -> u64 {
    (&raw const *symbol).expose_provenance() as u64
}

/// Where the assembly goes, with interrupts masked, the image relocated, .bss cleared, a stack, the MMU on and caches off.
extern "C" fn start(tree: usize) -> ! {
    match boot(tree) {
        Ok(info) => runtime_main(HV, info),
        Err(missing) => fail(missing),
    }
}

#[expect(clippy::panic, reason = "without any of these there is nothing to run on")]
fn fail(missing: &str) -> ! {
    panic!("cannot start: {missing}")
}

/// The device tree in place: Xen puts it into our memory, and it stays there.
fn device_tree(address: usize) -> Option<&'static [u8]> {
    let head = with_exposed_provenance::<[u8; 8]>(address);
    // SAFETY: by the boot protocol there is a device tree at the address, of at least a header; nobody writes to it.
    let [d0, 0x0d, 0xfe, 0xed, size @ ..] = (unsafe { head.read() }) else { return None };
    let length = u32::from_be_bytes(size) as usize;
    // SAFETY: as above, and the header says how long it is. The memory is kept out of the heap.
    (d0 == 0xd0).then(|| unsafe { slice::from_raw_parts(with_exposed_provenance(address), length) })
}

fn boot(address: usize) -> Result<BootInfo, &'static str> {
    let data = device_tree(address).ok_or("a device tree in x0")?;
    let tree = Tree::new(data).ok_or("a readable device tree")?;
    let memory = tree.memory().ok_or("memory in fewer pieces")?;
    let gic = tree.gic().ok_or("a GICv3 in the device tree")?;
    let xen = tree.hypervisor().ok_or("a hypervisor in the device tree")?;
    let timer_ppi = tree.timer_ppi().ok_or("a virtual timer in the device tree")?;
    let image = place(&__image_start)..place(&__image_end);
    let tree_at = pages_of(&(address as u64..(address + data.len()) as u64));
    if tree_at.start < image.end && image.start < tree_at.end {
        return Err("a device tree outside the image");
    }

    // SAFETY: this runs once.
    let mut tables = unsafe { Tables::new() };
    map_image(&mut tables)
        .and_then(|()| map_memory(&mut tables, &memory, &image))
        .and_then(|()| tables.map(&pages_of(&gic.distributor), Use::Device))
        .and_then(|()| tables.map(&pages_of(&gic.redistributors), Use::Device))
        .and_then(|()| tables.map(&pages_of(&xen.grant_table), Use::Write))
        .ok_or("fewer pieces of memory to map")?;
    // SAFETY: boot leaves the caches off; the tables map the image, the device tree and all other memory. What was
    // written since is in the image: its data, its stack and the tables.
    unsafe { mmu::enable(&tables, &image) };
    #[cfg(feature = "virtio-net")]
    map_devices(&tree, &mut tables, data).ok_or("fewer pieces of registers to map")?;
    let offered = XenFeatures::from_bits_retain(HV.features(0).unwrap_or(0));
    #[cfg(feature = "virtio-net")]
    if !offered.contains(XenFeatures::NOT_DIRECT_MAPPED) {
        map_machine(&mut tables).ok_or("fewer pieces of memory to map")?;
    }
    if !offered.contains(XenFeatures::DOM0) {
        map_guest(&tree, &mut tables).ok_or("fewer pieces of memory to map")?;
    }
    console::init();

    let mut free = Ranges::default();
    memory.iter().try_for_each(|range| free.add(range.clone())).ok_or("memory")?;
    [image, tree_at]
        .into_iter()
        .chain(tree.reserved().map(|range| pages_of(&range)))
        .try_for_each(|used| free.remove(&used))
        .ok_or("memory in fewer pieces")?;
    // SAFETY: mapped above, and used by nobody: image, tree and reservations are cut out.
    free.iter().for_each(|range| unsafe { PAGES.lock().add(range) });

    let space =
        find_space(&tree, &mut tables).ok_or("guest-physical space that Xen lets us use")?;
    let (windows, shared_info) = (Gfn::of_address(space), Gfn::of_address(space + WINDOW_BYTES));
    let grant_table = Gfn::of_address(xen.grant_table.start)..Gfn::of_address(xen.grant_table.end);
    // SAFETY: all mapped, and none of it memory: `find_space` for the one, Xen's word for the other.
    unsafe { machine::init(MACHINE.gfn_to_virt(shared_info), windows, grant_table) };

    // SAFETY: mapped above as device memory; nothing else knows of the registers.
    unsafe { interrupts::init(&gic, xen.event_ppi, timer_ppi) }.ok_or("interrupts")?;
    Ok(BootInfo { bootargs: tree.bootargs(), memory: memory.total() })
}

/// The device tree, once the registers of its devices are mapped.
#[cfg(feature = "virtio-net")]
static TREE: spin::Once<&'static [u8]> = spin::Once::new();

/// Maps the registers of virtio devices, of which several may be in a page.
#[cfg(feature = "virtio-net")]
fn map_devices(tree: &Tree<'_>, tables: &mut Tables, data: &'static [u8]) -> Option<()> {
    let mut pages = Ranges::default();
    for device in tree.virtio() {
        let range = pages_of(&device.registers);
        pages.remove(&range)?;
        pages.add(range)?;
    }
    pages.iter().try_for_each(|range| tables.map(range, Use::Device))?;
    TREE.call_once(|| data);
    Some(())
}

/// Where the machine's addresses are seen: so much above themselves, where nothing has its own address.
#[cfg(feature = "virtio-net")]
const MACHINE_VIEW: u64 = 1 << 47;

/// Which of them: as many as take one table, and as the processor can have.
#[cfg(feature = "virtio-net")]
fn machine_view() -> Range<u64> {
    0..1 << mmu::address_bits().min(39)
}

/// Maps them. Of what is there a direct-mapped domain sees its own, and what it has mapped of others' while
/// `XENFEAT_grant_map_identity` is advertised; all else is a fault.
#[cfg(feature = "virtio-net")]
fn map_machine(tables: &mut Tables) -> Option<()> {
    tables.map_moved(&machine_view(), MACHINE_VIEW, Use::Read)
}

/// Where we see a machine address; `None` if there is nothing that we may see.
#[cfg(feature = "virtio-net")]
pub fn see_machine(address: u64) -> Option<usize> {
    let at = machine_view().contains(&address).then_some(MACHINE_VIEW + address)?;
    // SAFETY: translation is on since boot. To read does nothing: the address is that of a page which a guest granted, or was one,
    // and never that of a device's registers. Where the view is not mapped, or nothing is seen in it, it is a fault.
    let is_there = unsafe { exceptions::is_readable(at) } == 1;
    is_there.then_some(at as usize)
}

/// The virtio devices, whose registers are mapped.
#[cfg(feature = "virtio-net")]
pub fn virtio_devices() -> heapless::Vec<VirtioDevice, { crate::ranges::MAX }> {
    let tree = TREE.get().and_then(|data| Tree::new(data));
    tree.iter().flat_map(Tree::virtio).take(crate::ranges::MAX).collect()
}

/// The pages that a range touches.
fn pages_of(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE * PAGE..range.end.next_multiple_of(PAGE)
}

fn map_image(tables: &mut Tables) -> Option<()> {
    let [text, rodata, relro] = [&__text_end, &__rodata_end, &__relro_end].map(place);
    tables.map(&(place(&__image_start)..text), Use::Execute)?;
    // Relocated already: constants that hold addresses are constants from here on.
    tables.map(&(text..relro.max(rodata)), Use::Read)?;
    tables.map(&(relro..place(&__guard)), Use::Write)?;
    // The page between is the guard: the stack grows down into it, and faults.
    tables.map(&(place(&__stack_bottom)..place(&__image_end)), Use::Write)
}

fn map_memory(tables: &mut Tables, memory: &Ranges, image: &Range<u64>) -> Option<()> {
    let mut rest = Ranges::default();
    memory.iter().try_for_each(|range| rest.add(range.clone()))?;
    rest.remove(image)?;
    rest.iter().try_for_each(|range| tables.map(range, Use::Write))
}

/// Finds space for the windows and, after them, the shared info page, shows that page there, and maps it all.
///
/// It has to be where no machine memory is, ours or anybody's: on a direct-mapped dom0 a frame may appear at its own
/// machine address while it is mapped, and Xen's extended regions, meant for this, do cover other domains' memory. Nor
/// may devices be there. So: just below the end of what the processor can address, where no board has memory, unless
/// the device tree names a device there. Xen may translate fewer bits than the processor has (an IOMMU with fewer, for
/// one); it refuses a page beyond, and the next smaller size is tried.
fn find_space(tree: &Tree<'_>, tables: &mut Tables) -> Option<u64> {
    const GIB: u64 = 1 << 30;
    let sizes = [48, 44, 42, 40, 39, 36].into_iter().filter(|bits| *bits <= mmu::address_bits());
    sizes.map(|bits| (1 << bits) - GIB).find(|&space| {
        let range = space..space + GIB;
        let shown: Result<(), Errno> = if tree.mentions(&range) {
            Err(Errno::BUSY)
        } else {
            // SAFETY: no memory of ours is there, and no device by the tree.
            unsafe { HV.map_shared_info(Gfn::of_address(space + WINDOW_BYTES)) }
        };
        shown.is_ok() && tables.map(&(space..space + WINDOW_BYTES + PAGE), Use::Write).is_some()
    })
}

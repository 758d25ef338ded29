//! Machine memory, and each domain's own view of it.
//!
//! Every page is an allocation of the host that stays where it is until the last handle to the simulated machine is gone, so
//! no pointer that the machine ever gave out dangles, whatever the domains do wrong.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use hypercall::{BusAddr, DomId, Gfn, PAGE_SIZE, Window};

/// The first machine frame: no frame number is ever mistaken for a small integer.
const FIRST_MFN: u64 = 0x4_0000;
/// Where windows begin: above all memory that a direct-mapped domain could have.
const FIRST_WINDOW: u64 = 0x800_0000;
/// What a freed page holds, so that who still reads it notices.
const POISON: u8 = 0xdb;

/// A page of the host, accessed through atomics alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    base: NonNull<u8>,
}

// SAFETY: every access is atomic, and the page outlives the machine's last handle.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    pub(crate) fn base(self) -> NonNull<u8> {
        self.base
    }

    fn at<T>(self, offset: usize) -> NonNull<T> {
        let within = (offset % PAGE_SIZE) & !(size_of::<T>() - 1);
        // SAFETY: rounded down to a multiple of the size, so a `T` there ends within the page.
        unsafe { self.base.add(within) }.cast()
    }

    pub(crate) fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: within the page, which is valid for as long as a handle to the machine lives.
        unsafe { self.at(offset).as_ref() }
    }

    pub(crate) fn half(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as above, and aligned by `at`.
        unsafe { self.at(offset).as_ref() }
    }

    pub(crate) fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as above, and aligned by `at`.
        unsafe { self.at(offset).as_ref() }
    }

    pub(crate) fn long(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as above, and aligned by `at`.
        unsafe { self.at(offset).as_ref() }
    }

    /// Copies bytes out, as many as there are up to the end of the page.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) {
        let len = to.len().min(PAGE_SIZE.saturating_sub(offset));
        let to = to.get_mut(..len).unwrap_or_default();
        let (head, rest) = to.split_at_mut((offset.wrapping_neg() % 8).min(len));
        let mut at = offset;
        for byte in head {
            *byte = self.byte(at).load(Ordering::Relaxed);
            at += 1;
        }
        let mut longs = rest.chunks_exact_mut(8);
        for long in &mut longs {
            long.copy_from_slice(&self.long(at).load(Ordering::Relaxed).to_ne_bytes());
            at += 8;
        }
        for byte in longs.into_remainder() {
            *byte = self.byte(at).load(Ordering::Relaxed);
            at += 1;
        }
    }

    /// Copies bytes in, as many as there is room for up to the end of the page.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        let len = from.len().min(PAGE_SIZE.saturating_sub(offset));
        let from = from.get(..len).unwrap_or_default();
        let (head, rest) = from.split_at((offset.wrapping_neg() % 8).min(len));
        let mut at = offset;
        for byte in head {
            self.byte(at).store(*byte, Ordering::Relaxed);
            at += 1;
        }
        let (longs, tail) = rest.as_chunks::<8>();
        for long in longs {
            self.long(at).store(u64::from_ne_bytes(*long), Ordering::Relaxed);
            at += 8;
        }
        for byte in tail {
            self.byte(at).store(*byte, Ordering::Relaxed);
            at += 1;
        }
    }

    fn fill(&self, byte: u8) {
        let long = u64::from_ne_bytes([byte; 8]);
        for at in (0..PAGE_SIZE).step_by(8) {
            self.long(at).store(long, Ordering::Relaxed);
        }
    }
}

/// A machine frame number, which only Xen and the bus know.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Mfn(u64);

impl Mfn {
    pub(crate) fn bus(self) -> BusAddr {
        BusAddr(Gfn(self.0).address())
    }

    pub(crate) fn of_bus(address: BusAddr) -> Self {
        Self(Gfn::of_address(address.0).0)
    }
}

#[derive(Debug)]
struct MachinePage {
    page: Page,
    owner: DomId,
    /// Where its owner has it.
    gfn: Gfn,
    /// Mappings of it by anyone but its owner.
    uses: u32,
}

/// All memory there is.
#[derive(Debug)]
pub(crate) struct Machine {
    /// By frame number; `None` are holes, so that one past the end of an allocation is nobody's.
    pages: Vec<Option<MachinePage>>,
    by_address: HashMap<usize, Mfn>,
    blocks: Vec<(Page, Layout)>,
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self { pages: Vec::new(), by_address: HashMap::new(), blocks: Vec::new() }
    }

    /// Zeroed pages, adjacent in the host's memory and in frame numbers.
    pub(crate) fn allocate(&mut self, owner: DomId, count: NonZeroUsize) -> Option<(Mfn, Page)> {
        let bytes = count.get().checked_mul(PAGE_SIZE)?;
        let layout = Layout::from_size_align(bytes, PAGE_SIZE).ok()?;
        // SAFETY: the size is not 0.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        self.blocks.push((Page { base }, layout));
        let first = Mfn(FIRST_MFN + self.pages.len() as u64);
        for at in 0..count.get() {
            // SAFETY: within the allocation.
            let page = Page { base: unsafe { base.add(at * PAGE_SIZE) } };
            self.by_address.insert(page.base.addr().get(), Mfn(first.0 + at as u64));
            self.pages.push(Some(MachinePage { page, owner, gfn: Gfn::INVALID, uses: 0 }));
        }
        self.pages.push(None);
        Some((first, Page { base }))
    }

    fn get(&self, mfn: Mfn) -> Option<&MachinePage> {
        self.pages.get(usize::try_from(mfn.0.checked_sub(FIRST_MFN)?).ok()?)?.as_ref()
    }

    fn get_mut(&mut self, mfn: Mfn) -> Option<&mut MachinePage> {
        self.pages.get_mut(usize::try_from(mfn.0.checked_sub(FIRST_MFN)?).ok()?)?.as_mut()
    }

    pub(crate) fn page(&self, mfn: Mfn) -> Option<Page> {
        self.get(mfn).map(|found| found.page)
    }

    pub(crate) fn owner(&self, mfn: Mfn) -> Option<DomId> {
        self.get(mfn).map(|found| found.owner)
    }

    pub(crate) fn uses(&self, mfn: Mfn) -> u32 {
        self.get(mfn).map_or(0, |found| found.uses)
    }

    /// One more mapping of the page.
    pub(crate) fn hold(&mut self, mfn: Mfn) {
        if let Some(found) = self.get_mut(mfn) {
            found.uses += 1;
        }
    }

    /// One mapping of the page less.
    pub(crate) fn let_go(&mut self, mfn: Mfn) {
        if let Some(found) = self.get_mut(mfn) {
            found.uses = found.uses.saturating_sub(1);
        }
    }

    /// How many pages of `owner` others have mapped.
    pub(crate) fn in_use(&self, owner: DomId) -> usize {
        self.pages.iter().flatten().filter(|page| page.owner == owner && page.uses != 0).count()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for (page, layout) in self.blocks.drain(..) {
            // SAFETY: allocated with this layout; the machine goes with its last handle, so nobody can reach the page.
            unsafe { dealloc(page.base.as_ptr(), layout) };
        }
    }
}

/// What a window shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown {
    pub(crate) mfn: Mfn,
    pub(crate) by: ShownBy,
}

/// By what right.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ShownBy {
    Grant,
    Foreign(DomId, Gfn),
}

#[derive(Clone, Copy, Debug, Default)]
struct WindowSlot {
    taken: bool,
    shows: Option<Shown>,
}

/// A domain's guest-physical space.
#[derive(Debug)]
pub(crate) struct Memory {
    direct: bool,
    next_gfn: u64,
    /// The p2m, as far as it is the domain's own memory.
    ram: BTreeMap<Gfn, Mfn>,
    /// Pages it may have.
    pub(crate) limit: usize,
    /// Its kernel's allocator: blocks in use by first frame, and free ones by length, first in first out.
    blocks: BTreeMap<Gfn, NonZeroUsize>,
    free: BTreeMap<NonZeroUsize, VecDeque<Gfn>>,
    first_window: u64,
    windows: Vec<WindowSlot>,
    free_windows: VecDeque<usize>,
}

impl Memory {
    pub(crate) fn new(
        id: DomId,
        direct: bool,
        first_gfn: u64,
        limit: usize,
        windows: usize,
    ) -> Self {
        Self {
            direct,
            next_gfn: first_gfn,
            ram: BTreeMap::new(),
            limit,
            blocks: BTreeMap::new(),
            free: BTreeMap::new(),
            first_window: FIRST_WINDOW + u64::from(id.0) * 0x10_0000,
            windows: vec![WindowSlot::default(); windows],
            free_windows: (0..windows).collect(),
        }
    }

    /// The frame behind a guest frame number, if it is the domain's own memory.
    pub(crate) fn translate(&self, gfn: Gfn) -> Option<Mfn> {
        self.ram.get(&gfn).copied()
    }

    /// Pages it has.
    pub(crate) fn pages(&self) -> usize {
        self.ram.len()
    }

    /// Blocks its kernel uses.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (Gfn, NonZeroUsize)> {
        self.blocks.iter().map(|(gfn, count)| (*gfn, *count))
    }

    pub(crate) fn alloc(
        &mut self,
        machine: &mut Machine,
        id: DomId,
        count: NonZeroUsize,
    ) -> Option<NonNull<u8>> {
        if let Some(gfn) = self.free.get_mut(&count).and_then(VecDeque::pop_front) {
            for at in 0..count.get() {
                machine.page(self.translate(Gfn(gfn.0 + at as u64))?)?.fill(0);
            }
            self.blocks.insert(gfn, count);
            return Some(machine.page(self.translate(gfn)?)?.base);
        }
        if self.ram.len().checked_add(count.get())? > self.limit {
            return None;
        }
        let (mfn, page) = machine.allocate(id, count)?;
        let first = if self.direct { mfn.0 } else { self.next_gfn };
        // A hole after each block, as in machine memory.
        self.next_gfn += count.get() as u64 + 1;
        for at in 0..count.get() as u64 {
            self.enter(machine, Gfn(first + at), Mfn(mfn.0 + at));
        }
        self.blocks.insert(Gfn(first), count);
        Some(page.base)
    }

    fn enter(&mut self, machine: &mut Machine, gfn: Gfn, mfn: Mfn) {
        self.ram.insert(gfn, mfn);
        if let Some(page) = machine.get_mut(mfn) {
            page.gfn = gfn;
        }
    }

    /// Takes a block back; says what was wrong with that, if anything was.
    pub(crate) fn free(
        &mut self,
        machine: &Machine,
        base: NonNull<u8>,
        count: NonZeroUsize,
    ) -> Result<(), String> {
        let gfn = self.gfn_of(machine, base).ok_or("frees a page that is not its own")?;
        if self.blocks.get(&gfn) != Some(&count) {
            return Err(format!(
                "frees {count} pages at {gfn:#x}, where no such block is",
                gfn = gfn.0
            ));
        }
        self.blocks.remove(&gfn);
        self.free.entry(count).or_default().push_back(gfn);
        let mut wrong = Ok(());
        for at in 0..count.get() as u64 {
            let gfn = Gfn(gfn.0 + at);
            let Some(mfn) = self.translate(gfn) else { continue };
            if machine.uses(mfn) != 0 {
                wrong = Err(format!("frees gfn {:#x} while another domain has it mapped", gfn.0));
            }
            if let Some(page) = machine.page(mfn) {
                page.fill(POISON);
            }
        }
        wrong
    }

    /// The frame at which the domain has the page that `base` points into.
    pub(crate) fn gfn_of(&self, machine: &Machine, base: NonNull<u8>) -> Option<Gfn> {
        let mfn = *machine.by_address.get(&(base.addr().get() & !(PAGE_SIZE - 1)))?;
        let gfn = machine.get(mfn)?.gfn;
        (self.translate(gfn) == Some(mfn)).then_some(gfn)
    }

    /// Gives the domain a page at `gfn`, with whatever is in it; `false` if that cannot be.
    pub(crate) fn populate(&mut self, machine: &mut Machine, id: DomId, gfn: Gfn) -> bool {
        if self.ram.contains_key(&gfn) {
            return false;
        }
        let Some((mfn, page)) = machine.allocate(id, NonZeroUsize::MIN) else { return false };
        page.fill(POISON);
        self.enter(machine, gfn, mfn);
        self.limit = self.limit.max(self.ram.len());
        true
    }

    /// Forgets all memory: the domain is being destroyed.
    pub(crate) fn relinquish(&mut self) {
        self.ram.clear();
        self.blocks.clear();
        self.free.clear();
    }

    pub(crate) fn take_window(&mut self) -> Option<Window> {
        let index = self.free_windows.pop_front()?;
        self.windows.get_mut(index)?.taken = true;
        Some(Window::new(Gfn(self.first_window + index as u64)))
    }

    pub(crate) fn release_window(&mut self, gfn: Gfn) -> Result<(), &'static str> {
        let index = self.window_index(gfn).ok_or("releases a window that does not exist")?;
        let slot = self.windows.get_mut(index).ok_or("releases a window that does not exist")?;
        if slot.shows.is_some() {
            return Err("releases a window at which something is mapped");
        }
        if !std::mem::take(&mut slot.taken) {
            return Err("releases a window that it does not hold");
        }
        self.free_windows.push_back(index);
        Ok(())
    }

    fn window_index(&self, gfn: Gfn) -> Option<usize> {
        usize::try_from(gfn.0.checked_sub(self.first_window)?).ok()
    }

    /// Shows a page at a window that the domain holds and at which nothing is; `false` otherwise.
    pub(crate) fn show(&mut self, gfn: Gfn, shown: Shown) -> bool {
        let slot = self.window_index(gfn).and_then(|index| self.windows.get_mut(index));
        match slot {
            Some(slot) if slot.taken && slot.shows.is_none() => {
                slot.shows = Some(shown);
                true
            }
            _ => false,
        }
    }

    pub(crate) fn shown(&self, gfn: Gfn) -> Option<Shown> {
        self.windows.get(self.window_index(gfn)?)?.shows
    }

    pub(crate) fn hide(&mut self, gfn: Gfn) {
        let slot = self.window_index(gfn).and_then(|index| self.windows.get_mut(index));
        if let Some(slot) = slot {
            slot.shows = None;
        }
    }

    /// Windows that are handed out, and what each shows.
    pub(crate) fn windows(&self) -> impl Iterator<Item = (Gfn, Option<Shown>)> {
        let taken = self.windows.iter().enumerate().filter(|(_, slot)| slot.taken);
        taken.map(|(index, slot)| (Gfn(self.first_window + index as u64), slot.shows))
    }
}

//! Each domain's own view of memory.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use hypercall::{BusAddr, DomId, Gfn, Window};

use crate::machine::{Machine, Mfn, POISON};

/// Where windows begin: above all memory that a direct-mapped domain could have.
const FIRST_WINDOW: u64 = 0x800_0000;

/// What a window shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown {
    pub(crate) mfn: Mfn,
    pub(crate) by: ShownBy,
}

/// By what right.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ShownBy {
    Grant {
        read_only: bool,
    },
    /// And in which life of that domain.
    Foreign(DomId, Gfn, u32),
}

/// What a guest frame number stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct P2mEntry {
    /// The machine address of the page.
    pub bus: BusAddr,
    /// The domain may write there.
    pub writable: bool,
    /// Why it is there.
    pub kind: P2mKind,
}

/// Why a page is in a domain's guest-physical space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum P2mKind {
    /// It is the domain's own.
    Ram,
    /// A grant is mapped there.
    Grant,
    /// Another's frame is mapped there by right.
    Foreign,
    /// A grant is mapped elsewhere, and this is its machine frame number (XENFEAT_grant_map_identity).
    Alias,
}

/// How many mappings of a page there are.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Users {
    readers: u32,
    writers: u32,
}

impl Users {
    pub(crate) fn is_writable(self) -> bool {
        self.writers != 0
    }

    fn count(&mut self, read_only: bool) -> &mut u32 {
        if read_only { &mut self.readers } else { &mut self.writers }
    }

    pub(crate) fn add(&mut self, read_only: bool) {
        *self.count(read_only) += 1;
    }

    /// Says whether that was the last.
    pub(crate) fn remove(&mut self, read_only: bool) -> bool {
        let count = self.count(read_only);
        *count = count.saturating_sub(1);
        self.readers == 0 && self.writers == 0
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct WindowSlot {
    taken: bool,
    shows: Option<Shown>,
}

/// A domain's guest-physical space.
#[derive(Debug)]
pub(crate) struct Memory {
    id: DomId,
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
    max_windows: usize,
    /// Windows that were ever handed out, and those that came back, first in first out.
    windows: Vec<WindowSlot>,
    free_windows: VecDeque<usize>,
    /// Pages that are there at their machine frame number too.
    aliases: HashMap<Mfn, Users>,
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
            id,
            direct,
            next_gfn: first_gfn,
            ram: BTreeMap::new(),
            limit,
            blocks: BTreeMap::new(),
            free: BTreeMap::new(),
            first_window: FIRST_WINDOW + u64::from(id.0) * 0x10_0000,
            max_windows: windows,
            windows: Vec::new(),
            free_windows: VecDeque::new(),
            aliases: HashMap::new(),
        }
    }

    /// The frame behind a guest frame number, if it is the domain's own memory.
    pub(crate) fn translate(&self, gfn: Gfn) -> Option<Mfn> {
        self.ram.get(&gfn).copied()
    }

    /// What is behind a guest frame number. The domain's own memory comes first: aliases never hide it.
    pub(crate) fn lookup(&self, gfn: Gfn) -> Option<(Mfn, P2mEntry)> {
        let entry =
            |mfn: Mfn, writable, kind| Some((mfn, P2mEntry { bus: mfn.bus(), writable, kind }));
        if let Some(mfn) = self.translate(gfn) {
            return entry(mfn, true, P2mKind::Ram);
        }
        match self.shown(gfn) {
            Some(Shown { mfn, by: ShownBy::Grant { read_only } }) => {
                entry(mfn, !read_only, P2mKind::Grant)
            }
            Some(Shown { mfn, by: ShownBy::Foreign(..) }) => entry(mfn, true, P2mKind::Foreign),
            None => {
                let alias = self.aliases.get(&Mfn(gfn.0))?;
                entry(Mfn(gfn.0), alias.is_writable(), P2mKind::Alias)
            }
        }
    }

    /// Whether its frame numbers are machine frame numbers.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct
    }

    /// A mapping enters the page at its machine frame number as well.
    pub(crate) fn enter_alias(&mut self, mfn: Mfn, read_only: bool) {
        self.aliases.entry(mfn).or_default().add(read_only);
    }

    /// A mapping that had entered an alias goes.
    pub(crate) fn leave_alias(&mut self, mfn: Mfn, read_only: bool) {
        if self.aliases.get_mut(&mfn).is_some_and(|alias| alias.remove(read_only)) {
            self.aliases.remove(&mfn);
        }
    }

    /// Aliases there are, and whether each is for reading only.
    pub(crate) fn aliases(&self) -> impl Iterator<Item = (Mfn, bool)> {
        self.aliases.iter().map(|(mfn, alias)| (*mfn, !alias.is_writable()))
    }

    /// The pages it has.
    pub(crate) fn frames(&self) -> impl Iterator<Item = Mfn> {
        self.ram.values().copied()
    }

    /// How many pages it has.
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
                let mfn = self.translate(Gfn(gfn.0 + at as u64))?;
                machine.set_free(mfn, false);
                machine.page(mfn)?.fill(0);
            }
            self.blocks.insert(gfn, count);
            return Some(machine.page(self.translate(gfn)?)?.base());
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
        Some(page.base())
    }

    fn enter(&mut self, machine: &mut Machine, gfn: Gfn, mfn: Mfn) {
        self.ram.insert(gfn, mfn);
        machine.entered(mfn, gfn);
    }

    /// Takes a block back; says what was wrong with that, if anything was.
    pub(crate) fn free(
        &mut self,
        machine: &mut Machine,
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
            machine.set_free(mfn, true);
            if let Some(page) = machine.page(mfn) {
                page.fill(POISON);
            }
        }
        wrong
    }

    /// The frame at which the domain has the page that `base` points into.
    pub(crate) fn gfn_of(&self, machine: &Machine, base: NonNull<u8>) -> Option<Gfn> {
        let mfn = machine.frame_at(base.addr().get())?;
        let gfn = machine.gfn(mfn)?;
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
        // Those that were never used come first, so that what was given back rests for as long as possible.
        let index = if self.windows.len() < self.max_windows {
            self.windows.push(WindowSlot::default());
            self.windows.len() - 1
        } else {
            self.free_windows.pop_front()?
        };
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
    pub(crate) fn show(&mut self, machine: &mut Machine, gfn: Gfn, shown: Shown) -> bool {
        let address = self.window_address(machine, gfn);
        let slot = self.window_index(gfn).and_then(|index| self.windows.get_mut(index));
        match slot {
            Some(slot) if slot.taken && slot.shows.is_none() => {
                slot.shows = Some(shown);
                let read_only = matches!(shown.by, ShownBy::Grant { read_only: true });
                machine.set_window(address, Some((shown.mfn, read_only)));
                true
            }
            _ => false,
        }
    }

    /// Where the domain sees a window, if that is an address of its own.
    pub(crate) fn window_address(&self, machine: &mut Machine, gfn: Gfn) -> Option<NonNull<u8>> {
        let index = self.window_index(gfn).filter(|index| *index < self.windows.len())?;
        machine.window(self.id, index, self.max_windows)
    }

    pub(crate) fn shown(&self, gfn: Gfn) -> Option<Shown> {
        self.windows.get(self.window_index(gfn)?)?.shows
    }

    pub(crate) fn hide(&mut self, machine: &mut Machine, gfn: Gfn) {
        let address = self.window_address(machine, gfn);
        let slot = self.window_index(gfn).and_then(|index| self.windows.get_mut(index));
        if let Some(slot) = slot {
            slot.shows = None;
            machine.set_window(address, None);
        }
    }

    /// Windows that are handed out, and what each shows.
    pub(crate) fn windows(&self) -> impl Iterator<Item = (Gfn, Option<Shown>)> {
        let taken = self.windows.iter().enumerate().filter(|(_, slot)| slot.taken);
        taken.map(|(index, slot)| (Gfn(self.first_window + index as u64), slot.shows))
    }
}

//! A domain: its memory, its windows, its ports.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hypercall::arch::shared_info as layout;
use hypercall::{DomId, Errno, Gfn, PAGE_SIZE, Port};

use super::grants::Mappings;

/// Frames of a grant table.
pub const TABLE_FRAMES: u32 = 4;
const ENTRIES: usize = TABLE_FRAMES as usize * PAGE_SIZE / 8;
const WINDOWS: usize = 8192;
const PORTS: usize = 64;
/// Where memory begins, and the windows, in frame numbers.
const FIRST_FRAME: u64 = 0x1000;
const FIRST_WINDOW: u64 = 0x100_0000;
/// The first page is the shared info page, and behind it lies the grant table.
const FIRST_FREE: usize = 1 + TABLE_FRAMES as usize;

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a domain has asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub copy_calls: u64,
    pub copies: u64,
    pub bytes_copied: u64,
    pub map_calls: u64,
    pub maps: u64,
    pub unmap_calls: u64,
    pub unmaps: u64,
    pub notifications: u64,
}

impl std::ops::Sub for Counts {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            copy_calls: self.copy_calls - before.copy_calls,
            copies: self.copies - before.copies,
            bytes_copied: self.bytes_copied - before.bytes_copied,
            map_calls: self.map_calls - before.map_calls,
            maps: self.maps - before.maps,
            unmap_calls: self.unmap_calls - before.unmap_calls,
            unmaps: self.unmaps - before.unmaps,
            notifications: self.notifications - before.notifications,
        }
    }
}

#[derive(Default)]
pub struct Tally([AtomicU64; 8]);

impl Tally {
    /// One thread at a time makes the calls of a domain, so that nothing needs to be locked.
    fn add<const N: usize>(&self, counts: [(usize, u64); N]) {
        for (index, more) in counts {
            if let Some(count) = self.0.get(index) {
                count.store(count.load(Ordering::Relaxed) + more, Ordering::Relaxed);
            }
        }
    }

    pub fn copied(&self, ops: usize, bytes: u64) {
        self.add([(0, 1), (1, ops as u64), (2, bytes)]);
    }

    pub fn mapped(&self, ops: usize) {
        self.add([(3, 1), (4, ops as u64)]);
    }

    pub fn unmapped(&self, ops: usize) {
        self.add([(5, 1), (6, ops as u64)]);
    }

    pub fn notified(&self) {
        self.add([(7, 1)]);
    }

    pub fn read(&self) -> Counts {
        let [copy_calls, copies, bytes_copied, map_calls, maps, unmap_calls, unmaps, notifications] =
            std::array::from_fn(|at| {
                self.0.get(at).map_or(0, |count| count.load(Ordering::Relaxed))
            });
        Counts {
            copy_calls,
            copies,
            bytes_copied,
            map_calls,
            maps,
            unmap_calls,
            unmaps,
            notifications,
        }
    }
}

/// What a port is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PortState {
    Free,
    Unbound(DomId),
    Joined(DomId, Port),
}

impl PortState {
    const fn pack(self) -> u64 {
        match self {
            Self::Free => 0,
            Self::Unbound(domain) => 1 << 48 | (domain.0 as u64) << 32,
            Self::Joined(domain, port) => 2 << 48 | (domain.0 as u64) << 32 | port.0 as u64,
        }
    }

    const fn unpack(packed: u64) -> Self {
        let domain = DomId((packed >> 32) as u16);
        match packed >> 48 {
            1 => Self::Unbound(domain),
            2 => Self::Joined(domain, Port(packed as u32)),
            _ => Self::Free,
        }
    }
}

struct Free {
    next: usize,
    /// Blocks that came back, by their size.
    blocks: HashMap<usize, Vec<usize>>,
}

pub struct Domain {
    pub id: DomId,
    base: NonNull<u8>,
    pages: usize,
    free: Mutex<Free>,
    ports: [AtomicU64; PORTS],
    /// What each window shows.
    windows: Box<[AtomicPtr<u8>]>,
    free_windows: Mutex<Vec<usize>>,
    /// How many mappings there are by each of its references: for reading, and for writing.
    pub users: Box<[[AtomicU32; 2]]>,
    pub mappings: Mutex<Mappings>,
    pub tally: Tally,
}

// SAFETY: the memory behind `base` belongs to the domain and lives as long as it; this module touches it by atomics alone, or
// while a page is nobody's.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    pub fn new(id: DomId, pages: usize) -> Self {
        let layout = Self::layout(pages);
        // SAFETY: there is at least a page.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).unwrap_or_else(|| handle_alloc_error(layout));
        let zero = || [AtomicU32::new(0), AtomicU32::new(0)];
        Self {
            id,
            base,
            pages: layout.size() / PAGE_SIZE,
            free: Mutex::new(Free { next: FIRST_FREE, blocks: HashMap::new() }),
            ports: std::array::from_fn(|_| AtomicU64::new(0)),
            windows: (0..WINDOWS).map(|_| AtomicPtr::default()).collect(),
            free_windows: Mutex::new((0..WINDOWS).rev().collect()),
            users: (0..ENTRIES).map(|_| zero()).collect(),
            mappings: Mutex::default(),
            tally: Tally::default(),
        }
    }

    /// Whole large pages of the host's, should it have some.
    fn layout(pages: usize) -> Layout {
        const ALIGN: usize = 2 << 20;
        let size = ((pages + FIRST_FREE) * PAGE_SIZE).next_multiple_of(ALIGN);
        Layout::from_size_align(size, ALIGN).unwrap_or(Layout::new::<[u8; PAGE_SIZE]>())
    }

    fn page(&self, index: usize) -> Option<NonNull<u8>> {
        // SAFETY: within the block.
        (index < self.pages).then(|| unsafe { self.base.add(index * PAGE_SIZE) })
    }

    /// The page at a frame number.
    #[inline]
    pub fn frame(&self, gfn: Gfn) -> Option<NonNull<u8>> {
        self.page(usize::try_from(gfn.0.checked_sub(FIRST_FRAME)?).ok()?)
    }

    pub fn gfn_of(&self, page: NonNull<u8>) -> Option<Gfn> {
        let offset = page.addr().get().checked_sub(self.base.addr().get())?;
        (offset / PAGE_SIZE < self.pages).then(|| Gfn(FIRST_FRAME + (offset / PAGE_SIZE) as u64))
    }

    pub fn alloc(&self, count: usize) -> Option<NonNull<u8>> {
        let mut free = lock(&self.free);
        let again = free.blocks.get_mut(&count).and_then(Vec::pop);
        let index = match again {
            Some(index) => index,
            None => {
                let index = free.next;
                if index + count > self.pages {
                    return None;
                }
                free.next += count;
                index
            }
        };
        let page = self.page(index)?;
        // SAFETY: the block is nobody's, and within the memory.
        unsafe { page.write_bytes(0, count * PAGE_SIZE) };
        Some(page)
    }

    pub fn free(&self, page: NonNull<u8>, count: usize) {
        let offset = page.addr().get().wrapping_sub(self.base.addr().get());
        lock(&self.free).blocks.entry(count).or_default().push(offset / PAGE_SIZE);
    }

    pub fn table_frame(&self, index: u32) -> Option<NonNull<u8>> {
        (index < TABLE_FRAMES).then(|| self.page(1 + index as usize))?
    }

    /// A word of an entry of the grant table: flags and domain, or the frame.
    #[inline]
    pub fn entry(&self, gref: usize, word: usize) -> Option<&AtomicU32> {
        // SAFETY: the table lies behind the first page; an entry is two words, and the caller asks for the first or second.
        (gref < ENTRIES).then(|| unsafe {
            self.base.add(PAGE_SIZE + gref * 8 + (word & 1) * 4).cast().as_ref()
        })
    }

    fn window_index(gfn: Gfn) -> usize {
        usize::try_from(gfn.0.wrapping_sub(FIRST_WINDOW)).unwrap_or(usize::MAX)
    }

    pub fn take_window(&self) -> Option<Gfn> {
        lock(&self.free_windows).pop().map(|index| Gfn(FIRST_WINDOW + index as u64))
    }

    pub fn release_window(&self, gfn: Gfn) {
        lock(&self.free_windows).push(Self::window_index(gfn));
    }

    /// Shows a page at a window, or none; `false` where there is no such window, or something else is there.
    pub fn show(&self, gfn: Gfn, page: Option<NonNull<u8>>) -> bool {
        let Some(window) = self.windows.get(Self::window_index(gfn)) else { return false };
        let page = page.map_or(std::ptr::null_mut(), NonNull::as_ptr);
        let before = window.load(Ordering::Relaxed);
        let fits = before.is_null() != page.is_null();
        if fits {
            window.store(page, Ordering::Release);
        }
        fits
    }

    pub fn shown(&self, gfn: Gfn) -> Option<NonNull<u8>> {
        NonNull::new(self.windows.get(Self::window_index(gfn))?.load(Ordering::Acquire))
    }

    pub fn shared_info(&self) -> NonNull<u8> {
        self.base
    }

    fn long(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: callers pass offsets of 8-byte fields of the shared info page, which is the first.
        unsafe { self.base.add((offset % PAGE_SIZE) & !7).cast().as_ref() }
    }

    fn state(&self, port: Port) -> PortState {
        let port = self.ports.get(port.0 as usize);
        port.map_or(PortState::Free, |port| PortState::unpack(port.load(Ordering::Acquire)))
    }

    fn set(&self, port: Port, state: PortState) {
        if let Some(port) = self.ports.get(port.0 as usize) {
            port.store(state.pack(), Ordering::Release);
        }
    }

    fn take_port(&self, state: PortState) -> Result<Port, Errno> {
        let free = |port: &u32| self.state(Port(*port)) == PortState::Free;
        let port = (1..PORTS as u32).find(free).map(Port).ok_or(Errno::NOSPC)?;
        self.set(port, state);
        Ok(port)
    }

    pub fn offer(&self, remote: DomId) -> Result<Port, Errno> {
        self.take_port(PortState::Unbound(remote))
    }

    pub fn join(&self, remote: DomId, port: Port) -> Result<Port, Errno> {
        self.take_port(PortState::Joined(remote, port))
    }

    pub fn accept(&self, port: Port, by: DomId, remote: Port) -> Result<(), Errno> {
        if self.state(port) != PortState::Unbound(by) {
            return Err(Errno::INVAL);
        }
        self.set(port, PortState::Joined(by, remote));
        Ok(())
    }

    pub fn close(&self, port: Port) {
        self.set(port, PortState::Free);
    }

    pub fn peer(&self, port: Port) -> Option<(DomId, Port)> {
        match self.state(port) {
            PortState::Joined(domain, port) => Some((domain, port)),
            PortState::Free | PortState::Unbound(_) => None,
        }
    }

    /// `evtchn_2l_set_pending`
    pub fn raise(&self, port: Port) {
        let (word, bit) = ((port.0 / 64) as usize % 64, 1 << (port.0 % 64));
        let before = self.long(layout::PENDING + word * 8).fetch_or(bit, Ordering::SeqCst);
        let masked = self.long(layout::MASK + word * 8).load(Ordering::SeqCst);
        if before & bit == 0 && masked & bit == 0 {
            self.select(word);
        }
    }

    fn select(&self, word: usize) {
        self.long(layout::PENDING_SEL).fetch_or(1 << word, Ordering::SeqCst);
        // SAFETY: a byte of the shared info page.
        let pending: &AtomicU8 = unsafe { self.base.add(layout::UPCALL_PENDING).cast().as_ref() };
        pending.store(1, Ordering::SeqCst);
    }

    pub fn unmask(&self, port: Port) {
        let (word, bit) = ((port.0 / 64) as usize % 64, 1 << (port.0 % 64));
        self.long(layout::MASK + word * 8).fetch_and(!bit, Ordering::SeqCst);
        if self.long(layout::PENDING + word * 8).load(Ordering::SeqCst) & bit != 0 {
            self.select(word);
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, whose size is what `pages` was made of; the last handle is gone.
        unsafe { dealloc(self.base.as_ptr(), Self::layout(self.pages - FIRST_FREE)) };
    }
}

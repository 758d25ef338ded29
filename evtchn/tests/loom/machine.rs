//! A machine that a model runs on: the shared info page, and Xen as far as events go.

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use hypercall::abi::{
    CacheFlush, FIFO_LINK_MASK, FIFO_LINKED, FIFO_MASKED, FIFO_PENDING, FIFO_PRIORITY_DEFAULT,
    GrantCopy, GrantMap, GrantUnmap,
};
use hypercall::arch::shared_info as layout;
use hypercall::{DomId, Errno, Gfn, GrantTableSize, Hypervisor, Port, VcpuId, Virq, Window};
use loom::sync::Mutex;
use loom::sync::atomic::Ordering::SeqCst;
use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

/// Which ports there are: with 2-level delivery one of the first word and one of the second, else two of one page.
pub const PORTS: [[Port; 2]; 2] = [[Port(1), Port(65)], [Port(1), Port(2)]];

/// Room for a model checker's atomic, for each eight bytes of the page.
#[repr(C, align(64))]
struct Cell(UnsafeCell<MaybeUninit<[u8; 64]>>);

/// The shared info page, as far as it is used.
struct Page(Box<[Cell]>);

// SAFETY: what is used of it are atomics.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

const CELLS: usize = layout::MASK / 8 + 64;
const _: () = assert!(size_of::<AtomicU64>() <= 64 && align_of::<AtomicU64>() <= 64);

impl Page {
    fn new() -> Self {
        let empty = || Cell(UnsafeCell::new(MaybeUninit::uninit()));
        let page = Self((0..CELLS).map(|_| empty()).collect());
        for at in Self::words() {
            // SAFETY: within the page, large enough, and not yet in use.
            unsafe { page.place::<AtomicU64>(at).write(AtomicU64::new(0)) };
        }
        // SAFETY: as above.
        unsafe { page.place::<AtomicU8>(layout::UPCALL_PENDING).write(AtomicU8::new(0)) };
        page
    }

    fn words() -> impl Iterator<Item = usize> {
        let pending = (0..2).map(|word| layout::PENDING + word * 8);
        let masks = (0..64).map(|word| layout::MASK + word * 8);
        pending.chain(masks).chain([layout::PENDING_SEL])
    }

    fn place<T>(&self, offset: usize) -> NonNull<T> {
        NonNull::new(self.0[offset / 8].0.get()).unwrap().cast()
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: every offset that is asked for was filled in `new`, and lives as long as the page.
        unsafe { self.place(offset).as_ref() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        for at in Self::words() {
            // SAFETY: filled in `new`, dropped once.
            unsafe { self.place::<AtomicU64>(at).drop_in_place() };
        }
        // SAFETY: as above.
        unsafe { self.place::<AtomicU8>(layout::UPCALL_PENDING).drop_in_place() };
    }
}

/// Where a word of four bytes is in a model, eight times as far from the next.
#[repr(C, align(32))]
pub struct Word(AtomicU32);

const _: () = assert!(size_of::<Word>() == 32);

/// Words of a page that are used: all of the control block's, or of the ports' as many as there are in a model.
const WORDS: usize = 18;

/// Pages of the domain's: the first is for the control block, the other for the ports.
#[derive(Default)]
struct EventPages([OnceLock<Box<[Word]>>; 2]);

/// Xen, as far as events go.
#[derive(Clone)]
pub struct Machine(Arc<Shared>);

struct Shared {
    page: Page,
    /// Which of the ports are bound; the lock is that of Xen's channels.
    bound: Mutex<[bool; 2]>,
    fifo: bool,
    pages: EventPages,
    /// The last port of the queue.
    tail: Mutex<u32>,
    /// A twin of Xen's: a port that is queued anew may still count as the last of the queue.
    forgets_tail: bool,
}

fn place(port: Port) -> (usize, u64) {
    ((port.0 / 64) as usize * 8, 1 << (port.0 % 64))
}

impl Machine {
    pub fn new(fifo: bool, forgets_tail: bool) -> Self {
        let (page, pages) = (Page::new(), EventPages::default());
        let (bound, tail) = (Mutex::new([false; 2]), Mutex::new(0));
        Self(Arc::new(Shared { page, bound, fifo, pages, tail, forgets_tail }))
    }

    pub fn ports(&self) -> [Port; 2] {
        PORTS[usize::from(self.0.fifo)]
    }

    pub fn upcall_pending(&self) -> &AtomicU8 {
        // SAFETY: filled in `Page::new`, lives as long as the page.
        unsafe { self.0.page.place(layout::UPCALL_PENDING).as_ref() }
    }

    pub fn pending(&self, port: Port) -> &AtomicU64 {
        self.0.page.word(layout::PENDING + place(port).0)
    }

    pub fn mask(&self, port: Port) -> &AtomicU64 {
        self.0.page.word(layout::MASK + place(port).0)
    }

    pub fn pending_sel(&self) -> &AtomicU64 {
        self.0.page.word(layout::PENDING_SEL)
    }

    fn event_word(&self, page: usize, at: usize) -> &AtomicU32 {
        &self.0.pages.0[page].get().unwrap()[at].0
    }

    pub fn ready(&self) -> &AtomicU32 {
        self.event_word(0, 0)
    }

    pub fn head(&self) -> &AtomicU32 {
        self.event_word(0, 2 + FIFO_PRIORITY_DEFAULT as usize)
    }

    pub fn event(&self, port: Port) -> &AtomicU32 {
        self.event_word(1, port.0 as usize)
    }

    pub fn is_masked(&self, port: Port) -> bool {
        if self.0.fifo {
            return self.event(port).load(SeqCst) & FIFO_MASKED != 0;
        }
        self.mask(port).load(SeqCst) & place(port).1 != 0
    }

    /// Opens a port, whoever has it.
    pub fn open(&self, port: Port) {
        if self.0.fifo {
            self.event(port).fetch_and(!FIFO_MASKED, SeqCst);
        } else {
            self.mask(port).fetch_and(!place(port).1, SeqCst);
        }
    }

    pub fn raise(&self, port: Port) {
        if self.0.fifo { self.queue(port) } else { self.select(port) }
    }

    /// `evtchn_2l_set_pending`, and `vcpu_mark_events_pending`.
    fn select(&self, port: Port) {
        let (at, bit) = place(port);
        let selector = 1 << (at / 8);
        if self.pending(port).fetch_or(bit, SeqCst) & bit == 0
            && self.mask(port).fetch_or(0, SeqCst) & bit == 0
            && self.pending_sel().fetch_or(selector, SeqCst) & selector == 0
        {
            self.upcall_pending().swap(1, SeqCst);
        }
    }

    /// `evtchn_fifo_set_pending`: the lock is held until the port is in the queue, and let go before the domain is told.
    fn queue(&self, port: Port) {
        if !self.0.pages.0.iter().all(|page| page.get().is_some()) {
            return;
        }
        let mut tail = self.0.tail.lock().unwrap();
        let word = self.event(port);
        word.fetch_or(FIFO_PENDING, SeqCst);
        if word.load(SeqCst) & FIFO_MASKED != 0 {
            return;
        }
        if word.fetch_or(FIFO_LINKED, SeqCst) & FIFO_LINKED != 0 {
            return;
        }
        if *tail == port.0 && !self.0.forgets_tail {
            *tail = 0;
        }
        let linked = *tail != 0 && self.link(Port(*tail), port);
        if !linked {
            self.head().store(port.0, SeqCst);
        }
        *tail = port.0;
        drop(tail);
        let ready = 1 << FIFO_PRIORITY_DEFAULT;
        if !linked && self.ready().fetch_or(ready, SeqCst) & ready == 0 {
            self.upcall_pending().swap(1, SeqCst);
        }
    }

    /// `evtchn_fifo_set_link`, without the bit that bounds how often it is tried.
    fn link(&self, tail: Port, port: Port) -> bool {
        let word = self.event(tail);
        let mut seen = word.load(SeqCst);
        while seen & FIFO_LINKED != 0 {
            let new = seen & !FIFO_LINK_MASK | port.0;
            match word.compare_exchange(seen, new, SeqCst, SeqCst) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// The peer sends, if the port is bound.
    pub fn send(&self, port: Port) {
        let bound = self.0.bound.lock().unwrap();
        if self.ports().iter().zip(*bound).any(|(known, bound)| *known == port && bound) {
            self.raise(port);
        }
    }
}

// SAFETY: the pages are valid for as long as a handle lives; nothing else is handed out.
unsafe impl Hypervisor for Machine {
    fn alloc_unbound(&self, _: DomId) -> Result<Port, Errno> {
        let mut bound = self.0.bound.lock().unwrap();
        let queued = |port: Port| {
            let known = self.0.pages.0[1].get().is_some();
            known && self.event(port).load(SeqCst) & FIFO_LINKED != 0
        };
        let mut free = self.ports().into_iter().zip(*bound).enumerate();
        let free = free.find(|(_, (port, bound))| !bound && !queued(*port));
        let (free, (port, _)) = free.ok_or(Errno::NOSPC)?;
        bound[free] = true;
        Ok(port)
    }

    /// `evtchn_close`: what is pending goes, and the port is free for whoever is next.
    fn close(&self, port: Port) -> Result<(), Errno> {
        let mut bound = self.0.bound.lock().unwrap();
        let index = self.ports().iter().position(|known| *known == port).ok_or(Errno::INVAL)?;
        if self.0.fifo {
            self.event(port).fetch_and(!FIFO_PENDING, SeqCst);
        } else {
            self.pending(port).fetch_and(!place(port).1, SeqCst);
        }
        bound[index] = false;
        Ok(())
    }

    /// `evtchn_fifo_unmask`
    fn unmask(&self, port: Port) -> Result<(), Errno> {
        if self.event(port).fetch_and(!FIFO_MASKED, SeqCst) & FIFO_PENDING != 0 {
            self.queue(port);
        }
        Ok(())
    }

    unsafe fn init_control(&self, _: VcpuId, _: Gfn) -> Result<(), Errno> {
        if self.0.fifo { Ok(()) } else { Err(Errno::NOSYS) }
    }

    unsafe fn expand_array(&self, _: Gfn) -> Result<(), Errno> {
        Ok(())
    }

    fn shared_info(&self) -> NonNull<u8> {
        self.0.page.place(0)
    }

    /// The control block comes first, then the one page of words.
    fn alloc_pages(&self, _: NonZeroUsize) -> Option<NonNull<u8>> {
        let page = self.0.pages.0.iter().find(|page| page.get().is_none())?;
        let words = || (0..WORDS).map(|_| Word(AtomicU32::new(0))).collect();
        let words: &[Word] = page.get_or_init(words);
        NonNull::new(words.as_ptr().cast_mut().cast())
    }

    unsafe fn free_pages(&self, _: NonNull<u8>, _: NonZeroUsize) {}
    fn virt_to_gfn(&self, _: NonNull<u8>) -> Gfn {
        Gfn::INVALID
    }
    fn features(&self, _: u32) -> Result<u32, Errno> {
        Err(Errno::NOSYS)
    }
    fn notify(&self, _: Port) -> Result<(), Errno> {
        Err(Errno::NOSYS)
    }
    fn bind_interdomain(&self, _: DomId, _: Port) -> Result<Port, Errno> {
        Err(Errno::NOSYS)
    }
    fn bind_virq(&self, _: Virq, _: VcpuId) -> Result<Port, Errno> {
        Err(Errno::NOSYS)
    }
    unsafe fn grant_copy(&self, _: &mut [GrantCopy]) -> Result<(), Errno> {
        Err(Errno::NOSYS)
    }
    unsafe fn grant_map(&self, _: &mut [GrantMap]) -> Result<(), Errno> {
        Err(Errno::NOSYS)
    }
    unsafe fn grant_unmap(&self, _: &mut [GrantUnmap]) -> Result<(), Errno> {
        Err(Errno::NOSYS)
    }
    fn cache_flush(&self, _: &mut [CacheFlush]) -> Result<(), Errno> {
        Err(Errno::NOSYS)
    }
    fn grant_table_size(&self) -> Result<GrantTableSize, Errno> {
        Err(Errno::NOSYS)
    }
    fn grant_table_frame(&self, _: u32) -> Result<NonNull<u8>, Errno> {
        Err(Errno::NOSYS)
    }
    fn window(&self) -> Option<Window> {
        None
    }
    fn release_window(&self, _: Window) {}
    fn mapped(&self, _: &Window) -> NonNull<u8> {
        self.shared_info()
    }
}

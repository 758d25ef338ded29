//! Events through queues (FIFO): the words of the ports, and the queues that Xen makes of them. The layout and the rules are
//! those of event_channel.h; Xen's side is common/event_fifo.c.

use core::num::NonZeroUsize;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

#[cfg(not(loom))]
use core::sync::atomic::AtomicU32;
#[cfg(loom)]
use loom::sync::atomic::AtomicU32;

use hypercall::abi::{
    FIFO_BUSY, FIFO_LINK_MASK, FIFO_LINKED, FIFO_MASKED, FIFO_PENDING, FIFO_PORTS, FIFO_QUEUES,
    FifoControlBlock,
};
use hypercall::{Errno, Hypervisor, PAGE_SIZE, Port, VcpuId};
use spin::Mutex;

use crate::two_level::SCALE;

#[cfg(test)]
mod tests;

/// Ports whose words are in one page; in a model few are enough.
const WORDS: usize = if cfg!(loom) { 4 } else { PAGE_SIZE / 4 };
/// Pages that the array can have.
const PAGES: usize = FIFO_PORTS as usize / (PAGE_SIZE / 4);
/// How often unmasking is tried while Xen changes the word at the same time. Xen needs a handful of instructions.
const TRIES: usize = if cfg!(loom) { 2 } else { 64 };

const ONE: NonZeroUsize = NonZeroUsize::MIN;

/// A word of a page.
///
/// # Safety
/// `page` came from [`Hypervisor::alloc_pages`], is reached by atomics alone and is not given back during `'a`; `offset` is a
/// multiple of 4 below [`PAGE_SIZE`].
unsafe fn word<'a>(page: NonNull<u8>, offset: usize) -> &'a AtomicU32 {
    // SAFETY: within the page and aligned, by the caller's promise; a model's pages are larger by `SCALE`.
    unsafe { page.add(offset * SCALE).cast().as_ref() }
}

/// The event array: a word for each port, in pages that are added as ports appear.
#[derive(Debug)]
pub(crate) struct EventArray {
    /// Filled from the front; a page that is in here stays until the array goes.
    pages: [AtomicPtr<u8>; PAGES],
    /// How many of them Xen knows,
    known: AtomicUsize,
    /// and how many it was ever told of.
    told: AtomicUsize,
    growing: Mutex<()>,
}

impl EventArray {
    pub(crate) fn new() -> Self {
        Self {
            pages: [const { AtomicPtr::new(core::ptr::null_mut()) }; PAGES],
            known: AtomicUsize::new(0),
            told: AtomicUsize::new(0),
            growing: Mutex::new(()),
        }
    }

    /// As the array is when Xen knows nothing of it: all masked, nothing else.
    pub(crate) fn reset(&self) {
        self.known.store(0, Ordering::Release);
        let pages = self.pages.iter().map(|page| page.load(Ordering::Acquire));
        for page in pages.map_while(NonNull::new) {
            mask_all(page);
        }
    }

    fn word(&self, port: Port) -> Option<&AtomicU32> {
        let at = port.0 as usize;
        let page = NonNull::new(self.pages.get(at / WORDS)?.load(Ordering::Acquire))?;
        // SAFETY: pages in the array came from `alloc_pages`, are used through this function alone and go with the array,
        // which is borrowed; the offset is that of one of the `WORDS` words.
        Some(unsafe { word(page, at % WORDS * 4) })
    }

    /// Sees to it that there is a word for `port`, and that Xen knows it.
    pub(crate) fn cover(&self, hv: &impl Hypervisor, port: Port) -> Result<(), Errno> {
        let slot = port.0 as usize / WORDS;
        if self.known.load(Ordering::Acquire) > slot {
            return Ok(());
        }
        let _growing = self.growing.lock();
        loop {
            let next = self.known.load(Ordering::Acquire);
            if next > slot {
                return Ok(());
            }
            let place = self.pages.get(next).ok_or(Errno::NOSPC)?;
            let page = match NonNull::new(place.load(Ordering::Acquire)) {
                Some(page) => page,
                None => {
                    let page = hv.alloc_pages(ONE).ok_or(Errno::NOMEM)?;
                    mask_all(page);
                    // Before Xen has it: Xen may queue a port of this page at once, and the scan has to find its word.
                    place.store(page.as_ptr(), Ordering::Release);
                    page
                }
            };
            // SAFETY: the page is ours, is reached by atomics, and is not given back once Xen was told of it (`free`).
            unsafe { hv.expand_array(hv.virt_to_gfn(page)) }?;
            self.told.fetch_max(next + 1, Ordering::Release);
            self.known.store(next + 1, Ordering::Release);
        }
    }

    /// Keeps events of `port` out of the queues.
    pub(crate) fn mask(&self, port: Port) {
        if let Some(word) = self.word(port) {
            word.fetch_or(FIFO_MASKED, Ordering::SeqCst);
        }
    }

    /// Lets events of `port` into the queues again. What came while it was masked is in none, so Xen is asked to see to that.
    pub(crate) fn unmask(&self, hv: &impl Hypervisor, port: Port) -> Result<(), Errno> {
        let word = self.word(port).ok_or(Errno::INVAL)?;
        let mut seen = word.load(Ordering::SeqCst);
        for _ in 0..TRIES {
            if seen & FIFO_MASKED == 0 {
                return Ok(());
            }
            if seen & FIFO_PENDING != 0 {
                break;
            }
            if seen & FIFO_BUSY != 0 {
                core::hint::spin_loop();
                seen = word.load(Ordering::SeqCst);
                continue;
            }
            // Only if it is not pending: an event that comes just before this is seen, one just after sees the port open.
            let open = seen & !FIFO_MASKED;
            match word.compare_exchange(seen, open, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Ok(()),
                Err(now) => seen = now,
            }
        }
        hv.unmask(port)
    }

    /// Takes `port` out of its queue. Answers the next in there, 0 if there is none, and whether `port` is to be handed out; it
    /// is masked then, and no longer pending.
    fn take(&self, port: Port) -> (u32, bool) {
        // A queue that leads to a port that does not exist ends there; Xen makes none.
        let Some(word) = self.word(port) else { return (0, false) };
        // In one step: what Xen appends before it is in the link, what comes after it begins a new queue.
        let seen = word.fetch_and(!(FIFO_LINKED | FIFO_LINK_MASK), Ordering::SeqCst);
        let next = if seen & FIFO_LINKED != 0 { seen & FIFO_LINK_MASK } else { 0 };
        // A port may have been masked, or closed, while it was in the queue.
        let open = seen & (FIFO_PENDING | FIFO_MASKED) == FIFO_PENDING;
        if open {
            word.fetch_or(FIFO_MASKED, Ordering::SeqCst);
            word.fetch_and(!FIFO_PENDING, Ordering::SeqCst);
        }
        (next, open)
    }

    /// How many words there are.
    fn len(&self) -> usize {
        self.known.load(Ordering::Acquire) * WORDS
    }

    /// Gives back the pages that Xen was never told of. In the others it writes for as long as this domain lives; that the
    /// domain was restored elsewhere since is not for us to know.
    pub(crate) fn free(&mut self, hv: &impl Hypervisor) {
        let told = *self.told.get_mut();
        let unknown = self.pages.iter_mut().skip(told);
        for page in unknown.map_while(|page| NonNull::new(*page.get_mut())) {
            // SAFETY: it came from `alloc_pages`, Xen does not know it, and whoever could use it would borrow the array.
            unsafe { hv.free_pages(page, ONE) };
        }
    }
}

fn mask_all(page: NonNull<u8>) {
    for at in 0..WORDS {
        // SAFETY: a page of an array, or soon to be one (see `EventArray::word`); the offset is that of one of its words.
        unsafe { word(page, at * 4) }.store(FIFO_MASKED, Ordering::SeqCst);
    }
}

/// The queues of a virtual CPU: Xen appends, the scan takes from the front.
#[derive(Debug)]
pub(crate) struct Queues {
    /// The page that begins with Xen's control block. Xen has it for as long as this domain lives.
    control: NonNull<u8>,
    /// Queues that are not empty, as far as is known: a bit each.
    ready: u32,
    /// The port to be taken next from each; 0 where the control block has to be asked.
    heads: [u32; FIFO_QUEUES],
}

// SAFETY: the page is reached through atomics.
unsafe impl Send for Queues {}

impl Queues {
    /// Has Xen deliver by queues, if it does.
    pub(crate) fn start(hv: &impl Hypervisor, vcpu: VcpuId) -> Option<Self> {
        let control = hv.alloc_pages(ONE)?;
        let gfn = hv.virt_to_gfn(control);
        // SAFETY: a page of ours, which from here on is reached by atomics alone and never given back.
        if unsafe { hv.init_control(vcpu, gfn) }.is_err() {
            // SAFETY: it came from `alloc_pages`, and Xen did not take it.
            unsafe { hv.free_pages(control, ONE) };
            return None;
        }
        Some(Self { control, ready: 0, heads: [0; FIFO_QUEUES] })
    }

    /// The same with another Xen. Where that has none of it, the page is not given back: were it the same Xen after all, it
    /// would still write there.
    pub(crate) fn restart(self, hv: &impl Hypervisor, vcpu: VcpuId) -> Option<Self> {
        self.ready().store(0, Ordering::SeqCst);
        let gfn = hv.virt_to_gfn(self.control);
        // SAFETY: as in `start`.
        unsafe { hv.init_control(vcpu, gfn) }.ok()?;
        Some(Self { control: self.control, ready: 0, heads: [0; FIFO_QUEUES] })
    }

    fn ready(&self) -> &AtomicU32 {
        // SAFETY: the control block's page is kept for as long as `self` lives; the offset is that of a field.
        unsafe { word(self.control, core::mem::offset_of!(FifoControlBlock, ready)) }
    }

    /// The first port in a queue that became ready.
    fn head(&self, queue: usize) -> u32 {
        let offset = core::mem::offset_of!(FifoControlBlock, head) + queue % FIFO_QUEUES * 4;
        // SAFETY: as above.
        unsafe { word(self.control, offset) }.load(Ordering::SeqCst)
    }

    /// Hands out at most `budget` ports. Answers how many, and whether queues are left that were not emptied.
    pub(crate) fn scan(
        &mut self,
        array: &EventArray,
        budget: usize,
        mut each: impl FnMut(Port),
    ) -> (usize, bool) {
        self.ready |= self.ready().swap(0, Ordering::SeqCst);
        let mut found = 0;
        // A port is in a queue at most once, so this ends with the queues, unless ports keep coming back.
        for _ in 0..=array.len() {
            let queue = self.ready.trailing_zeros() as usize;
            let Some(&first) = self.heads.get(queue) else { break };
            if found == budget {
                return (found, true);
            }
            let port = Port(if first == 0 { self.head(queue) } else { first });
            let (next, open) = array.take(port);
            if let Some(head) = self.heads.get_mut(queue) {
                *head = next;
            }
            if next == 0 {
                self.ready &= !(1 << queue);
            }
            if open {
                found += 1;
                each(port);
            }
        }
        (found, self.ready.trailing_zeros() < FIFO_QUEUES as u32)
    }
}

//! The upcall scan against Xen that raises ports meanwhile, and channels that are closed under a handler, over all
//! interleavings: no wake-up is lost, and each twin that does something in the wrong order loses one.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p evtchn --release --test loom`
//!
//! The model checker takes each access for acquire and release, no more. Where Xen relies on a full barrier in front of a
//! load, an operation that writes as well stands for the two.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
#![cfg(loom)]

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use evtchn::{Channel, Eoi, Upcalls, Work};
use hypercall::abi::{CacheFlush, GrantCopy, GrantMap, GrantUnmap};
use hypercall::arch::shared_info as layout;
use hypercall::{
    DomId, Errno, Gfn, GrantTableSize, Hypervisor, Instant, Port, VcpuId, Virq, Window,
};
use loom::sync::Mutex;
use loom::sync::atomic::Ordering::SeqCst;
use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

const NOW: Instant = Instant(0);
/// One of the first word, one of the second.
const PORTS: [Port; 2] = [Port(1), Port(65)];

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

    fn upcall_pending(&self) -> &AtomicU8 {
        // SAFETY: as above.
        unsafe { self.place(layout::UPCALL_PENDING).as_ref() }
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

/// Xen, as far as events go.
#[derive(Clone)]
struct Machine(Arc<Shared>);

struct Shared {
    page: Page,
    /// Which of `PORTS` are bound; the lock is that of Xen's channels.
    bound: Mutex<[bool; 2]>,
}

fn place(port: Port) -> (usize, u64) {
    ((port.0 / 64) as usize * 8, 1 << (port.0 % 64))
}

impl Machine {
    fn new() -> Self {
        Self(Arc::new(Shared { page: Page::new(), bound: Mutex::new([false; 2]) }))
    }

    fn pending(&self, port: Port) -> &AtomicU64 {
        self.0.page.word(layout::PENDING + place(port).0)
    }

    fn mask(&self, port: Port) -> &AtomicU64 {
        self.0.page.word(layout::MASK + place(port).0)
    }

    fn pending_sel(&self) -> &AtomicU64 {
        self.0.page.word(layout::PENDING_SEL)
    }

    fn is_masked(&self, port: Port) -> bool {
        self.mask(port).load(SeqCst) & place(port).1 != 0
    }

    /// `evtchn_2l_set_pending`, and `vcpu_mark_events_pending`.
    fn raise(&self, port: Port) {
        let (at, bit) = place(port);
        let selector = 1 << (at / 8);
        if self.pending(port).fetch_or(bit, SeqCst) & bit == 0
            && self.mask(port).fetch_or(0, SeqCst) & bit == 0
            && self.pending_sel().fetch_or(selector, SeqCst) & selector == 0
        {
            self.0.page.upcall_pending().swap(1, SeqCst);
        }
    }

    /// The peer sends, if the port is bound.
    fn send(&self, port: Port) {
        let bound = self.0.bound.lock().unwrap();
        if PORTS.iter().zip(*bound).any(|(known, bound)| *known == port && bound) {
            self.raise(port);
        }
    }
}

// SAFETY: the page is valid for as long as a handle lives; nothing else is handed out.
unsafe impl Hypervisor for Machine {
    fn alloc_unbound(&self, _: DomId) -> Result<Port, Errno> {
        let mut bound = self.0.bound.lock().unwrap();
        let free = bound.iter().position(|bound| !bound).ok_or(Errno::NOSPC)?;
        bound[free] = true;
        Ok(PORTS[free])
    }

    /// `evtchn_close`: what is pending goes, and the port is free for whoever is next.
    fn close(&self, port: Port) -> Result<(), Errno> {
        let mut bound = self.0.bound.lock().unwrap();
        let index = PORTS.iter().position(|known| *known == port).ok_or(Errno::INVAL)?;
        self.pending(port).fetch_and(!place(port).1, SeqCst);
        bound[index] = false;
        Ok(())
    }

    fn shared_info(&self) -> NonNull<u8> {
        self.0.page.place(0)
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
    fn unmask(&self, _: Port) -> Result<(), Errno> {
        Err(Errno::NOSYS)
    }
    unsafe fn init_control(&self, _: VcpuId, _: Gfn) -> Result<(), Errno> {
        Err(Errno::NOSYS)
    }
    unsafe fn expand_array(&self, _: Gfn) -> Result<(), Errno> {
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
    fn alloc_pages(&self, _: NonZeroUsize) -> Option<NonNull<u8>> {
        None
    }
    unsafe fn free_pages(&self, _: NonNull<u8>, _: NonZeroUsize) {}
    fn virt_to_gfn(&self, _: NonNull<u8>) -> Gfn {
        Gfn::INVALID
    }
    fn window(&self) -> Option<Window> {
        None
    }
    fn release_window(&self, _: Window) {}
    fn mapped(&self, _: &Window) -> NonNull<u8> {
        self.shared_info()
    }
}

/// A domain with channels, and the work that its events announce.
struct Handler {
    machine: Machine,
    upcalls: Upcalls<Machine>,
    channels: Vec<Channel<Machine>>,
    work: Arc<[AtomicU32; 2]>,
    seen: u32,
    budget: usize,
}

impl Handler {
    fn new(channels: usize, budget: usize) -> Self {
        let machine = Machine::new();
        let upcalls = Upcalls::new(&machine, VcpuId(0));
        let binder = upcalls.binder();
        let channels = (0..channels).map(|_| binder.alloc_unbound(DomId(1)).unwrap()).collect();
        Self { machine, upcalls, channels, work: Arc::default(), seen: 0, budget }
    }

    fn work_for(&mut self, port: Port) {
        let index = PORTS.iter().position(|known| *known == port).unwrap();
        self.seen += self.work[index].swap(0, SeqCst);
    }

    /// One upcall, as it should be.
    fn turn(&mut self) {
        let mut ports = Vec::new();
        self.upcalls.scan(self.budget, |port| ports.push(port));
        for port in ports {
            self.work_for(port);
            let channel = self.channels.iter_mut().find(|channel| channel.port() == port);
            assert_eq!(channel.unwrap().eoi(Work::Done, NOW), Eoi::Open);
        }
    }

    /// A twin's upcall on the first port alone, by hand.
    fn turn_by_hand(&mut self, selector_first: bool, looks_again: bool) {
        let machine = self.machine.clone();
        let (port, page) = (PORTS[0], &machine.0.page);
        let (_, bit) = place(port);
        let selected = if selector_first {
            let selected = machine.pending_sel().swap(0, SeqCst);
            page.upcall_pending().swap(0, SeqCst);
            selected
        } else {
            page.upcall_pending().swap(0, SeqCst);
            machine.pending_sel().swap(0, SeqCst)
        };
        let ready = machine.pending(port).load(SeqCst) & !machine.mask(port).load(SeqCst);
        if selected & 1 == 0 || ready & bit == 0 {
            return;
        }
        machine.mask(port).fetch_or(bit, SeqCst);
        machine.pending(port).fetch_and(!bit, SeqCst);
        self.work_for(port);
        machine.mask(port).fetch_and(!bit, SeqCst);
        if looks_again && machine.pending(port).load(SeqCst) & bit != 0 {
            machine.pending_sel().fetch_or(1, SeqCst);
            page.upcall_pending().store(1, SeqCst);
        }
    }
}

/// Xen raises a port for each piece of work, while the domain takes two upcalls.
fn events(sends: &'static [usize], budget: usize, turn: fn(&mut Handler)) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(5);
    model.check(move || {
        let mut handler = Handler::new(2, budget);
        let (machine, work) = (handler.machine.clone(), handler.work.clone());
        let xen = loom::thread::spawn(move || {
            for &index in sends {
                work[index].fetch_add(1, SeqCst);
                machine.raise(PORTS[index]);
            }
        });
        for _ in 0..2 {
            turn(&mut handler);
        }
        xen.join().unwrap();
        let all = handler.seen == sends.len() as u32;
        assert!(all || handler.upcalls.is_pending(), "lost wake-up");
        // An upcall that is pending leads to what is left.
        for _ in 0..4 {
            turn(&mut handler);
        }
        assert_eq!(handler.seen, sends.len() as u32, "lost event");
    });
}

#[test]
fn a_port_that_is_raised_again_loses_no_event() {
    events(&[0, 0, 0], 16, Handler::turn);
}

#[test]
fn several_ports_lose_no_event() {
    events(&[0, 1, 0], 16, Handler::turn);
}

#[test]
fn a_budget_of_one_loses_no_event() {
    events(&[1, 0, 1], 1, Handler::turn);
}

#[test]
fn by_hand_and_in_order_loses_no_event() {
    events(&[0, 0, 0], 16, |handler| handler.turn_by_hand(false, true));
}

#[test]
#[should_panic(expected = "lost")]
fn the_selector_before_the_upcall_loses_one() {
    events(&[0, 0, 0], 16, |handler| handler.turn_by_hand(true, true));
}

#[test]
#[should_panic(expected = "lost")]
fn unmasking_without_another_look_loses_one() {
    events(&[0, 0, 0], 16, |handler| handler.turn_by_hand(false, false));
}

/// What a handler does with a port that it was handed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dispatch {
    /// Ends the event through the channel that has the port now, if one has.
    Channel,
    /// Opens the port whoever has it.
    Port,
    /// Ends the event only if the channel is still the one that was there before the upcall.
    SameChannel,
}

/// A channel is closed by another thread, and perhaps another opened on the same port, while an event is handled.
fn close(reopen: bool, dispatch: Dispatch) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let Handler { machine, mut upcalls, mut channels, .. } = Handler::new(1, 16);
        let port = PORTS[0];
        // The channel of the port, and which in a row it is.
        let slot = loom::sync::Arc::new(Mutex::new((channels.pop(), 0)));
        let closer = {
            let (slot, binder) = (slot.clone(), upcalls.binder());
            loom::thread::spawn(move || {
                let (channel, number) = &mut *slot.lock().unwrap();
                drop(channel.take());
                if reopen {
                    *channel = binder.alloc_unbound(DomId(1)).ok();
                    *number += 1;
                }
            })
        };
        let xen = {
            let machine = machine.clone();
            loom::thread::spawn(move || machine.send(port))
        };
        let turn = |upcalls: &mut Upcalls<Machine>| {
            let before = if dispatch == Dispatch::SameChannel { slot.lock().unwrap().1 } else { 0 };
            let mut ports = Vec::new();
            upcalls.scan(16, |port| ports.push(port));
            for port in &ports {
                let (channel, number) = &mut *slot.lock().unwrap();
                match (dispatch, channel) {
                    (Dispatch::Port, _) => {
                        machine.mask(*port).fetch_and(!place(*port).1, SeqCst);
                    }
                    (Dispatch::SameChannel, _) if *number != before => {}
                    (_, None) => {}
                    (_, Some(channel)) => _ = channel.eoi(Work::Done, NOW),
                }
            }
            ports.len()
        };
        turn(&mut upcalls);
        closer.join().unwrap();
        xen.join().unwrap();
        turn(&mut upcalls);
        if reopen {
            assert!(!machine.is_masked(port), "deaf");
            machine.send(port);
            assert_eq!(turn(&mut upcalls), 1, "deaf");
        } else {
            assert!(machine.is_masked(port), "a port that is closed was opened");
            machine.send(port);
            assert_eq!(turn(&mut upcalls), 0);
        }
        let left = usize::from(reopen);
        assert_eq!(upcalls.bound(), left);
    });
}

#[test]
fn closing_under_a_handler_is_safe() {
    close(false, Dispatch::Channel);
}

#[test]
fn a_port_that_is_used_again_under_a_handler_hears() {
    close(true, Dispatch::Channel);
}

#[test]
#[should_panic(expected = "was opened")]
fn opening_by_number_opens_what_is_closed() {
    close(false, Dispatch::Port);
}

#[test]
#[should_panic(expected = "deaf")]
fn ending_only_what_was_there_before_leaves_the_next_deaf() {
    close(true, Dispatch::SameChannel);
}

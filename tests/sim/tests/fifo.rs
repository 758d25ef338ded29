//! Events through queues, as a domain finds them in its memory.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};

use common::pages;
use hypercall::abi::{
    FIFO_BUSY, FIFO_LINK_MASK, FIFO_LINKED, FIFO_MASKED, FIFO_PENDING, FIFO_PRIORITY_DEFAULT,
};
use hypercall::{Errno, Gfn, Hypervisor, Port, VcpuId, Virq};
use sim::{DomainConfig, PortState, Sim, SimHv};

const READY: u32 = 1 << FIFO_PRIORITY_DEFAULT;

struct World {
    sim: Sim,
    us: SimHv,
    peer: SimHv,
    control: NonNull<u8>,
    array: NonNull<u8>,
}

fn page(hv: &SimHv) -> (NonNull<u8>, Gfn) {
    let page = hv.alloc_pages(pages(1)).unwrap();
    (page, hv.virt_to_gfn(page))
}

fn init(hv: &SimHv, vcpu: u32, frame: Gfn) -> Result<(), Errno> {
    // SAFETY: the tests give no page back that Xen took, but the one that is about that.
    unsafe { hv.init_control(VcpuId(vcpu), frame) }
}

fn expand(hv: &SimHv, frame: Gfn) -> Result<(), Errno> {
    // SAFETY: as above.
    unsafe { hv.expand_array(frame) }
}

fn word(page: NonNull<u8>, at: u32) -> &'static AtomicU32 {
    // SAFETY: within the page, which stays as long as the machine; only accessed by atomics.
    unsafe { page.add(at as usize * 4).cast().as_ref() }
}

impl World {
    fn new() -> Self {
        let sim = Sim::new();
        let us = sim.create(DomainConfig { vcpus: 2, ..DomainConfig::guest() });
        let peer = sim.create(DomainConfig::guest());
        let ((control, frame), (array, words)) = (page(&us), page(&us));
        init(&us, 0, frame).unwrap();
        expand(&us, words).unwrap();
        Self { sim, us, peer, control, array }
    }

    fn event(&self, port: Port) -> &AtomicU32 {
        word(self.array, port.0)
    }

    /// Our port, and the peer's to it.
    fn joined(&self) -> (Port, Port) {
        let ours = self.us.alloc_unbound(self.peer.id()).unwrap();
        (ours, self.peer.bind_interdomain(self.us.id(), ours).unwrap())
    }

    fn head(&self) -> u32 {
        word(self.control, 2 + FIFO_PRIORITY_DEFAULT).load(SeqCst)
    }

    fn ready(&self) -> &AtomicU32 {
        word(self.control, 0)
    }
}

#[test]
fn ports_are_linked_in_the_order_they_were_raised_in() {
    let w = World::new();
    let ports = [(); 3].map(|()| w.joined());
    for at in [2, 0, 1, 0, 2] {
        w.peer.notify(ports[at].1).unwrap();
    }
    let [first, second, third] = [ports[2].0, ports[0].0, ports[1].0];
    assert_eq!((w.ready().load(SeqCst), w.head()), (READY, first.0));
    let queued = FIFO_PENDING | FIFO_LINKED;
    assert_eq!(w.event(first).load(SeqCst), queued | second.0);
    assert_eq!(w.event(second).load(SeqCst), queued | third.0);
    assert_eq!(w.event(third).load(SeqCst), queued);
    // The last is taken out: what comes next begins a new queue.
    w.event(third).fetch_and(!(FIFO_LINKED | FIFO_LINK_MASK), SeqCst);
    w.ready().store(0, SeqCst);
    w.peer.notify(ports[1].1).unwrap();
    assert_eq!((w.ready().load(SeqCst), w.head()), (READY, third.0));
    assert_eq!(w.event(third).load(SeqCst), queued, "not linked to itself");
}

#[test]
fn a_masked_port_is_pending_and_in_no_queue_until_it_is_unmasked() {
    let w = World::new();
    let (ours, theirs) = w.joined();
    w.event(ours).store(FIFO_MASKED, SeqCst);
    w.peer.notify(theirs).unwrap();
    assert_eq!(w.sim.port_bits(w.us.id(), ours), Some((true, true)));
    assert_eq!(
        (w.event(ours).load(SeqCst), w.ready().load(SeqCst)),
        (FIFO_PENDING | FIFO_MASKED, 0)
    );
    w.us.unmask(ours).unwrap();
    assert_eq!(w.event(ours).load(SeqCst), FIFO_PENDING | FIFO_LINKED);
    assert_eq!(w.head(), ours.0);
    assert!(w.sim.with_upcall().contains(&w.us.id()));
}

#[test]
fn a_port_that_is_closed_in_its_queue_is_not_used_again_before_it_has_left() {
    let w = World::new();
    let (ours, theirs) = w.joined();
    w.peer.notify(theirs).unwrap();
    w.us.close(ours).unwrap();
    assert_eq!(w.event(ours).load(SeqCst), FIFO_LINKED);
    assert_ne!(w.us.alloc_unbound(w.peer.id()), Ok(ours));
    w.event(ours).store(0, SeqCst);
    assert_eq!(w.us.alloc_unbound(w.peer.id()), Ok(ours));
}

#[test]
fn a_port_goes_to_the_queue_of_who_hears_it() {
    let w = World::new();
    let (second, frame) = page(&w.us);
    let virq = w.us.bind_virq(Virq(0), VcpuId(1)).unwrap();
    w.sim.raise_virq(w.us.id(), Virq(0));
    assert_eq!(w.event(virq).load(SeqCst), 0, "lost, for want of a control block");
    init(&w.us, 1, frame).unwrap();
    w.sim.raise_virq(w.us.id(), Virq(0));
    assert_eq!((w.ready().load(SeqCst), word(second, 0).load(SeqCst)), (0, READY));
    assert_eq!(w.event(virq).load(SeqCst), FIFO_PENDING | FIFO_LINKED);
    // It is the last in that queue, then, of another kind, in the other: the first may not lead on to it any more.
    w.event(virq).store(0, SeqCst);
    word(second, 0).store(0, SeqCst);
    w.us.close(virq).unwrap();
    let (ours, theirs) = w.joined();
    assert_eq!(ours, virq);
    w.peer.notify(theirs).unwrap();
    assert_eq!((w.ready().load(SeqCst), w.head()), (READY, ours.0));
    w.us.bind_virq(Virq(0), VcpuId(1)).unwrap();
    w.sim.raise_virq(w.us.id(), Virq(0));
    assert_eq!(word(second, 0).load(SeqCst), READY);
    assert_eq!(w.event(ours).load(SeqCst), FIFO_PENDING | FIFO_LINKED, "nothing behind it");
}

#[test]
fn what_is_raised_before_there_is_a_word_comes_once_there_is() {
    let sim = Sim::new();
    let (us, peer) = (sim.create(DomainConfig::guest()), sim.create(DomainConfig::guest()));
    let ports = [(); 2].map(|()| {
        let ours = us.alloc_unbound(peer.id()).unwrap();
        (ours, peer.bind_interdomain(us.id(), ours).unwrap())
    });
    peer.notify(ports[0].1).unwrap();
    let ((control, frame), (array, words)) = (page(&us), page(&us));
    assert_eq!(expand(&us, words), Err(Errno::OPNOTSUPP));
    init(&us, 0, frame).unwrap();
    peer.notify(ports[1].1).unwrap();
    assert_eq!(word(control, 0).load(SeqCst), 0);
    expand(&us, words).unwrap();
    assert_eq!(word(control, 0).load(SeqCst), READY);
    let linked = |at: usize| word(array, ports[at].0.0).load(SeqCst);
    assert_eq!(linked(0), FIFO_PENDING | FIFO_LINKED | ports[1].0.0, "of before and after");
    assert_eq!(linked(1), FIFO_PENDING | FIFO_LINKED);
}

#[test]
fn what_xen_refuses() {
    let w = World::new();
    let (_, frame) = page(&w.us);
    assert_eq!(init(&w.us, 0, frame), Err(Errno::INVAL), "it has one");
    assert_eq!(init(&w.us, 2, frame), Err(Errno::NOENT), "no such CPU");
    assert_eq!(init(&w.us, 1, Gfn(1)), Err(Errno::INVAL), "not a page of its own");
    assert_eq!(expand(&w.us, Gfn(1)), Err(Errno::INVAL));
    for _ in 1..128 {
        expand(&w.us, frame).unwrap();
    }
    assert_eq!(expand(&w.us, frame), Err(Errno::NOSPC));
    w.sim.set_fifo(w.peer.id(), false);
    assert_eq!(init(&w.peer, 0, page(&w.peer).1), Err(Errno::NOSYS));
    // Pages that Xen has are not the domain's to give back.
    assert_eq!(w.sim.violations(), Vec::<String>::new());
    // SAFETY: nobody uses it but the simulated Xen, whose complaint this is about.
    unsafe { w.us.free_pages(w.control, NonZeroUsize::MIN) };
    assert_eq!(w.sim.violations().len(), 1);
}

#[test]
fn a_new_life_begins_without_queues() {
    let w = World::new();
    let (ours, theirs) = w.joined();
    w.sim.suspend(w.us.id());
    w.peer.notify(theirs).unwrap();
    assert!(w.sim.resume(w.us.id(), 0x1_6005));
    assert_eq!(w.sim.port(w.us.id(), ours), PortState::Free);
    let (ours, theirs) = w.joined();
    w.event(ours).store(0, SeqCst);
    w.peer.notify(theirs).unwrap();
    assert_eq!(w.event(ours).load(SeqCst), 0);
    assert_eq!(common::take_upcall(&w.us), [ours], "by bits");
    init(&w.us, 0, page(&w.us).1).unwrap();
}

/// Two threads raise ports, while a third takes them out of the queue as fast as it can and changes the words in all the ways
/// that a domain may.
#[test]
fn linking_and_taking_at_once_loses_nothing() {
    const ROUNDS: u64 = 20_000;
    let w = World::new();
    let ports: Vec<_> = (0..8).map(|_| w.joined()).collect();
    let sent: Arc<[AtomicU64; 8]> = Arc::default();
    let over = AtomicBool::new(false);
    let mut seen = [0_u64; 8];
    std::thread::scope(|scope| {
        let raisers: Vec<_> = (0..2)
            .map(|half| {
                let (peer, sent, ports) = (w.peer.clone(), sent.clone(), &ports);
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let at = half * 4 + (round % 4) as usize;
                        sent[at].fetch_add(1, SeqCst);
                        peer.notify(ports[at].1).unwrap();
                    }
                })
            })
            .collect();
        let control = word(w.control, 0);
        let words = std::array::from_fn::<_, 16, _>(|at| word(w.array, at as u32));
        let first = word(w.control, 2 + FIFO_PRIORITY_DEFAULT);
        let mut take = || {
            if control.swap(0, SeqCst) == 0 {
                return false;
            }
            let mut next = first.load(SeqCst);
            while next != 0 {
                let at = ports.iter().position(|(ours, _)| ours.0 == next).unwrap();
                let word = words[next as usize];
                let now = word.fetch_and(!(FIFO_LINKED | FIFO_LINK_MASK), SeqCst);
                next = now & FIFO_LINK_MASK;
                word.fetch_or(FIFO_MASKED, SeqCst);
                word.fetch_and(!FIFO_PENDING, SeqCst);
                seen[at] = sent[at].load(SeqCst);
                w.us.unmask(ports[at].0).unwrap();
            }
            true
        };
        while !over.load(SeqCst) {
            take();
            over.store(raisers.iter().all(|it| it.is_finished()), SeqCst);
        }
        while take() {}
    });
    assert_eq!(seen.to_vec(), sent.iter().map(|it| it.load(SeqCst)).collect::<Vec<_>>());
    for (ours, _) in ports {
        assert_eq!(w.event(ours).load(SeqCst) & (FIFO_PENDING | FIFO_LINKED | FIFO_BUSY), 0);
    }
}

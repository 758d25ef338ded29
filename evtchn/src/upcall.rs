//! The upcall: which ports have something for us.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

use hypercall::{DomId, Errno, Hypervisor, Port, VcpuId, Virq};

use crate::bits::{EventBits, WORDS};
use crate::channel::Channel;

/// The event channels of one virtual CPU.
pub struct Upcalls<H: Hypervisor> {
    hv: H,
    bits: EventBits,
    /// Where the next scan begins, so that a busy low port cannot starve a high one.
    start: u32,
    bound: Arc<AtomicUsize>,
}

impl<H: Hypervisor> Upcalls<H> {
    /// Takes over the event bits, all ports masked.
    #[must_use]
    pub fn new(hv: &H, vcpu: VcpuId) -> Self {
        let bits = EventBits::new(hv, vcpu);
        for word in 0..WORDS {
            bits.mask(word).store(u64::MAX, Ordering::SeqCst);
        }
        Self { hv: hv.clone(), bits, start: 0, bound: Arc::default() }
    }

    /// Ports that are bound now.
    #[must_use]
    pub fn bound(&self) -> usize {
        self.bound.load(Ordering::Relaxed)
    }

    /// What drivers bind their ports with.
    #[must_use]
    pub fn binder(&self) -> Binder<H> {
        Binder { hv: self.hv.clone(), bits: self.bits, bound: Arc::clone(&self.bound) }
    }

    /// Whether a scan would find anything. Ask before going to sleep: an event that Xen raises after that wakes the
    /// domain, one that came before does not.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.bits.upcall_pending().load(Ordering::SeqCst) != 0
    }

    /// Hands out at most `budget` ports that have events, each masked until its [`Channel::eoi`]; what is left over
    /// is found by the next scan. Answers how many.
    pub fn scan(&mut self, budget: usize, mut each: impl FnMut(Port)) -> usize {
        if budget == 0 || self.bits.upcall_pending().swap(0, Ordering::SeqCst) == 0 {
            return 0;
        }
        let mut selected = self.bits.pending_sel().swap(0, Ordering::SeqCst);
        let (first_word, first_bit) = ((self.start / 64) as usize, self.start % 64);
        let mut found = 0;
        // The first word is looked at twice: from the starting bit on, and in the end below it.
        for step in 0..=WORDS {
            let word = (first_word + step) % WORDS;
            if selected & (1 << word) == 0 {
                continue;
            }
            let part = match step {
                0 => u64::MAX << first_bit,
                WORDS => !(u64::MAX << first_bit),
                _ => u64::MAX,
            };
            let open = |bits: &EventBits| {
                bits.pending(word).load(Ordering::SeqCst) & !bits.mask(word).load(Ordering::SeqCst)
            };
            let mut ready = open(&self.bits) & part;
            while ready != 0 {
                if found == budget {
                    // Come back for this word, and for those not reached.
                    self.bits.pending_sel().fetch_or(selected, Ordering::SeqCst);
                    self.bits.raise(word);
                    return found;
                }
                let bit = ready.trailing_zeros();
                ready &= ready - 1;
                let port = Port(word as u32 * 64 + bit);
                self.bits.mask_port(port);
                self.bits.pending(word).fetch_and(!(1 << bit), Ordering::SeqCst);
                self.start = (port.0 + 1) % (WORDS as u32 * 64);
                found += 1;
                each(port);
            }
            if step != 0 || first_bit == 0 {
                selected &= !(1 << word);
            }
        }
        found
    }
}

/// Binds ports whose events [`Upcalls::scan`] will hand out. Cheap to clone; each driver has its own.
#[derive(Clone)]
pub struct Binder<H: Hypervisor> {
    hv: H,
    bits: EventBits,
    bound: Arc<AtomicUsize>,
}

impl<H: Hypervisor> Binder<H> {
    /// Joins the port that `remote` offers us.
    ///
    /// # Errors
    /// As Xen answers: [`Errno::INVAL`] when it is not offered to us.
    pub fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Channel<H>, Errno> {
        self.hv.bind_interdomain(remote, port).map(|port| self.adopt(port))
    }

    /// A port of ours that `remote` may join.
    ///
    /// # Errors
    /// As Xen answers.
    pub fn alloc_unbound(&self, remote: DomId) -> Result<Channel<H>, Errno> {
        self.hv.alloc_unbound(remote).map(|port| self.adopt(port))
    }

    /// A virtual interrupt line.
    ///
    /// # Errors
    /// As Xen answers.
    pub fn bind_virq(&self, virq: Virq, vcpu: VcpuId) -> Result<Channel<H>, Errno> {
        self.hv.bind_virq(virq, vcpu).map(|port| self.adopt(port))
    }

    /// A port that is bound already, by whoever built this domain: the store's or the console's.
    #[must_use]
    pub fn adopt(&self, port: Port) -> Channel<H> {
        Channel::new(self.hv.clone(), self.bits, port, Arc::clone(&self.bound))
    }
}

impl<H: Hypervisor> fmt::Debug for Binder<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Binder").finish_non_exhaustive()
    }
}

impl<H: Hypervisor> fmt::Debug for Upcalls<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upcalls").field("start", &self.start).finish_non_exhaustive()
    }
}

//! The event bits in the shared info page: 2-level delivery, 4,096 channels.

use core::ptr::NonNull;
use core::sync::atomic::Ordering;
#[cfg(not(loom))]
use core::sync::atomic::{AtomicU8, AtomicU64};
#[cfg(loom)]
use loom::sync::atomic::{AtomicU8, AtomicU64};

use hypercall::arch::shared_info as layout;
use hypercall::{Hypervisor, Port, VcpuId};

/// Words in each bitmap, and bits in each word.
const WORDS: usize = 64;

/// Bytes in memory for each byte of a page: a model checker's atomics are larger than what they stand for.
pub(crate) const SCALE: usize = if cfg!(loom) { 8 } else { 1 };

/// Where the bits are. Valid as long as the handle it came from, which its holders keep beside it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EventBits {
    base: NonNull<u8>,
    vcpu: usize,
}

// SAFETY: every access is atomic.
unsafe impl Send for EventBits {}
// SAFETY: as above.
unsafe impl Sync for EventBits {}

impl EventBits {
    /// The bits of a domain, upcalls for `vcpu`; one that has no slot in the page is taken for vCPU 0.
    pub(crate) fn new(hv: &impl Hypervisor, vcpu: VcpuId) -> Self {
        let vcpu = if vcpu.0 < layout::VCPUS { vcpu.0 as usize } else { 0 };
        Self { base: hv.shared_info(), vcpu: vcpu * layout::VCPU_INFO_SIZE }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: callers below pass offsets of 8-byte fields within the page (layout constants, and word indices that
        // are taken modulo `WORDS`), which `Hypervisor::shared_info` promises valid for atomic access while a handle
        // lives.
        unsafe { self.base.add(offset * SCALE).cast().as_ref() }
    }

    pub(crate) fn upcall_pending(&self) -> &AtomicU8 {
        // SAFETY: as above, for a field of one byte.
        unsafe { self.base.add((self.vcpu + layout::UPCALL_PENDING) * SCALE).cast().as_ref() }
    }

    fn pending_sel(&self) -> &AtomicU64 {
        self.word(self.vcpu + layout::PENDING_SEL)
    }

    fn pending(&self, word: usize) -> &AtomicU64 {
        self.word(layout::PENDING + word % WORDS * 8)
    }

    fn mask(&self, word: usize) -> &AtomicU64 {
        self.word(layout::MASK + word % WORDS * 8)
    }

    /// Stops events of all ports from raising upcalls.
    pub(crate) fn mask_all(&self) {
        for word in 0..WORDS {
            self.mask(word).store(u64::MAX, Ordering::SeqCst);
        }
    }

    /// Stops events of `port` from raising an upcall.
    pub(crate) fn mask_port(&self, port: Port) {
        let (word, bit) = place(port);
        self.mask(word).fetch_or(bit, Ordering::SeqCst);
    }

    /// Lets events of `port` raise upcalls again. What came meanwhile raised none (event_channel.h), so it is raised here.
    pub(crate) fn unmask_port(&self, port: Port) {
        let (word, bit) = place(port);
        self.mask(word).fetch_and(!bit, Ordering::SeqCst);
        if self.pending(word).load(Ordering::SeqCst) & bit != 0 {
            self.raise(word);
        }
    }

    /// Has the next scan look at `word`.
    fn raise(&self, word: usize) {
        self.pending_sel().fetch_or(1 << (word % WORDS), Ordering::SeqCst);
        self.look_again();
    }

    /// Has a scan find something to do.
    pub(crate) fn look_again(&self) {
        // An exchange, as in Xen: model checkers order those fully, and plain stores not.
        self.upcall_pending().swap(1, Ordering::SeqCst);
    }

    /// Hands out at most `budget` ports. `start` is where to begin, so that a busy low port cannot starve a high one; it is
    /// moved on.
    pub(crate) fn scan(&self, start: &mut u32, budget: usize, mut each: impl FnMut(Port)) -> usize {
        let mut selected = self.pending_sel().swap(0, Ordering::SeqCst);
        let (first_word, first_bit) = ((*start / 64) as usize, *start % 64);
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
            let masked = |word| self.mask(word).load(Ordering::SeqCst);
            let mut ready = self.pending(word).load(Ordering::SeqCst) & !masked(word) & part;
            while ready != 0 {
                if found == budget {
                    // Come back for this word, and for those not reached.
                    self.pending_sel().fetch_or(selected, Ordering::SeqCst);
                    self.raise(word);
                    return found;
                }
                let bit = ready.trailing_zeros();
                ready &= ready - 1;
                let port = Port(word as u32 * 64 + bit);
                self.mask_port(port);
                self.pending(word).fetch_and(!(1 << bit), Ordering::SeqCst);
                *start = (port.0 + 1) % (WORDS as u32 * 64);
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

/// A port's word and its bit in there.
fn place(port: Port) -> (usize, u64) {
    let word = (port.0 / 64) as usize % WORDS;
    (word, 1 << (port.0 % 64))
}

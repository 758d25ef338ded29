//! The event bits in the shared info page: 2-level, 4,096 channels.

use core::ptr::NonNull;
use core::sync::atomic::Ordering;
#[cfg(not(loom))]
use core::sync::atomic::{AtomicU8, AtomicU64};
#[cfg(loom)]
use loom::sync::atomic::{AtomicU8, AtomicU64};

use hypercall::arch::shared_info as layout;
use hypercall::{Hypervisor, Port, VcpuId};

/// Words in each bitmap, and bits in each word.
pub(crate) const WORDS: usize = 64;

/// Bytes in memory for each byte of the page: a model checker's atomics are larger than what they stand for.
const SCALE: usize = if cfg!(loom) { 8 } else { 1 };

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

    pub(crate) fn pending_sel(&self) -> &AtomicU64 {
        self.word(self.vcpu + layout::PENDING_SEL)
    }

    pub(crate) fn pending(&self, word: usize) -> &AtomicU64 {
        self.word(layout::PENDING + word % WORDS * 8)
    }

    pub(crate) fn mask(&self, word: usize) -> &AtomicU64 {
        self.word(layout::MASK + word % WORDS * 8)
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
    pub(crate) fn raise(&self, word: usize) {
        self.pending_sel().fetch_or(1 << (word % WORDS), Ordering::SeqCst);
        // An exchange, as in Xen: model checkers order those fully, and plain stores not.
        self.upcall_pending().swap(1, Ordering::SeqCst);
    }
}

/// A port's word and its bit in there.
pub(crate) fn place(port: Port) -> (usize, u64) {
    let word = (port.0 / 64) as usize % WORDS;
    (word, 1 << (port.0 % 64))
}

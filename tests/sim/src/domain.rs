//! A domain: how it is set up, and what is kept of it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hypercall::{DomId, ShutdownReason, VcpuId};

use crate::Memory;
use crate::events::{Bits, Events};
use crate::faults::{Faults, Kind, Tally};
use crate::grants::Grants;

/// What a domain is like. Start from [`dom0`](Self::dom0) or [`guest`](Self::guest) and change what matters.
#[derive(Clone, Copy, Debug)]
pub struct DomainConfig {
    /// It may use `Toolstack`.
    pub privileged: bool,
    /// Its frame numbers are machine frame numbers.
    pub direct_mapped: bool,
    /// What Xen advertises to it (XENFEAT bits, submap 0).
    pub features: u32,
    /// `GNTTABOP_cache_flush` exists.
    pub cache_flush: bool,
    /// And it does nothing, though it says that it has: for those who mean to go wrong.
    pub flushes_nothing: bool,
    /// Virtual CPUs it has.
    pub vcpus: u32,
    /// Pages it may have.
    pub pages: usize,
    /// Windows it has to map at.
    pub windows: usize,
    /// Frames its grant table may grow to.
    pub grant_frames: u32,
    /// Mappings of other domains' pages it may have.
    pub maptrack: u32,
    /// The highest event channel it may have.
    pub max_port: u32,
    /// It may have its events through queues (FIFO), as on any Xen since 4.4; 2-level only if not.
    pub fifo: bool,
    /// Its first frame number, if it is not direct-mapped; by default far from those of other domains.
    pub first_gfn: Option<u64>,
    /// It has a port for domain 0's store, in `HVM_PARAM_STORE_EVTCHN`, from the start.
    pub store_port: bool,
}

impl DomainConfig {
    /// A domain 0 as on Arm: privileged, direct-mapped, and told so.
    #[must_use]
    pub const fn dom0() -> Self {
        Self { privileged: true, direct_mapped: true, features: 0x2_6805, ..Self::guest() }
    }

    /// A guest as on Arm.
    #[must_use]
    pub const fn guest() -> Self {
        Self {
            privileged: false,
            direct_mapped: false,
            features: 0x1_6005,
            cache_flush: true,
            flushes_nothing: false,
            vcpus: 1,
            pages: 1 << 16,
            windows: 8192,
            grant_frames: 64,
            maptrack: 8192,
            max_port: 4095,
            fifo: true,
            first_gfn: None,
            store_port: false,
        }
    }
}

type Callback = Arc<dyn Fn() + Send + Sync>;

/// What a domain's own handles reach without the machine's lock.
pub(crate) struct Handle {
    pub(crate) id: DomId,
    pub(crate) bits: Bits,
    pub(crate) tally: Tally,
    features: AtomicU32,
    suspended: AtomicBool,
    callback: Mutex<Option<Callback>>,
    changed: Condvar,
    hooks: Mutex<Vec<(Kind, Callback)>>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle(d{})", self.id)
    }
}

impl Handle {
    fn callback(&self) -> MutexGuard<'_, Option<Callback>> {
        self.callback.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn features(&self) -> u32 {
        self.features.load(Ordering::SeqCst)
    }

    pub(crate) fn set_features(&self, bits: u32) {
        self.features.store(bits, Ordering::SeqCst);
    }

    /// Answers what it was before.
    pub(crate) fn set_suspended(&self, suspended: bool) -> bool {
        self.suspended.swap(suspended, Ordering::SeqCst)
    }

    pub(crate) fn is_suspended(&self) -> bool {
        self.suspended.load(Ordering::SeqCst)
    }

    /// Whether there is an upcall and the domain is there to take it.
    pub(crate) fn takes_upcall(&self, vcpu: VcpuId) -> bool {
        !self.is_suspended() && self.bits.upcall_pending(vcpu)
    }

    pub(crate) fn set_callback(&self, callback: Option<Callback>) {
        *self.callback() = callback;
    }

    pub(crate) fn hook(&self, kind: Kind, hook: Callback) {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner).push((kind, hook));
    }

    /// Runs what a test wants to happen before a call. Never under the machine's lock.
    pub(crate) fn before(&self, kind: Kind) {
        let hooks = self.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        if hooks.is_empty() {
            return;
        }
        let due: Vec<_> =
            hooks.iter().filter(|(of, _)| *of == kind).map(|(_, hook)| Arc::clone(hook)).collect();
        drop(hooks);
        for hook in due {
            hook();
        }
    }

    /// An upcall has become pending: wakes who waits, and calls who wants to be called. Never under the machine's lock.
    pub(crate) fn wake(&self) {
        if self.is_suspended() {
            return;
        }
        let callback = {
            let callback = self.callback();
            self.changed.notify_all();
            callback.clone()
        };
        if let Some(callback) = callback {
            callback();
        }
    }

    /// Waits until an upcall is pending; `false` if none was in time.
    pub(crate) fn wait(&self, vcpu: VcpuId, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        let mut guard = self.callback();
        while !self.takes_upcall(vcpu) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            guard =
                self.changed.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// All that Xen keeps of a domain.
#[derive(Debug)]
pub(crate) struct Domain {
    pub(crate) handle: Arc<Handle>,
    pub(crate) privileged: bool,
    pub(crate) cache_flush: bool,
    pub(crate) flushes_nothing: bool,
    pub(crate) vcpus: u32,
    pub(crate) dying: bool,
    /// How often it was resumed with everything new.
    pub(crate) life: u32,
    pub(crate) store_port: bool,
    pub(crate) shutdown: Option<ShutdownReason>,
    pub(crate) memory: Memory,
    pub(crate) grants: Grants,
    pub(crate) events: Events,
    pub(crate) params: BTreeMap<u32, u64>,
    pub(crate) faults: Faults,
}

impl Domain {
    pub(crate) fn new(id: DomId, config: DomainConfig, bits: Bits) -> Self {
        let first_gfn = config.first_gfn.unwrap_or(0x10_0123 + u64::from(id.0) * 0x2_0457);
        let memory = Memory::new(id, config.direct_mapped, first_gfn, config.pages, config.windows);
        Self {
            handle: Arc::new(Handle {
                id,
                bits,
                tally: Tally::default(),
                features: AtomicU32::new(config.features),
                suspended: AtomicBool::new(false),
                callback: Mutex::new(None),
                changed: Condvar::new(),
                hooks: Mutex::default(),
            }),
            privileged: config.privileged,
            cache_flush: config.cache_flush,
            flushes_nothing: config.flushes_nothing,
            vcpus: config.vcpus,
            dying: false,
            life: 0,
            store_port: config.store_port,
            shutdown: None,
            memory,
            grants: Grants::new(config.grant_frames, config.maptrack),
            events: Events::new(config.max_port, config.fifo),
            params: BTreeMap::new(),
            faults: Faults::default(),
        }
    }
}

#![doc = include_str!("../README.md")]

mod cache;
mod dma;
mod domain;
mod events;
mod faults;
mod fifo;
mod grants;
mod hv;
mod ledger;
mod life;
mod machine;
mod memory;
mod page;
pub mod schedule;
mod strict;

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypercall::abi::{GrantEntryV1, hvm_param};
use hypercall::{DomId, Gfn, GrantRef, Port, ShutdownReason, VcpuId, Virq};

pub use dma::{DmaConfig, DmaCounts, DmaDevice, Iommu};
pub use domain::DomainConfig;
pub use events::PortState;
pub use faults::{Fault, FaultPlan, Hypercalls, Kind};
pub use grants::GrantUse;
pub use hv::SimHv;
pub use ledger::{Item, Ledger, LedgerDiff};
pub use memory::{P2mEntry, P2mKind};

use domain::{Domain, Handle};
use events::Bits;
use machine::Machine;
use memory::Memory;
use page::Page;
use strict::Strict;

/// A machine that runs a simulated Xen, with its domains. Cheap to clone; all clones are the same machine.
#[derive(Clone, Debug)]
pub struct Sim(Arc<Shared>);

#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    /// What a window shows at which nothing is mapped.
    hole: Page,
}

/// Everything behind the machine's one lock.
#[derive(Debug)]
pub(crate) struct State {
    machine: Machine,
    domains: BTreeMap<DomId, Domain>,
    next: u16,
    violations: Vec<String>,
}

impl State {
    /// Notes something that a domain did against the seam's contract.
    fn violation(&mut self, who: DomId, what: fmt::Arguments<'_>) {
        self.violations.push(format!("d{who} {what}"));
    }

    fn privileged(&self) -> Vec<DomId> {
        self.domains.iter().filter(|(_, domain)| domain.privileged).map(|(id, _)| *id).collect()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wake(handles: impl IntoIterator<Item = Arc<Handle>>) {
    for handle in handles {
        handle.wake();
    }
}

impl Default for Sim {
    fn default() -> Self {
        Self::new()
    }
}

impl Sim {
    /// A machine without domains; [strict](Self::strict) if the environment has a `SIM_STRICT`.
    ///
    /// # Panics
    /// When the host has not a page of memory left.
    #[must_use]
    pub fn new() -> Self {
        if std::env::var_os("SIM_STRICT").is_some() { Self::strict() } else { Self::with(None) }
    }

    /// A machine in which a domain sees what it maps at addresses of its own, with the rights it was granted: writing through a
    /// mapping for reading, and any access after the unmap, ends the process with SIGSEGV. Maps and unmaps cost a system call.
    ///
    /// # Panics
    /// When the host has no memory left, or has not pages of 4,096 bytes.
    #[must_use]
    #[expect(clippy::expect_used, reason = "the host cannot do it")]
    pub fn strict() -> Self {
        Self::with(Some(Strict::new().expect("a file in memory")))
    }

    #[expect(clippy::expect_used, reason = "the host itself is out of memory")]
    fn with(strict: Option<Strict>) -> Self {
        let mut machine = Machine::new(strict);
        let one = NonZeroUsize::MIN;
        let (_, hole) = machine.allocate(DomId::SELF, one).expect("a page of memory");
        let state = State { machine, domains: BTreeMap::new(), next: 0, violations: Vec::new() };
        Self(Arc::new(Shared { state: Mutex::new(state), hole }))
    }

    /// Starts a domain, with the lowest id that no domain has had: 0 is the first.
    ///
    /// # Panics
    /// When the host has no memory left.
    #[expect(clippy::expect_used, reason = "the host itself is out of memory")]
    pub fn create(&self, config: DomainConfig) -> SimHv {
        let mut guard = self.0.lock();
        let state = &mut *guard;
        let id = DomId(state.next);
        state.next += 1;
        let one = NonZeroUsize::MIN;
        let (_, page) = state.machine.allocate(id, one).expect("a page of memory");
        let domain = Domain::new(id, config, Bits(page));
        let handle = Arc::clone(&domain.handle);
        state.domains.insert(id, domain);
        if config.store_port {
            state.offer_store(id);
            if let Some(domain) = state.domains.get_mut(&id) {
                domain.params.insert(hvm_param::STORE_PFN, Gfn::INVALID.0);
            }
        }
        SimHv::new(Arc::clone(&self.0), handle)
    }

    /// Another handle of a domain that exists.
    #[must_use]
    pub fn handle(&self, id: DomId) -> Option<SimHv> {
        let handle = self.domain(id, |domain| Arc::clone(&domain.handle))?;
        Some(SimHv::new(Arc::clone(&self.0), handle))
    }

    fn domain<T>(&self, id: DomId, with: impl FnOnce(&Domain) -> T) -> Option<T> {
        self.0.lock().domains.get(&id).map(with)
    }

    fn domain_mut<T>(&self, id: DomId, with: impl FnOnce(&mut Domain) -> T) -> Option<T> {
        self.0.lock().domains.get_mut(&id).map(with)
    }

    /// Domains that exist, dying ones too: those last until nobody has a page of theirs mapped.
    #[must_use]
    pub fn domains(&self) -> Vec<DomId> {
        self.0.lock().domains.keys().copied().collect()
    }

    /// Destroys a domain, as the toolstack does. `false` if there was none.
    pub fn destroy(&self, id: DomId) -> bool {
        let told = self.0.lock().destroy(id);
        let existed = told.is_some();
        wake(told.into_iter().flatten());
        existed
    }

    /// A domain shuts itself down or crashes; it exists until it is destroyed.
    pub fn shut_down(&self, id: DomId, reason: ShutdownReason) {
        let told = {
            let mut state = self.0.lock();
            if let Some(domain) = state.domains.get_mut(&id) {
                domain.shutdown = Some(reason);
            }
            state.tell_toolstacks()
        };
        wake(told);
    }

    /// A domain waits to be saved: it makes no calls, takes no upcalls, and the toolstacks are told. `false` if there is none, or
    /// it waits already.
    pub fn suspend(&self, id: DomId) -> bool {
        let told = self.0.lock().suspend(id);
        let did = told.is_some();
        wake(told.into_iter().flatten());
        did
    }

    /// A suspended domain goes on as after a restore: with its memory as it was, with no ports, an empty grant table, nothing
    /// mapped, its event bits clear, and what Xen advertises to it now. What others have mapped of it is of its former life:
    /// to unmap it is still right, and nothing of the new life depends on it. `false` if it does not wait.
    pub fn resume(&self, id: DomId, features: u32) -> bool {
        self.0.lock().resume(id, features)
    }

    /// A suspended domain goes on as if nothing had happened, for instance because it could not be saved. `false` if it does not
    /// wait.
    pub fn cancel_suspend(&self, id: DomId) -> bool {
        let woken = self.0.lock().cancel_suspend(id);
        let did = woken.is_some();
        wake(woken.into_iter().flatten());
        did
    }

    /// What Xen advertises to a domain from now on. Nobody is told, as on real Xen.
    pub fn set_features(&self, id: DomId, bits: u32) {
        self.domain(id, |domain| domain.handle.set_features(bits));
    }

    /// Whether there is a `GNTTABOP_cache_flush` for a domain from now on, as after Xen was replaced by another.
    pub fn set_cache_flush(&self, id: DomId, exists: bool) {
        self.domain_mut(id, |domain| domain.cache_flush = exists);
    }

    /// Whether a domain may have its events through queues (`EVTCHNOP_init_control`) from its next start or resume on, as after
    /// Xen was replaced by another.
    pub fn set_fifo(&self, id: DomId, exists: bool) {
        self.domain_mut(id, |domain| domain.events.offers_fifo = exists);
    }

    /// Raises a virtual interrupt.
    pub fn raise_virq(&self, id: DomId, virq: Virq) {
        let woken = self.0.lock().raise_virq(id, virq);
        wake(woken);
    }

    /// Has something of a domain go wrong.
    pub fn inject(&self, id: DomId, plan: FaultPlan) {
        self.domain_mut(id, |domain| domain.faults.plan(plan));
    }

    /// Drops what was planned to go wrong; answers how many plans were not used up.
    pub fn clear_faults(&self, id: DomId) -> usize {
        self.domain_mut(id, |domain| domain.faults.clear()).unwrap_or(0)
    }

    /// Plans that are not used up.
    #[must_use]
    pub fn faults_left(&self, id: DomId) -> usize {
        self.domain(id, |domain| domain.faults.left()).unwrap_or(0)
    }

    /// What a domain has asked for so far; that of a domain which is gone too, while a handle of it lives, is in
    /// [`SimHv::hypercalls`].
    #[must_use]
    pub fn hypercalls(&self, id: DomId) -> Option<Hypercalls> {
        self.domain(id, |domain| domain.handle.tally.read())
    }

    /// Who holds what now.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        Ledger::of(&self.0.lock())
    }

    /// What domains did so far against the contract of the seam: memory freed while mapped, windows used twice, and the
    /// like. Empty in every test that is not about that.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.0.lock().violations.clone()
    }

    /// An entry of a domain's grant table as it is now.
    #[must_use]
    pub fn grant_entry(&self, id: DomId, gref: GrantRef) -> Option<GrantEntryV1> {
        self.domain(id, |domain| domain.grants.entry(gref))?
    }

    /// Writes an entry of a domain's grant table as the domain itself could; `false` if the table has no such entry.
    pub fn set_grant_entry(&self, id: DomId, gref: GrantRef, entry: GrantEntryV1) -> bool {
        self.domain(id, |domain| domain.grants.set_entry(gref, entry)).unwrap_or(false)
    }

    /// How many mappings and copies use an entry at this moment.
    #[must_use]
    pub fn grant_users(&self, id: DomId, gref: GrantRef) -> u32 {
        self.domain(id, |domain| domain.grants.pins(gref)).unwrap_or(0)
    }

    /// How often an entry of a domain's grant table has come to mean something else, as far as anybody looked: Xen for a copy or
    /// the first mapping, or the caller, now. A reference that a peer was told of in one generation and uses in another is
    /// stale. What is closed and opened again for the same domain and frame with nobody looking is the same generation.
    #[must_use]
    pub fn grant_generation(&self, id: DomId, gref: GrantRef) -> u64 {
        self.domain_mut(id, |domain| domain.grants.look(gref)).unwrap_or(0)
    }

    /// Has each copy and mapping by a domain's references noted from now on.
    pub fn watch_grants(&self, id: DomId) {
        self.domain_mut(id, |domain| domain.grants.watch());
    }

    /// What was noted since the last time.
    #[must_use]
    pub fn grant_uses(&self, id: DomId) -> Vec<GrantUse> {
        self.domain_mut(id, |domain| domain.grants.uses()).unwrap_or_default()
    }

    /// How many copies and mappings Xen has refused because a reference of this domain's was not open to whoever used it, or
    /// not for writing, or is none: if both sides are right, none.
    #[must_use]
    pub fn refused_grants(&self, id: DomId) -> u64 {
        self.domain(id, |domain| domain.grants.refused).unwrap_or(0)
    }

    /// How many mappings of other domains' pages a domain may have.
    pub fn set_maptrack_limit(&self, id: DomId, limit: u32) {
        self.domain_mut(id, |domain| domain.grants.limit_maptrack(limit));
    }

    /// The highest port that a domain may have.
    pub fn set_max_port(&self, id: DomId, max_port: u32) {
        self.domain_mut(id, |domain| domain.events.max_port = max_port);
    }

    /// How many pages a domain may have.
    pub fn set_page_limit(&self, id: DomId, limit: usize) {
        self.domain_mut(id, |domain| domain.memory.limit = limit);
    }

    /// What a port is.
    #[must_use]
    pub fn port(&self, id: DomId, port: Port) -> PortState {
        self.domain(id, |domain| domain.events.state(port)).unwrap_or_default()
    }

    /// A port's pending and mask bits.
    #[must_use]
    pub fn port_bits(&self, id: DomId, port: Port) -> Option<(bool, bool)> {
        self.domain(id, |domain| match &domain.events.fifo {
            Some(fifo) => (fifo.is_pending(port), fifo.is_masked(port)),
            None => {
                let bits = domain.handle.bits;
                (bits.is_pending(port), bits.is_masked(port))
            }
        })
    }

    /// Domains that have an upcall to take on their first virtual CPU: whom a single thread should run next.
    #[must_use]
    pub fn with_upcall(&self) -> Vec<DomId> {
        let state = self.0.lock();
        let has = |domain: &Domain| domain.handle.takes_upcall(VcpuId(0));
        state.domains.iter().filter(|(_, domain)| has(domain)).map(|(id, _)| *id).collect()
    }

    /// What a guest frame number stands for, if anything is there.
    #[must_use]
    pub fn p2m(&self, id: DomId, frame: Gfn) -> Option<P2mEntry> {
        self.domain(id, |domain| domain.memory.lookup(frame))?.map(|(_, entry)| entry)
    }

    /// Reads what a domain has at a frame: its own memory, or what is mapped there; `false` if that is nothing. Stops at the
    /// end of the page.
    #[must_use]
    pub fn read(&self, id: DomId, frame: Gfn, offset: usize, to: &mut [u8]) -> bool {
        self.page(id, frame).map(|(page, _)| page.read(offset, to)).is_some()
    }

    /// Writes what a domain has at a frame as the domain itself could; `false` if nothing is there, or for reading only.
    pub fn write(&self, id: DomId, frame: Gfn, offset: usize, from: &[u8]) -> bool {
        let found = self.page(id, frame).filter(|(_, entry)| entry.writable);
        found.map(|(page, _)| page.write(offset, from)).is_some()
    }

    fn page(&self, id: DomId, frame: Gfn) -> Option<(Page, P2mEntry)> {
        let state = self.0.lock();
        let (mfn, entry) = state.domains.get(&id)?.memory.lookup(frame)?;
        Some((state.machine.page(mfn)?, entry))
    }
}

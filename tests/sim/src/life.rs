//! How domains end, wait and go on.

use std::sync::Arc;

use hypercall::abi::hvm_param;
use hypercall::{DomId, ShutdownReason, VcpuId, Virq};

use crate::State;
use crate::domain::Handle;
use crate::events::Wake;
use crate::memory::{Shown, ShownBy};

impl State {
    /// Removes a dying domain of which nobody has any page mapped any more.
    pub(crate) fn bury(&mut self, id: DomId) {
        let dying = self.domains.get(&id).is_some_and(|domain| domain.dying);
        if dying && self.machine.in_use(id) == 0 {
            self.domains.remove(&id);
        }
    }

    /// Tells those who look after domains that something happened to one.
    pub(crate) fn tell_toolstacks(&mut self) -> Vec<Arc<Handle>> {
        let to = self.privileged();
        to.into_iter().flat_map(|id| self.raise_virq(id, Virq::DOM_EXC)).collect()
    }

    /// Ends a domain: its mappings, ports and memory go. What others have mapped of it stays until they unmap it.
    pub(crate) fn destroy(&mut self, id: DomId) -> Option<Vec<Arc<Handle>>> {
        let domain = self.domains.get_mut(&id)?;
        if std::mem::replace(&mut domain.dying, true) {
            return Some(Vec::new());
        }
        self.close_all(id);
        self.drop_mappings(id);
        self.drop_foreign(id);
        if let Some(domain) = self.domains.get_mut(&id) {
            domain.memory.relinquish();
            domain.events.fifo = None;
        }
        let told = self.tell_toolstacks();
        self.bury(id);
        Some(told)
    }

    fn drop_foreign(&mut self, id: DomId) {
        let Some(domain) = self.domains.get(&id) else { return };
        let shown: Vec<_> = domain.memory.windows().collect();
        for (at, shown) in shown {
            let Some(shown) = shown else { continue };
            if let Some(domain) = self.domains.get_mut(&id) {
                domain.memory.hide(&mut self.machine, at);
            }
            self.release(&shown);
        }
    }

    /// What was mapped by right, and in which life of its owner, is no longer.
    pub(crate) fn release(&mut self, shown: &Shown) {
        let ShownBy::Foreign(of, _, life) = shown.by else { return };
        if self.life(of) == Some(life) {
            self.machine.let_go(shown.mfn);
            self.bury(of);
        }
    }

    /// A domain offers domain 0 a port for the store, as its toolstack sets it up.
    pub(crate) fn offer_store(&mut self, id: DomId) {
        let port = self.alloc_unbound(id, DomId(0)).map_or(0, |port| port.0);
        if let Some(domain) = self.domains.get_mut(&id) {
            domain.params.insert(hvm_param::STORE_EVTCHN, port.into());
        }
    }

    /// In which of its lives a domain is, if it is there at all.
    pub(crate) fn life(&self, id: DomId) -> Option<u32> {
        self.domains.get(&id).map(|domain| domain.life)
    }

    pub(crate) fn suspend(&mut self, id: DomId) -> Option<Vec<Arc<Handle>>> {
        let domain = self.domains.get_mut(&id).filter(|domain| !domain.dying)?;
        if domain.handle.set_suspended(true) {
            return None;
        }
        domain.shutdown = Some(ShutdownReason::Suspend);
        Some(self.tell_toolstacks())
    }

    /// Ends a domain's wait.
    fn wake_up(&mut self, id: DomId) -> bool {
        let domain = self.domains.get_mut(&id).filter(|domain| !domain.dying);
        let Some(domain) = domain.filter(|domain| domain.handle.set_suspended(false)) else {
            return false;
        };
        domain.shutdown = None;
        true
    }

    pub(crate) fn cancel_suspend(&mut self, id: DomId) -> Option<Wake> {
        if !self.wake_up(id) {
            return None;
        }
        let handle = &self.domains.get(&id)?.handle;
        Some(handle.takes_upcall(VcpuId(0)).then(|| Arc::clone(handle)))
    }

    pub(crate) fn resume(&mut self, id: DomId, features: u32) -> bool {
        if !self.wake_up(id) {
            return false;
        }
        self.close_all(id);
        self.drop_mappings(id);
        self.drop_foreign(id);
        let Some(domain) = self.domains.get_mut(&id) else { return false };
        domain.life += 1;
        domain.grants.reset();
        domain.events.fifo = None;
        domain.handle.bits.clear();
        domain.handle.set_features(features);
        for mfn in domain.memory.frames() {
            self.machine.let_all_go(mfn);
        }
        if domain.store_port {
            self.offer_store(id);
        }
        true
    }
}

//! Event channels: Xen's side, as in Xen 4.17's common/event_channel.c and, for 2-level delivery, event_2l.c.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hypercall::abi::FIFO_PORTS;
use hypercall::arch::shared_info as layout;
use hypercall::{DomId, Errno, Port, VcpuId, Virq};

use crate::fifo::Fifo;
use crate::page::Page;
use crate::{Handle, State};

/// Virtual interrupt lines there are (`NR_VIRQS`).
const VIRQS: u32 = 24;
/// A virtual interrupt that is bound already (`EEXIST`).
const EXIST: Errno = Errno(17);
/// Ports of the 2-level design.
const PORTS: u32 = 4096;

/// What a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum PortState {
    /// Not in use.
    #[default]
    Free,
    /// This domain may bind to it, or its other end was closed.
    Unbound(DomId),
    /// Joined to another domain's port.
    Interdomain(DomId, Port),
    /// A virtual interrupt arrives on it.
    Virq(Virq, VcpuId),
}

/// A domain's ports.
#[derive(Debug)]
pub(crate) struct Events {
    states: Vec<PortState>,
    /// The highest port there may be.
    pub(crate) max_port: u32,
    /// Whether the domain may have its events through queues,
    pub(crate) offers_fifo: bool,
    /// and if it has.
    pub(crate) fifo: Option<Fifo>,
}

impl Events {
    pub(crate) fn new(max_port: u32, offers_fifo: bool) -> Self {
        Self { states: vec![PortState::Free], max_port, offers_fifo, fifo: None }
    }

    pub(crate) fn state(&self, port: Port) -> PortState {
        self.states.get(port.0 as usize).copied().unwrap_or_default()
    }

    fn set(&mut self, port: Port, state: PortState) {
        if let Some(slot) = self.states.get_mut(port.0 as usize) {
            *slot = state;
        }
    }

    fn allocate(&mut self, state: PortState) -> Result<Port, Errno> {
        let busy = |port| self.fifo.as_ref().is_some_and(|fifo| fifo.is_busy(port));
        let mut free = self.states.iter().enumerate().skip(1);
        let free = free
            .find(|(port, state)| **state == PortState::Free && !busy(Port(*port as u32)))
            .map(|(port, _)| port);
        let port = free.unwrap_or(self.states.len()) as u32;
        let ports = if self.fifo.is_some() { FIFO_PORTS } else { PORTS };
        if port > self.max_port.min(ports - 1) {
            return Err(Errno::NOSPC);
        }
        if port as usize == self.states.len() {
            self.states.push(state);
        } else {
            self.set(Port(port), state);
        }
        Ok(Port(port))
    }

    /// Which virtual CPU hears a port.
    pub(crate) fn vcpu(&self, port: Port) -> VcpuId {
        match self.state(port) {
            PortState::Virq(_, vcpu) => vcpu,
            _ => VcpuId(0),
        }
    }

    /// Ports in use.
    pub(crate) fn ports(&self) -> impl Iterator<Item = (Port, PortState)> {
        let states = self.states.iter().enumerate();
        states
            .filter(|(_, state)| **state != PortState::Free)
            .map(|(port, state)| (Port(port as u32), *state))
    }
}

/// A domain's event bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bits(pub(crate) Page);

impl Bits {
    fn vcpu(vcpu: VcpuId) -> usize {
        let slot = if vcpu.0 < layout::VCPUS { vcpu.0 as usize } else { 0 };
        slot * layout::VCPU_INFO_SIZE
    }

    fn place(port: Port) -> (usize, u64) {
        ((port.0 / 64) as usize % 64, 1 << (port.0 % 64))
    }

    /// Raises a port (`evtchn_2l_set_pending`); says whether the domain is to be woken.
    fn set_pending(self, port: Port, vcpu: VcpuId) -> bool {
        let (word, bit) = Self::place(port);
        let before = self.0.long(layout::PENDING + word * 8).fetch_or(bit, Ordering::SeqCst);
        before & bit == 0
            && self.0.long(layout::MASK + word * 8).load(Ordering::SeqCst) & bit == 0
            && self.select(word, vcpu)
    }

    fn select(self, word: usize, vcpu: VcpuId) -> bool {
        let at = Self::vcpu(vcpu);
        let before = self.0.long(at + layout::PENDING_SEL).fetch_or(1 << word, Ordering::SeqCst);
        before & (1 << word) == 0 && self.tell(vcpu)
    }

    /// `vcpu_mark_events_pending`; says whether that is news.
    pub(crate) fn tell(self, vcpu: VcpuId) -> bool {
        let at = Self::vcpu(vcpu) + layout::UPCALL_PENDING;
        self.0.byte(at).swap(1, Ordering::SeqCst) == 0
    }

    /// `evtchn_2l_unmask`
    fn unmask(self, port: Port, vcpu: VcpuId) -> bool {
        let (word, bit) = Self::place(port);
        let before = self.0.long(layout::MASK + word * 8).fetch_and(!bit, Ordering::SeqCst);
        before & bit != 0 && self.is_pending(port) && self.select(word, vcpu)
    }

    fn clear_pending(self, port: Port) {
        let (word, bit) = Self::place(port);
        self.0.long(layout::PENDING + word * 8).fetch_and(!bit, Ordering::SeqCst);
    }

    /// As a domain finds them when it begins.
    pub(crate) fn clear(self) {
        self.0.fill(0);
    }

    pub(crate) fn is_pending(self, port: Port) -> bool {
        let (word, bit) = Self::place(port);
        self.0.long(layout::PENDING + word * 8).load(Ordering::SeqCst) & bit != 0
    }

    pub(crate) fn is_masked(self, port: Port) -> bool {
        let (word, bit) = Self::place(port);
        self.0.long(layout::MASK + word * 8).load(Ordering::SeqCst) & bit != 0
    }

    /// Whether a virtual CPU has an upcall to take.
    pub(crate) fn upcall_pending(self, vcpu: VcpuId) -> bool {
        self.0.byte(Self::vcpu(vcpu) + layout::UPCALL_PENDING).load(Ordering::SeqCst) != 0
    }
}

/// A domain that an operation may have woken; to be told after the machine's lock is let go.
pub(crate) type Wake = Option<Arc<Handle>>;

impl State {
    pub(crate) fn raise(&mut self, id: DomId, port: Port, vcpu: VcpuId) -> Wake {
        let domain = self.domains.get_mut(&id)?;
        let bits = domain.handle.bits;
        let told = match &mut domain.events.fifo {
            Some(fifo) => fifo.set_pending(port, vcpu) && bits.tell(vcpu),
            None => bits.set_pending(port, vcpu),
        };
        told.then(|| Arc::clone(&domain.handle))
    }

    pub(crate) fn alloc_unbound(&mut self, me: DomId, remote: DomId) -> Result<Port, Errno> {
        let remote = if remote == DomId::SELF { me } else { remote };
        let own = self.domains.get_mut(&me).ok_or(Errno::SRCH)?;
        own.events.allocate(PortState::Unbound(remote))
    }

    pub(crate) fn bind_interdomain(
        &mut self,
        me: DomId,
        remote: DomId,
        remote_port: Port,
    ) -> Result<(Port, Wake), Errno> {
        let remote = if remote == DomId::SELF { me } else { remote };
        let peer = self.domains.get(&remote).ok_or(Errno::SRCH)?;
        let offered = peer.events.state(remote_port) == PortState::Unbound(me);
        let own = self.domains.get_mut(&me).ok_or(Errno::SRCH)?;
        let port = own.events.allocate(PortState::Interdomain(remote, remote_port))?;
        if !offered {
            own.events.set(port, PortState::Free);
            return Err(Errno::INVAL);
        }
        if let Some(peer) = self.domains.get_mut(&remote) {
            peer.events.set(remote_port, PortState::Interdomain(me, port));
        }
        // What was sent to the unbound port is lost, so Xen raises the new one to be sure.
        Ok((port, self.raise(me, port, VcpuId(0))))
    }

    pub(crate) fn bind_virq(&mut self, me: DomId, virq: Virq, vcpu: VcpuId) -> Result<Port, Errno> {
        let own = self.domains.get_mut(&me).ok_or(Errno::SRCH)?;
        if virq.0 >= VIRQS || virq == Virq::DOM_EXC && vcpu.0 != 0 {
            return Err(Errno::INVAL);
        }
        if vcpu.0 >= own.vcpus {
            return Err(Errno::NOENT);
        }
        let wanted = PortState::Virq(virq, vcpu);
        if own.events.ports().any(|(_, state)| state == wanted) {
            return Err(EXIST);
        }
        own.events.allocate(wanted)
    }

    pub(crate) fn notify(&mut self, me: DomId, port: Port) -> Result<Wake, Errno> {
        let own = self.domains.get(&me).ok_or(Errno::SRCH)?;
        match own.events.state(port) {
            PortState::Interdomain(remote, port) => Ok(self.raise(remote, port, VcpuId(0))),
            PortState::Unbound(_) => Ok(None),
            PortState::Free | PortState::Virq(..) => Err(Errno::INVAL),
        }
    }

    pub(crate) fn unmask(&mut self, me: DomId, port: Port) -> Result<Wake, Errno> {
        let own = self.domains.get_mut(&me).ok_or(Errno::SRCH)?;
        if port.0 as usize >= own.events.states.len() {
            return Err(Errno::INVAL);
        }
        let (vcpu, bits) = (own.events.vcpu(port), own.handle.bits);
        let told = match &mut own.events.fifo {
            Some(fifo) => fifo.unmask(port, vcpu) && bits.tell(vcpu),
            None => bits.unmask(port, vcpu),
        };
        Ok(told.then(|| Arc::clone(&own.handle)))
    }

    pub(crate) fn close(&mut self, me: DomId, port: Port) -> Result<(), Errno> {
        let own = self.domains.get_mut(&me).ok_or(Errno::SRCH)?;
        let state = own.events.state(port);
        if state == PortState::Free {
            return Err(Errno::INVAL);
        }
        own.events.set(port, PortState::Free);
        match &mut own.events.fifo {
            Some(fifo) => fifo.clear_pending(port),
            None => own.handle.bits.clear_pending(port),
        }
        if let PortState::Interdomain(remote, remote_port) = state
            && let Some(peer) = self.domains.get_mut(&remote)
        {
            peer.events.set(remote_port, PortState::Unbound(me));
        }
        Ok(())
    }

    pub(crate) fn close_all(&mut self, me: DomId) {
        let Some(own) = self.domains.get(&me) else { return };
        let ports: Vec<_> = own.events.ports().map(|(port, _)| port).collect();
        for port in ports {
            // A loopback's other end may have gone with the first.
            let _ = self.close(me, port);
        }
    }

    /// Raises a virtual interrupt in a domain that has bound it.
    pub(crate) fn raise_virq(&mut self, id: DomId, virq: Virq) -> Vec<Arc<Handle>> {
        let Some(domain) = self.domains.get(&id) else { return Vec::new() };
        let bound = domain.events.ports().filter_map(|(port, state)| match state {
            PortState::Virq(line, vcpu) if line == virq => Some((port, vcpu)),
            _ => None,
        });
        let bound: Vec<_> = bound.collect();
        bound.into_iter().filter_map(|(port, vcpu)| self.raise(id, port, vcpu)).collect()
    }
}

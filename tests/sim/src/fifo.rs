//! FIFO event channels: Xen's side, as in Xen 4.17's common/event_fifo.c.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

use hypercall::abi::{
    FIFO_BUSY, FIFO_LINK_MASK, FIFO_LINKED, FIFO_MASKED, FIFO_PENDING, FIFO_PORTS,
    FIFO_PRIORITY_DEFAULT,
};
use hypercall::{DomId, Errno, Gfn, PAGE_SIZE, Port, VcpuId};

use crate::State;
use crate::events::Wake;
use crate::page::Page;

/// Ports whose words are in one page of the array.
const PER_PAGE: u32 = (PAGE_SIZE / 4) as u32;
/// Of `head` of the one queue that is used, in the control block.
const HEAD: usize = 8 + FIFO_PRIORITY_DEFAULT as usize * 4;

/// A virtual CPU's queue of the default priority; nobody asks for another.
#[derive(Clone, Copy, Debug, Default)]
struct Queue {
    control: Option<Page>,
    tail: u32,
}

/// A domain whose events come through queues.
#[derive(Debug)]
pub(crate) struct Fifo {
    queues: Vec<Queue>,
    array: Vec<Page>,
    /// Raised before the array had a word for them.
    saved: BTreeSet<Port>,
    /// On whose queue each port was last.
    last: Vec<VcpuId>,
    /// Where control blocks and array are.
    frames: BTreeSet<Gfn>,
}

impl Fifo {
    fn new(vcpus: u32) -> Self {
        Self {
            queues: vec![Queue::default(); vcpus as usize],
            array: Vec::new(),
            saved: BTreeSet::new(),
            last: Vec::new(),
            frames: BTreeSet::new(),
        }
    }

    /// Whether Xen writes to a frame.
    pub(crate) fn holds(&self, frame: Gfn) -> bool {
        self.frames.contains(&frame)
    }

    fn word(&self, port: Port) -> Option<&AtomicU32> {
        let page = self.array.get((port.0 / PER_PAGE) as usize)?;
        Some(page.word((port.0 % PER_PAGE) as usize * 4))
    }

    fn has(&self, port: Port, bit: u32) -> bool {
        self.word(port).is_some_and(|word| word.load(SeqCst) & bit != 0)
    }

    pub(crate) fn is_pending(&self, port: Port) -> bool {
        self.has(port, FIFO_PENDING)
    }

    pub(crate) fn is_masked(&self, port: Port) -> bool {
        self.word(port).is_none() || self.has(port, FIFO_MASKED)
    }

    /// Whether a port is still in a queue: it is not used again until it has left.
    pub(crate) fn is_busy(&self, port: Port) -> bool {
        self.has(port, FIFO_LINKED)
    }

    pub(crate) fn clear_pending(&mut self, port: Port) {
        self.saved.remove(&port);
        if let Some(word) = self.word(port) {
            word.fetch_and(!FIFO_PENDING, SeqCst);
        }
    }

    fn queue(&mut self, vcpu: VcpuId) -> Option<&mut Queue> {
        self.queues.get_mut(vcpu.0 as usize)
    }

    /// `evtchn_fifo_set_pending`; says whether the domain is to be told.
    pub(crate) fn set_pending(&mut self, port: Port, vcpu: VcpuId) -> bool {
        let Some(word) = self.word(port) else {
            self.saved.insert(port);
            return false;
        };
        let Some(&Queue { control: Some(control), .. }) = self.queues.get(vcpu.0 as usize) else {
            // As on Xen, what comes for a CPU without a control block is lost.
            return false;
        };
        word.fetch_or(FIFO_PENDING, SeqCst);
        let masked = word.load(SeqCst) & FIFO_MASKED != 0;
        if masked || word.fetch_or(FIFO_LINKED, SeqCst) & FIFO_LINKED != 0 {
            return false;
        }
        // If it was the last in a queue, then that queue is empty now, and nothing may be linked behind it there.
        let at = port.0 as usize;
        if self.last.len() <= at {
            self.last.resize(at + 1, VcpuId(0));
        }
        let before = self.last.get_mut(at).map(|last| std::mem::replace(last, vcpu));
        if let Some(old) = before.and_then(|vcpu| self.queue(vcpu))
            && old.tail == port.0
        {
            old.tail = 0;
        }
        let Some(queue) = self.queue(vcpu) else { return false };
        let tail = std::mem::replace(&mut queue.tail, port.0);
        let tail = if tail == 0 { None } else { self.word(Port(tail)) };
        if tail.is_some_and(|word| set_link(word, port.0)) {
            return false;
        }
        control.word(HEAD).store(port.0, SeqCst);
        let ready = 1 << FIFO_PRIORITY_DEFAULT;
        control.word(0).fetch_or(ready, SeqCst) & ready == 0
    }

    /// `evtchn_fifo_unmask`
    pub(crate) fn unmask(&mut self, port: Port, vcpu: VcpuId) -> bool {
        let Some(word) = self.word(port) else { return false };
        word.fetch_and(!FIFO_MASKED, SeqCst);
        self.is_pending(port) && self.set_pending(port, vcpu)
    }
}

/// `try_set_link`: `None` if the word has changed meanwhile.
fn try_set_link(word: &AtomicU32, seen: &mut u32, link: u32) -> Option<bool> {
    if *seen & FIFO_LINKED == 0 {
        return Some(false);
    }
    let new = *seen & !(FIFO_BUSY | FIFO_LINK_MASK) | link;
    match word.compare_exchange(*seen, new, SeqCst, SeqCst) {
        Ok(_) => Some(true),
        Err(now) => {
            *seen = now;
            None
        }
    }
}

/// `evtchn_fifo_set_link`: has `word`, the last in its queue, lead to `link`, if it is still in the queue.
fn set_link(word: &AtomicU32, link: u32) -> bool {
    let mut seen = word.load(SeqCst);
    if let Some(linked) = try_set_link(word, &mut seen, link) {
        return linked;
    }
    // The domain cannot unmask it from here on, so it can change the word four times at most.
    word.fetch_or(FIFO_BUSY, SeqCst);
    seen = word.load(SeqCst);
    for _ in 0..4 {
        if let Some(linked) = try_set_link(word, &mut seen, link) {
            if !linked {
                word.fetch_and(!FIFO_BUSY, SeqCst);
            }
            return linked;
        }
    }
    word.fetch_and(!FIFO_BUSY, SeqCst);
    true
}

impl State {
    fn event_page(&self, id: DomId, frame: Gfn) -> Result<Page, Errno> {
        let domain = self.domains.get(&id).ok_or(Errno::SRCH)?;
        let page = domain.memory.translate(frame).and_then(|mfn| self.machine.page(mfn));
        page.ok_or(Errno::INVAL)
    }

    /// `evtchn_fifo_init_control`
    pub(crate) fn init_control(
        &mut self,
        me: DomId,
        vcpu: VcpuId,
        frame: Gfn,
    ) -> Result<(), Errno> {
        let page = self.event_page(me, frame);
        let own = self.domains.get_mut(&me).ok_or(Errno::SRCH)?;
        if !own.events.offers_fifo {
            return Err(Errno::NOSYS);
        }
        if vcpu.0 >= own.vcpus {
            return Err(Errno::NOENT);
        }
        let page = page?;
        let bits = own.handle.bits;
        if own.events.fifo.is_none() {
            let mut fifo = Fifo::new(own.vcpus);
            let pending = own.events.ports().filter(|(port, _)| bits.is_pending(*port));
            fifo.saved.extend(pending.map(|(port, _)| port));
            own.events.fifo = Some(fifo);
        }
        let fifo = own.events.fifo.as_mut().ok_or(Errno::NOSYS)?;
        let queue = fifo.queue(vcpu).ok_or(Errno::NOENT)?;
        if queue.control.is_some() {
            return Err(Errno::INVAL);
        }
        queue.control = Some(page);
        fifo.frames.insert(frame);
        Ok(())
    }

    /// `evtchn_fifo_expand_array`
    pub(crate) fn expand_array(&mut self, me: DomId, frame: Gfn) -> Result<Wake, Errno> {
        let page = self.event_page(me, frame);
        let own = self.domains.get_mut(&me).ok_or(Errno::SRCH)?;
        let fifo = own.events.fifo.as_mut().ok_or(Errno::OPNOTSUPP)?;
        if fifo.array.len() as u32 * PER_PAGE >= FIFO_PORTS {
            return Err(Errno::NOSPC);
        }
        let first = fifo.array.len() as u32 * PER_PAGE;
        fifo.array.push(page?);
        fifo.frames.insert(frame);
        let due = fifo.saved.split_off(&Port(first));
        let mut woken = None;
        for port in due {
            let vcpu = self.domains.get(&me).map_or(VcpuId(0), |own| own.events.vcpu(port));
            woken = woken.or(self.raise(me, port, vcpu));
        }
        Ok(woken)
    }
}

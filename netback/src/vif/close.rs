//! The end of a connection, and of a vif.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use grant::MapOps;
use hypercall::{Hypervisor, Instant};
use netif::keys::Features;
use xenbus::device::backend::on_fault;
use xenbus::device::{Action, State};

use super::{Around, Step, Vif};
use crate::ctrl::Control;
use crate::fault::VifFault;
use crate::notice::Notice;
use crate::queue::Queue;

/// Nanoseconds that a frontend which broke the protocol waits before it may connect again; doubled each time.
const FIRST_PENALTY: u64 = 100_000_000;
/// Doublings of [`FIRST_PENALTY`] at most: about half a minute.
const MAX_DOUBLINGS: u32 = 8;
/// Nanoseconds that pages which were lent out are waited for after a disconnect, before they are parked.
const DRAIN_CAP: u64 = 10_000_000_000;

/// What was connected and is on its way out. The queues carry no more packets, but pages of the guest's may still be in
/// somebody's hands (a card's, or another queue's), and until they are back nothing is unmapped and the guest, which
/// takes its pages back once it reads `Closing`, is told nothing.
pub(super) struct Draining<H: Hypervisor> {
    pub(super) queues: Vec<Queue<H>>,
    pub(super) control: Option<Control<H>>,
    /// When it is given up: what is still out then is parked.
    pub(super) until: Instant,
    /// What follows.
    pub(super) after: After,
}

/// What follows once nothing is connected any more.
#[derive(Default)]
pub(super) struct After {
    /// States to write, in order.
    pub(super) states: &'static [State],
    /// For the error node.
    pub(super) error: Option<String>,
    /// Whether the vif ends.
    pub(super) remove: bool,
}

impl After {
    pub(super) const fn states(states: &'static [State]) -> Self {
        Self { states, error: None, remove: false }
    }
}

impl<H: Hypervisor> Vif<H> {
    /// The data path found that the frontend cannot be gone on with (or the store, with `None`).
    pub(crate) fn fault(&mut self, fault: Option<VifFault>, around: &mut Around<'_, H>) {
        self.penalise(around.now);
        let text = fault.map(|fault| fault.to_string());
        if let Some(fault) = fault {
            around.notices.push(Notice::Faulted(self.id, fault));
        }
        let error = Some(text.unwrap_or_else(|| "store failure".into()));
        let after = match on_fault(self.own) {
            Action::Fault { then } => After { error, ..After::states(then) },
            Action::Remove { then } => After { remove: true, ..After::states(then) },
            _ => After::default(),
        };
        self.disconnect(after, around);
    }

    pub(super) fn penalise(&mut self, now: Instant) {
        self.not_before = Some(now.after(FIRST_PENALTY << self.faults.min(MAX_DOUBLINGS)));
        self.faults = self.faults.saturating_add(1);
    }

    /// Cuts off what is connected, and does what follows as soon as all of it is let go of: at once, or when a later
    /// [`settle`](Self::settle) finds that it is.
    pub(super) fn disconnect(&mut self, after: After, around: &mut Around<'_, H>) {
        match &mut self.draining {
            // Only the end of the vif comes over a disconnect: all else waits for it (see `Step::Drain`).
            Some(draining) => draining.after = after,
            None if self.queues.is_empty() => return self.follow(after, around),
            None => {
                let queues = core::mem::take(&mut self.queues);
                self.cut = true;
                let control = self.control.take();
                let until = around.now.after(DRAIN_CAP);
                self.draining = Some(Draining { queues, control, until, after });
                self.features = Features::empty();
                self.step = Step::Drain;
            }
        }
        self.settle(around);
    }

    /// Ends a disconnect if nothing is out any more, or what is has been waited for long enough. To be called whenever
    /// something came back; does nothing if nothing is being disconnected.
    pub(crate) fn settle(&mut self, around: &mut Around<'_, H>) {
        let Some(draining) = &self.draining else { return };
        let is_out = self.lent > 0 || draining.control.as_ref().is_some_and(Control::is_in_use);
        if is_out && around.now < draining.until {
            return;
        }
        self.ended = self.counters();
        let Some(Draining { queues, control, after, .. }) = self.draining.take() else { return };
        let pages = control.as_ref().map_or(0, |control| 1 + control.static_pages());
        // Two rings a queue.
        let mut ops = MapOps::new(queues.len() * 2 + pages);
        let control = control.into_iter().flat_map(Control::disconnect);
        let mappings = queues.into_iter().flat_map(Queue::disconnect).chain(control);
        around.mapper.unmap_batch(&mut ops, mappings);
        around.notices.push(Notice::Disconnected(self.id));
        self.step = Step::Idle;
        self.follow(after, around);
        self.look(around.client);
    }

    pub(super) fn follow(&mut self, after: After, around: &mut Around<'_, H>) {
        self.write_states(after.states, after.error.as_deref(), around);
        if after.remove {
            self.end(around);
        }
    }

    /// Ends the vif, as soon as all that is connected is let go of; nothing is written.
    pub(crate) fn remove(&mut self, around: &mut Around<'_, H>) {
        self.dirty = false;
        self.disconnect(After { remove: true, ..After::default() }, around);
    }

    fn end(&mut self, around: &mut Around<'_, H>) {
        if let Some(watch) = self.watch.take() {
            around.client.unwatch(watch);
        }
        if !self.gone {
            around.notices.push(Notice::Removed(self.id));
            self.forget(around);
        }
    }

    /// Ends the vif, or starts another in its place if its directory has changed since it was last looked at: it may have
    /// been made anew.
    pub(super) fn forget(&mut self, around: &mut Around<'_, H>) {
        if self.dirty {
            let (dir, life) = (core::mem::take(&mut self.dir), self.life);
            *self = Self::new(self.id, self.port, life, dir, self.terms, around.client);
        } else {
            self.gone = true;
        }
    }
}

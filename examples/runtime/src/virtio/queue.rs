//! A split virtqueue, as its driver sees it (virtio 1.2, 2.7).
//!
//! The device is not trusted to keep its indices sane. What is free, what is chained and what is under way is kept in memory of
//! ours, of which the shared pages get a copy: all that is read back is the device's own ring, and each number in it is
//! compared with what the device can have been doing. One that does not fit is a [`Fault`], after which nothing is believed
//! until the device has been reset.

use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::Ordering;

use hypercall::Hypervisor;

use super::memory::DmaPage;

/// Descriptors of a queue at most: the table is a page.
pub const LARGEST: u16 = 256;

const DESCRIPTOR: usize = 16;
/// Another descriptor follows (`VIRTQ_DESC_F_NEXT`).
const NEXT: u32 = 1;
/// The device writes there (`VIRTQ_DESC_F_WRITE`).
const WRITE: u32 = 2;

// Of each of the two rings: a word of which the upper half is the index, then the entries, then the other side's event index.
// The used ring begins well behind the available one, so that no cache line has bytes of both writers.
const AVAILABLE: usize = 0;
const USED: usize = 1024;
const ENTRIES: usize = 4;
const AVAILABLE_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;
/// The device wants no notifications (`VIRTQ_USED_F_NO_NOTIFY`); without event indices alone.
const NO_NOTIFY: u32 = 1;

/// Bytes that the device reads or writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Where, as the device counts.
    pub address: u64,
    /// How many.
    pub len: u32,
    /// Whether it writes them.
    pub writable: bool,
}

/// What a device cannot say if it keeps to the rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It is done with more than it was given.
    Index {
        /// Its index.
        used: u16,
        /// Ours.
        seen: u16,
    },
    /// It is done with a descriptor that begins nothing it was given.
    Descriptor(u32),
    /// It has written more than there was room for.
    Length(u32),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index { used, seen } => write!(f, "index {used} after {seen}"),
            Self::Descriptor(number) => write!(f, "descriptor {number}, which it was not given"),
            Self::Length(len) => write!(f, "{len} bytes written, for which there was no room"),
        }
    }
}

/// A chain that the device has, or is about to get.
#[derive(Debug)]
struct Chain<T> {
    token: T,
    /// Descriptors in it.
    parts: u16,
    /// Bytes that the device may write.
    writable: u32,
    /// Which of all chains it is.
    number: u16,
}

/// What is known of a descriptor.
#[derive(Debug)]
struct Slot<T> {
    /// The one behind it, in its chain or among the free.
    next: u16,
    /// The chain that begins with it.
    chain: Option<Chain<T>>,
}

/// A queue, and a token for each chain that is under way.
#[derive(Debug)]
pub struct Queue<T> {
    table: DmaPage,
    rings: DmaPage,
    slots: Vec<Slot<T>>,
    /// A power of two.
    size: u16,
    /// The first free descriptor, and how many there are.
    free: u16,
    room: u16,
    /// Chains ever queued, of which the device has been shown the first `shown`, and has given back the first `seen`. All wrap.
    queued: u16,
    shown: u16,
    seen: u16,
    /// The device's index as we last read it.
    known: u16,
    /// Both sides say by index when they want to hear of the other (`VIRTIO_F_EVENT_IDX`).
    event_index: bool,
    fault: Option<Fault>,
}

/// A chain whose descriptors are written.
#[derive(Debug)]
pub struct Described {
    head: u16,
    count: u16,
    /// The first descriptor that is free when it is queued.
    next: u16,
    /// Bytes that the device may write.
    writable: u32,
}

/// A chain that the device is done with.
#[derive(Debug, PartialEq, Eq)]
pub struct Done<T> {
    /// What it was queued with.
    pub token: T,
    /// The descriptor that it began with.
    pub head: u16,
    /// Bytes that the device says it has written.
    pub written: u32,
}

impl<T> Queue<T> {
    /// An empty queue of `size` descriptors, rounded down to a power of two, and [`LARGEST`] at most. `None` if memory is short,
    /// or if that is none at all.
    pub fn new<H: Hypervisor>(
        hv: &H,
        size: u32,
        event_index: bool,
        coherent: bool,
    ) -> Option<Self> {
        let size = u16::try_from(size.min(LARGEST.into())).ok()?;
        let size = 1 << size.checked_ilog2()?;
        let (table, rings) = (DmaPage::new(hv, coherent)?, DmaPage::new(hv, coherent)?);
        let slots = (0..size).map(|_| Slot { next: 0, chain: None }).collect();
        let mut queue = Self {
            table,
            rings,
            slots,
            size,
            free: 0,
            room: 0,
            queued: 0,
            shown: 0,
            seen: 0,
            known: 0,
            event_index,
            fault: None,
        };
        queue.link();
        Some(queue)
    }

    /// All is free, nothing has been queued.
    fn link(&mut self) {
        (self.free, self.room) = (0, self.size);
        (self.queued, self.shown, self.seen, self.known) = (0, 0, 0, 0);
        self.fault = None;
        for (slot, next) in self.slots.iter_mut().zip(1..) {
            slot.next = next;
        }
    }

    /// How many descriptors it has.
    pub const fn size(&self) -> u16 {
        self.size
    }

    /// Where the device finds the descriptors, the available ring and the used ring.
    pub const fn areas(&self) -> [u64; 3] {
        [self.table.bus(0), self.rings.bus(AVAILABLE), self.rings.bus(USED)]
    }

    /// Descriptors that are free.
    pub const fn room(&self) -> u16 {
        if self.fault.is_some() { 0 } else { self.room }
    }

    /// Chains queued that have not come back.
    pub const fn under_way(&self) -> u16 {
        self.queued.wrapping_sub(self.seen)
    }

    /// The descriptor that the next chain begins with, if there is room for one.
    pub const fn next_head(&self) -> u16 {
        self.free
    }

    fn used_event(&self) -> usize {
        AVAILABLE + ENTRIES + AVAILABLE_ENTRY * usize::from(self.size)
    }

    fn available_event(&self) -> usize {
        USED + ENTRIES + USED_ENTRY * usize::from(self.size)
    }

    /// Writes the descriptors of a chain, for [`queue`](Self::queue) at once. `None` if there are not enough, or no parts.
    #[must_use]
    pub fn describe(&self, parts: impl IntoIterator<Item = Part>) -> Option<Described> {
        let head = self.free;
        let mut next = head;
        let (mut count, mut writable) = (0, 0_u32);
        let mut parts = parts.into_iter().peekable();
        while let Some(part) = parts.next() {
            let at = usize::from(next) * DESCRIPTOR;
            next = self.slots.get(usize::from(next)).filter(|_| count < self.room())?.next;
            count += 1;
            let more = if parts.peek().is_some() { NEXT | u32::from(next) << 16 } else { 0 };
            let write = if part.writable { WRITE } else { 0 };
            writable = writable.saturating_add(if part.writable { part.len } else { 0 });
            // A descriptor that no available ring leads to means nothing to the device: one that is left over is no harm.
            self.table.write(at, &part.address.to_le_bytes());
            self.table.store(at + 8, part.len, Ordering::Relaxed);
            self.table.store(at + 12, write | more, Ordering::Relaxed);
        }
        (count > 0).then_some(Described { head, count, next, writable })
    }

    /// Queues the chain that was described last; the device learns of it by [`show`](Self::show).
    pub fn queue(&mut self, chain: Described, token: T) {
        let Described { head, count, next, writable } = chain;
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return };
        slot.chain = Some(Chain { token, parts: count, writable, number: self.queued });
        (self.free, self.room) = (next, self.room - count);
        let place = usize::from(self.queued % self.size);
        self.rings.write(AVAILABLE + ENTRIES + AVAILABLE_ENTRY * place, &head.to_le_bytes());
        self.queued = self.queued.wrapping_add(1);
    }

    /// Shows the device all that was queued since the last time; says whether it wants to be notified of that.
    #[must_use]
    pub fn show(&mut self) -> bool {
        let (old, new) = (self.shown, self.queued);
        if new == old || self.fault.is_some() {
            return false;
        }
        // The other half of the word is flags, of which none is ever set.
        self.rings.store(AVAILABLE, u32::from(new) << 16, Ordering::Release);
        self.shown = new;
        // A device about to stop looking has stored its wish before it looks again: either it sees the index or we see the wish.
        self.rings.fence();
        if self.event_index {
            let event = self.rings.load(self.available_event(), Ordering::Relaxed) as u16;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.rings.load(USED, Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    /// A chain that the device is done with, in the order in which it says so.
    ///
    /// # Errors
    /// The device makes no sense. It is said once; from then on there is nothing to take or to queue until [`clear`](Self::clear).
    pub fn pop(&mut self) -> Result<Option<Done<T>>, Fault> {
        if self.fault.is_some() {
            return Ok(None);
        }
        let result = self.take();
        self.fault = result.as_ref().err().copied();
        result
    }

    fn take(&mut self) -> Result<Option<Done<T>>, Fault> {
        if self.known == self.seen && !self.look()? {
            return Ok(None);
        }
        let at = USED + ENTRIES + USED_ENTRY * usize::from(self.seen % self.size);
        let number = self.rings.load(at, Ordering::Relaxed);
        let written = self.rings.load(at + 4, Ordering::Relaxed);
        let shown = self.shown;
        // Of what has been queued but not shown, the device cannot know.
        let was_shown =
            |chain: &mut Chain<T>| (1..=LARGEST).contains(&shown.wrapping_sub(chain.number));
        let slot = usize::try_from(number).ok().and_then(|number| self.slots.get_mut(number));
        let chain = slot.and_then(|slot| slot.chain.take_if(was_shown));
        let chain = chain.ok_or(Fault::Descriptor(number))?;
        let head = number as u16;
        self.release(head, chain.parts);
        self.seen = self.seen.wrapping_add(1);
        if written > chain.writable {
            return Err(Fault::Length(written));
        }
        Ok(Some(Done { token: chain.token, head, written }))
    }

    /// Reads the device's index; says whether there is something to take.
    fn look(&mut self) -> Result<bool, Fault> {
        let used = (self.rings.load(USED, Ordering::Acquire) >> 16) as u16;
        if used.wrapping_sub(self.seen) > self.shown.wrapping_sub(self.seen) {
            return Err(Fault::Index { used, seen: self.seen });
        }
        self.known = used;
        Ok(used != self.seen)
    }

    /// Puts a chain's descriptors in front of the free ones.
    fn release(&mut self, head: u16, parts: u16) {
        let mut last = head;
        for _ in 1..parts {
            last = self.slots.get(usize::from(last)).map_or(last, |slot| slot.next);
        }
        if let Some(slot) = self.slots.get_mut(usize::from(last)) {
            slot.next = self.free;
        }
        (self.free, self.room) = (head, self.room + parts);
    }

    /// Asks for an interrupt once `more` chains than now have come back, and one beyond. Says whether that is so already: then
    /// there may be no interrupt, and [`pop`](Self::pop) has something.
    ///
    /// Without event indices the device raises one each time.
    #[must_use]
    pub fn arm(&mut self, more: u16) -> bool {
        if self.fault.is_some() {
            return false;
        }
        if self.event_index {
            let event = self.seen.wrapping_add(more);
            self.rings.store(self.used_event(), event.into(), Ordering::Relaxed);
        }
        // A device that is done with something stores its index before it looks for our wish: either it sees that, or we see the
        // index.
        self.rings.fence();
        let used = (self.rings.load(USED, Ordering::Acquire) >> 16) as u16;
        used.wrapping_sub(self.seen) > more
    }

    /// Empties the queue, and drops all that was under way. The device must have stopped.
    pub fn clear(&mut self) {
        self.abandon().for_each(drop);
        self.table.clear();
        self.rings.clear();
        self.link();
    }

    /// The tokens of all that is under way. What they stand for may still be read and written.
    pub fn abandon(&mut self) -> impl Iterator<Item = T> {
        self.slots.iter_mut().filter_map(|slot| Some(slot.chain.take()?.token))
    }
}

#[cfg(test)]
mod tests;

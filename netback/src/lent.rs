//! What was taken from a ring and is not answered yet because others still need what it names: packets that go from guest to guest
//! by reference, and packets that are mapped.
//!
//! A chain of slots stays in a table; what travels is a token. Whoever drops a token, or a packet that holds mapped pages,
//! gives it back through a queue that the backend empties: so every slot is answered, whatever becomes of its packet.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crossbeam_queue::ArrayQueue;
use grant::Mapping;
use hypercall::{DomId, Hypervisor, Instant};
use netif::tx::{self, MAX_SLOTS};

use crate::datapath::Datapath;
use crate::switch::PortId;

/// Chains that may be open at a time, over all vifs: eight full rings.
const MAX_OPEN: u16 = 2048;

/// The queue that a chain was taken from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Origin {
    pub(crate) port: PortId,
    pub(crate) queue: u16,
    /// Which connection of the vif.
    pub(crate) life: u32,
}

/// Names a chain in the table; one that has ended never names another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct TakenId {
    index: u16,
    generation: u32,
}

/// A chain that waits for its answer.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) origin: Origin,
    pub(crate) domain: DomId,
    pub(crate) chain: tx::Packet,
}

#[derive(Debug, Default)]
struct Entry {
    generation: u32,
    open: Option<Open>,
}

/// What came back.
pub(crate) enum Returned<H: Hypervisor> {
    /// A packet that will not be delivered.
    Token(Token<H>),
    /// Pages that nobody reads any more.
    Pages(Box<Pages<H>>),
}

struct Returns<H: Hypervisor> {
    tokens: ArrayQueue<TakenId>,
    pages: ArrayQueue<Box<Pages<H>>>,
}

/// The duty to answer a chain. Dropped, it goes back to the table.
pub(crate) struct Token<H: Hypervisor> {
    /// `None` once it is used up.
    id: Option<TakenId>,
    returns: Arc<Returns<H>>,
}

impl<H: Hypervisor> Drop for Token<H> {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            // There is room for every chain that can be open.
            let _ = self.returns.tokens.push(id);
        }
    }
}

/// Bytes of a packet that lie in a mapped page.
pub(crate) struct LentPage<H: Hypervisor> {
    pub(crate) page: Mapping<H>,
    pub(crate) offset: u16,
    pub(crate) len: u16,
}

/// The mapped pages of one packet, in the order of its bytes.
pub(crate) struct Pages<H: Hypervisor> {
    pub(crate) pages: heapless::Vec<LentPage<H>, MAX_SLOTS>,
    /// How many there were, once they are taken out to be unmapped.
    pub(crate) count: usize,
    pub(crate) path: Datapath,
    pub(crate) since: Instant,
    /// Whose they are.
    pub(crate) origin: Option<Origin>,
    pub(crate) token: Option<Token<H>>,
}

/// Pages on loan; dropped, they go back to be unmapped.
pub(crate) struct Loan<H: Hypervisor> {
    /// `None` only while it is dropped.
    pages: Option<Box<Pages<H>>>,
    returns: Arc<Returns<H>>,
}

impl<H: Hypervisor> Loan<H> {
    pub(crate) fn pages(&self) -> &[LentPage<H>] {
        self.pages.as_ref().map_or(&[], |lent| lent.pages.as_slice())
    }

    pub(crate) fn since(&self) -> Option<Instant> {
        self.pages.as_ref().map(|lent| lent.since)
    }

    pub(crate) fn origin(&self) -> Option<Origin> {
        self.pages.as_ref().and_then(|lent| lent.origin)
    }
}

impl<H: Hypervisor> Drop for Loan<H> {
    fn drop(&mut self) {
        if let Some(pages) = self.pages.take() {
            // There is room for all that there are.
            let _ = self.returns.pages.push(pages);
        }
    }
}

/// All chains that wait for their answers, and the boxes for mapped pages.
pub(crate) struct Table<H: Hypervisor> {
    entries: Vec<Entry>,
    free: Vec<u16>,
    spare: Vec<Box<Pages<H>>>,
    returns: Arc<Returns<H>>,
}

impl<H: Hypervisor> Table<H> {
    /// A table by which up to `max_lent` packets can be mapped at a time.
    pub(crate) fn new(max_lent: u16) -> Self {
        let spare = (0..max_lent).map(|_| {
            Box::new(Pages {
                pages: heapless::Vec::new(),
                count: 0,
                path: Datapath::Map,
                since: Instant::default(),
                origin: None,
                token: None,
            })
        });
        Self {
            entries: (0..MAX_OPEN).map(|_| Entry::default()).collect(),
            free: (0..MAX_OPEN).rev().collect(),
            spare: spare.collect(),
            returns: Arc::new(Returns {
                // Tokens of queues that are gone come back, too.
                tokens: ArrayQueue::new(2 * usize::from(MAX_OPEN)),
                pages: ArrayQueue::new(usize::from(max_lent.max(1))),
            }),
        }
    }

    /// How many more chains can be opened.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }

    /// How many more packets can be mapped.
    pub(crate) fn spare(&self) -> usize {
        self.spare.len()
    }

    /// Chains that are open.
    pub(crate) fn open(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Keeps a chain; `None`, and the chain is gone, if there is no [`room`](Self::room).
    pub(crate) fn insert(&mut self, open: Open) -> Option<Token<H>> {
        let index = self.free.pop()?;
        let entry = self.entries.get_mut(usize::from(index))?;
        entry.open = Some(open);
        let id = TakenId { index, generation: entry.generation };
        Some(Token { id: Some(id), returns: Arc::clone(&self.returns) })
    }

    /// What a token stands for; `None` if its queue is gone.
    pub(crate) fn get(&self, token: &Token<H>) -> Option<&Open> {
        let id = token.id?;
        let entry = self.entries.get(usize::from(id.index))?;
        entry.open.as_ref().filter(|_| entry.generation == id.generation)
    }

    /// Takes a chain out, to be answered; `None` if its queue is gone.
    pub(crate) fn take(&mut self, mut token: Token<H>) -> Option<Open> {
        let id = token.id.take()?;
        let entry = self.entries.get_mut(usize::from(id.index))?;
        if entry.generation != id.generation {
            return None;
        }
        let open = entry.open.take()?;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(id.index);
        Some(open)
    }

    /// A vif's rings are gone: its chains need no answer.
    pub(crate) fn forget(&mut self, port: PortId) {
        for (index, entry) in (0..).zip(&mut self.entries) {
            if entry.open.as_ref().is_some_and(|open| open.origin.port == port) {
                entry.open = None;
                entry.generation = entry.generation.wrapping_add(1);
                self.free.push(index);
            }
        }
    }

    /// A place for the pages of one more packet, if there is one.
    pub(crate) fn lend(&mut self) -> Option<Box<Pages<H>>> {
        self.spare.pop()
    }

    /// Puts pages on loan.
    pub(crate) fn on_loan(&self, pages: Box<Pages<H>>) -> Loan<H> {
        Loan { pages: Some(pages), returns: Arc::clone(&self.returns) }
    }

    /// A place is free again.
    pub(crate) fn keep(&mut self, mut pages: Box<Pages<H>>) {
        pages.pages.clear();
        pages.token = None;
        self.spare.push(pages);
    }

    /// Whether something came back.
    pub(crate) fn has_returned(&self) -> bool {
        !self.returns.pages.is_empty() || !self.returns.tokens.is_empty()
    }

    /// The next thing that came back.
    pub(crate) fn returned(&self) -> Option<Returned<H>> {
        if let Some(pages) = self.returns.pages.pop() {
            return Some(Returned::Pages(pages));
        }
        let id = self.returns.tokens.pop()?;
        Some(Returned::Token(Token { id: Some(id), returns: Arc::clone(&self.returns) }))
    }
}

#[cfg(test)]
mod tests {
    use netif::slot::{TxFlags, TxId, TxRequest};
    use netif::tx::{Verdict, assemble};
    use sim::SimHv;

    use super::*;

    fn open(port: u16) -> Open {
        let request = TxRequest {
            gref: hypercall::GrantRef(9),
            offset: 0,
            flags: TxFlags::empty(),
            id: TxId(port),
            size: 60,
        };
        let Ok(Some(Verdict::Packet(chain))) = assemble(&mut [request].into_iter()) else {
            panic!("a packet")
        };
        Open { origin: Origin { port: PortId(port), queue: 0, life: 0 }, domain: DomId(9), chain }
    }

    #[test]
    fn a_token_that_is_dropped_comes_back_and_one_that_is_used_does_not() {
        let mut table = Table::<SimHv>::new(1);
        let (kept, dropped) = (table.insert(open(1)).unwrap(), table.insert(open(1)).unwrap());
        assert_eq!(table.open(), 2);
        drop(dropped);
        let Some(Returned::Token(back)) = table.returned() else { panic!("a token") };
        assert!(table.take(back).is_some());
        assert!(table.take(kept).is_some());
        assert!(table.returned().is_none());
        assert_eq!(table.open(), 0);
    }

    #[test]
    fn a_token_of_a_queue_that_is_gone_names_nothing_not_even_its_successor() {
        let mut table = Table::<SimHv>::new(1);
        let (old, other) = (table.insert(open(1)).unwrap(), table.insert(open(2)).unwrap());
        table.forget(PortId(1));
        let new = table.insert(open(1)).unwrap();
        assert!(table.get(&old).is_none());
        assert!(table.take(old).is_none());
        assert!(table.get(&new).is_some() && table.get(&other).is_some());
    }

    #[test]
    fn a_full_table_takes_no_chain() {
        let mut table = Table::<SimHv>::new(0);
        let tokens: Vec<_> = (0..MAX_OPEN).map(|_| table.insert(open(1)).unwrap()).collect();
        assert_eq!(table.room(), 0);
        assert!(table.insert(open(1)).is_none());
        drop(tokens);
        while let Some(Returned::Token(token)) = table.returned() {
            table.take(token);
        }
        assert_eq!(table.room(), usize::from(MAX_OPEN));
    }
}

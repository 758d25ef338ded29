//! Moving bytes through the page a domain shares with the store (`struct xenstore_domain_interface`, `io/xs_wire.h`).
//!
//! The peer can write every byte of the page at any time. Each index is read once per transfer and checked, and the
//! indices this end owns are kept privately: what the peer makes of them in the page is its own affair.

use core::marker::PhantomData;
use core::sync::atomic::Ordering;

use grant::SharedMemory;

use self::sealed::Queue;
use crate::client::{Client, ProtocolError};
use crate::wire::interface::{
    CONNECTED, CONNECTION, ERROR, RECONNECT, REQ, REQ_CONS, REQ_PROD, RING_SIZE, RSP, RSP_CONS,
    RSP_PROD, SERVER_FEATURES,
};

const REQUESTS: Queue = Queue { data: REQ, cons: REQ_CONS, prod: REQ_PROD };
const REPLIES: Queue = Queue { data: RSP, cons: RSP_CONS, prod: RSP_PROD };

mod sealed {
    /// Where a queue lies in the page.
    #[derive(Debug, Clone, Copy)]
    pub struct Queue {
        pub data: usize,
        pub cons: usize,
        pub prod: usize,
    }

    pub trait End {
        const OUT: Queue;
        const IN: Queue;
    }
}

/// The end of the store's client: any domain.
#[derive(Debug)]
pub enum ClientEnd {}

/// The end of the store's server.
#[derive(Debug)]
pub enum ServerEnd {}

impl sealed::End for ClientEnd {
    const OUT: Queue = REQUESTS;
    const IN: Queue = REPLIES;
}

impl sealed::End for ServerEnd {
    const OUT: Queue = REPLIES;
    const IN: Queue = REQUESTS;
}

/// The peer's index lies further from ours than a ring is long. No byte of this ring can be trusted any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("store ring indices {ahead:#x} and {behind:#x} are more than a ring apart")]
pub struct BadIndex {
    /// The producer's.
    pub ahead: u32,
    /// The consumer's.
    pub behind: u32,
}

/// Why [`StoreRing::exchange`] stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// The ring is broken.
    #[error(transparent)]
    Ring(#[from] BadIndex),
    /// The client found the bytes to be no store's.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}

/// What a transfer has moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use = "a peer that is not notified waits for ever"]
pub struct Moved {
    /// Bytes read from the ring.
    pub read: usize,
    /// Bytes written to the ring.
    pub written: usize,
}

impl Moved {
    /// Whether the event channel has to be notified: whenever anything moved, as `docs/misc/xenstore-ring.txt` demands.
    pub const fn notify(self) -> bool {
        self.read > 0 || self.written > 0
    }
}

/// One end of a store ring, over a page that is shared with the other.
#[derive(Debug)]
pub struct StoreRing<M, E> {
    page: M,
    /// Our producer index of the queue that goes out.
    prod: u32,
    /// Our consumer index of the queue that comes in.
    cons: u32,
    broken: bool,
    end: PhantomData<E>,
}

impl<M: SharedMemory, E: sealed::End> StoreRing<M, E> {
    /// Takes up a ring where its indices in the page are. They need not start at zero. A client's end whose ring is not
    /// connected ([`StoreRing::is_connected`]) waits, and attaches again: the indices mean nothing before that.
    pub fn attach(page: M) -> Self {
        let mut ring = Self { page, prod: 0, cons: 0, broken: false, end: PhantomData };
        ring.attach_again();
        ring
    }

    /// Takes the same ring up anew, once it [is connected](StoreRing::is_connected) after a reset.
    pub fn attach_again(&mut self) {
        self.prod = self.page.load_u32(E::OUT.prod, Ordering::Relaxed);
        self.cons = self.page.load_u32(E::IN.cons, Ordering::Relaxed);
        self.broken = false;
    }

    /// Reads what fits into `to`, from the front; 0 if there is nothing.
    ///
    /// # Errors
    /// The peer's index is impossible. Every later call fails too: attach anew after a reset.
    pub fn read(&mut self, to: &mut [u8]) -> Result<usize, BadIndex> {
        // Acquire: the bytes were written before the index was.
        let prod = self.page.load_u32(E::IN.prod, Ordering::Acquire);
        let available = self.check(prod, self.cons)?;
        let count = available.min(to.len());
        let to = to.get_mut(..count).unwrap_or_default();
        let (offset, until_end) = place(self.cons);
        let (first, second) = to.split_at_mut(until_end.min(count));
        self.page.read_bytes(E::IN.data + offset, first);
        self.page.read_bytes(E::IN.data, second);
        if count > 0 {
            self.cons = self.cons.wrapping_add(length(count));
            // Release: the bytes have been read before the peer may write over them.
            self.page.store_u32(E::IN.cons, self.cons, Ordering::Release);
            // A peer that notifies only when we had caught up looks at our index after writing its own, and we look at
            // its index next: one of us has to see the other's.
            self.page.fence();
        }
        Ok(count)
    }

    /// Writes what fits of `from`, from the front; 0 if the ring is full.
    ///
    /// # Errors
    /// As for [`StoreRing::read`].
    pub fn write(&mut self, from: &[u8]) -> Result<usize, BadIndex> {
        // Acquire: the bytes we write over were read before the index was written.
        let cons = self.page.load_u32(E::OUT.cons, Ordering::Acquire);
        let used = self.check(self.prod, cons)?;
        let count = (size() - used).min(from.len());
        let from = from.get(..count).unwrap_or_default();
        let (offset, until_end) = place(self.prod);
        let (first, second) = from.split_at(until_end.min(count));
        self.page.write_bytes(E::OUT.data + offset, first);
        self.page.write_bytes(E::OUT.data, second);
        if count > 0 {
            self.prod = self.prod.wrapping_add(length(count));
            // Release: the peer sees the bytes with the index.
            self.page.store_u32(E::OUT.prod, self.prod, Ordering::Release);
            self.page.fence();
        }
        Ok(count)
    }

    /// Whether the ring is in use: during a reconnect, which in a domain built without a toolstack lasts until a server
    /// comes, nothing but this means anything.
    pub fn is_connected(&self) -> bool {
        self.page.load_u32(CONNECTION, Ordering::Acquire) == CONNECTED
    }

    fn check(&mut self, ahead: u32, behind: u32) -> Result<usize, BadIndex> {
        let distance = ahead.wrapping_sub(behind);
        self.broken |= distance > RING_SIZE;
        if self.broken { Err(BadIndex { ahead, behind }) } else { Ok(distance as usize) }
    }
}

/// Rounds of [`StoreRing::exchange`], so that a server that never stops talking does not keep us for ever.
const ROUNDS_MAX: usize = 64;

impl<M: SharedMemory> StoreRing<M, ClientEnd> {
    /// Moves everything that can be moved between the ring and a client. Call it on every event of the ring, and after
    /// submitting to the client. If it moved 64 KiB there may be more to read: call it again.
    ///
    /// # Errors
    /// The ring or the client is dead. Both need a reset: see [`StoreRing::request_reset`] and [`Client::reconnect`].
    pub fn exchange(&mut self, client: &mut Client) -> Result<Moved, ExchangeError> {
        let mut moved = Moved::default();
        let mut buffer = [0; RING_SIZE as usize];
        for _ in 0..ROUNDS_MAX {
            let read = self.read(&mut buffer)?;
            client.receive(buffer.get(..read).unwrap_or_default())?;
            let written = self.write(client.pending_output())?;
            client.consume_output(written);
            moved.read += read;
            moved.written += written;
            if read == 0 && written == 0 {
                break;
            }
        }
        Ok(moved)
    }

    /// What the server offers: `FEATURE_*` bits of [`interface`](crate::wire::interface).
    pub fn server_features(&self) -> u32 {
        self.page.load_u32(SERVER_FEATURES, Ordering::Acquire)
    }

    /// What the server found wrong with this connection: `ERROR_*` of [`interface`](crate::wire::interface), if it
    /// offers to tell.
    pub fn server_error(&self) -> u32 {
        self.page.load_u32(ERROR, Ordering::Acquire)
    }

    /// Asks a server that offers it to reset the connection. Notify it, wait until [`StoreRing::is_connected`], then
    /// attach anew.
    pub fn request_reset(&mut self) {
        self.broken = true;
        self.page.store_u32(CONNECTION, RECONNECT, Ordering::Release);
    }
}

impl<M: SharedMemory> StoreRing<M, ServerEnd> {
    /// Offers features: `FEATURE_*` bits of [`interface`](crate::wire::interface). To be done before anything is read or
    /// written; they cannot be taken back.
    pub fn offer(&mut self, features: u32) {
        self.page.store_u32(SERVER_FEATURES, features, Ordering::Release);
    }

    /// Tells the client why this connection has ended: `ERROR_*` of [`interface`](crate::wire::interface). Notify it.
    pub fn report(&mut self, error: u32) {
        self.broken = true;
        self.page.store_u32(ERROR, error, Ordering::Release);
    }

    /// Empties both queues and connects: at first, and when the client has asked for it ([`StoreRing::is_connected`] is
    /// false). The caller has dropped the connection's watches, transactions and half messages. Notify the client.
    pub fn reset(&mut self) {
        for queue in [REQUESTS, REPLIES] {
            self.page.store_u32(queue.cons, 0, Ordering::Relaxed);
            self.page.store_u32(queue.prod, 0, Ordering::Relaxed);
        }
        self.page.store_u32(ERROR, 0, Ordering::Relaxed);
        (self.prod, self.cons, self.broken) = (0, 0, false);
        self.page.store_u32(CONNECTION, CONNECTED, Ordering::Release);
        self.page.fence();
    }
}

const fn size() -> usize {
    RING_SIZE as usize
}

/// Where the byte of this index lies in its ring, and how many bytes follow to the ring's end, itself included.
const fn place(index: u32) -> (usize, usize) {
    let offset = (index % RING_SIZE) as usize;
    (offset, size() - offset)
}

/// A count of bytes that is at most a ring's.
fn length(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(RING_SIZE)
}

#[cfg(test)]
mod tests;

//! What can go wrong, by whose doing it is.

use grant::GrantError;
use hypercall::Errno;
use netif::mac::MacAddr;
use netif::ring::{Full, RingFault};
use netif::rx::WrongId;
use netif::slot::TxId;

/// The backend broke the protocol: the interface is closed, and connects again after a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendFault {
    /// In the ring itself.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// A TX response that names no request in flight.
    #[error("response to TX request {}, which is not in flight", .0.0)]
    NotInFlight(TxId),
    /// More TX responses for extras than there were extras.
    #[error("response to an extra that was not sent")]
    NoExtra,
    /// An RX response that does not name its slot.
    #[error(transparent)]
    WrongId(#[from] WrongId),
    /// A response on the control ring to nothing that was asked.
    #[error("answer to control request {0}, which was not asked")]
    Control(u16),
    /// A request was pushed where there is no room: our own mistake.
    #[error("own accounting of slots is wrong: {0}")]
    Accounting(#[from] Full),
}

/// The interface cannot be connected now; it is tried again after a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The backend does not copy into our pages, and there is no other way.
    #[error("backend does not offer feature-rx-copy")]
    NoCopy,
    /// A value of the backend's that is not a decimal number of 32 bits.
    #[error("backend's key {0} has a bad value")]
    BadValue(&'static str),
    /// A page could not be granted.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// A port could not be had.
    #[error("no event channel: {0}")]
    Port(Errno),
    /// Backends have kept so many of our pages that they get no more.
    #[error("{0} pages are still held by backends")]
    Parked(usize),
}

/// A packet was not sent; nothing of it is on the ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// There is no connection.
    #[error("not connected")]
    NotConnected,
    /// There is no such queue.
    #[error("no such queue")]
    NoQueue,
    /// Less than an Ethernet header.
    #[error("shorter than an Ethernet header")]
    TooShort,
    /// More than the backend takes in one packet.
    #[error("longer than the backend takes")]
    TooLong,
    /// A blank checksum, or segmentation, that the backend does not do.
    #[error("the backend does not offer what the packet asks for")]
    NotOffered,
    /// No room: send again after responses have come.
    #[error("the ring is full")]
    Full,
    /// No page to put the bytes in.
    #[error(transparent)]
    Grant(#[from] GrantError),
}

/// A multicast address cannot be joined.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum JoinError {
    /// It is the address of a station.
    #[error("{0} is not a multicast address")]
    NotMulticast(MacAddr),
    /// As many are joined as a backend takes.
    #[error("too many multicast addresses")]
    TooMany,
}

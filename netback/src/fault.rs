//! Why a vif is closed from our side, or never connected.

use grant::{CopyError, CopyResults, MapError};
use hypercall::Errno;
use netif::ring::{Full, RingFault};
use netif::tx::PeerFault;

/// A vif cannot go on. It is closed; no other notices.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VifFault {
    /// The frontend broke the protocol.
    #[error("frontend broke the protocol: {0}")]
    Peer(#[from] PeerFault),
    /// Xen refuses to copy.
    #[error("grant copy refused: {0}")]
    CopyRefused(Errno),
    /// Xen does not unmap a page of the guest's.
    #[error("a page could not be unmapped")]
    Unmap,
    /// A response was pushed that nobody waits for: our own mistake.
    #[error("own accounting of responses is wrong: {0}")]
    Accounting(#[from] Full),
    /// A copy was built that cannot be: our own mistake.
    #[error("own accounting of copies is wrong: {0}")]
    Copy(#[from] CopyError),
}

impl From<RingFault> for VifFault {
    fn from(fault: RingFault) -> Self {
        Self::Peer(fault.into())
    }
}

/// Batches that Xen may refuse in a row before the vif is given up.
const REFUSALS_MAX: u32 = 8;

/// How often in a row Xen has refused a queue's batches of copies.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Refusals(u32);

impl Refusals {
    /// Takes note of how a batch went. `None`: Xen did not look at it, and none of its copies was done.
    ///
    /// # Errors
    /// That was once too often.
    pub(crate) fn judge<'b>(
        &mut self,
        outcome: Result<CopyResults<'b>, Errno>,
    ) -> Result<Option<CopyResults<'b>>, VifFault> {
        match outcome {
            Ok(results) => {
                self.0 = 0;
                Ok(Some(results))
            }
            Err(errno) => {
                self.0 += 1;
                if self.0 >= REFUSALS_MAX { Err(VifFault::CopyRefused(errno)) } else { Ok(None) }
            }
        }
    }
}

/// What the frontend asked for cannot be had. All or nothing: no ring or port stays bound.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A key that must be there is not.
    #[error("key {0} is missing")]
    Missing(&'static str),
    /// A value that is not a decimal number of 32 bits, or not in range.
    #[error("key {0} has a bad value")]
    BadValue(&'static str),
    /// A ring could not be mapped.
    #[error("cannot map {key}: {error}")]
    Map {
        /// Which.
        key: &'static str,
        /// Why.
        error: MapError,
    },
    /// A ring that was mapped holds nonsense.
    #[error("{key}: {fault}")]
    Ring {
        /// Which.
        key: &'static str,
        /// Why.
        fault: RingFault,
    },
    /// Xen neither copies nor maps for this domain: no packet could be carried.
    #[error("Xen can neither copy nor map")]
    NoDatapath,
    /// A port could not be bound.
    #[error("cannot bind {key}: {error}")]
    Bind {
        /// Which.
        key: &'static str,
        /// Why.
        error: Errno,
    },
}

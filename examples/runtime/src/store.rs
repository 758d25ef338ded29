//! Where the store is: the ring that this domain's toolstack set up for it.

use grant::SharedPage;
use hypercall::abi::hvm_param;
use hypercall::{DomId, Gfn, Port, Toolstack};

use crate::machine::Hv;
use crate::sleep::Sleep;
use crate::{arch, now};

/// A page of this domain's own that the toolstack set aside and that others reach without a grant. It stays for good.
pub type OwnPage = SharedPage;

/// The ring to the store.
#[derive(Debug)]
pub struct StoreRing {
    /// The page (`struct xenstore_domain_interface`, io/xs_wire.h).
    pub page: OwnPage,
    /// The port by which its other end is told. It is bound already.
    pub port: Port,
}

/// Nanoseconds between two looks for the store's ring.
const LOOK: u64 = 20_000_000;

/// The ring to the store, as soon as there is one: a domain that Xen itself built is running before its toolstack is.
/// After a suspend the port is another one.
#[must_use]
pub fn store_ring(hv: &Hv, sleep: &Sleep) -> StoreRing {
    loop {
        if let Some(ring) = find(hv) {
            return ring;
        }
        sleep.until(Some(now().after(LOOK)));
    }
}

fn find(hv: &Hv) -> Option<StoreRing> {
    let read = |index| hv.hvm_param(DomId::SELF, index).ok().filter(|value| *value != 0);
    let port = Port(read(hvm_param::STORE_EVTCHN)?.try_into().ok()?);
    let frame = read(hvm_param::STORE_PFN).map(Gfn).filter(|frame| *frame != Gfn::INVALID)?;
    // SAFETY: mapped for good, and page-aligned, by `show`; no reference to it is ever made.
    let page = unsafe { SharedPage::new(arch::show(frame)?) };
    Some(StoreRing { page, port })
}

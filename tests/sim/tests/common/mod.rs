//! What several tests do to a simulated machine.

#![allow(dead_code, clippy::unwrap_used)]

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use hypercall::abi::{
    CopyEnd, GNTCOPY_SOURCE_GREF, GNTMAP_HOST_MAP, GNTMAP_READONLY, GTF_PERMIT_ACCESS, GrantCopy,
    GrantEntryV1, GrantMap, GrantUnmap,
};
use hypercall::arch::shared_info;
use hypercall::{BusAddr, DomId, Gfn, GrantRef, GrantStatus, Hypervisor, MapHandle, Port, Window};
use sim::{Sim, SimHv};

/// XENFEAT_grant_map_identity.
pub const IDENTITY: u32 = 1 << 12;

pub fn pages(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

/// A frame of `granter`'s.
pub fn frame(granter: &SimHv) -> Gfn {
    granter.virt_to_gfn(granter.alloc_pages(pages(1)).unwrap())
}

/// Opens a frame of `granter`'s to `to`.
pub fn grant(sim: &Sim, granter: &SimHv, to: DomId, gref: u32, frame: Gfn) {
    granter.grant_table_frame(0).unwrap();
    let entry =
        GrantEntryV1 { flags: GTF_PERMIT_ACCESS, domid: to, frame: frame.0.try_into().unwrap() };
    assert!(sim.set_grant_entry(granter.id(), GrantRef(gref), entry));
}

/// A page of `granter`'s, open to `to` under reference `gref`.
pub fn granted(sim: &Sim, granter: &SimHv, to: DomId, gref: u32) -> Gfn {
    let frame = frame(granter);
    grant(sim, granter, to, gref, frame);
    frame
}

pub fn map_op(of: DomId, gref: u32, window: &Window, flags: u32) -> GrantMap {
    GrantMap {
        host_addr: window.gfn().address(),
        flags: GNTMAP_HOST_MAP | flags,
        gref: GrantRef(gref),
        dom: of,
        status: GrantStatus::UNTOUCHED,
        handle: MapHandle::INVALID,
        dev_bus_addr: 0,
    }
}

fn do_map(hv: &SimHv, mut op: GrantMap) -> GrantMap {
    // SAFETY: the tests look at mapped pages through the simulator, and at windows only while something is there.
    unsafe { hv.grant_map(std::slice::from_mut(&mut op)).unwrap() };
    op
}

pub fn map(hv: &SimHv, of: DomId, gref: u32, window: &Window) -> GrantMap {
    do_map(hv, map_op(of, gref, window, 0))
}

pub fn map_to_read(hv: &SimHv, of: DomId, gref: u32, window: &Window) -> GrantMap {
    do_map(hv, map_op(of, gref, window, GNTMAP_READONLY))
}

pub fn unmap(hv: &SimHv, op: &GrantMap) -> GrantStatus {
    let mut op = GrantUnmap {
        host_addr: op.host_addr,
        dev_bus_addr: 0,
        handle: op.handle,
        status: GrantStatus::UNTOUCHED,
    };
    // SAFETY: as above.
    unsafe { hv.grant_unmap(std::slice::from_mut(&mut op)).unwrap() };
    op.status
}

/// Copies 8 bytes from a reference to a frame of the domain's own.
pub fn copy_in(hv: &SimHv, of: DomId, gref: u32, to: Gfn) -> GrantStatus {
    let mut op = GrantCopy {
        source: CopyEnd::granted(of, GrantRef(gref), 0),
        dest: CopyEnd::own(to, 0),
        len: 8,
        flags: GNTCOPY_SOURCE_GREF,
        status: GrantStatus::UNTOUCHED,
    };
    // SAFETY: nobody has references to these pages.
    unsafe { hv.grant_copy(std::slice::from_mut(&mut op)).unwrap() };
    op.status
}

/// Where the bus has a domain's frame.
pub fn bus(sim: &Sim, hv: &SimHv, frame: Gfn) -> BusAddr {
    sim.p2m(hv.id(), frame).unwrap().bus
}

fn shared_word(hv: &SimHv, offset: usize) -> &AtomicU64 {
    // SAFETY: within the page, aligned, and only accessed by atomics.
    unsafe { hv.shared_info().add(offset).cast().as_ref() }
}

/// Takes the upcall of the first virtual CPU, as a kernel without masks does; answers the ports that were raised.
pub fn take_upcall(hv: &SimHv) -> Vec<Port> {
    let flag = hv.shared_info();
    // SAFETY: within the page, and only accessed by atomics.
    let flag: &AtomicU8 = unsafe { flag.add(shared_info::UPCALL_PENDING).cast().as_ref() };
    let mut raised = Vec::new();
    while flag.swap(0, Ordering::SeqCst) != 0 {
        let selected = shared_word(hv, shared_info::PENDING_SEL).swap(0, Ordering::SeqCst);
        for word in (0..64).filter(|word| selected & (1 << word) != 0) {
            let offset = shared_info::PENDING + word as usize * 8;
            let bits = shared_word(hv, offset).swap(0, Ordering::SeqCst);
            let set = (0..64).filter(|bit| bits & (1 << bit) != 0);
            raised.extend(set.map(|bit| Port(word * 64 + bit)));
        }
    }
    raised
}

//! What several tests do to a simulated machine.

#![allow(dead_code, clippy::unwrap_used)]

use std::num::NonZeroUsize;

use hypercall::abi::{
    CopyEnd, GNTCOPY_SOURCE_GREF, GNTMAP_HOST_MAP, GNTMAP_READONLY, GTF_PERMIT_ACCESS, GrantCopy,
    GrantEntryV1, GrantMap, GrantUnmap,
};
use hypercall::{BusAddr, DomId, Gfn, GrantRef, GrantStatus, Hypervisor, MapHandle, Window};
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

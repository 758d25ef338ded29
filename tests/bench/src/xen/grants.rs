//! Grant operations, with the checks of Xen's common/grant_table.c.

use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use hypercall::abi::{
    CopyEnd, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GNTMAP_HOST_MAP, GNTMAP_READONLY,
    GTF_PERMIT_ACCESS, GTF_READING, GTF_READONLY, GTF_WRITING, GrantCopy, GrantMap, GrantUnmap,
};
use hypercall::{DomId, Gfn, GrantRef, GrantStatus, MapHandle, PAGE_SIZE};

use super::Hv;
use super::domain::{Domain, lock};

/// `GTF_type_mask`
const GTF_TYPE_MASK: u16 = 3;
/// How often Xen tries to mark an entry that its owner keeps changing.
const TRIES: usize = 5;

/// A mapping that a domain has.
#[derive(Clone, Copy)]
struct Tracked {
    of: DomId,
    gref: GrantRef,
    at: Gfn,
    read_only: bool,
}

/// A domain's mappings, by handle.
#[derive(Default)]
pub struct Mappings {
    tracked: Vec<Option<Tracked>>,
    free: Vec<usize>,
}

/// A page in use: what to clear in its entry afterwards.
struct Pin<'d> {
    owner: &'d Domain,
    gref: GrantRef,
    /// Flags that this use set, which nobody else needs.
    set: u16,
    page: NonNull<u8>,
}

impl Pin<'_> {
    #[inline]
    fn release(self) {
        if self.set != 0
            && let Some(head) = self.owner.entry(self.gref.0 as usize, 0)
        {
            head.fetch_and(!u32::from(self.set), Ordering::Release);
        }
    }
}

/// Marks an entry as in use (`_set_status_v1`), and finds its page.
#[inline]
fn pin(owner: &Domain, gref: GrantRef, by: DomId, read_only: bool) -> Result<Pin<'_>, GrantStatus> {
    let index = gref.0 as usize;
    let head = owner.entry(index, 0).ok_or(GrantStatus::BAD_GNTREF)?;
    let frame = owner.entry(index, 1).ok_or(GrantStatus::BAD_GNTREF)?;
    let wanted = GTF_READING | if read_only { 0 } else { GTF_WRITING };
    let mut seen = head.load(Ordering::Acquire);
    for _ in 0..TRIES {
        let (flags, domid) = (seen as u16, DomId((seen >> 16) as u16));
        if flags & GTF_TYPE_MASK != GTF_PERMIT_ACCESS || domid != by {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        if !read_only && flags & GTF_READONLY != 0 {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        // One that is in use as it is wanted stays so.
        let set = wanted & !flags;
        if set != 0 {
            let new = seen | u32::from(set);
            let done = head.compare_exchange(seen, new, Ordering::Acquire, Ordering::Acquire);
            if let Err(now) = done {
                seen = now;
                continue;
            }
        }
        let page = owner.frame(Gfn(frame.load(Ordering::Relaxed).into()));
        let pin = Pin { owner, gref, set, page: page.unwrap_or(NonNull::dangling()) };
        if page.is_none() {
            pin.release();
            return Err(GrantStatus::BAD_PAGE);
        }
        return Ok(pin);
    }
    Err(GrantStatus::GENERAL_ERROR)
}

impl Hv {
    /// One end of a copy: the page, and what to release.
    #[inline]
    fn claim<'d>(
        &'d self,
        own: &'d Domain,
        end: &CopyEnd,
        granted: bool,
        read_only: bool,
    ) -> Result<(NonNull<u8>, Option<Pin<'d>>), GrantStatus> {
        if granted {
            let owner = self.domain(end.domid).map_err(|_| GrantStatus::BAD_DOMAIN)?;
            // The structure holds a 32-bit reference in a union with a 64-bit frame.
            let pin = pin(owner, GrantRef(end.u as u32), own.id, read_only)?;
            return Ok((pin.page, Some(pin)));
        }
        if end.domid != DomId::SELF {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        Ok((own.frame(Gfn(end.u)).ok_or(GrantStatus::BAD_PAGE)?, None))
    }

    /// One operation of `GNTTABOP_copy`.
    #[inline]
    pub(super) fn copy(&self, own: &Domain, op: &GrantCopy) -> Result<(), GrantStatus> {
        let (from, from_pin) =
            self.claim(own, &op.source, op.flags & GNTCOPY_SOURCE_GREF != 0, true)?;
        let claimed = self.claim(own, &op.dest, op.flags & GNTCOPY_DEST_GREF != 0, false);
        let done = claimed.and_then(|(to, to_pin)| {
            let (len, at, to_at) =
                (usize::from(op.len), usize::from(op.source.offset), usize::from(op.dest.offset));
            let fits = at + len <= PAGE_SIZE && to_at + len <= PAGE_SIZE;
            if fits {
                // SAFETY: both pages live as long as the machine, the bytes lie within them, and they are not the same: a
                // page of one domain's and one of another's, or the check of the flags has failed. The ends of the rings in
                // this program leave a page alone that is with the other, so nobody else is at these bytes.
                unsafe { from.add(at).copy_to(to.add(to_at), len) };
            }
            if let Some(pin) = to_pin {
                pin.release();
            }
            if fits { Ok(()) } else { Err(GrantStatus::BAD_COPY_ARG) }
        });
        if let Some(pin) = from_pin {
            pin.release();
        }
        done
    }

    pub(super) fn map(&self, own: &Domain, ops: &mut [GrantMap]) {
        let mut mappings = lock(&own.mappings);
        for op in ops {
            op.status = match self.map_one(own, op) {
                Ok(tracked) => {
                    let index = mappings.free.pop().unwrap_or(mappings.tracked.len());
                    match mappings.tracked.get_mut(index) {
                        Some(slot) => *slot = Some(tracked),
                        None => mappings.tracked.push(Some(tracked)),
                    }
                    op.handle = MapHandle(index as u32);
                    GrantStatus::OKAY
                }
                Err(status) => status,
            };
        }
    }

    fn map_one(&self, own: &Domain, op: &mut GrantMap) -> Result<Tracked, GrantStatus> {
        if op.flags & !GNTMAP_READONLY != GNTMAP_HOST_MAP {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        let owner = self.domain(op.dom).map_err(|_| GrantStatus::BAD_DOMAIN)?;
        let read_only = op.flags & GNTMAP_READONLY != 0;
        let pin = pin(owner, op.gref, own.id, read_only)?;
        let at = Gfn::of_address(op.host_addr);
        if !own.show(at, Some(pin.page)) {
            pin.release();
            return Err(GrantStatus::GENERAL_ERROR);
        }
        op.dev_bus_addr = pin.page.addr().get() as u64;
        if let Some(users) = owner.users.get(op.gref.0 as usize) {
            let [readers, writers] = users;
            let users = if read_only { readers } else { writers };
            users.store(users.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        Ok(Tracked { of: op.dom, gref: op.gref, at, read_only })
    }

    pub(super) fn unmap(&self, own: &Domain, ops: &mut [GrantUnmap]) {
        let mut mappings = lock(&own.mappings);
        for op in ops {
            let index = op.handle.0 as usize;
            let slot = mappings.tracked.get_mut(index);
            let at = Gfn::of_address(op.host_addr);
            let tracked = slot.and_then(|slot| slot.take_if(|tracked| tracked.at == at));
            let Some(tracked) = tracked else {
                op.status = GrantStatus::BAD_HANDLE;
                continue;
            };
            mappings.free.push(index);
            own.show(tracked.at, None);
            self.unpin(tracked);
            op.status = GrantStatus::OKAY;
        }
    }

    /// Clears what no mapping needs any more (`reduce_status_for_pin`).
    fn unpin(&self, tracked: Tracked) {
        let Ok(owner) = self.domain(tracked.of) else { return };
        let index = tracked.gref.0 as usize;
        let (Some([readers, writers]), Some(head)) =
            (owner.users.get(index), owner.entry(index, 0))
        else {
            return;
        };
        let users = if tracked.read_only { readers } else { writers };
        users.store(users.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
        let (readers, writers) = (readers.load(Ordering::Relaxed), writers.load(Ordering::Relaxed));
        let mut clear = 0;
        if writers == 0 {
            clear |= GTF_WRITING;
            if readers == 0 {
                clear |= GTF_READING;
            }
        }
        head.fetch_and(!u32::from(clear), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::super::machine;
    use super::*;
    use grant::GrantTable;
    use hypercall::Hypervisor;
    use std::num::NonZeroUsize;

    fn copy_from(of: DomId, gref: GrantRef, to: Gfn, len: u16) -> GrantCopy {
        GrantCopy {
            source: CopyEnd::granted(of, gref, 0),
            dest: CopyEnd::own(to, 0),
            len,
            flags: GNTCOPY_SOURCE_GREF,
            status: GrantStatus::UNTOUCHED,
        }
    }

    #[test]
    fn what_is_not_granted_is_not_copied() {
        let [dom0, guest, other] = machine([64, 64, 64]);
        let table = GrantTable::new(&guest).unwrap();
        let page = table.share(dom0.id(), true).unwrap();
        let to = |hv: &Hv| hv.virt_to_gfn(hv.alloc_pages(NonZeroUsize::MIN).unwrap());
        let status = |hv: &Hv, op: GrantCopy| {
            let mut ops = [op];
            // SAFETY: nobody has references to these pages.
            unsafe { hv.grant_copy(&mut ops).unwrap() };
            ops[0].status
        };
        let id = guest.id();
        let good = copy_from(id, page.gref(), to(&dom0), 64);
        assert_eq!(status(&dom0, good), GrantStatus::OKAY);
        let theirs = copy_from(id, page.gref(), to(&other), 64);
        assert_eq!(status(&other, theirs), GrantStatus::GENERAL_ERROR, "granted to dom0 alone");
        let unknown = copy_from(id, GrantRef(page.gref().0 + 1), to(&dom0), 64);
        assert_eq!(status(&dom0, unknown), GrantStatus::GENERAL_ERROR);
        let beyond = copy_from(id, GrantRef(1 << 20), to(&dom0), 64);
        assert_eq!(status(&dom0, beyond), GrantStatus::BAD_GNTREF);
        let long = copy_from(id, page.gref(), to(&dom0), 4097);
        assert_eq!(status(&dom0, long), GrantStatus::BAD_COPY_ARG);
        let writes =
            GrantCopy { source: good.dest, dest: good.source, flags: GNTCOPY_DEST_GREF, ..good };
        assert_eq!(status(&dom0, writes), GrantStatus::GENERAL_ERROR, "for reading only");
        // Nothing of all that is still in use.
        let gref = page.gref();
        drop(page);
        assert_eq!(table.parked(), 0);
        assert_eq!(status(&dom0, copy_from(id, gref, to(&dom0), 64)), GrantStatus::GENERAL_ERROR);
    }

    #[test]
    fn a_page_stays_in_use_until_it_is_unmapped() {
        let [dom0, guest] = machine([64, 64]);
        let table = GrantTable::new(&guest).unwrap();
        let page = table.share(dom0.id(), false).unwrap();
        let mapper = grant::Mapper::new(&dom0);
        let request = grant::MapRequest { domain: guest.id(), gref: page.gref(), read_only: false };
        let mapping = mapper.map(request).unwrap();
        let mut ops = [copy_from(
            guest.id(),
            page.gref(),
            dom0.virt_to_gfn(dom0.alloc_pages(NonZeroUsize::MIN).unwrap()),
            64,
        )];
        // SAFETY: nobody has references to these pages.
        unsafe { dom0.grant_copy(&mut ops).unwrap() };
        assert_eq!(ops[0].status, GrantStatus::OKAY);
        drop(page);
        assert_eq!(table.parked(), 1, "it is still mapped");
        drop(mapping);
        table.retry_parked(1);
        assert_eq!(table.parked(), 0);
    }
}

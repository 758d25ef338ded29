//! Grant tables: Xen's side, version 1, with the statuses of Xen 4.17's common/grant_table.c.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;

use hypercall::abi::{
    CopyEnd, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GNTMAP_HOST_MAP, GNTMAP_READONLY,
    GTF_PERMIT_ACCESS, GTF_READING, GTF_READONLY, GTF_WRITING, GrantCopy, GrantEntryV1, GrantMap,
    GrantUnmap,
};
use hypercall::{DomId, Errno, Gfn, GrantRef, GrantStatus, GrantTableSize, MapHandle, PAGE_SIZE};

use crate::State;
use crate::faults::Kind;
use crate::machine::{Machine, Mfn};
use crate::memory::{Shown, ShownBy, Users};
use crate::page::Page;

/// `GTF_type_mask`, and `GTF_sub_page`, with which a page can be copied but not mapped.
const GTF_TYPE_MASK: u16 = 3;
const GTF_SUB_PAGE: u16 = 1 << 8;
/// `GNTMAP_device_map`, `GNTMAP_application_map` and `GNTMAP_contains_pte`: not for domains with translated memory.
const GNTMAP_DEVICE_MAP: u32 = 1;
const GNTMAP_UNTRANSLATED: u32 = GNTMAP_DEVICE_MAP | 1 << 3 | 1 << 4;
/// The bit of `XENFEAT_grant_map_identity`, which only Xen 4.5.0-rc1 sets.
const XENFEAT_GRANT_MAP_IDENTITY: u32 = 1 << 12;
/// How many users of one kind an entry may have: Xen counts in 8 bits and stops before they overflow.
const MAX_PINS: u32 = 128;
/// How often Xen tries to mark an entry that its owner keeps changing.
const TRIES: usize = 5;
const ENTRY: usize = size_of::<GrantEntryV1>();
const PER_FRAME: u32 = (PAGE_SIZE / ENTRY) as u32;

/// What Xen remembers of an entry that is in use (`struct active_grant_entry`).
#[derive(Clone, Copy, Debug, Default)]
struct Active {
    readers: u32,
    writers: u32,
    by: DomId,
    mfn: Option<Mfn>,
    /// For whom and which frame it was when somebody looked last, if it was open, and how often that had changed.
    seen: Option<(DomId, u32)>,
    generation: u64,
}

/// A copy or mapping by a reference, done or tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantUse {
    /// Whose doing.
    pub by: DomId,
    /// By which reference.
    pub gref: GrantRef,
    /// [`Copy`](Kind::Copy) or [`Map`](Kind::Map).
    pub kind: Kind,
    /// Only for reading.
    pub read_only: bool,
    /// What Xen said of the reference.
    pub status: GrantStatus,
    /// The [generation](crate::Sim::grant_generation) of the entry.
    pub generation: u64,
}

impl Active {
    fn pins(&self) -> u32 {
        self.readers + self.writers
    }

    fn pin(&mut self, read_only: bool) -> &mut u32 {
        if read_only { &mut self.readers } else { &mut self.writers }
    }
}

/// A mapping that a domain has (`struct grant_mapping`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tracked {
    pub(crate) of: DomId,
    pub(crate) gref: GrantRef,
    pub(crate) at: Gfn,
    pub(crate) read_only: bool,
    mfn: Mfn,
    /// The life of the other domain that this was mapped in.
    life: u32,
    /// It entered an alias, whatever the feature bits say by now.
    aliased: bool,
}

/// A domain's grant table and its table of mappings.
#[derive(Debug)]
pub(crate) struct Grants {
    frames: Vec<Page>,
    /// Frames of former lives, the first last: the domain sees them where it saw them then.
    former: Vec<Page>,
    pub(crate) max_frames: u32,
    active: Vec<Active>,
    /// Handles that were ever used; those that are free again go first in, first out, as in Xen.
    maptrack: Vec<Option<Tracked>>,
    free_handles: VecDeque<u32>,
    handles: usize,
    max_mappings: usize,
    /// How many mappings there are of each page.
    mapped: HashMap<Mfn, Users>,
    /// Uses of its references, if somebody wants to know.
    watched: Option<Vec<GrantUse>>,
    /// Uses of its references that were refused.
    pub(crate) refused: u64,
}

impl Grants {
    pub(crate) fn new(max_frames: u32, maptrack: u32) -> Self {
        Self {
            frames: Vec::new(),
            former: Vec::new(),
            max_frames,
            active: Vec::new(),
            maptrack: Vec::new(),
            free_handles: VecDeque::new(),
            handles: maptrack as usize,
            max_mappings: maptrack as usize,
            mapped: HashMap::new(),
            watched: None,
            refused: 0,
        }
    }

    /// Grows the table until it has a frame `index`.
    pub(crate) fn frame(
        &mut self,
        machine: &mut Machine,
        id: DomId,
        index: u32,
    ) -> Result<Page, Errno> {
        if index >= self.max_frames {
            return Err(Errno::INVAL);
        }
        while self.frames.len() <= index as usize {
            let page = match self.former.pop() {
                Some(page) => page,
                None => machine.allocate(id, NonZeroUsize::MIN).ok_or(Errno::NOMEM)?.1,
            };
            self.frames.push(page);
            self.active.resize(self.frames.len() * PER_FRAME as usize, Active::default());
        }
        self.frames.get(index as usize).copied().ok_or(Errno::INVAL)
    }

    /// A new life: nothing is granted, nothing mapped, and every number is free again.
    pub(crate) fn reset(&mut self) {
        while let Some(page) = self.frames.pop() {
            page.fill(0);
            self.former.push(page);
        }
        self.active.clear();
        self.maptrack.clear();
        self.free_handles.clear();
        self.mapped.clear();
    }

    pub(crate) fn size(&self) -> GrantTableSize {
        // `INITIAL_NR_GRANT_FRAMES`: a domain is created with one.
        let frames = (self.frames.len() as u32).max(1);
        GrantTableSize { frames, max_frames: self.max_frames }
    }

    fn place(&self, gref: GrantRef) -> Option<(Page, usize)> {
        let frame = self.frames.get((gref.0 / PER_FRAME) as usize)?;
        Some((*frame, (gref.0 % PER_FRAME) as usize * ENTRY))
    }

    /// An entry as it is now.
    pub(crate) fn entry(&self, gref: GrantRef) -> Option<GrantEntryV1> {
        let (frame, at) = self.place(gref)?;
        let head = frame.word(at).load(Ordering::Acquire);
        Some(GrantEntryV1 {
            flags: head as u16,
            domid: DomId((head >> 16) as u16),
            frame: frame.word(at + 4).load(Ordering::Relaxed),
        })
    }

    /// Writes an entry as its domain could.
    pub(crate) fn set_entry(&self, gref: GrantRef, entry: GrantEntryV1) -> bool {
        let Some((frame, at)) = self.place(gref) else { return false };
        frame.word(at + 4).store(entry.frame, Ordering::Relaxed);
        let head = u32::from(entry.flags) | u32::from(entry.domid.0) << 16;
        frame.word(at).store(head, Ordering::Release);
        true
    }

    /// Entries that are open.
    pub(crate) fn open(&self) -> impl Iterator<Item = (GrantRef, GrantEntryV1)> {
        (0..self.frames.len() as u32 * PER_FRAME)
            .filter_map(|gref| self.entry(GrantRef(gref)).map(|entry| (GrantRef(gref), entry)))
            .filter(|(_, entry)| entry.flags & GTF_TYPE_MASK == GTF_PERMIT_ACCESS)
    }

    /// Sees whether an entry means something else than when somebody looked last; answers its generation.
    pub(crate) fn look(&mut self, gref: GrantRef) -> u64 {
        let entry = self.entry(gref);
        let open = entry.filter(|entry| entry.flags & GTF_TYPE_MASK == GTF_PERMIT_ACCESS);
        let seen = open.map(|entry| (entry.domid, entry.frame));
        let Some(active) = self.active.get_mut(gref.0 as usize) else { return 0 };
        if active.seen != seen {
            active.seen = seen;
            active.generation += 1;
        }
        active.generation
    }

    fn generation(&self, gref: GrantRef) -> u64 {
        self.active.get(gref.0 as usize).map_or(0, |active| active.generation)
    }

    pub(crate) fn watch(&mut self) {
        self.watched.get_or_insert_default();
    }

    pub(crate) fn uses(&mut self) -> Vec<GrantUse> {
        self.watched.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Notes a use of a reference.
    fn used(&mut self, made: GrantUse) {
        if matches!(made.status, GrantStatus::GENERAL_ERROR | GrantStatus::BAD_GNTREF) {
            self.refused += 1;
        }
        if let Some(watched) = &mut self.watched {
            watched.push(made);
        }
    }

    /// How many mappings and copies use an entry now, as Xen counts them.
    pub(crate) fn pins(&self, gref: GrantRef) -> u32 {
        self.active.get(gref.0 as usize).map_or(0, Active::pins)
    }

    /// Allows fewer mappings than the table has room for, or all of them again.
    pub(crate) fn limit_maptrack(&mut self, limit: u32) {
        self.max_mappings = limit as usize;
    }

    /// A number for a new mapping, if there may be one more.
    fn take_handle(&mut self) -> Option<u32> {
        let live = self.maptrack.len() - self.free_handles.len();
        if live >= self.max_mappings {
            return None;
        }
        if self.maptrack.len() < self.handles {
            self.maptrack.push(None);
            return Some(self.maptrack.len() as u32 - 1);
        }
        self.free_handles.pop_front()
    }

    fn forget(&mut self, mfn: Mfn, read_only: bool) {
        if self.mapped.get_mut(&mfn).is_some_and(|users| users.remove(read_only)) {
            self.mapped.remove(&mfn);
        }
    }

    /// How the domain has a page mapped, if it has (`grant_map_exists`).
    pub(crate) fn mapped(&self, mfn: Mfn) -> Option<Users> {
        self.mapped.get(&mfn).copied()
    }

    /// Mappings that the domain has.
    pub(crate) fn mappings(&self) -> impl Iterator<Item = (MapHandle, Tracked)> {
        let slots = self.maptrack.iter().enumerate();
        slots.filter_map(|(index, slot)| slot.map(|tracked| (MapHandle(index as u32), tracked)))
    }

    /// Marks an entry as in use (`_set_status_v1`).
    fn set_status(
        &self,
        gref: GrantRef,
        by: DomId,
        pinned: bool,
        read_only: bool,
        map: bool,
    ) -> GrantStatus {
        let Some((frame, at)) = self.place(gref) else { return GrantStatus::BAD_GNTREF };
        let mask = GTF_TYPE_MASK | if map { GTF_SUB_PAGE } else { 0 };
        let wanted = GTF_READING | if read_only { 0 } else { GTF_WRITING };
        let head = frame.word(at);
        let mut seen = head.load(Ordering::Acquire);
        for _ in 0..TRIES {
            let (flags, domid) = (seen as u16, DomId((seen >> 16) as u16));
            if !pinned && (flags & mask != GTF_PERMIT_ACCESS || domid != by) {
                return GrantStatus::GENERAL_ERROR;
            }
            if !read_only && flags & GTF_READONLY != 0 {
                return GrantStatus::GENERAL_ERROR;
            }
            let new = seen | u32::from(wanted);
            match head.compare_exchange(seen, new, Ordering::SeqCst, Ordering::Acquire) {
                Ok(_) => return GrantStatus::OKAY,
                Err(now) => seen = now,
            }
        }
        GrantStatus::GENERAL_ERROR
    }

    /// Clears what no user needs any more (`reduce_status_for_pin`).
    fn reduce_status(&self, gref: GrantRef, read_only: bool) {
        let Some(active) = self.active.get(gref.0 as usize) else { return };
        let mut clear = if active.pins() == 0 { GTF_READING } else { 0 };
        if !read_only && active.writers == 0 {
            clear |= GTF_WRITING;
        }
        if let Some((frame, at)) = self.place(gref) {
            frame.half(at).fetch_and(!clear, Ordering::SeqCst);
        }
    }

    /// Ends one use of an entry.
    fn unpin(&mut self, gref: GrantRef, read_only: bool) {
        if let Some(active) = self.active.get_mut(gref.0 as usize) {
            let pin = active.pin(read_only);
            *pin = pin.saturating_sub(1);
        }
        self.reduce_status(gref, read_only);
    }
}

/// Copies from page to page, a piece at a time.
fn copy_bytes(from: Page, at: usize, to: Page, to_at: usize, len: usize) {
    let mut buffer = [0; 256];
    for done in (0..len).step_by(buffer.len()) {
        let piece = buffer.len().min(len - done);
        if let Some(piece) = buffer.get_mut(..piece) {
            from.read(at + done, piece);
            to.write(to_at + done, piece);
        }
    }
}

impl State {
    /// Begins a use of an entry; answers the frame. `map` or copy: the checks differ in little.
    fn pin(
        &mut self,
        of: DomId,
        gref: GrantRef,
        by: DomId,
        read_only: bool,
        map: bool,
    ) -> Result<Mfn, GrantStatus> {
        let pinned = self.try_pin(of, gref, by, read_only, map);
        if let Some(domain) = self.domains.get_mut(&of) {
            let kind = if map { Kind::Map } else { Kind::Copy };
            let status = pinned.err().unwrap_or(GrantStatus::OKAY);
            let generation = domain.grants.generation(gref);
            domain.grants.used(GrantUse { by, gref, kind, read_only, status, generation });
        }
        pinned
    }

    fn try_pin(
        &mut self,
        of: DomId,
        gref: GrantRef,
        by: DomId,
        read_only: bool,
        map: bool,
    ) -> Result<Mfn, GrantStatus> {
        let domain = self.domains.get_mut(&of).ok_or(GrantStatus::BAD_DOMAIN)?;
        let dying = domain.dying;
        let grants = &mut domain.grants;
        let index = gref.0 as usize;
        let active = grants.active.get(index).copied().ok_or(GrantStatus::BAD_GNTREF)?;
        let pinned = active.pins() != 0;
        let count = if read_only { active.readers } else { active.writers };
        if pinned && (active.by != by || count >= MAX_PINS) {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        let mut mfn = active.mfn;
        if !pinned {
            grants.look(gref);
        }
        if !pinned || !read_only && active.writers == 0 {
            let status = grants.set_status(gref, by, pinned, read_only, map);
            if !status.is_ok() {
                return Err(status);
            }
        } else if dying && !map {
            return Err(GrantStatus::BAD_DOMAIN);
        }
        if !pinned {
            let frame = grants.entry(gref).map_or(Gfn::INVALID, |entry| Gfn(entry.frame.into()));
            mfn = domain.memory.translate(frame);
        }
        let (Some(mfn), Some(active)) = (mfn, grants.active.get_mut(index)) else {
            grants.reduce_status(gref, read_only);
            return Err(GrantStatus::BAD_PAGE);
        };
        active.by = by;
        active.mfn = Some(mfn);
        *active.pin(read_only) += 1;
        Ok(mfn)
    }

    fn unpin(&mut self, of: DomId, gref: GrantRef, read_only: bool) {
        if let Some(domain) = self.domains.get_mut(&of) {
            domain.grants.unpin(gref, read_only);
        }
    }

    /// One end of a copy: the page, and what to unpin afterwards.
    fn claim(
        &mut self,
        me: DomId,
        end: &CopyEnd,
        granted: bool,
        read_only: bool,
    ) -> Result<(Page, Option<(DomId, GrantRef)>), GrantStatus> {
        let of = if end.domid == DomId::SELF { me } else { end.domid };
        if granted {
            // The structure holds a 32-bit reference in a union with a 64-bit frame.
            let gref = GrantRef(end.u as u32);
            let mfn = self.pin(of, gref, me, read_only, false)?;
            let page = self.machine.page(mfn).ok_or(GrantStatus::BAD_PAGE)?;
            return Ok((page, Some((of, gref))));
        }
        let memory = &self.domains.get(&me).ok_or(GrantStatus::BAD_DOMAIN)?.memory;
        let mfn = memory.translate(Gfn(end.u)).ok_or(GrantStatus::BAD_PAGE)?;
        Ok((self.machine.page(mfn).ok_or(GrantStatus::BAD_PAGE)?, None))
    }

    /// Only `DOMID_SELF` may name a page by frame, and the domain must exist.
    fn check_end(&self, end: &CopyEnd, granted: bool) -> Result<(), GrantStatus> {
        if end.domid == DomId::SELF {
            Ok(())
        } else if !granted {
            Err(GrantStatus::PERMISSION_DENIED)
        } else if self.domains.contains_key(&end.domid) {
            Ok(())
        } else {
            Err(GrantStatus::BAD_DOMAIN)
        }
    }

    /// One operation of `GNTTABOP_copy`.
    pub(crate) fn copy(&mut self, me: DomId, op: &GrantCopy) -> GrantStatus {
        match self.try_copy(me, op) {
            Ok(()) => GrantStatus::OKAY,
            Err(status) => status,
        }
    }

    fn try_copy(&mut self, me: DomId, op: &GrantCopy) -> Result<(), GrantStatus> {
        let from_granted = op.flags & GNTCOPY_SOURCE_GREF != 0;
        let to_granted = op.flags & GNTCOPY_DEST_GREF != 0;
        self.check_end(&op.source, from_granted)?;
        self.check_end(&op.dest, to_granted)?;
        let (from, from_pin) = self.claim(me, &op.source, from_granted, true)?;
        let claimed = self.claim(me, &op.dest, to_granted, false);
        let done = claimed.and_then(|(to, to_pin)| {
            let (len, at, to_at) =
                (usize::from(op.len), usize::from(op.source.offset), usize::from(op.dest.offset));
            let fits = at + len <= PAGE_SIZE && to_at + len <= PAGE_SIZE;
            if fits {
                copy_bytes(from, at, to, to_at, len);
            }
            if let Some((of, gref)) = to_pin {
                self.unpin(of, gref, false);
            }
            if fits { Ok(()) } else { Err(GrantStatus::BAD_COPY_ARG) }
        });
        if let Some((of, gref)) = from_pin {
            self.unpin(of, gref, true);
        }
        done
    }

    /// One operation of `GNTTABOP_map_grant_ref`; its out fields are written as Xen writes them.
    pub(crate) fn map(&mut self, me: DomId, op: &mut GrantMap) -> GrantStatus {
        if op.flags & (GNTMAP_HOST_MAP | GNTMAP_DEVICE_MAP) == 0 {
            return GrantStatus::BAD_GNTREF;
        }
        if op.flags & GNTMAP_UNTRANSLATED != 0 {
            return GrantStatus::GENERAL_ERROR;
        }
        if !self.domains.contains_key(&op.dom) {
            return GrantStatus::BAD_DOMAIN;
        }
        let handle = self.domains.get_mut(&me).and_then(|own| own.grants.take_handle());
        let Some(handle) = handle else { return GrantStatus::NO_SPACE };
        match self.map_with(me, op, handle) {
            Ok(mfn) => {
                op.dev_bus_addr = mfn.bus().0;
                op.handle = MapHandle(handle);
                GrantStatus::OKAY
            }
            Err(status) => {
                if let Some(own) = self.domains.get_mut(&me) {
                    own.grants.free_handles.push_back(handle);
                }
                status
            }
        }
    }

    fn map_with(&mut self, me: DomId, op: &GrantMap, handle: u32) -> Result<Mfn, GrantStatus> {
        let read_only = op.flags & GNTMAP_READONLY != 0;
        let (of, gref, at) = (op.dom, op.gref, Gfn::of_address(op.host_addr));
        let life = self.life(of).ok_or(GrantStatus::BAD_DOMAIN)?;
        let mfn = self.pin(of, gref, me, read_only, true)?;
        let shown = Shown { mfn, by: ShownBy::Grant { read_only } };
        let own =
            self.domains.get_mut(&me).filter(|_| op.flags & !GNTMAP_READONLY == GNTMAP_HOST_MAP);
        let placed = own.is_some_and(|own| own.memory.show(&mut self.machine, at, shown));
        if !placed {
            self.violation(me, format_args!("maps at gfn {:#x}, which is no free window", at.0));
            self.unpin(of, gref, read_only);
            return Err(GrantStatus::GENERAL_ERROR);
        }
        self.machine.hold(mfn);
        let own = self.domains.get_mut(&me).ok_or(GrantStatus::GENERAL_ERROR)?;
        let aliased = me != of
            && own.memory.is_direct()
            && own.handle.features() & XENFEAT_GRANT_MAP_IDENTITY != 0;
        if aliased {
            own.memory.enter_alias(mfn, read_only);
        }
        own.grants.mapped.entry(mfn).or_default().add(read_only);
        let slot = own.grants.maptrack.get_mut(handle as usize);
        *slot.ok_or(GrantStatus::GENERAL_ERROR)? =
            Some(Tracked { of, gref, at, read_only, mfn, life, aliased });
        Ok(mfn)
    }

    /// One operation of `GNTTABOP_unmap_grant_ref`.
    pub(crate) fn unmap(&mut self, me: DomId, op: &GrantUnmap) -> GrantStatus {
        let Some(own) = self.domains.get_mut(&me) else { return GrantStatus::GENERAL_ERROR };
        let index = op.handle.0 as usize;
        let Some(Some(tracked)) = own.grants.maptrack.get(index).copied() else {
            self.violation(me, format_args!("unmaps {:?}, which it does not have", op.handle));
            return GrantStatus::BAD_HANDLE;
        };
        if op.host_addr == 0 {
            // Xen undoes only what it is told of: nothing.
            return GrantStatus::OKAY;
        }
        if Gfn::of_address(op.host_addr) != tracked.at {
            self.violation(me, format_args!("unmaps {:?} from where it is not", op.handle));
            return GrantStatus::GENERAL_ERROR;
        }
        self.drop_mapping(me, op.handle);
        GrantStatus::OKAY
    }

    fn drop_mapping(&mut self, me: DomId, handle: MapHandle) {
        let Some(own) = self.domains.get_mut(&me) else { return };
        let slot = own.grants.maptrack.get_mut(handle.0 as usize);
        let Some(tracked) = slot.and_then(Option::take) else { return };
        own.memory.hide(&mut self.machine, tracked.at);
        if tracked.aliased {
            own.memory.leave_alias(tracked.mfn, tracked.read_only);
        }
        own.grants.forget(tracked.mfn, tracked.read_only);
        own.grants.free_handles.push_back(handle.0);
        if self.life(tracked.of) == Some(tracked.life) {
            self.machine.let_go(tracked.mfn);
            self.unpin(tracked.of, tracked.gref, tracked.read_only);
            self.bury(tracked.of);
        }
    }

    /// What a dying domain has mapped is unmapped for it.
    pub(crate) fn drop_mappings(&mut self, of: DomId) {
        let Some(domain) = self.domains.get(&of) else { return };
        let handles: Vec<_> = domain.grants.mappings().map(|(handle, _)| handle).collect();
        for handle in handles {
            self.drop_mapping(of, handle);
        }
    }
}

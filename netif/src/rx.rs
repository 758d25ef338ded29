//! Packets to the guest: how many slots one takes, what the backend says in each, and how the frontend reads it.
//!
//! A packet is one response with data, its extras in responses of their own right behind it, and more data. Each response
//! goes to the slot of the request that it answers, extras included.

use heapless::Vec;
use hypercall::{PAGE_SIZE, PageOffset};

use crate::offload::{Checksum, ETHERNET_HEADER, Gso, GsoFault};
use crate::slot::{Extra, ExtraInfo, RxFlags, RxId, RxResponse, RxStatus};
use crate::tx::{MAX_SLOTS, PacketHash};

/// A packet as the backend is about to put it into the frontend's pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RxPacket<'p> {
    /// Bytes of the frame.
    pub len: u16,
    /// How many of them go to each page: their sum is `len`, and each has room behind `headroom`. If there are none, each page is
    /// filled before the next is begun, which takes the fewest.
    pub pieces: &'p [u16],
    /// Bytes the frontend wants free at the start of every page (`xdp-headroom`).
    pub headroom: PageOffset,
    /// The state of its checksum.
    pub checksum: Checksum,
    /// Whether and how it is to be segmented.
    pub gso: Option<Gso>,
    /// Its hash, for a frontend that asked for hashes.
    pub hash: Option<PacketHash>,
}

/// The share of a packet that goes to one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RxPart {
    /// Where in the page it begins.
    pub offset: PageOffset,
    /// Its first byte, counted from the start of the frame,
    pub start: u16,
    /// and how many.
    pub len: u16,
}

impl RxPacket<'_> {
    fn extra(&self, index: usize) -> Option<ExtraInfo> {
        let headroom = self.headroom.get();
        let xdp = (headroom != 0).then_some(ExtraInfo::Xdp { headroom });
        let hash = self.hash.map(|PacketHash { kind, algorithm, value }| ExtraInfo::Hash {
            kind,
            algorithm,
            value: value.to_le_bytes(),
        });
        [self.gso.map(Gso::info), hash, xdp].into_iter().flatten().nth(index)
    }

    /// Slots that extras take.
    #[inline]
    #[must_use]
    pub fn extras(&self) -> usize {
        usize::from(self.gso.is_some())
            + usize::from(self.hash.is_some())
            + usize::from(self.headroom != PageOffset::ZERO)
    }

    #[inline]
    fn data_slots(&self) -> usize {
        if !self.pieces.is_empty() {
            return self.pieces.len();
        }
        let (len, room) = (usize::from(self.len), self.headroom.room());
        // Dividing is slow, and most packets take one.
        if len <= room { 1 } else { len.div_ceil(room) }
    }

    /// Slots it takes, exactly: the ring must have so many requests before any is taken.
    #[inline]
    #[must_use]
    pub fn slots(&self) -> usize {
        self.data_slots() + self.extras()
    }

    /// The number of a data slot among those with data; `None` for the slot of an extra. The first is not asked for.
    fn data_index(&self, slot: usize) -> Option<usize> {
        slot.checked_sub(self.extras()).filter(|&index| index > 0)
    }

    /// Which bytes go to the page of the packet's `slot`-th request. `None`: none, it is an extra's, or beyond the last.
    #[inline]
    #[must_use]
    pub fn part(&self, slot: usize) -> Option<RxPart> {
        if !self.pieces.is_empty() {
            return self.piece(slot);
        }
        if slot == 0 {
            let room = u16::try_from(self.headroom.room()).ok()?;
            return Some(RxPart { offset: self.headroom, start: 0, len: self.len.min(room) });
        }
        let index = self.data_index(slot)?;
        let room = self.headroom.room();
        let start = u16::try_from(index.checked_mul(room)?).ok()?;
        let left = usize::from(self.len.checked_sub(start)?);
        if left == 0 {
            return None;
        }
        let len = u16::try_from(left.min(room)).ok()?;
        Some(RxPart { offset: self.headroom, start, len })
    }

    fn piece(&self, slot: usize) -> Option<RxPart> {
        let index = if slot == 0 { 0 } else { self.data_index(slot)? };
        let (before, [len, ..]) = self.pieces.split_at_checked(index)? else { return None };
        // Summed up before it is looked at: that takes a few instructions for any number.
        let start: u32 = before.iter().map(|len| u32::from(*len)).sum();
        Some(RxPart { offset: self.headroom, start: u16::try_from(start).ok()?, len: *len })
    }

    /// The response to the packet's `slot`-th request. `None` beyond the last.
    #[inline]
    #[must_use]
    pub fn response(&self, slot: usize, id: RxId) -> Option<RxResponse> {
        let Some(part) = self.part(slot) else {
            let info = self.extra(slot.checked_sub(1)?)?;
            return Some(RxResponse::from_extra(Extra { more: slot < self.extras(), info }));
        };
        let mut flags = RxFlags::empty();
        flags
            .set(RxFlags::MORE_DATA, u32::from(part.start) + u32::from(part.len) < self.len.into());
        if slot == 0 {
            flags |= match self.checksum {
                Checksum::Unverified => RxFlags::empty(),
                Checksum::Validated => RxFlags::DATA_VALIDATED,
                Checksum::Blank => RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED,
            };
            flags.set(RxFlags::EXTRA_INFO, self.extras() > 0);
        }
        let status = RxStatus(i16::try_from(part.len).ok()?);
        Some(RxResponse { id, offset: part.offset.get(), flags, status })
    }
}

/// The response to each request of a packet that could not be delivered, extras' included: all stand alone.
#[must_use]
pub const fn failed(id: RxId) -> RxResponse {
    RxResponse { id, offset: 0, flags: RxFlags::empty(), status: RxStatus::ERROR }
}

/// Consecutive slots of a ring that a packet's responses came in; each page there is used or posted again.
#[must_use = "every slot taken from the ring has a page to be posted again"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    /// The first.
    pub first: u16,
    /// How many, counted around the end of the ring.
    pub count: u16,
}

/// Bytes of a received packet in one page. They end within the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RxSlot {
    /// The ring's slot, which names the page.
    pub slot: u16,
    /// First byte within the page, 0 to 4,096.
    pub offset: u16,
    /// How many, 0 to 4,096.
    pub size: u16,
}

/// A received packet whose description follows the rules.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Received {
    /// Where its bytes are, in order.
    pub slots: Vec<RxSlot, MAX_SLOTS>,
    /// Bytes in all.
    pub size: u32,
    /// Its checksum.
    pub checksum: Checksum,
    /// Whether it stands for several segments.
    pub gso: Option<Gso>,
    /// Its hash, if it came with one.
    pub hash: Option<PacketHash>,
}

/// What the next responses in the ring are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RxVerdict {
    /// The slots taken, those of extras included.
    pub taken: Taken,
    /// The packet, or why there is none.
    pub packet: Result<Received, RxDrop>,
}

/// Why received slots give no packet. All their pages are posted again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RxDrop {
    /// The backend says that it failed.
    #[error("backend reports status {}", .0.0)]
    Status(RxStatus),
    /// Bytes beyond the end of the page.
    #[error("{size} bytes at offset {offset} cross the page")]
    CrossesPage {
        /// Where they begin,
        offset: u16,
        /// and how many.
        size: u16,
    },
    /// An announced response was not published.
    #[error("announced response is missing")]
    Missing,
    /// More slots with data than a packet may have.
    #[error("too many slots")]
    TooManySlots,
    /// An extra of a type that does not exist.
    #[error("extra of unknown type {0}")]
    UnknownExtra(u8),
    /// Segmentation that means nothing.
    #[error(transparent)]
    Gso(#[from] GsoFault),
    /// Less than an Ethernet header.
    #[error("shorter than an Ethernet header")]
    Short,
}

/// A response that does not name its slot: the backend answers what was not asked, and is to be closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("response with id {} in slot {slot}", .id.0)]
pub struct WrongId {
    /// Where it was.
    pub slot: u16,
    /// What it says.
    pub id: RxId,
}

struct Assembly {
    slots: Vec<RxSlot, MAX_SLOTS>,
    size: u32,
    gso: Option<Gso>,
    hash: Option<PacketHash>,
    taken: Taken,
    reason: Option<RxDrop>,
}

impl Assembly {
    /// The first reason counts.
    fn drop_for(&mut self, reason: RxDrop) {
        self.reason.get_or_insert(reason);
    }

    fn data(&mut self, slot: u16, response: RxResponse) -> Result<(), WrongId> {
        if response.id.0 != slot {
            return Err(WrongId { slot, id: response.id });
        }
        let offset = response.offset;
        match response.status.bytes() {
            Err(status) => self.drop_for(RxDrop::Status(status)),
            Ok(size) if usize::from(offset) + usize::from(size) > PAGE_SIZE => {
                self.drop_for(RxDrop::CrossesPage { offset, size });
            }
            Ok(size) => {
                self.size = self.size.saturating_add(size.into());
                if self.slots.push(RxSlot { slot, offset, size }).is_err() {
                    self.drop_for(RxDrop::TooManySlots);
                }
            }
        }
        Ok(())
    }

    fn extra(&mut self, response: RxResponse) -> bool {
        match response.as_extra() {
            Err(unknown) => {
                self.drop_for(RxDrop::UnknownExtra(unknown.kind));
                unknown.more
            }
            Ok(extra) => {
                match extra.info {
                    ExtraInfo::Gso { size, kind, .. } => match Gso::new(size, kind) {
                        Ok(gso) => self.gso = Some(gso),
                        Err(fault) => self.drop_for(RxDrop::Gso(fault)),
                    },
                    ExtraInfo::Hash { kind, algorithm, value } => {
                        let value = u32::from_le_bytes(value);
                        self.hash = Some(PacketHash { kind, algorithm, value });
                    }
                    // Multicast is for the other direction; where data begins, each response says itself.
                    ExtraInfo::McastAdd(_) | ExtraInfo::McastDel(_) | ExtraInfo::Xdp { .. } => {}
                }
                extra.more
            }
        }
    }
}

/// What [`next`] takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
    /// A packet of one slot and no extras, as most are.
    Single {
        /// Where its bytes are: an Ethernet header at least. No other slot was taken.
        slot: RxSlot,
        /// Its checksum.
        checksum: Checksum,
    },
    /// Anything else.
    Other(RxVerdict),
}

/// Takes the responses of the next packet, each with the slot it came in, and judges them. `None`: there is none.
///
/// The frontend must have given each request the number of its slot as its id.
///
/// # Errors
/// A response with data does not name its slot. The backend is to be closed.
#[inline]
pub fn assemble(
    responses: &mut impl Iterator<Item = (u16, RxResponse)>,
) -> Result<Option<RxVerdict>, WrongId> {
    match next(responses) {
        Ok(Some(Next::Single { slot, checksum })) => {
            let mut slots = Vec::new();
            let _ = slots.push(slot);
            let size = slot.size.into();
            let packet = Ok(Received { slots, size, checksum, gso: None, hash: None });
            Ok(Some(RxVerdict { taken: Taken { first: slot.slot, count: 1 }, packet }))
        }
        Ok(Some(Next::Other(verdict))) => Ok(Some(verdict)),
        Ok(None) => Ok(None),
        Err(wrong) => Err(wrong),
    }
}

/// As [`assemble`], with packets of one slot told apart: [`Received`] has room for all slots that there can be, and is large to move.
///
/// # Errors
/// As there.
#[inline]
pub fn next(
    responses: &mut impl Iterator<Item = (u16, RxResponse)>,
) -> Result<Option<Next>, WrongId> {
    let Some((slot, first)) = responses.next() else { return Ok(None) };
    if first.flags.intersects(RxFlags::EXTRA_INFO | RxFlags::MORE_DATA) {
        return assemble_several(slot, first, responses).map(|verdict| Some(Next::Other(verdict)));
    }
    // The same rules, as far as they have to do with it.
    if first.id.0 != slot {
        return Err(WrongId { slot, id: first.id });
    }
    let offset = first.offset;
    let reason = match first.status.bytes() {
        Err(status) => RxDrop::Status(status),
        Ok(size) if usize::from(offset) + usize::from(size) > PAGE_SIZE => {
            RxDrop::CrossesPage { offset, size }
        }
        Ok(size) if size < ETHERNET_HEADER => RxDrop::Short,
        Ok(size) => {
            let slot = RxSlot { slot, offset, size };
            return Ok(Some(Next::Single { slot, checksum: checksum(first.flags) }));
        }
    };
    let taken = Taken { first: slot, count: 1 };
    Ok(Some(Next::Other(RxVerdict { taken, packet: Err(reason) })))
}

fn checksum(flags: RxFlags) -> Checksum {
    Checksum::flagged(flags.contains(RxFlags::CSUM_BLANK), flags.contains(RxFlags::DATA_VALIDATED))
}

/// A packet of several slots, or with extras.
fn assemble_several(
    slot: u16,
    first: RxResponse,
    responses: &mut impl Iterator<Item = (u16, RxResponse)>,
) -> Result<RxVerdict, WrongId> {
    let mut assembly = Assembly {
        slots: Vec::new(),
        size: 0,
        gso: None,
        hash: None,
        taken: Taken { first: slot, count: 1 },
        reason: None,
    };
    assembly.data(slot, first)?;
    let mut more = first.flags.contains(RxFlags::EXTRA_INFO);
    while more {
        let Some((_, response)) = responses.next() else {
            assembly.drop_for(RxDrop::Missing);
            break;
        };
        assembly.taken.count = assembly.taken.count.saturating_add(1);
        more = assembly.extra(response);
    }
    let mut more = first.flags.contains(RxFlags::MORE_DATA);
    while more {
        let Some((slot, response)) = responses.next() else {
            assembly.drop_for(RxDrop::Missing);
            break;
        };
        assembly.taken.count = assembly.taken.count.saturating_add(1);
        assembly.data(slot, response)?;
        more = response.flags.contains(RxFlags::MORE_DATA);
    }
    if assembly.size < ETHERNET_HEADER.into() {
        assembly.drop_for(RxDrop::Short);
    }
    let Assembly { slots, size, gso, hash, taken, reason } = assembly;
    let packet = match reason {
        Some(reason) => Err(reason),
        None => Ok(Received { slots, size, checksum: checksum(first.flags), gso, hash }),
    };
    Ok(RxVerdict { taken, packet })
}

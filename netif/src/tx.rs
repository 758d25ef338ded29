//! From TX requests to packets: the rules of a chain, as a pure function over requests that were already copied out.
//!
//! A packet is one request, its extras in slots of their own right behind it, and follow-on requests while there is more
//! data. The size of the first request is that of the whole packet, so its own share is what the others leave.

use core::iter;

use grant::SharedMemory;
use heapless::Vec;
use hypercall::{GrantRef, PAGE_SIZE};

use crate::mac::MacAddr;
use crate::offload::{Checksum, ETHERNET_HEADER, Gso, GsoFault};
use crate::ring::{Full, RingFault, TxBackRing};
use crate::slot::{ExtraInfo, TxFlags, TxId, TxRequest, TxResponse, TxStatus};

/// Most slots with data that a packet may have: a head and `XEN_NETIF_NR_SLOTS_MIN` more.
pub const MAX_SLOTS: usize = 1 + MAX_FOLLOW_ONS;
/// `XEN_NETIF_NR_SLOTS_MIN`: what every backend must take.
const MAX_FOLLOW_ONS: usize = 18;
/// A frontend that sends a little more is buggy, and its packet dropped; one that sends more than this is closed. Linux's
/// backend draws the same two lines.
const MAX_TOLERATED_FOLLOW_ONS: usize = 20;

/// Bytes of a packet that lie in one granted page. They end within the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TxSlot {
    /// The page.
    pub gref: GrantRef,
    /// First byte within it, 0 to 4,096.
    pub offset: u16,
    /// How many, 0 to 4,096: a slot may be empty.
    pub size: u16,
}

/// A hash that came with the packet, in the terms of io/netif.h.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PacketHash {
    /// `_XEN_NETIF_CTRL_HASH_TYPE_*`
    pub kind: u8,
    /// `XEN_NETIF_CTRL_HASH_ALGORITHM_*`
    pub algorithm: u8,
    /// The value.
    pub value: u32,
}

/// The duty to answer every slot that a packet took, once: the ids, and which slots were extras and have none.
///
/// It cannot be copied, and [`responses`](Self::responses) uses it up.
#[must_use = "every slot taken from the ring is owed a response"]
#[derive(PartialEq, Eq, Debug)]
pub struct Answers {
    first: TxId,
    /// Slots of extras, all right behind the first.
    extras: u16,
    rest: Vec<TxId, MAX_TOLERATED_FOLLOW_ONS>,
}

impl Answers {
    /// Slots taken, and responses owed.
    #[must_use]
    pub fn slots(&self) -> usize {
        1 + usize::from(self.extras) + self.rest.len()
    }

    /// The responses, in the order of the requests.
    pub fn responses(self, status: TxStatus) -> impl Iterator<Item = TxResponse> {
        let null = TxResponse { id: TxId::default(), status: TxStatus::NULL };
        iter::once(TxResponse { id: self.first, status })
            .chain(iter::repeat_n(null, usize::from(self.extras)))
            .chain(self.rest.into_iter().map(move |id| TxResponse { id, status }))
    }
}

impl<M: SharedMemory> TxBackRing<M> {
    /// Pushes the responses of one packet; [`publish`](Self::publish) shows them.
    ///
    /// # Errors
    /// They are not of this ring: it owes fewer.
    #[inline]
    pub fn answer(&mut self, answers: Answers, status: TxStatus) -> Result<(), Full> {
        if answers.slots() == 1 {
            return self.push(TxResponse { id: answers.first, status });
        }
        answers.responses(status).try_for_each(|response| self.push(response))
    }

    /// As [`answer`](Self::answer), for a packet of one slot.
    ///
    /// # Errors
    /// As there.
    #[inline]
    pub fn answer_single(&mut self, single: Single, status: TxStatus) -> Result<(), Full> {
        self.push(TxResponse { id: single.id, status })
    }
}

/// A packet whose description follows the rules. What its pages hold is not known yet.
#[derive(PartialEq, Eq, Debug)]
pub struct Packet {
    /// Where its bytes are, in order.
    pub slots: Vec<TxSlot, MAX_SLOTS>,
    /// Bytes in all: at least an Ethernet header, and the sum over the slots.
    pub size: u16,
    /// Its checksum.
    pub checksum: Checksum,
    /// Whether and how it is to be segmented.
    pub gso: Option<Gso>,
    /// Its hash, if it came with one.
    pub hash: Option<PacketHash>,
    /// What its sender is owed.
    pub answers: Answers,
}

/// A packet of one slot and no extras, as most are, in a few bytes.
#[derive(PartialEq, Eq, Debug)]
#[must_use = "every slot taken from the ring is owed a response"]
pub struct Single {
    /// Where its bytes are: an Ethernet header at least.
    pub slot: TxSlot,
    /// Its checksum.
    pub checksum: Checksum,
    id: TxId,
}

impl From<Single> for Packet {
    #[inline]
    fn from(Single { slot, checksum, id }: Single) -> Self {
        let answers = Answers { first: id, extras: 0, rest: Vec::new() };
        let mut slots = Vec::new();
        let _ = slots.push(slot);
        Self { slots, size: slot.size, checksum, gso: None, hash: None, answers }
    }
}

/// What [`next`] takes.
#[derive(PartialEq, Eq, Debug)]
#[expect(clippy::large_enum_variant, reason = "it is looked at where it is made")]
pub enum Next {
    /// A packet of one slot.
    Single(Single),
    /// Anything else.
    Other(Verdict),
}

/// What the next requests in the ring are.
#[derive(PartialEq, Eq, Debug)]
pub enum Verdict {
    /// A packet.
    Packet(Packet),
    /// No packet: a change to the frontend's multicast filter.
    Multicast {
        /// Let the address through, or no longer.
        change: MulticastChange,
        /// What its sender is owed.
        answers: Answers,
    },
    /// A packet that cannot be delivered, from a frontend that may be buggy and not more.
    Drop {
        /// Why.
        reason: DropReason,
        /// What its sender is owed.
        answers: Answers,
    },
}

impl Verdict {
    /// Slots it took from the ring.
    #[must_use]
    pub fn slots(&self) -> usize {
        match self {
            Self::Packet(packet) => packet.answers.slots(),
            Self::Multicast { answers, .. } | Self::Drop { answers, .. } => answers.slots(),
        }
    }
}

/// A change to a multicast filter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MulticastChange {
    /// `XEN_NETIF_EXTRA_TYPE_MCAST_ADD`
    Add(MacAddr),
    /// `XEN_NETIF_EXTRA_TYPE_MCAST_DEL`
    Remove(MacAddr),
}

/// Why a packet is dropped.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DropReason {
    /// One or two slots more than a packet may have.
    #[error("too many slots")]
    TooManySlots,
    /// The follow-ons hold more than the whole: a packet of 64 KiB or more, whose size did not fit its field.
    #[error("follow-on slots hold more than the packet")]
    FollowOnsTooLong,
    /// The first slot does not hold an Ethernet header.
    #[error("first slot shorter than an Ethernet header")]
    Short,
}

/// The frontend broke the protocol: its interface is closed, and nothing of it is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerFault {
    /// In the ring itself.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// An extra was announced and not published.
    #[error("announced extra is missing")]
    MissingExtra,
    /// An extra of a type that does not exist.
    #[error("extra of unknown type {0}")]
    UnknownExtra(u8),
    /// A request that changes the multicast filter and announces more data.
    #[error("multicast request with more data")]
    MulticastWithData,
    /// A follow-on was announced and not published.
    #[error("announced follow-on slot is missing")]
    MissingSlot,
    /// Far more slots than a packet may have.
    #[error("packet of more than {} slots", 1 + MAX_TOLERATED_FOLLOW_ONS)]
    TooManySlots,
    /// A slot that does not end within its page.
    #[error("slot of {size} bytes at offset {offset} crosses its page")]
    CrossesPage {
        /// Where it begins,
        offset: u16,
        /// and its bytes.
        size: u16,
    },
    /// Segmentation that means nothing.
    #[error(transparent)]
    Gso(#[from] GsoFault),
}

#[derive(Default)]
struct Extras {
    taken: u16,
    /// As it came: it is judged after the packet it belongs to is known not to be dropped.
    gso: Option<(u16, crate::slot::GsoType)>,
    hash: Option<PacketHash>,
    add: Option<MacAddr>,
    remove: Option<MacAddr>,
}

/// If two extras are of one type, the last one counts.
fn take_extras(requests: &mut impl Iterator<Item = TxRequest>) -> Result<Extras, PeerFault> {
    let mut extras = Extras::default();
    loop {
        let extra = requests.next().ok_or(PeerFault::MissingExtra)?.as_extra();
        let extra = extra.map_err(|unknown| PeerFault::UnknownExtra(unknown.kind))?;
        extras.taken = extras.taken.saturating_add(1);
        match extra.info {
            ExtraInfo::Gso { size, kind, .. } => extras.gso = Some((size, kind)),
            ExtraInfo::McastAdd(mac) => extras.add = Some(mac),
            ExtraInfo::McastDel(mac) => extras.remove = Some(mac),
            ExtraInfo::Hash { kind, algorithm, value } => {
                let value = u32::from_le_bytes(value);
                extras.hash = Some(PacketHash { kind, algorithm, value });
            }
            // Headroom is for the other direction.
            ExtraInfo::Xdp { .. } => {}
        }
        if !extra.more {
            return Ok(extras);
        }
    }
}

fn within_page(offset: u16, size: u16) -> Result<(), PeerFault> {
    if usize::from(offset) + usize::from(size) > PAGE_SIZE {
        return Err(PeerFault::CrossesPage { offset, size });
    }
    Ok(())
}

/// Takes the requests of the next packet and judges them. `None`: there is no request.
///
/// The iterator gives what was published when the ring was last polled, so a chain that it does not complete is one that
/// the frontend published in part.
///
/// # Errors
/// The frontend broke the protocol and is to be closed.
#[inline]
pub fn assemble(
    requests: &mut impl Iterator<Item = TxRequest>,
) -> Result<Option<Verdict>, PeerFault> {
    Ok(next(requests)?.map(|next| match next {
        Next::Single(single) => Verdict::Packet(single.into()),
        Next::Other(verdict) => verdict,
    }))
}

/// As [`assemble`], with packets of one slot told apart: a [`Packet`] has room for all slots that there can be, and is large to move.
///
/// # Errors
/// As there.
#[inline]
pub fn next(requests: &mut impl Iterator<Item = TxRequest>) -> Result<Option<Next>, PeerFault> {
    let Some(first) = requests.next() else { return Ok(None) };
    if first.flags.intersects(TxFlags::EXTRA_INFO | TxFlags::MORE_DATA) {
        return assemble_several(first, requests).map(|verdict| Some(Next::Other(verdict)));
    }
    // The same rules, as far as they have to do with it.
    if first.size < ETHERNET_HEADER {
        let answers = Answers { first: first.id, extras: 0, rest: Vec::new() };
        return Ok(Some(Next::Other(Verdict::Drop { reason: DropReason::Short, answers })));
    }
    within_page(first.offset, first.size)?;
    let slot = TxSlot { gref: first.gref, offset: first.offset, size: first.size };
    Ok(Some(Next::Single(Single { slot, checksum: checksum(first.flags), id: first.id })))
}

fn checksum(flags: TxFlags) -> Checksum {
    Checksum::flagged(flags.contains(TxFlags::CSUM_BLANK), flags.contains(TxFlags::DATA_VALIDATED))
}

/// A packet of several slots, or with extras.
fn assemble_several(
    first: TxRequest,
    requests: &mut impl Iterator<Item = TxRequest>,
) -> Result<Verdict, PeerFault> {
    let extras = if first.flags.contains(TxFlags::EXTRA_INFO) {
        take_extras(requests)?
    } else {
        Extras::default()
    };
    let mut answers = Answers { first: first.id, extras: extras.taken, rest: Vec::new() };
    let change = extras.add.map(MulticastChange::Add);
    if let Some(change) = change.or(extras.remove.map(MulticastChange::Remove)) {
        if first.flags.contains(TxFlags::MORE_DATA) {
            return Err(PeerFault::MulticastWithData);
        }
        return Ok(Verdict::Multicast { change, answers });
    }

    let mut slots = Vec::new();
    // The head goes in front; how much of the packet it holds is known after the last follow-on.
    let mut head = TxSlot { gref: first.gref, offset: first.offset, size: first.size };
    let _ = slots.push(head);
    let mut reason = None;
    let mut more = first.flags.contains(TxFlags::MORE_DATA);
    while more {
        let next = requests.next().ok_or(PeerFault::MissingSlot)?;
        if answers.rest.push(next.id).is_err() {
            return Err(PeerFault::TooManySlots);
        }
        within_page(next.offset, next.size)?;
        if reason.is_none() {
            let slot = TxSlot { gref: next.gref, offset: next.offset, size: next.size };
            if slots.push(slot).is_err() {
                reason = Some(DropReason::TooManySlots);
            } else if let Some(left) = head.size.checked_sub(next.size) {
                head.size = left;
            } else {
                reason = Some(DropReason::FollowOnsTooLong);
            }
        }
        more = next.flags.contains(TxFlags::MORE_DATA);
    }
    if head.size < ETHERNET_HEADER {
        reason = reason.or(Some(DropReason::Short));
    }
    if let Some(reason) = reason {
        return Ok(Verdict::Drop { reason, answers });
    }
    within_page(head.offset, head.size)?;
    if let Some(place) = slots.first_mut() {
        *place = head;
    }
    let gso = extras.gso.map(|(size, kind)| Gso::new(size, kind)).transpose()?;
    let (checksum, hash) = (checksum(first.flags), extras.hash);
    Ok(Verdict::Packet(Packet { slots, size: first.size, checksum, gso, hash, answers }))
}

//! What travels in the rings' slots, as plain values (io/netif.h).
//!
//! Each type is exactly its C structure: every bit survives decoding and encoding, so that a slot can be looked at again
//! as the [`Extra`] that overlays it, from the private copy and not from the page.

use bitflags::bitflags;
use grant::SharedMemory;
use hypercall::GrantRef;

use crate::mac::MacAddr;

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// A request or a response: what a ring can carry. The types of this crate implement it and no others can.
pub trait Slot: sealed::Sealed + Copy {
    /// Bytes it occupies.
    const SIZE: usize;
    /// Reads it from the page at a byte offset, each word once.
    fn load<M: SharedMemory>(memory: &M, at: usize) -> Self;
    /// Writes it to the page at a byte offset.
    fn store<M: SharedMemory>(self, memory: &M, at: usize);
}

macro_rules! slot {
    ($name:ident, $words:literal) => {
        impl $crate::slot::sealed::Sealed for $name {}

        impl $crate::slot::Slot for $name {
            const SIZE: usize = $words * 4;

            #[inline]
            fn load<M: grant::SharedMemory>(memory: &M, at: usize) -> Self {
                Self::decode(memory.load_words(at))
            }

            #[inline]
            fn store<M: grant::SharedMemory>(self, memory: &M, at: usize) {
                memory.store_words(at, self.encode());
            }
        }
    };
}

pub(crate) use slot;

/// Two 16-bit fields in the order of the C structure, as the word they share.
#[inline]
pub(crate) const fn word(low: u16, high: u16) -> u32 {
    low as u32 | (high as u32) << 16
}

#[inline]
pub(crate) const fn halves(word: u32) -> (u16, u16) {
    (word as u16, (word >> 16) as u16)
}

/// Names a TX request; echoed in its response. The frontend chooses it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(transparent)]
pub struct TxId(pub u16);

/// Names an RX request; echoed in its response. Must be the number of its slot: responses that carry extras have no id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(transparent)]
pub struct RxId(pub u16);

bitflags! {
    /// `NETTXF_*`. Unknown bits are kept, and mean nothing.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct TxFlags: u16 {
        /// `NETTXF_csum_blank`: the transport checksum has yet to be computed.
        const CSUM_BLANK = 1 << 0;
        /// `NETTXF_data_validated`: the transport checksum is known to be good.
        const DATA_VALIDATED = 1 << 1;
        /// `NETTXF_more_data`: the packet goes on in the next request.
        const MORE_DATA = 1 << 2;
        /// `NETTXF_extra_info`: an [`Extra`] follows.
        const EXTRA_INFO = 1 << 3;
        const _ = !0;
    }
}

bitflags! {
    /// `NETRXF_*`. Unknown bits are kept, and mean nothing. The two lowest are the other way round than in [`TxFlags`].
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct RxFlags: u16 {
        /// `NETRXF_data_validated`: the transport checksum is known to be good.
        const DATA_VALIDATED = 1 << 0;
        /// `NETRXF_csum_blank`: the transport checksum has yet to be computed.
        const CSUM_BLANK = 1 << 1;
        /// `NETRXF_more_data`: the packet goes on in the next response.
        const MORE_DATA = 1 << 2;
        /// `NETRXF_extra_info`: an [`Extra`] follows.
        const EXTRA_INFO = 1 << 3;
        /// `NETRXF_gso_prefix`: deprecated; nobody here sends it.
        const GSO_PREFIX = 1 << 4;
        const _ = !0;
    }
}

/// How a TX request ended (`NETIF_RSP_*`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct TxStatus(pub i16);

impl TxStatus {
    /// `NETIF_RSP_DROPPED`
    pub const DROPPED: Self = Self(-2);
    /// `NETIF_RSP_ERROR`
    pub const ERROR: Self = Self(-1);
    /// `NETIF_RSP_OKAY`
    pub const OKAY: Self = Self(0);
    /// `NETIF_RSP_NULL`: answers the slot of an extra, which has no id.
    pub const NULL: Self = Self(1);
}

/// How an RX request ended: bytes put into its page from its start on, or a negative `NETIF_RSP_*`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct RxStatus(pub i16);

impl RxStatus {
    /// `NETIF_RSP_DROPPED`
    pub const DROPPED: Self = Self(-2);
    /// `NETIF_RSP_ERROR`
    pub const ERROR: Self = Self(-1);

    /// Bytes received.
    ///
    /// # Errors
    /// The status itself, if it is negative.
    pub const fn bytes(self) -> Result<u16, Self> {
        if self.0 < 0 { Err(self) } else { Ok(self.0 as u16) }
    }
}

/// `struct netif_tx_request`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TxRequest {
    /// The page that holds the bytes.
    pub gref: GrantRef,
    /// First byte within it.
    pub offset: u16,
    /// `NETTXF_*`
    pub flags: TxFlags,
    /// Echoed in the response.
    pub id: TxId,
    /// In the first request of a packet: bytes of the whole packet. In the others: bytes in this page.
    pub size: u16,
}

impl TxRequest {
    /// From the words of the slot.
    #[inline]
    #[must_use]
    pub const fn decode([gref, second, third]: [u32; 3]) -> Self {
        let (offset, flags) = halves(second);
        let (id, size) = halves(third);
        Self {
            gref: GrantRef(gref),
            offset,
            flags: TxFlags::from_bits_retain(flags),
            id: TxId(id),
            size,
        }
    }

    /// The words of the slot.
    #[inline]
    #[must_use]
    pub const fn encode(self) -> [u32; 3] {
        [self.gref.0, word(self.offset, self.flags.bits()), word(self.id.0, self.size)]
    }

    /// The request slot that carries an extra.
    #[must_use]
    pub const fn from_extra(extra: Extra) -> Self {
        let [first, second] = extra.encode();
        Self::decode([first, second, 0])
    }

    /// The extra that this slot is, when the slot before it says so.
    ///
    /// # Errors
    /// Its type is none that the protocol has.
    pub fn as_extra(self) -> Result<Extra, UnknownExtra> {
        let [first, second, _] = self.encode();
        Extra::decode([first, second])
    }
}
slot!(TxRequest, 3);

/// `struct netif_tx_response`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TxResponse {
    /// Of the request this answers; means nothing if the status is [`TxStatus::NULL`].
    pub id: TxId,
    /// How it ended.
    pub status: TxStatus,
}

impl TxResponse {
    /// From the word of the slot.
    #[inline]
    #[must_use]
    pub const fn decode([first]: [u32; 1]) -> Self {
        let (id, status) = halves(first);
        Self { id: TxId(id), status: TxStatus(status as i16) }
    }

    /// The word of the slot.
    #[inline]
    #[must_use]
    pub const fn encode(self) -> [u32; 1] {
        [word(self.id.0, self.status.0 as u16)]
    }
}
slot!(TxResponse, 1);

/// `struct netif_rx_request`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RxRequest {
    /// Echoed in the response.
    pub id: RxId,
    /// The page that shall receive bytes.
    pub gref: GrantRef,
}

impl RxRequest {
    /// From the words of the slot.
    #[inline]
    #[must_use]
    pub const fn decode([first, gref]: [u32; 2]) -> Self {
        let (id, _pad) = halves(first);
        Self { id: RxId(id), gref: GrantRef(gref) }
    }

    /// The words of the slot.
    #[inline]
    #[must_use]
    pub const fn encode(self) -> [u32; 2] {
        [word(self.id.0, 0), self.gref.0]
    }
}
slot!(RxRequest, 2);

/// `struct netif_rx_response`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RxResponse {
    /// Of the request this answers.
    pub id: RxId,
    /// First byte within the page.
    pub offset: u16,
    /// `NETRXF_*`
    pub flags: RxFlags,
    /// Bytes in this page, or an error.
    pub status: RxStatus,
}

impl RxResponse {
    /// From the words of the slot.
    #[inline]
    #[must_use]
    pub const fn decode([first, second]: [u32; 2]) -> Self {
        let (id, offset) = halves(first);
        let (flags, status) = halves(second);
        Self {
            id: RxId(id),
            offset,
            flags: RxFlags::from_bits_retain(flags),
            status: RxStatus(status as i16),
        }
    }

    /// The words of the slot.
    #[inline]
    #[must_use]
    pub const fn encode(self) -> [u32; 2] {
        [word(self.id.0, self.offset), word(self.flags.bits(), self.status.0 as u16)]
    }

    /// The response slot that carries an extra.
    #[must_use]
    pub const fn from_extra(extra: Extra) -> Self {
        Self::decode(extra.encode())
    }

    /// The extra that this slot is, when the slot before it says so.
    ///
    /// # Errors
    /// Its type is none that the protocol has.
    pub fn as_extra(self) -> Result<Extra, UnknownExtra> {
        Extra::decode(self.encode())
    }
}
slot!(RxResponse, 2);

/// What the bytes of a packet are to be cut into, and by which rules (`XEN_NETIF_GSO_TYPE_*`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(transparent)]
pub struct GsoType(pub u8);

impl GsoType {
    /// `XEN_NETIF_GSO_TYPE_NONE`
    pub const NONE: Self = Self(0);
    /// `XEN_NETIF_GSO_TYPE_TCPV4`
    pub const TCPV4: Self = Self(1);
    /// `XEN_NETIF_GSO_TYPE_TCPV6`
    pub const TCPV6: Self = Self(2);
}

/// The meaning of an extra (the union in `struct netif_extra_info`), as it came: nothing in it has been judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtraInfo {
    /// `XEN_NETIF_EXTRA_TYPE_GSO`: cut this packet into segments.
    Gso {
        /// Most bytes of payload per segment (for TCP, its MSS).
        size: u16,
        /// What to cut.
        kind: GsoType,
        /// `XEN_NETIF_GSO_FEAT_*`; none is defined.
        features: u16,
    },
    /// `XEN_NETIF_EXTRA_TYPE_MCAST_ADD`: let this multicast address through. The request carries no packet.
    McastAdd(MacAddr),
    /// `XEN_NETIF_EXTRA_TYPE_MCAST_DEL`: no longer.
    McastDel(MacAddr),
    /// `XEN_NETIF_EXTRA_TYPE_HASH`: a hash over the packet's addresses.
    Hash {
        /// `_XEN_NETIF_CTRL_HASH_TYPE_*`: over which fields.
        kind: u8,
        /// `XEN_NETIF_CTRL_HASH_ALGORITHM_*`
        algorithm: u8,
        /// The hash, least significant byte first.
        value: [u8; 4],
    },
    /// `XEN_NETIF_EXTRA_TYPE_XDP` (Xen 4.18 and later).
    Xdp {
        /// Bytes left free in front of the packet.
        headroom: u16,
    },
}

/// `struct netif_extra_info`: a slot that says more about the packet before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extra {
    /// `XEN_NETIF_EXTRA_FLAG_MORE`: the next slot is an extra, too.
    pub more: bool,
    /// What it says.
    pub info: ExtraInfo,
}

/// An extra whose type the protocol does not have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("extra of unknown type {kind}")]
pub struct UnknownExtra {
    /// The type.
    pub kind: u8,
    /// Whether another extra follows it.
    pub more: bool,
}

impl Extra {
    /// `XEN_NETIF_EXTRA_FLAG_MORE`
    pub const FLAG_MORE: u8 = 1;
    /// `XEN_NETIF_EXTRA_TYPE_GSO`
    pub const GSO: u8 = 1;
    /// `XEN_NETIF_EXTRA_TYPE_MCAST_ADD`
    pub const MCAST_ADD: u8 = 2;
    /// `XEN_NETIF_EXTRA_TYPE_MCAST_DEL`
    pub const MCAST_DEL: u8 = 3;
    /// `XEN_NETIF_EXTRA_TYPE_HASH`
    pub const HASH: u8 = 4;
    /// `XEN_NETIF_EXTRA_TYPE_XDP`
    pub const XDP: u8 = 5;

    /// From the first two words of the slot.
    ///
    /// # Errors
    /// The type is 0 or beyond the last that the protocol has.
    pub fn decode([first, second]: [u32; 2]) -> Result<Self, UnknownExtra> {
        let [kind, flags, a, b] = first.to_le_bytes();
        let [c, d, e, f] = second.to_le_bytes();
        let more = flags & Self::FLAG_MORE != 0;
        let info = match kind {
            Self::GSO => ExtraInfo::Gso {
                size: u16::from_le_bytes([a, b]),
                kind: GsoType(c),
                features: u16::from_le_bytes([e, f]),
            },
            Self::MCAST_ADD => ExtraInfo::McastAdd(MacAddr([a, b, c, d, e, f])),
            Self::MCAST_DEL => ExtraInfo::McastDel(MacAddr([a, b, c, d, e, f])),
            Self::HASH => ExtraInfo::Hash { kind: a, algorithm: b, value: [c, d, e, f] },
            Self::XDP => ExtraInfo::Xdp { headroom: u16::from_le_bytes([a, b]) },
            kind => return Err(UnknownExtra { kind, more }),
        };
        Ok(Self { more, info })
    }

    /// The first two words of the slot.
    #[must_use]
    pub const fn encode(self) -> [u32; 2] {
        let (kind, [a, b, c, d, e, f]) = match self.info {
            ExtraInfo::Gso { size, kind, features } => {
                let ([a, b], [e, f]) = (size.to_le_bytes(), features.to_le_bytes());
                (Self::GSO, [a, b, kind.0, 0, e, f])
            }
            ExtraInfo::McastAdd(MacAddr(mac)) => (Self::MCAST_ADD, mac),
            ExtraInfo::McastDel(MacAddr(mac)) => (Self::MCAST_DEL, mac),
            ExtraInfo::Hash { kind, algorithm, value: [c, d, e, f] } => {
                (Self::HASH, [kind, algorithm, c, d, e, f])
            }
            ExtraInfo::Xdp { headroom } => {
                let [a, b] = headroom.to_le_bytes();
                (Self::XDP, [a, b, 0, 0, 0, 0])
            }
        };
        let flags = if self.more { Self::FLAG_MORE } else { 0 };
        [u32::from_le_bytes([kind, flags, a, b]), u32::from_le_bytes([c, d, e, f])]
    }
}

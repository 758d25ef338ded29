//! What is left to whoever sends the packet on: the transport checksum, and cutting a large TCP packet into segments.

use core::num::NonZeroU16;

use crate::headers::{self, Network, Protocol};
use crate::slot::{ExtraInfo, GsoType};

/// Bytes of an Ethernet header without tags.
pub const ETHERNET_HEADER: u16 = 14;

/// The state of a packet's transport checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Checksum {
    /// It is in the packet; nobody vouches for it.
    #[default]
    Unverified,
    /// It is in the packet, or would be right if it were: the sender vouches for the data.
    Validated,
    /// The packet holds the sum over the pseudo-header alone; the rest is to be added before it leaves the machine.
    Blank,
}

impl Checksum {
    /// What the two flags say that requests and responses have for it (`csum_blank`, `data_validated` in netif.h).
    pub(crate) const fn flagged(blank: bool, validated: bool) -> Self {
        if blank {
            Self::Blank
        } else if validated {
            Self::Validated
        } else {
            Self::Unverified
        }
    }
}

/// Which IP carries the TCP that is to be segmented.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum IpVersion {
    /// `XEN_NETIF_GSO_TYPE_TCPV4`
    V4,
    /// `XEN_NETIF_GSO_TYPE_TCPV6`
    V6,
}

/// A packet larger than the wire takes, to be cut into TCP segments.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Gso {
    /// Most payload bytes in a segment (the MSS).
    pub size: NonZeroU16,
    /// Over which IP.
    pub version: IpVersion,
}

/// What is wrong with an extra that asks for segmentation, whatever the packet holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GsoFault {
    /// Segments of no bytes.
    #[error("segment size 0")]
    SizeZero,
    /// Neither TCP over IPv4 nor over IPv6.
    #[error("unknown segmentation type {0}")]
    UnknownType(u8),
}

impl Gso {
    /// Judges what a peer asks for.
    ///
    /// # Errors
    /// The size is 0 or the type unknown.
    pub fn new(size: u16, kind: GsoType) -> Result<Self, GsoFault> {
        let size = NonZeroU16::new(size).ok_or(GsoFault::SizeZero)?;
        let version = match kind {
            GsoType::TCPV4 => IpVersion::V4,
            GsoType::TCPV6 => IpVersion::V6,
            other => return Err(GsoFault::UnknownType(other.0)),
        };
        Ok(Self { size, version })
    }

    /// The extra that asks for it.
    #[must_use]
    pub const fn info(self) -> ExtraInfo {
        let kind = match self.version {
            IpVersion::V4 => GsoType::TCPV4,
            IpVersion::V6 => GsoType::TCPV6,
        };
        ExtraInfo::Gso { size: self.size.get(), kind, features: 0 }
    }
}

/// A packet asks to be segmented and cannot be: it is dropped, and its sender goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotSegmentable {
    /// The headers end before they should.
    #[error("truncated or malformed header")]
    Header,
    /// It is not TCP over the IP that the extra names, or a fragment of such.
    #[error("not TCP over the announced IP version")]
    NotTcp,
    /// There is less payload than one segment takes.
    #[error("segment size {size} for {payload} bytes of payload")]
    Payload {
        /// The MSS asked for.
        size: u16,
        /// Bytes behind the headers.
        payload: u16,
    },
}

/// Where the headers of a packet that can be segmented are. Offsets are bytes from the start of the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segmentation {
    /// The IP header.
    pub network: u16,
    /// The TCP header.
    pub transport: u16,
    /// The first byte of payload.
    pub payload: u16,
    /// Segments it will become.
    pub segments: u16,
    /// Set if the sender did not mark the checksum [`Checksum::Blank`], as a segmented packet must be: then it counts as
    /// marked once the two bytes of the checksum field are overwritten with these, the sum over the pseudo-header.
    pub fix_up: Option<FixUp>,
}

/// Two bytes to be overwritten in the private copy of the header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FixUp {
    /// Where.
    pub at: u16,
    /// With what.
    pub bytes: [u8; 2],
}

fn byte(header: &[u8], at: usize) -> Result<u8, NotSegmentable> {
    header.get(at).copied().ok_or(NotSegmentable::Header)
}

fn pair(header: &[u8], at: usize) -> Result<u16, NotSegmentable> {
    Ok(u16::from_be_bytes([byte(header, at)?, byte(header, at + 1)?]))
}

/// The IP header that `gso` announces, and where TCP's is.
fn tcp_header(header: &[u8], gso: Gso) -> Result<(Network, usize), NotSegmentable> {
    let (kind, _) = headers::ethertype(header).ok_or(NotSegmentable::Header)?;
    if headers::ip_version(kind) != Some(gso.version) {
        return Err(NotSegmentable::NotTcp);
    }
    let network = headers::network(header).ok_or(NotSegmentable::Header)?;
    match network.next {
        Some(next) if next.protocol == Protocol::Tcp.number() => Ok((network, next.offset)),
        _ => Err(NotSegmentable::NotTcp),
    }
}

/// The one's complement sum over the pseudo-header, as the checksum field of a [`Checksum::Blank`] packet holds it.
fn pseudo_header_sum(
    header: &[u8],
    network: &Network,
    tcp_len: u16,
) -> Result<[u8; 2], NotSegmentable> {
    let (addresses, len) = network.addresses();
    let mut sum = u32::from(tcp_len) + u32::from(Protocol::Tcp.number());
    for at in (addresses..addresses + len).step_by(2) {
        sum += u32::from(pair(header, at)?);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    Ok((sum as u16).to_be_bytes())
}

/// Whether a packet can be segmented as its sender asks, from the private copy of its first bytes (128 hold every header
/// that matters) and its size in bytes.
///
/// # Errors
/// It is not TCP of the announced kind, its headers are not all in `header`, or there is less payload than a segment
/// takes.
pub fn check_segmentation(
    header: &[u8],
    size: u16,
    gso: Gso,
    checksum: Checksum,
) -> Result<Segmentation, NotSegmentable> {
    let header = header.get(..usize::from(size)).unwrap_or(header);
    let (network, transport) = tcp_header(header, gso)?;
    let tcp_header = usize::from(byte(header, transport + 12)? >> 4) * 4;
    let payload = transport + tcp_header;
    if tcp_header < 20 || payload > header.len() {
        return Err(NotSegmentable::Header);
    }
    let narrow = |at: usize| u16::try_from(at).map_err(|_| NotSegmentable::Header);
    let (network_at, transport_at, payload_at) =
        (narrow(network.offset)?, narrow(transport)?, narrow(payload)?);
    let bytes = size.saturating_sub(payload_at);
    if gso.size.get() > bytes {
        return Err(NotSegmentable::Payload { size: gso.size.get(), payload: bytes });
    }
    let fix_up = if checksum == Checksum::Blank {
        None
    } else {
        let tcp_len = size.saturating_sub(transport_at);
        let bytes = pseudo_header_sum(header, &network, tcp_len)?;
        Some(FixUp { at: transport_at.saturating_add(16), bytes })
    };
    Ok(Segmentation {
        network: network_at,
        transport: transport_at,
        payload: payload_at,
        segments: bytes.div_ceil(gso.size.get()),
        fix_up,
    })
}

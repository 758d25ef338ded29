//! What is left to whoever sends the packet on: the transport checksum, and cutting a large TCP packet into segments.

use core::num::NonZeroU16;

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

const VLAN: u16 = 0x8100;
const SERVICE_VLAN: u16 = 0x88a8;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
/// Tags in front of the IP header that are looked through.
const MAX_TAGS: usize = 2;
/// IPv6 extension headers in front of TCP that are looked through.
const MAX_EXTENSIONS: usize = 8;

fn byte(header: &[u8], at: usize) -> Result<u8, NotSegmentable> {
    header.get(at).copied().ok_or(NotSegmentable::Header)
}

fn pair(header: &[u8], at: usize) -> Result<u16, NotSegmentable> {
    Ok(u16::from_be_bytes([byte(header, at)?, byte(header, at + 1)?]))
}

fn network_header(header: &[u8], gso: Gso) -> Result<usize, NotSegmentable> {
    let mut at = 12;
    for _ in 0..MAX_TAGS {
        if !matches!(pair(header, at)?, VLAN | SERVICE_VLAN) {
            break;
        }
        at += 4;
    }
    let (ether_type, version) = match gso.version {
        IpVersion::V4 => (IPV4, 4),
        IpVersion::V6 => (IPV6, 6),
    };
    if pair(header, at)? != ether_type {
        return Err(NotSegmentable::NotTcp);
    }
    if byte(header, at + 2)? >> 4 != version {
        return Err(NotSegmentable::Header);
    }
    Ok(at + 2)
}

fn transport_header(header: &[u8], gso: Gso, ip: usize) -> Result<usize, NotSegmentable> {
    match gso.version {
        IpVersion::V4 => {
            let len = usize::from(byte(header, ip)? & 0xf) * 4;
            if len < 20 {
                return Err(NotSegmentable::Header);
            }
            let fragment = pair(header, ip + 6)? & 0x3fff != 0;
            if fragment || byte(header, ip + 9)? != TCP {
                return Err(NotSegmentable::NotTcp);
            }
            Ok(ip + len)
        }
        IpVersion::V6 => {
            let (mut next, mut at) = (byte(header, ip + 6)?, ip + 40);
            for _ in 0..MAX_EXTENSIONS {
                match next {
                    TCP => return Ok(at),
                    // Hop-by-hop, routing and destination options: length in 8-byte units, the first not counted.
                    0 | 43 | 60 => {
                        next = byte(header, at)?;
                        at += (usize::from(byte(header, at + 1)?) + 1) * 8;
                    }
                    _ => break,
                }
            }
            Err(NotSegmentable::NotTcp)
        }
    }
}

/// The one's complement sum over the pseudo-header, as the checksum field of a [`Checksum::Blank`] packet holds it.
fn pseudo_header_sum(
    header: &[u8],
    gso: Gso,
    ip: usize,
    tcp_len: u16,
) -> Result<[u8; 2], NotSegmentable> {
    let addresses = match gso.version {
        IpVersion::V4 => ip + 12..ip + 20,
        IpVersion::V6 => ip + 8..ip + 40,
    };
    let mut sum = u32::from(tcp_len) + u32::from(TCP);
    for at in addresses.step_by(2) {
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
    let network = network_header(header, gso)?;
    let transport = transport_header(header, gso, network)?;
    let tcp_header = usize::from(byte(header, transport + 12)? >> 4) * 4;
    let payload = transport + tcp_header;
    if tcp_header < 20 || payload > header.len() {
        return Err(NotSegmentable::Header);
    }
    let narrow = |at: usize| u16::try_from(at).map_err(|_| NotSegmentable::Header);
    let (network_at, transport_at, payload_at) =
        (narrow(network)?, narrow(transport)?, narrow(payload)?);
    let bytes = size.saturating_sub(payload_at);
    if gso.size.get() > bytes {
        return Err(NotSegmentable::Payload { size: gso.size.get(), payload: bytes });
    }
    let fix_up = if checksum == Checksum::Blank {
        None
    } else {
        let tcp_len = size.saturating_sub(transport_at);
        let bytes = pseudo_header_sum(header, gso, network, tcp_len)?;
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

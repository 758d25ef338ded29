//! Where the headers of a frame are.
//!
//! [`network`] looks at the first bytes of a frame alone and believes no length; [`parse`] has all of the frame and
//! checks every length against it.

use crate::offload::{ETHERNET_HEADER, IpVersion};

/// Most VLAN tags walked over: customer's and provider's.
const MAX_TAGS: usize = 2;

/// Most IPv6 extension headers walked over. RFC 8200, 4.1 has at most four of the kinds that are.
const MAX_EXTENSIONS: usize = 8;

const IPV6_LEN: usize = 40;

/// The transport protocols whose checksums can be left blank.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
}

impl Protocol {
    /// The number in IP's header.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// The protocol of a number, if it is one of these.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }

    /// Where the checksum is in the transport header.
    #[must_use]
    pub const fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// What an IP header says of what follows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Next {
    /// The number of the protocol.
    pub protocol: u8,
    /// Where its header is, in bytes from the start of the frame. It may lie beyond the bytes that were looked at.
    pub offset: usize,
    /// Whether a routing header still has addresses to visit: the one that checksums count is not in IP's header
    /// (RFC 8200, 8.1).
    pub is_routed: bool,
}

/// The IP header of a frame, all of which is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Network {
    /// The version of IP; the type field and the header agree about it.
    pub version: IpVersion,
    /// Where it is, in bytes from the start of the frame: after the Ethernet header and up to two VLAN tags.
    pub offset: usize,
    /// Where what it carries starts: after the options of IPv4, before the extension headers of IPv6.
    pub payload: usize,
    /// How long it says that the packet is, itself included, in bytes. Nobody has checked that.
    pub len: usize,
    /// What follows. `None`: this is a fragment, or extension headers that are not walked or not all there.
    pub next: Option<Next>,
}

impl Network {
    /// Where the source address and, right behind it, the destination address are in the frame.
    #[must_use]
    pub const fn addresses(&self) -> (usize, usize) {
        match self.version {
            IpVersion::V4 => (self.offset + 12, 8),
            IpVersion::V6 => (self.offset + 8, 32),
        }
    }
}

/// A TCP or UDP header that is all there. Offsets are in bytes from the start of the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transport {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where its header starts.
    pub offset: usize,
    /// Where its payload starts, options passed over.
    pub payload: usize,
    /// Where its payload ends; the frame may have padding after that.
    pub end: usize,
}

impl Transport {
    /// Length of header and payload together: at most what IP's length field can hold.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.end.saturating_sub(self.offset)
    }

    /// Never: there is a header.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An IP packet in a frame, with every length checked against the frame's. Offsets are in bytes from its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Headers {
    /// The version of IP; the type field and the header agree about it.
    pub version: IpVersion,
    /// Where IP's header starts: after the Ethernet header and up to two VLAN tags.
    pub network: usize,
    /// Where the IP packet ends; the frame may have padding after that.
    pub end: usize,
    /// What IP carries. `None`: neither TCP nor UDP, or not to be found or summed here: any fragment, an extension header
    /// that is not walked, addresses still to be rewritten by a routing header, or lengths that contradict each other.
    pub transport: Option<Transport>,
}

/// The frame's type field, and where what it announces starts. VLAN tags (802.1Q, 802.1ad) are passed over.
#[must_use]
pub fn ethertype(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = usize::from(ETHERNET_HEADER);
    let mut kind = be16(frame, at - 2)?;
    for _ in 0..MAX_TAGS {
        if kind != 0x8100 && kind != 0x88a8 {
            break;
        }
        at += 4;
        kind = be16(frame, at - 2)?;
    }
    Some((kind, at))
}

/// The version of IP that an Ethernet type announces.
#[must_use]
pub const fn ip_version(ethertype: u16) -> Option<IpVersion> {
    match ethertype {
        0x0800 => Some(IpVersion::V4),
        0x86dd => Some(IpVersion::V6),
        _ => None,
    }
}

/// Finds the IP header in the first bytes of a frame (128 hold every header that matters); `None` if it has none, or not
/// all of it is there.
#[must_use]
pub fn network(header: &[u8]) -> Option<Network> {
    let (kind, at) = ethertype(header)?;
    match ip_version(kind)? {
        IpVersion::V4 => network_v4(header, at),
        IpVersion::V6 => network_v6(header, at),
    }
}

fn network_v4(frame: &[u8], offset: usize) -> Option<Network> {
    let header: &[u8; 20] = frame.get(offset..)?.first_chunk()?;
    let [first, _, length_high, length_low, _, _, fragment_high, fragment_low, _, protocol, ..] =
        *header;
    let header_len = usize::from(first & 0xf) * 4;
    if first >> 4 != 4 || header_len < header.len() {
        return None;
    }
    // More fragments, or an offset: the checksum covers what is not here.
    let is_fragment = u16::from_be_bytes([fragment_high, fragment_low]) & 0x3fff != 0;
    let payload = offset + header_len;
    let next = Next { protocol, offset: payload, is_routed: false };
    Some(Network {
        version: IpVersion::V4,
        offset,
        payload,
        len: usize::from(u16::from_be_bytes([length_high, length_low])),
        next: (!is_fragment).then_some(next),
    })
}

fn network_v6(frame: &[u8], offset: usize) -> Option<Network> {
    let header: &[u8; IPV6_LEN] = frame.get(offset..)?.first_chunk()?;
    let [first, _, _, _, length_high, length_low, protocol, ..] = *header;
    if first >> 4 != 6 {
        return None;
    }
    let payload = offset + IPV6_LEN;
    Some(Network {
        version: IpVersion::V6,
        offset,
        payload,
        len: IPV6_LEN + usize::from(u16::from_be_bytes([length_high, length_low])),
        next: walk_extensions(frame, protocol, payload),
    })
}

/// The first header that is not an extension header.
fn walk_extensions(frame: &[u8], protocol: u8, offset: usize) -> Option<Next> {
    let mut next = Next { protocol, offset, is_routed: false };
    for _ in 0..=MAX_EXTENSIONS {
        match next.protocol {
            // Hop-by-hop options, routing, destination options: length in 8-byte units, the first not counted.
            0 | 43 | 60 => {
                let [after, length, _, segments_left] = *frame.get(next.offset..)?.first_chunk()?;
                next.is_routed |= next.protocol == 43 && segments_left != 0;
                next.protocol = after;
                next.offset += 8 + usize::from(length) * 8;
            }
            // A fragment.
            44 => return None,
            _ => return Some(next),
        }
    }
    None
}

/// Finds the headers of an IP packet; `None` if the frame is not one, or has not all of it.
#[must_use]
pub fn parse(frame: &[u8]) -> Option<Headers> {
    parse_first(frame, frame.len())
}

/// As [`parse`], for a frame of `len` bytes of which only the first are there: those before the transport's payload are enough.
#[must_use]
pub fn parse_first(first: &[u8], len: usize) -> Option<Headers> {
    let network = network(first)?;
    let end = network.offset.checked_add(network.len)?;
    if end < network.payload || end > len {
        return None;
    }
    let transport = network.next.filter(|next| !next.is_routed);
    Some(Headers {
        version: network.version,
        network: network.offset,
        end,
        transport: transport.and_then(|next| parse_transport(first, next, end)),
    })
}

fn parse_transport(first: &[u8], next: Next, end: usize) -> Option<Transport> {
    let Next { protocol, offset, .. } = next;
    let packet = first.get(offset..end.min(first.len()))?;
    let available = end.checked_sub(offset)?;
    let protocol = Protocol::from_number(protocol)?;
    let (header_len, length) = match protocol {
        Protocol::Tcp => {
            let header: &[u8; 20] = packet.first_chunk()?;
            let header_len = usize::from(header[12] >> 4) * 4;
            if header_len < header.len() {
                return None;
            }
            (header_len, available)
        }
        // What IP has beyond UDP's own length is not UDP's.
        Protocol::Udp => (8, usize::from(be16(packet, 4)?)),
    };
    if length > available || header_len > length || header_len > packet.len() {
        return None;
    }
    Some(Transport { protocol, offset, payload: offset + header_len, end: offset + length })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
}

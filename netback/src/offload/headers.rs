//! Where the headers of a frame are.

use netif::offload::IpVersion;

/// Length of an Ethernet header without tags.
pub const ETHERNET_LEN: usize = 14;

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

    const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }

    /// Where the checksum is in the transport header.
    pub(super) const fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
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
    let mut at = ETHERNET_LEN;
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

/// Finds the headers of an IP packet; `None` if the frame is not one, or has not all of it.
#[must_use]
pub fn parse(frame: &[u8]) -> Option<Headers> {
    match ethertype(frame)? {
        (0x0800, network) => parse_v4(frame, network),
        (0x86dd, network) => parse_v6(frame, network),
        _ => None,
    }
}

fn parse_v4(frame: &[u8], network: usize) -> Option<Headers> {
    let header: &[u8; 20] = frame.get(network..)?.first_chunk()?;
    let [first, _, length_high, length_low, _, _, fragment_high, fragment_low, _, number, ..] =
        *header;
    let header_len = usize::from(first & 0xf) * 4;
    let length = usize::from(u16::from_be_bytes([length_high, length_low]));
    let end = network.checked_add(length)?;
    if first >> 4 != 4 || header_len < header.len() || length < header_len || end > frame.len() {
        return None;
    }
    // More fragments, or an offset: the checksum covers what is not here.
    let is_fragment = u16::from_be_bytes([fragment_high, fragment_low]) & 0x3fff != 0;
    let transport = match is_fragment {
        true => None,
        false => parse_transport(frame, number, network + header_len, end),
    };
    Some(Headers { version: IpVersion::V4, network, end, transport })
}

fn parse_v6(frame: &[u8], network: usize) -> Option<Headers> {
    let header: &[u8; IPV6_LEN] = frame.get(network..)?.first_chunk()?;
    let [first, _, _, _, length_high, length_low, next, ..] = *header;
    let end = network + IPV6_LEN + usize::from(u16::from_be_bytes([length_high, length_low]));
    if first >> 4 != 6 || end > frame.len() {
        return None;
    }
    let transport = walk_extensions(frame, next, network + IPV6_LEN, end)
        .and_then(|(number, at)| parse_transport(frame, number, at, end));
    Some(Headers { version: IpVersion::V6, network, end, transport })
}

/// The number and place of the first header that is not an extension header.
fn walk_extensions(frame: &[u8], mut number: u8, mut at: usize, end: usize) -> Option<(u8, usize)> {
    for _ in 0..=MAX_EXTENSIONS {
        match number {
            // Hop-by-hop options, routing, destination options.
            0 | 43 | 60 => {
                let [next, length, _, segments_left] = *frame.get(at..end)?.first_chunk()?;
                // The checksum is for the final destination, which is not the one in IP's header (RFC 8200, 8.1).
                if number == 43 && segments_left != 0 {
                    return None;
                }
                number = next;
                at += 8 + usize::from(length) * 8;
            }
            _ => return Some((number, at)),
        }
    }
    None
}

fn parse_transport(frame: &[u8], number: u8, offset: usize, end: usize) -> Option<Transport> {
    let packet = frame.get(offset..end)?;
    let protocol = Protocol::from_number(number)?;
    let (header_len, length) = match protocol {
        Protocol::Tcp => {
            let header: &[u8; 20] = packet.first_chunk()?;
            let header_len = usize::from(header[12] >> 4) * 4;
            if header_len < header.len() {
                return None;
            }
            (header_len, packet.len())
        }
        // What IP has beyond UDP's own length is not UDP's.
        Protocol::Udp => (8, usize::from(be16(packet, 4)?)),
    };
    if length > packet.len() || header_len > length {
        return None;
    }
    Some(Transport { protocol, offset, payload: offset + header_len, end: offset + length })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
}

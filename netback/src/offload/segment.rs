//! TCP segmentation: one packet of up to 64 KiB becomes several that fit the link, as a card with the offload would have
//! sent them (Linux `tcp_gso_segment`, `inet_gso_segment`, `ipv6_gso_segment`).

use netif::offload::IpVersion;

use super::checksum::{self, Fill, Sum};
use netif::headers::{self, Headers, Protocol, Transport};

/// The smallest segment size taken (Linux `TCP_MIN_GSO_SIZE`): a packet of one-byte segments would cost its receiver
/// 65,000 headers.
pub const MIN_GSO_SIZE: u16 = 8;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

const IPV6_LEN: usize = 40;

/// A large TCP packet, checked and ready to be cut.
#[derive(Clone, Copy, Debug)]
pub struct Segments<'a> {
    /// Everything before the payload.
    template: &'a [u8],
    /// What is cut.
    payload: &'a [u8],
    size: usize,
    headers: Headers,
    transport: Transport,
    /// Of the first segment.
    id: u16,
    sequence: u32,
    flags: u8,
    pseudo: Sum,
}

/// Prepares to cut `frame` into segments with at most `gso_size` bytes of payload each. `None` if it is not a whole TCP
/// packet, has less payload than one segment, or `gso_size` is below [`MIN_GSO_SIZE`].
#[must_use]
pub fn segments(frame: &[u8], gso_size: u16) -> Option<Segments<'_>> {
    let headers = headers::parse(frame)?;
    let transport = headers.transport?;
    let (template, _) = frame.split_at_checked(transport.payload)?;
    let payload = frame.get(transport.payload..transport.end)?;
    let size = usize::from(gso_size);
    if transport.protocol != Protocol::Tcp || gso_size < MIN_GSO_SIZE || size > payload.len() {
        return None;
    }
    Some(Segments {
        template,
        payload,
        size,
        headers,
        transport,
        id: u16::from_be_bytes(read(frame, headers.network + 4)?),
        sequence: u32::from_be_bytes(read(frame, transport.offset + 4)?),
        flags: u8::from_be_bytes(read(frame, transport.offset + 13)?),
        pseudo: checksum::pseudo(frame, &headers, transport.protocol)?,
    })
}

impl Segments<'_> {
    /// How many segments there are; at least one, and at most 8,192.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.payload.len().div_ceil(self.size)
    }

    /// Length in bytes of the longest segment's frame; all but the last are of this length.
    #[must_use]
    pub const fn max_len(&self) -> usize {
        self.template.len() + self.size
    }

    /// Writes segment `index`, a complete frame without padding, at the start of `out`, and returns its length in bytes.
    /// `None` if there is no such segment, or `out` is too short for it; `out` may have been written to.
    ///
    /// Every segment has the packet's headers, options included, but for lengths and checksums; the sequence number and
    /// IPv4's identification count on; FIN and PSH are on the last only, CWR on the first only (RFC 3168, 6.1.2).
    #[must_use]
    pub fn write(&self, index: usize, fill: Fill, out: &mut [u8]) -> Option<usize> {
        let start = index.checked_mul(self.size)?;
        let rest = self.payload.get(start..).filter(|rest| !rest.is_empty())?;
        let (data, after) = rest.split_at_checked(self.size).unwrap_or((rest, &[]));
        let length = self.template.len() + data.len();
        let out = out.get_mut(..length)?;
        let (head, body) = out.split_at_mut_checked(self.template.len())?;
        head.copy_from_slice(self.template);
        body.copy_from_slice(data);
        self.write_network(index, head, length)?;

        let offset = self.transport.offset;
        let advanced = u32::try_from(start).ok()?;
        put(head, offset + 4, self.sequence.wrapping_add(advanced).to_be_bytes())?;
        let mut flags = self.flags;
        if !after.is_empty() {
            flags &= !(FIN | PSH);
        }
        if index > 0 {
            flags &= !CWR;
        }
        put(head, offset + 13, [flags])?;
        put(head, offset + Protocol::Tcp.checksum_offset(), [0; 2])?;
        let pseudo = self.pseudo.add_u32(u32::try_from(length - offset).ok()?);
        let value = match fill {
            Fill::Complete => pseudo.add(out.get(offset..)?).finish(),
            Fill::Blank => pseudo.fold(),
        };
        put(out, offset + Protocol::Tcp.checksum_offset(), value)?;
        Some(length)
    }

    /// Fills in IP's header for segment `index`, whose frame is `length` long.
    fn write_network(&self, index: usize, head: &mut [u8], length: usize) -> Option<()> {
        let network = self.headers.network;
        match self.headers.version {
            IpVersion::V4 => {
                let total = u16::try_from(length - network).ok()?;
                put(head, network + 2, total.to_be_bytes())?;
                let id = self.id.wrapping_add(u16::try_from(index).ok()?);
                put(head, network + 4, id.to_be_bytes())?;
                put(head, network + 10, [0; 2])?;
                let checksum =
                    Sum::default().add(head.get(network..self.transport.offset)?).finish();
                put(head, network + 10, checksum)
            }
            IpVersion::V6 => {
                let payload = u16::try_from(length - network - IPV6_LEN).ok()?;
                put(head, network + 4, payload.to_be_bytes())
            }
        }
    }
}

fn read<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value;
    Some(())
}

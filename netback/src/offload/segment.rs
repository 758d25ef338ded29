//! TCP segmentation: one packet of up to 64 KiB becomes several that fit the link, as a card with the offload would have
//! sent them (Linux `tcp_gso_segment`, `inet_gso_segment`, `ipv6_gso_segment`).

use core::ops::Range;

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

/// A large TCP packet, checked and ready to be cut; its payload may be anywhere.
#[derive(Clone, Copy, Debug)]
pub struct Cut<'a> {
    /// Everything before the payload.
    template: &'a [u8],
    size: usize,
    headers: Headers,
    transport: Transport,
    /// Of the first segment.
    id: u16,
    sequence: u32,
    flags: u8,
    pseudo: Sum,
}

/// Prepares to cut a frame of `len` bytes, of which `first` holds at least the headers, into segments with at most `gso_size`
/// bytes of payload each. `None` if it is not a whole TCP packet, has less payload than one segment, or `gso_size` is below
/// [`MIN_GSO_SIZE`].
#[must_use]
pub fn cut(first: &[u8], len: usize, gso_size: u16) -> Option<Cut<'_>> {
    let headers = headers::parse_first(first, len)?;
    let transport = headers.transport?;
    let (template, _) = first.split_at_checked(transport.payload)?;
    let payload = transport.end.checked_sub(transport.payload)?;
    let size = usize::from(gso_size);
    if transport.protocol != Protocol::Tcp || gso_size < MIN_GSO_SIZE || size > payload {
        return None;
    }
    Some(Cut {
        template,
        size,
        headers,
        transport,
        id: u16::from_be_bytes(read(first, headers.network + 4)?),
        sequence: u32::from_be_bytes(read(first, transport.offset + 4)?),
        flags: u8::from_be_bytes(read(first, transport.offset + 13)?),
        pseudo: checksum::pseudo(first, &headers, transport.protocol)?,
    })
}

impl Cut<'_> {
    /// How many segments there are; at least one, and at most 8,192.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.transport.end.saturating_sub(self.transport.payload).div_ceil(self.size)
    }

    /// Length in bytes of the longest segment's frame; all but the last are of this length.
    #[must_use]
    pub const fn max_len(&self) -> usize {
        self.template.len() + self.size
    }

    /// Where TCP's header is, in bytes from the start of the frame.
    #[must_use]
    pub const fn transport(&self) -> usize {
        self.transport.offset
    }

    /// Where the payload begins, in bytes from the start of the frame: each segment has so many of headers,
    #[must_use]
    pub const fn start(&self) -> usize {
        self.transport.payload
    }

    /// and where it ends; there may be padding behind it.
    #[must_use]
    pub const fn end(&self) -> usize {
        self.transport.end
    }

    /// The IP that it goes by.
    #[must_use]
    pub const fn version(&self) -> IpVersion {
        self.headers.version
    }

    /// Where the payload of segment `index` is in the frame. `None` if there is no such segment.
    #[must_use]
    pub fn payload(&self, index: usize) -> Option<Range<usize>> {
        let start = index.checked_mul(self.size)?.checked_add(self.transport.payload)?;
        (start < self.transport.end).then(|| start..self.transport.end.min(start + self.size))
    }

    /// Writes the headers of segment `index` at the start of `out`. Its checksum is filled in with the sum of its payload, if
    /// there is one, and left blank otherwise. `None` if there is no such segment, or `out` is too short for them.
    ///
    /// Every segment has the packet's headers, options included, but for lengths and checksums; the sequence number and
    /// IPv4's identification count on; FIN and PSH are on the last only, CWR on the first only (RFC 3168, 6.1.2).
    #[must_use]
    pub(crate) fn write_head(
        &self,
        index: usize,
        payload: Option<Sum>,
        out: &mut [u8],
    ) -> Option<()> {
        let data = self.payload(index)?;
        let head = out.get_mut(..self.template.len())?;
        head.copy_from_slice(self.template);
        let length = head.len() + data.len();
        self.write_network(index, head, length)?;

        let offset = self.transport.offset;
        let advanced = u32::try_from(data.start - self.transport.payload).ok()?;
        put(head, offset + 4, self.sequence.wrapping_add(advanced).to_be_bytes())?;
        let mut flags = self.flags;
        if data.end < self.transport.end {
            flags &= !(FIN | PSH);
        }
        if index > 0 {
            flags &= !CWR;
        }
        put(head, offset + 13, [flags])?;
        put(head, offset + Protocol::Tcp.checksum_offset(), [0; 2])?;
        let pseudo = self.pseudo.add_u32(u32::try_from(length - offset).ok()?);
        let value = match payload {
            // A TCP header is of words of 32 bits.
            Some(payload) => pseudo.add(head.get(offset..)?).then(payload, false).finish(),
            None => pseudo.fold(),
        };
        put(head, offset + Protocol::Tcp.checksum_offset(), value)
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

/// A large TCP packet that is all in one place, checked and ready to be cut.
#[derive(Clone, Copy, Debug)]
pub struct Segments<'a> {
    cut: Cut<'a>,
    frame: &'a [u8],
}

/// As [`cut`], of a frame that is all there.
#[must_use]
pub fn segments(frame: &[u8], gso_size: u16) -> Option<Segments<'_>> {
    Some(Segments { cut: cut(frame, frame.len(), gso_size)?, frame })
}

impl Segments<'_> {
    /// See [`Cut::count`].
    #[must_use]
    pub const fn count(&self) -> usize {
        self.cut.count()
    }

    /// See [`Cut::max_len`].
    #[must_use]
    pub const fn max_len(&self) -> usize {
        self.cut.max_len()
    }

    /// Writes segment `index`, a complete frame without padding, at the start of `out`, and returns its length in bytes.
    /// `None` if there is no such segment, or `out` is too short for it; `out` may have been written to.
    #[must_use]
    pub fn write(&self, index: usize, fill: Fill, out: &mut [u8]) -> Option<usize> {
        let data = self.frame.get(self.cut.payload(index)?)?;
        let out = out.get_mut(..self.cut.start() + data.len())?;
        let (head, body) = out.split_at_mut_checked(self.cut.start())?;
        body.copy_from_slice(data);
        let sum = (fill == Fill::Complete).then(|| Sum::default().add(data));
        self.cut.write_head(index, sum, head)?;
        Some(out.len())
    }
}

fn read<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value;
    Some(())
}

//! The Internet checksum of TCP and UDP (RFC 1071).

use core::ops::Range;

use netif::offload::IpVersion;

use netif::headers::{self, Headers, Protocol, Transport};

/// What a checksum field is left with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fill {
    /// The checksum: for a receiver that checks it.
    Complete,
    /// The sum over the pseudo-header alone, not inverted (Linux `CHECKSUM_PARTIAL`): for a receiver that was told, by
    /// the slot's `csum_blank`.
    Blank,
}

/// A one's complement sum of 16-bit words as they are in memory: whichever end comes first, the bytes of the result
/// come out in the order of the packet (RFC 1071, 2 B). Two sums add up if the first is over an even number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Sum(u64);

impl Sum {
    /// The sum of this and `bytes`; at the end of an odd number of them a zero is thought.
    pub(crate) fn add(self, bytes: &[u8]) -> Self {
        // Eight bytes at a time. Carries gather in the upper half, which has room for 2^31 steps.
        let (words, tail) = bytes.as_chunks::<8>();
        let sum = words.iter().fold(self.0, |sum, word| {
            let word = u64::from_ne_bytes(*word);
            sum.wrapping_add(word & 0xffff_ffff).wrapping_add(word >> 32)
        });
        let mut last = [0; 8];
        for (to, from) in last.iter_mut().zip(tail) {
            *to = *from;
        }
        let last = u64::from_ne_bytes(last);
        let sum = sum.wrapping_add(last & 0xffff_ffff).wrapping_add(last >> 32);
        Self((sum & 0xffff_ffff).wrapping_add(sum >> 32))
    }

    /// The sum of this and a number, as it would be in the packet.
    pub(super) fn add_u32(self, value: u32) -> Self {
        self.add(&value.to_be_bytes())
    }

    /// The sum of this and of what is behind it, at an odd place or at an even one.
    pub(crate) fn then(self, behind: Self, at_odd: bool) -> Self {
        let [first, second] = behind.fold();
        self.add(&if at_odd { [second, first] } else { [first, second] })
    }

    /// The two bytes of the sum, not inverted.
    pub(super) fn fold(self) -> [u8; 2] {
        let mut sum = self.0;
        for _ in 0..4 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        let [.., a, b] = sum.to_be_bytes();
        u16::from_be_bytes([a, b]).to_ne_bytes()
    }

    /// The two bytes of the checksum: the sum inverted.
    pub(crate) fn finish(self) -> [u8; 2] {
        self.fold().map(|byte| !byte)
    }
}

/// The pseudo-header's sum, all but its length field (RFC 9293, 3.1; RFC 8200, 8.1).
pub(super) fn pseudo(frame: &[u8], headers: &Headers, protocol: Protocol) -> Option<Sum> {
    let (first, length) = match headers.version {
        IpVersion::V4 => (12, 8),
        IpVersion::V6 => (8, 32),
    };
    let addresses = frame.get(headers.network..)?.get(first..)?.get(..length)?;
    Some(Sum::default().add(addresses).add_u32(u32::from(protocol.number())))
}

/// The transport of a frame of `len` bytes, and the whole pseudo-header's sum.
fn locate(first: &[u8], len: usize) -> Option<(Headers, Transport, Sum)> {
    let headers = headers::parse_first(first, len)?;
    let transport = headers.transport?;
    let length = u32::try_from(transport.len()).ok()?;
    Some((headers, transport, pseudo(first, &headers, transport.protocol)?.add_u32(length)))
}

fn field(frame: &mut [u8], transport: Transport) -> Option<&mut [u8; 2]> {
    frame.get_mut(transport.offset + transport.protocol.checksum_offset()..)?.first_chunk_mut()
}

/// Fills in the checksum of a TCP or UDP packet, whatever its field has now. False, and nothing changed, if
/// [`headers::parse`] finds no transport.
#[must_use]
pub fn complete(frame: &mut [u8]) -> bool {
    let len = frame.len();
    complete_first(frame, len, |_| Sum::default())
}

/// As [`complete`], for a frame of `len` bytes of which `first` are here; `rest` sums up a range of the others.
#[must_use]
pub(crate) fn complete_first(
    first: &mut [u8],
    len: usize,
    rest: impl FnOnce(Range<usize>) -> Sum,
) -> bool {
    try_complete(first, len, rest).is_some()
}

fn try_complete(
    first: &mut [u8],
    len: usize,
    rest: impl FnOnce(Range<usize>) -> Sum,
) -> Option<()> {
    let (_, transport, sum) = locate(first, len)?;
    let here = transport.end.min(first.len());
    *field(first, transport)? = [0; 2];
    let mut sum = sum.add(first.get(transport.offset..here)?);
    if here < transport.end {
        sum = sum.then(rest(here..transport.end), (here - transport.offset) % 2 != 0);
    }
    *field(first, transport)? = match (transport.protocol, sum.finish()) {
        // RFC 768: zero would mean that there is none.
        (Protocol::Udp, [0, 0]) => [0xff; 2],
        (_, checksum) => checksum,
    };
    Some(())
}

/// Leaves the checksum of a TCP or UDP packet blank, as [`Fill::Blank`] has it. False, and nothing changed, if
/// [`headers::parse`] finds no transport.
#[must_use]
pub fn blank(frame: &mut [u8]) -> bool {
    locate(frame, frame.len())
        .and_then(|(_, transport, sum)| field(frame, transport).map(|field| *field = sum.fold()))
        .is_some()
}

/// Whether a frame is a TCP or UDP packet with the right checksum, or without one where UDP over IPv4 allows it.
#[must_use]
pub fn is_valid(frame: &[u8]) -> bool {
    let verdict = || {
        let (headers, transport, sum) = locate(frame, frame.len())?;
        let packet = frame.get(transport.offset..transport.end)?;
        if transport.protocol == Protocol::Udp && packet.get(6..8)? == [0; 2] {
            return Some(headers.version == IpVersion::V4);
        }
        Some(sum.add(packet).finish() == [0; 2])
    };
    verdict() == Some(true)
}

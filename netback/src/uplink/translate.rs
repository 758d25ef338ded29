//! What a card says of a frame, and what netif says of a packet.
//!
//! Linux translates so, too (include/linux/virtio_net.h, `virtio_net_hdr_to_skb`, `virtio_net_hdr_from_skb`).

use core::num::NonZeroU16;

use netif::headers::{self, Protocol};
use netif::offload::{Checksum, Gso, IpVersion};

use super::card::Offers;
use super::header::{GsoType, HeaderFlags, NetHeader};
use crate::offload::checksum::{Sum, blank};
use crate::offload::segment::{Cut, cut};

/// Which offload a packet that is to be cut needs.
pub(super) const fn segments(version: IpVersion) -> Offers {
    match version {
        IpVersion::V4 => Offers::TSO4,
        IpVersion::V6 => Offers::TSO6,
    }
}

impl NetHeader {
    /// Has the card fill in a checksum.
    const fn needs_checksum(start: u16, protocol: Protocol) -> Self {
        Self {
            flags: HeaderFlags::NEEDS_CSUM,
            gso_type: GsoType::NONE,
            hdr_len: 0,
            gso_size: 0,
            csum_start: start,
            csum_offset: protocol.checksum_offset() as u16,
            num_buffers: 0,
        }
    }

    /// Has the card fill in the checksum of a frame of `len` bytes, of which `first` are at hand. `None` if it would not find what
    /// it is to sum up: it takes all to the end of the frame.
    pub(super) fn checksum(first: &[u8], len: usize) -> Option<Self> {
        let transport = headers::parse_first(first, len)?.transport?;
        if transport.end != len {
            return None;
        }
        Some(Self::needs_checksum(u16::try_from(transport.offset).ok()?, transport.protocol))
    }

    /// Has the card fill in the checksum of each segment.
    pub(super) fn checksums(cut: &Cut<'_>) -> Option<Self> {
        Some(Self::needs_checksum(u16::try_from(cut.transport()).ok()?, Protocol::Tcp))
    }

    /// Has the card cut a packet of `len` bytes. `None` if it has more bytes than are to be cut.
    pub(super) fn segmentation(cut: &Cut<'_>, gso: Gso, len: usize) -> Option<Self> {
        if cut.end() != len {
            return None;
        }
        Some(Self {
            gso_type: match gso.version {
                IpVersion::V4 => GsoType::TCPV4,
                IpVersion::V6 => GsoType::TCPV6,
            },
            hdr_len: u16::try_from(cut.start()).ok()?,
            gso_size: gso.size.get(),
            ..Self::checksums(cut)?
        })
    }
}

/// What a card's word on a frame comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Meaning {
    pub(super) checksum: Checksum,
    pub(super) gso: Option<Gso>,
    /// A checksum was filled in, as only the card knew where it belonged.
    pub(super) completed: bool,
}

/// What the card says of a frame makes no sense, or was never agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct BadHeader;

/// Reads what a card says of a frame, all of which is here, and puts into the frame what netif has no word for.
pub(super) fn read(
    header: NetHeader,
    offers: Offers,
    frame: &mut [u8],
) -> Result<Meaning, BadHeader> {
    let flags = header.flags;
    let agreed = offers.contains(Offers::RX_CSUM);
    if !agreed && flags.intersects(HeaderFlags::NEEDS_CSUM | HeaderFlags::DATA_VALID) {
        return Err(BadHeader);
    }
    let asked = asked(header, offers)?;
    let mut completed = false;
    let sums = flags.difference(HeaderFlags::RSC_INFO);
    let mut checksum = if sums.contains(HeaderFlags::NEEDS_CSUM) {
        if flags.contains(HeaderFlags::RSC_INFO) {
            return Err(BadHeader);
        }
        let place = (header.csum_start, header.csum_offset);
        if is_transports(place, frame) {
            Checksum::Blank
        } else if asked.is_none() && complete_at(place, frame).is_some() {
            completed = true;
            Checksum::Validated
        } else {
            return Err(BadHeader);
        }
    } else if sums.contains(HeaderFlags::DATA_VALID) {
        Checksum::Validated
    } else {
        Checksum::Unverified
    };
    let gso = match asked {
        Some(gso) => cuttable(gso, &mut checksum, frame)?,
        None => None,
    };
    Ok(Meaning { checksum, gso, completed })
}

/// How the card says that a frame was put together.
fn asked(header: NetHeader, offers: Offers) -> Result<Option<Gso>, BadHeader> {
    // Whether CWR is on the first segment alone is ours to see to, whatever the bit says.
    let (version, offer) = match GsoType(header.gso_type.0 & !GsoType::ECN.0) {
        GsoType::NONE => return Ok(None),
        GsoType::TCPV4 => (IpVersion::V4, Offers::RX_TSO4),
        GsoType::TCPV6 => (IpVersion::V6, Offers::RX_TSO6),
        _ => return Err(BadHeader),
    };
    let size = NonZeroU16::new(header.gso_size).filter(|_| offers.contains(offer));
    Ok(Some(Gso { size: size.ok_or(BadHeader)?, version }))
}

/// Whether a checksum is where TCP or UDP has it, so that "blank" says all.
fn is_transports((start, offset): (u16, u16), frame: &[u8]) -> bool {
    let transport = headers::parse(frame).and_then(|headers| headers.transport);
    transport.is_some_and(|transport| {
        transport.offset == usize::from(start)
            && transport.protocol.checksum_offset() == usize::from(offset)
    })
}

/// Fills in a checksum where the card says, over all that follows. `None` if that is not in the frame.
fn complete_at((start, offset): (u16, u16), frame: &mut [u8]) -> Option<()> {
    let summed = frame.get_mut(usize::from(start)..)?;
    let value = Sum::default().add(summed).finish();
    let field: &mut [u8; 2] = summed.get_mut(usize::from(offset)..)?.first_chunk_mut()?;
    // Zero would mean that there is none, where it means anything.
    *field = if value == [0; 2] { [0xff; 2] } else { value };
    Some(())
}

/// Whether a packet can be cut as it says; one that is no longer than a segment need not be.
fn cuttable(gso: Gso, checksum: &mut Checksum, frame: &mut [u8]) -> Result<Option<Gso>, BadHeader> {
    let found = headers::parse(frame).filter(|headers| headers.version == gso.version);
    let transport = found.and_then(|headers| headers.transport).ok_or(BadHeader)?;
    if transport.protocol != Protocol::Tcp {
        return Err(BadHeader);
    }
    if transport.end - transport.payload <= usize::from(gso.size.get()) {
        return Ok(None);
    }
    cut(frame, frame.len(), gso.size.get()).ok_or(BadHeader)?;
    // What is to be cut has a blank checksum, and what it was put together from was found right.
    if *checksum != Checksum::Blank && !blank(frame) {
        return Err(BadHeader);
    }
    *checksum = Checksum::Blank;
    Ok(Some(gso))
}

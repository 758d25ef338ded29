//! Making a packet fit for where it goes: what a frontend cannot do for itself is done for it.

use hypercall::{Hypervisor, Instant};
use netif::headers;
use netif::keys::Features;
use netif::offload::{Checksum, Gso, IpVersion};

use crate::offload::checksum::Fill;
use crate::offload::{checksum, segment};
use crate::packet::{Packet, Pools};

/// Segments one packet may be cut into: 64 KiB into the smallest that IP lets TCP count on, 536 bytes. A guest that asks
/// for smaller ones would have a buffer spent on every few bytes.
const MAX_SEGMENTS: usize = 128;

/// What became of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fit {
    /// It was handed on, in one piece or in several.
    Done,
    /// Its frontend cannot take it, and it cannot be cut.
    TooBig,
    /// There were not buffers enough for the pieces.
    NoBuffer,
}

/// What a frontend takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taker {
    /// What it has agreed to.
    pub(crate) features: Features,
    /// Bytes in a page of its, behind what it wants left free.
    pub(crate) room: usize,
}

impl Taker {
    /// Whether a packet of so many bytes is not too large for it.
    fn holds(self, len: usize) -> bool {
        len <= self.room || self.features.contains(Features::SG)
    }
}

/// Hands a packet on in a form that a frontend takes.
pub(crate) fn fit<H: Hypervisor>(
    mut packet: Packet<H>,
    to: Taker,
    pools: &Pools<H>,
    now: Instant,
    mut enqueue: impl FnMut(Packet<H>),
) -> Fit {
    if let Some(gso) = packet.gso {
        if to.features.contains(gso_feature(gso) | Features::SG) {
            enqueue(packet);
            return Fit::Done;
        }
        return cut(&packet, gso, to, pools, now, enqueue);
    }
    if !to.holds(packet.len()) {
        return Fit::TooBig;
    }
    if packet.checksum == Checksum::Blank && !takes_blank(packet.bytes(), to.features) {
        // One that cannot be found is left as it is, for the receiver to judge.
        if checksum::complete(packet.bytes_mut()) {
            packet.checksum = Checksum::Validated;
        }
    }
    enqueue(packet);
    Fit::Done
}

/// Whether [`fit`] would hand the packet on in one piece and unchanged; its headers are enough to tell.
pub(crate) fn takes_as_is<H: Hypervisor>(packet: &Packet<H>, to: Taker) -> bool {
    if let Some(gso) = packet.gso {
        return to.features.contains(gso_feature(gso) | Features::SG);
    }
    let sums = packet.checksum != Checksum::Blank || takes_blank(packet.bytes(), to.features);
    sums && to.holds(packet.len())
}

const fn gso_feature(gso: Gso) -> Features {
    match gso.version {
        IpVersion::V4 => Features::GSO_TCPV4,
        IpVersion::V6 => Features::GSO_TCPV6,
    }
}

/// Of a packet that is not whole this sees the headers, so the length in them cannot be held against it.
fn takes_blank(header: &[u8], features: Features) -> bool {
    match headers::network(header).map(|found| found.version) {
        Some(IpVersion::V4) => features.contains(Features::IPV4_CSUM),
        Some(IpVersion::V6) => features.contains(Features::IPV6_CSUM),
        None => false,
    }
}

fn cut<H: Hypervisor>(
    packet: &Packet<H>,
    gso: Gso,
    to: Taker,
    pools: &Pools<H>,
    now: Instant,
    mut enqueue: impl FnMut(Packet<H>),
) -> Fit {
    let Some(segments) = segment::segments(packet.bytes(), gso.size.get()) else {
        return Fit::TooBig;
    };
    if segments.count() > MAX_SEGMENTS || !to.holds(segments.max_len()) {
        return Fit::TooBig;
    }
    let (fill, checksum) = if takes_blank(packet.bytes(), to.features) {
        (Fill::Blank, Checksum::Blank)
    } else {
        (Fill::Complete, Checksum::Validated)
    };
    for index in 0..segments.count() {
        let Some(mut piece) = pools.packet(segments.max_len(), now) else { return Fit::NoBuffer };
        let Some(len) = segments.write(index, fill, piece.bytes_mut()) else { return Fit::TooBig };
        piece.set_len(len);
        piece.checksum = checksum;
        piece.flow = packet.flow;
        enqueue(piece);
    }
    Fit::Done
}

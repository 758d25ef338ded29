//! Making a packet fit for where it goes: what a frontend cannot do for itself is done for it.

use hypercall::{Hypervisor, Instant, PAGE_SIZE};
use netif::keys::Features;
use netif::offload::{Checksum, Gso, IpVersion};

use crate::offload::checksum::Fill;
use crate::offload::{checksum, headers, segment};
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

/// Hands a packet on in a form that a frontend with `features` takes.
pub(crate) fn fit<H: Hypervisor>(
    mut packet: Packet<H>,
    features: Features,
    pools: &Pools<H>,
    now: Instant,
    mut enqueue: impl FnMut(Packet<H>),
) -> Fit {
    if let Some(gso) = packet.gso {
        if features.contains(gso_feature(gso) | Features::SG) {
            enqueue(packet);
            return Fit::Done;
        }
        return cut(&packet, gso, features, pools, now, enqueue);
    }
    if packet.len() > PAGE_SIZE && !features.contains(Features::SG) {
        return Fit::TooBig;
    }
    if packet.checksum == Checksum::Blank && !takes_blank(packet.bytes(), features) {
        // One that cannot be found is left as it is, for the receiver to judge.
        if checksum::complete(packet.bytes_mut()) {
            packet.checksum = Checksum::Validated;
        }
    }
    enqueue(packet);
    Fit::Done
}

/// Whether [`fit`] would hand the packet on in one piece and unchanged; its headers are enough to tell.
pub(crate) fn takes_as_is<H: Hypervisor>(packet: &Packet<H>, features: Features) -> bool {
    if let Some(gso) = packet.gso {
        return features.contains(gso_feature(gso) | Features::SG);
    }
    let fits = packet.len() <= PAGE_SIZE || features.contains(Features::SG);
    fits && (packet.checksum != Checksum::Blank || takes_blank(packet.bytes(), features))
}

const fn gso_feature(gso: Gso) -> Features {
    match gso.version {
        IpVersion::V4 => Features::GSO_TCPV4,
        IpVersion::V6 => Features::GSO_TCPV6,
    }
}

fn takes_blank(frame: &[u8], features: Features) -> bool {
    match headers::parse(frame).map(|found| found.version) {
        Some(IpVersion::V4) => features.contains(Features::IPV4_CSUM),
        Some(IpVersion::V6) => features.contains(Features::IPV6_CSUM),
        None => false,
    }
}

fn cut<H: Hypervisor>(
    packet: &Packet<H>,
    gso: Gso,
    features: Features,
    pools: &Pools<H>,
    now: Instant,
    mut enqueue: impl FnMut(Packet<H>),
) -> Fit {
    let Some(segments) = segment::segments(packet.bytes(), gso.size.get()) else {
        return Fit::TooBig;
    };
    if segments.count() > MAX_SEGMENTS || segments.max_len() > PAGE_SIZE {
        return Fit::TooBig;
    }
    let (fill, checksum) = if takes_blank(packet.bytes(), features) {
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

//! Making a packet fit for where it goes: what a frontend cannot do for itself is done for it.

use hypercall::{Hypervisor, Instant, PAGE_SIZE};
use netif::keys::Features;
use netif::offload::{Checksum, Gso, IpVersion};

use crate::offload::{checksum, headers, segment};
use crate::packet::{Packet, Pools};

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
        return cut(&packet, gso, pools, now, enqueue);
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

const fn gso_feature(gso: Gso) -> Features {
    match gso.version {
        IpVersion::V4 => Features::GSO_TCPV4,
        IpVersion::V6 => Features::GSO_TCPV6,
    }
}

fn takes_blank(frame: &[u8], features: Features) -> bool {
    match headers::parse(frame).map(|found| found.version) {
        Some(headers::Version::V4) => features.contains(Features::IPV4_CSUM),
        Some(headers::Version::V6) => features.contains(Features::IPV6_CSUM),
        None => false,
    }
}

fn cut<H: Hypervisor>(
    packet: &Packet<H>,
    gso: Gso,
    pools: &Pools<H>,
    now: Instant,
    mut enqueue: impl FnMut(Packet<H>),
) -> Fit {
    let Some(segments) = segment::segments(packet.bytes(), gso.size.get()) else {
        return Fit::TooBig;
    };
    for index in 0..segments.count() {
        let Some(mut piece) = pools.packet(PAGE_SIZE, now) else { return Fit::NoBuffer };
        let written = segments.write(index, checksum::Checksum::Complete, piece.bytes_mut());
        let Some(len) = written else { return Fit::TooBig };
        piece.set_len(len);
        piece.checksum = Checksum::Validated;
        piece.flow = packet.flow;
        enqueue(piece);
    }
    Fit::Done
}

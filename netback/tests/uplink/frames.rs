//! Frames, and what is to become of them, worked out in the plainest way.

use std::num::NonZeroU16;

use netback::uplink::{GsoType, HeaderFlags, NetHeader};
use netfront::Meta;
use netif::offload::{Checksum, Gso, IpVersion};

pub const OUTSIDE: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// The one's complement sum of the words of all parts, each of which begins at an even place.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for pair in parts.iter().flat_map(|part| part.chunks(2)) {
        sum += u32::from(pair[0]) * 256 + u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tcp,
    Udp,
}

/// An IP packet in a frame.
#[derive(Clone, Debug)]
pub struct Ip {
    pub version: IpVersion,
    pub kind: Kind,
    /// Bytes of TCP options.
    pub options: usize,
    pub tag: bool,
    pub payload: usize,
    /// Bytes behind it.
    pub padding: usize,
    pub seed: u8,
}

impl Ip {
    pub fn new(version: IpVersion, kind: Kind, payload: usize) -> Self {
        Self { version, kind, options: 12, tag: false, payload, padding: 0, seed: 3 }
    }

    fn network(&self) -> usize {
        if self.tag { 18 } else { 14 }
    }

    pub fn transport(&self) -> usize {
        self.network() + if self.version == IpVersion::V4 { 20 } else { 40 }
    }

    fn header(&self) -> usize {
        if self.kind == Kind::Tcp { 20 + self.options } else { 8 }
    }

    pub fn body(&self) -> usize {
        self.transport() + self.header()
    }

    fn field(&self) -> usize {
        self.transport() + if self.kind == Kind::Tcp { 16 } else { 6 }
    }

    fn pseudo(&self, frame: &[u8], len: usize) -> u16 {
        let protocol: u16 = if self.kind == Kind::Tcp { 6 } else { 17 };
        let from = self.network() + if self.version == IpVersion::V4 { 12 } else { 8 };
        sum(&[&frame[from..self.transport()], &protocol.to_be_bytes(), &(len as u16).to_be_bytes()])
    }

    /// The frame as it leaves a sender that leaves the checksum to others.
    pub fn blank(&self, dst: [u8; 6], src: [u8; 6]) -> Vec<u8> {
        let mut frame = [dst, src].concat();
        if self.tag {
            frame.extend([0x81, 0, 0, 7]);
        }
        let len = (self.header() + self.payload) as u16;
        let protocol = if self.kind == Kind::Tcp { 6 } else { 17 };
        match self.version {
            IpVersion::V4 => {
                frame.extend([8, 0, 0x45, 0]);
                frame.extend((20 + len).to_be_bytes());
                frame.extend([0xff, 0xfe, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 2, 2]);
            }
            IpVersion::V6 => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend(len.to_be_bytes());
                frame.extend([protocol, 64, 0xfd, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]);
                frame.extend([15, 0xfd, 0xff, 0xfe, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
            }
        }
        frame.extend([0x12, 0x34, 0, 80]);
        if self.kind == Kind::Tcp {
            frame.extend([0xff, 0xff, 0xf0, 0, 0, 0, 0, 9]);
            frame.extend([((5 + self.options / 4) << 4) as u8, 0x99, 0xff, 0, 0, 0, 0, 0]);
            frame.extend(vec![1; self.options]);
        } else {
            frame.extend(len.to_be_bytes());
            frame.extend([0, 0]);
        }
        assert_eq!(frame.len(), self.body());
        let mut state = u32::from(self.seed);
        frame.extend((0..self.payload).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        }));
        self.sum_ip(&mut frame);
        let pseudo = self.pseudo(&frame, len.into());
        let field = self.field();
        frame[field..field + 2].copy_from_slice(&pseudo.to_be_bytes());
        frame.extend(vec![0xa5; self.padding]);
        frame
    }

    fn sum_ip(&self, frame: &mut [u8]) {
        if self.version == IpVersion::V4 {
            let at = self.network();
            frame[at + 10..at + 12].fill(0);
            let value = !sum(&[&frame[at..at + 20]]);
            frame[at + 10..at + 12].copy_from_slice(&value.to_be_bytes());
        }
    }

    /// The same with its checksum.
    pub fn complete(&self, mut frame: Vec<u8>) -> Vec<u8> {
        let end = frame.len() - self.padding;
        let (at, field) = (self.transport(), self.field());
        frame[field..field + 2].fill(0);
        let pseudo = self.pseudo(&frame, end - at).to_be_bytes();
        let value = !sum(&[&pseudo, &frame[at..end]]);
        let value = if value == 0 && self.kind == Kind::Udp { 0xffff } else { value };
        frame[field..field + 2].copy_from_slice(&value.to_be_bytes());
        frame
    }

    /// What a card makes of it that cuts it.
    pub fn cut(&self, frame: &[u8], size: usize) -> Vec<Vec<u8>> {
        let (network, at, body) = (self.network(), self.transport(), self.body());
        let payload = &frame[body..frame.len() - self.padding];
        let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        let first = number(&frame[at + 4..at + 8]);
        let count = payload.len().div_ceil(size);
        let pieces = payload.chunks(size).enumerate().map(|(index, data)| {
            let mut out = [&frame[..body], data].concat();
            let len = out.len();
            match self.version {
                IpVersion::V4 => {
                    let total = (len - network) as u16;
                    out[network + 2..network + 4].copy_from_slice(&total.to_be_bytes());
                    let id = u16::from_be_bytes([frame[network + 4], frame[network + 5]]);
                    let id = id.wrapping_add(index as u16);
                    out[network + 4..network + 6].copy_from_slice(&id.to_be_bytes());
                }
                IpVersion::V6 => {
                    let total = (len - network - 40) as u16;
                    out[network + 4..network + 6].copy_from_slice(&total.to_be_bytes());
                }
            }
            self.sum_ip(&mut out);
            let sequence = first.wrapping_add((index * size) as u32);
            out[at + 4..at + 8].copy_from_slice(&sequence.to_be_bytes());
            let mut gone = if index > 0 { 0x80 } else { 0 };
            gone |= if index + 1 < count { 0x09 } else { 0 };
            out[at + 13] &= !gone;
            Self { padding: 0, ..self.clone() }.complete(out)
        });
        pieces.collect()
    }
}

/// What a guest sends, and the frames that are to be on the wire.
pub struct Case {
    pub name: String,
    pub frame: Vec<u8>,
    pub meta: Meta,
    pub expected: Vec<Vec<u8>>,
}

pub fn gso(version: IpVersion, size: u16) -> Gso {
    Gso { size: NonZeroU16::new(size).unwrap(), version }
}

/// Frames of every kind, from `src`.
pub fn cases(src: [u8; 6]) -> Vec<Case> {
    let mut cases = Vec::new();
    let blank = Meta { checksum: Checksum::Blank, gso: None };
    for len in [14, 60, 200, 900, 1514] {
        let frame = super::common::frame(OUTSIDE, src, len, len as u8);
        let expected = vec![frame.clone()];
        cases.push(Case { name: format!("{len}"), frame, meta: Meta::default(), expected });
    }
    for version in [IpVersion::V4, IpVersion::V6] {
        for (kind, payload, padding, tag) in [
            (Kind::Tcp, 0, 0, false),
            (Kind::Tcp, 5, 1, false),
            (Kind::Tcp, 1401, 0, true),
            (Kind::Tcp, 1000, 7, false),
            (Kind::Udp, 3, 20, false),
            (Kind::Udp, 1399, 0, false),
            (Kind::Udp, 700, 0, true),
        ] {
            let ip = Ip { padding, tag, ..Ip::new(version, kind, payload) };
            let name = format!("{ip:?}");
            let frame = ip.blank(OUTSIDE, src);
            let full = ip.complete(frame.clone());
            let meta = Meta { checksum: Checksum::Validated, gso: None };
            let expected = vec![full.clone()];
            cases.push(Case { name: name.clone(), frame, meta: blank, expected });
            cases.push(Case { name, frame: full.clone(), meta, expected: vec![full] });
        }
        for (payload, size, options) in [
            (1000, 1000, 0),
            (2001, 1428, 12),
            (20_000, 1399, 12),
            (60_001, 1440, 0),
            (9_000, 540, 40),
        ] {
            let ip = Ip { options, ..Ip::new(version, Kind::Tcp, payload) };
            let frame = ip.blank(OUTSIDE, src);
            let expected = ip.cut(&frame, size);
            let meta = Meta { gso: Some(gso(version, size as u16)), ..blank };
            cases.push(Case { name: format!("{size} of {ip:?}"), frame, meta, expected });
        }
    }
    // A fragment, whose checksum nobody can fill in: it goes as it is.
    let mut frame = Ip::new(IpVersion::V4, Kind::Udp, 500).blank(OUTSIDE, src);
    frame[20] = 0x20;
    let expected = vec![frame.clone()];
    cases.push(Case { name: "a fragment".into(), frame, meta: blank, expected });
    cases
}

/// What a card makes of what it was given, going by its header alone.
pub fn sent(header: NetHeader, bytes: &[u8]) -> Vec<Vec<u8>> {
    if !header.flags.contains(HeaderFlags::NEEDS_CSUM) {
        assert_eq!(header, NetHeader::default());
        return vec![bytes.to_vec()];
    }
    let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
    if header.gso_type == GsoType::NONE {
        let mut frame = bytes.to_vec();
        let value = !sum(&[&frame[start..]]);
        let value = if value == 0 { 0xffff } else { value };
        frame[start + offset..start + offset + 2].copy_from_slice(&value.to_be_bytes());
        return vec![frame];
    }
    let version = match header.gso_type {
        GsoType::TCPV4 => IpVersion::V4,
        GsoType::TCPV6 => IpVersion::V6,
        other => panic!("{other:?}"),
    };
    assert_eq!(offset, 16);
    let payload = bytes.len() - usize::from(header.hdr_len);
    let options = usize::from(header.hdr_len) - start - 20;
    let ip = Ip { options, ..Ip::new(version, Kind::Tcp, payload) };
    assert_eq!((ip.transport(), ip.body()), (start, usize::from(header.hdr_len)));
    ip.cut(bytes, header.gso_size.into())
}

//! What a card and its driver say to each other about a frame: `struct virtio_net_hdr` (virtio 1.2, 5.1.6).

use bitflags::bitflags;

bitflags! {
    /// What is said of the checksum. Other bits a device may set mean nothing to us.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct HeaderFlags: u8 {
        /// The checksum is to be filled in, from `csum_start` on (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
        const NEEDS_CSUM = 1;
        /// The device has found the checksum right (`VIRTIO_NET_HDR_F_DATA_VALID`).
        const DATA_VALID = 2;
        /// `csum_start` and `csum_offset` are something else (`VIRTIO_NET_HDR_F_RSC_INFO`).
        const RSC_INFO = 4;
    }
}

/// How a frame is to be cut, or was put together.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct GsoType(pub u8);

impl GsoType {
    /// It is a frame (`VIRTIO_NET_HDR_GSO_NONE`).
    pub const NONE: Self = Self(0);
    /// TCP over IPv4 (`VIRTIO_NET_HDR_GSO_TCPV4`).
    pub const TCPV4: Self = Self(1);
    /// TCP over IPv6 (`VIRTIO_NET_HDR_GSO_TCPV6`).
    pub const TCPV6: Self = Self(4);
    /// Beside one of the TCPs: CWR is on the first segment alone (`VIRTIO_NET_HDR_GSO_ECN`).
    pub const ECN: Self = Self(0x80);
}

/// What goes before each frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct NetHeader {
    /// Of the checksum.
    pub flags: HeaderFlags,
    /// Of segmentation.
    pub gso_type: GsoType,
    /// Bytes of all headers together; a hint.
    pub hdr_len: u16,
    /// Most bytes of payload in a segment.
    pub gso_size: u16,
    /// Where what is summed up starts, in bytes from the start of the frame; it goes on to the end.
    pub csum_start: u16,
    /// Where the checksum is, in bytes behind `csum_start`.
    pub csum_offset: u16,
    /// Buffers that a received frame takes up. As received alone: 0 is sent.
    pub num_buffers: u16,
}

impl NetHeader {
    /// Bytes of the header. A legacy device without `VIRTIO_NET_F_MRG_RXBUF` has the first ten alone.
    pub const LEN: usize = 12;

    /// As it lies in memory.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; Self::LEN] {
        let [hdr_low, hdr_high] = self.hdr_len.to_le_bytes();
        let [size_low, size_high] = self.gso_size.to_le_bytes();
        let [start_low, start_high] = self.csum_start.to_le_bytes();
        let [offset_low, offset_high] = self.csum_offset.to_le_bytes();
        let [num_low, num_high] = self.num_buffers.to_le_bytes();
        [
            self.flags.bits(),
            self.gso_type.0,
            hdr_low,
            hdr_high,
            size_low,
            size_high,
            start_low,
            start_high,
            offset_low,
            offset_high,
            num_low,
            num_high,
        ]
    }

    /// As a device wrote it. Nothing of it is believed yet.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1] = bytes;
        Self {
            flags: HeaderFlags::from_bits_truncate(flags),
            gso_type: GsoType(gso_type),
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
            num_buffers: u16::from_le_bytes([n0, n1]),
        }
    }
}

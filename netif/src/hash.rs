//! Hashes over packets' addresses (io/netif.h, "Hash types" and "Hash algorithms"): both ends steer a flow to a queue by
//! one, so that a flow stays in order.

use bitflags::bitflags;

use crate::headers::{self, Network, Protocol};
use crate::offload::IpVersion;
use crate::tx::PacketHash;

/// Most bytes of key that count: 32 bits for each bit of the longest input, IPv6 addresses and ports.
pub const MAX_KEY: usize = 40;

/// Bytes of the longest input.
const MAX_INPUT: usize = 36;

/// How the hash of a packet is computed (`XEN_NETIF_CTRL_HASH_ALGORITHM_*`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum HashAlgorithm {
    /// `XEN_NETIF_CTRL_HASH_ALGORITHM_NONE`: not at all.
    #[default]
    None = 0,
    /// `XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ`
    Toeplitz = 1,
}

impl HashAlgorithm {
    /// The algorithm of a number, if there is one.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::None),
            1 => Some(Self::Toeplitz),
            _ => None,
        }
    }
}

bitflags! {
    /// `XEN_NETIF_CTRL_HASH_TYPE_*`: what a hash is computed over. Of those that fit a packet, the one over most counts.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct HashTypes: u32 {
        /// The addresses of IPv4.
        const IPV4 = 1 << 0;
        /// The addresses of IPv4 and the ports of TCP.
        const IPV4_TCP = 1 << 1;
        /// The addresses of IPv6.
        const IPV6 = 1 << 2;
        /// The addresses of IPv6 and the ports of TCP.
        const IPV6_TCP = 1 << 3;
    }
}

/// What is hashed of one packet: source and destination address, then source and destination port, as they are in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HashInput {
    bytes: [u8; MAX_INPUT],
    len: usize,
    kind: HashTypes,
}

impl HashInput {
    /// What to hash of a frame, of whose first bytes 128 hold every header that matters, if `types` are wanted. `None`:
    /// nothing, it is not IP, or not of the wanted kind.
    #[must_use]
    pub fn of(header: &[u8], types: HashTypes) -> Option<Self> {
        if types.is_empty() {
            return None;
        }
        let network = headers::network(header)?;
        let (addresses, with_ports) = match network.version {
            IpVersion::V4 => (HashTypes::IPV4, HashTypes::IPV4_TCP),
            IpVersion::V6 => (HashTypes::IPV6, HashTypes::IPV6_TCP),
        };
        let (start, len) = network.addresses();
        let mut input = Self { bytes: [0; MAX_INPUT], len: 0, kind: addresses };
        input.append(header.get(start..)?.get(..len)?);
        if types.contains(with_ports)
            && let Some(ports) = tcp_ports(header, &network)
        {
            input.kind = with_ports;
            input.append(ports);
        }
        types.contains(input.kind).then_some(input)
    }

    fn append(&mut self, part: &[u8]) {
        let room = self.bytes.get_mut(self.len..).unwrap_or_default();
        for (to, from) in room.iter_mut().zip(part) {
            *to = *from;
            self.len += 1;
        }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// What they are of: exactly one type.
    #[must_use]
    pub const fn kind(&self) -> HashTypes {
        self.kind
    }
}

fn tcp_ports<'a>(header: &'a [u8], network: &Network) -> Option<&'a [u8]> {
    let next = network.next.filter(|next| next.protocol == Protocol::Tcp.number())?;
    header.get(next.offset..)?.get(..4)
}

/// The Toeplitz hash with one key: a table of what each half of each input byte contributes, about 4.5 KiB.
#[derive(Clone, Debug)]
pub struct Toeplitz {
    table: [[[u32; 16]; 2]; MAX_INPUT],
}

impl Toeplitz {
    /// For a key; bytes that are not given are zero, and those beyond [`MAX_KEY`] are of no consequence.
    #[must_use]
    pub fn new(key: &[u8]) -> Self {
        let mut table = [[[0; 16]; 2]; MAX_INPUT];
        let mut coming = key.iter().copied().chain(core::iter::repeat(0));
        let mut take = || coming.next().unwrap_or(0);
        // The 32 bits of the key that the next bit of input is worth are the upper half.
        let mut window = u64::from(u32::from_be_bytes([take(), take(), take(), take()])) << 32;
        for byte in &mut table {
            window |= u64::from(take()) << 24;
            for half in byte {
                for worth in [8, 4, 2, 1] {
                    let bits = (window >> 32) as u32;
                    for (_, entry) in (0..).zip(half.iter_mut()).filter(|(it, _)| it & worth != 0) {
                        *entry ^= bits;
                    }
                    window <<= 1;
                }
            }
        }
        Self { table }
    }

    /// The hash of up to 36 bytes; what is beyond them does not count.
    #[inline]
    #[must_use]
    pub fn hash(&self, input: &[u8]) -> u32 {
        self.table.iter().zip(input).fold(0, |hash, ([high, low], byte)| {
            // Four bits always find an entry.
            let entry = |half: &[u32; 16], at: u8| half.get(usize::from(at)).copied().unwrap_or(0);
            hash ^ entry(high, byte >> 4) ^ entry(low, byte & 0xf)
        })
    }

    /// The hash of a packet, as an extra of its slots tells it, over what of `types` fits; see [`HashInput::of`].
    #[must_use]
    pub fn packet(&self, header: &[u8], types: HashTypes) -> Option<PacketHash> {
        let input = HashInput::of(header, types)?;
        Some(PacketHash {
            kind: u8::try_from(input.kind.bits().trailing_zeros()).unwrap_or(0),
            algorithm: HashAlgorithm::Toeplitz as u8,
            value: self.hash(input.bytes()),
        })
    }
}

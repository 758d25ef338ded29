//! Ethernet addresses.

use core::fmt;
use core::str::FromStr;

/// An Ethernet address (EUI-48), in the order it goes over the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// What every Xen backend calls its own end of a vif. It is unicast; no guest may have it.
    pub const BACKEND: Self = Self([0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]);
    /// Everybody.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// The group bit: addressed to several stations (broadcast among them), and so never anybody's own address.
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        let [first, ..] = self.0;
        first & 1 != 0
    }

    /// Whether a station can have this address: not a group, and not all zero (Linux `is_valid_ether_addr`).
    #[must_use]
    pub const fn is_station(self) -> bool {
        !self.is_multicast() && self.to_u64() != 0
    }

    /// Its 48 bits as a number, the first octet on the wire the most significant.
    #[must_use]
    pub const fn to_u64(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(to, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// Not six pairs of hexadecimal digits with colons between them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a MAC address")]
pub struct BadMac;

impl FromStr for MacAddr {
    type Err = BadMac;

    /// Reads the form of the store's `mac` node: exactly `00:16:3e:00:00:01`, digits in either case.
    fn from_str(text: &str) -> Result<Self, BadMac> {
        let digit =
            |at: &u8| char::from(*at).to_digit(16).and_then(|value| u8::try_from(value).ok());
        let mut address = [0; 6];
        let mut rest = text.as_bytes();
        for (index, octet) in address.iter_mut().enumerate() {
            if index > 0 {
                rest = rest.strip_prefix(b":").ok_or(BadMac)?;
            }
            let ([high, low], tail) = rest.split_first_chunk::<2>().ok_or(BadMac)?;
            *octet = digit(high).ok_or(BadMac)? << 4 | digit(low).ok_or(BadMac)?;
            rest = tail;
        }
        if rest.is_empty() { Ok(Self(address)) } else { Err(BadMac) }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::string::ToString;

    use super::*;

    #[test]
    fn addresses_are_read_strictly() {
        assert_eq!("00:16:3e:00:00:01".parse(), Ok(MacAddr([0, 0x16, 0x3e, 0, 0, 1])));
        assert_eq!("FE:ff:fF:ff:ff:ff".parse(), Ok(MacAddr::BACKEND));
        for bad in [
            "",
            "00:16:3e:00:00",
            "00:16:3e:00:00:",
            "00:16:3e:00:00:1",
            "00:16:3e:00:00:01:",
            "00:16:3e:00:00:01:02",
            " 00:16:3e:00:00:01",
            "00:16:3e:00:00:01\n",
            "00:16:3e:00:00:01\0",
            "00-16-3e-00-00-01",
            "0:016:3e:00:00:01",
            "+0:16:3e:00:00:01",
            "00:16:3g:00:00:01",
            "00163e000001",
            "00:16:3e:00:00:0\u{e9}",
            "::::::::::",
        ] {
            assert_eq!(bad.parse::<MacAddr>(), Err(BadMac), "{bad:?}");
        }
        assert_eq!(MacAddr([0, 1, 0xab, 0xcd, 0xef, 0xff]).to_string(), "00:01:ab:cd:ef:ff");
    }

    #[test]
    fn groups_and_stations() {
        assert!(MacAddr::BROADCAST.is_multicast());
        assert!(MacAddr([0x33, 0x33, 0, 0, 0, 1]).is_multicast());
        assert!(!MacAddr::BACKEND.is_multicast());
        assert!(MacAddr::BACKEND.is_station());
        assert!(!MacAddr([0; 6]).is_station());
        assert!(!MacAddr::BROADCAST.is_station());
    }
}

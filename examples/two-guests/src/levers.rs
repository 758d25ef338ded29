//! What can be taken from a backend and given back, and what it did with what it had.

use std::fmt;
use std::str::FromStr;

use features::XenFeatures;
use netback::counters::Counters;
use netback::datapath::Datapath;

/// Something that can be withdrawn and restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lever {
    /// What Xen offers the backend's domain.
    Bits(XenFeatures),
    /// A way of the backend's.
    Path(Datapath),
}

impl fmt::Display for Lever {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => f.write_str(path.name()),
            Self::Bits(bits) => {
                let mut names = bits.iter_names().map(|(name, _)| name.to_lowercase());
                match names.next() {
                    Some(name) => f.write_str(&name),
                    None => write!(f, "bit {}", bits.bits().trailing_zeros()),
                }
            }
        }
    }
}

/// Neither the number nor the name of anything that can be withdrawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown(String);

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<_> = Datapath::ALL.iter().skip(1).map(|path| path.name()).collect();
        write!(
            f,
            "{:?} is no XENFEAT bit (0 to 31, or a name such as grant_map_identity), and no \
             datapath that can be withdrawn ({})",
            self.0,
            paths.join(", ")
        )
    }
}

impl std::error::Error for Unknown {}

impl FromStr for Lever {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Self, Unknown> {
        // Copy is what is left when everything else is gone.
        let mut paths = Datapath::ALL.into_iter().skip(1);
        let name = text.to_lowercase().replace('_', "-");
        if let Some(path) = paths.find(|path| path.name() == name) {
            return Ok(Self::Path(path));
        }
        let name = name.to_uppercase().replace('-', "_");
        let number = text.parse::<u32>().ok().and_then(|bit| 1_u32.checked_shl(bit));
        let named = || XenFeatures::from_name(&name);
        let bits = number.map(XenFeatures::from_bits_retain).or_else(named);
        bits.map(Self::Bits).ok_or_else(|| Unknown(text.into()))
    }
}

/// What a vif has carried, in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meter {
    /// Packets.
    pub packets: u64,
    /// Bytes, by datapath in the order of [`Datapath::ALL`].
    pub bytes: [u64; Datapath::ALL.len()],
    /// Grant hypercalls of the backend.
    pub hypercalls: u64,
    /// Notifications, of both ends.
    pub notifications: u64,
}

impl Meter {
    /// What a backend counted, and how often the frontend notified.
    pub(crate) fn new(back: &Counters, front: u64) -> Self {
        let mut meter = Self {
            notifications: front + back.tx.notifications + back.rx.notifications,
            ..Self::default()
        };
        for ((from, to), bytes) in
            back.tx_paths.iter().zip(back.rx_paths.iter()).zip(&mut meter.bytes)
        {
            let (from, to) = (from.1, to.1);
            meter.packets += from.packets + to.packets;
            meter.hypercalls += from.hypercalls + to.hypercalls;
            *bytes = from.bytes + to.bytes;
        }
        meter
    }

    /// What came on top of an earlier reading.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        let mut bytes = self.bytes;
        for (now, before) in bytes.iter_mut().zip(earlier.bytes) {
            *now = now.saturating_sub(before);
        }
        Self {
            packets: self.packets.saturating_sub(earlier.packets),
            bytes,
            hypercalls: self.hypercalls.saturating_sub(earlier.hypercalls),
            notifications: self.notifications.saturating_sub(earlier.notifications),
        }
    }

    /// Bytes by a datapath.
    #[must_use]
    pub fn by(&self, path: Datapath) -> u64 {
        self.bytes.get(path.index()).copied().unwrap_or(0)
    }

    /// Bytes in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.bytes.iter().sum()
    }

    /// The datapath of most bytes, if there were any.
    #[must_use]
    pub fn main_path(&self) -> Option<Datapath> {
        let paths = Datapath::ALL.into_iter().zip(self.bytes).filter(|(_, bytes)| *bytes > 0);
        paths.max_by_key(|(_, bytes)| *bytes).map(|(path, _)| path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levers_have_numbers_and_names() {
        let identity = Lever::Bits(XenFeatures::GRANT_MAP_IDENTITY);
        for text in ["12", "grant_map_identity", "GRANT_MAP_IDENTITY", "grant-map-identity"] {
            assert_eq!(text.parse(), Ok(identity), "{text}");
        }
        assert_eq!("direct_mapped".parse(), Ok(Lever::Bits(XenFeatures::DIRECT_MAPPED)));
        assert_eq!("direct".parse(), Ok(Lever::Path(Datapath::Direct)));
        assert_eq!("map_identity".parse(), Ok(Lever::Path(Datapath::MapIdentity)));
        assert_eq!("static".parse(), Ok(Lever::Path(Datapath::Static)));
        assert_eq!(identity.to_string(), "grant_map_identity");
        for bad in ["copy", "32", "-1", "", "mop"] {
            let error = bad.parse::<Lever>().map_err(|error| error.to_string());
            assert!(error.is_err_and(|text| text.contains(bad)), "{bad}");
        }
    }
}

//! The keys of the store by which the two ends describe themselves (io/netif.h), relative to each end's directory.

use core::fmt;

use bitflags::bitflags;

/// Backend: how many queues it serves at most.
pub const MULTI_QUEUE_MAX_QUEUES: &str = "multi-queue-max-queues";
/// Frontend: how many queues it has; 1 if missing.
pub const MULTI_QUEUE_NUM_QUEUES: &str = "multi-queue-num-queues";
/// Frontend, per queue: the grant reference of the TX ring's page.
pub const TX_RING_REF: &str = "tx-ring-ref";
/// Frontend, per queue: the grant reference of the RX ring's page.
pub const RX_RING_REF: &str = "rx-ring-ref";
/// Frontend, per queue: the port for both rings.
pub const EVENT_CHANNEL: &str = "event-channel";
/// Frontend, per queue: the TX ring's own port.
pub const EVENT_CHANNEL_TX: &str = "event-channel-tx";
/// Frontend, per queue: the RX ring's own port.
pub const EVENT_CHANNEL_RX: &str = "event-channel-rx";
/// Frontend: the grant reference of the control ring's page.
pub const CTRL_RING_REF: &str = "ctrl-ring-ref";
/// Frontend: the control ring's port.
pub const EVENT_CHANNEL_CTRL: &str = "event-channel-ctrl";
/// Frontend: 1 if the backend is to copy into its pages. The only way there is.
pub const REQUEST_RX_COPY: &str = "request-rx-copy";
/// Frontend: 1 if it sends events for RX requests.
pub const FEATURE_RX_NOTIFY: &str = "feature-rx-notify";
/// Frontend: 1 if only multicast that its filter names is to reach it.
pub const REQUEST_MULTICAST_CONTROL: &str = "request-multicast-control";
/// Frontend: bytes to leave free at the start of each page.
pub const XDP_HEADROOM: &str = "xdp-headroom";
/// Either: 1 if it wants the IPv4 transport checksum computed. Missing: it does not.
pub const FEATURE_NO_CSUM_OFFLOAD: &str = "feature-no-csum-offload";
/// Backend: page flipping, which nobody has any more; 0.
pub const FEATURE_RX_FLIP: &str = "feature-rx-flip";
/// Backend: 0 if the link is down.
pub const CARRIER: &str = "carrier";
/// Backend, from the toolstack: `BYTES,USECS`, what the guest may send per interval.
pub const RATE: &str = "rate";
/// Frontend, from the toolstack: 0 if the backend is not to be trusted.
pub const TRUSTED: &str = "trusted";
/// Both, from the toolstack: the guest's address.
pub const MAC: &str = "mac";
/// Frontend, from the toolstack: bytes of payload per packet.
pub const MTU: &str = "mtu";
/// Both, from the toolstack: the interface's number.
pub const HANDLE: &str = "handle";

/// Where a queue's key is: on its own if there is one queue, below `queue-N` if there are several.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueKey<'a> {
    /// Which of how many. `None`: the only one.
    pub queue: Option<u16>,
    /// One of the keys that are per queue.
    pub key: &'a str,
}

impl<'a> QueueKey<'a> {
    /// The key of one of `queues` queues.
    #[must_use]
    pub const fn new(queue: u16, queues: u16, key: &'a str) -> Self {
        Self { queue: if queues > 1 { Some(queue) } else { None }, key }
    }
}

impl fmt::Display for QueueKey<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.queue {
            Some(queue) => write!(f, "queue-{queue}/{}", self.key),
            None => f.write_str(self.key),
        }
    }
}

bitflags! {
    /// What an end offers, or what both have agreed on.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct Features: u16 {
        /// Packets of several slots.
        const SG = 1 << 0;
        /// TCP over IPv4 packets to be segmented.
        const GSO_TCPV4 = 1 << 1;
        /// TCP over IPv6 packets to be segmented.
        const GSO_TCPV6 = 1 << 2;
        /// Blank IPv4 transport checksums: the reverse of [`FEATURE_NO_CSUM_OFFLOAD`].
        const IPV4_CSUM = 1 << 3;
        /// Blank IPv6 transport checksums.
        const IPV6_CSUM = 1 << 4;
        /// An event channel for each ring.
        const SPLIT = 1 << 5;
        /// Several queues: [`MULTI_QUEUE_MAX_QUEUES`] says how many.
        const MULTI_QUEUE = 1 << 6;
        /// The backend copies into the frontend's pages.
        const RX_COPY = 1 << 7;
        /// A multicast filter, asked for before connecting.
        const MULTICAST_CONTROL = 1 << 8;
        /// A multicast filter, asked for at any time.
        const DYNAMIC_MULTICAST = 1 << 9;
        /// A control ring.
        const CTRL_RING = 1 << 10;
        /// Room at the start of each page.
        const XDP_HEADROOM = 1 << 11;
    }
}

impl Features {
    /// The key of each that has one of its own, 1 or 0 and 0 if missing.
    pub const KEYS: [(Self, &'static str); 10] = [
        (Self::SG, "feature-sg"),
        (Self::GSO_TCPV4, "feature-gso-tcpv4"),
        (Self::GSO_TCPV6, "feature-gso-tcpv6"),
        (Self::IPV6_CSUM, "feature-ipv6-csum-offload"),
        (Self::SPLIT, "feature-split-event-channels"),
        (Self::RX_COPY, "feature-rx-copy"),
        (Self::MULTICAST_CONTROL, "feature-multicast-control"),
        (Self::DYNAMIC_MULTICAST, "feature-dynamic-multicast-control"),
        (Self::CTRL_RING, "feature-ctrl-ring"),
        (Self::XDP_HEADROOM, "feature-xdp-headroom"),
    ];

    /// What an end's directory offers; `lookup` gives a key's number, `None` if the key is missing.
    pub fn offered(mut lookup: impl FnMut(&str) -> Option<u32>) -> Self {
        let mut offered = Self::empty();
        for (feature, key) in Self::KEYS {
            offered.set(feature, lookup(key).is_some_and(|value| value != 0));
        }
        let no_csum = lookup(FEATURE_NO_CSUM_OFFLOAD).is_some_and(|value| value != 0);
        offered.set(Self::IPV4_CSUM, !no_csum);
        let queues = lookup(MULTI_QUEUE_MAX_QUEUES).is_some_and(|value| value != 0);
        offered.set(Self::MULTI_QUEUE, queues);
        offered
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [(Features, &str); 12] = [
            (Features::SG, "sg"),
            (Features::GSO_TCPV4, "gso-tcpv4"),
            (Features::GSO_TCPV6, "gso-tcpv6"),
            (Features::IPV4_CSUM, "ipv4-csum"),
            (Features::IPV6_CSUM, "ipv6-csum"),
            (Features::SPLIT, "split"),
            (Features::MULTI_QUEUE, "multi-queue"),
            (Features::RX_COPY, "rx-copy"),
            (Features::MULTICAST_CONTROL, "multicast"),
            (Features::DYNAMIC_MULTICAST, "dynamic-multicast"),
            (Features::CTRL_RING, "ctrl-ring"),
            (Features::XDP_HEADROOM, "xdp-headroom"),
        ];
        let mut names = NAMES.iter().filter(|(feature, _)| self.contains(*feature));
        let Some((_, first)) = names.next() else { return f.write_str("none") };
        f.write_str(first)?;
        names.try_for_each(|(_, name)| write!(f, ",{name}"))
    }
}

//! What the two ends say of themselves in the store.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hypercall::{GrantRef, PageOffset, Port};
use netif::keys::{self, Features, QueueKey};
use xenbus::client::Change;
use xenbus::device::parse_u32;

use crate::fault::Refusal;

/// Most queues an interface may be configured to use.
pub const MAX_QUEUES: u16 = 16;

/// Whole numbers of the backend's directory, besides the features.
const NUMBERS: [&str; 2] = [keys::FEATURE_NO_CSUM_OFFLOAD, keys::MULTI_QUEUE_MAX_QUEUES];

/// Every key of the backend's directory that [`parse`] looks at.
pub(crate) fn backend_keys() -> impl Iterator<Item = &'static str> {
    NUMBERS.into_iter().chain(Features::KEYS.into_iter().map(|(_, key)| key))
}

/// What a backend offers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Offer {
    pub(crate) features: Features,
    /// Queues at most, 1 or more.
    pub(crate) queues: u16,
}

/// Judges the values of [`backend_keys`].
pub(crate) fn parse(values: &[Option<Vec<u8>>]) -> Result<Offer, Refusal> {
    let mut bad = None;
    let mut number = |name: &str| {
        let (value, key) = values.iter().zip(backend_keys()).find(|(_, key)| *key == name)?;
        let number = parse_u32(value.as_deref()?);
        if number.is_none() {
            bad = Some(Refusal::BadValue(key));
        }
        number
    };
    let queues = number(keys::MULTI_QUEUE_MAX_QUEUES).unwrap_or(1);
    let features = Features::offered(&mut number);
    match bad {
        Some(refusal) => Err(refusal),
        None if !features.contains(Features::RX_COPY) => Err(Refusal::NoCopy),
        None => Ok(Offer { features, queues: u16::try_from(queues).unwrap_or(MAX_QUEUES).max(1) }),
    }
}

/// How a queue's events come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ports {
    Shared(Port),
    Split { tx: Port, rx: Port },
}

/// What the backend has to know of a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct QueueNodes {
    pub(crate) tx_ring: GrantRef,
    pub(crate) rx_ring: GrantRef,
    pub(crate) ports: Ports,
}

/// The features that are about the packets an end takes.
const TAKEN: Features =
    Features::SG.union(Features::GSO_TCPV4).union(Features::GSO_TCPV6).union(Features::IPV6_CSUM);

const PER_QUEUE: [&str; 5] = [
    keys::TX_RING_REF,
    keys::RX_RING_REF,
    keys::EVENT_CHANNEL,
    keys::EVENT_CHANNEL_TX,
    keys::EVENT_CHANNEL_RX,
];

/// What the backend has to know besides the queues.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Wishes {
    /// What packets may come in.
    pub(crate) features: Features,
    /// The control ring, if there is one.
    pub(crate) control: Option<(GrantRef, Port)>,
    pub(crate) multicast_filter: bool,
    /// Of backends that leave headroom.
    pub(crate) headroom: Option<PageOffset>,
}

/// The keys by which a frontend with directory `dir` describes itself and its queues. Keys of an earlier connection with
/// other queues or ports are removed, as the backend could not tell them apart.
pub(crate) fn describe(dir: &str, wishes: &Wishes, queues: &[QueueNodes]) -> Vec<Change> {
    let features = wishes.features;
    let count = u16::try_from(queues.len()).unwrap_or(MAX_QUEUES);
    let mut changes = Vec::new();
    let mut put = |key: String, value: Option<u32>| {
        let path = format!("{dir}/{key}");
        changes.push(match value {
            Some(value) => Change::Write { path, value: value.to_string().into_bytes() },
            None => Change::Rm { path },
        });
    };
    for (feature, key) in Features::KEYS {
        // A frontend says only what packets it takes; the rest of these are the backend's.
        if TAKEN.contains(feature) {
            put(key.into(), Some(features.contains(feature).into()));
        }
    }
    let no_csum = !features.contains(Features::IPV4_CSUM);
    put(keys::FEATURE_NO_CSUM_OFFLOAD.into(), Some(no_csum.into()));
    put(keys::REQUEST_RX_COPY.into(), Some(1));
    put(keys::FEATURE_RX_NOTIFY.into(), Some(1));
    put(keys::REQUEST_MULTICAST_CONTROL.into(), Some(wishes.multicast_filter.into()));
    put(keys::XDP_HEADROOM.into(), wishes.headroom.map(|headroom| headroom.get().into()));
    put(keys::CTRL_RING_REF.into(), wishes.control.map(|(gref, _)| gref.0));
    put(keys::EVENT_CHANNEL_CTRL.into(), wishes.control.map(|(_, port)| port.0));
    put(keys::MULTI_QUEUE_NUM_QUEUES.into(), Some(count.into()));
    if count > 1 {
        for key in PER_QUEUE {
            put(key.into(), None);
        }
    } else {
        for queue in 0..MAX_QUEUES {
            put(format!("queue-{queue}"), None);
        }
    }
    for (index, queue) in (0..).zip(queues) {
        let (shared, tx, rx) = match queue.ports {
            Ports::Shared(port) => (Some(port.0), None, None),
            Ports::Split { tx, rx } => (None, Some(tx.0), Some(rx.0)),
        };
        let values = [Some(queue.tx_ring.0), Some(queue.rx_ring.0), shared, tx, rx];
        for (key, value) in PER_QUEUE.into_iter().zip(values) {
            put(QueueKey::new(index, count, key).to_string(), value);
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(pairs: &[(&str, &str)]) -> Vec<Option<Vec<u8>>> {
        backend_keys()
            .map(|key| pairs.iter().find(|(name, _)| *name == key).map(|(_, v)| (*v).into()))
            .collect()
    }

    #[test]
    fn an_offer_is_read() {
        let offer = parse(&values(&[
            ("feature-rx-copy", "1"),
            ("feature-sg", "1"),
            ("multi-queue-max-queues", "4"),
            ("feature-split-event-channels", "1"),
        ]));
        let features = Features::RX_COPY
            | Features::SG
            | Features::MULTI_QUEUE
            | Features::SPLIT
            | Features::IPV4_CSUM;
        assert_eq!(offer, Ok(Offer { features, queues: 4 }));
    }

    #[test]
    fn an_offer_without_copying_or_with_bad_values_is_refused() {
        assert_eq!(parse(&values(&[])), Err(Refusal::NoCopy));
        for bad in ["", " 1", "0x1", "99999999999", "-1"] {
            let offer = parse(&values(&[("feature-rx-copy", "1"), ("feature-sg", bad)]));
            assert_eq!(offer, Err(Refusal::BadValue("feature-sg")), "{bad:?}");
        }
    }

    #[test]
    fn keys_of_another_layout_are_removed() {
        let queue = |n: u32| QueueNodes {
            tx_ring: GrantRef(n),
            rx_ring: GrantRef(n + 1),
            ports: Ports::Shared(Port(n)),
        };
        let removed = |changes: &[Change], name: &str| {
            changes.iter().any(|change| matches!(change, Change::Rm { path } if path == name))
        };
        let wishes = Wishes {
            features: Features::SG,
            control: None,
            multicast_filter: false,
            headroom: None,
        };
        let one = describe("d", &wishes, &[queue(8)]);
        assert!(
            removed(&one, "d/ctrl-ring-ref")
                && removed(&one, "d/queue-1")
                && removed(&one, "d/event-channel-tx")
        );
        let two = describe("d", &wishes, &[queue(8), queue(10)]);
        assert!(removed(&two, "d/tx-ring-ref") && removed(&two, "d/queue-1/event-channel-rx"));
        assert!(!removed(&two, "d/queue-1/event-channel"));
    }
}

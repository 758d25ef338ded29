//! What the two ends say of themselves in the store: what we offer, and what a frontend asks for.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hypercall::{GrantRef, Port};
use netif::keys::{self, Features, QueueKey};
use xenbus::client::Change;
use xenbus::device::parse_u32;

use crate::fault::Refusal;

/// What this backend can do. Nothing else is offered.
pub const OFFERED: Features = Features::SG
    .union(Features::GSO_TCPV4)
    .union(Features::GSO_TCPV6)
    .union(Features::IPV4_CSUM)
    .union(Features::IPV6_CSUM)
    .union(Features::SPLIT)
    .union(Features::MULTI_QUEUE)
    .union(Features::RX_COPY);

/// Most queues a vif may be configured to offer.
pub const MAX_QUEUES: u16 = 16;

/// The keys by which a backend with directory `dir` says what it can do.
pub(crate) fn offer(dir: &str, max_queues: u16) -> Vec<Change> {
    let write = |key: &str, value: String| Change::Write {
        path: format!("{dir}/{key}"),
        value: value.into_bytes(),
    };
    let mut changes: Vec<_> = Features::KEYS
        .iter()
        .filter(|(feature, _)| OFFERED.contains(*feature))
        .map(|(_, key)| write(key, "1".into()))
        .collect();
    changes.push(write(keys::FEATURE_RX_FLIP, "0".into()));
    changes.push(write(keys::MULTI_QUEUE_MAX_QUEUES, max_queues.to_string()));
    changes
}

/// How a queue's events come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ports {
    Shared(Port),
    Split { tx: Port, rx: Port },
}

/// One queue as the frontend describes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct QueueRequest {
    pub(crate) tx_ring: GrantRef,
    pub(crate) rx_ring: GrantRef,
    pub(crate) ports: Ports,
}

/// What a frontend asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Request {
    pub(crate) queues: Vec<QueueRequest>,
    /// What both ends can do.
    pub(crate) features: Features,
}

const PER_QUEUE: [&str; 5] = [
    keys::TX_RING_REF,
    keys::RX_RING_REF,
    keys::EVENT_CHANNEL,
    keys::EVENT_CHANNEL_TX,
    keys::EVENT_CHANNEL_RX,
];

/// Every key of a frontend's directory that [`parse`] may look at.
pub(crate) fn frontend_keys(max_queues: u16) -> Vec<String> {
    let whole = [
        keys::MULTI_QUEUE_NUM_QUEUES,
        keys::REQUEST_RX_COPY,
        keys::FEATURE_RX_NOTIFY,
        keys::FEATURE_NO_CSUM_OFFLOAD,
    ];
    let features = Features::KEYS.iter().map(|(_, key)| *key);
    let mut names: Vec<String> = whole.into_iter().chain(features).map(Into::into).collect();
    names.extend(PER_QUEUE.map(|key| QueueKey::new(0, 1, key).to_string()));
    for queue in 0..max_queues {
        // Two or more: with one queue its keys are not in a directory of their own.
        names.extend(PER_QUEUE.map(|key| QueueKey::new(queue, 2, key).to_string()));
    }
    names
}

struct Keys<'a>(&'a BTreeMap<String, Vec<u8>>);

impl Keys<'_> {
    fn number(&self, path: &str, key: &'static str) -> Result<Option<u32>, Refusal> {
        match self.0.get(path) {
            None => Ok(None),
            Some(value) => parse_u32(value).map(Some).ok_or(Refusal::BadValue(key)),
        }
    }

    fn required(&self, queue: u16, queues: u16, key: &'static str) -> Result<u32, Refusal> {
        self.optional(queue, queues, key)?.ok_or(Refusal::Missing(key))
    }

    fn optional(&self, queue: u16, queues: u16, key: &'static str) -> Result<Option<u32>, Refusal> {
        self.number(&QueueKey::new(queue, queues, key).to_string(), key)
    }

    fn queue(&self, queue: u16, queues: u16) -> Result<QueueRequest, Refusal> {
        let tx = self.optional(queue, queues, keys::EVENT_CHANNEL_TX)?;
        let rx = self.optional(queue, queues, keys::EVENT_CHANNEL_RX)?;
        let ports = match (tx, rx) {
            (Some(tx), Some(rx)) => Ports::Split { tx: Port(tx), rx: Port(rx) },
            _ => Ports::Shared(Port(self.required(queue, queues, keys::EVENT_CHANNEL)?)),
        };
        Ok(QueueRequest {
            tx_ring: GrantRef(self.required(queue, queues, keys::TX_RING_REF)?),
            rx_ring: GrantRef(self.required(queue, queues, keys::RX_RING_REF)?),
            ports,
        })
    }
}

/// Judges a frontend's directory: all that it asks for, or nothing.
pub(crate) fn parse(
    values: &BTreeMap<String, Vec<u8>>,
    max_queues: u16,
) -> Result<Request, Refusal> {
    let values = Keys(values);
    let count = keys::MULTI_QUEUE_NUM_QUEUES;
    let queues = match values.number(count, count)? {
        None => 1,
        Some(number) => u16::try_from(number)
            .ok()
            .filter(|number| (1..=max_queues).contains(number))
            .ok_or(Refusal::BadValue(count))?,
    };
    // Absent is tolerated, as by Linux: there is nothing but copying.
    if values.number(keys::REQUEST_RX_COPY, keys::REQUEST_RX_COPY)? == Some(0) {
        return Err(Refusal::BadValue(keys::REQUEST_RX_COPY));
    }
    let mut bad = None;
    let mut features = Features::offered(|name| {
        let known = Features::KEYS.iter().map(|(_, key)| *key);
        let key = known.chain([keys::FEATURE_NO_CSUM_OFFLOAD]).find(|key| *key == name)?;
        values.number(key, key).unwrap_or_else(|refusal| {
            bad = Some(refusal);
            None
        })
    });
    if let Some(refusal) = bad {
        return Err(refusal);
    }
    let queues =
        (0..queues).map(|queue| values.queue(queue, queues)).collect::<Result<Vec<_>, _>>()?;
    // These two a frontend does not say by a key of that name.
    features.set(Features::MULTI_QUEUE, queues.len() > 1);
    let split = queues.iter().all(|queue| matches!(queue.ports, Ports::Split { .. }));
    features.set(Features::SPLIT, split);
    features.insert(Features::RX_COPY);
    Ok(Request { queues, features: features & OFFERED })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(pairs: &[(&str, &str)]) -> BTreeMap<String, Vec<u8>> {
        pairs.iter().map(|(key, value)| ((*key).into(), value.as_bytes().to_vec())).collect()
    }

    const ONE: [(&str, &str); 4] = [
        ("tx-ring-ref", "8"),
        ("rx-ring-ref", "9"),
        ("event-channel", "5"),
        ("request-rx-copy", "1"),
    ];

    #[test]
    fn one_queue_as_old_frontends_write_it() {
        let request = parse(&directory(&ONE), 4).unwrap();
        assert_eq!(request.queues.len(), 1);
        assert_eq!(request.queues[0].ports, Ports::Shared(Port(5)));
        assert_eq!(request.features, Features::RX_COPY | Features::IPV4_CSUM);
    }

    #[test]
    fn two_queues_with_split_channels_as_linux_writes_them() {
        let mut values = directory(&[
            ("multi-queue-num-queues", "2"),
            ("request-rx-copy", "1"),
            ("feature-sg", "1"),
            ("feature-gso-tcpv4", "1"),
            ("feature-gso-tcpv6", "1"),
            ("feature-ipv6-csum-offload", "1"),
        ]);
        for (index, key) in ["tx-ring-ref", "rx-ring-ref", "event-channel-tx", "event-channel-rx"]
            .into_iter()
            .enumerate()
        {
            for queue in 0..2 {
                let value = (10 * (queue + 1) + index).to_string().into_bytes();
                values.insert(format!("queue-{queue}/{key}"), value);
            }
        }
        let request = parse(&values, 4).unwrap();
        assert_eq!(request.features, OFFERED);
        assert_eq!(
            request.queues[1],
            QueueRequest {
                tx_ring: GrantRef(20),
                rx_ring: GrantRef(21),
                ports: Ports::Split { tx: Port(22), rx: Port(23) },
            }
        );
        values.remove("queue-1/rx-ring-ref");
        assert_eq!(parse(&values, 4), Err(Refusal::Missing("rx-ring-ref")));
        assert_eq!(parse(&values, 1), Err(Refusal::BadValue("multi-queue-num-queues")));
    }

    #[test]
    fn hostile_values_are_refused() {
        for value in ["12abc", " 12", "+1", "0x10", "", "1\0", "99999999999", "4294967296", "-1"] {
            for key in ["tx-ring-ref", "event-channel", "multi-queue-num-queues", "feature-sg"] {
                let mut values = directory(&ONE);
                values.insert(key.into(), value.as_bytes().to_vec());
                assert!(parse(&values, 4).is_err(), "{key}={value:?}");
            }
        }
        for queues in ["0", "5", "4294967295"] {
            let mut values = directory(&ONE);
            values.insert("multi-queue-num-queues".into(), queues.as_bytes().to_vec());
            assert!(parse(&values, 4).is_err(), "{queues} queues");
        }
    }

    #[test]
    fn every_key_that_is_looked_at_is_read() {
        let names = frontend_keys(2);
        for key in ["queue-1/event-channel-rx", "tx-ring-ref", "feature-no-csum-offload"] {
            assert!(names.iter().any(|name| name == key), "{key}");
        }
    }
}

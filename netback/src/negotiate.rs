//! What the two ends say of themselves in the store: what we offer, and what a frontend asks for.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hypercall::{GrantRef, PAGE_SIZE, PageOffset, Port};
use netif::keys::{self, Features, QueueKey};
use netif::tx::MAX_SLOTS;
use xenbus::client::Change;
use xenbus::device::parse_u32;

use crate::ctrl::ControlRequest;
use crate::fault::Refusal;
use crate::hotplug::{self, Hotplug};

/// What this backend can do. Nothing else is offered.
pub const OFFERED: Features = Features::SG
    .union(Features::GSO_TCPV4)
    .union(Features::GSO_TCPV6)
    .union(Features::IPV4_CSUM)
    .union(Features::IPV6_CSUM)
    .union(Features::SPLIT)
    .union(Features::MULTI_QUEUE)
    .union(Features::RX_COPY)
    .union(Features::MULTICAST_CONTROL)
    .union(Features::DYNAMIC_MULTICAST)
    .union(Features::CTRL_RING)
    .union(Features::XDP_HEADROOM);

/// Most queues a vif may be configured to offer.
pub const MAX_QUEUES: u16 = 16;

/// Most bytes left free at the start of a page: the largest packet there is must still find room in its slots. Linux
/// takes 32,767, which is more than a page has; its frontend asks for 256.
const MAX_HEADROOM: u32 = (PAGE_SIZE - 65_535_usize.div_ceil(MAX_SLOTS)) as u32;

/// What is settled beforehand, the same for all vifs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Terms {
    pub(crate) max_queues: u16,
    pub(crate) hotplug: Hotplug,
}

/// The keys by which a backend with directory `dir` says what it can do.
pub(crate) fn offer(dir: &str, terms: Terms) -> Vec<Change> {
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
    changes.push(write(keys::MULTI_QUEUE_MAX_QUEUES, terms.max_queues.to_string()));
    if terms.hotplug == Hotplug::Switch {
        changes.push(write(hotplug::STATUS, hotplug::CONNECTED.into()));
    }
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
    pub(crate) control: Option<ControlRequest>,
    /// Whether multicast is to be filtered.
    pub(crate) multicast_control: bool,
    pub(crate) headroom: PageOffset,
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
        keys::CTRL_RING_REF,
        keys::EVENT_CHANNEL_CTRL,
        keys::REQUEST_MULTICAST_CONTROL,
        keys::XDP_HEADROOM,
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

    fn control(&self) -> Result<Option<ControlRequest>, Refusal> {
        let Some(ring) = self.number(keys::CTRL_RING_REF, keys::CTRL_RING_REF)? else {
            return Ok(None);
        };
        let port = self.number(keys::EVENT_CHANNEL_CTRL, keys::EVENT_CHANNEL_CTRL)?;
        let port = port.ok_or(Refusal::Missing(keys::EVENT_CHANNEL_CTRL))?;
        Ok(Some(ControlRequest { ring: GrantRef(ring), port: Port(port) }))
    }
}

/// The room that a frontend gets at the start of each page if it asks for so many bytes.
fn headroom_of(asked: u32) -> PageOffset {
    let granted = u16::try_from(asked.min(MAX_HEADROOM)).unwrap_or(0);
    PageOffset::new(granted).unwrap_or(PageOffset::ZERO)
}

/// `xdp-headroom` as a frontend that reconfigures itself has it now; one that cannot be read is none, as in Linux
/// (xen-netback/xenbus.c, `read_xenbus_frontend_xdp`).
pub(crate) fn headroom(value: Option<&[u8]>) -> PageOffset {
    headroom_of(value.and_then(parse_u32).unwrap_or(0))
}

/// `request-multicast-control` as it is now; one that cannot be read is none.
pub(crate) fn multicast_control(value: Option<&[u8]>) -> bool {
    value.and_then(parse_u32).is_some_and(|value| value != 0)
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
    let control = values.control()?;
    features.set(Features::CTRL_RING, control.is_some());
    let multicast = keys::REQUEST_MULTICAST_CONTROL;
    let multicast_control = values.number(multicast, multicast)?.is_some_and(|value| value != 0);
    features.set(Features::MULTICAST_CONTROL, multicast_control);
    features.remove(Features::DYNAMIC_MULTICAST);
    let headroom = headroom_of(values.number(keys::XDP_HEADROOM, keys::XDP_HEADROOM)?.unwrap_or(0));
    features.set(Features::XDP_HEADROOM, headroom != PageOffset::ZERO);
    let features = features & OFFERED;
    Ok(Request { queues, features, control, multicast_control, headroom })
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
        assert_eq!((request.control, request.multicast_control), (None, false));
        assert_eq!(request.headroom, PageOffset::ZERO);
    }

    fn with(pairs: &[(&str, &str)]) -> Result<Request, Refusal> {
        let mut values = directory(&ONE);
        values.extend(directory(pairs));
        parse(&values, 4)
    }

    #[test]
    fn a_control_ring_is_there_if_its_page_is() {
        let both = [(keys::CTRL_RING_REF, "11"), (keys::EVENT_CHANNEL_CTRL, "12")];
        let request = with(&both).unwrap();
        let expected = ControlRequest { ring: GrantRef(11), port: Port(12) };
        assert_eq!(request.control, Some(expected));
        assert!(request.features.contains(Features::CTRL_RING));
        let missing = Refusal::Missing(keys::EVENT_CHANNEL_CTRL);
        assert_eq!(with(&both[..1]), Err(missing));
        assert_eq!(with(&both[1..]).unwrap().control, None);
        // What only a backend says.
        let confused = with(&[("feature-ctrl-ring", "1"), ("feature-xdp-headroom", "1")]).unwrap();
        assert_eq!(confused.features, with(&[]).unwrap().features);
    }

    #[test]
    fn headroom_leaves_room_for_the_largest_packet() {
        let granted = |asked| with(&[(keys::XDP_HEADROOM, asked)]).map(|it| it.headroom.get());
        assert_eq!(granted("0"), Ok(0));
        assert_eq!(granted("256"), Ok(256));
        for much in ["647", "32767", "65536", "4294967295"] {
            assert_eq!(granted(much), Ok(646));
        }
        let most = headroom(Some(b"4096"));
        assert!(most.room() * MAX_SLOTS >= 65_535 && (most.room() - 1) * MAX_SLOTS < 65_535);
        for (value, expected) in [(None, 0), (Some("x"), 0), (Some("-1"), 0), (Some("300"), 300)] {
            assert_eq!(headroom(value.map(str::as_bytes)).get(), expected);
        }
        assert!(
            with(&[(keys::XDP_HEADROOM, "1")]).unwrap().features.contains(Features::XDP_HEADROOM)
        );
    }

    #[test]
    fn multicast_is_filtered_on_request() {
        for (value, expected) in [("0", false), ("1", true), ("7", true)] {
            let request = with(&[(keys::REQUEST_MULTICAST_CONTROL, value)]).unwrap();
            assert_eq!(request.multicast_control, expected);
            assert_eq!(request.features.contains(Features::MULTICAST_CONTROL), expected);
            assert_eq!(multicast_control(Some(value.as_bytes())), expected);
        }
        assert!(!multicast_control(None) && !multicast_control(Some(b"1 ")));
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
        let on_request = Features::MULTICAST_CONTROL
            | Features::DYNAMIC_MULTICAST
            | Features::CTRL_RING
            | Features::XDP_HEADROOM;
        assert_eq!(request.features, OFFERED - on_request);
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
            for key in [
                "tx-ring-ref",
                "event-channel",
                "multi-queue-num-queues",
                "feature-sg",
                "ctrl-ring-ref",
                "event-channel-ctrl",
                "request-multicast-control",
                "xdp-headroom",
            ] {
                let mut values = directory(&ONE);
                values.insert("ctrl-ring-ref".into(), b"7".to_vec());
                values.insert("event-channel-ctrl".into(), b"7".to_vec());
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
        for key in [
            "queue-1/event-channel-rx",
            "tx-ring-ref",
            "feature-no-csum-offload",
            "ctrl-ring-ref",
            "event-channel-ctrl",
            "request-multicast-control",
            "xdp-headroom",
        ] {
            assert!(names.iter().any(|name| name == key), "{key}");
        }
    }
}

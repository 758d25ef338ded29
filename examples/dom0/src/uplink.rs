//! The way out: the switch's port at this machine's network card.

use alloc::string::String;
use core::fmt::Write as _;

use hypercall::Instant;
use netback::Backend;
use netback::datapath::{Datapath, Nic};
use netback::uplink::{self, Card as _, UplinkConfig, UplinkCounters};
use runtime::Hv;
use runtime::virtio::{self, Net};
use services::exposition::Page;

use crate::capture::Capture;
use crate::options;
use crate::tap::Tap;

/// Finds the network card, if there is one and it is wanted.
pub(crate) fn find(hv: &Hv, wanted: options::Nic) -> Option<Net> {
    let net = match wanted {
        options::Nic::Off => {
            log::info!("dom0: nic=off: guests reach each other and this domain, and nobody else");
            return None;
        }
        options::Nic::On => virtio::find(hv, true),
        options::Nic::Noncoherent => virtio::find(hv, false),
    };
    match &net {
        Some(net) => log::info!(
            "dom0: nic {} features {}, {}",
            net.mac(),
            net.features(),
            if net.is_coherent() { "coherent" } else { "not coherent" }
        ),
        None => {
            log::info!("dom0: no nic: guests reach each other and this domain, and nobody else")
        }
    }
    net
}

/// What the backend has to know of a card.
pub(crate) fn facts(net: &Net) -> Nic {
    Nic { coherent: net.is_coherent() }
}

/// The port.
pub(crate) struct Uplink(uplink::Uplink<Hv, Tap>);

impl Uplink {
    /// What goes by the card is recorded in `capture`, if there is one.
    pub(crate) fn new(net: Net, capture: Option<Capture>) -> Self {
        Self(uplink::Uplink::new(Tap { net, capture }, UplinkConfig::default()))
    }

    /// Carries packets both ways. Answers whether there is more to do at once.
    pub(crate) fn poll(&mut self, backend: &mut Backend<Hv>, now: Instant) -> bool {
        self.0.card_mut().net.acknowledge();
        self.0.poll(backend, now)
    }

    pub(crate) const fn deadline(&self) -> Option<Instant> {
        self.0.deadline()
    }

    /// What has gone by, as lines for the operator.
    pub(crate) fn table(&self) -> String {
        let counters = self.0.counters();
        let UplinkCounters { offloads, arrived, hardware, .. } = counters;
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = write!(text, "nic {}: {} in flight", self.0.card().mac(), self.0.in_flight());
        for path in Datapath::ALL {
            let sent = counters.sent(path);
            if sent != Default::default() {
                let _ = write!(text, "; by {path} {} frames, {} bytes", sent.frames, sent.bytes);
            }
        }
        let _ = writeln!(
            text,
            "; {} of these cut here; received {} frames, {} bytes; {} resets",
            offloads.segments, arrived.frames, arrived.bytes, hardware.resets
        );
        text
    }

    /// All that is counted.
    pub(crate) fn metrics(&self, page: &mut Page) {
        let counters = self.0.counters();
        let sent = || Datapath::ALL.map(|path| (path, counters.sent(path)));
        for (index, (what, _)) in counters.sent(Datapath::Copy).iter().enumerate() {
            let name = alloc::format!("netback_uplink_sent_{what}_total");
            page.family(&name, "counter", "Given to the network card, by datapath.");
            for (path, carried) in sent() {
                let value = carried.iter().nth(index).map_or(0, |(_, value)| value);
                page.sample(&name, format_args!("path=\"{path}\""), value);
            }
        }
        for (what, value) in counters.arrived.iter() {
            let name = alloc::format!("netback_uplink_received_{what}_total");
            page.counter(&name, "Received from the network card.", value);
        }
        let name = "netback_uplink_offloads_total";
        page.family(name, "counter", "Done to packets on their way out.");
        for (what, value) in counters.offloads.iter() {
            page.sample(name, format_args!("what=\"{what}\""), value);
        }
        let name = "netback_uplink_copied_total";
        page.family(name, "counter", "Packets that came mapped and went out copied.");
        for (reason, value) in counters.copied.iter() {
            page.sample(name, format_args!("reason=\"{reason}\""), value);
        }
        let name = "netback_uplink_cleaned_total";
        page.family(name, "counter", "Pieces of guests' pages written back from the caches.");
        for (how, value) in counters.cleaned.iter() {
            page.sample(name, format_args!("how=\"{how}\""), value);
        }
        let name = "netback_uplink_drops_total";
        page.family(name, "counter", "Dropped at the network card; tx is towards it.");
        for (reason, value) in counters.send_drops.iter() {
            page.sample(name, format_args!("dir=\"tx\",reason=\"{reason}\""), value);
        }
        for (reason, value) in counters.receive_drops.iter() {
            page.sample(name, format_args!("dir=\"rx\",reason=\"{reason}\""), value);
        }
        for (what, value) in counters.hardware.iter() {
            let name = alloc::format!("netback_uplink_{what}_total");
            page.counter(&name, "How the network card did.", value);
        }
        let help = "Frames that the network card has and has not sent yet.";
        page.gauge("netback_uplink_in_flight", help, self.0.in_flight());
    }
}

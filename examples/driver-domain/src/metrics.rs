//! What a driver domain counts, as text that Prometheus reads: what its backend counts, and what is its own.

use alloc::format;
use alloc::string::String;

use evtchn::Delivery;
use hypercall::Instant;
use runtime::Hv;
use services::exposition::Page;
use services::metrics::{self, Sources};
use xenbus::client::Stats;

/// What the machine underneath says.
pub(crate) struct Machine {
    /// How events come.
    pub(crate) delivery: Delivery,
    /// What the store client has put up with.
    pub(crate) store: Stats,
    pub(crate) now: Instant,
}

/// The page that `/metrics` answers with.
pub(crate) fn page(sources: &Sources<'_, Hv>, machine: &Machine) -> String {
    let mut page = Page::new();
    page.family("driver_domain_info", "gauge", "How its events come.");
    let delivery = format!("delivery=\"{:?}\"", machine.delivery);
    page.sample("driver_domain_info", delivery, 1);
    let millis = machine.now.0 / 1_000_000;
    let uptime = format_args!("{}.{:03}", millis / 1000, millis % 1000);
    let help = "Time since the domain began, as it sees it.";
    page.gauge("driver_domain_uptime_seconds", help, uptime);
    let features = sources.backend.features().snapshot();
    let bits = features.bits().bits();
    page.gauge("xen_features", "XENFEAT bits that Xen offers this domain.", bits);
    page.counter("xen_features_epoch", "Times that they have changed.", features.epoch().0);
    metrics::write(&mut page, sources);
    let Stats { stray_events, collapsed_events } = machine.store;
    page.counter("xenstore_stray_events_total", "Events of no watch of ours.", stray_events);
    page.counter("xenstore_collapsed_events_total", "Watches too busy to list.", collapsed_events);
    let heap = runtime::heap_stats();
    page.gauge("heap_used_bytes", "Memory in use.", heap.used);
    page.gauge("heap_total_bytes", "Memory there is.", heap.total);
    page.into_text()
}

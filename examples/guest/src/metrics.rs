//! What a guest counts, as text that Prometheus reads.

use alloc::format;
use alloc::string::String;

use evtchn::Delivery;
use features::Snapshot;
use grant::GrantTable;
use hypercall::{Hypervisor, Instant};
use netfront::Frontend;
use services::exposition::Page;
use xenbus::client::Stats;

use crate::nic::Nic;

/// What the machine underneath says.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// What Xen offers.
    pub features: Snapshot,
    /// How events come.
    pub delivery: Delivery,
    /// Ports that are bound.
    pub ports: usize,
    /// What the store client has put up with.
    pub store: Stats,
    /// Bytes of memory in use.
    pub heap_used: usize,
    /// Bytes of memory there are.
    pub heap_total: usize,
    /// Suspends that ended elsewhere.
    pub resumes: u64,
    /// Suspends that were cancelled.
    pub cancelled: u64,
}

/// The page that `/metrics` answers with.
pub fn page<H: Hypervisor>(
    name: &str,
    machine: &Machine,
    nic: &Nic<H>,
    table: &GrantTable<H>,
    now: Instant,
) -> String {
    let mut page = Page::new();
    page.family("guest_info", "gauge", "Which guest this is, and how its events come.");
    let delivery = format!("{:?}", machine.delivery);
    page.sample("guest_info", format_args!("name=\"{name}\",delivery=\"{delivery}\""), 1);
    let millis = now.0 / 1_000_000;
    let uptime = format_args!("{}.{:03}", millis / 1000, millis % 1000);
    page.gauge("guest_uptime_seconds", "Time since the domain began, as it sees it.", uptime);
    page.counter("guest_resumes_total", "Suspends that ended in a new life.", machine.resumes);
    let cancelled = machine.cancelled;
    page.counter("guest_suspends_cancelled_total", "Suspends that were taken back.", cancelled);
    let bits = machine.features.bits().bits();
    page.gauge("xen_features", "XENFEAT bits that Xen offers this domain.", bits);
    let epoch = machine.features.epoch().0;
    page.counter("xen_features_epoch", "Times that they have changed.", epoch);

    netfront(&mut page, nic);

    page.gauge("grant_granted", "Pages that others may use.", table.granted());
    page.gauge("grant_parked", "Pages that others still used when we were done.", table.parked());
    page.gauge("grant_free", "References that are free without growing the table.", table.free());
    page.gauge("evtchn_ports_bound", "Event channels that are bound.", machine.ports);
    let Stats { stray_events, collapsed_events } = machine.store;
    page.counter("xenstore_stray_events_total", "Events of no watch of ours.", stray_events);
    page.counter("xenstore_collapsed_events_total", "Watches too busy to list.", collapsed_events);
    page.gauge("heap_used_bytes", "Memory in use.", machine.heap_used);
    page.gauge("heap_total_bytes", "Memory there is.", machine.heap_total);
    page.into_text()
}

fn netfront<H: Hypervisor>(page: &mut Page, nic: &Nic<H>) {
    let frontend = nic.frontend();
    page.family("netfront_info", "gauge", "What packets may go out.");
    let features = frontend.map(|frontend| format!("{}", frontend.features())).unwrap_or_default();
    page.sample("netfront_info", format_args!("features=\"{features}\""), 1);
    let state = frontend.map_or("0", |frontend| frontend.state().text());
    page.gauge("netfront_state", "State of the frontend, as in io/xenbus.h.", state);
    let queues = frontend.map_or(0, Frontend::queues);
    page.gauge("netfront_queues", "Queues that are connected.", queues);
    let statics = frontend.map_or(0, Frontend::static_grants);
    page.gauge("netfront_static_grants", "Pages that the backend keeps mapped.", statics);
    let connections = nic.connections();
    page.counter("netfront_connections_total", "Times that packets began to flow.", connections);
    let counters = nic.counters();
    page.counter("netfront_spurious_total", "Events that announced nothing.", counters.spurious);
    for (name, value) in counters.tx.iter() {
        let name = format!("netfront_tx_{name}_total");
        page.counter(&name, "To the backend; see netfront::TxCounters.", value);
    }
    for (name, value) in counters.rx.iter() {
        let name = format!("netfront_rx_{name}_total");
        page.counter(&name, "From the backend; see netfront::RxCounters.", value);
    }
}

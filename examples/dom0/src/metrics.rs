//! What dom0 counts, as text that Prometheus reads: what its backend counts, and what is its own.

use alloc::string::String;
use core::iter;

use hypercall::{DomId, Instant, Toolstack as _};
use runtime::Hv;
use services::exposition::Page;
use services::metrics::{self, Sources};

use crate::store::Store;
use crate::toolstack::Toolstack;
use crate::uplink::Uplink;

/// The page that `/metrics` answers with.
pub(crate) fn page(
    hv: &Hv,
    sources: &Sources<'_, Hv>,
    uplink: Option<&Uplink>,
    store: &Store,
    toolstack: &Toolstack,
    now: Instant,
) -> String {
    let mut page = Page::new();
    let name = "xen_domain_cpu_seconds_total";
    page.family(name, "counter", "Processor time that Xen has counted for a domain.");
    for domain in iter::once(DomId(0)).chain(toolstack.guests()) {
        if let Ok(info) = hv.domain_info(domain) {
            let (seconds, nanos) = (info.cpu_time / 1_000_000_000, info.cpu_time % 1_000_000_000);
            let labels = format_args!("domid=\"{domain}\"");
            page.sample(name, labels, format_args!("{seconds}.{nanos:09}"));
        }
    }
    let millis = now.0 / 1_000_000;
    let uptime = format_args!("{}.{:03}", millis / 1000, millis % 1000);
    page.gauge("dom0_uptime_seconds", "Time since the machine's counter started.", uptime);
    metrics::write(&mut page, sources);
    if let Some(uplink) = uplink {
        uplink.metrics(&mut page);
    }
    store_usage(&mut page, store);
    let heap = runtime::heap_stats();
    page.gauge("heap_used_bytes", "Memory in use.", heap.used);
    page.gauge("heap_total_bytes", "Memory there is.", heap.total);
    page.into_text()
}

fn store_usage(page: &mut Page, store: &Store) {
    let server = &store.server;
    for (name, help) in [
        ("xenstore_nodes", "Nodes of the store that a domain owns."),
        ("xenstore_watches", "Watches of a domain."),
        ("xenstore_transactions", "Transactions of a domain that are open."),
    ] {
        page.family(name, "gauge", help);
        for (domain, usage) in server.usages() {
            let value = match name {
                "xenstore_nodes" => usage.nodes,
                "xenstore_watches" => usage.watches,
                _ => usage.transactions,
            };
            page.sample(name, format_args!("domid=\"{domain}\""), value);
        }
    }
    page.gauge("xenstore_nodes_all", "Nodes of the store.", server.stats().nodes);
    let name = "xenstore_connection_faults_total";
    page.family(name, "counter", "Store connections that were ended for what came by them.");
    for (domain, count) in store.faults() {
        page.sample(name, format_args!("domid=\"{domain}\""), count);
    }
}

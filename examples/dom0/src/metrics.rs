//! What dom0 counts, as text that Prometheus reads.

use alloc::string::String;
use core::fmt::{self, Write};

use grant::Mapper;
use hypercall::{DomId, Instant, Toolstack};
use netback::counters::{Direction, Drops, PathCounters};
use netback::datapath::Datapath;
use netback::{Backend, VifStatus};
use runtime::Hv;

use crate::store::Store;

/// All that there is to be counted.
pub(crate) struct Sources<'a> {
    pub(crate) hv: &'a Hv,
    pub(crate) backend: &'a Backend<Hv>,
    pub(crate) store: &'a Store,
    pub(crate) mapper: &'a Mapper<Hv>,
    /// Event channels that are bound.
    pub(crate) ports: usize,
    /// Packets that dom0's own stack lost for want of a buffer.
    pub(crate) lost: u64,
    pub(crate) now: Instant,
}

/// The page that `/metrics` answers with.
pub(crate) fn page(sources: &Sources<'_>) -> String {
    let mut text = String::with_capacity(16 * 1024);
    // Writing to a string cannot fail.
    let _ = write_all(&mut text, sources);
    text
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) -> fmt::Result {
    write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n")
}

fn gauge(text: &mut String, name: &str, help: &str, value: impl fmt::Display) -> fmt::Result {
    head(text, name, "gauge", help)?;
    writeln!(text, "{name} {value}")
}

fn write_all(text: &mut String, sources: &Sources<'_>) -> fmt::Result {
    let Sources { hv, backend, store, mapper, ports, lost, now } = *sources;
    if let Ok(info) = hv.domain_info(DomId(0)) {
        let name = "xen_domain_cpu_seconds_total";
        head(text, name, "counter", "Processor time that Xen has counted for a domain.")?;
        let (seconds, nanos) = (info.cpu_time / 1_000_000_000, info.cpu_time % 1_000_000_000);
        writeln!(text, "{name}{{domid=\"0\"}} {seconds}.{nanos:09}")?;
    }
    let millis = now.0 / 1_000_000;
    let uptime = format_args!("{}.{:03}", millis / 1000, millis % 1000);
    gauge(text, "dom0_uptime_seconds", "Time since the machine's counter started.", uptime)?;

    vifs(text, backend)?;

    paths(text, backend)?;

    gauge(text, "grant_mappings", "Pages of others that are mapped.", mapper.live())?;
    gauge(text, "grant_mappings_parked", "Pages that Xen would not unmap.", mapper.parked())?;
    gauge(text, "evtchn_ports_bound", "Event channels that are bound.", ports)?;
    let (small, large) = (backend.pools().small(), backend.pools().large());
    let (free, total) = (small.free + large.free, small.total + large.total);
    gauge(text, "netback_frames_free", "Packet buffers that are not in use.", free)?;
    gauge(text, "netback_frames_total", "Packet buffers.", total)?;
    let switch = backend.switch_counters();
    for (name, value) in [
        ("switch_flooded_total", switch.flooded),
        ("switch_hairpin_total", switch.hairpin),
        ("switch_local_full_total", switch.local_full),
        ("stack_lost_total", lost),
    ] {
        head(text, name, "counter", "Packets without a single port, or without room.")?;
        writeln!(text, "{name} {value}")?;
    }

    store_usage(text, store)?;

    let heap = runtime::heap_stats();
    gauge(text, "heap_used_bytes", "Memory in use.", heap.used)?;
    gauge(text, "heap_total_bytes", "Memory there is.", heap.total)
}

/// A value of each vif, by direction.
type Pick = fn(&Direction) -> u64;

const BY_DIRECTION: [(&str, Pick, &str); 7] = [
    ("netback_vif_packets_total", |way| way.packets, "Packets carried; tx is from the guest."),
    ("netback_vif_bytes_total", |way| way.bytes, "Bytes carried."),
    ("netback_vif_gso_packets_total", |way| way.gso_packets, "Packets that stood for several."),
    ("netback_vif_fixed_up_total", |way| way.fixed_up, "Packets whose checksum mark was missing."),
    ("netback_notifications_total", |way| way.notifications, "Notifications sent."),
    ("netback_publishes_total", |way| way.publishes, "Times responses were published."),
    ("netback_spurious_events_total", |way| way.spurious, "Events that announced nothing."),
];

fn vifs(text: &mut String, backend: &Backend<Hv>) -> fmt::Result {
    for (name, pick, help) in BY_DIRECTION {
        head(text, name, "counter", help)?;
        for vif in backend.vifs() {
            let label = Label(&vif);
            writeln!(text, "{name}{{{label},dir=\"tx\"}} {}", pick(&vif.counters.tx))?;
            writeln!(text, "{name}{{{label},dir=\"rx\"}} {}", pick(&vif.counters.rx))?;
        }
    }
    let name = "netback_vif_drops_total";
    head(text, name, "counter", "Packets that did not get where they were going.")?;
    for vif in backend.vifs() {
        drops(text, &vif, "tx", &vif.counters.tx_drops)?;
        drops(text, &vif, "rx", &vif.counters.rx_drops)?;
    }
    head(text, "netback_vif_state", "gauge", "State of the backend's end, as in io/xenbus.h.")?;
    for vif in backend.vifs() {
        writeln!(text, "netback_vif_state{{{}}} {}", Label(&vif), vif.state.text())?;
    }
    head(text, "netback_vif_queues", "gauge", "Queues that are connected.")?;
    for vif in backend.vifs() {
        writeln!(text, "netback_vif_queues{{{}}} {}", Label(&vif), vif.queues)?;
    }
    Ok(())
}

/// How packets were carried. A way that no packet of a vif has taken is left out.
fn paths(text: &mut String, backend: &Backend<Hv>) -> fmt::Result {
    for (index, (what, _)) in PathCounters::default().iter().enumerate() {
        let name = format_args!("netback_path_{what}_total");
        writeln!(text, "# HELP {name} Of each datapath; tx is from the guest.")?;
        writeln!(text, "# TYPE {name} counter")?;
        for vif in backend.vifs() {
            let counters = &vif.counters;
            for (way, paths) in [("tx", &counters.tx_paths), ("rx", &counters.rx_paths)] {
                for (path, counters) in paths.iter().filter(|(_, one)| *one != Default::default()) {
                    let value = counters.iter().nth(index).map_or(0, |(_, value)| value);
                    let label = Label(&vif);
                    writeln!(text, "{name}{{{label},dir=\"{way}\",path=\"{path}\"}} {value}")?;
                }
            }
        }
    }
    let name = "netback_fallbacks_total";
    head(text, name, "counter", "Packets that were copied though another way was wanted.")?;
    for vif in backend.vifs() {
        for (reason, count) in vif.counters.fallbacks.iter() {
            writeln!(text, "{name}{{{},reason=\"{reason}\"}} {count}", Label(&vif))?;
        }
    }
    let name = "netback_path_up";
    head(text, name, "gauge", "Whether new packets may take a datapath.")?;
    for path in Datapath::ALL {
        let up = u8::from(backend.datapaths().contains(path.only()));
        writeln!(text, "{name}{{path=\"{path}\"}} {up}")?;
    }
    let name = "netback_switches_total";
    head(text, name, "counter", "Times that the datapaths in use have changed.")?;
    writeln!(text, "{name} {}", backend.switches())?;
    gauge(text, "netback_packets_open", "Packets that are not answered yet.", backend.open())
}

fn drops(text: &mut String, vif: &VifStatus, way: &str, drops: &Drops) -> fmt::Result {
    for (reason, count) in drops.iter() {
        let label = Label(vif);
        writeln!(
            text,
            "netback_vif_drops_total{{{label},dir=\"{way}\",reason=\"{reason}\"}} {count}"
        )?;
    }
    Ok(())
}

struct Label<'a>(&'a VifStatus);

impl fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vif=\"{}.{}\"", self.0.id.domain, self.0.id.handle)
    }
}

fn store_usage(text: &mut String, store: &Store) -> fmt::Result {
    let server = &store.server;
    for (name, help) in [
        ("xenstore_nodes", "Nodes of the store that a domain owns."),
        ("xenstore_watches", "Watches of a domain."),
        ("xenstore_transactions", "Transactions of a domain that are open."),
    ] {
        head(text, name, "gauge", help)?;
        for (domain, usage) in server.usages() {
            let value = match name {
                "xenstore_nodes" => usage.nodes,
                "xenstore_watches" => usage.watches,
                _ => usage.transactions,
            };
            writeln!(text, "{name}{{domid=\"{domain}\"}} {value}")?;
        }
    }
    gauge(text, "xenstore_nodes_all", "Nodes of the store.", server.stats().nodes)?;
    let name = "xenstore_connection_faults_total";
    head(text, name, "counter", "Store connections that were ended for what came by them.")?;
    for (domain, count) in store.faults() {
        writeln!(text, "{name}{{domid=\"{domain}\"}} {count}")?;
    }
    Ok(())
}

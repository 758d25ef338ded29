//! What a backend counts, on a page that Prometheus reads.

use core::fmt;

use grant::Mapper;
use hypercall::Hypervisor;
use netback::counters::{Direction, Drops, PathCounters};
use netback::datapath::{Datapath, Ways};
use netback::{Backend, PoolUse, VifStatus};

use crate::exposition::Page;

/// Of whom it is counted.
pub struct Sources<'a, H: Hypervisor> {
    /// The backend,
    pub backend: &'a Backend<H>,
    /// what it maps with,
    pub mapper: &'a Mapper<H>,
    /// the event channels that are bound,
    pub ports: usize,
    /// and the packets that the station lost for want of a buffer.
    pub lost: u64,
}

/// Writes all of it.
pub fn write<H: Hypervisor>(page: &mut Page, sources: &Sources<'_, H>) {
    let Sources { backend, mapper, ports, lost } = *sources;
    vifs(page, backend);
    paths(page, backend);
    page.gauge("grant_mappings", "Pages of others that are mapped.", mapper.live());
    page.gauge("grant_mappings_parked", "Pages that Xen would not unmap.", mapper.parked());
    page.gauge("evtchn_ports_bound", "Event channels that are bound.", ports);
    let PoolUse { free, total } = backend.pools().all();
    page.gauge("netback_frames_free", "Packet buffers that are not in use.", free);
    page.gauge("netback_frames_total", "Packet buffers.", total);
    let switch = backend.switch_counters();
    for (name, value) in [
        ("switch_flooded_total", switch.flooded),
        ("switch_hairpin_total", switch.hairpin),
        ("switch_local_full_total", switch.local_full),
        ("switch_local_no_buffer_total", switch.local_no_buffer),
        ("switch_uplink_full_total", switch.uplink_full),
        ("switch_uplink_no_buffer_total", switch.uplink_no_buffer),
        ("switch_uplink_spoofed_total", switch.uplink_spoofed),
        ("stack_lost_total", lost),
    ] {
        page.counter(name, "Packets without a single port, or without room.", value);
    }
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

fn vifs<H: Hypervisor>(page: &mut Page, backend: &Backend<H>) {
    for (name, pick, help) in BY_DIRECTION {
        page.family(name, "counter", help);
        for vif in backend.vifs() {
            let label = Label(&vif);
            page.sample(name, format_args!("{label},dir=\"tx\""), pick(&vif.counters.tx));
            page.sample(name, format_args!("{label},dir=\"rx\""), pick(&vif.counters.rx));
        }
    }
    let help = "Packets that did not get where they were going.";
    page.family("netback_vif_drops_total", "counter", help);
    for vif in backend.vifs() {
        drops(page, &vif, "tx", &vif.counters.tx_drops);
        drops(page, &vif, "rx", &vif.counters.rx_drops);
    }
    let help = "State of the backend's end, as in io/xenbus.h.";
    page.family("netback_vif_state", "gauge", help);
    for vif in backend.vifs() {
        page.sample("netback_vif_state", Label(&vif), vif.state.text());
    }
    page.family("netback_vif_queues", "gauge", "Queues that are connected.");
    for vif in backend.vifs() {
        page.sample("netback_vif_queues", Label(&vif), vif.queues);
    }
}

/// How packets were carried. A way that no packet of a vif has taken is left out.
fn paths<H: Hypervisor>(page: &mut Page, backend: &Backend<H>) {
    for (index, (what, _)) in PathCounters::default().iter().enumerate() {
        let name = format_args!("netback_path_{what}_total");
        page.family(name, "counter", "Of each datapath; tx is from the guest.");
        for vif in backend.vifs() {
            let counters = &vif.counters;
            for (way, paths) in [("tx", &counters.tx_paths), ("rx", &counters.rx_paths)] {
                for (path, counters) in paths.iter().filter(|(_, one)| *one != Default::default()) {
                    let value = counters.iter().nth(index).map_or(0, |(_, value)| value);
                    let label = Label(&vif);
                    let labels = format_args!("{label},dir=\"{way}\",path=\"{path}\"");
                    page.sample(name, labels, value);
                }
            }
        }
    }
    let name = "netback_fallbacks_total";
    page.family(name, "counter", "Packets that were copied though another way was wanted.");
    for vif in backend.vifs() {
        for (reason, count) in vif.counters.fallbacks.iter() {
            page.sample(name, format_args!("{},reason=\"{reason}\"", Label(&vif)), count);
        }
    }
    let Ways { local, uplink } = backend.datapaths();
    let help = "Whether new packets may take a datapath.";
    for (name, ways) in [("netback_path_up", local), ("netback_uplink_path_up", uplink)] {
        page.family(name, "gauge", help);
        for path in Datapath::ALL {
            let up = u8::from(ways.contains(path.only()));
            page.sample(name, format_args!("path=\"{path}\""), up);
        }
    }
    let help = "Times that the datapaths in use have changed.";
    page.counter("netback_switches_total", help, backend.switches());
    page.gauge("netback_packets_open", "Packets that are not answered yet.", backend.open());
}

fn drops(page: &mut Page, vif: &VifStatus, way: &str, drops: &Drops) {
    for (reason, count) in drops.iter() {
        let labels = format_args!("{},dir=\"{way}\",reason=\"{reason}\"", Label(vif));
        page.sample("netback_vif_drops_total", labels, count);
    }
}

struct Label<'a>(&'a VifStatus);

impl fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vif=\"{}.{}\"", self.0.id.domain, self.0.id.handle)
    }
}

//! All vifs as tables, for people at the console and for scripts that read them there.

use alloc::format;
use alloc::string::String;
use core::fmt::{self, Write as _};

use hypercall::Hypervisor;
use netback::Backend;
use netback::datapath::Ways;

/// A line per vif; then a line per vif, direction and datapath that packets have taken, tx being from the guest; then the
/// datapaths that packets may take now.
#[must_use]
pub fn table<H: Hypervisor>(backend: &Backend<H>) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(&mut text, backend);
    text
}

fn write_all<H: Hypervisor>(text: &mut String, backend: &Backend<H>) -> fmt::Result {
    writeln!(
        text,
        "{:<8} {:<12} {:>6} {:>9} {:>9}  features",
        "vif", "state", "queues", "tx drops", "rx drops"
    )?;
    for vif in backend.vifs() {
        let (tx, rx) = (&vif.counters.tx_drops, &vif.counters.rx_drops);
        writeln!(
            text,
            "{:<8} {:<12} {:>6} {:>9} {:>9}  {}",
            format!("{}.{}", vif.id.domain, vif.id.handle),
            format!("{:?}", vif.state),
            vif.queues,
            tx.iter().map(|(_, count)| count).sum::<u64>(),
            rx.iter().map(|(_, count)| count).sum::<u64>(),
            vif.features
        )?;
    }
    writeln!(
        text,
        "{:<8} {:<3} {:<12} {:>10} {:>14} {:>10} {:>10} {:>8} {:>8}",
        "vif", "way", "datapath", "packets", "bytes", "hypercalls", "copies", "maps", "unmaps"
    )?;
    for vif in backend.vifs() {
        let counters = &vif.counters;
        for (way, paths) in [("tx", &counters.tx_paths), ("rx", &counters.rx_paths)] {
            for (path, one) in paths.iter().filter(|(_, one)| *one != Default::default()) {
                writeln!(
                    text,
                    "{:<8} {way:<3} {path:<12} {:>10} {:>14} {:>10} {:>10} {:>8} {:>8}",
                    format!("{}.{}", vif.id.domain, vif.id.handle),
                    one.packets,
                    one.bytes,
                    one.hypercalls,
                    one.copies,
                    one.maps,
                    one.unmaps
                )?;
            }
        }
    }
    let Ways { local, uplink } = backend.datapaths();
    write!(text, "in use: {local}")?;
    if !uplink.is_empty() {
        write!(text, "; to the uplink: {uplink}")?;
    }
    writeln!(text, "; changed {} times", backend.switches())
}

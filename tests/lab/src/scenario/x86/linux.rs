//! Stock Linux guests on Linux's own backend.

use anyhow::Result;

use super::{created, dom0_up, exchange, linux_ready, name, pings};
use crate::boot;
use crate::console::Source;
use crate::images;
use crate::machine::x86_64::Board;
use crate::run::{Run, Tally};

pub fn boot(name: &'static str) -> Result<()> {
    let images = images::prepare_xl(&[])?;
    boot::interactive(
        name,
        &Board { images: &images, xen_arguments: "", dom0_arguments: "lab=shell" },
    )
}

pub fn test(name: &'static str) -> Result<Tally> {
    let images = images::prepare_xl(&[])?;
    let board = Board { images: &images, xen_arguments: "", dom0_arguments: "" };
    let mut run = Run::start(name, &board)?;
    if dom0_up(&mut run)
        && created(&mut run, 1, "pvh", "0", "")
        && created(&mut run, 2, "pv", "0", "")
    {
        for (domain, kind) in [(1, "pvh"), (2, "pv")] {
            guest(&mut run, domain, kind);
        }
        exchange(&mut run, 1, 2, "Linux PV, from Linux PVH", "pvh_pv");
    }
    run.finish(name)
}

fn guest(run: &mut Run, domain: usize, kind: &str) {
    let what = name(kind, domain);
    let made = linux_ready(run, domain);
    run.check(&format!("{what} has its interface"), Source::Dom(domain), made);
    pings(run, 0, domain, &what, 200);
    exchange(run, 0, domain, &what, kind);
    let made = reattach(run, domain);
    run.check(&format!("{what} loses its vif and gets another"), Source::Dom(domain), made);
    pings(run, 0, domain, &format!("{what} again"), 20);
}

fn reattach(run: &Run, domain: usize) -> Result<String> {
    run.good(0, &format!("detach {domain}"), 60)?;
    run.good(0, &format!("attach {domain} 0"), 60)?;
    Ok(run.good(domain, "net 1", 170)?.text())
}

//! Stock Linux guests on Linux's own backend.

use anyhow::Result;

use super::{Made, connected, created, dom0_up, linux_ready, name, reached, reattach};
use crate::boot;
use crate::console::Source;
use crate::run::{Run, Tally};
use crate::scenario::transfer::{exchange, pings};

pub fn boot(name: &'static str) -> Result<()> {
    boot::interactive(name, &Made::prepare(&[])?.board("lab=shell"))
}

pub fn test(name: &'static str) -> Result<Tally> {
    let made = Made::prepare(&[])?;
    let mut run = Run::start(name, &made.board(""))?;
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
    let made = again(run, domain);
    run.check(&format!("{what} loses its vif and gets another"), Source::Dom(domain), made);
    let made = reached(run, 0, domain, 20);
    run.check(&format!("{what} answers pings again"), Source::Dom(domain), made);
}

fn again(run: &Run, domain: usize) -> Result<String> {
    reattach(run, domain, "0")?;
    let answer = run.good(domain, "net 1", 170)?;
    connected(run, domain, 60)?;
    Ok(answer.text())
}

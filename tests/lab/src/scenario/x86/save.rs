//! Our guest is saved and restored while data flows.

use anyhow::{Context as _, Result, ensure};

use super::{Made, connected, created, dom0_up, name};
use crate::boot;
use crate::console::Source;
use crate::metrics::Metrics;
use crate::run::{Answer, Run, Tally};
use crate::scenario::transfer::{FILE, at, exchange, pings};

/// Our guest.
const OURS: usize = 3;
/// Transfers are made to last: this many seconds after each 128 KiB of 64 MiB.
const PAUSE: &str = "0.02";
/// Time for a transfer to be under way.
const BEGUN: u32 = 2;
/// What has to be the same after a life has ended and another begun.
const HELD: &[&str] = &["grant_parked", "evtchn_ports_bound", "netfront_queues"];
/// Pages that one connection can have granted at most: a page for each slot of both rings, the rings, the control ring. How
/// many pages of those are kept between packets depends on the traffic; what a life leaves behind is more than half of it.
const GRANTED: f64 = 256.0 + 256.0 + 3.0;
/// Memory in use may differ by as much; a life that is left behind has more.
const HEAP: f64 = 512.0 * 1024.0;

pub fn boot(name: &'static str) -> Result<()> {
    boot::interactive(name, &Made::prepare(&["guest"])?.board("lab=shell"))
}

pub fn test(scenario: &'static str) -> Result<Tally> {
    let made = Made::prepare(&["guest"])?;
    let mut run = Run::start(scenario, &made.board(""))?;
    if dom0_up(&mut run) && created(&mut run, OURS, "guest", "0", "") {
        let what = name("guest", OURS);
        pings(&mut run, 0, OURS, &what, 100);
        exchange(&mut run, 0, OURS, &what, "guest");
        let before = run.metrics_of(&at(OURS), 0, "before");
        let to = format!("sink {} {PAUSE}", at(OURS));
        let from = format!("source {} {FILE} 7 {PAUSE}", at(OURS));
        for (number, way, steps) in [
            (1, "to it", vec![to.clone()]),
            (2, "from it", vec![from.clone()]),
            (3, "both ways", vec![to, from]),
        ] {
            let made = moved(&run, number, &steps);
            let name = format!("our guest is saved and restored with 64 MiB {way} under way");
            run.check(&name, Source::Dom(OURS), made);
        }
        let made = before.and_then(|before| held(&run, &before));
        run.check("our guest has lost nothing and keeps nothing", Source::Dom(OURS), made);
        exchange(&mut run, 0, OURS, "our guest after three lives", "guest_restored");
    }
    run.finish(scenario)
}

/// Transfers begin, the guest is saved and restored, the transfers end with the right SHA-256.
fn moved(run: &Run, number: u32, steps: &[String]) -> Result<String> {
    for (i, step) in steps.iter().enumerate() {
        run.good(0, &format!("bg transfer{i} {step}"), 20)?;
    }
    run.good(0, &format!("settle {BEGUN}"), 20)?;
    let (mark, started) = (run.machine.console.mark(Source::Dom(OURS)), run.age());
    run.good(0, &format!("xl save dom{OURS} /tmp/saved"), 170)?;
    let under_way = (0..steps.len())
        .try_for_each(|i| run.good(0, &format!("bgruns transfer{i}"), 20).map(|_| ()))
        .context("the transfer ended before the guest was saved");
    run.good(0, "xl restore /tmp/saved", 170)?;
    under_way?;
    let away = (run.age() - started).as_secs_f64();
    let features = run
        .machine
        .console
        .wait(Source::Dom(OURS), mark, std::time::Duration::from_secs(60), |line| {
            Some(line.text.split_once("guest: resumed, features ")?.1.to_owned())
        })
        .context("waited for \"guest: resumed\"")?;
    connected(run, OURS, 60)?;
    let ended: Vec<Answer> = (0..steps.len())
        .map(|i| run.good(0, &format!("bgwait transfer{i}"), 175))
        .collect::<Result<_>>()?;
    let seconds = ended.iter().map(|a| a.number("seconds")).collect::<Result<Vec<_>>>()?;
    let slowest = seconds.into_iter().fold(0.0, f64::max);
    let lives = run.metrics_of(&at(OURS), 0, &format!("life-{number}"))?;
    let resumes = lives.need("guest_resumes_total", &[])?;
    ensure!(resumes == f64::from(number), "guest_resumes_total is {resumes}");
    Ok(format!("away for {away:.1} s of {slowest:.1} s, features {features}"))
}

fn held(run: &Run, before: &Metrics) -> Result<String> {
    let after = run.metrics_of(&at(OURS), 0, "after")?;
    let mut text = Vec::new();
    for name in HELD {
        let (old, new) = (before.need(name, &[])?, after.need(name, &[])?);
        ensure!(old == new, "{name} was {old} and is {new}");
        text.push(format!("{name} {new}"));
    }
    let granted = after.need("grant_granted", &[])?;
    ensure!(granted <= GRANTED, "{granted} pages are granted, more than one life needs");
    let grown = after.need("heap_used_bytes", &[])? - before.need("heap_used_bytes", &[])?;
    ensure!(grown <= HEAP, "{grown} bytes more of memory are in use");
    text.push(format!("grant_granted {granted}, {grown} bytes more of memory"));
    Ok(text.join(", "))
}

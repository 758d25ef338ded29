//! On x86_64, this project's guest and one with Linux, each served by Linux's backend in dom0, in one boot.

use anyhow::{Context as _, Result};

use super::cpu::{Asked, Meter};
use super::driver::domid;
use super::figures::Side;
use super::measure::{self, GB};
use super::report::Report;
use super::{Options, PATIENCE};
use crate::console::Source;
use crate::run::{Run, Tally};
use crate::scenario::transfer::{FILE, Rate, sink, source};
use crate::scenario::x86::{Made, created, dom0_up, linux_ready};

/// The side's guest, and its kind.
fn guest(side: Side) -> (usize, &'static str) {
    match side {
        Side::Ours => (3, "guest"),
        Side::Linux => (1, "pvh"),
    }
}

/// All turns.
pub fn compare(options: &Options, report: &mut Report) -> Result<Tally> {
    let made = Made::prepare(&["guest"])?;
    let name = "compare/front";
    let mut run = Run::patiently(name, &made.board(""), PATIENCE)?;
    if up(&mut run) {
        for number in 1..=options.runs() {
            for side in Side::BOTH {
                println!("x86_64, turn {number} of {}, {}: its guest", options.runs(), side.name());
                turn(&mut run, side, options);
                report.add(side, run.take_figures())?;
            }
        }
    }
    run.finish(name)
}

/// Everybody is there.
fn up(run: &mut Run) -> bool {
    let up = dom0_up(run)
        && Side::BOTH.into_iter().all(|side| {
            let (domain, kind) = guest(side);
            created(run, domain, kind, "0", "")
        });
    let (linux, _) = guest(Side::Linux);
    let made = linux_ready(run, linux);
    up && run.check("Linux has its interface and its file", Source::Dom(linux), made)
}

fn turn(run: &mut Run, side: Side, options: &Options) {
    let (domain, _) = guest(side);
    let meter = domid(run, domain).and_then(|id| Meter::new(run, Asked::Linux([0, id, id])));
    let text = meter.as_ref().map(|_| "Xen says".to_owned());
    let text = text.map_err(|error| anyhow::anyhow!("{error:#}"));
    run.check("processor time of dom0 and the guest", Source::Dom(0), text);
    let Ok(meter) = meter else { return };
    // Those that have just started are still busy.
    let made = run.good(0, &format!("settle {}", options.effort().idle), 60);
    run.check("a rest before it", Source::Dom(0), made.map(|answer| answer.text()));
    measure::pings(run, 0, domain, options.effort().pings);
    carry(run, &meter, domain, "to", |run| sink(run, 0, domain));
    carry(run, &meter, domain, "from", |run| source(run, 0, domain));
}

fn carry(
    run: &mut Run,
    meter: &Meter,
    domain: usize,
    way: &str,
    act: impl FnOnce(&Run) -> Result<Rate>,
) {
    let made = meter.around(run, || act(run)).and_then(|(rate, cpu)| {
        let used = cpu.used.get(1).context("nobody says what the guest used")?;
        Ok(vec![
            (format!("front_{way}_mbit"), rate.mbit()),
            (format!("cpu_front_{way}_s_per_gb"), used / (FILE as f64 / GB)),
        ])
    });
    measure::keep(run, &format!("64 MiB {way} dom{domain}"), made);
}

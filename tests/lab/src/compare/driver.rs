//! On x86_64, the same Linux guests under xl are served in turn by this project's driver domain and by one with Linux, xen-netback
//! and a bridge, in one boot.

use anyhow::{Context as _, Result};

use super::cpu::Asked;
use super::dom0::BARE;
use super::figures::Side;
use super::measure;
use super::report::Report;
use super::{Options, PATIENCE};
use crate::console::Source;
use crate::run::{Run, Tally};
use crate::scenario::x86::{Made, connected, created, dom0_up, reached, reattach};

/// The guests and their kinds: as on aarch64, the first has its peer in the second.
const GUESTS: [(usize, &str); 2] = [(1, "pvh"), (2, "pv")];

/// A side's driver domain, and its kind.
fn driver(side: Side) -> (usize, &'static str) {
    match side {
        Side::Ours => (4, "driver"),
        Side::Linux => (5, "linux-driver"),
    }
}

/// The same as xl has it.
fn backend(side: Side) -> String {
    format!("dom{}", driver(side).0)
}

/// All turns.
pub fn compare(options: &Options, report: &mut Report) -> Result<Tally> {
    let made = Made::prepare(&["driver-domain"])?;
    let name = "compare/driver";
    let mut run = Run::patiently(name, &made.board(""), PATIENCE)?;
    if up(&mut run) {
        for number in 1..=options.runs() {
            for side in Side::BOTH {
                println!("x86_64, turn {number} of {}, {}", options.runs(), side.name());
                let made = moved(&run, side);
                if run.check("the guests move to this backend", Source::Dom(0), made)
                    && let Some(numbers) = numbers(&mut run, side)
                {
                    measure::traffic(&mut run, Asked::Linux(numbers), options.effort());
                }
                report.add(side, run.take_figures())?;
            }
        }
    }
    run.finish(name)
}

/// Everybody is there.
fn up(run: &mut Run) -> bool {
    let ours = backend(Side::Ours);
    dom0_up(run)
        && Side::BOTH.into_iter().all(|side| {
            let (domain, kind) = driver(side);
            created(run, domain, kind, "none", "")
        })
        && GUESTS.iter().all(|(domain, kind)| created(run, *domain, kind, &ours, BARE))
        && GUESTS.iter().all(|(domain, _)| {
            let made = run.good(*domain, "up", 170).map(|answer| answer.text());
            run.check(&format!("dom{domain} has its interface"), Source::Dom(*domain), made)
        })
}

/// Both guests get new vifs there, and reach one another.
fn moved(run: &Run, side: Side) -> Result<String> {
    for (domain, _) in GUESTS {
        reattach(run, domain, &backend(side))?;
        run.good(domain, "net 1", 170)?;
        connected(run, domain, 60)?;
    }
    reached(run, 1, 2, 5)
}

/// The number that Xen has for a domain.
pub fn domid(run: &Run, domain: usize) -> Result<u32> {
    let answer = run.good(0, &format!("xl domid dom{domain}"), 60)?;
    answer.text().trim().parse().with_context(|| answer.text())
}

/// Those of the backend and the guests.
fn numbers(run: &mut Run, side: Side) -> Option<[u32; 3]> {
    let made = (|| Ok([domid(run, driver(side).0)?, domid(run, 1)?, domid(run, 2)?]))();
    match made {
        Ok(numbers) => Some(numbers),
        Err(error) => {
            run.check("the numbers of the domains", Source::Dom(0), Err(error));
            None
        }
    }
}

//! A guest that dies while dom0's NIC has its pages.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::super::{life, traffic};
use super::withdraw::{used, wait_for};
use super::{Outside, awaited};
use crate::console::Source;
use crate::metrics::Metrics;
use crate::run::Run;

/// How long the card keeps what it is given before it looks at it.
pub const DELAY: Duration = Duration::from_millis(500);
/// Readings in a row of which each has to find pages with the card.
const READINGS: usize = 3;

/// Guest 1 dies, guest 2 goes on.
pub fn in_mid_transfer(run: &mut Run, outside: &Outside) {
    let before = run.metrics(2, "crash-before");
    let made = begin(run, outside);
    run.check("the NIC keeps pages of guest 1", Source::Dom(0), made);
    let made = life::crashed(run);
    let left = used(run);
    run.check("dom0 releases the crashed guest within a second", Source::Dom(0), made);
    let made = left.and_then(|left| {
        ensure!(left.in_flight > 0.0, "it has none any more");
        Ok(format!("{} of them", left.in_flight))
    });
    run.check("the NIC still has frames then", Source::Dom(0), made);
    let made = run.good(2, "bgruns send", 20).and_then(|_| Ok(awaited(run, 2, "send")?.text()));
    run.check("guest 2's 8 MiB come whole", Source::Dom(2), made);
    let made = before.and_then(|before| reclaimed(run, &before));
    run.check("nothing of the crashed guest is held", Source::Dom(0), made);
    let made = no_resets(run);
    run.check("the NIC was never reset", Source::Dom(0), made);
    for to in ["world", "4:1"] {
        let made = traffic::ping(run, 2, to, 56, 20).map(|(text, _)| text);
        run.check(&format!("guest 2 still reaches {to}"), Source::Dom(2), made);
    }
}

fn begin(run: &Run, outside: &Outside) -> Result<String> {
    run.good(2, &format!("bg send sink {} 0 part", outside.sink()), 20)?;
    run.good(1, &format!("bg send sink {}", outside.sink()), 20)?;
    wait_for(run, Duration::from_secs(30), "pages of guest 1 with the NIC", |now| {
        now.mapped_of(1) > 0.0
    })?;
    let mut seen = Vec::new();
    for _ in 0..READINGS {
        let now = used(run)?;
        let (pages, frames) = (now.mapped_of(1), now.in_flight);
        ensure!(pages > 0.0 && frames > 0.0, "{pages} pages, {frames} frames of anybody");
        seen.push(format!("{pages} ({frames} frames of both guests)"));
    }
    Ok(seen.join(", "))
}

/// What was held before, less what belonged to guest 1; looked at a few times, as the card takes its time.
fn reclaimed(run: &Run, before: &Metrics) -> Result<String> {
    let mut made = Ok(String::new());
    for _ in 0..4 {
        let after = run.metrics(2, "crash-after")?;
        made = life::let_go(before, &after, 1).and_then(|text| {
            let mapped = after.need("grant_mappings", &[])?;
            ensure!(mapped == 2.0, "{mapped} pages are mapped, not guest 2's two rings alone");
            for name in ["grant_mappings_parked", "netback_uplink_in_flight"] {
                let left = after.need(name, &[])?;
                ensure!(left == 0.0, "{name} {left}");
            }
            Ok(text)
        });
        if made.is_ok() {
            break;
        }
        run.good(2, "settle 1", 20)?;
    }
    made
}

fn no_resets(run: &Run) -> Result<String> {
    let resets = run.metrics(2, "end")?.need("netback_uplink_resets_total", &[])?;
    ensure!(resets == 0.0, "{resets} times");
    Ok("it had the time it takes".to_owned())
}

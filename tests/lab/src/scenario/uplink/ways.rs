//! The ways a guest's packets take to dom0's NIC: by the copy of theirs that dom0 makes, or by the pages that they are in.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::withdraw::{self, COPY, DRAIN, DWELL, MAP, RETURN, ROUNDS, used, wait_for};
use super::{Outside, awaited, fetch, send};
use crate::console::Source;
use crate::metrics::Metrics;
use crate::run::Run;

/// Bytes that went to the NIC, by datapath.
const SENT: &str = "netback_uplink_sent_bytes_total";
/// Of 64 MiB, with headers, at least this much is in packets that are large enough for each way that may carry it.
pub const MOST: f64 = 60e6;
/// Seconds between the pieces of a transfer, so that it lasts for all rounds.
pub const PAUSE: f64 = 0.25;

/// 64 MiB each way as it comes, and to the NIC without Map.
pub fn each(run: &mut Run, outside: &Outside) {
    fetch(run, outside);
    let before = run.metrics(2, "map-before");
    send(run, outside, ", by Map", "uplink_to_mbit");
    let made = before.and_then(|before| carried(run, &before, "map", &[(MAP, MOST, f64::MAX)]));
    run.check("it went by Map", Source::Dom(0), made);

    let before = withdraw::set(run, MAP).and_then(|()| {
        std::thread::sleep(DRAIN);
        run.metrics(2, "copy-before")
    });
    send(run, outside, ", by Copy", "uplink_to_by_copy_mbit");
    let limits = [(COPY, MOST, f64::MAX), (MAP, 0.0, 0.0)];
    let made = before.and_then(|before| carried(run, &before, "copy", &limits));
    run.check("it went by Copy, with Map withdrawn", Source::Dom(0), made);
    if let Err(error) = withdraw::set(run, "") {
        run.check("Map is given back", Source::Dom(0), Err(error));
    }
}

/// What each datapath has carried to the NIC since, which has to be within limits.
pub fn carried(
    run: &Run,
    before: &Metrics,
    label: &str,
    limits: &[(&str, f64, f64)],
) -> Result<String> {
    let after = run.metrics(2, &format!("{label}-after"))?;
    let mut text = Vec::new();
    for (path, least, most) in limits {
        let labels = [("path", *path)];
        let more = after.need(SENT, &labels)? - before.need(SENT, &labels)?;
        ensure!((*least..=*most).contains(&more), "{:.1} MB by {path}", more / 1e6);
        text.push(format!("{:.1} MB by {path}", more / 1e6));
    }
    Ok(text.join(", "))
}

/// Map goes and comes back again and again while guest 1 sends 64 MiB slowly and guest 2 sends them as often as it can.
pub fn change(run: &mut Run, outside: &Outside) {
    let before = run.metrics(2, "change-before");
    let mark = run.machine.console.mark(Source::Dom(0));
    if let Err(error) = begin(run, outside) {
        run.check("both guests begin to send", Source::Dom(1), Err(error));
        return;
    }
    for number in 1..=ROUNDS {
        let made = round(run);
        if made.is_err() {
            let _ = withdraw::set(run, "");
        }
        run.check(&format!("Map goes and returns in mid-transfer: {number}"), Source::Dom(0), made);
    }
    let made = run.good(1, "bgruns slow", 20).and_then(|_| {
        // It ends its pauses.
        run.step(1, "bgend slow", 89)?;
        Ok(awaited(run, 1, "slow")?.text())
    });
    run.check("guest 1's 64 MiB have come whole through all of that", Source::Dom(1), made);
    let made = run.good(2, "bgend again", 89).map(|answer| answer.text());
    run.check("and so have guest 2's, each time", Source::Dom(2), made);
    let made = before.and_then(|before| {
        carried(run, &before, "change", &[(MAP, 1e6, f64::MAX), (COPY, 1e6, f64::MAX)])
    });
    run.check("both ways carried them", Source::Dom(0), made);
    let made = withdraw::untroubled(&run.machine, mark);
    run.check("no vif is closed or complains, nor the NIC", Source::Dom(0), made);
}

fn begin(run: &Run, outside: &Outside) -> Result<()> {
    let start = used(run)?;
    run.good(1, &format!("bg slow sink {} {PAUSE}", outside.sink()), 20)?;
    run.good(2, &format!("bg again sinks {}", outside.sink()), 20)?;
    wait_for(run, Duration::from_secs(30), "packets to go out by Map", |now| start.grew(now, MAP))
}

/// Without Map everything goes by Copy; with it, by Map again.
fn round(run: &Run) -> Result<String> {
    withdraw::set(run, MAP)?;
    std::thread::sleep(DRAIN);
    let before = used(run)?;
    std::thread::sleep(DWELL);
    let start = used(run)?;
    let mapped = start.taken(MAP) - before.taken(MAP);
    ensure!(mapped.packets == 0.0, "{} packets by Map, which is withdrawn", mapped.packets);
    ensure!(start.mapped() == 0.0, "{} pages are still mapped", start.mapped());
    let copied = start.taken(COPY) - before.taken(COPY);
    ensure!(copied.bytes > 0.0, "nothing is sent without Map");
    let since = run.age();
    withdraw::set(run, "")?;
    wait_for(run, RETURN, "Map to be used again", |now| start.grew(now, MAP))?;
    let seconds = (run.age() - since).as_secs_f64();
    Ok(format!("{:.1} MB by Copy meanwhile, used again after {seconds:.1} s", copied.bytes / 1e6))
}

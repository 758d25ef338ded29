//! A guest that dies while dom0's NIC has its pages.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::super::{life, traffic};
use super::withdraw::{COPY, MAP, Used, used, wait_for};
use super::{Outside, awaited};
use crate::console::Source;
use crate::metrics::Metrics;
use crate::run::Run;
use crate::world;

/// How long the card keeps what it is given before it looks at it: longer than a guest takes to die.
pub const DELAY: Duration = Duration::from_secs(2);
/// What guest 2 fetches meanwhile, in bytes: with so late a card, more would take minutes.
const LITTLE: u64 = 256 << 10;
/// Readings in a row that have to find the same pages with the card.
const READINGS: usize = 3;

/// Guest 1 dies, guest 2 goes on.
pub fn in_mid_transfer(run: &mut Run, outside: &Outside) {
    let before = run.metrics(2, "crash-before");
    let made = begin(run, outside);
    run.check("the NIC keeps pages of guest 1", Source::Dom(0), made);
    let mark = run.machine.console.mark(Source::Dom(0));
    let made = life::crashed(run);
    let left = used(run);
    run.check("dom0 releases the crashed guest within a second", Source::Dom(0), made);
    let made = left.and_then(|left| {
        let lines = run.machine.console.since(Source::Dom(0), mark);
        let ended = lines.iter().any(|line| line.text.contains("vif1.0: disconnected"));
        ensure!(!ended && left.in_flight > 0.0, "{} frames, vif ended: {ended}", left.in_flight);
        Ok(format!("{} frames, and its vif waits for them", left.in_flight))
    });
    run.check("the NIC still has its pages then", Source::Dom(0), made);
    let made = finished(run);
    run.check("guest 2's transfer goes on, and comes whole", Source::Dom(2), made);
    let made = before.and_then(|before| reclaimed(run, &before));
    run.check("nothing of the crashed guest is held", Source::Dom(0), made);
    let made = no_resets(run);
    run.check("the NIC was never reset", Source::Dom(0), made);
    for to in ["world", "4:1"] {
        let made = traffic::ping(run, 2, to, 56, 20).map(|(text, _)| text);
        run.check(&format!("guest 2 still reaches {to}"), Source::Dom(2), made);
    }
}

/// Guest 1 sends and guest 2 fetches, until the card has just been given pages of guest 1.
fn begin(run: &Run, outside: &Outside) -> Result<String> {
    run.good(2, &format!("bg little fetch world {} /{LITTLE}/2", outside.world.http), 20)?;
    // What fits in a page would be copied, and with a peer so far away TCP begins with packets of two segments.
    run.good(1, "sys net/ipv4/tcp_min_tso_segs 6", 20)?;
    run.good(1, &format!("bg send sink {}", outside.sink()), 20)?;
    // Not what it has had for a while already.
    let first = at_rest(run)?;
    wait_for(run, DELAY * 3, "the NIC to let go", |now| packets(now) > packets(&first))?;
    let now = at_rest(run)?;
    Ok(format!("{} of them, and {} frames of both guests", now.mapped_of(1), now.in_flight))
}

fn packets(now: &Used) -> f64 {
    now.taken(MAP).packets + now.taken(COPY).packets
}

/// Waits until the card has pages of guest 1, and nothing moves.
fn at_rest(run: &Run) -> Result<Used> {
    let end = run.age() + Duration::from_secs(30);
    let (mut last, mut same) = (used(run)?, 1);
    while same < READINGS || last.mapped_of(1) == 0.0 || last.in_flight == 0.0 {
        ensure!(run.age() < end, "the NIC does not keep any for long");
        let now = used(run)?;
        same = if packets(&now) == packets(&last) { same + 1 } else { 1 };
        last = now;
    }
    Ok(last)
}

/// Guest 2's transfer has not ended before, and ends well.
fn finished(run: &Run) -> Result<String> {
    run.good(2, "bgruns little", 20)?;
    let answer = awaited(run, 2, "little")?;
    let (got, served) = (answer.value("got"), world::digest(LITTLE, 2)?);
    ensure!(got == Some(&served), "{served} was served: {}", answer.text());
    Ok(format!("{} KiB, SHA-256 {:.12}... on both sides", LITTLE >> 10, served))
}

/// What was held before, less what belonged to guest 1; looked at for a while, as the card takes its time with what guest 2 still
/// says, too.
fn reclaimed(run: &Run, before: &Metrics) -> Result<String> {
    let end = run.age() + DELAY * 10;
    loop {
        let after = run.metrics(2, "crash-after")?;
        let made = life::let_go(before, &after, 1).and_then(|text| {
            let mapped = after.need("grant_mappings", &[])?;
            ensure!(mapped == 2.0, "{mapped} pages are mapped, not guest 2's two rings alone");
            for name in ["grant_mappings_parked", "netback_uplink_in_flight"] {
                let left = after.need(name, &[])?;
                ensure!(left == 0.0, "{name} {left}");
            }
            Ok(text)
        });
        if made.is_ok() || run.age() > end {
            return made;
        }
        run.good(2, "settle 1", 20)?;
    }
}

fn no_resets(run: &Run) -> Result<String> {
    let resets = run.metrics(2, "end")?.need("netback_uplink_resets_total", &[])?;
    ensure!(resets == 0.0, "{resets} times");
    Ok("it had the time it takes".to_owned())
}

//! Frontends that go and come back, and a guest that dies, while the other guest's stream goes on.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::traffic;
use crate::console::Source;
use crate::metrics::Metrics;
use crate::run::Run;

/// A stream may pause as long as TCP needs to repair a loss, on a busy emulated machine.
const LONGEST_PAUSE: f64 = 2.0;

/// What has to be the same after a frontend was away.
const HELD: &[&str] =
    &["grant_mappings", "evtchn_ports_bound", "netback_frames_free", "xenstore_nodes"];

/// Starts guest 2's endless download from dom0.
pub fn stream_start(run: &Run) -> Result<()> {
    run.good(2, "stream", 20)?;
    let mut last = Ok(String::new());
    for _ in 0..3 {
        run.good(2, "settle 1", 20)?;
        last = stream_goes_on(run);
        if last.is_ok() {
            break;
        }
    }
    last.map(|_| ())
}

/// The stream still brings bytes, and has not paused for long since it was started.
pub fn stream_goes_on(run: &Run) -> Result<String> {
    let answer = run.good(2, "streamed", 20)?;
    let text = answer.text();
    ensure!(answer.value("end") == Some("open"), "the stream ended: {text}");
    ensure!(answer.number("more")? > 0.0, "the stream stands still: {text}");
    let pause = answer.number("pause")?;
    ensure!(pause <= LONGEST_PAUSE, "the stream paused for {pause} s");
    let megabytes = answer.number("bytes")? / 1e6;
    Ok(format!("{megabytes:.0} MB so far, longest pause {pause:.2} s"))
}

/// Ends the stream.
pub fn stream_stop(run: &Run) -> Result<()> {
    run.good(2, "streamstop", 20).map(|_| ())
}

/// Ten reloads of guest 1's driver, five of them under traffic.
pub fn reload(run: &mut Run) {
    let before = run.metrics(2, "reload-before");
    let started = stream_start(run);
    let streaming = match started {
        Ok(()) => true,
        Err(error) => run.check("guest 2 streams from dom0", Source::Dom(2), Err(error)),
    };
    let mut reloaded = true;
    for (step, what) in [("reload 5 4:12", "at rest"), ("reload 5 4:12 busy", "under traffic")] {
        let made = run.good(1, step, 89).and_then(|a| {
            ensure!(a.lines.len() == 5, "{}", a.text());
            Ok(a.lines
                .iter()
                .map(|l| l.rsplit("after ").next().unwrap_or(l))
                .collect::<Vec<_>>()
                .join(", "))
        });
        let name = format!("guest 1 reloads its driver five times {what}");
        reloaded &= run.check(&name, Source::Dom(1), made);
    }
    if streaming {
        let made = stream_goes_on(run);
        run.check("guest 2's stream never stops meanwhile", Source::Dom(2), made);
        if let Err(error) = stream_stop(run) {
            run.check("guest 2's stream can be ended", Source::Dom(2), Err(error));
        }
    }
    let made = before.and_then(|before| {
        ensure!(reloaded, "the driver was not reloaded ten times");
        returned(run, &before)
    });
    run.check("dom0's grants, ports, pages and nodes return", Source::Dom(0), made);
}

/// Connections take a moment to be closed, so it is looked at a few times.
fn returned(run: &Run, before: &Metrics) -> Result<String> {
    let mut result = Ok(String::new());
    for _ in 0..4 {
        let after = run.metrics(2, "reload-after")?;
        result = same(before, &after);
        if result.is_ok() {
            break;
        }
        run.good(2, "settle 1", 20)?;
    }
    result
}

fn same(before: &Metrics, after: &Metrics) -> Result<String> {
    let mut text = Vec::new();
    for name in HELD {
        let (old, new) = (before.need(name, &[])?, after.need(name, &[])?);
        ensure!(old == new, "{name} was {old} and is {new}");
        text.push(format!("{name} {new}"));
    }
    Ok(text.join(", "))
}

/// Guest 1 dies; dom0 lets go of all it held for it, and guest 2 does not notice.
pub fn crash(run: &mut Run) {
    let before = run.metrics(2, "crash-before");
    let started = stream_start(run);
    if let Err(error) = started {
        run.check("guest 2 streams from dom0 before the crash", Source::Dom(2), Err(error));
    }
    let made = crashed(run);
    run.check("dom0 releases a crashed guest within a second", Source::Dom(0), made);
    let made = stream_goes_on(run);
    run.check("guest 2's stream goes on", Source::Dom(2), made);
    let _ = stream_stop(run);
    let made = before.and_then(|before| {
        let after = run.metrics(2, "crash-after")?;
        let_go(&before, &after, 1)
    });
    run.check("nothing of the crashed guest is held", Source::Dom(0), made);
    let made = traffic::ping(run, 2, "4:1", 56, 20).map(|(text, _)| text);
    run.check("guest 2 still reaches dom0", Source::Dom(2), made);
}

/// Guest 1 dies: the time from its last word to dom0's word that it is released.
pub fn crashed(run: &mut Run) -> Result<String> {
    let console = &run.machine.console;
    let (guest, dom0) = (console.mark(Source::Dom(1)), console.mark(Source::Dom(0)));
    console.type_line(1, "@crash crash.")?;
    console
        .wait(Source::Dom(1), guest, Duration::from_secs(20), |l| {
            l.text.contains("Kernel panic").then_some(())
        })
        .context("guest 1 does not panic")?;
    let released = console
        .wait(Source::Dom(0), dom0, Duration::from_secs(20), |l| {
            l.text.contains("domain 1: released").then_some(l.at)
        })
        .context("dom0 does not say \"domain 1: released\"")?;
    let last = console
        .since(Source::Dom(1), guest)
        .into_iter()
        .map(|l| l.at)
        .filter(|at| *at <= released)
        .max();
    let seconds = last.map_or(0.0, |last| released.duration_since(last).as_secs_f64());
    run.figure("crash_released_s", seconds);
    ensure!(seconds <= 1.0, "it takes {seconds:.2} s");
    Ok(format!("{seconds:.2} s after its last word"))
}

/// dom0 holds nothing of a domain any more that it held before.
pub fn let_go(before: &Metrics, after: &Metrics, domain: usize) -> Result<String> {
    let mut text = Vec::new();
    for name in ["grant_mappings", "evtchn_ports_bound"] {
        let (old, new) = (before.need(name, &[])?, after.need(name, &[])?);
        ensure!(new < old, "{name} was {old} and is {new}");
        text.push(format!("{name} {old} to {new}"));
    }
    let name = "netback_frames_free";
    let (old, new) = (before.need(name, &[])?, after.need(name, &[])?);
    ensure!(new >= old, "{name} was {old} and is {new}");
    for name in ["xenstore_nodes", "xenstore_watches", "xenstore_transactions"] {
        let left = after.get(name, &[("domid", &domain.to_string())]).unwrap_or(0.0);
        ensure!(left == 0.0, "{name} of domain {domain}: {left} left");
    }
    let vif = format!("{domain}.0");
    ensure!(after.get("netback_vif_state", &[("vif", &vif)]).is_none(), "vif{vif} is still there");
    text.push("no vif, nodes, watches or transactions left".to_owned());
    Ok(text.join(", "))
}

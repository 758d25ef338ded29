//! Machines with Linux as dom0, which starts guests with xl.

pub mod driver;
pub mod guest;
mod keys;
pub mod linux;
pub mod save;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::traffic;
use super::transfer::{at, has_file};
use crate::console::Source;
use crate::images::{self, XlImages};
use crate::machine::x86_64::Board;
use crate::run::Run;
use crate::toolchain::{self, X86_64};

/// What a machine is made of.
struct Made {
    images: XlImages,
}

impl Made {
    /// With these images of ours.
    fn prepare(packages: &[&str]) -> Result<Self> {
        let ours: Vec<(&str, PathBuf)> = packages
            .iter()
            .map(|package| Ok((*package, toolchain::image(package, X86_64)?)))
            .collect::<Result<_>>()?;
        let ours: Vec<_> = ours.iter().map(|(name, path)| (*name, path.as_path())).collect();
        Ok(Self { images: images::prepare_xl(&ours)? })
    }

    fn board<'a>(&'a self, dom0_arguments: &'a str) -> Board<'a> {
        Board { images: &self.images, dom0_arguments }
    }
}

/// dom0 takes steps and has its file.
fn dom0_up(run: &mut Run) -> bool {
    let made = run.expect(Source::Dom(0), 120, "\"L 0 ready\"", |l| {
        l.text.contains("L 0 ready").then_some(())
    });
    let made = made.and_then(|()| has_file(run, 0));
    run.check("dom0 is up", Source::Dom(0), made)
}

/// How a guest is called in checks.
fn name(kind: &str, domain: usize) -> String {
    match kind {
        "pv" | "pvh" => format!("Linux {} (dom{domain})", kind.to_uppercase()),
        "guest" => format!("our guest (dom{domain})"),
        _ => format!("our driver domain (dom{domain})"),
    }
}

/// Has xl start a domain, and waits for its word that it is there.
fn create(run: &Run, domain: usize, kind: &str, backend: &str, words: &str) -> Result<String> {
    let mark = run.machine.console.mark(Source::Dom(domain));
    let started = run.age();
    run.good(0, &format!("domain {domain} {kind} {backend} {words}"), 170)?;
    let said = match kind {
        "pv" | "pvh" => "L 0 ready",
        "guest" => "guest: ready",
        _ => "driver-domain: ready",
    };
    run.machine
        .console
        .wait(Source::Dom(domain), mark, Duration::from_secs(180), |l| {
            l.text.contains(said).then_some(())
        })
        .with_context(|| format!("waited for \"{said}\" of dom{domain}"))?;
    Ok(format!("after {:.1} s", (run.age() - started).as_secs_f64()))
}

/// The same as a check.
fn created(run: &mut Run, domain: usize, kind: &str, backend: &str, words: &str) -> bool {
    let made = create(run, domain, kind, backend, words);
    run.check(&format!("{} starts", name(kind, domain)), Source::Dom(domain), made)
}

/// A Linux guest has its interface and its file.
fn linux_ready(run: &Run, domain: usize) -> Result<String> {
    let answer = run.good(domain, "up", 170)?;
    ensure!(answer.value("carrier") == Some("1"), "no carrier: {}", answer.text());
    has_file(run, domain)?;
    Ok(answer.text())
}

/// Waits until the store has a vif's both ends connected.
fn connected(run: &Run, domain: usize, seconds: u64) -> Result<()> {
    let end = run.age() + Duration::from_secs(seconds);
    loop {
        let answer = run.step(0, &format!("vif {domain} state"), 30)?;
        if answer.value("back") == Some("4") && answer.value("front") == Some("4") {
            return Ok(());
        }
        ensure!(
            run.age() < end,
            "the vif of dom{domain} is not connected after {seconds} s: {}",
            answer.text()
        );
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// Takes a guest's vif away and gives it another, served by that domain.
fn reattach(run: &Run, domain: usize, backend: &str) -> Result<()> {
    run.good(0, &format!("detach {domain}"), 100)?;
    run.good(0, &format!("attach {domain} {backend}"), 100)?;
    Ok(())
}

/// The same for a guest of ours on dom0's backend, and it answers pings again: how long that took.
fn again(run: &Run, domain: usize, backend: &str) -> Result<String> {
    let started = run.age();
    reattach(run, domain, backend)?;
    connected(run, domain, 60)?;
    reached(run, 0, domain, 5)?;
    Ok(format!("{:.1} s", (run.age() - started).as_secs_f64()))
}

/// A vif of a guest goes and comes back, five times at rest and five times while one domain floods another with pings.
fn ten_times(
    run: &mut Run,
    domain: usize,
    (from, to): (usize, usize),
    again: impl Fn(&Run) -> Result<String>,
) {
    for what in ["at rest", "under traffic"] {
        let busy = what == "under traffic";
        let made = (1..=5).try_fold(Vec::new(), |mut times, number| {
            if busy {
                let flood = format!("bg flood /usr/bin/ping -q -f -s 1000 10.9.0.1{to}");
                run.good(from, &flood, 20)?;
            }
            let made = again(run);
            if busy {
                run.step(from, "bgend flood", 60)?;
            }
            times.push(made.with_context(|| format!("time {number}"))?);
            anyhow::Ok(times)
        });
        let made = made.map(|times| times.join(", "));
        let name = format!("the vif of dom{domain} goes and comes back five times {what}");
        run.check(&name, Source::Dom(domain), made);
    }
}

/// As soon as a domain answers pings of another, it answers all of them.
fn reached(run: &Run, from: usize, to: usize, count: u32) -> Result<String> {
    run.good(from, &format!("reach {}", at(to)), 120)?;
    traffic::ping(run, from, &at(to), 56, count).map(|(text, _)| text)
}

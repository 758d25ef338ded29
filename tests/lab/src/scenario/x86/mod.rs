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
pub struct Made {
    images: XlImages,
}

impl Made {
    /// With these images of ours.
    pub fn prepare(packages: &[&str]) -> Result<Self> {
        let ours: Vec<(&str, PathBuf)> = packages
            .iter()
            .map(|package| Ok((*package, toolchain::image(package, X86_64)?)))
            .collect::<Result<_>>()?;
        let ours: Vec<_> = ours.iter().map(|(name, path)| (*name, path.as_path())).collect();
        Ok(Self { images: images::prepare_xl(&ours)? })
    }

    pub fn board<'a>(&'a self, dom0_arguments: &'a str) -> Board<'a> {
        Board { images: &self.images, dom0_arguments }
    }
}

/// dom0 takes steps and has its file.
pub fn dom0_up(run: &mut Run) -> bool {
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
        "linux-driver" => format!("Linux as a driver domain (dom{domain})"),
        _ => format!("our driver domain (dom{domain})"),
    }
}

/// Has xl start a domain, and waits for its word that it is there.
fn create(run: &Run, domain: usize, kind: &str, backend: &str, words: &str) -> Result<String> {
    let mark = run.machine.console.mark(Source::Dom(domain));
    let started = run.age();
    run.good(0, &format!("domain {domain} {kind} {backend} {words}"), 170)?;
    let said = match kind {
        "pv" | "pvh" | "linux-driver" => "L 0 ready",
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
pub fn created(run: &mut Run, domain: usize, kind: &str, backend: &str, words: &str) -> bool {
    let made = create(run, domain, kind, backend, words);
    run.check(&format!("{} starts", name(kind, domain)), Source::Dom(domain), made)
}

/// A Linux guest has its interface and its file.
pub fn linux_ready(run: &Run, domain: usize) -> Result<String> {
    let answer = run.good(domain, "up", 170)?;
    ensure!(answer.value("carrier") == Some("1"), "no carrier: {}", answer.text());
    has_file(run, domain)?;
    Ok(answer.text())
}

/// Waits until the store has a vif's both ends connected.
pub fn connected(run: &Run, domain: usize, seconds: u64) -> Result<()> {
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
pub fn reattach(run: &Run, domain: usize, backend: &str) -> Result<()> {
    run.good(0, &format!("detach {domain}"), 100)?;
    run.good(0, &format!("attach {domain} {backend}"), 100)?;
    Ok(())
}

/// Vifs go and come back, five times at rest and five times under traffic: pings of 1,000 bytes from each of those domains
/// to another, which they reach each time afterwards. How long each time took.
fn ten_times(
    run: &mut Run,
    whose: &str,
    from: &[usize],
    to: usize,
    again: impl Fn(&Run) -> Result<()>,
) {
    for what in ["at rest", "under traffic"] {
        let busy = if what == "under traffic" { from } else { &[] };
        let made = (1..=5).try_fold(Vec::new(), |mut times, number| {
            for domain in busy {
                let pings = format!("bg pings /usr/bin/ping -q -i 0.005 -s 1000 10.9.0.1{to}");
                run.good(*domain, &pings, 20)?;
            }
            let started = run.age();
            let made = again(run);
            let seconds = (run.age() - started).as_secs_f64();
            for domain in busy {
                run.step(*domain, "bgend pings", 60)?;
            }
            let made = made.and_then(|()| {
                from.iter().try_for_each(|domain| reached(run, *domain, to, 5).map(|_| ()))
            });
            made.with_context(|| format!("time {number}"))?;
            times.push(format!("{seconds:.1} s"));
            anyhow::Ok(times)
        });
        let made = made.map(|times| times.join(", "));
        run.check(&format!("{whose} five times {what}"), Source::Dom(to), made);
    }
}

/// As soon as a domain answers pings of another, it answers all of them.
pub fn reached(run: &Run, from: usize, to: usize, count: u32) -> Result<String> {
    run.good(from, &format!("reach {}", at(to)), 120)?;
    traffic::ping(run, from, &at(to), 56, count).map(|(text, _)| text)
}

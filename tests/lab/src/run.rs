//! One run of a scenario: its machine, the steps taken in its domains, the checks made and what was measured.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use crate::console::{Line, Source};
use crate::hypervisor;
use crate::machine::{Machine, Plan};
use crate::metrics::Metrics;
use crate::paths;

/// How many checks passed and failed.
#[derive(Default, Clone, Copy)]
pub struct Tally {
    /// Checks that held.
    pub passed: usize,
    /// Checks that did not, or could not be made.
    pub failed: usize,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// A scenario being run.
pub struct Run {
    dir: PathBuf,
    /// The machine.
    pub machine: Machine,
    started: Instant,
    /// How many times as long as usual everything may take.
    patience: u32,
    next_step: AtomicU32,
    tally: Tally,
    checks: Vec<Value>,
    figures: BTreeMap<String, f64>,
}

/// Lines of a log that a failure shows.
const SHOWN: usize = 12;

/// The last lines of a log, for those who see the output and not the file.
fn ending(file: &Path) -> String {
    let text = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect();
    let last = lines.iter().skip(lines.len().saturating_sub(SHOWN));
    last.map(|line| format!("\n         | {line}")).collect()
}

/// A step that has been started in a domain.
pub struct Step {
    domain: usize,
    id: u32,
    mark: usize,
    what: String,
}

/// What a step printed.
pub struct Answer {
    /// Its exit status, 0 if it went well.
    pub status: i32,
    /// Its output.
    pub lines: Vec<String>,
}

impl Answer {
    /// The value of a `NAME=VALUE` word of the output.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.lines
            .iter()
            .flat_map(|l| l.split_whitespace())
            .find_map(|w| w.strip_prefix(name)?.strip_prefix('='))
    }

    /// The same as a number.
    pub fn number(&self, name: &str) -> Result<f64> {
        let text = self.value(name).with_context(|| format!("no {name} in \"{}\"", self.text()))?;
        text.parse().with_context(|| format!("{name}={text} is no number"))
    }

    /// The output in one line.
    pub fn text(&self) -> String {
        self.lines.join("; ")
    }
}

impl Run {
    /// Starts the machine of a scenario; its files go to `target/lab/NAME`, replacing those of the run before.
    pub fn start(name: &str, plan: &dyn Plan) -> Result<Self> {
        Self::patiently(name, plan, 1)
    }

    /// The same for a machine on which everything may take so many times as long as usual.
    pub fn patiently(name: &str, plan: &dyn Plan, patience: u32) -> Result<Self> {
        let dir = fresh(name)?;
        let machine = Machine::start(plan, &dir, false)?;
        Ok(Self {
            dir,
            machine,
            started: Instant::now(),
            patience,
            next_step: AtomicU32::new(1),
            tally: Tally::default(),
            checks: Vec::new(),
            figures: BTreeMap::new(),
        })
    }

    /// Where this run's files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How long the machine has been running.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Makes a check: one line, with what was measured or what went wrong and where to read about it.
    /// Returns whether it held.
    pub fn check(&mut self, name: &str, log: Source, made: Result<String>) -> bool {
        let ok = made.is_ok();
        let text = match made {
            Ok(text) => text,
            Err(error) => {
                let file = self.dir.join(log.log());
                format!("{error:#}\n         read {}{}", paths::shown(&file), ending(&file))
            }
        };
        let seconds = self.age().as_secs();
        println!("{} {seconds:>4} s  {name}: {text}", if ok { "ok  " } else { "FAIL" });
        if ok {
            self.tally.passed += 1;
        } else {
            self.tally.failed += 1;
        }
        self.checks.push(json!({ "check": name, "ok": ok, "measured": text, "at_s": seconds }));
        ok
    }

    /// Notes a figure for results.json.
    pub fn figure(&mut self, name: impl Into<String>, value: f64) {
        self.figures.insert(name.into(), value);
    }

    /// Checks that Xen is the one that was asked for, and has not complained of itself since the machine was started.
    fn xen_is_well(&mut self) {
        let lines = self.machine.console.since(Source::Xen, 0);
        let texts = lines.iter().map(|line| line.text.as_str());
        let banner = texts.clone().find(|text| text.starts_with("Xen version ")).unwrap_or("");
        let mut bad = texts.filter(|text| hypervisor::complains(text));
        let made = match bad.next() {
            Some(line) => Err(anyhow!("{line} and {} more", bad.count())),
            None if hypervisor::chosen().is_this(banner) => {
                Ok(format!("{banner}: {} lines", lines.len()))
            }
            None => Err(anyhow!("that is not {}: {banner}", hypervisor::chosen())),
        };
        self.check("Xen has nothing to complain of", Source::Xen, made);
    }

    /// The figures since the start or since they were last taken; those taken are not in results.json.
    pub fn take_figures(&mut self) -> BTreeMap<String, f64> {
        std::mem::take(&mut self.figures)
    }

    fn limit(&self, seconds: u64) -> Duration {
        Duration::from_secs(seconds) * self.patience
    }

    /// Writes results.json and ends the machine.
    pub fn finish(mut self, name: &str) -> Result<Tally> {
        let on_arm = name.split('/').next().is_some_and(|name| name.ends_with("-aarch64"));
        if on_arm {
            self.xen_is_well();
        }
        let results = json!({
            "scenario": name,
            "xen": hypervisor::chosen().to_string(),
            "passed": self.tally.passed,
            "failed": self.tally.failed,
            "seconds": self.age().as_secs_f64(),
            "figures": self.figures,
            "checks": self.checks,
        });
        let text = serde_json::to_string_pretty(&results)?;
        fs::write(self.dir.join("results.json"), text + "\n")?;
        println!(
            "{name}: {} passed, {} failed in {} s; logs and results are in {}",
            self.tally.passed,
            self.tally.failed,
            self.age().as_secs(),
            paths::shown(&self.dir)
        );
        Ok(self.tally)
    }

    /// Reads dom0's counters over the network from a guest, and keeps them as metrics-LABEL.txt.
    pub fn metrics(&self, domain: usize, label: &str) -> Result<Metrics> {
        self.metrics_of("4:1", domain, label)
    }

    /// The counters of who is at an address, as the steps have it, read by a domain.
    pub fn metrics_of(&self, address: &str, domain: usize, label: &str) -> Result<Metrics> {
        let answer = self.good(domain, &format!("met {address}"), 60)?;
        let metrics = Metrics::parse(answer.lines.iter().map(String::as_str))?;
        fs::write(self.dir.join(format!("metrics-{label}.txt")), metrics.text())?;
        Ok(metrics)
    }

    /// Waits for a line of a domain or Xen, from the start of the run.
    pub fn expect<T>(
        &self,
        source: Source,
        seconds: u64,
        what: &str,
        pick: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        self.machine
            .console
            .wait(source, 0, self.limit(seconds), pick)
            .with_context(|| format!("waited for {what}"))
    }

    /// Types a command at dom0's own console; returns what it answers, or why it does not. A line that lost a byte on its
    /// way is refused or not answered, and is typed again.
    pub fn operate(&self, command: &str) -> Result<Vec<String>> {
        let mut refused = None;
        for _ in 0..3 {
            let mark = self.machine.console.mark(Source::Dom(0));
            // Ctrl-U: whatever is left of an earlier try goes.
            self.machine.console.type_line(0, &format!("\x15{command}"))?;
            let mut lines = Vec::new();
            let end =
                self.machine.console.wait(Source::Dom(0), mark, Duration::from_secs(10), |line| {
                    match line.text.strip_prefix("error: ") {
                        Some(why) => Some(Err(why.to_owned())),
                        None if line.text == "ok" => Some(Ok(())),
                        None => {
                            lines.push(line.text.clone());
                            None
                        }
                    }
                });
            match end {
                Ok(Ok(())) => {
                    // The echo of the command, and whatever dom0 logs meanwhile.
                    lines.retain(|line| !line.starts_with("dom0> ") && !line.starts_with('['));
                    return Ok(lines);
                }
                Ok(Err(why)) => refused = Some(why),
                Err(_) => {
                    ensure!(!self.machine.console.closed(), "QEMU ended (see qemu.log)");
                }
            }
        }
        match refused {
            Some(why) => bail!("dom0 refuses \"{command}\": {why}"),
            None => bail!("dom0 does not answer \"{command}\""),
        }
    }

    /// Starts a step in a domain. A line lost on the way is typed again; the agent takes each number once.
    pub fn begin(&self, domain: usize, step: &str) -> Result<Step> {
        let id = self.next_step.fetch_add(1, Ordering::Relaxed);
        let source = Source::Dom(domain);
        let mark = self.machine.console.mark(source);
        let begun = format!("L {id} begin");
        // A slow machine is not given longer for each, but more of them: what is lost is lost at once, and is time that
        // somebody measures.
        for attempt in 0..8 * self.patience {
            let wait = Duration::from_secs(1 << attempt.min(2));
            self.machine.console.type_line(domain, &format!("@{id} {step}."))?;
            let answer = self
                .machine
                .console
                .wait(source, mark, wait, |l| l.text.ends_with(&begun).then_some(()));
            if answer.is_ok() {
                return Ok(Step { domain, id, mark, what: step.to_owned() });
            }
            ensure!(!self.machine.console.closed(), "QEMU ended (see qemu.log)");
        }
        bail!("dom{domain} does not take \"{step}\" from its console")
    }

    /// Waits for a step to end.
    pub fn end(&self, step: Step, seconds: u64) -> Result<Answer> {
        let Step { domain, id, mark, what } = step;
        let prefix = format!("L {id} |");
        let mut lines = Vec::new();
        let status = self
            .machine
            .console
            .wait(Source::Dom(domain), mark, self.limit(seconds), |line| {
                let (_, text) = line.text.split_once(&prefix)?;
                if let Some(status) = text.strip_prefix("rc=") {
                    return status.parse::<i32>().ok();
                }
                lines.push(text.to_owned());
                None
            })
            .with_context(|| format!("dom{domain}: \"{what}\" does not end"))?;
        Ok(Answer { status, lines })
    }

    /// Takes a step and waits for its end, whatever its exit status.
    pub fn step(&self, domain: usize, step: &str, seconds: u64) -> Result<Answer> {
        let begun = self.begin(domain, step)?;
        self.end(begun, seconds)
    }

    /// Waits for the end of a step that has to go well.
    pub fn end_good(&self, step: Step, seconds: u64) -> Result<Answer> {
        let (domain, what) = (step.domain, step.what.clone());
        let answer = self.end(step, seconds)?;
        let (status, text) = (answer.status, answer.text());
        ensure!(status == 0, "dom{domain}: \"{what}\" failed ({status}): {text}");
        Ok(answer)
    }

    /// Takes a step that has to go well.
    pub fn good(&self, domain: usize, step: &str, seconds: u64) -> Result<Answer> {
        self.end_good(self.begin(domain, step)?, seconds)
    }
}

/// An empty directory for a run.
pub fn fresh(name: &str) -> Result<PathBuf> {
    let dir = paths::lab().join(name);
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot empty {}", dir.display()))?;
    }
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

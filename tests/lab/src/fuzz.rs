//! `cargo lab fuzz`: every target under libFuzzer, with coverage by flags that stable compilers have.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::packages;
use crate::paths;
use crate::ui::Task;

/// What rustc's own fuzzing support would set, with the checks of a debug build.
const FLAGS: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks";
/// Bytes of an input at most: long sequences of operations say no more than short ones, and later.
const INPUT_MAX: usize = 1024;
/// Seconds after which one input counts as a hang.
const HANG: u32 = 30;

/// How one target came out.
struct Outcome {
    passed: bool,
    /// The last that the engine said of its progress.
    progress: Progress,
    seconds: u64,
    /// What the target said when it failed, and the input.
    complaint: Vec<String>,
    input: Option<PathBuf>,
}

/// Of a line such as `#1024 NEW cov: 191 ft: 823 corp: 236/32Kb lim: 68 exec/s: 512 rss: 29Mb`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    inputs: u64,
    edges: u64,
    kept: u64,
}

impl Progress {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let inputs = words.next()?.strip_prefix('#')?.parse().ok()?;
        let words: Vec<_> = words.collect();
        let after = |name: &str| {
            let at = words.iter().position(|word| *word == name)?;
            let digits = words.get(at + 1)?.split('/').next()?;
            digits.parse().ok()
        };
        Some(Self { inputs, edges: after("cov:")?, kept: after("corp:").unwrap_or(0) })
    }
}

/// Where the inputs of the repository are, a directory for each target.
fn corpus() -> PathBuf {
    paths::workspace().join("tests/fuzz/corpus")
}

/// The targets asked for, or all.
fn choose(names: &[String]) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(corpus()).context("the corpus is missing")? {
        all.push(entry?.file_name().to_string_lossy().into_owned());
    }
    all.sort();
    if let Some(unknown) = names.iter().find(|name| !all.contains(name)) {
        bail!("no target is called {unknown}; there are {}", all.join(", "));
    }
    Ok(if names.is_empty() { all } else { names.to_vec() })
}

/// Builds the program; says where it is.
fn build() -> Result<PathBuf> {
    packages::cxx()?;
    let task = Task::new("building the fuzz targets");
    let out = Command::new("cargo")
        .current_dir(paths::workspace())
        .args(["build", "--release", "--package", "fuzz", "--features", "engine"])
        // With a target named, build scripts and macros are built without the flags.
        .args(["--target", "host-tuple", "--message-format", "json-render-diagnostics"])
        .env("RUSTFLAGS", FLAGS)
        .env("CARGO_TARGET_DIR", paths::lab().join("fuzz/cargo"))
        .stdin(Stdio::null())
        .output()
        .context("cannot run cargo")?;
    if !out.status.success() {
        bail!("the fuzz targets do not build:\n{}", String::from_utf8_lossy(&out.stderr));
    }
    let program = String::from_utf8_lossy(&out.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| message.get("executable")?.as_str().map(PathBuf::from))
        .context("cargo names no program")?;
    task.done("built");
    Ok(program)
}

/// Runs one target for a while. `tell` hears of its progress.
fn fuzz(program: &Path, name: &str, seconds: u64, tell: impl Fn(Progress)) -> Result<Outcome> {
    let dir = paths::directory(&format!("fuzz/{name}"))?;
    // What earlier runs found worth keeping goes on from there.
    let kept = paths::directory(&format!("fuzz/{name}/corpus"))?;
    let mut log = fs::File::create(dir.join("log"))?;
    let started = Instant::now();
    let mut child = Command::new(program)
        .env("FUZZ_TARGET", name)
        .env("RUST_BACKTRACE", "0")
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={INPUT_MAX}"))
        .arg(format!("-timeout={HANG}"))
        .arg(format!("-artifact_prefix={}/", dir.display()))
        .args(["-len_control=0", "-rss_limit_mb=2048", "-print_final_stats=1"])
        .arg(kept)
        .arg(corpus().join(name))
        .current_dir(&dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let mut progress = Progress::default();
    let (mut complaint, mut input) = (Vec::new(), None);
    let stderr = child.stderr.take().context("no pipe")?;
    for line in BufReader::new(stderr).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        writeln!(log, "{line}")?;
        if let Some(now) = Progress::parse(&line) {
            progress = now;
            tell(now);
        } else if let Some((_, path)) = line.split_once("Test unit written to ") {
            input = Some(PathBuf::from(path));
        } else if (1..4).contains(&complaint.len())
            || complaint.is_empty()
                && ["panicked at", "ERROR: libFuzzer"].iter().any(|mark| line.contains(mark))
        {
            complaint.push(line);
        }
    }
    let status = child.wait()?;
    let seconds = started.elapsed().as_secs();
    Ok(Outcome { passed: status.success(), progress, seconds, complaint, input })
}

fn report(name: &str, outcome: &Outcome) {
    let Progress { inputs, edges, kept } = outcome.progress;
    let word = if outcome.passed { "ok  " } else { "FAIL" };
    println!(
        "{word} {name}: {inputs} inputs in {} s, {edges} edges covered, {kept} inputs kept",
        outcome.seconds
    );
    if outcome.passed {
        return;
    }
    for line in &outcome.complaint {
        println!("         {line}");
    }
    if let Some(input) = &outcome.input {
        let shown = paths::shown(input);
        println!("         input:  {shown}");
        println!("         replay: cargo lab fuzz {name} --input {shown}");
        println!("         keep:   cp {shown} tests/fuzz/corpus/{name}/");
    }
}

/// Runs targets, as many at once as there are processors. Fails if one of them has a finding.
pub fn run(names: &[String], seconds: u64) -> Result<ExitCode> {
    let names = choose(names)?;
    let program = build()?;
    let workers = thread::available_parallelism().map_or(1, usize::from).min(names.len());
    let task = Task::new(format!("fuzzing {} targets, {seconds} s each", names.len()));
    let queue = Mutex::new(names.iter());
    let next = || queue.lock().ok()?.next();
    let findings = thread::scope(|scope| {
        let work = || -> Result<usize> {
            let mut findings = 0;
            while let Some(name) = next() {
                let tell = |progress: Progress| {
                    let Progress { inputs, edges, .. } = progress;
                    task.detail(&format!("{name}: {inputs} inputs, {edges} edges"));
                };
                let outcome = fuzz(&program, name, seconds, tell)?;
                task.aside(|| report(name, &outcome));
                findings += usize::from(!outcome.passed);
            }
            Ok(findings)
        };
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let ended = threads.into_iter().map(|thread| match thread.join() {
            Ok(findings) => findings,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ended.sum::<Result<usize>>()
    })?;
    task.done(&format!("{findings} findings"));
    println!("{} targets, {findings} findings", names.len());
    Ok(if findings == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs a target on one input, and shows all it says.
pub fn replay(name: &str, input: &Path) -> Result<ExitCode> {
    choose(&[name.to_owned()])?;
    let input = fs::canonicalize(input).with_context(|| format!("{}", input.display()))?;
    let status = Command::new(build()?)
        .env("FUZZ_TARGET", name)
        .env("RUST_BACKTRACE", "1")
        .arg(input)
        .current_dir(paths::directory("fuzz")?)
        .status()?;
    println!("{name}: {}", if status.success() { "no finding" } else { "a finding" });
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn progress_is_read() {
        let line =
            "#1024\tNEW    cov: 191 ft: 823 corp: 236/32Kb lim: 68 exec/s: 512 rss: 29Mb L: 4/4";
        let expected = Progress { inputs: 1024, edges: 191, kept: 236 };
        assert_eq!(Progress::parse(line), Some(expected));
        for other in ["INFO: Seed: 1", "#x cov: 1", "==1== ERROR: libFuzzer: deadly signal", ""] {
            assert_eq!(Progress::parse(other), None, "{other}");
        }
    }

    #[test]
    fn targets_are_those_with_a_corpus() {
        assert!(choose(&[]).unwrap().contains(&"tx-chain".to_owned()));
        assert!(choose(&["no-such-target".to_owned()]).is_err());
    }
}

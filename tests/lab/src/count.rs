//! `cargo lab count`: how many instructions the hot paths take, against what they took.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::packages;
use crate::paths;
use crate::run::Tally;
use crate::ui::Task;

/// By how much a case may become worse, in hundredths.
const TOLERANCE: f64 = 3.0;

/// Instructions for one item, by case.
type Counts = BTreeMap<String, f64>;

fn baseline() -> PathBuf {
    paths::workspace().join("tests/instructions/baseline.txt")
}

/// The compiler and the machine that counts depend on.
fn compiler() -> Result<String> {
    let out = packages::run(Command::new("rustc").current_dir(paths::workspace()).arg("-vV"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let of = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("unknown");
    Ok(format!("rustc {} on {}", of("release: "), of("host: ")))
}

/// The version of gungraun in the lock file: that of the runner has to be the same.
fn version() -> Result<String> {
    let lock = fs::read_to_string(paths::workspace().join("Cargo.lock"))?;
    let (_, behind) = lock
        .split_once("name = \"gungraun\"\nversion = \"")
        .context("gungraun is not in Cargo.lock")?;
    Ok(behind.split('"').next().unwrap_or_default().to_owned())
}

/// The program that runs the cases; built if it is missing or of another version.
fn runner() -> Result<PathBuf> {
    let version = version()?;
    let root = paths::directory("gungraun")?;
    let program = root.join("bin/gungraun-runner");
    let found = Command::new(&program).arg("--version").output();
    let found = found.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
    if found.is_ok_and(|found| found.ends_with(&format!(" {version}"))) {
        return Ok(program);
    }
    let task = Task::new("building gungraun-runner");
    // Without optimisation: it waits for valgrind, and is built in a third of the time.
    packages::run(
        Command::new("cargo")
            .args(["install", "--debug", "--locked", "gungraun-runner", "--version"])
            .arg(format!("={version}"))
            .arg("--root")
            .arg(&root)
            .env("CARGO_TARGET_DIR", root.join("cargo"))
            .env("CARGO_PROFILE_DEV_DEBUG", "none"),
    )?;
    task.done("built");
    Ok(program)
}

/// Instructions for one item of one case, of the line that the runner prints for it.
fn parse(line: &str) -> Option<(String, f64)> {
    let summary: Value = serde_json::from_str(line).ok()?;
    let name = summary.get("function_name")?.as_str()?;
    let id = summary.get("id").and_then(Value::as_str).unwrap_or_default();
    let count = summary.pointer("/profiles/0/data/total/metrics/Ir/values/new")?.as_u64()?;
    Some((format!("{name} {id}").trim().to_owned(), count as f64 / instructions::ITEMS as f64))
}

/// Runs all cases.
fn measure() -> Result<Counts> {
    packages::valgrind()?;
    packages::headers()?;
    let runner = runner()?;
    let dir = paths::directory("count")?;
    let task = Task::new("counting instructions");
    let out = Command::new("cargo")
        .current_dir(paths::workspace())
        // As the images are built.
        .args(["bench", "--profile", "image", "--package", "instructions", "--"])
        .args(["--output-format=json", "--home"])
        .arg(&dir)
        .env("GUNGRAUN_RUNNER", runner)
        .env("CARGO_TERM_COLOR", "never")
        .stdin(Stdio::null())
        .stderr(File::create(dir.join("log"))?)
        .output()
        .context("cannot run cargo")?;
    let text = String::from_utf8_lossy(&out.stdout);
    let counts: Counts = text.lines().filter_map(parse).collect();
    if !out.status.success() || counts.is_empty() {
        bail!("the cases did not all run: read {}", paths::shown(&dir.join("log")));
    }
    task.done(&format!("{} cases", counts.len()));
    Ok(counts)
}

fn write(compiler: &str, counts: &Counts) -> String {
    let mut text = format!(
        "Instructions for one packet, chain, event or message; `cargo lab count --write` writes this.\n{compiler}\n\n"
    );
    for (case, count) in counts {
        let _ = writeln!(text, "{case:<24} {count:>10.1}");
    }
    text
}

/// The compiler that a baseline was written with, and its counts.
fn read(text: &str) -> (String, Counts) {
    let compiler = text.lines().nth(1).unwrap_or_default().to_owned();
    let counts = text.lines().skip(2).filter_map(|line| {
        let (case, count) = line.rsplit_once(' ')?;
        Some((case.trim().to_owned(), count.parse().ok()?))
    });
    (compiler, counts.collect())
}

/// A line for each case, and which of them have become worse by more than is allowed. A case that is gone counts as worse.
fn compare(before: &Counts, now: &Counts) -> (String, Vec<String>) {
    let mut table = format!("{:<24} {:>10} {:>10} {:>8}\n", "case", "before", "now", "change");
    let mut worse = Vec::new();
    for case in before.keys().chain(now.keys().filter(|case| !before.contains_key(*case))) {
        let (old, new) = (before.get(case), now.get(case));
        let shown =
            |count: Option<&f64>| count.map_or("-".to_owned(), |count| format!("{count:.1}"));
        let change = old.zip(new).map(|(old, new)| (new / old - 1.0) * 100.0);
        let text = change.map_or("-".to_owned(), |change| format!("{change:+.1} %"));
        let _ = writeln!(table, "{case:<24} {:>10} {:>10} {text:>8}", shown(old), shown(new));
        if new.is_none() || change.is_some_and(|change| change > TOLERANCE) {
            worse.push(case.clone());
        }
    }
    (table, worse)
}

/// Counts, and compares with the baseline. What depends on another compiler is shown and not held against anybody.
fn check() -> Result<(String, Tally)> {
    let now = measure()?;
    let compiler = compiler()?;
    let (known, before) = read(&fs::read_to_string(baseline()).unwrap_or_default());
    let (table, mut worse) = compare(&before, &now);
    fs::write(paths::directory("count")?.join("table.txt"), &table)?;
    let cases = now.len();
    let label = format!("instructions of {cases} cases");
    if known != compiler {
        println!(
            "ok   {label}: counted with {compiler}; the baseline is of {known}, so nothing follows"
        );
        worse.clear();
    } else if worse.is_empty() {
        println!("ok   {label}: none is worse by more than {TOLERANCE} %");
    } else {
        println!("FAIL {label}: worse by more than {TOLERANCE} %: {}", worse.join(", "));
    }
    let failed = worse.len();
    Ok((table, Tally { passed: cases.saturating_sub(failed), failed }))
}

/// For `cargo lab test`: the table is shown if a case is worse.
pub fn test() -> Result<Tally> {
    let (table, tally) = check()?;
    if tally.failed > 0 {
        print!("{table}");
    }
    Ok(tally)
}

/// `cargo lab count`.
pub fn run(write_baseline: bool) -> Result<ExitCode> {
    if write_baseline {
        let text = write(&compiler()?, &measure()?);
        fs::write(baseline(), &text)?;
        print!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    let (table, tally) = check()?;
    print!("{table}");
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(counts: &[(&str, f64)]) -> Counts {
        counts.iter().map(|(case, count)| ((*case).to_owned(), *count)).collect()
    }

    #[test]
    fn a_baseline_is_read_as_it_was_written() {
        let now = counts(&[("carry copy_64", 1234.5), ("ring descriptors", 40.0)]);
        assert_eq!(read(&write("rustc 1 on here", &now)), ("rustc 1 on here".to_owned(), now));
    }

    #[test]
    fn worse_is_more_than_three_hundredths_more_or_gone() {
        let before = counts(&[("a", 100.0), ("b", 100.0), ("c", 100.0), ("gone", 1.0)]);
        let now = counts(&[("a", 102.9), ("b", 103.1), ("c", 50.0), ("new", 1.0)]);
        let (table, worse) = compare(&before, &now);
        assert_eq!(worse, ["b", "gone"]);
        assert!(table.contains("+3.1 %") && table.contains("new"), "{table}");
    }

    #[test]
    fn a_summary_gives_instructions_for_each_item() {
        let line = r#"{"function_name":"carry","id":"copy_64","profiles":[{"data":{"total":{"metrics":{"Ir":{"values":{"new":2048}}}}}}]}"#;
        assert_eq!(parse(line), Some(("carry copy_64".to_owned(), 2.0)));
        assert_eq!(parse("Running"), None);
    }
}

//! What runs on the machine itself: the host tests, the models, and lint.

use std::fs::{self, File};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::packages;
use crate::paths;
use crate::run::{Tally, fresh};
use crate::toolchain::{self, AARCH64, IMAGE_LIMIT, IMAGES, Toolchain, X86_64};
use crate::ui::Task;

/// Packages that run on bare metal.
const LIBRARIES: &[&str] =
    &["hypercall", "features", "grant", "evtchn", "xenbus", "netif", "netfront", "netback"];

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(paths::workspace()).args(arguments);
    command
}

/// Counts what `cargo test` printed: the lines "test result: ... N passed; N failed; ...".
fn count(text: &str) -> Tally {
    let number = |line: &str, what: &str| -> usize {
        let words: Vec<_> = line.split_whitespace().collect();
        words
            .windows(2)
            .find_map(|w| match w {
                [n, word] if word.trim_end_matches(';') == what => n.parse().ok(),
                _ => None,
            })
            .unwrap_or(0)
    };
    let mut tally = Tally::default();
    for line in text.lines().filter(|l| l.starts_with("test result:")) {
        tally += Tally { passed: number(line, "passed"), failed: number(line, "failed") };
    }
    tally
}

/// Runs a cargo test command; its output goes to target/lab/host/NAME.log.
fn tests(name: &str, label: &str, mut command: Command) -> Result<Tally> {
    let path = paths::lab().join("host").join(format!("{name}.log"));
    let log = File::create(&path)?;
    let task = Task::new(label);
    let status =
        command.stdout(log.try_clone()?).stderr(log).status().context("cannot run cargo")?;
    let mut tally = count(&fs::read_to_string(&path)?);
    if !status.success() && tally.failed == 0 {
        // It did not get as far as counting: a build that failed, or a test that died.
        tally.failed = 1;
    }
    task.done(&format!("{} passed, {} failed", tally.passed, tally.failed));
    let word = if tally.failed == 0 { "ok  " } else { "FAIL" };
    println!("{word} {label}: {} passed, {} failed", tally.passed, tally.failed);
    if tally.failed > 0 {
        println!("         read {}", paths::shown(&path));
    }
    Ok(tally)
}

/// All host tests, and every package's models under loom.
pub fn test() -> Result<Tally> {
    packages::headers()?;
    fresh("host")?;
    let mut all = cargo(&["test", "--workspace", "--no-fail-fast"]);
    all.env("CARGO_TERM_COLOR", "never");
    let mut tally = tests("tests", "host tests", all)?;
    for package in LIBRARIES {
        if paths::workspace().join(package).join("tests/loom.rs").exists() {
            let mut models = cargo(&["test", "--release", "--package", package, "--test", "loom"]);
            models
                .env("RUSTFLAGS", "--cfg loom")
                .env("CARGO_TERM_COLOR", "never")
                .env("CARGO_TARGET_DIR", paths::lab().join("loom"));
            tally +=
                tests(&format!("loom-{package}"), &format!("{package}'s loom models"), models)?;
        }
    }
    Ok(tally)
}

/// One lint: nothing is shown if it passes, all of its complaints if not.
fn lint_one(label: &str, command: &mut Command) -> Result<bool> {
    let task = Task::new(label);
    let out = command.output().context("cannot run cargo")?;
    if out.status.success() {
        task.done("clean");
        println!("ok   {label}");
        return Ok(true);
    }
    drop(task);
    println!(
        "FAIL {label}\n{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(false)
}

/// Formatting, clippy, documentation, and the library crates for bare metal, all without warnings.
pub fn lint() -> Result<()> {
    let mut clean = lint_one("format", &mut cargo(&["fmt", "--all", "--check"]))?;
    clean &= lint_one(
        "clippy",
        &mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    )?;
    let mut docs = cargo(&["doc", "--workspace", "--no-deps"]);
    docs.env("RUSTDOCFLAGS", "-D warnings");
    clean &= lint_one("documentation", &mut docs)?;
    for target in [X86_64, AARCH64] {
        let images = IMAGES.iter().filter(|(_, t)| *t == target).map(|(package, _)| *package);
        let packages = LIBRARIES.iter().copied().chain(images);
        let toolchain = Toolchain::find(target)?;
        // Debian's package has no clippy for its compiler; its warnings are still errors.
        let (what, word) = match toolchain {
            Toolchain::Active => ("clippy", "clippy"),
            Toolchain::Debian { .. } => ("check", "warnings"),
        };
        let mut command = toolchain.cargo(what, target, true);
        for package in packages {
            command.args(["--package", package]);
        }
        clean &= lint_one(&format!("{word} for {target}"), &mut command)?;
    }
    ensure!(clean, "not clean: see above");
    Ok(())
}

/// `cargo lab build`: where the images are and how large.
pub fn build() -> Result<()> {
    for (package, target) in IMAGES {
        let path = toolchain::image(package, target)?;
        let size = fs::metadata(&path)?.len();
        println!("{} {size} bytes", paths::shown(&path));
        ensure!(size <= IMAGE_LIMIT, "{package}'s image is larger than {IMAGE_LIMIT} bytes");
    }
    Ok(())
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn results_are_added_up() {
        let text = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured\nother 9 passed\n\
                    test result: FAILED. 4 passed; 2 failed; 0 ignored\n";
        let tally = count(text);
        assert_eq!((tally.passed, tally.failed), (7, 2));
    }
}

//! `cargo lab bench`: built as the images are, and run on this machine.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::paths;

/// Runs it with these flags, which may say where its files go; its exit code is the answer.
pub fn run(flags: &[OsString]) -> Result<ExitCode> {
    let mut command = Command::new("cargo");
    command.args(["run", "--profile=image", "--quiet", "--package", "bench", "--manifest-path"]);
    command.arg(paths::workspace().join("Cargo.toml")).arg("--").args(flags);
    if !flags.iter().any(|flag| flag.to_str().is_some_and(|flag| flag.starts_with("--out"))) {
        command.arg("--out").arg(paths::lab().join("bench"));
    }
    let status = command.status().context("cannot run cargo")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

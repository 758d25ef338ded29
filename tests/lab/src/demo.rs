//! `cargo lab demo`: built as fast code is, and run where the caller stands.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::paths;

/// Where the picture goes, unless the flags say.
fn picture(flags: &[OsString]) -> Option<[OsString; 2]> {
    let says = |flag: &OsString| {
        flag.to_str().is_some_and(|flag| flag == "--svg" || flag.starts_with("--svg="))
    };
    let path = || paths::lab().join("demo/throughput.svg").into();
    (!flags.iter().any(says)).then(|| ["--svg".into(), path()])
}

/// Runs it with these flags; its exit code is the answer.
pub fn run(flags: &[OsString]) -> Result<ExitCode> {
    let mut command = Command::new("cargo");
    command.args(["run", "--release", "--quiet", "--package", "two-guests", "--manifest-path"]);
    command.arg(paths::workspace().join("Cargo.toml")).arg("--");
    command.args(flags).args(picture(flags).into_iter().flatten());
    let status = command.status().context("cannot run cargo")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_goes_where_the_flags_say() {
        let flags = |all: &[&str]| all.iter().map(OsString::from).collect::<Vec<_>>();
        assert!(picture(&flags(&["--seconds", "3"])).is_some());
        assert_eq!(picture(&flags(&["--svg", "here.svg"])), None);
        assert_eq!(picture(&flags(&["--svg=here.svg"])), None);
    }
}

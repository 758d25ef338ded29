//! `cargo lab`: real Xen in QEMU, with this project's dom0 and unmodified Linux guests.

mod bench;
mod boot;
mod capture;
mod compare;
mod console;
mod count;
mod cpio;
mod demo;
mod elf;
mod fdt;
mod fuzz;
mod host;
mod hypervisor;
mod images;
mod machine;
mod metrics;
mod packages;
mod paths;
mod qmp;
mod run;
mod scenario;
mod toolchain;
mod ui;
mod wire;
mod world;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

use hypervisor::Xen;
use run::Tally;
use scenario::Scenario;

/// Real Xen in QEMU: this project's dom0 with unmodified Linux guests.
#[derive(Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab", version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Get all that a run needs, whatever of it is missing
    Setup,
    /// Build all images; shows where they are and how large
    Build,
    /// Formatting, clippy, documentation and bare-metal builds, all without warnings
    Lint,
    /// Show the scenarios
    List,
    /// Start a scenario with its consoles on this terminal
    Boot {
        /// Its name, from `cargo lab list`
        scenario: String,
        /// The hypervisor of scenarios on Arm
        #[arg(long, value_enum)]
        xen: Option<Xen>,
    },
    /// Run one scenario, or without a name everything
    Test {
        /// Its name, from `cargo lab list`
        scenario: Option<String>,
        /// The hypervisor of scenarios on Arm, which alone are run then
        #[arg(long, value_enum)]
        xen: Option<Xen>,
    },
    /// The same Linux guests with this project's dom0 and with Linux's in turn: what they carry, and what that costs
    Compare(compare::Options),
    /// Two guests and a backend in this process, from which features are taken under traffic: ten seconds to look at
    #[command(disable_help_flag = true)]
    Demo {
        /// `--help` says which there are
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "FLAGS")]
        flags: Vec<OsString>,
    },
    /// Packets per second in this process, against ring.h in C, DPDK and others: several minutes, on a quiet machine
    #[command(disable_help_flag = true)]
    Bench {
        /// `--quick` for a minute; `--help` says what else there is
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "FLAGS")]
        flags: Vec<OsString>,
    },
    /// Count the instructions of the hot paths, and compare with what they were
    Count {
        /// Write down what there is now as what is to be compared with
        #[arg(long)]
        write: bool,
    },
    /// Feed targets with bytes that nobody expects, each for a while
    Fuzz {
        /// Targets, from `tests/fuzz/corpus`; all if none is named
        targets: Vec<String>,
        /// How long to run each, in seconds
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Run the one target named on this input alone
        #[arg(long)]
        input: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    match act(&Arguments::parse().what) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(what: &What) -> Result<ExitCode> {
    match what {
        What::Setup => {
            packages::qemu_aarch64()?;
            packages::qemu_x86_64()?;
            packages::headers()?;
            hypervisor::choose(Xen::Debug);
            images::prepare(false)?;
            images::prepare_xl(&[])?;
            for target in [toolchain::AARCH64, toolchain::X86_64] {
                toolchain::Toolchain::find(target)?;
            }
            println!("ready: everything is in {}", paths::shown(&paths::lab()));
        }
        What::Build => host::build()?,
        What::Lint => host::lint()?,
        What::List => {
            for scenario in scenario::ALL {
                println!("{:<20} {}", scenario.name, scenario.about);
            }
        }
        What::Boot { scenario, xen } => {
            let (scenario, xen) = on(scenario::find(scenario)?, *xen)?;
            hypervisor::choose(xen);
            (scenario.boot)(scenario.name)?;
        }
        What::Test { scenario, xen } => return test(scenario.as_deref(), *xen),
        What::Compare(options) => return compare::run(options),
        What::Demo { flags } => return demo::run(flags),
        What::Bench { flags } => return bench::run(flags),
        What::Count { write } => return count::run(*write),
        What::Fuzz { targets, seconds, input } => {
            return match (input, targets.as_slice()) {
                (None, _) => fuzz::run(targets, *seconds),
                (Some(input), [target]) => fuzz::replay(target, input),
                (Some(_), _) => anyhow::bail!("an input belongs to one target: name it"),
            };
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A scenario and the Xen to run it on.
fn on(scenario: &'static Scenario, xen: Option<Xen>) -> Result<(&'static Scenario, Xen)> {
    let xen = xen.unwrap_or(scenario.xen);
    let runs = xen == scenario.xen || (scenario.is_on_arm() && xen != Xen::Debian);
    ensure!(runs, "{} does not run on {xen}", scenario.name);
    Ok((scenario, xen))
}

fn test(name: Option<&str>, xen: Option<Xen>) -> Result<ExitCode> {
    let mut tally = Tally::default();
    let all = scenario::ALL.iter();
    let by_default = all.filter_map(|scenario| Some((scenario, scenario.by_default?)));
    let chosen: Vec<_> = match (name, xen) {
        (Some(name), _) => vec![on(scenario::find(name)?, xen)?],
        (None, Some(_)) => by_default
            .filter(|(scenario, _)| scenario.is_on_arm())
            .map(|(scenario, _)| on(scenario, xen))
            .collect::<Result<_>>()?,
        (None, None) => {
            tally += host::test()?;
            tally += count::test()?;
            by_default.collect()
        }
    };
    for (scenario, xen) in chosen {
        println!("{}: {}, on {xen}", scenario.name, scenario.about);
        hypervisor::choose(xen);
        tally += (scenario.test)(scenario.name)?;
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

//! `cargo lab compare`: real Xen and unmodified Linux guests, served by this project and by Linux in turn.

mod chart;
mod cpu;
mod dom0;
mod driver;
mod figures;
mod front;
mod iperf;
mod measure;
mod report;
mod stats;
mod table;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::ValueEnum;

use crate::paths;
use crate::run::Tally;

use measure::Effort;
use report::Report;

/// How it is to be done.
#[derive(clap::Args)]
pub struct Options {
    /// The machine; both if none is named
    machine: Option<Machine>,
    /// Only these parts of what is done on aarch64; any number of times
    #[arg(long, value_name = "NAME", value_parser = dom0::parts())]
    part: Vec<String>,
    /// Turns of each side
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// One short turn of each, to see that it works
    #[arg(long)]
    quick: bool,
    /// QEMU's clock counts instructions, on one thread (aarch64 only): slow, but the ratios repeat
    #[arg(long)]
    icount: bool,
}

/// Where.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Machine {
    /// dom0 is swapped
    Aarch64,
    /// Guests go from our driver domain to one with Linux and back; guests of both kinds on Linux's backend
    #[value(name = "x86_64")]
    X86,
}

/// Everything may take so many times as long as in a scenario: there, slowness is a fault, and here it is what is measured.
const PATIENCE: u32 = 10;

impl Options {
    fn runs(&self) -> u32 {
        if self.quick { 1 } else { self.runs }
    }

    fn takes(&self, part: &str) -> bool {
        self.part.is_empty() || self.part.iter().any(|name| name == part)
    }

    fn effort(&self) -> Effort {
        match self {
            Self { quick: true, .. } => {
                Effort { tcp: 3, udp: 2, stream: 64 << 20, pings: 50, idle: 2 }
            }
            // A second of such a machine takes ten or more.
            Self { icount: true, .. } => {
                Effort { tcp: 3, udp: 2, stream: 32 << 20, pings: 200, idle: 5 }
            }
            _ => Effort { tcp: 5, udp: 3, stream: 128 << 20, pings: 200, idle: 5 },
        }
    }

    fn conditions(&self) -> String {
        let Effort { tcp, udp, pings, .. } = self.effort();
        let clock = if self.icount { ", its clock counting instructions" } else { "" };
        format!(
            "Xen 4.17 in QEMU{clock}; medians of {} turns of each, interleaved, and their range; {tcp} s of TCP, {udp} s \
             of UDP, {pings} pings",
            self.runs()
        )
    }
}

/// Measures, and shows what came of it. Whether targets are reached is no success or failure; whether all could be measured is.
pub fn run(options: &Options) -> Result<ExitCode> {
    ensure!(options.runs() > 0, "no turns make no comparison");
    let aarch64_only =
        options.machine == Some(Machine::Aarch64) || options.icount || !options.part.is_empty();
    ensure!(
        !(aarch64_only && options.machine == Some(Machine::X86)),
        "instructions are counted, and parts are named, on aarch64 only"
    );
    let mut report = Report::new(options.conditions());
    let mut tally = Tally::default();
    if options.machine != Some(Machine::X86) {
        report.section(
            "aarch64: this project's dom0, and Linux's with xen-netback and a bridge",
            true,
        );
        tally += dom0::compare(options, &mut report)?;
    }
    if !aarch64_only {
        report.section(
            "x86_64: this project's driver domain, and Linux as one with xen-netback and a bridge",
            false,
        );
        tally += driver::compare(options, &mut report)?;
        report.section(
            "x86_64: this project's guest, and one with Linux, on Linux's backend in dom0",
            false,
        );
        tally += front::compare(options, &mut report)?;
    }
    print!("{}", report.text());
    let dir = paths::shown(&paths::lab());
    println!(
        "\nalso in compare.json, compare.svg and compare.md in {dir}; consoles and counters are in {dir}/compare"
    );
    println!("{} checks passed, {} failed", tally.passed, tally.failed);
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

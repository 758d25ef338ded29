#![doc = include_str!("../README.md")]

mod chart;
mod costs;
mod duel;
mod pair;
mod peers;
mod plan;
mod report;
mod series;
mod targets;
mod testpmd;
mod xen;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use duel::Arena;
use plan::{Bench, Pace};

/// Packets per second in one process, against the peers that people would use instead.
#[derive(Parser)]
#[command(name = "cargo lab bench", bin_name = "cargo lab bench", version)]
struct Arguments {
    /// A minute instead of several: fewer and shorter samples
    #[arg(long)]
    quick: bool,
    /// Where pictures and data go
    #[arg(long, default_value = "target/lab/bench", value_name = "DIR")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if !cfg!(ring_h) {
        println!(
            "ring.h in C is left out: it takes a C compiler and libxen-dev (/usr/include/xen)."
        );
    }
    if testpmd::version().is_none() {
        println!("DPDK is left out: dpdk-testpmd is not installed (Debian: dpdk-dev).");
    }
    let costs = costs::all()?;
    let pace = if arguments.quick { Pace::QUICK } else { Pace::FULL };
    let measured = Bench::new(Arena::find()?, pace)?.run()?;
    let targets = targets::all(&measured, &costs);
    report::print(&measured, &costs, &targets);
    report::write(&arguments.out, &measured, &costs, &targets)?;
    println!("\npictures and data: {}", arguments.out.display());
    Ok(())
}

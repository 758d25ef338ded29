//! Stock Linux guests on Linux's own backend.

use anyhow::Result;

use crate::boot;
use crate::images;
use crate::machine::x86_64::Board;
use crate::run::{Run, Tally};

pub fn boot(name: &'static str) -> Result<()> {
    let images = images::prepare_xl(&[])?;
    boot::interactive(
        name,
        &Board { images: &images, xen_arguments: "", dom0_arguments: "lab=shell" },
    )
}

pub fn test(name: &'static str) -> Result<Tally> {
    let images = images::prepare_xl(&[])?;
    let run = Run::start(name, &Board { images: &images, xen_arguments: "", dom0_arguments: "" })?;
    run.finish(name)
}

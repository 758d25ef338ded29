//! On aarch64, dom0 itself is swapped: this project's, or Debian's Linux with xen-netback and a bridge. In each turn there are
//! guests that wait for it to come up, guests that talk to one another, and one that talks to the world.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::figures::{Sample, Side};
use super::measure::{self, Effort};
use super::report::Report;
use super::{Options, PATIENCE};
use crate::console::Input;
use crate::images::{self, Images};
use crate::machine::Plan;
use crate::machine::aarch64::{Board, Domain, Nic};
use crate::run::{Run, Tally};
use crate::scenario::{dom0, linux};
use crate::toolchain::{self, AARCH64};
use crate::world::World;

/// What machines are made of.
pub struct Made {
    images: Images,
    /// This project's.
    pub dom0: PathBuf,
    guest: PathBuf,
    /// What is beyond a NIC.
    pub world: World,
}

/// Word for a guest with Linux that needs no files.
pub const BARE: &str = "lab=bare";
/// Beside two guests of this project, one with Linux.
pub const ASKS: usize = 3;
/// Memory of a guest of this project, in MiB.
const GUEST_MEMORY: u32 = 32;
/// Pings that each of two guests sends the other from its start on, of which every one that is not answered takes a second.
const TRIES: u32 = 200;

impl Made {
    fn prepare() -> Result<Self> {
        Ok(Self {
            images: images::prepare(true)?,
            dom0: toolchain::image("dom0", AARCH64)?,
            guest: toolchain::image("guest", AARCH64)?,
            world: World::open()?,
        })
    }

    fn plan(&self, side: Side, words: &str) -> Board<'_> {
        match side {
            Side::Ours => dom0::plan(&self.images, &self.dom0, words),
            Side::Linux => linux::plan(&self.images, words),
        }
    }

    /// Two Linux guests, and what is between them.
    pub fn guests(&self, side: Side) -> Board<'_> {
        self.plan(side, BARE)
    }

    /// Two that have their files, and a NIC.
    fn uplink(&self, side: Side) -> Board<'_> {
        Board { uplink: Some(Nic::default()), ..self.plan(side, "") }
    }

    /// A guest of this project.
    fn guest(&self, number: usize, words: &str) -> Domain<'_> {
        Domain {
            kernel: &self.guest,
            initramfs: None,
            arguments: format!("name=guest{number} ip=10.9.0.1{number}/24 {words}"),
            memory: GUEST_MEMORY,
            vcpus: 1,
        }
    }

    /// Two guests of this project, which are there long before any dom0 and ping one another.
    fn waiting(&self, side: Side) -> Board<'_> {
        let guest = |number: usize| {
            self.guest(number, &format!("client=ping:10.9.0.1{}:{TRIES}", 3 - number))
        };
        Board { guests: vec![guest(1), guest(2)], ..self.guests(side) }
    }

    /// Two guests of this project, and one with Linux to ask them and this project's dom0; Linux as dom0 asks by itself.
    fn ours(&self, side: Side) -> Board<'_> {
        let guests = [1, 2].map(|number| self.guest(number, ""));
        let asks = (side == Side::Ours).then(|| Domain::linux(&self.images, ASKS, BARE));
        Board { guests: guests.into_iter().chain(asks).collect(), ..self.guests(side) }
    }

    /// Whether everybody is there.
    pub fn up(&self, run: &mut Run, side: Side) -> bool {
        match side {
            Side::Ours => dom0::up(run, &self.dom0),
            Side::Linux => linux::up(run),
        }
    }
}

/// Bytes that are loaded for a dom0.
pub fn image_bytes(dom0: &Domain<'_>) -> Result<u64> {
    let size = |path: &Path| -> Result<u64> {
        Ok(fs::metadata(path).with_context(|| path.display().to_string())?.len())
    };
    Ok(size(dom0.kernel)? + dom0.initramfs.map_or(Ok(0), size)?)
}

/// A machine whose clock counts instructions. It has one processor: with more, QEMU runs one after the other, and where one waits for
/// another it waits for the end of its turn.
struct Counting<'a>(Board<'a>);

impl<'a> Counting<'a> {
    fn new(board: Board<'a>) -> Self {
        Self(Board { processors: 1, ..board })
    }
}

impl Plan for Counting<'_> {
    fn command(&self, dir: &Path) -> Result<Command> {
        let mut command = self.0.command(dir)?;
        command.args(["-icount", "shift=0,sleep=off"]);
        Ok(command)
    }

    fn input(&self) -> Input {
        self.0.input()
    }
}

/// A boot of a side, and what is done there.
struct Part {
    name: &'static str,
    board: fn(&Made, Side) -> Board<'_>,
    act: fn(&mut Run, &Made, Side, Effort),
}

const PARTS: &[Part] = &[
    Part { name: "start", board: Made::waiting, act: |run, _, _, _| measure::start(run) },
    Part { name: "guests", board: Made::guests, act: measure::guests },
    Part {
        name: "uplink",
        board: Made::uplink,
        act: |run, made, side, _| measure::uplink(run, made, side),
    },
    Part { name: "ours", board: Made::ours, act: measure::ours },
];

/// The names of the parts.
pub fn parts() -> Vec<&'static str> {
    PARTS.iter().map(|part| part.name).collect()
}

/// All turns.
pub fn compare(options: &Options, report: &mut Report) -> Result<Tally> {
    let made = Made::prepare()?;
    let mut tally = Tally::default();
    for number in 1..=options.runs() {
        let mut samples = Side::BOTH.map(|side| (side, Sample::new()));
        for part in PARTS.iter().filter(|part| options.takes(part.name)) {
            for (side, sample) in &mut samples {
                println!(
                    "aarch64, turn {number} of {}, {}: {}",
                    options.runs(),
                    side.name(),
                    part.name
                );
                let name = format!("compare/{}-{}-{number}", part.name, side.name());
                let (done, figures) = boot(options, &made, part, *side, &name)?;
                tally += done;
                sample.extend(figures);
            }
        }
        for (side, mut sample) in samples {
            // Both ends and what is between them, all of one kind.
            let alike = match side {
                Side::Ours => "ours_tcp_mbit",
                Side::Linux => "tcp_1_to_2_mbit",
            };
            if let Some(rate) = sample.get(alike).copied() {
                sample.insert("alike_tcp_mbit".to_owned(), rate);
            }
            report.add(side, sample)?;
        }
    }
    Ok(tally)
}

fn boot(
    options: &Options,
    made: &Made,
    part: &Part,
    side: Side,
    name: &str,
) -> Result<(Tally, Sample)> {
    let board = (part.board)(made, side);
    let mut run = if options.icount {
        Run::patiently(name, &Counting::new(board), PATIENCE)?
    } else {
        Run::patiently(name, &board, PATIENCE)?
    };
    (part.act)(&mut run, made, side, options.effort());
    let figures = run.take_figures();
    Ok((run.finish(name)?, figures))
}

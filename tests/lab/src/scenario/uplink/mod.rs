//! The way out: dom0's NIC, behind which are servers of this program. Guests get addresses there by DHCP, fetch and send files
//! of which both ends know the SHA-256, and every frame that went by is looked at.

mod crash;
mod frames;
pub mod identity;
mod timeline;
mod ways;

use anyhow::{Context as _, Result, ensure};

use super::transfer::{self, FILE, Rate};
use super::{dom0, linux, traffic, withdraw};
use crate::boot;
use crate::console::Source;
use crate::images;
use crate::machine::aarch64::{Board, Nic};
use crate::run::{Answer, Run, Tally};
use crate::world::{self, World};

/// The guests; each fetches other bytes than the other does.
const GUESTS: [usize; 2] = [1, 2];

/// What guests fetch from and send to, and the digests of what they fetch.
struct Outside {
    world: World,
    digests: [String; 2],
}

impl Outside {
    fn open() -> Result<Self> {
        let digests = [world::digest(FILE, 1)?, world::digest(FILE, 2)?];
        Ok(Self { world: World::open()?, digests })
    }

    /// The step of a guest that fetches.
    fn fetch(&self, guest: usize) -> String {
        format!("fetch world {} /{FILE}/{guest}", self.world.http)
    }

    /// Where guests send to, as their steps have it.
    fn sink(&self) -> String {
        format!("world:{}", self.world.sink)
    }

    /// What a guest fetched is what was served.
    fn fetched(&self, guest: usize, answer: &Answer) -> Result<Rate> {
        let (got, digest) = (answer.value("got"), self.digests.get(guest - 1));
        ensure!(got == digest.map(String::as_str), "{digest:?} was served: {}", answer.text());
        Rate::of(answer)
    }
}

fn with_nic<'a>(board: Board<'a>, nic: Nic) -> Board<'a> {
    Board { uplink: Some(nic), ..board }
}

/// This project's dom0 with a NIC.
pub fn boot(name: &'static str) -> Result<()> {
    let (images, image) = dom0::prepare()?;
    shown(name, &with_nic(dom0::plan(&images, &image, "lab=shell"), Nic::default()))
}

/// Linux with its bridge and the same NIC as dom0.
pub fn linux_boot(name: &'static str) -> Result<()> {
    let images = images::prepare(true)?;
    shown(name, &with_nic(linux::plan(&images, "lab=shell"), Nic::default()))
}

fn shown(name: &'static str, board: &Board<'_>) -> Result<()> {
    let World { http, sink } = World::open()?;
    eprintln!("{name}: guests that have called `lease` find http://10.0.2.2:{http}/BYTES/SEED");
    eprintln!("and a sink of streams at port {sink}");
    boot::interactive(name, board)
}

pub fn test(name: &'static str) -> Result<Tally> {
    let outside = Outside::open()?;
    let (images, image) = dom0::prepare()?;
    let plan = |nic| with_nic(dom0::plan(&images, &image, ""), nic);
    let mut run = Run::start(name, &plan(Nic::default()))?;
    if dom0::up(&mut run, &image) {
        reached(&mut run);
        ways::each(&mut run, &outside);
        all_at_once(&mut run, &outside);
        ways::change(&mut run, &outside);
    }
    frames::all_right(&mut run);
    dom0::capture(&mut run);
    let mut tally = run.finish(name)?;
    // A card that keeps what it was given for so long that a guest dies meanwhile.
    let name = format!("{name}/crash");
    let mut run = Run::start(&name, &plan(Nic { delay: Some(crash::DELAY) }))?;
    if dom0::up(&mut run, &image) {
        addressed(&mut run);
        crash::in_mid_transfer(&mut run, &outside);
    }
    frames::all_right(&mut run);
    tally += run.finish(&name)?;
    Ok(tally)
}

pub fn linux_test(name: &'static str) -> Result<Tally> {
    let outside = Outside::open()?;
    let images = images::prepare(true)?;
    let mut run = Run::start(name, &with_nic(linux::plan(&images, ""), Nic::default()))?;
    if linux::up(&mut run) {
        reached(&mut run);
        fetch(&mut run, &outside);
        send(&mut run, &outside, "", "uplink_to_mbit");
        all_at_once(&mut run, &outside);
    }
    frames::all_right(&mut run);
    run.finish(name)
}

/// Both guests get addresses.
fn addressed(run: &mut Run) {
    traffic::files_ready(run);
    let mut leases = Vec::new();
    for guest in GUESTS {
        let made = lease(run, guest, &leases);
        if let Ok(lease) = &made {
            leases.push(lease.clone());
        }
        run.check(&format!("guest {guest} gets an address by DHCP"), Source::Dom(guest), made);
    }
}

/// They do, and the world answers them.
fn reached(run: &mut Run) {
    addressed(run);
    for guest in GUESTS {
        let made = traffic::ping(run, guest, "world", 56, 20).map(|(text, _)| text);
        run.check(&format!("guest {guest} pings the router"), Source::Dom(guest), made);
    }
}

fn lease(run: &Run, guest: usize, others: &[String]) -> Result<String> {
    let answer = run.good(guest, "lease", 60)?;
    let lease = answer.value("lease").with_context(|| answer.text())?;
    ensure!(lease.starts_with("10.0.2."), "{lease}");
    ensure!(!others.iter().any(|other| other == lease), "{lease}, which another has");
    Ok(lease.to_owned())
}

/// Guest 1 fetches with the NIC to itself.
fn fetch(run: &mut Run, outside: &Outside) {
    let made = run.good(1, &outside.fetch(1), 170).and_then(|a| outside.fetched(1, &a));
    transfer::report(run, made, 1, "64 MiB from the world", "uplink_from_mbit");
}

/// Guest 1 sends with the NIC to itself; `how` goes to the check's name.
fn send(run: &mut Run, outside: &Outside, how: &str, figure: &str) {
    let made = run.good(1, &format!("sink {}", outside.sink()), 170).and_then(|a| Rate::of(&a));
    transfer::report(run, made, 1, &format!("64 MiB to the world{how}"), figure);
}

/// Both guests fetch and send, while one fetches files from the other.
fn all_at_once(run: &mut Run, outside: &Outside) {
    let started = run.age();
    if let Err(error) = begin_all(run, outside) {
        run.check("both guests begin to fetch and to send", Source::Dom(1), Err(error));
        return;
    }
    let mut whole = true;
    for guest in GUESTS {
        let made = awaited(run, guest, "fetch").and_then(|a| outside.fetched(guest, &a));
        let name = format!("guest {guest}: 64 MiB from the world, all at once");
        whole &= made.is_ok();
        transfer::report(run, made, guest, &name, &format!("uplink_all_from_{guest}_mbit"));
        let made = awaited(run, guest, "send").and_then(|a| Rate::of(&a));
        let name = format!("guest {guest}: 64 MiB to the world, all at once");
        whole &= made.is_ok();
        transfer::report(run, made, guest, &name, &format!("uplink_all_to_{guest}_mbit"));
    }
    if whole {
        let seconds = (run.age() - started).as_secs_f64();
        run.figure("uplink_all_mbit", FILE as f64 * 4.0 * 8.0 / 1e6 / seconds);
    }
    let made = run.good(1, "bgend talk", 89).map(|answer| answer.text());
    run.check("files from guest 2 to guest 1 come whole beside that", Source::Dom(1), made);
}

fn begin_all(run: &Run, outside: &Outside) -> Result<()> {
    for guest in GUESTS {
        run.good(guest, &format!("bg send sink {}", outside.sink()), 20)?;
        run.good(guest, &format!("bg fetch {}", outside.fetch(guest)), 20)?;
    }
    run.good(1, "bg talk files 4:12", 20).map(|_| ())
}

/// The end of a step in the background that has to go well.
fn awaited(run: &Run, guest: usize, name: &str) -> Result<Answer> {
    run.good(guest, &format!("bgwait {name}"), 175)
}

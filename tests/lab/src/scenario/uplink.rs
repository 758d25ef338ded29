//! The way out: dom0's NIC, behind which are servers of this program. Guests get addresses there by DHCP, fetch and send files
//! of which both ends know the SHA-256, and every frame that went by is looked at.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::transfer::{self, FILE, Rate};
use super::{linux, traffic};
use crate::boot;
use crate::console::Source;
use crate::images;
use crate::machine::aarch64::{Board, DUMP, UPLINK};
use crate::paths;
use crate::run::{Answer, Run, Step, Tally};
use crate::wire;
use crate::world::{self, World};

/// The guests, and what each fetches: other bytes than the other does.
const GUESTS: [usize; 2] = [1, 2];

/// Frames that tcpdump is asked about, which takes longer than our own look at all of them.
const ASKED: &str = "100000";

/// What guests fetch and send, and the digests of what they fetch.
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

    /// The step of a guest that sends.
    fn send(&self) -> String {
        format!("sink world:{}", self.world.sink)
    }

    /// What a guest fetched is what was served.
    fn fetched(&self, guest: usize, answer: &Answer) -> Result<Rate> {
        let (got, digest) = (answer.value("got"), self.digests.get(guest - 1));
        ensure!(got == digest.map(String::as_str), "{digest:?} was served: {}", answer.text());
        Rate::of(answer)
    }
}

/// Linux with its bridge and the same NIC as dom0.
pub fn linux_boot(name: &'static str) -> Result<()> {
    let images = images::prepare(true)?;
    shown(name, &Board { uplink: true, ..linux::plan(&images, "lab=shell") })
}

fn shown(name: &'static str, board: &Board<'_>) -> Result<()> {
    let World { http, sink } = World::open()?;
    eprintln!(
        "{name}: guests find http://10.0.2.2:{http}/BYTES/SEED, and a sink of streams at port {sink}"
    );
    boot::interactive(name, board)
}

pub fn linux_test(name: &'static str) -> Result<Tally> {
    let outside = Outside::open()?;
    let images = images::prepare(true)?;
    let mut run = Run::start(name, &Board { uplink: true, ..linux::plan(&images, "") })?;
    if linux::up(&mut run) {
        reached(&mut run);
        alone(&mut run, &outside);
        at_once(&mut run, &outside);
    }
    frames(&mut run);
    run.finish(name)
}

/// Both guests get addresses, and the world answers them.
fn reached(run: &mut Run) {
    traffic::files_ready(run);
    let mut leases = Vec::new();
    for guest in GUESTS {
        let made = lease(run, guest, &leases);
        if let Ok(lease) = &made {
            leases.push(lease.clone());
        }
        run.check(&format!("guest {guest} gets an address by DHCP"), Source::Dom(guest), made);
    }
    for guest in GUESTS {
        let made = traffic::ping(run, guest, "world", 56, 50).map(|(text, _)| text);
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

/// A guest with the NIC to itself.
fn alone(run: &mut Run, outside: &Outside) {
    let made = run.good(1, &outside.fetch(1), 170).and_then(|a| outside.fetched(1, &a));
    transfer::report(run, made, 1, "64 MiB from the world", "uplink_from_mbit");
    let made = run.good(1, &outside.send(), 170).and_then(|answer| Rate::of(&answer));
    transfer::report(run, made, 1, "64 MiB to the world", "uplink_to_mbit");
}

/// Both guests fetch and send, while one fetches files from the other.
fn at_once(run: &mut Run, outside: &Outside) {
    let begun = run.good(1, "bg talk files 4:12", 20);
    if let Err(error) = begun {
        run.check("guest 1 talks to guest 2", Source::Dom(1), Err(error));
    }
    let started = run.age();
    let steps = GUESTS.map(|guest| begin_both(run, outside, guest));
    for (guest, step) in GUESTS.into_iter().zip(steps) {
        let (fetched, sent) = match step.and_then(|step| end_both(run, outside, guest, step)) {
            Ok(both) => both,
            Err(error) => (Err(error), Err(anyhow::anyhow!("see the other way"))),
        };
        let name = format!("guest {guest}: 64 MiB from the world, all at once");
        transfer::report(run, fetched, guest, &name, &format!("uplink_both_from_{guest}_mbit"));
        let name = format!("guest {guest}: 64 MiB to the world, all at once");
        transfer::report(run, sent, guest, &name, &format!("uplink_both_to_{guest}_mbit"));
    }
    let seconds = (run.age() - started).as_secs_f64();
    run.figure("uplink_all_at_once_mbit", FILE as f64 * 4.0 * 8.0 / 1e6 / seconds);
    let made = run.good(1, "bgend talk", 89).map(|answer| answer.text());
    run.check("files from guest 2 to guest 1 come whole beside that", Source::Dom(1), made);
}

/// A guest begins to fetch and to send; the step that waits for the fetching.
fn begin_both(run: &Run, outside: &Outside, guest: usize) -> Result<Step> {
    run.good(guest, &format!("bg send {}", outside.send()), 20)?;
    run.begin(guest, &outside.fetch(guest))
}

/// What became of the two.
fn end_both(
    run: &Run,
    outside: &Outside,
    guest: usize,
    fetch: Step,
) -> Result<(Result<Rate>, Result<Rate>)> {
    let fetched = run.end_good(fetch, 170).and_then(|answer| outside.fetched(guest, &answer));
    let sent = run.good(guest, "bgwait send", 175).and_then(|answer| Rate::of(&answer));
    Ok((fetched, sent))
}

/// Every frame that went by dom0's NIC is as it should be.
fn frames(run: &mut Run) {
    let made = judged(run);
    run.check("every frame on the wire has its checksums", Source::Dom(0), made);
}

fn judged(run: &mut Run) -> Result<String> {
    // It writes no more, so that the last frame is whole.
    run.machine.qmp.delete_object(DUMP)?;
    let path = run.dir().join(UPLINK);
    let file = || File::open(&path).context("QEMU wrote no frames");
    let seen = wire::judge(BufReader::with_capacity(1 << 20, file()?))?;
    ensure!(seen.faults == 0, "{} are wrong: {}", seen.faults, seen.told.join("; "));
    ensure!(seen.tcp > 0 && seen.udp > 0, "hardly anything went by: {seen}");
    let agrees = match paths::program("tcpdump") {
        Some(tcpdump) => second_opinion(&tcpdump, file()?)?,
        None => "no tcpdump here to ask".to_owned(),
    };
    Ok(format!("{seen}; {agrees}"))
}

/// What tcpdump says of the first frames.
fn second_opinion(tcpdump: &Path, file: File) -> Result<String> {
    let mut child = Command::new(tcpdump)
        .args(["-nn", "-v", "-c", ASKED, "-r", "-"])
        .stdin(file)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run tcpdump")?;
    let output = child.stdout.take().context("tcpdump without standard output")?;
    let (mut right, mut wrong) = (0, 0);
    for line in BufReader::new(output).lines() {
        let line = line?;
        right += usize::from(line.contains("(correct)"));
        wrong += usize::from(line.contains("incorrect") || line.contains("bad cksum"));
    }
    let status = child.wait()?;
    ensure!(status.success() && right > 0, "tcpdump does not read them ({status})");
    ensure!(wrong == 0, "tcpdump finds {wrong} wrong and {right} right");
    Ok(format!("tcpdump agrees about {right} of the first {ASKED}"))
}

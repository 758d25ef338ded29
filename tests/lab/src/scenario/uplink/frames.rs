//! What went by dom0's NIC, frame by frame.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::console::Source;
use crate::machine::aarch64::{DUMP, UPLINK};
use crate::paths;
use crate::run::Run;
use crate::wire;

/// Frames that tcpdump is asked about, which takes longer than our own look at all of them.
const ASKED: &str = "100000";

/// Every frame is as it should be.
pub fn all_right(run: &mut Run) {
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
    Ok(format!("tcpdump finds {right} of the first {ASKED} right, none wrong"))
}

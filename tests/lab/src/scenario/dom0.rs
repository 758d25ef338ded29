//! This project's dom0 with two unmodified Linux guests: packets, life cycle, the store, and what it costs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::{life, store, traffic, udp};
use crate::boot;
use crate::capture;
use crate::console::Source;
use crate::images::{self, Images};
use crate::machine::aarch64::{Board, Domain, PROCESSORS};
use crate::run::{Run, Tally};
use crate::toolchain::{self, AARCH64, IMAGE_LIMIT};

pub fn plan<'a>(images: &'a Images, dom0: &'a Path, guest_arguments: &str) -> Board<'a> {
    Board {
        xen: &images.xen,
        xen_arguments: "",
        dom0: ours(dom0),
        guests: (1..=2).map(|n| Domain::linux(images, n, guest_arguments)).collect(),
        processors: PROCESSORS,
        uplink: None,
    }
}

/// This project's dom0.
pub fn ours(kernel: &Path) -> Domain<'_> {
    Domain { kernel, initramfs: None, arguments: String::new(), memory: 32, vcpus: 1 }
}

pub fn prepare() -> Result<(Images, PathBuf)> {
    Ok((images::prepare(false)?, toolchain::image("dom0", AARCH64)?))
}

pub fn boot(name: &'static str) -> Result<()> {
    let (images, dom0) = prepare()?;
    boot::interactive(name, &plan(&images, &dom0, "lab=shell"))
}

pub fn test(name: &'static str) -> Result<Tally> {
    let (images, dom0) = prepare()?;
    let mut run = Run::start(name, &plan(&images, &dom0, "").with_two_queues())?;
    if up(&mut run, &dom0) {
        // First, as making the files keeps the guests busy.
        traffic::files_ready(&mut run);
        traffic::all_pings(&mut run);
        idle(&mut run);
        udp::all(&mut run);
        life::reload(&mut run);
        traffic::tcp_all(&mut run);
        traffic::tcp_both(&mut run, "IPv6", "6:12", 5);
        store::all(&mut run);
        life::crash(&mut run);
    }
    capture(&mut run);
    run.finish(name)
}

/// Everybody is there.
pub fn up(run: &mut Run, dom0: &Path) -> bool {
    let mut up = ready(run, dom0) && traffic::guests_ready(run, 90);
    for domain in 1..=2 {
        up = up && connects(run, domain, &[]);
        if up {
            traffic::carrier(run, domain);
        }
    }
    up
}

/// dom0 is there, and fits in what it has to fit in.
pub fn ready(run: &mut Run, dom0: &Path) -> bool {
    let made = fs::metadata(dom0).map_err(Into::into).and_then(|m| {
        ensure!(m.len() <= IMAGE_LIMIT, "{} bytes, more than {IMAGE_LIMIT}", m.len());
        Ok(format!("{} KiB", m.len() / 1024))
    });
    run.check("dom0's image is at most 2 MiB", Source::Xen, made);
    let made = run.expect(Source::Xen, 60, "Xen to give dom0 its memory", |l| {
        let text = l.text.strip_prefix("Allocating 1:1 mappings totalling ")?;
        Some(text.strip_suffix(" for dom0:")?.to_owned())
    });
    let made = made.and_then(|size| {
        ensure!(size == "32MB", "it has {size}");
        Ok(size)
    });
    run.check("dom0 runs in 32 MiB", Source::Xen, made);
    let made = run.expect(Source::Dom(0), 60, "\"dom0: ready\"", |l| {
        l.text.contains("dom0: ready").then(|| l.text.clone())
    });
    run.check("dom0 is ready", Source::Dom(0), made)
}

/// Checks that a guest's vif is connected, and with these features.
pub fn connects(run: &mut Run, domain: usize, features: &[&str]) -> bool {
    let start = format!("vif{domain}.0: connected ");
    let made = run.expect(Source::Dom(0), 30, &format!("\"{start}\""), |l| {
        Some(l.text.split_once(&start)?.1.to_owned())
    });
    let made = made.and_then(|text| {
        let (_, list) = text.split_once("features=").context("it says no features")?;
        for feature in features {
            let has = list.split(',').any(|word| word == *feature);
            ensure!(has, "no {feature} in \"{text}\"");
        }
        Ok(text)
    });
    run.check(&format!("vif{domain}.0 connects"), Source::Dom(0), made)
}

/// dom0's CPU time, from Xen, over ten seconds in which nothing moves.
fn idle(run: &mut Run) {
    let made = measure_idle(run);
    if let Ok(share) = made {
        run.figure("dom0_idle_cpu_percent", share);
    }
    let made = made.and_then(|share| {
        ensure!(share < 1.0, "{share:.2} % of a CPU");
        Ok(format!("{share:.2} % of a CPU over 10 s"))
    });
    run.check("dom0 is idle when nothing moves", Source::Dom(0), made);
}

fn measure_idle(run: &Run) -> Result<f64> {
    let before = run.metrics(1, "idle-before")?;
    run.good(1, "settle 10", 40)?;
    let after = run.metrics(1, "idle-after")?;
    let change = |name: &str, labels: &[(&str, &str)]| -> Result<f64> {
        Ok(after.need(name, labels)? - before.need(name, labels)?)
    };
    let cpu = change("xen_domain_cpu_seconds_total", &[("domid", "0")])?;
    let time = change("dom0_uptime_seconds", &[])?;
    ensure!(time >= 10.0, "dom0's clock says that 10 s took {time} s");
    Ok(100.0 * cpu / time)
}

/// Takes dom0's capture ring out of the machine.
pub fn capture(run: &mut Run) {
    let made = take_capture(run);
    run.check("dom0's capture becomes a pcap", Source::Dom(0), made);
}

fn take_capture(run: &mut Run) -> Result<String> {
    let (at, size) = run.expect(Source::Dom(0), 1, "\"dom0: capture ring at\"", |l| {
        let rest = l.text.split_once("capture ring at machine 0x")?.1;
        let (at, size) = rest.split_once(" size 0x")?;
        let size = size.split(|c: char| !c.is_ascii_hexdigit()).next()?;
        Some((u64::from_str_radix(at, 16).ok()?, u64::from_str_radix(size, 16).ok()?))
    })?;
    ensure!(size <= 16 << 20, "a capture ring of {size} bytes");
    let raw = run.dir().join("capture.bin");
    run.machine.qmp.save_memory(at, size, &raw)?;
    let bytes = fs::read(&raw).context("QEMU wrote no memory")?;
    fs::remove_file(&raw)?;
    let (file, frames) = capture::pcap(&bytes)?;
    fs::write(run.dir().join("dom0.pcap"), file)?;
    ensure!(frames > 0, "it is empty");
    Ok(format!("{frames} frames in dom0.pcap"))
}

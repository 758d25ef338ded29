//! Linux as dom0 (Debian's kernel, xen-netback, a bridge) with the same guests: what ours is compared with.

use anyhow::Result;

use super::traffic;
use crate::boot;
use crate::console::Source;
use crate::images::{self, Images};
use crate::machine::aarch64::{Board, Domain, PROCESSORS};
use crate::run::{Run, Tally};

pub fn plan<'a>(images: &'a Images, guest_arguments: &str) -> Board<'a> {
    Board {
        xen: &images.xen,
        xen_arguments: "",
        dom0: Domain {
            kernel: &images.linux,
            initramfs: images.linux_dom0.as_deref(),
            arguments: "console=hvc0 rdinit=/init quiet".to_owned(),
            memory: 512,
            vcpus: 1,
        },
        guests: (1..=2).map(|n| Domain::linux(images, n, guest_arguments)).collect(),
        processors: PROCESSORS,
        uplink: None,
    }
}

pub fn boot(name: &'static str) -> Result<()> {
    let images = images::prepare(true)?;
    boot::interactive(name, &plan(&images, "lab=shell"))
}

pub fn test(name: &'static str) -> Result<Tally> {
    let images = images::prepare(true)?;
    let mut run = Run::start(name, &plan(&images, "").with_two_queues())?;
    if up(&mut run) {
        traffic::files_ready(&mut run);
        traffic::all_pings(&mut run);
        traffic::tcp_all(&mut run);
    }
    run.finish(name)
}

/// Everybody is there.
pub fn up(run: &mut Run) -> bool {
    let made = run.expect(Source::Dom(0), 300, "dom0: ready", |l| {
        l.text.contains("dom0: ready").then_some(l.text.clone())
    });
    let up = run.check("dom0 is up", Source::Dom(0), made) && traffic::guests_ready(run, 120);
    if up {
        for domain in 1..=2 {
            traffic::carrier(run, domain);
        }
    }
    up
}

//! Our guest on Linux's backend in dom0, with a stock Linux guest beside it.

use anyhow::{Result, ensure};

use super::keys::{self, Allowed};
use super::{Made, connected, created, dom0_up, linux_ready, name, reached, reattach, ten_times};
use crate::boot;
use crate::console::Source;
use crate::run::{Run, Tally};
use crate::scenario::transfer::{exchange, pings, report, sink};

/// The guest with Linux.
const LINUX: usize = 1;
/// Ours.
const OURS: usize = 3;
/// Ours with two queues.
const QUEUES: usize = 4;

/// Keys of a frontend that only ours has.
const FRONT_MORE: &[Allowed] = &[
    (
        "ctrl-ring-ref",
        "a control ring, by which pages are agreed on in advance: Linux's frontend has none",
    ),
    ("event-channel-ctrl", "the control ring's events"),
    ("feature-no-csum-offload", "0, in so many words: Linux's means the same by saying nothing"),
    (
        "request-multicast-control",
        "filters multicast groups if asked to: Linux's frontend never asks",
    ),
];
/// Keys of a frontend that only Linux's has.
const FRONT_LESS: &[Allowed] = &[];
/// Keys that Linux's backend has only for ours.
const BACK_MORE: &[Allowed] = &[];
/// Keys that it has only for Linux's.
const BACK_LESS: &[Allowed] = &[];

pub fn boot(name: &'static str) -> Result<()> {
    boot::interactive(name, &Made::prepare(&["guest"])?.board("lab=shell"))
}

pub fn test(scenario: &'static str) -> Result<Tally> {
    let made = Made::prepare(&["guest"])?;
    let mut run = Run::start(scenario, &made.board(""))?;
    if dom0_up(&mut run)
        && created(&mut run, LINUX, "pvh", "0", "")
        && created(&mut run, OURS, "guest", "0", "")
    {
        let made = linux_ready(&run, LINUX);
        run.check("Linux PVH has its interface and its file", Source::Dom(LINUX), made);
        for (domain, kind) in [(LINUX, "pvh"), (OURS, "guest")] {
            let what = name(kind, domain);
            pings(&mut run, 0, domain, &what, 200);
            exchange(&mut run, 0, domain, &what, kind);
        }
        let made = sink(&run, LINUX, OURS);
        report(&mut run, made, OURS, "64 MiB from Linux PVH to our guest", "pvh_guest_mbit");
        negotiated(&mut run);
        nodes(&mut run);
        detached(&mut run);
        driver_again(&mut run);
        queues(&mut run);
    }
    run.finish(scenario)
}

/// What Linux has agreed on with our frontend, as its interface shows it.
fn negotiated(run: &mut Run) {
    let made = run.good(0, &format!("vif {OURS} kernel"), 60).and_then(|answer| {
        for feature in ["tx-checksumming", "scatter-gather", "tcp-segmentation-offload"] {
            ensure!(answer.value(feature) == Some("on"), "{feature} is off: {}", answer.text());
        }
        Ok(answer.text())
    });
    run.check("Linux takes up checksums, sg and GSO of our guest", Source::Dom(OURS), made);
}

/// Both ends of both vifs.
fn nodes(run: &mut Run) {
    for (end, more, less) in [("front", FRONT_MORE, FRONT_LESS), ("back", BACK_MORE, BACK_LESS)] {
        let made = keys::of(run, OURS, end, "guest").and_then(|ours| {
            let linux = keys::of(run, LINUX, end, "linux")?;
            keys::compare(&ours, &linux, more, less)
        });
        let what = format!("our guest's vif has the keys of a Linux guest's, {end}end");
        run.check(&what, Source::Dom(OURS), made);
    }
}

/// The vif is taken away and given back, five times at rest and five times under traffic.
fn detached(run: &mut Run) {
    ten_times(run, "our guest's vif goes and comes back", &[0], OURS, |run| {
        reattach(run, OURS, "0")?;
        connected(run, OURS, 60)
    });
}

/// Linux's backend is taken out of dom0's kernel and brought back.
fn driver_again(run: &mut Run) {
    let made = run.good(0, &format!("netback {LINUX} {OURS}"), 120).and_then(|_| {
        connected(run, OURS, 60)?;
        reached(run, 0, OURS, 20)
    });
    run.check("our guest comes back to a backend that was reloaded", Source::Dom(OURS), made);
    let made = run.good(LINUX, "renet 1", 120).map(|answer| answer.text());
    run.check("so does Linux PVH, by a reload of its own driver", Source::Dom(LINUX), made);
    exchange(run, 0, OURS, "our guest on the reloaded backend", "guest_reloaded");
}

/// A guest that asks for two queues has them.
fn queues(run: &mut Run) {
    if !created(run, QUEUES, "guest", "0", "queues=2") {
        return;
    }
    let made = run.good(0, &format!("vif {QUEUES} kernel"), 60).and_then(|answer| {
        ensure!(answer.number("queues")? as u32 == 2, "{}", answer.text());
        let front = keys::of(run, QUEUES, "front", "queues")?;
        let asked = front.iter().any(|line| line == "multi-queue-num-queues = \"2\"");
        ensure!(asked, "no multi-queue-num-queues = 2 in the store");
        Ok(answer.text())
    });
    run.check("a guest with queues=2 has two", Source::Dom(QUEUES), made);
    pings(run, 0, QUEUES, &name("guest", QUEUES), 100);
    exchange(run, 0, QUEUES, "our guest with two queues", "guest_queues2");
    let made = reattach(run, QUEUES, "0").and_then(|()| connected(run, QUEUES, 30));
    let made = made.map(|()| "both queues again".to_owned());
    run.check("it comes back with both after a detach", Source::Dom(QUEUES), made);
}

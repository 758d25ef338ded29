//! This project at both ends and in the middle: two of its guests and two Linux ones on its dom0. Streams between the Linux ones
//! are what the others are to be compared with.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::transfer::{exchange, exchange_ours, pings, pings_ours};
use super::{dom0, life, traffic, transfer, withdraw};
use crate::boot;
use crate::console::Source;
use crate::images::{self, Images};
use crate::machine::aarch64::{Board, Domain, PROCESSORS};
use crate::metrics::Metrics;
use crate::run::{Run, Tally};
use crate::toolchain::{self, AARCH64};

/// The guests of this project.
const OURS: [usize; 2] = [1, 2];
/// The guest with Linux that does what is to be done.
const LINUX: usize = 3;
/// Another one for it to talk to.
const OTHER: usize = 4;
/// What our own backend and our own frontend agree on.
const AGREED: &[&str] =
    &["sg", "gso-tcpv4", "gso-tcpv6", "ipv4-csum", "ipv6-csum", "split", "ctrl-ring"];

/// A datapath that is given back is in use again after this, at most.
const RETURN: Duration = Duration::from_secs(20);

/// What a guest of ours counts and never has.
const TROUBLES: &[&str] = &[
    "netfront_tx_failed_total",
    "netfront_tx_unknown_total",
    "netfront_tx_lost_total",
    "netfront_rx_failed_total",
    "netfront_rx_malformed_total",
    "netfront_rx_checksum_total",
    "netfront_rx_no_memory_total",
    "grant_parked",
];

struct Made {
    images: Images,
    dom0: PathBuf,
    guest: PathBuf,
}

impl Made {
    fn prepare() -> Result<Self> {
        let images = images::prepare(false)?;
        let dom0 = toolchain::image("dom0", AARCH64)?;
        Ok(Self { images, dom0, guest: toolchain::image("guest", AARCH64)? })
    }

    fn board(&self, arguments: &str) -> Board<'_> {
        let ours = OURS.map(|number| Domain {
            kernel: &self.guest,
            initramfs: None,
            arguments: format!("name=guest{number} ip=10.9.0.1{number}/24"),
            memory: 32,
            vcpus: 1,
        });
        let linux = [LINUX, OTHER].map(|n| Domain::linux(&self.images, n, arguments));
        Board {
            xen: &self.images.xen,
            xen_arguments: "",
            dom0: dom0::ours(&self.dom0),
            guests: ours.into_iter().chain(linux).collect(),
            processors: PROCESSORS,
            uplink: None,
        }
    }
}

pub fn boot(name: &'static str) -> Result<()> {
    let made = Made::prepare()?;
    boot::interactive(name, &made.board("lab=shell"))
}

pub fn test(name: &'static str) -> Result<Tally> {
    let made = Made::prepare()?;
    let mut run = Run::start(name, &made.board(""))?;
    if up(&mut run, &made) {
        let mark = run.machine.console.mark(Source::Dom(0));
        let before = run.metrics(LINUX, "before");
        for guest in OURS {
            let what = format!("our guest {guest}");
            pings(&mut run, LINUX, guest, &what, 200);
            pings_ours(&mut run, LINUX, guest, LINUX, "Linux", 200);
            exchange(&mut run, LINUX, guest, &what, &format!("linux_guest{guest}"));
        }
        pings_ours(&mut run, LINUX, 1, 2, "our guest 2", 200);
        exchange_ours(&mut run, LINUX, 1, 2, "guest1_guest2");
        exchange(&mut run, LINUX, OTHER, "the other Linux guest", "linux_linux");
        statics(&mut run);
        let made = before.and_then(|before| clean(&run, mark, &before));
        run.check("dom0 holds nothing up and has lost nothing", Source::Dom(0), made);
        for guest in OURS {
            let made = untroubled(&run, guest);
            run.check(&format!("our guest {guest} has lost nothing"), Source::Dom(guest), made);
        }
        ends(&mut run);
    }
    dom0::capture(&mut run);
    run.finish(name)
}

/// Everybody is there.
fn up(run: &mut Run, made: &Made) -> bool {
    let size = fs::metadata(&made.guest).map_err(Into::into).map(|m| m.len() / 1024);
    run.check("our guest's image", Source::Xen, size.map(|size| format!("{size} KiB")));
    let mut up = dom0::ready(run, &made.dom0);
    for guest in OURS {
        let made = run.expect(Source::Dom(guest), 60, "\"guest: ready\"", |l| {
            l.text.contains("guest: ready").then(|| l.text.clone())
        });
        up &= run.check(&format!("our guest {guest} is ready"), Source::Dom(guest), made);
        up = up && dom0::connects(run, guest, AGREED);
    }
    for linux in [LINUX, OTHER] {
        up = up && traffic::guest_ready(run, linux, 90) && dom0::connects(run, linux, &[]);
        if up {
            traffic::carrier(run, linux);
            let made = transfer::has_file(run, linux);
            up = run.check(&format!("guest {linux} has its file"), Source::Dom(linux), made);
        }
    }
    up
}

/// Pages that our guests offered to be kept mapped are what their packets go through, and what goes on without them when
/// that is withdrawn.
fn statics(run: &mut Run) {
    for guest in OURS {
        let made = by_static(run, guest).and_then(|[tx, rx]| {
            ensure!(tx > 0.0 && rx > 0.0, "{tx} packets from it, {rx} to it");
            Ok(format!("{tx} packets from it, {rx} to it"))
        });
        run.check(&format!("guest {guest} is served by Static"), Source::Dom(0), made);
    }
    let without = withdraw::set(run, "static").and_then(|()| {
        std::thread::sleep(withdraw::DRAIN);
        OURS.map(|guest| by_static(run, guest)).into_iter().collect::<Result<Vec<_>>>()
    });
    exchange_ours(run, LINUX, 1, 2, "guest1_guest2_without_static");
    let made = without.and_then(|before| {
        for (guest, before) in OURS.into_iter().zip(before) {
            let after = by_static(run, guest)?;
            ensure!(after == before, "guest {guest} had {before:?} packets, and has {after:?}");
        }
        Ok("none from or to either guest".to_owned())
    });
    run.check("no packet goes by Static while it is withdrawn", Source::Dom(0), made);
    let made = withdraw::set(run, "").and_then(|()| static_again(run));
    run.check("Static is given back", Source::Dom(0), made);
}

/// Packets of a guest that went by Static: from it, and to it.
fn by_static(run: &Run, guest: usize) -> Result<[f64; 2]> {
    let (vif, lines) = (format!("{guest}.0"), run.operate("vifs")?);
    let carried = |wanted: &str| {
        lines.iter().find_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            match *words {
                [of, way, "static", packets, ..] if of == vif && way == wanted => {
                    packets.parse().ok()
                }
                _ => None,
            }
        })
    };
    Ok(["tx", "rx"].map(|way| carried(way).unwrap_or(0.0)))
}

/// Pings until some of them go by Static.
fn static_again(run: &Run) -> Result<String> {
    let (before, started) = (by_static(run, 1)?, run.age());
    while run.age() - started < RETURN {
        traffic::ping(run, LINUX, &transfer::at(1), 56, 20)?;
        let after = by_static(run, 1)?;
        if after.iter().zip(before).all(|(after, before)| *after > before) {
            return Ok(format!("used again after {:.1} s", (run.age() - started).as_secs_f64()));
        }
    }
    anyhow::bail!("not used within {} s", RETURN.as_secs())
}

/// What dom0 says of itself after all that: no trouble, no loss but what a stream needs, nothing that hangs.
fn clean(run: &Run, mark: usize, before: &Metrics) -> Result<String> {
    withdraw::untroubled(&run.machine, mark)?;
    let drops = withdraw::no_drops(run, LINUX, before)?;
    let after = run.metrics(LINUX, "after")?;
    for name in ["netback_packets_open", "grant_mappings_parked"] {
        let left = after.need(name, &[])?;
        ensure!(left == 0.0, "{name} {left}");
    }
    // Not grant_mappings: our guests offer pages to be kept mapped as they come to need them.
    for name in ["netback_frames_free", "evtchn_ports_bound", "xenstore_nodes"] {
        let (old, new) = (before.need(name, &[])?, after.need(name, &[])?);
        ensure!(old == new, "{name} was {old} and is {new}");
    }
    Ok(format!("dropped: {drops}"))
}

/// What a guest of ours says of itself after all that.
fn untroubled(run: &Run, guest: usize) -> Result<String> {
    let label = format!("guest{guest}");
    let metrics = run.metrics_of(&transfer::at(guest), LINUX, &label)?;
    for name in TROUBLES {
        let count = metrics.need(name, &[])?;
        ensure!(count == 0.0, "{name} {count} (metrics-{label}.txt)");
    }
    let connections = metrics.need("netfront_connections_total", &[])?;
    ensure!(connections == 1.0, "it connected {connections} times");
    let count = |name: &str| metrics.need(name, &[]);
    Ok(format!(
        "{} packets sent, {} received, {} pages kept mapped",
        count("netfront_tx_packets_total")?,
        count("netfront_rx_packets_total")?,
        count("netfront_static_grants")?
    ))
}

/// Our guests do what the toolstack writes, and dom0 lets go of them.
fn ends(run: &mut Run) {
    let made = not_suspended(run);
    run.check("our guest 1 refuses to be suspended, and goes on", Source::Dom(1), made);
    for (guest, order, said) in [(2, "poweroff", "power off"), (1, "reboot", "reboot")] {
        let before = run.metrics(LINUX, &format!("{order}-before"));
        let made = ended(run, guest, order, said);
        run.check(&format!("our guest {guest} takes the order {order}"), Source::Dom(guest), made);
        let made = before.and_then(|before| {
            let after = run.metrics(LINUX, &format!("{order}-after"))?;
            life::let_go(&before, &after, guest)
        });
        run.check(&format!("nothing of our guest {guest} is held"), Source::Dom(0), made);
    }
    let made = run.metrics(LINUX, "end").and_then(|end| {
        // Two each.
        let left = end.need("grant_mappings", &[])?;
        ensure!(left == 4.0, "{left} pages");
        Ok("four pages".to_owned())
    });
    run.check("dom0 has mapped nothing but the Linux guests' rings", Source::Dom(0), made);
    let made = traffic::ping(run, LINUX, "4:1", 56, 20).map(|(text, _)| text);
    run.check("the Linux guest still reaches dom0", Source::Dom(LINUX), made);
}

/// On Arm nobody could save it.
fn not_suspended(run: &Run) -> Result<String> {
    let order = "/local/domain/1/control/shutdown";
    run.operate(&format!("write {order} suspend"))?;
    run.expect(Source::Dom(1), 20, "\"ignored: suspend\"", |l| {
        l.text.contains("ignored: suspend").then_some(())
    })?;
    run.operate(&format!("write {order}"))?;
    traffic::ping(run, LINUX, &transfer::at(1), 56, 20).map(|(text, _)| text)
}

/// The time from the order to dom0's word that the guest is gone.
fn ended(run: &Run, guest: usize, order: &str, said: &str) -> Result<String> {
    let console = &run.machine.console;
    let (mark, started) = (console.mark(Source::Dom(0)), run.age());
    run.operate(&format!("write /local/domain/{guest}/control/shutdown {order}"))?;
    for text in
        [format!("domain {guest}: has shut down: {said}"), format!("domain {guest}: released")]
    {
        console
            .wait(Source::Dom(0), mark, Duration::from_secs(20), |l| {
                l.text.contains(&text).then_some(())
            })
            .with_context(|| format!("dom0 does not say \"{text}\""))?;
    }
    Ok(format!("released after {:.1} s", (run.age() - started).as_secs_f64()))
}

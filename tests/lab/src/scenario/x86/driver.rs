//! Our driver domain, which serves guests of three kinds at once; and the same guests on Linux's backend in dom0.

use anyhow::{Context as _, Result, ensure};

use super::keys::{self, Allowed};
use super::{Made, connected, created, dom0_up, linux_ready, name, reached, reattach, ten_times};
use crate::boot;
use crate::console::Source;
use crate::metrics::Metrics;
use crate::run::{Run, Tally};
use crate::scenario::transfer::{Rate, at, pings, pings_ours, report, sink, source};

/// The stock Linux guests, and ours.
const PVH: usize = 1;
const PV: usize = 2;
const OURS: usize = 3;
/// Our driver domain.
const DRIVER: usize = 4;
/// As xl has it as a backend.
const BACKEND: &str = "dom4";
/// All guests and their kinds.
const GUESTS: [(usize, &str); 3] = [(PVH, "pvh"), (PV, "pv"), (OURS, "guest")];
/// All pairs with a Linux guest first.
const PAIRS: [(usize, usize); 3] = [(PVH, PV), (PVH, OURS), (PV, OURS)];
/// What has to be the same after a guest was there.
const HELD: &[&str] = &["evtchn_ports_bound", "netback_frames_free"];
/// What nobody may leave behind.
const NONE: &[&str] = &["netback_packets_open", "grant_mappings_parked"];

/// Keys of a backend that only ours has.
const BACK_MORE: &[Allowed] = &[];
/// Keys of a backend that only Linux's has.
const BACK_LESS: &[Allowed] = &[];

pub fn boot(name: &'static str) -> Result<()> {
    boot::interactive(name, &Made::prepare(&["guest", "driver-domain"])?.board("lab=shell"))
}

pub fn test(scenario: &'static str) -> Result<Tally> {
    let made = Made::prepare(&["guest", "driver-domain"])?;
    let mut run = Run::start(scenario, &made.board(""))?;
    if dom0_up(&mut run) && created(&mut run, DRIVER, "driver", "none", "") && guests(&mut run) {
        all_pings(&mut run);
        transfers(&mut run);
        let ours = keys::of(&run, PVH, "back", "driver");
        reconnects(&mut run);
        destroyed_guest(&mut run);
        destroyed_driver(&mut run);
        compared(&mut run, ours);
    }
    run.finish(scenario)
}

/// Everybody is there. What Linux does once it is up, the Linux guests do side by side.
fn guests(run: &mut Run) -> bool {
    GUESTS.iter().all(|(domain, kind)| created(run, *domain, kind, BACKEND, ""))
        && [PVH, PV].into_iter().all(|domain| has_interface(run, domain))
}

fn has_interface(run: &mut Run, domain: usize) -> bool {
    let made = linux_ready(run, domain);
    run.check(&format!("dom{domain} has its interface"), Source::Dom(domain), made)
}

fn called(domain: usize) -> String {
    let kind = GUESTS.iter().find(|(n, _)| *n == domain).map_or("", |(_, kind)| kind);
    name(kind, domain)
}

fn all_pings(run: &mut Run) {
    for (one, other) in PAIRS {
        pings(run, one, other, &format!("{}, from {}", called(other), called(one)), 100);
    }
    pings_ours(run, PVH, OURS, PV, "Linux PV", 100);
    pings(run, PVH, DRIVER, "the driver domain itself", 20);
}

/// 64 MiB between the guests of each pair: everybody sends once and receives once.
fn transfers(run: &mut Run) {
    let made = sink(run, PVH, PV);
    linux_pair(run, made, "driver");
    let made = sink(run, PV, OURS);
    report(run, made, OURS, "64 MiB from Linux PV to our guest", "driver_pv_guest_mbit");
    let made = source(run, PVH, OURS);
    report(run, made, OURS, "64 MiB from our guest to Linux PVH", "driver_guest_pvh_mbit");
}

/// The transfer that is made on both backends.
fn linux_pair(run: &mut Run, made: Result<Rate>, backend: &str) {
    let name = format!("64 MiB from Linux PVH to Linux PV, on backend {backend}");
    report(run, made, PV, &name, &format!("{backend}_pvh_pv_mbit"));
}

/// What the driver domain has of others and of its own.
struct Holding {
    metrics: Metrics,
    /// Pages that our guest has offered to be kept mapped: as many as it has had a use for.
    offered: f64,
}

impl Holding {
    fn now(run: &Run, label: &str) -> Result<Self> {
        let ours = run.metrics_of(&at(OURS), PVH, &format!("{label}-guest"))?;
        let offered = ours.need("netfront_static_grants", &[])?;
        Ok(Self { metrics: run.metrics_of(&at(DRIVER), PVH, label)?, offered })
    }

    fn mapped(&self) -> Result<f64> {
        Ok(self.metrics.need("grant_mappings", &[])? - self.offered)
    }

    /// The other is the same. What that is.
    fn same(&self, later: &Self) -> Result<String> {
        let (old, new) = (self.mapped()?, later.mapped()?);
        ensure!(old == new, "{old} pages were mapped beside those offered, and {new} are");
        let mut text = vec![format!("{} pages offered, {new} others mapped", later.offered)];
        for name in HELD {
            let (old, new) = (self.metrics.need(name, &[])?, later.metrics.need(name, &[])?);
            ensure!(old == new, "{name} was {old} and is {new}");
            text.push(format!("{name} {new}"));
        }
        for name in NONE {
            let left = later.metrics.need(name, &[])?;
            ensure!(left == 0.0, "{name} {left}");
        }
        Ok(text.join(", "))
    }
}

/// Each guest loses its vif and gets another; Linux's guests ten times, while they ping ours in five of them.
fn reconnects(run: &mut Run) {
    let before = Holding::now(run, "reconnect-before");
    let linux = [PVH, PV];
    ten_times(run, "both Linux guests' vifs go and come back", &linux, OURS, |run| {
        again(run, &linux)
    });
    let made = again(run, &[OURS]).and_then(|()| reached(run, PVH, OURS, 5));
    let name = format!("{} loses its vif and gets another", called(OURS));
    run.check(&name, Source::Dom(OURS), made);
    let made = before.and_then(|before| returned(run, &before, "reconnect-after"));
    run.check("the driver domain holds what it held before", Source::Dom(DRIVER), made);
}

/// Guests get other vifs, all at once.
fn again(run: &Run, domains: &[usize]) -> Result<()> {
    for domain in domains {
        run.good(0, &format!("detach {domain}"), 100)?;
    }
    for domain in domains {
        run.good(0, &format!("attach {domain} {BACKEND}"), 100)?;
    }
    domains.iter().try_for_each(|domain| comes_up(run, *domain))
}

/// A vif that has been given to a guest is used by it.
fn comes_up(run: &Run, domain: usize) -> Result<()> {
    if domain != OURS {
        run.good(domain, "net 1", 170)?;
    }
    connected(run, domain, 60)
}

/// Everything is back where it was. That takes a moment, so it is looked at a few times.
fn returned(run: &Run, before: &Holding, label: &str) -> Result<String> {
    let mut made = Ok(String::new());
    for _ in 0..10 {
        made = before.same(&Holding::now(run, label)?);
        if made.is_ok() {
            break;
        }
        run.good(PVH, "settle 1", 20)?;
    }
    made
}

/// A guest is destroyed while it is sent a file; then it starts again.
fn destroyed_guest(run: &mut Run) {
    let made =
        run.good(0, &format!("detach {PV}"), 100).and_then(|_| Holding::now(run, "without-pv"));
    let without = made.and_then(|holding| {
        run.good(0, &format!("attach {PV} {BACKEND}"), 100)?;
        comes_up(run, PV)?;
        Ok(holding)
    });
    let made = without.and_then(|without| {
        run.good(PVH, &format!("bg file sink {} 0.02", at(PV)), 20)?;
        run.good(PVH, "settle 2", 20)?;
        run.good(0, &format!("xl destroy dom{PV}"), 100)?;
        run.good(PVH, "bgruns file", 20).context("the transfer ended before the guest did")?;
        let made = returned(run, &without, "destroyed-after");
        run.step(PVH, "bgcut file", 20)?;
        made
    });
    let name = "nothing stays in the driver domain of a guest destroyed in mid-transfer";
    run.check(name, Source::Dom(DRIVER), made);
    pings(run, PVH, OURS, "our guest, from Linux PVH, after that", 20);
    if created(run, PV, "pv", BACKEND, "") && has_interface(run, PV) {
        pings(run, PVH, PV, "the new Linux PV", 20);
    }
}

/// The driver domain is destroyed, and a new one serves the same guests.
fn destroyed_driver(run: &mut Run) {
    let made = run.good(0, &format!("xl destroy dom{DRIVER}"), 100).map(|_| String::new());
    run.check("the driver domain can be destroyed", Source::Dom(0), made);
    if !created(run, DRIVER, "driver", "none", "") {
        return;
    }
    for (domain, _) in GUESTS {
        let made = reattach(run, domain, BACKEND).and_then(|()| comes_up(run, domain));
        let name = format!("{} comes back to the new driver domain", called(domain));
        run.check(&name, Source::Dom(domain), made.map(|()| "connected".to_owned()));
    }
    for (one, other) in PAIRS {
        let made = reached(run, one, other, 20);
        let name = format!("{} reaches {} through it", called(one), called(other));
        run.check(&name, Source::Dom(one), made);
    }
}

/// The same guests on Linux's backend in dom0, and what the two backends have in the store.
fn compared(run: &mut Run, ours: Result<Vec<String>>) {
    for (domain, _) in GUESTS {
        let made = reattach(run, domain, "0").and_then(|()| comes_up(run, domain));
        let name = format!("{} moves to Linux's backend in dom0", called(domain));
        run.check(&name, Source::Dom(domain), made.map(|()| "connected".to_owned()));
    }
    let made = ours.and_then(|ours| {
        let linux = keys::of(run, PVH, "back", "linux")?;
        keys::compare(&ours, &linux, BACK_MORE, BACK_LESS)
    });
    run.check("our backend has the keys that Linux's has", Source::Dom(DRIVER), made);
    for (one, other) in PAIRS {
        let made = reached(run, one, other, 20);
        let name = format!("{} reaches {} through dom0", called(one), called(other));
        run.check(&name, Source::Dom(one), made);
    }
    let made = sink(run, PVH, PV);
    linux_pair(run, made, "dom0");
}

//! `XENFEAT_grant_map_identity` on a real Xen, which advertises it, takes it away and gives it back, and tells nobody: dom0's NIC sees
//! no caches, and the guests' pages are cleaned at their machine addresses while that can be done.

use std::path::Path;
use std::time::Duration;
use std::{fmt, fs};

use anyhow::{Context as _, Result, bail, ensure};

use super::super::dom0;
use super::super::transfer::{self, FILE, Rate};
use super::timeline::Timeline;
use super::ways::{MOST, PAUSE, carried};
use super::withdraw::{
    self, COPY, DRAIN, DWELL, MAP, MAP_IDENTITY, RETURN, ROUNDS, used, wait_for,
};
use super::{GUESTS, Outside, frames, reached, shown, with_nic};
use crate::console::Source;
use crate::hypervisor;
use crate::images::Images;
use crate::machine::aarch64::{Board, Domain, Nic};
use crate::metrics::Metrics;
use crate::paths;
use crate::run::{Answer, Run, Tally};

/// Xen without `GNTTABOP_cache_flush`, as before 4.5.
const NO_FLUSH: &str = "gnttab=no-cache-flush";
/// The key of Xen that withdraws the bit and restores it, and that of its list of grants.
const TOGGLE: char = 'I';
const GRANTS: char = 'g';
/// The bit.
const BIT: u64 = 1 << 12;
/// A step in the background is waited for so often, for three minutes each time.
const WAITS: usize = 5;
/// What a step's status is that took longer than the guests' agent lets it.
const KILLED: i32 = 137;
/// dom0's table is looked at so often.
const LOOK: Duration = Duration::from_millis(150);
/// What was sent, by datapath and time.
const PICTURE: &str = "identity.svg";
/// Xen's and dom0's words are waited for so long.
const PATIENCE: Duration = Duration::from_secs(20);

fn plan<'a>(
    images: &'a Images,
    image: &'a Path,
    xen_arguments: &'static str,
    guest_arguments: &str,
) -> Board<'a> {
    let board = dom0::plan(images, image, guest_arguments);
    let dom0 = Domain { arguments: "nic=noncoherent".to_owned(), ..dom0::ours(image) };
    with_nic(Board { xen_arguments, dom0, ..board }, Nic::default())
}

pub fn boot(name: &'static str) -> Result<()> {
    let (images, image) = dom0::prepare()?;
    shown(name, &plan(&images, &image, NO_FLUSH, "lab=shell"))
}

pub fn test(name: &'static str) -> Result<Tally> {
    let outside = Outside::open()?;
    let (images, image) = dom0::prepare()?;
    let mut run = Run::start(name, &plan(&images, &image, NO_FLUSH, ""))?;
    if up(&mut run, &image) {
        each(&mut run, &outside);
        send_by(&mut run, &outside, "with the bit", "on", MAP_IDENTITY);
        change(&mut run, &outside);
        copied(&mut run, &outside);
        empty(&mut run);
    }
    frames::all_right(&mut run);
    let mut tally = run.finish(name)?;
    // The same Xen, as it is today otherwise: it cleans caches itself.
    let name = format!("{name}/cache-flush");
    let mut run = Run::start(&name, &plan(&images, &image, "", ""))?;
    if up(&mut run, &image) {
        flushed(&mut run, &outside);
    }
    frames::all_right(&mut run);
    tally += run.finish(&name)?;
    Ok(tally)
}

/// Everybody is there, and Xen offers what this is about.
fn up(run: &mut Run, image: &Path) -> bool {
    if !dom0::up(run, image) {
        return false;
    }
    let made = run.expect(Source::Dom(0), 1, "the features that dom0 starts with", |line| {
        features(&line.text).map(|bits| (bits, line.text.clone()))
    });
    let made = made.and_then(|(bits, text)| {
        ensure!(bits & BIT != 0, "{text}");
        Ok(format!("{bits:#x}"))
    });
    let offered = run.check("dom0 reads bit 12 from Xen", Source::Dom(0), made);
    let made = run.expect(Source::Dom(0), 1, "dom0's NIC", |line| {
        let (_, nic) = line.text.split_once("dom0: nic ")?;
        nic.ends_with(", not coherent").then(|| nic.to_owned())
    });
    let seen = run.check("dom0 takes its NIC for one that sees no caches", Source::Dom(0), made);
    if offered && seen {
        reached(run);
    }
    offered && seen
}

/// What dom0 says that Xen offers: `features 0xBITS (epoch N)`.
fn features(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("features 0x")?;
    let (bits, _) = rest.split_once(" (epoch ")?;
    u64::from_str_radix(bits, 16).ok()
}

/// 64 MiB each way by each guest, out by MapIdentity.
fn each(run: &mut Run, outside: &Outside) {
    let before = run.metrics(2, "identity-before");
    for guest in GUESTS {
        let made = began(run, guest, "send", &format!("sink {}", outside.sink()))
            .and_then(|()| began(run, guest, "fetch", &outside.fetch(guest)));
        if let Err(error) = made {
            run.check(&format!("guest {guest} begins"), Source::Dom(guest), Err(error));
            return;
        }
    }
    for guest in GUESTS {
        let made = ended(run, guest, "fetch").and_then(|answer| outside.fetched(guest, &answer));
        let (name, figure) =
            (format!("guest {guest}: 64 MiB from the world"), format!("from_{guest}_mbit"));
        transfer::report(run, made, guest, &name, &figure);
        let made = ended(run, guest, "send").and_then(|answer| Rate::of(&answer));
        let (name, figure) =
            (format!("guest {guest}: 64 MiB to the world"), format!("to_{guest}_mbit"));
        transfer::report(run, made, guest, &name, &figure);
    }
    let limits = [(MAP_IDENTITY, 2.0 * MOST, f64::MAX), (MAP, 0.0, 0.0)];
    let made = before.and_then(|before| carried(run, &before, "identity", &limits));
    run.check("it went by MapIdentity", Source::Dom(0), made);
    let made = grants(run).and_then(|grants| {
        ensure!(grants.ever > 1000, "{} frames of others ever at gfn == mfn", grants.ever);
        Ok(format!("{} times so far, {} now, the rings among them", grants.ever, grants.identity))
    });
    run.check("Xen put guests' pages at their machine addresses", Source::Xen, made);
}

/// Guest 1 sends 64 MiB with the NIC to itself, which all have to go by one way: the rate, and what that took.
fn send_by(run: &mut Run, outside: &Outside, how: &str, label: &str, way: &str) {
    let before = run.metrics(2, &format!("{label}-before"));
    let made = began(run, 1, "send", &format!("sink {}", outside.sink()))
        .and_then(|()| ended(run, 1, "send"))
        .and_then(|answer| Rate::of(&answer));
    let name = format!("64 MiB to the world, {how}");
    transfer::report(run, made, 1, &name, &format!("{label}_mbit"));
    let limits = [COPY, MAP, MAP_IDENTITY].map(|path| match path {
        _ if path == way => (path, MOST, f64::MAX),
        // Headers, and what is small.
        COPY => (path, 0.0, FILE as f64 - MOST),
        _ => (path, 0.0, 0.0),
    });
    let made = before.and_then(|before| {
        let text = carried(run, &before, label, &limits)?;
        let cost = Cost::between(&before, &run.metrics(2, &format!("{label}-cost"))?)?;
        cost.note(run, label);
        Ok(format!("{text}; {cost}"))
    });
    run.check(&format!("{how} it went by {way}"), Source::Dom(0), made);
}

/// What a transfer took.
struct Cost {
    /// Seconds of processor time of dom0's, by Xen's count.
    cpu: f64,
    /// Packets that went to the NIC, acknowledgements of the other direction included.
    packets: f64,
    /// Of grants, for what guests sent: hypercalls, copies, maps and unmaps.
    hypercalls: f64,
    copies: f64,
    maps: f64,
    unmaps: f64,
    /// Pieces of pages cleaned by Xen, and at their machine addresses.
    flushed: f64,
    cleaned: f64,
}

impl Cost {
    fn between(before: &Metrics, after: &Metrics) -> Result<Self> {
        let more = |name: &str, labels: &[(&str, &str)]| -> Result<f64> {
            Ok(after.need(name, labels)? - before.get(name, labels).unwrap_or(0.0))
        };
        let of_guest = |what: &str| {
            more(&format!("netback_path_{what}_total"), &[("vif", "1.0"), ("dir", "tx")])
        };
        let cleaned = |how| more("netback_uplink_cleaned_total", &[("how", how)]);
        Ok(Self {
            cpu: more("xen_domain_cpu_seconds_total", &[("domid", "0")])?,
            packets: more("netback_uplink_sent_packets_total", &[])?,
            hypercalls: of_guest("hypercalls")?,
            copies: of_guest("copies")?,
            maps: of_guest("maps")?,
            unmaps: of_guest("unmaps")?,
            flushed: cleaned("by_xen")?,
            cleaned: cleaned("at_machine_address")?,
        })
    }

    /// By name, for each packet.
    fn each(&self) -> [(&'static str, f64); 6] {
        [
            ("grant_hypercalls", self.hypercalls),
            ("copies", self.copies),
            ("maps", self.maps),
            ("unmaps", self.unmaps),
            ("cache_flush_ops", self.flushed),
            ("cleaned_at_machine_address", self.cleaned),
        ]
        .map(|(name, count)| (name, count / self.packets.max(1.0)))
    }

    fn note(&self, run: &mut Run, label: &str) {
        run.figure(format!("{label}_dom0_cpu_s"), self.cpu);
        run.figure(format!("{label}_packets"), self.packets);
        for (name, value) in self.each() {
            run.figure(format!("{label}_{name}_per_packet"), value);
        }
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} s of dom0's time, {} packets, of each", self.cpu, self.packets)?;
        for (name, value) in self.each() {
            write!(f, " {value:.2} {name}")?;
        }
        Ok(())
    }
}

fn began(run: &Run, guest: usize, name: &str, step: &str) -> Result<()> {
    run.good(guest, &format!("bg {name} {step}"), 60).map(|_| ())
}

/// The end of a step in the background that has to go well, however long it takes as long as it goes on: it gives up by itself when
/// nothing moves.
fn ended(run: &Run, guest: usize, name: &str) -> Result<Answer> {
    for _ in 0..WAITS {
        let answer = run.step(guest, &format!("bgwait {name}"), 200)?;
        let text = answer.text();
        // On a slow machine the wait is ended before it gives up by itself.
        if answer.status != KILLED && !text.contains(&format!("{name} does not end")) {
            ensure!(answer.status == 0, "dom{guest}: {name} failed: {text}");
            return Ok(answer);
        }
    }
    bail!("dom{guest}: {name} does not end")
}

/// Xen takes the bit away and gives it back, again and again, in mid-transfer.
fn change(run: &mut Run, outside: &Outside) {
    let before = run.metrics(2, "change-before");
    let mark = run.machine.console.mark(Source::Dom(0));
    if let Err(error) = begin(run, outside) {
        run.check("both guests begin to send", Source::Dom(1), Err(error));
        return;
    }
    let mut timeline = Timeline::default();
    for number in 1..=ROUNDS {
        let made = round(run, &mut timeline);
        let name = format!("Xen withdraws the bit and restores it in mid-transfer: {number}");
        if !run.check(&name, Source::Dom(0), made) {
            break;
        }
    }
    let made = drawn(run, &timeline);
    run.check("what was sent meanwhile is drawn", Source::Dom(0), made);
    let made = run.good(1, "bgruns slow", 60).and_then(|_| {
        // It ends its pauses.
        run.step(1, "bgend slow", 200)?;
        Ok(ended(run, 1, "slow")?.text())
    });
    run.check("guest 1's 64 MiB have come whole through all of that", Source::Dom(1), made);
    let made = run.step(2, "bgend again", 200).and_then(|_| Ok(ended(run, 2, "again")?.text()));
    run.check("and so have guest 2's, each time", Source::Dom(2), made);
    let limits = [(MAP_IDENTITY, 1e6, f64::MAX), (COPY, 1e6, f64::MAX), (MAP, 0.0, 0.0)];
    let made = before.and_then(|before| {
        let text = carried(run, &before, "change", &limits)?;
        lost(run, &before).map(|lost| format!("{text}; {lost}"))
    });
    run.check("both ways carried them, and the NIC's port lost nothing", Source::Dom(0), made);
    let made = withdraw::untroubled(&run.machine, mark);
    run.check("no vif is closed or complains, nor the NIC", Source::Dom(0), made);
}

fn begin(run: &Run, outside: &Outside) -> Result<()> {
    let start = used(run)?;
    run.good(1, &format!("bg slow sink {} {PAUSE}", outside.sink()), 20)?;
    run.good(2, &format!("bg again sinks {}", outside.sink()), 20)?;
    wait_for(run, RETURN * 2, "packets to go out by MapIdentity", |now| {
        start.grew(now, MAP_IDENTITY)
    })
}

/// Without the bit everything goes by Copy; with it, by MapIdentity again.
fn round(run: &Run, timeline: &mut Timeline) -> Result<String> {
    watch(run, timeline, DWELL)?;
    timeline.change(run.age().as_secs_f64(), false);
    let noticed = toggle(run, false)?;
    watch(run, timeline, DRAIN)?;
    let before = used(run)?;
    watch(run, timeline, DWELL)?;
    let start = used(run)?;
    for path in [MAP_IDENTITY, MAP] {
        let mapped = start.taken(path) - before.taken(path);
        ensure!(mapped.packets == 0.0, "{} packets by {path} without the bit", mapped.packets);
    }
    ensure!(start.mapped() == 0.0, "{} pages are still mapped", start.mapped());
    let copied = start.taken(COPY) - before.taken(COPY);
    ensure!(copied.bytes > 0.0, "nothing is sent without the bit");
    let since = run.age();
    timeline.change(since.as_secs_f64(), true);
    toggle(run, true)?;
    wait_for(run, RETURN, "MapIdentity to be used again", |now| {
        timeline.sample(run.age().as_secs_f64(), now);
        start.grew(now, MAP_IDENTITY)
    })?;
    let seconds = (run.age() - since).as_secs_f64();
    Ok(format!(
        "noticed within {:.1} s, {:.1} MB by Copy meanwhile, used again after {seconds:.1} s",
        noticed.as_secs_f64(),
        copied.bytes / 1e6
    ))
}

/// Looks at what is sent for so long.
fn watch(run: &Run, timeline: &mut Timeline, time: Duration) -> Result<()> {
    let end = run.age() + time;
    while run.age() < end {
        let used = used(run)?;
        timeline.sample(run.age().as_secs_f64(), &used);
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn drawn(run: &Run, timeline: &Timeline) -> Result<String> {
    let summary = format!("Both guests send; {}, in QEMU", hypervisor::chosen());
    let path = run.dir().join(PICTURE);
    fs::write(&path, timeline.draw(&summary))?;
    Ok(format!("it is in {}", paths::shown(&path)))
}

/// Has Xen withdraw the bit, or restore it, and waits until dom0 has noticed. Answers how long that took.
fn toggle(run: &Run, offered: bool) -> Result<Duration> {
    let console = &run.machine.console;
    let [xen, dom0] = [Source::Xen, Source::Dom(0)].map(|source| console.mark(source));
    console.debug_key(TOGGLE)?;
    let word =
        if offered { "grant_map_identity: restored" } else { "grant_map_identity: withdrawn" };
    let said = console
        .wait(Source::Xen, xen, PATIENCE, |line| (line.text == word).then_some(line.at))
        .with_context(|| format!("Xen does not say \"{word}\""))?;
    let noticed = console
        .wait(Source::Dom(0), dom0, PATIENCE, |line| {
            let bits = features(&line.text)?;
            ((bits & BIT != 0) == offered).then_some(line.at)
        })
        .context("dom0 does not notice")?;
    Ok(noticed.saturating_duration_since(said))
}

/// Nothing was dropped on its way to the NIC, and what was found out late was copied.
fn lost(run: &Run, before: &Metrics) -> Result<String> {
    let after = run.metrics(2, "change-lost")?;
    let more = |name: &str, labels: &[(&str, &str)]| {
        after.get(name, labels).unwrap_or(0.0) - before.get(name, labels).unwrap_or(0.0)
    };
    let drops = more("netback_uplink_drops_total", &[("dir", "tx")]);
    ensure!(drops == 0.0, "{drops} packets were dropped on their way to the NIC");
    let resets = more("netback_uplink_resets_total", &[]);
    ensure!(resets == 0.0, "the NIC was reset {resets} times");
    let copied = |reason| more("netback_uplink_copied_total", &[("reason", reason)]);
    Ok(format!(
        "{} packets were mapped in vain, of {} of which Xen had not put a page at its machine address",
        copied("no_address") + copied("not_cleaned"),
        copied("not_cleaned")
    ))
}

/// With the bit off, and no cache_flush, all is copied.
fn copied(run: &mut Run, outside: &Outside) {
    if toggled(run, false) {
        send_by(run, outside, "without the bit and cache_flush", "off", COPY);
    }
    toggled(run, true);
}

/// A check that dom0 notices by itself.
fn toggled(run: &mut Run, offered: bool) -> bool {
    let made = toggle(run, offered).map(|took| format!("after {:.1} s", took.as_secs_f64()));
    std::thread::sleep(DRAIN);
    let what = if offered { "is back" } else { "is gone" };
    run.check(&format!("dom0 notices by itself that the bit {what}"), Source::Dom(0), made)
}

/// When no frontend is left, nothing is mapped, nor at its machine address.
fn empty(run: &mut Run) {
    for guest in GUESTS {
        let made = run.good(guest, "away", 60).map(|_| "it is gone".to_owned());
        run.check(&format!("guest {guest} takes its driver out"), Source::Dom(guest), made);
    }
    let mut made = Ok(String::new());
    for _ in 0..5 {
        std::thread::sleep(DWELL);
        made = grants(run).and_then(|grants| {
            ensure!(grants.active == 0, "{} grants of guests are in use", grants.active);
            ensure!(grants.identity == 0, "{} frames are at gfn == mfn", grants.identity);
            Ok(format!("no grant in use, no frame at gfn == mfn of {} ever", grants.ever))
        });
        if made.is_ok() {
            break;
        }
    }
    run.check("Xen has nothing mapped any more", Source::Xen, made);
}

/// What Xen says of grants.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Grants {
    /// Grants of guests' in use.
    active: usize,
    /// Frames of others that dom0 finds at gfn == mfn,
    identity: u64,
    /// and how often one came to be there.
    ever: u64,
}

impl Grants {
    /// Reads Xen's list.
    fn parse<'a>(lines: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut grants = None::<Self>;
        for line in lines {
            let words: Vec<_> = line.split_whitespace().collect();
            match *words {
                [now, "frames", "of", "others", "at", "gfn", "==", "mfn", ever, "ever)"] => {
                    let grants = grants.get_or_insert_default();
                    grants.identity += now.parse::<u64>().ok()?;
                    grants.ever += ever.strip_prefix('(')?.parse::<u64>().ok()?;
                }
                [reference, ..] if reference.starts_with("[0x") => {
                    grants.get_or_insert_default().active += 1;
                }
                _ => {}
            }
        }
        grants
    }
}

/// Asks Xen.
fn grants(run: &Run) -> Result<Grants> {
    let console = &run.machine.console;
    let mark = console.mark(Source::Xen);
    console.debug_key(GRANTS)?;
    console
        .wait(Source::Xen, mark, PATIENCE, |line| {
            line.text.starts_with("gnttab_usage_print_all ] done").then_some(())
        })
        .context("Xen does not list its grants")?;
    let lines = console.since(Source::Xen, mark);
    let texts = lines.iter().map(|line| line.text.as_str());
    Grants::parse(texts).context("Xen's list of grants is odd")
}

/// With cache_flush there is a better way than the identity mapping, and it does not hang on the bit.
fn flushed(run: &mut Run, outside: &Outside) {
    send_by(run, outside, "with the bit and cache_flush", "flush", MAP);
    if toggled(run, false) {
        send_by(run, outside, "with cache_flush alone", "flush_off", MAP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_grants_is_summed_up() {
        let text = "gnttab_usage_print_all [ key 'g' pressed\n\
            grant-table for remote d0 (v1)\n  1 frames (64 max), 1 maptrack frames (1024 max)\n  \
            3 frames of others at gfn == mfn (4711 ever)\nno active grant table entries\n\
            grant-table for remote d1 (v1)\n[0x008]      0 0x48c7d 0x00000001          0 0x0005d0 0x19\n\
            [0x009]      0 0x48c7e 0x00000001          0 0x0005d1 0x19";
        let grants = Grants { active: 2, identity: 3, ever: 4711 };
        assert_eq!(Grants::parse(text.lines()), Some(grants));
        assert_eq!(Grants::parse([].into_iter()), None);
    }

    #[test]
    fn features_are_read_from_what_dom0_says() {
        let line = "[    0.012 INFO] dom0: 32768 KiB of memory, features 0x27805 (epoch 0)";
        assert_eq!(features(line), Some(0x2_7805));
        assert_eq!(features("dom0: nic 52:54 features EVENT_IDX, coherent"), None);
    }
}

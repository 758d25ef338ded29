//! Datapaths that go while packets fly, and come back: dom0's operator takes Map away, then Direct too, then gives both
//! back, ten times, while the guests are busy with one another and with dom0.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};

use super::udp::{Books, Change, Way};
use super::{dom0, store, traffic};
use crate::console::Source;
use crate::machine::Machine;
use crate::metrics::Metrics;
use crate::run::{Run, Tally};

/// The operator's key, below dom0's own directory.
const KEY: &str = "netback/withdrawn";
/// Times that everything goes and comes back, half of them with the stream one way and half the other.
pub const ROUNDS: usize = 10;
/// What was at work when a datapath went may end in it.
pub const DRAIN: Duration = Duration::from_millis(500);
/// How long a state lasts, at least.
pub const DWELL: Duration = Duration::from_millis(1000);
/// Events that may turn out to announce nothing: guests that only work send hardly any.
const QUIET: f64 = 20.0;
/// A datapath that is given back is in use again after this, at most.
pub const RETURN: Duration = Duration::from_secs(15);

pub fn test(name: &'static str) -> Result<Tally> {
    let (images, image) = dom0::prepare()?;
    let mut run = Run::start(name, &dom0::plan(&images, &image, ""))?;
    if dom0::up(&mut run, &image) {
        traffic::files_ready(&mut run);
        key(&mut run);
        under_traffic(&mut run);
    }
    dom0::capture(&mut run);
    run.finish(name)
}

/// What the key is to a guest, and what it makes of words it does not know.
fn key(run: &mut Run) {
    let made = store::private(run, 1, 2);
    run.check("guest 1 can neither read nor set dom0's key", Source::Dom(1), made);
    let made = unknown(run);
    run.check("a word that the key does not know spoils no other", Source::Dom(0), made);
}

fn unknown(run: &Run) -> Result<String> {
    let mark = run.machine.console.mark(Source::Dom(0));
    set(run, "nonsense map 12")?;
    let lines = run.machine.console.since(Source::Dom(0), mark);
    let mut warnings = lines.into_iter().map(|line| line.text).filter(|t| t.contains("[ WARN]"));
    let said = warnings.find(|text| text.contains("nonsense"));
    set(run, "")?;
    said.context("dom0 does not say that it does not know it")
}

/// Sets the key, and waits until dom0 has applied it.
pub fn set(run: &Run, value: &str) -> Result<()> {
    let console = &run.machine.console;
    let mark = console.mark(Source::Dom(0));
    run.operate(&format!("write {KEY} {value}"))?;
    console
        .wait(Source::Dom(0), mark, Duration::from_secs(10), |line| {
            line.text.contains("dom0: withdrawn: ").then_some(())
        })
        .with_context(|| format!("dom0 does not apply \"{value}\""))
}

fn under_traffic(run: &mut Run) {
    let ways = [Way { from: 1, to: 2 }, Way { from: 2, to: 1 }];
    let before: Result<Vec<_>> = ways.iter().map(|way| steady(run, *way, "before")).collect();
    let mark = run.machine.console.mark(Source::Dom(0));
    let drops = run.metrics(2, "drops-before");
    let switches = used(run).map(|used| used.switches);
    let mut missing = 0.0;
    for (flag, way) in [("", "1 to 2"), (" -R", "2 to 1")] {
        missing += half(run, flag, way);
    }
    let made = switches.and_then(|before| switched(run, before));
    run.check("every change is counted", Source::Dom(0), made);
    let made = untroubled(&run.machine, mark);
    run.check("no vif is closed or complains", Source::Dom(0), made);
    let made = drops.and_then(|before| no_drops(run, 2, &before));
    run.check("dom0 drops only what a full queue has no room for", Source::Dom(0), made);
    match before.and_then(|before| books(run, &before)) {
        Ok(changes) => {
            let mut lost = (0.0, 0.0);
            for change in &changes {
                change.check(run, "under traffic");
                let (dom0, guests) = change.lost();
                lost = (lost.0 + dom0, lost.1 + guests);
            }
            run.figure("withdraw_dom0_drops", lost.0);
            let text = format!("{missing} datagrams missing, {} drops counted", lost.0 + lost.1);
            let accounted = missing <= lost.0 + lost.1;
            let made = if accounted { Ok(text) } else { Err(anyhow!(text)) };
            run.check("nothing is lost that is not counted", Source::Dom(0), made);
        }
        Err(error) => {
            run.check("the counters add up", Source::Dom(0), Err(error));
        }
    }
}

/// A stream fills the queue of a guest that does not keep up until something is dropped: that is how it learns its rate.
/// For any other reason nothing is to be dropped. A domain with Linux asks dom0.
pub fn no_drops(run: &Run, domain: usize, before: &Metrics) -> Result<String> {
    let after = run.metrics(domain, "drops-after")?;
    let name = "netback_vif_drops_total";
    let more = |labels: &[(&str, &str)]| {
        after.get(name, labels).unwrap_or(0.0) - before.get(name, labels).unwrap_or(0.0)
    };
    let (all, full) = (more(&[]), more(&[("reason", "queue_full")]));
    ensure!(all == full, "{} frames for other reasons (metrics-drops-after.txt)", all - full);
    for name in ["stack_lost_total", "switch_local_full_total"] {
        let lost = after.need(name, &[])? - before.need(name, &[])?;
        ensure!(lost == 0.0, "{name}: {lost} frames for dom0 itself");
    }
    let name = "netback_spurious_events_total";
    let spurious = after.need(name, &[])? - before.need(name, &[])?;
    ensure!(spurious <= QUIET, "{spurious} events are taken for spurious, and guests throttled");
    Ok(format!("{full} of those, nothing else; {spurious} events without work"))
}

fn steady(run: &Run, way: Way, when: &str) -> Result<Books> {
    Books::steady(run, way, &format!("{when}-{}-to-{}", way.from, way.to))
}

/// What has changed since the first readings, each way.
fn books(run: &Run, before: &[Books]) -> Result<Vec<Change>> {
    let read = |old: &Books| Change::between(old, &steady(run, old.way(), "after")?);
    before.iter().map(read).collect()
}

/// Half of the rounds, with the stream in one direction. Answers how many datagrams did not arrive.
fn half(run: &mut Run, flag: &str, way: &str) -> f64 {
    if let Err(error) = begin(run, flag) {
        run.check(&format!("traffic begins, stream {way}"), Source::Dom(1), Err(error));
        return 0.0;
    }
    let (started, mut share) = (run.age(), (0.0, 0.0));
    for number in 1..=ROUNDS / 2 {
        let made = round(run).map(|round| {
            share = (share.0 + round.share.0, share.1 + round.share.1);
            round.text
        });
        let name = format!("Map goes, then Direct, and both return: {number}, stream {way}");
        run.check(&name, Source::Dom(0), made);
    }
    let seconds = (run.age() - started).as_secs_f64();
    let percent = 100.0 * share.0 / share.1.max(1.0);
    let text = format!("{percent:.0} % of {:.1} MB", share.1 / 1e6);
    let made = if percent > 50.0 { Ok(text) } else { Err(anyhow!(text)) };
    run.check(
        &format!("most goes by Direct while it is there, stream {way}"),
        Source::Dom(0),
        made,
    );
    let slug = way.replace(' ', "_");
    run.figure(format!("withdraw_{slug}_s"), seconds);
    let made = stream(run, seconds);
    if let Ok((least, mean, _)) = &made {
        run.figure(format!("withdraw_tcp_{slug}_least_mbit"), *least);
        run.figure(format!("withdraw_tcp_{slug}_mean_mbit"), *mean);
    }
    let made = made.map(|(_, _, text)| text);
    run.check(&format!("the stream {way} never stands still"), Source::Dom(1), made);
    let made = run.good(1, "bgend files", 89).map(|answer| answer.text());
    run.check(&format!("files arrive whole beside the stream {way}"), Source::Dom(1), made);
    let made = poured(run);
    run.check(&format!("dom0 takes a pattern beside the stream {way}"), Source::Dom(1), made);
    let made = datagrams(run);
    let missing = made.as_ref().map_or(0.0, |(missing, _)| *missing);
    let made = made.map(|(_, text)| text);
    run.check(&format!("datagrams keep their order beside the stream {way}"), Source::Dom(2), made);
    missing
}

/// The stream, a file over and over against it, a pattern to dom0, and datagrams with numbers.
fn begin(run: &Run, flag: &str) -> Result<()> {
    run.good(2, "urecv 9000 10", 60)?;
    run.good(1, "bg datagrams usend 4:12 9000 1400 1000000 0.005", 60)?;
    run.good(1, "bg pour pour", 60)?;
    run.good(1, "bg files files 4:12", 60)?;
    run.good(1, &format!("bg flow flow 4:12{flag}"), 60)?;
    let (start, limit) = (used(run)?, Duration::from_secs(30));
    wait_for(run, limit, "the stream to run by Direct", |now| start.grew(now, DIRECT))
}

/// What one time shows.
struct Round {
    text: String,
    /// Bytes that guests were given by Direct while it was there, and by whatever way.
    share: (f64, f64),
}

/// One time; however it ends, everything is given back.
fn round(run: &Run) -> Result<Round> {
    let made = go_and_return(run);
    if made.is_err() {
        let _ = set(run, "");
    }
    made
}

/// Each state lasts a while, and what was carried in it is looked at.
fn go_and_return(run: &Run) -> Result<Round> {
    let (mut text, mut share) = (Vec::new(), (0.0, 0.0));
    for (value, gone) in [("map", &[MAP][..]), ("map direct", &[MAP, DIRECT])] {
        set(run, value)?;
        std::thread::sleep(DRAIN);
        let before = used(run)?;
        std::thread::sleep(DWELL);
        let after = used(run)?;
        for path in gone {
            let more = before.more(&after, path).packets;
            ensure!(more == 0.0, "{more} packets by {path}, which is withdrawn");
        }
        ensure!(after.mapped() == 0.0, "{} pages are still mapped", after.mapped());
        let (direct, copy) = (before.more(&after, DIRECT), before.more(&after, COPY));
        let expected = if gone.contains(&DIRECT) { copy } else { direct };
        ensure!(expected.packets > 0.0, "nothing is given to guests without {value}");
        if !gone.contains(&DIRECT) {
            share = (direct.bytes, direct.bytes + copy.bytes);
        }
        text.push(format!(
            "without {value} {} packets by direct, {} by copy",
            direct.packets, copy.packets
        ));
    }
    let start = used(run)?;
    set(run, "")?;
    for path in [DIRECT, MAP] {
        wait_for(run, RETURN, &format!("{path} to be used again"), |now| start.grew(now, path))?;
    }
    std::thread::sleep(DWELL);
    Ok(Round { text: text.join("; "), share })
}

/// Names of datapaths.
pub const COPY: &str = "copy";
const DIRECT: &str = "direct";
/// The one by which pages go out that are not copied.
pub const MAP: &str = "map";
/// The same, with a second mapping at the machine address.
pub const MAP_IDENTITY: &str = "map-identity";

/// What a datapath has carried, in packets and bytes.
#[derive(Clone, Copy, Default)]
pub struct Carried {
    /// Packets.
    pub packets: f64,
    /// Bytes.
    pub bytes: f64,
}

impl std::iter::Sum for Carried {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            packets: sum.packets + one.packets,
            bytes: sum.bytes + one.bytes,
        })
    }
}

impl std::ops::Sub for Carried {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { packets: self.packets - before.packets, bytes: self.bytes - before.bytes }
    }
}

/// A line of dom0's table: what a datapath has carried from a vif's guest, or to it.
struct Row {
    vif: String,
    is_from: bool,
    path: String,
    carried: Carried,
    /// Pages that are mapped.
    mapped: f64,
}

/// What datapaths have carried.
pub struct Used {
    rows: Vec<Row>,
    /// Times that the datapaths in use changed.
    switches: f64,
    /// Frames that dom0's NIC has and has not sent, if there is one.
    pub in_flight: f64,
}

impl Used {
    /// Reads dom0's tables of vifs.
    fn parse(lines: &[String]) -> Option<Self> {
        let (mut rows, mut switches, mut in_flight) = (Vec::new(), None, 0.0);
        for line in lines {
            let words: Vec<_> = line.split_whitespace().collect();
            let number = |at: usize| words.get(at)?.parse::<f64>().ok();
            match *words {
                [vif, way @ ("tx" | "rx"), path, ..] => rows.push(Row {
                    vif: vif.to_owned(),
                    is_from: way == "tx",
                    path: path.to_owned(),
                    carried: Carried { packets: number(3)?, bytes: number(4)? },
                    mapped: number(7)? - number(8)?,
                }),
                ["in", "use:", .., "changed", count, "times"] => switches = count.parse().ok(),
                ["nic", _, count, "in", ..] => in_flight = count.parse().ok()?,
                _ => {}
            }
        }
        Some(Self { rows, switches: switches?, in_flight })
    }

    /// What a datapath has carried from all guests.
    pub fn taken(&self, path: &str) -> Carried {
        self.rows.iter().filter(|row| row.is_from && row.path == path).map(|row| row.carried).sum()
    }

    fn given(&self, path: &str) -> Carried {
        self.rows.iter().filter(|row| !row.is_from && row.path == path).map(|row| row.carried).sum()
    }

    /// Where a datapath ends is where it is looked at: what is mapped goes to dom0 itself, or out.
    fn of(&self, path: &str) -> Carried {
        if [MAP, MAP_IDENTITY].contains(&path) { self.taken(path) } else { self.given(path) }
    }

    fn more(&self, later: &Self, path: &str) -> Carried {
        later.of(path) - self.of(path)
    }

    /// Whether a datapath has carried something since.
    pub fn grew(&self, later: &Self, path: &str) -> bool {
        self.more(later, path).packets > 0.0
    }

    /// Pages of guests' packets that are mapped.
    pub fn mapped(&self) -> f64 {
        self.rows.iter().map(|row| row.mapped).sum()
    }

    /// Those of one guest.
    pub fn mapped_of(&self, guest: usize) -> f64 {
        let vif = format!("{guest}.0");
        self.rows.iter().filter(|row| row.vif == vif).map(|row| row.mapped).sum()
    }
}

/// What dom0's table says.
pub fn used(run: &Run) -> Result<Used> {
    let lines = run.operate("vifs")?;
    Used::parse(&lines).with_context(|| format!("dom0's table is odd: {}", lines.join("; ")))
}

/// Waits until the table shows something.
pub fn wait_for(
    run: &Run,
    limit: Duration,
    what: &str,
    mut is: impl FnMut(&Used) -> bool,
) -> Result<()> {
    let end = run.age() + limit;
    loop {
        if is(&used(run)?) {
            return Ok(());
        }
        ensure!(run.age() < end, "waited {} s for {what}", limit.as_secs());
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Ends the stream: its worst two seconds and its mean in Mbit/s, and what to say of it.
fn stream(run: &Run, seconds: f64) -> Result<(f64, f64, String)> {
    let answer = run.good(1, "bgend flow", 89)?;
    let text = answer.text();
    let (least, mean) = (answer.number("least")?, answer.number("mean")?);
    ensure!(least > 0.0, "{text}");
    ensure!(!text.contains("ended by itself"), "{text}");
    let counted = answer.number("seconds")?;
    // What is left of the last two seconds may not have been counted.
    ensure!(counted + 3.0 >= seconds, "it ran for {counted} of {seconds:.0} s: {text}");
    let text = format!("{mean:.1} Mbit/s over {counted} s, at least {least:.1} in any two seconds");
    Ok((least, mean, text))
}

/// Ends the pattern: dom0 got all of it, and all was right.
fn poured(run: &Run) -> Result<String> {
    let answer = run.good(1, "bgend pour", 89)?;
    let text = answer.text();
    let (sent, bytes) = (answer.number("sent")?, answer.number("bytes")?);
    ensure!(sent == bytes && sent > 0.0 && answer.number("wrong")? == 0.0, "{text}");
    Ok(text)
}

/// Ends the datagrams: how many are missing, and what to say of them. None comes twice, late or changed.
fn datagrams(run: &Run) -> Result<(f64, String)> {
    let sent = run.good(1, "bgend datagrams", 89)?;
    let got = run.good(2, "udone", 60)?;
    let text = format!("{}; {}", sent.text(), got.text());
    for what in ["corrupt", "duplicate", "reordered"] {
        ensure!(got.number(what)? == 0.0, "{text}");
    }
    let arrived = got.number("got")?;
    ensure!(arrived > 0.0, "{text}");
    Ok((sent.number("sent")? - arrived, text))
}

/// Map went, Direct went, and both returned, each time.
fn switched(run: &Run, before: f64) -> Result<String> {
    let count = used(run)?.switches - before;
    let least = 3 * ROUNDS;
    ensure!(count >= least as f64, "{count} of at least {least}");
    Ok(format!("{count} in {ROUNDS} rounds"))
}

/// Nothing was logged of vifs that end, nor any error or warning.
pub fn untroubled(machine: &Machine, mark: usize) -> Result<String> {
    let lines = machine.console.since(Source::Dom(0), mark);
    let odd: Vec<_> = lines
        .iter()
        .map(|line| line.text.as_str())
        .filter(|text| {
            let troubles = [": disconnected", ": closed", ": refused", ": removed", "[ERROR]"];
            troubles.iter().any(|trouble| text.contains(trouble)) || text.contains("[ WARN]")
        })
        .collect();
    ensure!(odd.is_empty(), "{}", odd.join("; "));
    Ok(format!("{} lines, none of trouble", lines.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_vifs_is_summed_by_datapath() {
        let lines = [
            "vif      state        queues  tx drops  rx drops  features",
            "1.0      Connected         1         0         0  sg,split",
            "vif      way datapath        packets          bytes hypercalls     copies     maps   unmaps",
            "1.0      tx  direct               99             99          3         30        0        0",
            "1.0      rx  direct               10          20000          3         30        0        0",
            "1.0      tx  map                   4           9000          2          0        7        5",
            "2.0      rx  direct                5            300          2         10        0        0",
            "2.0      rx  copy                  1             60          1          1        0        0",
            "in use: copy direct map static; to the uplink: copy map; changed 6 times",
            "nic 52:54:00:12:34:56: 3 in flight; by copy 7 frames, 700 bytes; 0 of these cut here; 0 resets",
        ]
        .map(str::to_owned);
        let used = Used::parse(&lines).unwrap();
        let carried = [DIRECT, MAP, COPY].map(|path| used.of(path)).map(|c| (c.packets, c.bytes));
        assert_eq!(carried, [(15.0, 20_300.0), (4.0, 9000.0), (1.0, 60.0)]);
        assert_eq!((used.mapped(), used.switches, used.in_flight), (2.0, 6.0, 3.0));
        assert_eq!((used.mapped_of(1), used.mapped_of(2)), (2.0, 0.0));
        assert_eq!(used.taken(DIRECT).packets, 99.0);
        assert!(Used::parse(&[]).is_none());
    }
}

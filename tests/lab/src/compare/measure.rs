//! What is done in a turn of a side, the same for both.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::cpu::{Asked, Cpu, Meter};
use super::dom0::{ASKS, Made, image_bytes};
use super::figures::Side;
use super::iperf::{self, Arrived};
use super::stats::percentile;
use crate::console::Source;
use crate::machine::aarch64::Domain;
use crate::run::Run;
use crate::scenario::dom0;
use crate::scenario::traffic::{self, files_ready};
use crate::scenario::transfer::{FILE, at};
use crate::world::World;

/// How much of everything.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Seconds of TCP each way.
    pub tcp: u32,
    /// Seconds of UDP of each size.
    pub udp: u32,
    /// Pings.
    pub pings: u32,
    /// Bytes from a guest of this project to another.
    pub stream: u64,
    /// Seconds of nothing.
    pub idle: u32,
}

/// Payloads of datagrams.
const SIZES: [u32; 3] = [64, 512, 1472];
/// What a socket may hold that waits for its reader, in bytes: Linux's 208 KiB are less than what a ring of small packets takes
/// there, so that what is delivered would say how guest 2's turns fall.
const RECEIVE_BUFFER: u32 = 4 << 20;
/// How long a stream between guests of this project may take.
const STREAM: Duration = Duration::from_secs(600);
/// What a step may take beside its own time.
const MORE: u64 = 40;

/// Bytes.
pub const GB: f64 = 1e9;
const MILLION: f64 = 1e6;

/// Traffic between two Linux guests.
pub fn guests(run: &mut Run, made: &Made, side: Side, effort: Effort) {
    if !made.up(run, side) {
        return;
    }
    memory(run, &made.guests(side).dom0, side);
    traffic(run, asked(side), effort);
}

fn asked(side: Side) -> Asked {
    match side {
        Side::Ours => Asked::Ours(1),
        Side::Linux => Asked::Linux([0, 1, 2]),
    }
}

/// What guest 1 and guest 2 send each other.
pub fn traffic(run: &mut Run, asked: Asked, effort: Effort) {
    let Some(meter) = meter(run, asked) else { return };
    idle(run, &meter, effort.idle);
    pings(run, 1, 2, effort.pings);
    tcp(run, &meter, effort.tcp);
    let made = run.good(2, &format!("sys net/core/rmem_default {RECEIVE_BUFFER}"), 20);
    run.check(
        "guest 2's sockets hold what came at once",
        Source::Dom(2),
        made.map(|_| format!("{} MiB", RECEIVE_BUFFER >> 20)),
    );
    for size in SIZES {
        udp(run, &meter, size, effort.udp);
    }
}

/// Traffic between two guests of this project.
pub fn ours(run: &mut Run, made: &Made, side: Side, effort: Effort) {
    let (by, asked) = match side {
        Side::Ours => (ASKS, Asked::Ours(ASKS)),
        Side::Linux => (0, asked(side)),
    };
    let up = match side {
        Side::Ours => dom0::ready(run, &made.dom0) && traffic::guest_ready(run, ASKS, 90),
        Side::Linux => {
            let made = run.expect(Source::Dom(0), 300, "dom0: ready", |l| {
                l.text.contains("dom0: ready").then(|| l.text.clone())
            });
            run.check("dom0 is up", Source::Dom(0), made)
        }
    };
    if !(up && [1, 2].into_iter().all(|guest| guest_ready(run, guest))) {
        return;
    }
    let Some(meter) = meter(run, asked) else { return };
    let made = meter.around(run, || discarded(run, by, effort.stream)).map(|(rate, cpu)| {
        let bytes = effort.stream as f64;
        let mut figures = vec![
            ("ours_tcp_mbit".to_owned(), rate),
            ("cpu_ours_tcp_s_per_gb".to_owned(), cpu.backend() / (bytes / GB)),
        ];
        figures.extend(busy("ours_tcp", [(cpu, bytes * 8.0 / MILLION / rate)]));
        figures
    });
    keep(run, "TCP from our guest 1 to our guest 2", made);
}

fn guest_ready(run: &mut Run, guest: usize) -> bool {
    let made = run.expect(Source::Dom(guest), 60, "\"guest: ready\"", |l| {
        l.text.contains("guest: ready").then(|| l.text.clone())
    });
    run.check(&format!("our guest {guest} is ready"), Source::Dom(guest), made)
}

/// Has our guest 1 send to our guest 2, which counts what comes; Mbit/s.
fn discarded(run: &Run, by: usize, bytes: u64) -> Result<f64> {
    let console = &run.machine.console;
    let mark = console.mark(Source::Dom(1));
    run.good(by, &format!("get 4:11 80 /run?discard:10.9.0.12:{bytes}"), MORE)?;
    // From the console, as asking for it would take processor time.
    let line = console
        .wait(Source::Dom(1), mark, STREAM, |l| {
            l.text.contains("client: discard ").then(|| l.text.clone())
        })
        .context("it does not end")?;
    let word = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name));
    ensure!(word("bytes=") == Some(&bytes.to_string()), "{line}");
    word("mbit=").and_then(|rate| rate.parse().ok()).with_context(|| line.clone())
}

/// Traffic between a Linux guest and servers outside.
pub fn uplink(run: &mut Run, made: &Made, side: Side) {
    if !made.up(run, side) {
        return;
    }
    files_ready(run);
    let reached = run.good(1, "lease", 60).and_then(|_| run.good(1, "reach world", 60));
    let text = reached.map(|_| "answers".to_owned());
    if !run.check("the world outside", Source::Dom(1), text) {
        return;
    }
    let Some(meter) = meter(run, asked(side)) else { return };
    let World { http, sink } = made.world;
    let to = format!("sink world:{sink}");
    let from = format!("fetch world {http} /{FILE}/1 wc -c");
    for (way, step, count) in [("to", to, "sent"), ("from", from, "got")] {
        let made = meter.around(run, || {
            let answer = run.good(1, &step, 170)?;
            ensure!(answer.value(count) == Some(&FILE.to_string()), "{}", answer.text());
            answer.number("seconds")
        });
        let made = made.and_then(|(seconds, cpu)| {
            ensure!(seconds > 0.0, "no time passed");
            Ok(vec![
                (format!("uplink_{way}_mbit"), FILE as f64 * 8.0 / MILLION / seconds),
                (format!("cpu_uplink_{way}_s_per_gb"), cpu.backend() / (FILE as f64 / GB)),
            ])
        });
        keep(run, &format!("64 MiB {way} the world"), made);
    }
}

fn meter(run: &mut Run, asked: Asked) -> Option<Meter> {
    let made = Meter::new(run, asked);
    let text = match &made {
        Ok(meter) => Ok(format!("{:.3} s of the backend's", meter.own().backend())),
        Err(error) => Err(anyhow::anyhow!("{error:#}")),
    };
    run.check("asking Xen for processor time takes", Source::Dom(0), text);
    let meter = made.ok()?;
    run.figure("cpu_reading_s", meter.own().backend());
    Some(meter)
}

/// Keeps figures and says them, or says what went wrong.
pub fn keep(run: &mut Run, name: &str, made: Result<Vec<(String, f64)>>) {
    let made = made.map(|figures| {
        let words = figures.into_iter().map(|(key, value)| {
            let word = format!("{key} {value:.4}");
            run.figure(key, value);
            word
        });
        words.collect::<Vec<_>>().join(", ")
    });
    run.check(name, Source::Dom(1), made);
}

fn idle(run: &mut Run, meter: &Meter, seconds: u32) {
    let made = meter.around(run, || run.good(1, &format!("settle {seconds}"), MORE));
    let made = made.and_then(|(_, cpu)| {
        ensure!(cpu.elapsed > 0.0, "no time passed");
        Ok(vec![("idle_percent".to_owned(), 100.0 * cpu.backend() / cpu.elapsed)])
    });
    keep(run, "the backend while nothing moves", made);
}

/// Times of pings from a domain with Linux to any other.
pub fn pings(run: &mut Run, from: usize, to: usize, count: u32) {
    let words = format!("rtts {} 56 {count}", at(to));
    let made = run.good(from, &words, MORE).and_then(|answer| {
        let times = iperf::times(answer.lines.iter().map(String::as_str), count as usize)?;
        let of = |percent: usize| {
            let time = percentile(&times, percent).context("no times")?;
            Ok((format!("ping_p{percent}_ms"), time))
        };
        [50, 90, 99].into_iter().map(of).collect()
    });
    keep(run, &format!("{count} pings from dom{from} to dom{to}"), made);
}

/// Both ways, one after the other.
fn tcp(run: &mut Run, meter: &Meter, seconds: u32) {
    let mut both = Vec::new();
    for (words, way) in [("", "1_to_2"), (" -R", "2_to_1")] {
        let made = transfer(run, meter, &format!("4:12 {seconds}{words}"), seconds);
        let figures = made.map(|(arrived, cpu)| {
            both.push((arrived, cpu));
            vec![(format!("tcp_{way}_mbit"), arrived.bytes * 8.0 / MILLION / arrived.seconds)]
        });
        keep(run, &format!("TCP {}", way.replace('_', " ")), figures);
    }
    // Of one way only it would not be the same figure.
    let made = (both.len() == 2).then(|| costs(&both)).context("not both ways came about");
    keep(run, "what TCP took", made);
}

/// The backend's processor time by what was carried, and who was how busy.
fn costs(transfers: &[(Arrived, Cpu)]) -> Vec<(String, f64)> {
    let sum = |of: fn(&(Arrived, Cpu)) -> f64| transfers.iter().map(of).sum::<f64>();
    let bytes = sum(|(arrived, _)| arrived.bytes);
    let backend = sum(|(_, cpu)| cpu.backend());
    let mut figures = vec![("cpu_tcp_s_per_gb".to_owned(), backend / (bytes / GB))];
    figures.extend(busy("tcp", transfers.iter().map(|(arrived, cpu)| (*cpu, arrived.seconds))));
    figures
}

/// Of the time that the transfers took, for before and after one nobody does anything.
fn busy(what: &str, transfers: impl IntoIterator<Item = (Cpu, f64)>) -> Vec<(String, f64)> {
    let all: Vec<_> = transfers.into_iter().collect();
    let seconds: f64 = all.iter().map(|(_, seconds)| seconds).sum();
    let of = |(domain, who): (usize, &str)| {
        let used: f64 = all.iter().filter_map(|(cpu, _)| cpu.used.get(domain)).sum();
        (format!("busy_{what}_{who}"), 100.0 * used / seconds)
    };
    ["backend", "guest1", "guest2"].into_iter().enumerate().map(of).collect()
}

fn udp(run: &mut Run, meter: &Meter, size: u32, seconds: u32) {
    let made = brought(run).and_then(|before| {
        let words = format!("4:12 {seconds} -u -b 0 -l {size}");
        let (arrived, cpu) = transfer(run, meter, &words, seconds)?;
        let brought = brought(run)? - before;
        let datagrams = arrived.datagrams.context("nobody counts datagrams")?;
        let delivered = datagrams.sent - datagrams.lost;
        ensure!(delivered > 0.0, "{} datagrams, all lost", datagrams.sent);
        let mut figures = vec![
            (format!("udp_{size}_pps"), delivered / arrived.seconds),
            (format!("udp_{size}_brought_pps"), brought / arrived.seconds),
            (format!("udp_{size}_sent_pps"), datagrams.sent / arrived.seconds),
            (format!("cpu_udp_{size}_s_per_million"), cpu.backend() / (brought / MILLION)),
        ];
        figures.extend(busy(&format!("udp_{size}"), [(cpu, arrived.seconds)]));
        figures.extend(cpu.calls.map(|calls| (format!("calls_udp_{size}"), calls / brought)));
        Ok(figures)
    });
    keep(run, &format!("UDP of {size} bytes from guest 1 to guest 2"), made);
}

/// Packets that guest 2's NIC has had: all that a backend can do. What a guest gets it may still lose, for want of time to read it.
fn brought(run: &Run) -> Result<f64> {
    run.good(2, "cnt", 20)?.number("rx_packets")
}

/// iperf3 in guest 1.
fn transfer(run: &Run, meter: &Meter, words: &str, seconds: u32) -> Result<(Arrived, Cpu)> {
    meter.around(run, || {
        let answer = run.good(1, &format!("iperf {words}"), u64::from(seconds) + MORE)?;
        Arrived::parse(answer.lines.iter().map(String::as_str))
    })
}

/// What dom0 was given, and what it uses of that while nothing moves.
fn memory(run: &mut Run, dom0: &Domain<'_>, side: Side) {
    let made = used(run, dom0, side).and_then(|used| {
        let image = image_bytes(dom0)? as f64 / f64::from(1 << 20);
        Ok(vec![
            ("memory_mib".to_owned(), f64::from(dom0.memory)),
            ("memory_used_mib".to_owned(), used),
            ("image_mib".to_owned(), image),
        ])
    });
    keep(run, "dom0's memory and image", made);
}

/// All but what is free, in MiB.
fn used(run: &Run, dom0: &Domain<'_>, side: Side) -> Result<f64> {
    let free = match side {
        Side::Ours => {
            let metrics = run.metrics(1, "memory")?;
            let of = |name| metrics.need(name, &[]);
            (of("heap_total_bytes")? - of("heap_used_bytes")?) / f64::from(1 << 20)
        }
        Side::Linux => {
            let answer = run.good(0, "grep MemAvailable: /proc/meminfo", 20)?;
            let text = answer.text();
            let size = text.split_whitespace().nth(1).with_context(|| text.clone())?;
            size.parse::<f64>().with_context(|| text.clone())? / 1024.0
        }
    };
    Ok(f64::from(dom0.memory) - free)
}

/// From dom0's start to the first packet that it carries from one guest to another, by the clocks of guests that wait for it: they
/// start when it does.
pub fn start(run: &mut Run) {
    let made = first_packet(run).map(|seconds| vec![("start_s".to_owned(), seconds)]);
    keep(run, "dom0's start to the first packet forwarded", made);
}

/// How long the first packet may take.
const FIRST: u64 = 120;

fn first_packet(run: &Run) -> Result<f64> {
    // Whichever is the first to say so.
    let first = |what, pick: fn(&str) -> Option<f64>| -> Result<f64> {
        let by = |guest| run.expect(Source::Dom(guest), FIRST, what, |line| pick(&line.text));
        Ok(by(1)?.min(by(2)?))
    };
    let begun = first("a guest", clock)?;
    Ok(first("an answered ping", answered)? - begun)
}

/// What the clock of a guest of this project said when it wrote a line: `[ INFO] 1.516 guest: …`.
fn clock(line: &str) -> Option<f64> {
    line.split_once("] ")?.1.split(' ').next()?.parse().ok()
}

/// When it got its first answer: `[ INFO] 3.197 ping 10.9.0.12: answered, 2 sent`.
fn answered(line: &str) -> Option<f64> {
    let (text, _) = line.split_once(": answered, ")?;
    text.contains(" ping ").then(|| clock(text)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_say_when() {
        assert_eq!(clock("[ INFO] 1.516 guest: events by Fifo"), Some(1.516));
        assert_eq!(clock("[ WARN] guest: events"), None);
        assert_eq!(clock("1.5"), None);
        assert_eq!(answered("[ INFO] 3.197 ping 10.9.0.12: answered, 2 sent"), Some(3.197));
        assert_eq!(answered("[ INFO] 3.197 guest: address 10.9.0.12"), None);
    }

    #[test]
    fn costs_are_of_both_ways_together() {
        let cpu = |used| Cpu { used, elapsed: 12.5, calls: None };
        let one = Arrived { seconds: 10.0, bytes: 1.5e9, datagrams: None };
        let other = Arrived { seconds: 10.0, bytes: 0.5e9, datagrams: None };
        let made = costs(&[(one, cpu([3.0, 8.0, 9.0])), (other, cpu([1.0, 8.0, 9.0]))]);
        let expected = [2.0, 20.0, 80.0, 90.0];
        assert_eq!(made.iter().map(|(_, value)| *value).collect::<Vec<_>>(), expected);
    }
}

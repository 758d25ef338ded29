//! Steps that make sense whatever dom0 is: pings, TCP, files.

use anyhow::{Context as _, Result, anyhow, ensure};

use super::transfer;
use crate::console::Source;
use crate::run::Run;

/// Checks that both guests' agents take steps.
pub fn guests_ready(run: &mut Run, seconds: u64) -> bool {
    (1..=2).all(|domain| guest_ready(run, domain, seconds))
}

/// Checks that a guest's agent takes steps.
pub fn guest_ready(run: &mut Run, domain: usize, seconds: u64) -> bool {
    let made = run
        .expect(Source::Dom(domain), seconds, "the guest's agent", |l| {
            l.text.contains("L 0 ready").then_some(())
        })
        .map(|()| "takes steps".to_owned());
    run.check(&format!("guest {domain} is up"), Source::Dom(domain), made)
}

/// Checks that a guest sees carrier.
pub fn carrier(run: &mut Run, domain: usize) {
    let made = run.good(domain, "up", 89).and_then(|a| {
        ensure!(a.value("carrier") == Some("1"), "no carrier: {}", a.text());
        Ok(a.text())
    });
    run.check(&format!("guest {domain} sees carrier"), Source::Dom(domain), made);
}

/// Pings from guest 1; `to` is as the guest's `at` has it.
pub fn pings(run: &mut Run, name: &str, to: &str, size: u32, count: u32) {
    let made = ping(run, 1, to, size, count);
    if let Ok((_, average)) = made {
        run.figure(format!("ping_{}_{size}_ms", to.replace(':', "_")), average);
    }
    run.check(name, Source::Dom(1), made.map(|(text, _)| text));
}

/// Pings of which none may be lost: what to say of them, and the average in milliseconds.
pub fn ping(run: &Run, from: usize, to: &str, size: u32, count: u32) -> Result<(String, f64)> {
    let answer = run.step(from, &format!("pings {to} {size} {count}"), 60)?;
    let text = answer.text();
    ensure!(text.contains(" 0% packet loss"), "{text}");
    ensure!(text.contains(&format!("{count} received")), "{text}");
    let times = answer.lines.iter().find_map(|l| l.split(" = ").nth(1)).context("no times")?;
    let average: f64 = times.split('/').nth(1).context("no average")?.parse()?;
    Ok((format!("{count} of {count}, {average:.1} ms on average"), average))
}

/// The rate in a line of iperf3's, in Mbit/s.
fn rate_of(line: &str) -> Result<f64> {
    let words: Vec<_> = line.split_whitespace().collect();
    let unit = words.iter().position(|w| *w == "Kbits/sec").context("no rate in Kbits/sec")?;
    let rate: f64 = words.get(unit.saturating_sub(1)).context("no rate")?.parse()?;
    Ok(rate / 1000.0)
}

/// Checks that something arrived, and keeps the figure.
fn report(run: &mut Run, what: &str, way: &str, seconds: u32, rate: Result<f64>) {
    if let Ok(rate) = rate {
        let name = format!("tcp_{what}_{way}_mbit").replace(',', "").replace(' ', "_");
        run.figure(name, rate);
    }
    let made = rate.and_then(|rate| {
        ensure!(rate >= 1.0, "only {rate} Mbit/s arrive");
        Ok(format!("{rate:.0} Mbit/s over {seconds} s"))
    });
    run.check(&format!("TCP {way}, {what}"), Source::Dom(1), made);
}

/// iperf3 between the guests, ten seconds, both ways one after the other.
fn tcp(run: &mut Run, what: &str) {
    for (flag, way) in [("", "1 to 2"), (" -R", "2 to 1")] {
        let made = run.good(1, &format!("iperf 4:12 10{flag}"), 40).and_then(|answer| {
            let line = answer.lines.iter().find(|l| l.contains("receiver"));
            rate_of(line.with_context(|| format!("no rate: {}", answer.text()))?)
        });
        report(run, what, way, 10, made);
    }
}

/// iperf3 between the guests, both ways at once. `to` is guest 2 as `at` has it.
pub fn tcp_both(run: &mut Run, what: &str, to: &str, seconds: u32) {
    let made = run.good(1, &format!("iperf {to} {seconds} --bidir"), u64::from(seconds) + 30);
    for (role, way) in [("[TX-C]", "1 to 2"), ("[RX-C]", "2 to 1")] {
        let rate = made.as_ref().map_err(|error| anyhow!("{error:#}")).and_then(|answer| {
            let line = answer.lines.iter().find(|l| l.contains(role) && l.contains("receiver"));
            rate_of(line.with_context(|| format!("no rate: {}", answer.text()))?)
        });
        report(run, &format!("{what}, both at once"), way, seconds, rate);
    }
}

/// The 64 MiB file each way, with its SHA-256.
pub fn files(run: &mut Run, what: &str) {
    for (domain, from) in [(2, "4:11"), (1, "4:12")] {
        let made = run.good(domain, &format!("file {from}"), 80).and_then(|a| {
            let seconds = a.number("seconds")?.max(0.01);
            let sum = a.value("got").unwrap_or_default().get(..12).unwrap_or_default();
            Ok(format!("SHA-256 {sum}... on both sides, {:.0} Mbit/s", 64.0 * 8.389 / seconds))
        });
        let way = if domain == 2 { "1 to 2" } else { "2 to 1" };
        run.check(&format!("64 MiB file {way}, {what}"), Source::Dom(domain), made);
    }
}

/// Waits until the guests have made the files they serve.
pub fn files_ready(run: &mut Run) {
    for domain in 1..=2 {
        let made = transfer::has_file(run, domain);
        if made.is_err() {
            run.check(&format!("guest {domain} has its file"), Source::Dom(domain), made);
        }
    }
}

/// TCP and files with everything as it is, each way alone; then, both ways at once, with ethtool's gso, sg and tx off one
/// by one on both guests, and with two queues.
pub fn tcp_all(run: &mut Run) {
    tcp(run, "as negotiated");
    files(run, "as negotiated");
    for feature in ["gso", "sg", "tx"] {
        let what = format!("{feature} off");
        if switch(run, &what, &format!("feat {feature} off")) {
            tcp_both(run, &what, "4:12", 10);
            files(run, &what);
        }
        switch(run, &format!("{feature} back on"), "feat tx on sg on gso on tso on");
    }
    let mut both = true;
    for domain in 1..=2 {
        both &= queues(run, domain, 2);
    }
    if both {
        tcp_both(run, "two queues", "4:12", 10);
        files(run, "two queues");
    }
    for domain in 1..=2 {
        queues(run, domain, 1);
    }
}

/// Takes a step in both guests; only a failure is a check of its own.
fn switch(run: &mut Run, what: &str, step: &str) -> bool {
    (1..=2).all(|domain| match run.good(domain, step, 20) {
        Ok(_) => true,
        Err(error) => run.check(what, Source::Dom(domain), Err(error)),
    })
}

/// Reloads a guest's driver with so many queues.
fn queues(run: &mut Run, domain: usize, count: u32) -> bool {
    let made = run.good(domain, &format!("renet {count}"), 60).and_then(|a| {
        ensure!(a.number("queues")? as u32 == count, "{}", a.text());
        Ok(a.text())
    });
    run.check(&format!("guest {domain} comes back with queues={count}"), Source::Dom(domain), made)
}

/// All pings: guest 1 to guest 2, both families, small and large; to dom0, small.
pub fn all_pings(run: &mut Run) {
    for family in ["4", "6"] {
        for (size, count) in [(56, 200), (8000, 50)] {
            let name = format!("ping guest 2, IPv{family}, {size} bytes");
            pings(run, &name, &format!("{family}:12"), size, count);
        }
        pings(run, &format!("ping dom0, IPv{family}, 56 bytes"), &format!("{family}:1"), 56, 200);
    }
}

//! Streams of which both ends know the SHA-256, between any two domains of which one has Linux; and what a guest of this
//! project does as another's client.

use anyhow::{Context as _, Result, ensure};

use super::traffic;
use crate::console::Source;
use crate::run::{Answer, Run};

/// What the files that domains send each other are long.
pub const FILE: u64 = 64 << 20;

/// Where a domain is, as the steps have it.
pub fn at(domain: usize) -> String {
    match domain {
        0 => "4:1".to_owned(),
        n => format!("4:1{n}"),
    }
}

/// Its address.
fn address(domain: usize) -> String {
    at(domain).replace("4:", "10.9.0.")
}

/// A Linux domain has made the file that it sends.
pub fn has_file(run: &Run, domain: usize) -> Result<String> {
    let answer = run.good(domain, "filesum", 90)?;
    ensure!(answer.number("size")? as u64 == FILE, "odd size: {}", answer.text());
    Ok("takes steps, has 64 MiB of random bytes".to_owned())
}

/// Pings from a Linux domain.
pub fn pings(run: &mut Run, from: usize, to: usize, what: &str, count: u32) {
    let made = traffic::ping(run, from, &at(to), 56, count).map(|(text, _)| text);
    run.check(&format!("{count} pings to {what}"), Source::Dom(to), made);
}

/// What a transfer of the file took.
pub struct Rate {
    seconds: f64,
    text: String,
}

impl Rate {
    /// From the words of a step that compared the digests.
    pub fn of(answer: &Answer) -> Result<Self> {
        let sum = answer.value("sum").or(answer.value("got")).context("no SHA-256")?;
        Self::new(answer.number("seconds")?.max(0.01), sum)
    }

    fn new(seconds: f64, sum: &str) -> Result<Self> {
        let start = sum.get(..12).context("an odd SHA-256")?;
        let mut rate = Self { seconds, text: String::new() };
        rate.text = format!("SHA-256 {start}... on both sides, {:.0} Mbit/s", rate.mbit());
        Ok(rate)
    }

    /// How fast it was.
    pub fn mbit(&self) -> f64 {
        FILE as f64 * 8.0 / 1e6 / self.seconds
    }
}

/// 64 MiB from a Linux domain to another's port 5001.
pub fn sink(run: &Run, from: usize, to: usize) -> Result<Rate> {
    Rate::of(&run.good(from, &format!("sink {}", at(to)), 170)?)
}

/// 64 MiB to a Linux domain from another's port 5002.
pub fn source(run: &Run, to: usize, from: usize) -> Result<Rate> {
    Rate::of(&run.good(to, &format!("source {} {FILE} {to}", at(from)), 170)?)
}

/// Both ways between a Linux domain and any other, as two checks and two figures.
pub fn exchange(run: &mut Run, linux: usize, other: usize, what: &str, figure: &str) {
    for (way, made) in [("to", sink(run, linux, other)), ("from", source(run, linux, other))] {
        report(run, made, other, &format!("64 MiB {way} {what}"), &format!("{figure}_{way}_mbit"));
    }
}

/// A check and a figure of it.
pub fn report(run: &mut Run, made: Result<Rate>, domain: usize, name: &str, figure: &str) {
    if let Ok(rate) = &made {
        run.figure(figure, rate.mbit());
    }
    run.check(name, Source::Dom(domain), made.map(|rate| rate.text));
}

/// Has a guest of this project do a job as the client of a peer; a Linux domain asks it to. The end of the line that says how
/// it went.
fn job(
    run: &Run,
    linux: usize,
    client: usize,
    kind: &str,
    peer: usize,
    count: u64,
) -> Result<Answer> {
    let job = format!("{kind}:{}:{count}", address(peer));
    let answer = run.good(linux, &format!("job {} {job} 80", at(client)), 89)?;
    ensure!(!answer.text().contains("failed"), "{}", answer.text());
    Ok(answer)
}

/// 64 MiB both ways between two guests of this project, as two checks and two figures.
pub fn exchange_ours(run: &mut Run, linux: usize, client: usize, peer: usize, figure: &str) {
    for (kind, way) in [("sink", "to"), ("source", "from")] {
        let made =
            job(run, linux, client, kind, peer, FILE).and_then(|answer| client_rate(&answer));
        let name = format!("64 MiB {way} our guest {peer}, by our guest {client}");
        report(run, made, client, &name, &format!("{figure}_{way}_mbit"));
    }
}

/// What the client says of a stream: all of it went, and both ends have the same SHA-256.
fn client_rate(answer: &Answer) -> Result<Rate> {
    let text = answer.text();
    ensure!(answer.value("bytes") == Some(&FILE.to_string()), "not all of it: {text}");
    let sum = answer.value("sha256").with_context(|| format!("no SHA-256: {text}"))?;
    ensure!(answer.value("peer_sha256") == Some(sum), "they differ: {text}");
    Rate::new(FILE as f64 * 8.0 / 1e6 / answer.number("mbit")?.max(0.01), sum)
}

/// Pings by a guest of this project.
pub fn pings_ours(run: &mut Run, linux: usize, client: usize, peer: usize, what: &str, count: u64) {
    let made = job(run, linux, client, "ping", peer, count).and_then(|answer| {
        let text = answer.text();
        ensure!(answer.value("sent") == Some(&count.to_string()), "{text}");
        ensure!(answer.number("lost")? == 0.0, "{text}");
        Ok(format!("none lost, {:.1} ms on average", answer.number("rtt_us")? / 1000.0))
    });
    let name = format!("{count} pings to {what}, by our guest {client}");
    run.check(&name, Source::Dom(client), made);
}

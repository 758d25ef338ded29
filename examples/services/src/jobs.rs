//! What a host does as the client of another: streams to its servers, and pings.

mod ping;
mod stream;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::net::IpAddr;
use core::str::FromStr;

use hypercall::Instant;
use smoltcp::iface::{Interface, SocketSet};
use smoltcp::time;
use smoltcp::wire::IpAddress;

use ping::Ping;
use stream::Stream;

/// Jobs at work at once; more wait.
const AT_ONCE: usize = 8;
/// Jobs that wait at most.
const WAITING: usize = 64;
/// The first port that connections come from, of 16,384 that are taken in turn.
const PORTS: u16 = 49152;

/// What kind of job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Send to the other's sink.
    Sink,
    /// Send what nobody looks at: what moves then is bounded by the network alone.
    Discard,
    /// Ask the other's source.
    Source,
    /// Send to the other's echo, and take what comes back.
    Echo,
    /// Send echo requests of ICMP.
    Ping,
}

impl Kind {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Sink, "sink"),
        (Self::Discard, "discard"),
        (Self::Source, "source"),
        (Self::Echo, "echo"),
        (Self::Ping, "ping"),
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(kind, _)| kind == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

/// A job, written `KIND:ADDRESS:COUNT`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Job {
    /// Of which kind.
    pub kind: Kind,
    /// With whom.
    pub address: IpAddress,
    /// Bytes of a stream, or how many pings.
    pub count: u64,
}

/// What is no job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoJob;

impl fmt::Display for NoJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "a job is sink:ADDRESS:BYTES, source:…, echo:…, discard:… or ping:ADDRESS:COUNT",
        )
    }
}

impl FromStr for Job {
    type Err = NoJob;

    fn from_str(text: &str) -> Result<Self, NoJob> {
        let (kind, rest) = text.split_once(':').ok_or(NoJob)?;
        // IPv6 addresses have colons of their own.
        let (address, count) = rest.rsplit_once(':').ok_or(NoJob)?;
        let (kind, _) = Kind::ALL.into_iter().find(|(_, name)| *name == kind).ok_or(NoJob)?;
        let address: IpAddr = address.parse().map_err(|_| NoJob)?;
        let count = count.parse().map_err(|_| NoJob)?;
        Ok(Self { kind, address: address.into(), count })
    }
}

enum Work {
    Stream(Box<Stream>),
    Ping(Ping),
}

/// Jobs, at work and waiting.
pub struct Jobs {
    waiting: VecDeque<Job>,
    working: Vec<(Job, Work)>,
    /// Counts connections.
    next: u16,
}

/// smoltcp's clock, in microseconds.
#[must_use]
pub fn at(now: Instant) -> time::Instant {
    time::Instant::from_micros(i64::try_from(now.0 / 1000).unwrap_or(i64::MAX))
}

impl Jobs {
    /// None; connections come from ports that follow from `seed`, so that those of another life are not met again.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { waiting: VecDeque::new(), working: Vec::new(), next: seed as u16 }
    }

    /// Takes a job on, unless too many wait.
    pub fn add(&mut self, job: Job) -> bool {
        let room = self.waiting.len() < WAITING;
        if room {
            self.waiting.push_back(job);
        }
        room
    }

    /// Works, and tells `done` in a line of each job that has ended. Says whether the sockets have something new to send.
    pub fn poll(
        &mut self,
        interface: &mut Interface,
        sockets: &mut SocketSet<'static>,
        now: Instant,
        mut done: impl FnMut(String),
    ) -> bool {
        let mut some = false;
        while self.working.len() < AT_ONCE
            && let Some(job) = self.waiting.pop_front()
        {
            self.next = self.next.wrapping_add(1);
            let begun = match job.kind {
                Kind::Ping => Ping::new(sockets, job, self.next, now).map(Work::Ping),
                _ => {
                    let port = PORTS + self.next % (u16::MAX - PORTS);
                    Stream::new(interface, sockets, job, port, now)
                        .map(|stream| Work::Stream(Box::new(stream)))
                }
            };
            match begun {
                Ok(work) => self.working.push((job, work)),
                Err(error) => done(line(&job, &error)),
            }
            some = true;
        }
        self.working.retain_mut(|(job, work)| {
            let (moved, ended) = match work {
                Work::Stream(stream) => stream.poll(sockets.get_mut(stream.socket()), now),
                Work::Ping(ping) => {
                    let source = interface.get_source_address(&job.address);
                    ping.poll(sockets.get_mut(ping.socket()), source, now)
                }
            };
            some |= moved;
            let Some(text) = ended else { return true };
            sockets.remove(match work {
                Work::Stream(stream) => stream.socket(),
                Work::Ping(ping) => ping.socket(),
            });
            done(line(job, &text));
            false
        });
        some
    }

    /// When to poll though no packet comes.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let deadlines = self.working.iter().map(|(_, work)| match work {
            Work::Stream(stream) => stream.deadline(),
            Work::Ping(ping) => ping.deadline(),
        });
        deadlines.min()
    }
}

fn line(job: &Job, text: &str) -> String {
    format!("client: {} {} {text}", job.kind, job.address)
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::*;
    use crate::generator::Generator;
    use crate::host::{ADDRESS, Host};
    use crate::streams::{Count, DISCARD, Digest, ECHO, Echo, SINK, SOURCE, Sink, Source};

    #[test]
    fn jobs_are_read() {
        let job = |kind, address, count| Ok(Job { kind, address, count });
        let four = IpAddress::v4(10, 9, 0, 1);
        let six = IpAddress::v6(0xfd09, 0, 0, 0, 0, 0, 0, 1);
        assert_eq!("sink:10.9.0.1:1000".parse(), job(Kind::Sink, four, 1000));
        assert_eq!("ping:fd09::1:5".parse(), job(Kind::Ping, six, 5));
        for bad in ["", "sink", "sink:10.9.0.1", "sing:10.9.0.1:1", "echo:x:1", "echo:10.9.0.1:-1"]
        {
            assert_eq!(bad.parse::<Job>(), Err(NoJob), "{bad}");
        }
    }

    /// The lines of jobs with all servers, if they are there.
    fn run(jobs: &[&str], servers: bool) -> Vec<String> {
        let mut host = Host::new();
        let mut sink = Sink::<Digest>::new(&mut host.sockets, SINK, 2);
        let mut discard = Sink::<Count>::new(&mut host.sockets, DISCARD, 2);
        let mut source = Source::new(&mut host.sockets, SOURCE, 2);
        let mut echo = Echo::new(&mut host.sockets, ECHO, 2);
        let mut work = Jobs::new(0);
        jobs.iter().for_each(|job| assert!(work.add(job.parse().unwrap())));
        let mut lines = vec![];
        for turn in 0..400_000_u64 {
            if lines.len() == jobs.len() {
                break;
            }
            let now = Instant(turn * 1_000_000);
            let Host { device, interface, sockets, .. } = &mut host;
            if servers {
                sink.serve(sockets, now, |_, _| ());
                discard.serve(sockets, now, |_, _| ());
                source.serve(sockets, now, |_, _, _| ());
                echo.serve(sockets, now, |_| ());
            }
            work.poll(interface, sockets, now, |line| lines.push(line));
            interface.poll(at(now), device, sockets);
        }
        assert!(work.deadline().is_none());
        lines.sort();
        lines
    }

    fn sum(seed: u64, len: usize) -> String {
        let mut bytes = vec![0; len];
        Generator::new(seed).fill(&mut bytes);
        let mut digest = Digest::default();
        digest.add(&bytes);
        format!("{}", digest.sum())
    }

    #[test]
    fn streams_are_compared_at_both_ends() {
        let jobs = ["sink", "source", "echo"].map(|kind| format!("{kind}:{ADDRESS}:300000"));
        let lines = run(&jobs.each_ref().map(String::as_str), true);
        assert_eq!(lines.len(), 3);
        for (line, (kind, seed)) in lines.iter().zip([("echo", 1), ("sink", 1), ("source", 1)]) {
            let sum = sum(seed, 300_000);
            let start = format!(
                "client: {kind} {ADDRESS} bytes=300000 sha256={sum} peer_sha256={sum} mbit="
            );
            assert!(line.starts_with(&start), "{line}");
        }
    }

    #[test]
    fn what_is_discarded_is_counted() {
        let lines = run(&[&format!("discard:{ADDRESS}:300000")], true);
        let [line] = lines.as_slice() else { panic!("{lines:?}") };
        assert!(
            line.starts_with(&format!("client: discard {ADDRESS} bytes=300000 mbit=")),
            "{line}"
        );
        let lines = run(&[&format!("discard:{ADDRESS}:0")], true);
        assert_eq!(lines, [format!("client: discard {ADDRESS} bytes=0 mbit=0.0")]);
    }

    #[test]
    fn who_does_not_serve_is_said_not_to() {
        let lines = run(&[&format!("sink:{ADDRESS}:1000")], false);
        assert_eq!(lines, [format!("client: sink {ADDRESS} failed: refused or reset")]);
        let lines = run(&["source:127.9.9.9:1000"], true);
        assert_eq!(lines, ["client: source 127.9.9.9 failed: nothing moved for 120 s"]);
    }

    #[test]
    fn more_than_are_worked_at_wait() {
        let jobs: Vec<_> = (0..20).map(|_| format!("echo:{ADDRESS}:1000")).collect();
        let jobs: Vec<_> = jobs.iter().map(String::as_str).collect();
        let lines = run(&jobs, true);
        let good = |line: &String| line.contains("bytes=1000 ");
        // There are places for two at the server; the others are refused, and said to be.
        assert_eq!(lines.len(), 20);
        assert!(lines.iter().any(good), "{lines:?}");
        let mut jobs = Jobs::new(0);
        let job = "echo:10.0.0.1:1".parse().unwrap();
        assert!((0..WAITING).all(|_| jobs.add(job)) && !jobs.add(job));
    }

    #[test]
    fn pings_are_counted() {
        let lines = run(&[&format!("ping:{ADDRESS}:5")], true);
        let [line] = lines.as_slice() else { panic!("{lines:?}") };
        assert!(line.starts_with(&format!("client: ping {ADDRESS} sent=5 lost=0 rtt_us=")));
        let lines = run(&["ping:127.9.9.9:3"], true);
        assert_eq!(lines, ["client: ping 127.9.9.9 sent=3 lost=3 rtt_us=0.0"]);
    }
}

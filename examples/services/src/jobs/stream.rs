//! A stream to or from another's server, or both.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hypercall::Instant;
use smoltcp::iface::{Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;

use super::{Job, Kind};
use crate::generator::Generator;
use crate::streams::{self, BUFFER, Digest, LINE, Rate, WIDE};

/// Nanoseconds without any progress after which a job is given up: longer than a domain is away while it is saved and restored.
const PATIENCE: u64 = 120_000_000_000;
/// The seed of all streams.
const SEED: u64 = 1;

pub(super) struct Stream {
    kind: Kind,
    socket: SocketHandle,
    generator: Generator,
    /// Bytes that are to be made yet.
    unsent: u64,
    sent: Digest,
    got: Digest,
    /// What was asked, as far as it is not sent; what was answered.
    line: Vec<u8>,
    /// When the connection was there.
    since: Option<Instant>,
    moved: Instant,
}

impl Stream {
    pub(super) fn new(
        interface: &mut Interface,
        sockets: &mut SocketSet<'static>,
        job: Job,
        local: u16,
        now: Instant,
    ) -> Result<Self, String> {
        let (port, receive, send) = match job.kind {
            Kind::Sink => (streams::SINK, LINE, BUFFER),
            Kind::Discard => (streams::DISCARD, LINE, WIDE),
            Kind::Source => (streams::SOURCE, BUFFER, LINE),
            Kind::Echo | Kind::Ping => (streams::ECHO, BUFFER, BUFFER),
        };
        let mut socket = streams::socket(receive, send);
        if let Err(error) = socket.connect(interface.context(), (job.address, port), local) {
            return Err(format!("failed: {error}"));
        }
        let (unsent, line) = match job.kind {
            Kind::Source => (0, format!("{} {SEED}\n", job.count).into_bytes()),
            _ => (job.count, Vec::new()),
        };
        Ok(Self {
            kind: job.kind,
            socket: sockets.add(socket),
            generator: Generator::new(SEED),
            unsent,
            sent: Digest::default(),
            got: Digest::default(),
            line,
            since: None,
            moved: now,
        })
    }

    pub(super) fn socket(&self) -> SocketHandle {
        self.socket
    }

    pub(super) fn deadline(&self) -> Instant {
        self.moved.after(PATIENCE)
    }

    /// Whether the socket has something new to send, and what there is to say in the end.
    pub(super) fn poll(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        now: Instant,
    ) -> (bool, Option<String>) {
        if self.since.is_none() && socket.may_send() {
            (self.since, self.moved) = (Some(now), now);
        }
        let mut some = self.send(socket);
        some |= self.receive(socket);
        if some {
            self.moved = now;
        }
        let ended = match socket.state() {
            // The other end has said all, and so have we.
            _ if self.since.is_some() && !socket.may_recv() && !socket.can_recv() => {
                if socket.state() == tcp::State::Closed {
                    Some("failed: refused or reset".to_string())
                } else {
                    Some(self.result(now))
                }
            }
            tcp::State::Closed => Some("failed: refused or reset".to_string()),
            _ if self.deadline() <= now => Some("failed: nothing moved for 120 s".to_string()),
            _ => None,
        };
        (some, ended)
    }

    fn send(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        let mut some = false;
        if self.kind == Kind::Source {
            let sent = socket.send_slice(&self.line).unwrap_or(0);
            self.line.drain(..sent);
            return sent > 0;
        }
        while self.unsent > 0 && socket.can_send() {
            let Self { kind, generator, unsent, sent, .. } = self;
            let gone = socket.send(|room| {
                let len = usize::try_from(*unsent).unwrap_or(usize::MAX).min(room.len());
                let (bytes, _) = room.split_at_mut(len);
                // What nobody looks at may be what is left there.
                if *kind != Kind::Discard {
                    generator.fill(bytes);
                    sent.add(bytes);
                }
                *unsent -= len as u64;
                (len, ())
            });
            if gone.is_err() {
                break;
            }
            some = true;
        }
        if self.unsent == 0 && socket.may_send() {
            socket.close();
            some = true;
        }
        some
    }

    fn receive(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        let mut some = false;
        while socket.can_recv() {
            let Self { kind, got, line, .. } = self;
            let taken = socket.recv(|bytes| {
                if matches!(kind, Kind::Sink | Kind::Discard) {
                    let room = LINE.saturating_sub(line.len());
                    line.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
                } else {
                    got.add(bytes);
                }
                (bytes.len(), ())
            });
            if taken.is_err() {
                break;
            }
            some = true;
        }
        some
    }

    /// A word of what the other end has answered.
    fn said(&self, name: &str) -> &str {
        let answer = core::str::from_utf8(&self.line).unwrap_or_default();
        let mut words = answer.split_ascii_whitespace();
        words.find_map(|word| word.strip_prefix(name)).unwrap_or("none")
    }

    fn result(&mut self, now: Instant) -> String {
        let nanos = self.since.map_or(0, |since| now.since(since));
        let (bytes, own, peer) = match self.kind {
            Kind::Discard => {
                let said = self.said("bytes=");
                let rate = Rate { bytes: said.parse().unwrap_or(0), nanos };
                return format!("bytes={said} mbit={rate}");
            }
            Kind::Sink => (self.sent.bytes(), self.sent.sum(), self.said("sha256=").to_string()),
            Kind::Source => {
                // What the seed gives, as much of it as came.
                let mut ought = Digest::default();
                let mut buffer = [0; 4096];
                while ought.bytes() < self.got.bytes() {
                    let left = self.got.bytes() - ought.bytes();
                    let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                    let (bytes, _) = buffer.split_at_mut(len);
                    self.generator.fill(bytes);
                    ought.add(bytes);
                }
                (self.got.bytes(), self.got.sum(), ought.sum().to_string())
            }
            Kind::Echo | Kind::Ping => {
                (self.got.bytes(), self.sent.sum(), self.got.sum().to_string())
            }
        };
        let rate = Rate { bytes, nanos };
        format!("bytes={bytes} sha256={own} peer_sha256={peer} mbit={rate}")
    }
}

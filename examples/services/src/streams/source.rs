//! The server that makes streams.

use alloc::vec::Vec;

use hypercall::Instant;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;

use super::{BUFFER, Digest, LINE, Rate, listen, socket};
use crate::generator::Generator;

/// Reads one line `N SEED` from each connection to a port, sends the first N bytes of the seed, and closes.
pub struct Source {
    port: u16,
    streams: Vec<Stream>,
}

struct Stream {
    socket: SocketHandle,
    line: Vec<u8>,
    sending: Option<Sending>,
}

struct Sending {
    generator: Generator,
    left: u64,
    digest: Digest,
    since: Instant,
    /// All is acknowledged, or never will be.
    over: bool,
}

/// Reads `N SEED`.
fn parse(line: &[u8]) -> Option<(u64, u64)> {
    let (bytes, seed) = core::str::from_utf8(line).ok()?.trim_end().split_once(' ')?;
    Some((bytes.parse().ok()?, seed.parse().ok()?))
}

impl Source {
    /// A server of so many streams at once.
    #[must_use]
    pub fn new(sockets: &mut SocketSet<'static>, port: u16, streams: usize) -> Self {
        let stream = |_| Stream {
            socket: sockets.add(socket(LINE, BUFFER)),
            line: Vec::new(),
            sending: None,
        };
        Self { port, streams: (0..streams).map(stream).collect() }
    }

    /// Makes as much as there is room for, and tells `done` of streams that have ended, and whether they arrived. Says
    /// whether the sockets have something new to send.
    pub fn serve(
        &mut self,
        sockets: &mut SocketSet<'static>,
        now: Instant,
        mut done: impl FnMut(&Digest, Rate, bool),
    ) -> bool {
        let mut some = false;
        for stream in &mut self.streams {
            let socket = sockets.get_mut(stream.socket);
            some |= stream.serve(socket, self.port, now, &mut done);
        }
        some
    }
}

impl Stream {
    fn serve(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        port: u16,
        now: Instant,
        mut done: impl FnMut(&Digest, Rate, bool),
    ) -> bool {
        if let Some(sending) = self.sending.as_mut().filter(|sending| !sending.over) {
            // What is acknowledged leaves the queue; a reset empties it, too.
            let arrived = sending.left == 0 && socket.send_queue() == 0;
            if arrived || !socket.is_open() {
                sending.over = true;
                let Sending { digest, since, .. } = sending;
                let rate = Rate { bytes: digest.bytes(), nanos: now.since(*since) };
                done(digest, rate, arrived && socket.state() != tcp::State::Closed);
            }
        }
        if listen(socket, port) {
            (self.line, self.sending) = (Vec::new(), None);
            return false;
        }
        let Some(sending) = &mut self.sending else { return self.read(socket, now) };
        let mut some = false;
        while sending.left > 0 && socket.can_send() {
            let Sending { generator, left, digest, .. } = sending;
            let sent = socket.send(|room| {
                let len = usize::try_from(*left).unwrap_or(usize::MAX).min(room.len());
                let (bytes, _) = room.split_at_mut(len);
                generator.fill(bytes);
                digest.add(bytes);
                *left -= len as u64;
                (len, ())
            });
            if sent.is_err() {
                break;
            }
            some = true;
        }
        if sending.left == 0 && socket.may_send() {
            socket.close();
            some = true;
        }
        some
    }

    fn read(&mut self, socket: &mut tcp::Socket<'_>, now: Instant) -> bool {
        let line = &mut self.line;
        let _ = socket.recv(|bytes| {
            let room = LINE.saturating_sub(line.len());
            line.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
            (bytes.len(), ())
        });
        let end = self.line.iter().position(|byte| *byte == b'\n');
        match end.and_then(|end| parse(self.line.get(..end)?)) {
            Some((left, seed)) => {
                let (generator, digest) = (Generator::new(seed), Digest::default());
                self.sending = Some(Sending { generator, left, digest, since: now, over: false });
                true
            }
            None if end.is_some() || self.line.len() >= LINE => {
                socket.abort();
                true
            }
            None if !socket.may_recv() && socket.may_send() => {
                // It has said all it will, and asked for nothing.
                socket.close();
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{format, vec};

    use super::*;
    use crate::host::Host;

    fn ask(line: &str) -> (Vec<u8>, Vec<(std::string::String, bool)>) {
        let mut host = Host::new();
        let mut source = Source::new(&mut host.sockets, 5002, 1);
        let client = host.connect(5002);
        let (mut unsent, mut got, mut said) = (line.as_bytes(), Vec::new(), vec![]);
        let mut turns = 0;
        host.run(|sockets| {
            turns += 1;
            source.serve(sockets, Instant(turns), |digest, _, whole| {
                said.push((format!("{digest}"), whole));
            });
            let socket = sockets.get_mut::<tcp::Socket<'_>>(client);
            unsent = &unsent[socket.send_slice(unsent).unwrap_or(0)..];
            let _ = socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes)));
            if turns > 5 && !socket.may_recv() {
                socket.close();
            }
            turns <= 5 || socket.is_open() || (turns < 2000 && said.is_empty())
        });
        (got, said)
    }

    #[test]
    fn the_bytes_of_a_seed_are_sent_and_their_sum_is_known() {
        for len in [0, 1, 8, 200_001] {
            let mut bytes = vec![0; len];
            Generator::new(7).fill(&mut bytes);
            let mut digest = Digest::default();
            digest.add(&bytes);
            let (got, said) = ask(&format!("{len} 7\n"));
            assert!(got == bytes, "{} of {len}", got.len());
            assert_eq!(said, [(format!("{digest}"), true)]);
        }
    }

    #[test]
    fn what_is_no_line_is_cut_off() {
        for line in ["x y\n", "1\n", "-1 7\n", &"1".repeat(300)] {
            let (got, said) = ask(line);
            assert!(got.is_empty() && said.is_empty(), "{line}");
        }
    }
}

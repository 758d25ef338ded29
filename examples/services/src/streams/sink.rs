//! The server that takes streams.

use alloc::format;
use alloc::vec::Vec;
use core::fmt;

use hypercall::Instant;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;

use super::{BUFFER, LINE, Rate, listen, socket};

/// What makes something of a stream. What it says in the end ([`Display`](fmt::Display)) is the answer.
pub trait Judge: Default + fmt::Display {
    /// Bytes that may have come before it sees them.
    const BUFFER: usize = BUFFER;

    /// Takes the next bytes.
    fn take(&mut self, bytes: &[u8]);

    /// How many there were.
    fn bytes(&self) -> u64;
}

/// Takes streams on a port until their ends, answers each with one line, and closes.
pub struct Sink<J> {
    port: u16,
    streams: Vec<Stream<J>>,
}

struct Stream<J> {
    socket: SocketHandle,
    judge: J,
    /// When the first bytes came.
    since: Option<Instant>,
    answered: bool,
}

impl<J: Judge> Sink<J> {
    /// A server of so many streams at once.
    #[must_use]
    pub fn new(sockets: &mut SocketSet<'static>, port: u16, streams: usize) -> Self {
        let stream = |_| Stream {
            socket: sockets.add(socket(J::BUFFER, LINE)),
            judge: J::default(),
            since: None,
            answered: false,
        };
        Self { port, streams: (0..streams).map(stream).collect() }
    }

    /// Takes what came, and tells `done` of streams that have ended. Says whether the sockets have something new to send,
    /// be it that there is room again.
    pub fn serve(
        &mut self,
        sockets: &mut SocketSet<'static>,
        now: Instant,
        mut done: impl FnMut(&J, Rate),
    ) -> bool {
        let mut some = false;
        for stream in &mut self.streams {
            let socket = sockets.get_mut(stream.socket);
            some |= stream.serve(socket, self.port, now, &mut done);
        }
        some
    }
}

impl<J: Judge> Stream<J> {
    fn serve(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        port: u16,
        now: Instant,
        mut done: impl FnMut(&J, Rate),
    ) -> bool {
        if listen(socket, port) {
            (self.judge, self.since, self.answered) = (J::default(), None, false);
            return false;
        }
        let mut some = false;
        while socket.can_recv() {
            self.since.get_or_insert(now);
            let judge = &mut self.judge;
            if socket.recv(|bytes| (bytes.len(), judge.take(bytes))).is_err() {
                break;
            }
            some = true;
        }
        if !socket.may_recv() && socket.may_send() && !self.answered {
            // The buffer is empty, and larger than this.
            let _ = socket.send_slice(format!("{}\n", self.judge).as_bytes());
            socket.close();
            self.answered = true;
            let nanos = self.since.map_or(0, |since| now.since(since));
            done(&self.judge, Rate { bytes: self.judge.bytes(), nanos });
            return true;
        }
        some
    }
}

#[cfg(test)]
mod tests {
    use std::string::String;
    use std::vec;

    use super::*;
    use crate::host::Host;
    use crate::streams::Digest;

    #[test]
    fn a_stream_is_answered_with_its_length_and_sum() {
        let mut host = Host::new();
        let mut sink = Sink::<Digest>::new(&mut host.sockets, 5001, 2);
        for len in [0, 1, 300_000] {
            let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
            let mut digest = Digest::default();
            digest.add(&bytes);
            let client = host.connect(5001);
            let (mut unsent, mut got, mut said) = (&bytes[..], Vec::new(), vec![]);
            let mut now = 0;
            host.run(|sockets| {
                now += 1_000_000;
                sink.serve(sockets, Instant(now), |digest, rate| {
                    said.push((format!("{digest}"), rate.bytes));
                });
                let socket = sockets.get_mut::<tcp::Socket<'_>>(client);
                if !unsent.is_empty() {
                    unsent = &unsent[socket.send_slice(unsent).unwrap_or(0)..];
                } else if socket.may_send() {
                    socket.close();
                }
                let _ = socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes)));
                socket.is_open()
            });
            assert_eq!(String::from_utf8(got).unwrap(), format!("{digest}\n"));
            assert_eq!(said, [(format!("{digest}"), len as u64)]);
        }
    }
}

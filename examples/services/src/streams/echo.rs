//! The server that sends streams back.

use alloc::vec;
use alloc::vec::Vec;

use hypercall::Instant;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;

use super::{BUFFER, Rate, listen, socket};

/// Bytes that are moved at a time.
const CHUNK: usize = 16 * 1024;

/// Sends back what comes, until it ends.
pub struct Echo {
    port: u16,
    streams: Vec<Stream>,
    chunk: Vec<u8>,
}

struct Stream {
    socket: SocketHandle,
    bytes: u64,
    since: Option<Instant>,
}

impl Echo {
    /// A server of so many streams at once.
    #[must_use]
    pub fn new(sockets: &mut SocketSet<'static>, port: u16, streams: usize) -> Self {
        let stream =
            |_| Stream { socket: sockets.add(socket(BUFFER, BUFFER)), bytes: 0, since: None };
        Self { port, streams: (0..streams).map(stream).collect(), chunk: vec![0; CHUNK] }
    }

    /// Moves what can be moved, and tells `done` of streams that have ended. Says whether the sockets have something new to
    /// send.
    pub fn serve(
        &mut self,
        sockets: &mut SocketSet<'static>,
        now: Instant,
        mut done: impl FnMut(Rate),
    ) -> bool {
        let mut some = false;
        for stream in &mut self.streams {
            let socket = sockets.get_mut(stream.socket);
            some |= stream.serve(socket, self.port, &mut self.chunk, now, &mut done);
        }
        some
    }
}

impl Stream {
    fn serve(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        port: u16,
        chunk: &mut [u8],
        now: Instant,
        mut done: impl FnMut(Rate),
    ) -> bool {
        if listen(socket, port) {
            (self.bytes, self.since) = (0, None);
            return false;
        }
        let mut some = false;
        while socket.can_recv() && socket.can_send() {
            self.since.get_or_insert(now);
            let room = socket.send_capacity() - socket.send_queue();
            let (chunk, _) = chunk.split_at_mut(room.min(chunk.len()));
            let Ok(len) = socket.recv_slice(chunk) else { break };
            // There is room for all of it.
            if socket.send_slice(chunk.get(..len).unwrap_or_default()).is_err() {
                break;
            }
            self.bytes += len as u64;
            some = true;
        }
        if !socket.may_recv() && socket.may_send() {
            socket.close();
            let nanos = self.since.map_or(0, |since| now.since(since));
            done(Rate { bytes: self.bytes, nanos });
            return true;
        }
        some
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;

    #[test]
    fn what_comes_goes_back() {
        let mut host = Host::new();
        let mut echo = Echo::new(&mut host.sockets, 5003, 1);
        let bytes: Vec<u8> = (0..500_000).map(|at| (at % 251) as u8).collect();
        let client = host.connect(5003);
        let (mut unsent, mut got, mut ended) = (&bytes[..], Vec::new(), 0);
        host.run(|sockets| {
            echo.serve(sockets, Instant(0), |rate| ended += rate.bytes);
            let socket = sockets.get_mut::<tcp::Socket<'_>>(client);
            if !unsent.is_empty() {
                unsent = &unsent[socket.send_slice(unsent).unwrap_or(0)..];
            } else if socket.may_send() {
                socket.close();
            }
            let _ = socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes)));
            socket.is_open()
        });
        assert!(got == bytes);
        assert_eq!(ended, 500_000);
    }
}

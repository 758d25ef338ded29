//! HTTP/1.0, as much of it as it takes to show counters: `GET`, and one request per connection.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Duration;

/// Bytes of a request that are looked at.
const REQUEST: usize = 1024;
/// Bytes of each socket's buffers.
const RECEIVE: usize = 2048;
const SEND: usize = 32 * 1024;
/// How often somebody who says nothing is asked whether he is still there, and when he is given up.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const TIMEOUT: Duration = Duration::from_secs(60);

/// What is answered to a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// Text, in whatever format: Prometheus is told that it is the one that it reads.
    Page(String),
    /// Bytes for as long as the other end takes them.
    Stream,
    /// The request makes no sense, and why.
    Bad(String),
}

/// What a connection is being sent.
#[derive(Default)]
enum Sending {
    /// The request is not whole yet.
    #[default]
    Nothing,
    /// Bytes, and how many are gone.
    Bytes(Vec<u8>, usize),
    /// A head, and how much of it is gone; then the stream.
    Stream(&'static [u8]),
}

struct Connection {
    socket: SocketHandle,
    request: Vec<u8>,
    sending: Sending,
}

/// A server on a port of every address.
pub struct Server {
    port: u16,
    connections: Vec<Connection>,
}

impl Server {
    /// A server of so many requests at once.
    #[must_use]
    pub fn new(sockets: &mut SocketSet<'static>, port: u16, connections: usize) -> Self {
        let connection = |_| {
            let receive = tcp::SocketBuffer::new(vec![0; RECEIVE]);
            let send = tcp::SocketBuffer::new(vec![0; SEND]);
            let mut socket = tcp::Socket::new(receive, send);
            // Whoever went away without a word must not keep the place.
            socket.set_keep_alive(Some(KEEP_ALIVE));
            socket.set_timeout(Some(TIMEOUT));
            let socket = sockets.add(socket);
            Connection { socket, request: Vec::new(), sending: Sending::Nothing }
        };
        Self { port, connections: (0..connections).map(connection).collect() }
    }

    /// Takes requests and sends answers: `answer` is given the path of each `GET`, with what follows a question mark, and
    /// answers `None` where there is no such page. Says whether the sockets have something new to send.
    pub fn serve(
        &mut self,
        sockets: &mut SocketSet<'static>,
        mut answer: impl FnMut(&str) -> Option<Reply>,
    ) -> bool {
        let mut some = false;
        for connection in &mut self.connections {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(connection.socket);
            some |= connection.serve(socket, self.port, &mut answer);
        }
        some
    }
}

impl Connection {
    fn serve(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        port: u16,
        answer: impl FnMut(&str) -> Option<Reply>,
    ) -> bool {
        if !socket.is_open() {
            self.request.clear();
            self.sending = Sending::Nothing;
            if let Err(error) = socket.listen(port) {
                log::error!("http: cannot serve port {port}: {error:?}");
            }
            return false;
        }
        if matches!(self.sending, Sending::Nothing) && socket.can_recv() {
            self.read(socket, answer);
        }
        if !socket.may_recv() && matches!(self.sending, Sending::Nothing) && socket.may_send() {
            // It has said all it will, and it was no request.
            socket.close();
            return true;
        }
        self.write(socket)
    }

    fn read(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        mut answer: impl FnMut(&str) -> Option<Reply>,
    ) {
        let room = REQUEST.saturating_sub(self.request.len());
        let request = &mut self.request;
        let got = socket.recv(|bytes| {
            request.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
            (bytes.len(), ())
        });
        let whole = self.request.windows(4).any(|end| end == b"\r\n\r\n");
        if got.is_err() || !(whole || self.request.len() >= REQUEST) {
            return;
        }
        let mut words = self.request.split(|byte| *byte == b' ');
        self.sending = match (words.next(), words.next()) {
            (Some(b"GET"), Some(path)) => {
                match core::str::from_utf8(path).ok().and_then(&mut answer) {
                    Some(Reply::Page(text)) => page("200 OK", &text),
                    Some(Reply::Stream) => Sending::Stream(STREAM_HEAD),
                    Some(Reply::Bad(text)) => page("400 Bad Request", &text),
                    None => page("404 Not Found", "no such page\n"),
                }
            }
            _ => page("405 Method Not Allowed", "only GET\n"),
        };
    }

    fn write(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        match &mut self.sending {
            Sending::Nothing => false,
            Sending::Bytes(bytes, gone) => {
                let rest = bytes.get(*gone..).unwrap_or_default();
                let sent = socket.send_slice(rest).unwrap_or(rest.len());
                *gone += sent;
                if sent == rest.len() && socket.may_send() {
                    socket.close();
                    return true;
                }
                sent > 0
            }
            Sending::Stream(head) => {
                let mut some = false;
                while socket.can_send() {
                    let sent = socket.send(|room| {
                        let (start, rest) = room.split_at_mut(head.len().min(room.len()));
                        let (now, later) = head.split_at(start.len());
                        start.copy_from_slice(now);
                        rest.fill(STREAM_BYTE);
                        *head = later;
                        (room.len(), room.len())
                    });
                    if sent.is_ok_and(|sent| sent > 0) {
                        some = true;
                    } else {
                        break;
                    }
                }
                if !socket.may_send() {
                    socket.abort();
                }
                some
            }
        }
    }
}

const STREAM_HEAD: &[u8] =
    b"HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\nConnection: close\r\n\r\n";
/// What a stream repeats.
const STREAM_BYTE: u8 = 0x55;

fn page(status: &str, body: &str) -> Sending {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let len = body.len();
    let text = format!(
        "HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n{body}"
    );
    Sending::Bytes(text.into_bytes(), 0)
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;
    use crate::host::Host;

    fn get(host: &mut Host, server: &mut Server, request: &str) -> String {
        let client = host.connect(80);
        let (mut unsent, mut got) = (request.as_bytes(), Vec::new());
        host.run(|sockets| {
            server.serve(sockets, |path| match path {
                "/long" => Some(Reply::Page("x".repeat(100_000))),
                "/bad" => Some(Reply::Bad("why\n".to_string())),
                "/a?b" => Some(Reply::Page("question\n".to_string())),
                _ => None,
            });
            let socket = sockets.get_mut::<tcp::Socket<'_>>(client);
            unsent = &unsent[socket.send_slice(unsent).unwrap_or(0)..];
            let _ = socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes)));
            if got.is_empty() || socket.may_recv() {
                return true;
            }
            socket.close();
            socket.is_open()
        });
        String::from_utf8(got).unwrap()
    }

    #[test]
    fn pages_are_served_whole_and_what_is_none_is_said_to_be_none() {
        let mut host = Host::new();
        let mut server = Server::new(&mut host.sockets, 80, 1);
        let long = get(&mut host, &mut server, "GET /long HTTP/1.1\r\nHost: x\r\n\r\n");
        let (head, body) = long.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.0 200 OK\r\n"), "{head}");
        assert!(head.contains("\r\nContent-Length: 100000\r\n"), "{head}");
        assert_eq!(body, "x".repeat(100_000));
        for (request, status) in [
            ("GET /a?b HTTP/1.0\r\n\r\n", "200 "),
            ("GET /none HTTP/1.0\r\n\r\n", "404 "),
            ("GET /bad HTTP/1.0\r\n\r\n", "400 "),
            ("POST /a HTTP/1.0\r\n\r\n", "405 "),
        ] {
            let got = get(&mut host, &mut server, request);
            assert_eq!(got.get(9..13), Some(status), "{request}: {got}");
        }
        let endless = get(&mut host, &mut server, &"GET /".repeat(400));
        assert!(endless.starts_with("HTTP/1.0 404"), "{endless}");
    }

    #[test]
    fn a_stream_goes_on_until_the_other_end_goes() {
        let mut host = Host::new();
        let mut server = Server::new(&mut host.sockets, 80, 1);
        let client = host.connect(80);
        let (mut unsent, mut got) = (&b"GET /stream HTTP/1.0\r\n\r\n"[..], Vec::new());
        host.run(|sockets| {
            server.serve(sockets, |_| Some(Reply::Stream));
            let socket = sockets.get_mut::<tcp::Socket<'_>>(client);
            unsent = &unsent[socket.send_slice(unsent).unwrap_or(0)..];
            let _ = socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes)));
            got.len() < 1_000_000
        });
        let end = got.windows(4).position(|at| at == b"\r\n\r\n").unwrap();
        assert!(got[end + 4..].iter().all(|byte| *byte == STREAM_BYTE));
        host.socket(client).abort();
        let mut turns = 0;
        host.run(|sockets| {
            server.serve(sockets, |_| Some(Reply::Stream));
            turns += 1;
            turns < 10
        });
        // The place is free again.
        let page = get(&mut host, &mut server, "GET /a?b HTTP/1.0\r\n\r\n");
        assert!(page.ends_with("question\n"), "{page}");
    }

    #[test]
    fn whoever_went_without_a_word_is_given_up() {
        let mut host = Host::new();
        let mut server = Server::new(&mut host.sockets, 80, 1);
        let client = host.connect(80);
        let mut turns = 0;
        host.run(|sockets| {
            server.serve(sockets, |_| None);
            turns += 1;
            turns < 10
        });
        host.lose(client);
        host.sleep(TIMEOUT + KEEP_ALIVE + KEEP_ALIVE, |sockets| {
            server.serve(sockets, |_| None);
        });
        let page = get(&mut host, &mut server, "GET /a?b HTTP/1.0\r\n\r\n");
        assert!(page.ends_with("question\n"), "{page}");
    }
}

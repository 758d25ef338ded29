//! The world outside: servers on this machine's loopback, which guests reach at 10.0.2.2 by way of dom0's NIC and QEMU's user
//! network.
//!
//! One speaks HTTP: `GET /BYTES/SEED` is answered by so many bytes of [`Generator`]. The other takes a stream to its end and
//! answers `bytes=N sha256=HEX`. Each serves a few at a time, closes what it has no room for, and gives up on a client that stands
//! still.

use std::io::{self, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

/// Clients of a server at a time.
const CLIENTS: usize = 16;
/// How long a client may stand still.
const IDLE: Duration = Duration::from_secs(60);
/// A request may not be longer.
const REQUEST: u64 = 2048;
/// What one client may ask for or send.
const MOST: u64 = 1 << 30;
/// What is read or written at a time.
const PIECE: usize = 1 << 16;

/// Marsaglia's xorshift64 with the shifts 13, 7 and 17, from a seed that is not 0: each step is
/// `x ^= x << 13; x ^= x >> 7; x ^= x << 17` and gives eight bytes, the lowest first. This project's images have the same one.
struct Generator(u64);

impl Generator {
    fn step(&mut self) -> [u8; 8] {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.to_le_bytes()
    }

    /// Of the last step, what there is no room for is lost.
    fn fill(&mut self, bytes: &mut [u8]) {
        let (words, rest) = bytes.as_chunks_mut();
        for word in words {
            *word = self.step();
        }
        if !rest.is_empty() {
            rest.iter_mut().zip(self.step()).for_each(|(to, from)| *to = from);
        }
    }

    /// Gives so many bytes away, a piece at a time.
    fn pour(
        mut self,
        mut bytes: u64,
        mut to: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; PIECE];
        while bytes > 0 {
            let size = usize::try_from(bytes).unwrap_or(PIECE).min(PIECE);
            let piece = buffer.get_mut(..size).unwrap_or_default();
            self.fill(piece);
            to(piece)?;
            bytes -= size as u64;
        }
        Ok(())
    }
}

/// The SHA-256 of so many bytes of a seed.
pub fn digest(bytes: u64, seed: u64) -> Result<String> {
    let mut hash = Sha256::new();
    Generator(seed).pour(bytes, |piece| {
        hash.update(piece);
        Ok(())
    })?;
    Ok(hex(hash))
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The ports of the servers, which last as long as this program.
pub struct World {
    /// Of the one that speaks HTTP.
    pub http: u16,
    /// Of the one that takes streams.
    pub sink: u16,
}

impl World {
    /// Opens both.
    pub fn open() -> Result<Self> {
        Ok(Self { http: listen(http)?, sink: listen(sink)? })
    }
}

/// Serves clients at a free port of the loopback.
fn listen(serve: fn(TcpStream) -> io::Result<()>) -> Result<u16> {
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port on the loopback")?;
    let port = listener.local_addr()?.port();
    let clients = Arc::new(());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let client = Arc::clone(&clients);
            if Arc::strong_count(&clients) > CLIENTS + 1 {
                continue;
            }
            std::thread::spawn(move || {
                // What became of it is for the client to say.
                let _ = patiently(stream).and_then(serve);
                drop(client);
            });
        }
    });
    Ok(port)
}

fn patiently(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    Ok(stream)
}

fn http(mut stream: TcpStream) -> io::Result<()> {
    let mut request = Vec::new();
    let mut reader = BufReader::new(&stream).take(REQUEST).bytes();
    while !request.ends_with(b"\r\n\r\n") {
        match reader.next() {
            Some(byte) => request.push(byte?),
            None => return Ok(()),
        }
    }
    match asked(&request) {
        Some((bytes, seed)) => {
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\nConnection: close\r\n\r\n"
            )?;
            Generator(seed).pour(bytes, |piece| stream.write_all(piece))
        }
        None => stream
            .write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
    }
}

/// How many bytes of which seed a request is for.
fn asked(request: &[u8]) -> Option<(u64, u64)> {
    let path = std::str::from_utf8(request).ok()?.strip_prefix("GET /")?.split(' ').next()?;
    let (bytes, seed) = path.split_once('/')?;
    let (bytes, seed) = (bytes.parse().ok()?, seed.parse().ok()?);
    (bytes <= MOST && seed != 0).then_some((bytes, seed))
}

fn sink(mut stream: TcpStream) -> io::Result<()> {
    let (mut buffer, mut hash, mut bytes) = (vec![0; PIECE], Sha256::new(), 0);
    loop {
        let size = stream.read(&mut buffer)?;
        if size == 0 {
            break;
        }
        hash.update(buffer.get(..size).unwrap_or_default());
        bytes += size as u64;
        if bytes > MOST {
            return Ok(());
        }
    }
    writeln!(stream, "bytes={bytes} sha256={}", hex(hash))
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;

    use super::*;

    fn talk(port: u16, say: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.write_all(say).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    }

    #[test]
    fn the_first_word_is_that_of_the_definition() {
        let mut bytes = [0; 12];
        Generator(1).fill(&mut bytes);
        assert_eq!(bytes[..8], 0x4082_2041_u64.to_le_bytes());
        assert_ne!(bytes[8..], [0; 4]);
    }

    #[test]
    fn what_was_asked_for_comes_by_http() {
        let world = World::open().unwrap();
        for (bytes, seed) in [(200_001, 7), (0, 1)] {
            let request = format!("GET /{bytes}/{seed} HTTP/1.1\r\nHost: x\r\n\r\n");
            let answer = talk(world.http, request.as_bytes());
            let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
            assert!(answer.starts_with(b"HTTP/1.1 200 "));
            assert_eq!(answer.len() - end, bytes as usize);
            let sum = hex(Sha256::new_with_prefix(&answer[end..]));
            assert_eq!(sum, digest(bytes, seed).unwrap());
        }
        for request in ["GET /", "GET /1/0", "GET /9999999999/1", "GET /1/x", "PUT /1/1"] {
            let answer = talk(world.http, format!("{request} HTTP/1.1\r\n\r\n").as_bytes());
            assert!(answer.starts_with(b"HTTP/1.1 404 "), "{request}");
        }
        assert!(talk(world.http, &[b'x'; 100]).is_empty());
    }

    #[test]
    fn a_stream_is_answered_by_its_digest() {
        let world = World::open().unwrap();
        let mut bytes = vec![0; 150_000];
        Generator(3).fill(&mut bytes);
        let answer = String::from_utf8(talk(world.sink, &bytes)).unwrap();
        assert_eq!(answer, format!("bytes=150000 sha256={}\n", digest(150_000, 3).unwrap()));
    }

    #[test]
    fn who_comes_when_all_places_are_taken_is_sent_away() {
        let world = World::open().unwrap();
        let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, world.sink)).unwrap();
        let waiting: Vec<_> = (0..CLIENTS).map(|_| connect()).collect();
        assert_eq!(connect().read(&mut [0; 1]).unwrap_or(0), 0);
        drop(waiting);
    }
}

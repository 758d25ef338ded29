//! Servers of TCP streams: one takes them, one makes them, one sends them back, one only counts them.

mod echo;
mod sink;
mod source;

use alloc::vec;
use core::fmt;

use sha2::{Digest as _, Sha256};
use smoltcp::socket::tcp;

pub use echo::Echo;
pub use sink::{Judge, Sink};
pub use source::Source;

/// What comes is counted, and its end is answered with how much it was.
pub const DISCARD: u16 = 9;
/// What comes is summed up, and its end is answered with the sum.
pub const SINK: u16 = 5001;
/// One line, `N SEED`, is answered by N bytes of a [`Generator`](crate::generator::Generator).
pub const SOURCE: u16 = 5002;
/// All that comes goes back.
pub const ECHO: u16 = 5003;

/// Bytes of a buffer for a stream: as many as a window can say without a scale. A scaled window is rounded down, and so its
/// right edge moves back at times, upon which smoltcp 0.14 drops bytes that it had room for.
pub(crate) const BUFFER: usize = 65_535;
/// Bytes of a buffer where it is known that all but a stream's end comes in multiples of four: 256 KiB, as much as lets both
/// ends and whatever is between them work at once, and a multiple of a packet of 44 segments.
pub(crate) const WIDE: usize = 4 * 44 * 1460;
/// Bytes of the other way's buffer, where a line is all that goes there.
pub(crate) const LINE: usize = 256;

/// A socket with buffers of so many bytes.
pub(crate) fn socket(receive: usize, send: usize) -> tcp::Socket<'static> {
    let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
    let mut socket = tcp::Socket::new(buffer(receive), buffer(send));
    // The end of a stream is not to wait for more, nor an acknowledgement for a timer.
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket
}

/// Listens again on a port whose socket is done; says whether it did.
fn listen(socket: &mut tcp::Socket<'_>, port: u16) -> bool {
    let over = !socket.is_open();
    if over && let Err(error) = socket.listen(port) {
        log::error!("cannot serve port {port}: {error:?}");
    }
    over
}

/// How much has gone by.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Count(u64);

impl Judge for Count {
    const BUFFER: usize = WIDE;

    fn take(&mut self, bytes: &[u8]) {
        self.0 += bytes.len() as u64;
    }

    fn bytes(&self) -> u64 {
        self.0
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes={}", self.0)
    }
}

/// What has gone by: how much, and its SHA-256.
#[derive(Clone, Default)]
pub struct Digest {
    bytes: u64,
    hash: Sha256,
}

impl Digest {
    /// Takes the next bytes into account.
    pub fn add(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    /// How many there were.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Their SHA-256.
    #[must_use]
    pub fn sum(&self) -> Sum {
        Sum(self.hash.clone().finalize().into())
    }
}

impl Judge for Digest {
    fn take(&mut self, bytes: &[u8]) {
        self.add(bytes);
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes={} sha256={}", self.bytes, self.sum())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({} bytes)", self.bytes)
    }
}

/// A SHA-256, written as hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sum([u8; 32]);

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// So many bytes in so many nanoseconds, written as Mbit/s.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// Bytes.
    pub bytes: u64,
    /// Nanoseconds.
    pub nanos: u64,
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Tenths: 8 bits a byte, 10^9 ns a second, 10^6 bits a Mbit.
        let tenths = u128::from(self.bytes) * 80_000 / u128::from(self.nanos.max(1));
        write!(f, "{}.{}", tenths / 10, tenths % 10)
    }
}

#[cfg(test)]
mod tests {
    use std::format;

    use super::*;

    #[test]
    fn rates_and_sums_are_written_as_people_write_them() {
        assert_eq!(format!("{}", Rate { bytes: 1_250_000, nanos: 1_000_000_000 }), "10.0");
        assert_eq!(format!("{}", Rate { bytes: 1, nanos: 0 }), "8000.0");
        assert_eq!(format!("{}", Rate { bytes: u64::MAX, nanos: u64::MAX }), "8000.0");
        let mut digest = Digest::default();
        digest.add(b"abc");
        let sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(format!("{digest}"), format!("bytes=3 sha256={sum}"));
    }
}

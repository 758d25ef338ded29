//! Where a guest can send a stream to: all that comes is compared with a pattern, and at the end the sender is told how
//! much it was and how much of it was wrong.

use alloc::format;
use alloc::vec;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;

/// `discard`, as far as a sender is concerned.
const PORT: u16 = 9;
/// Bytes of the receive buffer: a sender's largest packets fit.
const RECEIVE: usize = 64 * 1024;
const SEND: usize = 256;

/// The byte at place `n` of a stream is `n` modulo this: a prime, so that whatever is lost, repeated or put in the place
/// of something else by pages or packets is wrong nearly everywhere after.
const PERIOD: usize = 251;
/// Bytes compared at a time.
const CHUNK: usize = 4096;

static PATTERN: [u8; PERIOD + CHUNK] = pattern();

#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler, and in bounds")]
const fn pattern() -> [u8; PERIOD + CHUNK] {
    let mut bytes = [0; PERIOD + CHUNK];
    let mut at = 0;
    while at < bytes.len() {
        bytes[at] = (at % PERIOD) as u8;
        at += 1;
    }
    bytes
}

/// What has come of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Tally {
    bytes: u64,
    wrong: u64,
}

impl Tally {
    fn add(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(CHUNK) {
            let phase = (self.bytes % PERIOD as u64) as usize;
            let right = PATTERN.get(phase..).unwrap_or_default();
            if !right.starts_with(chunk) {
                let differ = chunk.iter().zip(right).filter(|(is, ought)| is != ought);
                self.wrong += differ.count() as u64;
            }
            self.bytes += chunk.len() as u64;
        }
    }
}

/// A server of one stream at a time.
pub(crate) struct Sink {
    socket: SocketHandle,
    tally: Tally,
    told: bool,
}

impl Sink {
    pub(crate) fn new(sockets: &mut SocketSet<'static>) -> Self {
        let receive = tcp::SocketBuffer::new(vec![0; RECEIVE]);
        let send = tcp::SocketBuffer::new(vec![0; SEND]);
        let socket = sockets.add(tcp::Socket::new(receive, send));
        Self { socket, tally: Tally::default(), told: false }
    }

    /// Takes what came; says whether there is something new to send, be it that there is room again.
    pub(crate) fn serve(&mut self, sockets: &mut SocketSet<'static>) -> bool {
        let socket = sockets.get_mut::<tcp::Socket>(self.socket);
        if !socket.is_open() {
            (self.tally, self.told) = (Tally::default(), false);
            if let Err(error) = socket.listen(PORT) {
                log::error!("dom0: cannot serve port {PORT}: {error:?}");
            }
            return false;
        }
        let before = self.tally;
        while socket.can_recv() {
            let tally = &mut self.tally;
            let read = socket.recv(|bytes| {
                tally.add(bytes);
                (bytes.len(), ())
            });
            if read.is_err() {
                break;
            }
        }
        if !socket.may_recv() && socket.may_send() && !self.told {
            let Tally { bytes, wrong } = self.tally;
            // The buffer is empty, and larger than this.
            let _ = socket.send_slice(format!("bytes={bytes} wrong={wrong}\n").as_bytes());
            socket.close();
            self.told = true;
            return true;
        }
        before != self.tally
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    fn stream(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at % PERIOD) as u8).collect()
    }

    #[test]
    fn the_pattern_is_right_however_it_is_cut() {
        let bytes = stream(100_000);
        for cut in [1, 7, 250, 251, 252, 1448, 4095, 4096, 4097, 65_536] {
            let mut tally = Tally::default();
            bytes.chunks(cut).for_each(|chunk| tally.add(chunk));
            assert_eq!(tally, Tally { bytes: 100_000, wrong: 0 }, "cut into {cut}");
        }
    }

    #[test]
    fn every_wrong_byte_is_counted() {
        let mut bytes = stream(20_000);
        for at in [0, 4095, 4096, 19_999] {
            bytes[at] ^= 0x80;
        }
        let mut tally = Tally::default();
        tally.add(&bytes);
        assert_eq!(tally, Tally { bytes: 20_000, wrong: 4 });
        // A page that is missing.
        let mut tally = Tally::default();
        let bytes = stream(20_000);
        tally.add(&bytes[..4096]);
        tally.add(&bytes[8192..]);
        assert!(tally.wrong > 10_000);
    }
}

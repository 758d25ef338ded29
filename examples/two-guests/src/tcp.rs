//! TCP streams of checksummed blocks, by smoltcp.

use std::fmt;
use std::net::Ipv4Addr;

use hypercall::Instant;
use netif::mac::MacAddr;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::Device;
use smoltcp::socket::tcp;
use smoltcp::time;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Cidr};

use crate::check::{Sequence, Tally};
use crate::payload;

/// Bytes of a block, header included.
pub const BLOCK: usize = 16 * 1024;
/// What a block begins with: its stream, its number, and the sum over all of it with zero in place of the sum.
const HEADER: usize = 24;
const SUM: usize = 16;
/// Bytes of a socket's buffer, each way: as many as a window can say without a scale. A scaled window is rounded down, and so its
/// right edge moves back at times; smoltcp 0.14 then drops bytes that it had room for, and loses the fast retransmission that
/// is to mend it if the device has no room at that moment. The stream stands still.
const BUFFER: usize = 65_535;
/// The first port that streams are served at.
const PORT: u16 = 5000;

/// One stream, whichever end of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamId(pub u16);

impl StreamId {
    fn port(self) -> u16 {
        PORT + self.0
    }
}

#[derive(Debug)]
struct Serving {
    id: StreamId,
    socket: SocketHandle,
    block: Vec<u8>,
    /// Bytes of the block that are gone.
    at: usize,
    blocks: u64,
}

#[derive(Debug)]
struct Pulling {
    id: StreamId,
    socket: SocketHandle,
    from: Ipv4Addr,
    block: Vec<u8>,
    blocks: Sequence,
    bytes: u64,
    corrupt: u64,
    /// The server has said that there is no more.
    ended: bool,
}

/// A host that serves streams, and pulls them from others.
pub struct Tcp {
    interface: Interface,
    sockets: SocketSet<'static>,
    serving: Vec<Serving>,
    pulling: Vec<Pulling>,
    stopped: bool,
    local_port: u16,
}

/// smoltcp's clock, in microseconds.
pub(crate) fn at(now: Instant) -> time::Instant {
    time::Instant::from_micros(i64::try_from(now.0 / 1000).unwrap_or(i64::MAX))
}

fn write_block(block: &mut [u8], id: StreamId, number: u64) {
    let Some((header, payload)) = block.split_first_chunk_mut::<HEADER>() else { return };
    payload::fill(payload, number << 16 | u64::from(id.0));
    let words = [u64::from(id.0), number, 0];
    for (to, word) in header.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *to = word.to_be_bytes();
    }
    let sum = payload::sum(block).to_be_bytes();
    if let Some(to) = block.get_mut(SUM..HEADER) {
        to.copy_from_slice(&sum);
    }
}

/// The number of a block that is as it was sent.
fn read_block(block: &mut [u8], id: StreamId) -> Option<u64> {
    let (words, _) = block.first_chunk::<HEADER>()?.as_chunks::<8>();
    let [stream, number, said] = *words else { return None };
    block.get_mut(SUM..HEADER)?.fill(0);
    let good = payload::sum(block) == u64::from_be_bytes(said)
        && u64::from_be_bytes(stream) == u64::from(id.0);
    good.then_some(u64::from_be_bytes(number))
}

fn socket() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    // A block's end is not to wait for the next one's beginning, nor an acknowledgement for a timer.
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket
}

impl Tcp {
    /// A host with this address, in a network of 256.
    pub fn new<D: Device + ?Sized>(
        device: &mut D,
        mac: MacAddr,
        address: Ipv4Addr,
        now: Instant,
    ) -> Self {
        let config = Config::new(EthernetAddress(mac.0).into());
        let mut interface = Interface::new(config, device, at(now));
        // There is room for the first address.
        interface.update_ip_addrs(|own| {
            let _ = own.push(IpCidr::Ipv4(Ipv4Cidr::new(address, 24)));
        });
        Self {
            interface,
            sockets: SocketSet::new(Vec::new()),
            serving: Vec::new(),
            pulling: Vec::new(),
            stopped: false,
            local_port: 49152,
        }
    }

    /// Serves a stream.
    pub fn serve(&mut self, id: StreamId) {
        let socket = self.sockets.add(socket());
        let block = vec![0; BLOCK];
        self.serving.push(Serving { id, socket, block, at: BLOCK, blocks: 0 });
    }

    /// Pulls a stream from another host.
    pub fn pull(&mut self, id: StreamId, from: Ipv4Addr) {
        let socket = self.sockets.add(socket());
        let (block, blocks) = (Vec::with_capacity(BLOCK), Sequence::default());
        self.pulling.push(Pulling {
            id,
            socket,
            from,
            block,
            blocks,
            bytes: 0,
            corrupt: 0,
            ended: false,
        });
    }

    /// Begins no block any more: streams end with the one that is on its way.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Whether all that this host pulls has ended.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.pulling.iter().all(|stream| stream.ended)
    }

    /// Whether something has come of all that this host pulls.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.pulling.iter().all(|stream| stream.bytes > 0)
    }

    /// Bytes of whole, good blocks that this host has pulled.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pulling.iter().map(|stream| stream.bytes).sum()
    }

    /// Handles what came and sends what is due. Answers whether an application's stream went on.
    pub fn poll<D: Device + ?Sized>(&mut self, device: &mut D, now: Instant) -> bool {
        self.interface.poll(at(now), device, &mut self.sockets);
        let mut some = false;
        let Self { interface, sockets, serving, pulling, stopped, local_port } = self;
        for stream in serving {
            some |= stream.turn(sockets.get_mut(stream.socket), *stopped);
        }
        for stream in pulling {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(stream.socket);
            if !socket.is_open() && !stream.ended && !*stopped {
                *local_port = local_port.checked_add(1).unwrap_or(49152);
                stream.block.clear();
                let from = (stream.from, stream.id.port());
                some |= socket.connect(interface.context(), from, *local_port).is_ok();
            }
            some |= stream.turn(socket);
        }
        if some {
            self.interface.poll(at(now), device, &mut self.sockets);
        }
        some
    }

    /// When [`poll`](Self::poll) is to be called though nothing comes.
    pub fn deadline(&mut self, now: Instant) -> Option<Instant> {
        let delay = self.interface.poll_delay(at(now), &self.sockets)?;
        // smoltcp's clock ticks in microseconds: never before its time.
        Some(now.after(delay.total_micros().saturating_mul(1000).max(1000)))
    }

    /// What became of the streams that `other` pulls from this host, once they have ended.
    #[must_use]
    pub fn settle_with(&self, other: &Self) -> Tally {
        let mut sum = Tally::default();
        for stream in &self.serving {
            for pulled in other.pulling.iter().filter(|pulled| pulled.id == stream.id) {
                sum += pulled.blocks.tally(stream.blocks);
                sum.corrupt += pulled.corrupt;
            }
        }
        sum
    }
}

impl fmt::Debug for Tcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let socket = |handle| self.sockets.get::<tcp::Socket<'_>>(handle);
        for Serving { id, socket: handle, blocks, at, .. } in &self.serving {
            let (state, queue) = (socket(*handle).state(), socket(*handle).send_queue());
            write!(
                f,
                "serves {}: {state}, {blocks} blocks and {at} bytes, {queue} unsent; ",
                id.0
            )?;
        }
        for Pulling { id, socket: handle, blocks, corrupt, .. } in &self.pulling {
            let (state, queue) = (socket(*handle).state(), socket(*handle).recv_queue());
            let good = blocks.unique();
            write!(f, "pulls {}: {state}, {good} blocks, {corrupt} bad, {queue} unread; ", id.0)?;
        }
        Ok(())
    }
}

impl Serving {
    fn turn(&mut self, socket: &mut tcp::Socket<'_>, stopped: bool) -> bool {
        if !socket.is_open() {
            // The next connection begins with a whole block.
            self.at = BLOCK;
            return !stopped && socket.listen(self.id.port()).is_ok();
        }
        let mut some = false;
        while socket.can_send() {
            if self.at == BLOCK {
                if stopped {
                    socket.close();
                    return true;
                }
                write_block(&mut self.block, self.id, self.blocks);
                self.blocks += 1;
                self.at = 0;
            }
            let rest = self.block.get(self.at..).unwrap_or_default();
            match socket.send_slice(rest) {
                Ok(sent) if sent > 0 => self.at += sent,
                _ => break,
            }
            some = true;
        }
        some
    }
}

impl Pulling {
    fn turn(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        let mut some = false;
        while socket.can_recv() {
            let Self { block, blocks, bytes, corrupt, id, .. } = self;
            let taken = socket.recv(|from| {
                let part = from.get(..from.len().min(BLOCK - block.len())).unwrap_or_default();
                block.extend_from_slice(part);
                (part.len(), ())
            });
            if taken.is_err() {
                break;
            }
            some = true;
            if block.len() == BLOCK {
                match read_block(block, *id).map(|number| blocks.came(number)) {
                    Some(Ok(())) => *bytes += BLOCK as u64,
                    _ => *corrupt += 1,
                }
                block.clear();
            }
        }
        if !self.ended && socket.state() == tcp::State::CloseWait {
            self.ended = true;
            socket.close();
            some = true;
        }
        some
    }
}

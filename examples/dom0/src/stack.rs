//! dom0's own address on the switch: it answers pings, serves its counters by HTTP, and takes streams.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use hypercall::Instant;
use netback::offload::checksum::is_valid;
use netback::offload::headers;
use netback::{Backend, Packet};
use netif::mac::MacAddr;
use netif::offload::Checksum;
use runtime::Hv;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

use crate::sink::Sink;

/// Where the counters are served.
const HTTP: u16 = 80;
/// Requests served at once.
const SERVERS: usize = 4;
/// Streams taken at once.
const SINKS: usize = 2;
/// Bytes of a request that are looked at.
const REQUEST: usize = 1024;
/// Bytes of each socket's buffers.
const RECEIVE: usize = 2048;
const SEND: usize = 32 * 1024;
/// Bytes of an Ethernet frame without tags: 1,500 and the header.
const FRAME: usize = 1514;

/// The local port of the switch, as smoltcp sees it.
struct LocalPort<'a> {
    backend: &'a mut Backend<Hv>,
    now: Instant,
    traffic: &'a mut Traffic,
}

/// What has been carried.
#[derive(Default)]
struct Traffic {
    /// Something was sent since this was last looked at.
    sent: bool,
    /// Packets that were lost for want of a buffer.
    lost: u64,
}

struct Received(Packet<Hv>);

struct Sender<'a> {
    backend: &'a mut Backend<Hv>,
    now: Instant,
    traffic: &'a mut Traffic,
}

impl LocalPort<'_> {
    fn sender(&mut self) -> Sender<'_> {
        Sender { backend: self.backend, now: self.now, traffic: self.traffic }
    }
}

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0.bytes())
    }
}

impl phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        match self.backend.packet(len, self.now) {
            Some(mut packet) => {
                let result = f(packet.bytes_mut());
                packet.checksum = Checksum::Validated;
                self.backend.send_local(packet, self.now);
                self.traffic.sent = true;
                result
            }
            // No buffer is free: it is lost, as on any wire.
            None => {
                self.traffic.lost += 1;
                f(&mut vec![0; len])
            }
        }
    }
}

impl Device for LocalPort<'_> {
    type RxToken<'a>
        = Received
    where
        Self: 'a;
    type TxToken<'a>
        = Sender<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: time::Instant) -> Option<(Received, Sender<'_>)> {
        loop {
            let mut packet = self.backend.receive_local()?;
            // The stack reads it in one piece; without a buffer for that it is lost, as on any card.
            if !packet.make_whole(self.backend.pools()) {
                self.traffic.lost += 1;
            } else if trustworthy(&packet) {
                return Some((Received(packet), self.sender()));
            }
        }
    }

    fn transmit(&mut self, _: time::Instant) -> Option<Sender<'_>> {
        Some(self.sender())
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        // What guests leave blank or vouch for is not looked at again; the rest is checked in `receive`.
        capabilities.checksum.tcp = phy::Checksum::Tx;
        capabilities.checksum.udp = phy::Checksum::Tx;
        capabilities
    }
}

/// Whether the transport checksum is good, or need not be.
fn trustworthy(packet: &Packet<Hv>) -> bool {
    packet.checksum != Checksum::Unverified
        || headers::parse(packet.bytes()).is_none_or(|found| found.transport.is_none())
        || is_valid(packet.bytes())
}

/// What a connection is being sent.
#[derive(Default)]
enum Reply {
    /// The request is not whole yet.
    #[default]
    None,
    /// Bytes, and how many are gone.
    Text(Vec<u8>, usize),
    /// Bytes for as long as the other end takes them.
    Stream,
}

struct Connection {
    socket: SocketHandle,
    request: Vec<u8>,
    reply: Reply,
}

/// The stack, and the servers on it.
pub(crate) struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    sinks: Vec<Sink>,
    traffic: Traffic,
}

fn at(now: Instant) -> time::Instant {
    time::Instant::from_micros(i64::try_from(now.0 / 1000).unwrap_or(i64::MAX))
}

impl Stack {
    pub(crate) fn new(backend: &mut Backend<Hv>, addresses: &[IpCidr], now: Instant) -> Self {
        let MacAddr(mac) = MacAddr::BACKEND;
        let config = Config::new(EthernetAddress(mac).into());
        let port = &mut LocalPort { backend, now, traffic: &mut Traffic::default() };
        let mut interface = Interface::new(config, port, at(now));
        interface.update_ip_addrs(|own| {
            for address in addresses {
                if own.push(*address).is_err() {
                    log::warn!("dom0: {address} is one address too many");
                }
            }
        });
        let mut sockets = SocketSet::new(Vec::new());
        let connections = (0..SERVERS)
            .map(|_| {
                let receive = tcp::SocketBuffer::new(vec![0; RECEIVE]);
                let send = tcp::SocketBuffer::new(vec![0; SEND]);
                let socket = sockets.add(tcp::Socket::new(receive, send));
                Connection { socket, request: Vec::new(), reply: Reply::None }
            })
            .collect();
        let sinks = (0..SINKS).map(|_| Sink::new(&mut sockets)).collect();
        Self { interface, sockets, connections, sinks, traffic: Traffic::default() }
    }

    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddress> {
        self.interface.ip_addrs().iter().map(IpCidr::address)
    }

    /// Handles what came and sends what is due; `page` gives the counters, when they are asked for, with the packets
    /// that this stack has lost for want of a buffer. Answers whether anything was sent: the backend has to be polled for that to reach its guest.
    pub(crate) fn poll(
        &mut self,
        backend: &mut Backend<Hv>,
        now: Instant,
        mut page: impl FnMut(&Backend<Hv>, u64) -> String,
    ) -> bool {
        let Self { interface, sockets, connections, sinks, traffic } = self;
        traffic.sent = false;
        interface.poll(at(now), &mut LocalPort { backend, now, traffic }, sockets);
        let mut written = false;
        for connection in connections {
            let socket = sockets.get_mut::<tcp::Socket>(connection.socket);
            written |= connection.serve(socket, || page(backend, traffic.lost));
        }
        for sink in sinks {
            written |= sink.serve(sockets);
        }
        if written {
            interface.poll(at(now), &mut LocalPort { backend, now, traffic }, sockets);
        }
        traffic.sent
    }

    /// When [`poll`](Self::poll) is to be called though nothing comes.
    pub(crate) fn deadline(&mut self, now: Instant) -> Option<Instant> {
        let delay = self.interface.poll_delay(at(now), &self.sockets)?;
        Some(now.after(delay.total_micros().saturating_mul(1000)))
    }
}

fn answer(status: &str, body: &str) -> Vec<u8> {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let len = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// What `/stream` repeats.
const STREAM: [u8; 1024] = [0x55; 1024];

impl Connection {
    /// Says whether there is something new to send.
    fn serve(&mut self, socket: &mut tcp::Socket<'_>, page: impl FnOnce() -> String) -> bool {
        if !socket.is_open() {
            self.request.clear();
            self.reply = Reply::None;
            if let Err(error) = socket.listen(HTTP) {
                log::error!("dom0: cannot serve HTTP: {error:?}");
            }
            return false;
        }
        if matches!(self.reply, Reply::None) && socket.can_recv() {
            self.read(socket, page);
        }
        if !socket.may_recv() && matches!(self.reply, Reply::None) && socket.may_send() {
            // It has said all it will, and it was no request.
            socket.close();
            return true;
        }
        self.write(socket)
    }

    fn read(&mut self, socket: &mut tcp::Socket<'_>, page: impl FnOnce() -> String) {
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
        self.reply = match (words.next(), words.next()) {
            (Some(b"GET"), Some(b"/metrics")) => Reply::Text(answer("200 OK", &page()), 0),
            (Some(b"GET"), Some(b"/")) => Reply::Text(answer("200 OK", "/metrics\n/stream\n"), 0),
            (Some(b"GET"), Some(b"/stream")) => {
                let head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
                // The buffer is empty, and larger than this.
                let _ = socket.send_slice(head);
                Reply::Stream
            }
            (Some(b"GET"), _) => Reply::Text(answer("404 Not Found", "no such page\n"), 0),
            _ => Reply::Text(answer("405 Method Not Allowed", "only GET\n"), 0),
        };
    }

    fn write(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        match &mut self.reply {
            Reply::None => false,
            Reply::Text(bytes, gone) => {
                let rest = bytes.get(*gone..).unwrap_or_default();
                let sent = socket.send_slice(rest).unwrap_or(rest.len());
                *gone += sent;
                if sent == rest.len() && socket.may_send() {
                    socket.close();
                    return true;
                }
                sent > 0
            }
            Reply::Stream => {
                let mut some = false;
                while socket.can_send() && socket.send_slice(&STREAM).is_ok_and(|sent| sent > 0) {
                    some = true;
                }
                if !socket.may_send() {
                    socket.abort();
                }
                some
            }
        }
    }
}

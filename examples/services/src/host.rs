//! A host that talks to itself, for tests.

use alloc::vec;
use alloc::vec::Vec;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Loopback, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

pub(crate) const ADDRESS: IpAddress = IpAddress::v4(127, 0, 0, 1);

/// Its clock goes on by a millisecond with each turn.
pub(crate) struct Host {
    pub(crate) device: Loopback,
    pub(crate) interface: Interface,
    pub(crate) sockets: SocketSet<'static>,
    pub(crate) now: Instant,
    port: u16,
}

impl Host {
    pub(crate) fn new() -> Self {
        let mut device = Loopback::new(Medium::Ethernet);
        let config = Config::new(EthernetAddress([2, 0, 0, 0, 0, 1]).into());
        let mut interface = Interface::new(config, &mut device, Instant::ZERO);
        interface.update_ip_addrs(|own| own.push(IpCidr::new(ADDRESS, 8)).unwrap());
        let sockets = SocketSet::new(Vec::new());
        Self { device, interface, sockets, now: Instant::ZERO, port: 40_000 }
    }

    /// A client's socket; its server is there after the first turn.
    pub(crate) fn connect(&mut self, port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65_535]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        self.port += 1;
        socket.connect(self.interface.context(), (ADDRESS, port), self.port).unwrap();
        self.sockets.add(socket)
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// A client of whom nothing is heard any more.
    pub(crate) fn lose(&mut self, handle: SocketHandle) {
        self.sockets.remove(handle);
    }

    /// Turns until `step` says that it has no further need of them.
    pub(crate) fn run(&mut self, mut step: impl FnMut(&mut SocketSet<'static>) -> bool) {
        for _ in 0..100_000 {
            let more = step(&mut self.sockets);
            self.now += Duration::from_millis(1);
            self.interface.poll(self.now, &mut self.device, &mut self.sockets);
            if !more {
                return;
            }
        }
        panic!("no end to it");
    }

    /// Turns for so long.
    pub(crate) fn sleep(&mut self, time: Duration, mut step: impl FnMut(&mut SocketSet<'static>)) {
        let end = self.now + time;
        while self.now < end {
            self.now += Duration::from_millis(99);
            self.run(|sockets| {
                step(sockets);
                false
            });
        }
    }
}

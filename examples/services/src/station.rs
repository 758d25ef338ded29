//! The backend's own address on its switch, where it answers pings and whatever is served over the sockets.

use alloc::vec;
use alloc::vec::Vec;

use hypercall::{Hypervisor, Instant};
use netback::offload::checksum::is_valid;
use netback::offload::headers;
use netback::{Backend, Packet};
use netif::mac::MacAddr;
use netif::offload::Checksum;
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::time;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

use crate::jobs::at;

/// Bytes of an Ethernet frame without tags: 1,500 and the header.
const FRAME: usize = 1514;

/// The local port of the switch, as smoltcp sees it.
struct LocalPort<'a, H: Hypervisor> {
    backend: &'a mut Backend<H>,
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

struct Received<H: Hypervisor>(Packet<H>);

struct Sender<'a, H: Hypervisor> {
    backend: &'a mut Backend<H>,
    now: Instant,
    traffic: &'a mut Traffic,
}

impl<H: Hypervisor> LocalPort<'_, H> {
    fn sender(&mut self) -> Sender<'_, H> {
        Sender { backend: self.backend, now: self.now, traffic: self.traffic }
    }
}

impl<H: Hypervisor> phy::RxToken for Received<H> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0.bytes())
    }
}

impl<H: Hypervisor> phy::TxToken for Sender<'_, H> {
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

impl<H: Hypervisor> Device for LocalPort<'_, H> {
    type RxToken<'a>
        = Received<H>
    where
        Self: 'a;
    type TxToken<'a>
        = Sender<'a, H>
    where
        Self: 'a;

    fn receive(&mut self, _: time::Instant) -> Option<(Received<H>, Sender<'_, H>)> {
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

    fn transmit(&mut self, _: time::Instant) -> Option<Sender<'_, H>> {
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
fn trustworthy<H: Hypervisor>(packet: &Packet<H>) -> bool {
    packet.checksum != Checksum::Unverified
        || headers::parse(packet.bytes()).is_none_or(|found| found.transport.is_none())
        || is_valid(packet.bytes())
}

/// The stack at the local port of a backend's switch. Without an address it takes what floods there, and says nothing.
pub struct Station {
    interface: Interface,
    sockets: SocketSet<'static>,
    traffic: Traffic,
}

impl Station {
    /// A station with these addresses.
    pub fn new<H: Hypervisor>(
        backend: &mut Backend<H>,
        addresses: &[IpCidr],
        now: Instant,
    ) -> Self {
        let MacAddr(mac) = MacAddr::BACKEND;
        let config = Config::new(EthernetAddress(mac).into());
        let port = &mut LocalPort { backend, now, traffic: &mut Traffic::default() };
        let mut interface = Interface::new(config, port, at(now));
        interface.update_ip_addrs(|own| {
            for address in addresses {
                if own.push(*address).is_err() {
                    log::warn!("{address} is one address too many");
                }
            }
        });
        Self { interface, sockets: SocketSet::new(Vec::new()), traffic: Traffic::default() }
    }

    /// Its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddress> {
        self.interface.ip_addrs().iter().map(IpCidr::address)
    }

    /// The sockets, for servers to be made on.
    pub fn sockets(&mut self) -> &mut SocketSet<'static> {
        &mut self.sockets
    }

    /// Handles what came and sends what is due. `serve` has its turn with the sockets between the two, is told how many
    /// packets this station has lost for want of a buffer, and answers whether the sockets have something new to send. Answers
    /// whether anything was sent: the backend has to be polled for that to reach its guest.
    pub fn poll<H: Hypervisor>(
        &mut self,
        backend: &mut Backend<H>,
        now: Instant,
        serve: impl FnOnce(&mut SocketSet<'static>, &Backend<H>, u64) -> bool,
    ) -> bool {
        let Self { interface, sockets, traffic } = self;
        traffic.sent = false;
        interface.poll(at(now), &mut LocalPort { backend, now, traffic }, sockets);
        if serve(sockets, backend, traffic.lost) {
            interface.poll(at(now), &mut LocalPort { backend, now, traffic }, sockets);
        }
        traffic.sent
    }

    /// When [`poll`](Self::poll) is to be called though nothing comes.
    pub fn deadline(&mut self, now: Instant) -> Option<Instant> {
        let delay = self.interface.poll_delay(at(now), &self.sockets)?;
        Some(now.after(delay.total_micros().saturating_mul(1000)))
    }
}

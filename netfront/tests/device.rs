//! smoltcp on the interface, against a second smoltcp behind a backend that is played by hand.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::collections::VecDeque;

use common::{Rings, World};
use grant::SharedMemory;
use hypercall::{GrantRef, Handle};
use netfront::Config;
use netfront::device::NetDevice;
use netif::offload::{Checksum, Gso};
use netif::rx::RxPacket;
use netif::slot::TxStatus;
use netif::tx::{Verdict, assemble};
use sim::SimHv;
use smoltcp::iface::{self, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpAddress, IpCidr, Ipv4Packet, Ipv6Packet,
    TcpPacket, UdpPacket,
};

/// The far end's device: a wire on which all checksums are whole.
#[derive(Default)]
struct Wire {
    /// Towards the guest.
    sent: VecDeque<Vec<u8>>,
    /// From the guest.
    coming: VecDeque<Vec<u8>>,
}

struct Frame(Vec<u8>);
struct Sender<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Frame;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Frame, Sender<'_>)> {
        Some((Frame(self.coming.pop_front()?), Sender(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_>> {
        Some(Sender(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

struct Host {
    interface: Interface,
    sockets: SocketSet<'static>,
}

impl Host {
    fn new(device: &mut impl Device, number: u8) -> Self {
        let mac = EthernetAddress([0, 0x16, 0x3e, 0, 0, number]);
        let mut interface = Interface::new(iface::Config::new(mac.into()), device, Instant::ZERO);
        interface.update_ip_addrs(|addrs| {
            addrs.push(IpCidr::new(IpAddress::v4(10, 0, 0, number), 24)).unwrap();
            let six = IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 0, number.into());
            addrs.push(IpCidr::new(six, 64)).unwrap();
        });
        Self { interface, sockets: SocketSet::new(vec![]) }
    }

    fn tcp(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 200_000]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }
}

fn address(version: u8, number: u8) -> IpAddress {
    match version {
        4 => IpAddress::v4(10, 0, 0, number),
        _ => IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 0, number.into()),
    }
}

/// What the guest's packets were.
#[derive(Default)]
struct Seen {
    frames: usize,
    longest: usize,
    blank: usize,
    /// Those to be segmented, and by what.
    large: usize,
    sizes: Vec<u16>,
    notified: usize,
}

struct Net {
    world: World<NetDevice<SimHv>>,
    rings: Vec<Rings>,
    guest: Host,
    wire: Wire,
    far: Host,
    seen: Seen,
    /// Queues by which the guest sent each TCP source port.
    queues: Vec<(u16, usize)>,
    clock: i64,
    /// Whether the backend hands checksums on blank.
    blank: bool,
}

/// The transport packet of a frame: its protocol and where it is.
fn transport(frame: &[u8]) -> Option<(u8, std::ops::Range<usize>, [IpAddress; 2])> {
    let ethernet = EthernetFrame::new_checked(frame).unwrap();
    match ethernet.ethertype() {
        EthernetProtocol::Ipv4 => {
            let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
            let range = 14 + usize::from(ip.header_len())..14 + usize::from(ip.total_len());
            assert!(ip.verify_checksum());
            Some((ip.next_header().into(), range, [ip.src_addr().into(), ip.dst_addr().into()]))
        }
        EthernetProtocol::Ipv6 => {
            let ip = Ipv6Packet::new_checked(ethernet.payload()).unwrap();
            let range = 54..54 + usize::from(ip.payload_len());
            Some((ip.next_header().into(), range, [ip.src_addr().into(), ip.dst_addr().into()]))
        }
        _ => None,
    }
}

/// Completes a checksum that is the sum over the pseudo-header.
fn complete(frame: &mut [u8]) {
    let (protocol, range, _) = transport(frame).unwrap();
    let at = range.start + if protocol == 6 { 16 } else { 6 };
    let sum = !smoltcp::wire::checksum::data(&frame[range]);
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

fn good(frame: &[u8]) -> bool {
    match transport(frame) {
        Some((6, range, [src, dst])) => {
            TcpPacket::new_checked(&frame[range]).unwrap().verify_checksum(&src, &dst)
        }
        Some((17, range, [src, dst])) => {
            let packet = UdpPacket::new_checked(&frame[range]).unwrap();
            packet.checksum() != 0 && packet.verify_checksum(&src, &dst)
        }
        _ => true,
    }
}

impl Net {
    fn new(config: Config, offer: &[(&str, &str)]) -> Self {
        let mut world = World::<NetDevice<SimHv>>::new(config);
        // Made before there is a backend: what it offers makes no difference.
        let guest = Host::new(&mut world.nic, 1);
        world.offer(offer);
        let queues = world.nic.frontend().queues();
        let rings = if queues > 1 { world.attach_queues(queues) } else { vec![world.attach()] };
        let mut wire = Wire::default();
        let far = Host::new(&mut wire, 2);
        let (seen, queues) = (Seen::default(), Vec::new());
        Self { world, rings, guest, wire, far, seen, queues, clock: 0, blank: false }
    }

    /// The backend takes what the guest sent.
    fn carry_tx(&mut self) {
        for queue in 0..self.rings.len() {
            let rings = &mut self.rings[queue];
            rings.tx.poll().unwrap();
            while let Some(verdict) = assemble(&mut rings.tx.requests()).unwrap() {
                let Verdict::Packet(packet) = verdict else { panic!("{verdict:?}") };
                let mut frame = Vec::new();
                for slot in &packet.slots {
                    frame.extend(self.world.peek(slot.gref, slot.offset, slot.size));
                }
                for response in packet.answers.responses(TxStatus::OKAY) {
                    rings.tx.push(response).unwrap();
                }
                self.seen.frames += 1;
                self.seen.longest = self.seen.longest.max(frame.len());
                if packet.checksum == Checksum::Blank {
                    self.seen.blank += 1;
                    complete(&mut frame);
                }
                assert!(good(&frame));
                if let Some(Gso { size, .. }) = packet.gso {
                    self.seen.large += 1;
                    self.seen.sizes.push(size.get());
                } else {
                    assert!(frame.len() <= 1514);
                }
                if let Some((6, range, _)) = transport(&frame) {
                    let port = TcpPacket::new_checked(&frame[range]).unwrap().src_port();
                    if !self.queues.contains(&(port, queue)) {
                        self.queues.push((port, queue));
                    }
                }
                self.wire.coming.push_back(frame);
            }
            self.seen.notified += usize::from(rings.tx.publish().is_needed());
        }
    }

    /// The backend gives the guest what is for it, by turns on all queues.
    fn carry_rx(&mut self) {
        let queues = self.rings.len();
        let mut queue = 0;
        while let Some(mut frame) = self.wire.sent.pop_front() {
            let mut checksum = Checksum::Unverified;
            if self.blank && transport(&frame).is_some_and(|(protocol, ..)| protocol == 6) {
                let (_, range, _) = transport(&frame).unwrap();
                frame[range.start + 16..range.start + 18].fill(0xee);
                checksum = Checksum::Blank;
            }
            let len = frame.len() as u16;
            self.give(
                queue % queues,
                &frame,
                RxPacket {
                    pieces: &[],
                    len,
                    headroom: hypercall::PageOffset::ZERO,
                    checksum,
                    gso: None,
                    hash: None,
                },
            );
            queue += 1;
        }
    }

    fn give(&mut self, queue: usize, frame: &[u8], packet: RxPacket<'_>) {
        let rings = &mut self.rings[queue];
        rings.rx.poll().unwrap();
        for slot in 0..packet.slots() {
            let request = rings.rx.take().unwrap();
            if let Some(part) = packet.part(slot) {
                let GrantRef(gref) = request.gref;
                let bytes = &frame[part.start.into()..][..part.len.into()];
                self.world.map(gref).write_bytes(part.offset.get().into(), bytes);
            }
            rings.rx.push(packet.response(slot, request.id).unwrap()).unwrap();
        }
        if rings.rx.publish().is_needed() {
            rings.channel.notify().unwrap();
        }
    }

    fn turn(&mut self) {
        self.clock += 1;
        let now = Instant::from_millis(self.clock);
        self.world.now = self.world.now.after(1_000_000);
        self.guest.interface.poll(now, &mut self.world.nic, &mut self.guest.sockets);
        self.world.turn();
        self.carry_tx();
        self.far.interface.poll(now, &mut self.wire, &mut self.far.sockets);
        self.carry_rx();
        self.world.turn();
    }

    /// Sends `count` bytes over TCP from the guest or to it, and checks that they are the same.
    fn transfer(&mut self, version: u8, from_guest: bool, count: usize) {
        let (client, server) = (self.guest.tcp(), self.far.tcp());
        let port = 1000 + self.clock as u16;
        self.far.sockets.get_mut::<tcp::Socket>(server).listen(80).unwrap();
        let socket = self.guest.sockets.get_mut::<tcp::Socket>(client);
        let to = (address(version, 2), 80);
        socket.connect(self.guest.interface.context(), to, port).unwrap();
        let (mut sent, mut received) = (0, 0);
        for _ in 0..5000 {
            self.turn();
            let (guest, far) = (
                self.guest.sockets.get_mut::<tcp::Socket>(client),
                self.far.sockets.get_mut::<tcp::Socket>(server),
            );
            let (from, to) = if from_guest { (guest, far) } else { (far, guest) };
            while from.can_send() && sent < count {
                sent += from
                    .send(|buffer| {
                        let len = buffer.len().min(count - sent);
                        (0..len).for_each(|at| buffer[at] = ((sent + at) % 251) as u8);
                        (len, len)
                    })
                    .unwrap();
            }
            while to.can_recv() {
                to.recv(|buffer| {
                    for byte in &*buffer {
                        assert_eq!(usize::from(*byte), received % 251);
                        received += 1;
                    }
                    (buffer.len(), ())
                })
                .unwrap();
            }
            if received == count {
                return;
            }
        }
        panic!("{received} of {count} bytes after {} turns", self.clock);
    }
}

const ALL: &[(&str, &str)] = &[
    ("feature-sg", "1"),
    ("feature-gso-tcpv4", "1"),
    ("feature-gso-tcpv6", "1"),
    ("feature-ipv6-csum-offload", "1"),
    ("multi-queue-max-queues", "4"),
];

fn config(queues: u16) -> Config {
    Config { queues, split: false, ..Config::new(Handle(0)) }
}

#[test]
fn large_packets_are_left_to_a_backend_that_cuts_them() {
    let mut net = Net::new(config(1), ALL);
    net.transfer(4, true, 2_000_000);
    assert!(net.seen.large > 5 && net.seen.longest > 60_000, "{}", net.seen.longest);
    assert!(net.seen.sizes.iter().all(|&size| size == 1460));
    assert!(net.seen.frames < 300);
    assert_eq!(net.seen.blank, net.seen.frames - 1, "all but a question for an address");
}

#[test]
fn and_cut_here_for_one_that_does_not() {
    for offer in [&[][..], &[("feature-sg", "1")], &[("feature-no-csum-offload", "1")]] {
        let mut net = Net::new(config(1), offer);
        net.transfer(4, true, 1_000_000);
        assert_eq!((net.seen.large, net.seen.longest), (0, 1514));
        let blank = if offer.iter().any(|(key, _)| key.contains("no-csum")) { 0 } else { 600 };
        assert!(net.seen.blank >= blank && (blank > 0 || net.seen.blank == 0));
    }
}

#[test]
fn over_ipv6_smoltcp_cuts_by_itself() {
    for offer in [ALL, &[]] {
        let mut net = Net::new(config(1), offer);
        net.transfer(6, true, 300_000);
        assert_eq!(net.seen.longest, 1514);
    }
}

#[test]
fn checksums_that_are_not_vouched_for_are_checked() {
    let mut net = Net::new(config(1), ALL);
    for version in [4, 6] {
        net.transfer(version, false, 300_000);
    }
    assert_eq!(net.world.nic.frontend().counters().rx.checksum, 0);
    // A backend that vouches for what is blank.
    net.blank = true;
    net.transfer(4, false, 300_000);
    // What is wrong, though nobody vouches for it, does not reach the stack.
    net.blank = false;
    let before = net.world.nic.frontend().counters().rx;
    let mut frame = vec![0; 54];
    frame[..14].copy_from_slice(&[0, 0x16, 0x3e, 0, 0, 1, 0, 0x16, 0x3e, 0, 0, 2, 8, 0]);
    frame[14..34]
        .copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
    frame[46] = 0x50;
    let packet = RxPacket {
        pieces: &[],
        len: 54,
        headroom: hypercall::PageOffset::ZERO,
        checksum: Checksum::Unverified,
        gso: None,
        hash: None,
    };
    net.give(0, &frame, packet);
    assert!(net.world.nic.receive(Instant::ZERO).is_none());
    let after = net.world.nic.frontend().counters().rx;
    assert_eq!((after.checksum, after.packets), (before.checksum + 1, before.packets + 1));
}

#[test]
fn large_packets_come_in_whole() {
    let mut net = Net::new(config(1), ALL);
    let frame: Vec<u8> = (0..60_000_u32).map(|at| at as u8).collect();
    let packet = RxPacket {
        pieces: &[],
        len: 60_000,
        headroom: hypercall::PageOffset::ZERO,
        checksum: Checksum::Blank,
        gso: Gso::new(1448, netif::slot::GsoType::TCPV6).ok(),
        hash: None,
    };
    for _ in 0..100 {
        net.give(0, &frame, packet);
        // A token that is dropped gives the packet back.
        for _ in 0..3 {
            assert!(net.world.nic.receive(Instant::ZERO).is_some());
        }
        let (token, _) = net.world.nic.receive(Instant::ZERO).unwrap();
        token.consume(|bytes| assert!(bytes == frame));
        assert!(net.world.nic.receive(Instant::ZERO).is_none());
        net.world.turn();
    }
}

#[test]
fn a_flow_stays_on_its_queue() {
    let mut net = Net::new(config(4), ALL);
    assert_eq!(net.rings.len(), 4);
    for flow in 0..12 {
        net.clock += 7;
        net.transfer(if flow % 2 == 0 { 4 } else { 6 }, flow % 3 != 0, 50_000);
    }
    let mut used: Vec<_> = net.queues.iter().map(|(_, queue)| *queue).collect();
    let mut ports: Vec<_> = net.queues.iter().map(|(port, _)| *port).collect();
    assert_eq!(ports.len(), 12);
    ports.dedup();
    assert_eq!(ports.len(), 12, "each on one queue");
    used.sort_unstable();
    used.dedup();
    assert!(used.len() > 1);
}

#[test]
fn there_is_no_token_without_room_and_none_is_lost() {
    let mut net = Net::new(config(1), ALL);
    let frame = |device: &mut NetDevice<SimHv>| {
        let token = device.transmit(Instant::ZERO)?;
        token.consume(65_535, |bytes| {
            assert_eq!(bytes.len(), 65_535);
            bytes[..12].fill(2);
            bytes[12..].fill(9);
        });
        Some(())
    };
    // 16 pages each.
    for _ in 0..15 {
        frame(&mut net.world.nic).unwrap();
    }
    assert!(frame(&mut net.world.nic).is_none());
    // Tokens not used cost nothing.
    for _ in 0..1000 {
        assert!(net.world.nic.transmit(Instant::ZERO).is_none());
    }
    let table = net.world.table.clone();
    let granted = table.granted();
    net.world.turn();
    for round in 0..40 {
        let rings = &mut net.rings[0];
        rings.tx.poll().unwrap();
        let Verdict::Packet(packet) = assemble(&mut rings.tx.requests()).unwrap().unwrap() else {
            panic!("a packet");
        };
        assert_eq!(packet.slots.len(), 16);
        for response in packet.answers.responses(TxStatus::OKAY) {
            rings.tx.push(response).unwrap();
        }
        let _ = rings.tx.publish();
        net.world.turn();
        assert!(frame(&mut net.world.nic).is_some(), "{round}");
        net.world.turn();
    }
    assert!(table.granted() <= granted + 16);
    assert_eq!(net.world.nic.frontend().counters().tx.packets, 55);
}

#[test]
fn one_notification_shows_all_of_a_poll() {
    let mut net = Net::new(config(1), ALL);
    let before = net.world.nic.frontend().counters().tx;
    for _ in 0..20 {
        let token = net.world.nic.transmit(Instant::ZERO).unwrap();
        token.consume(60, |bytes| bytes.fill(0xff));
    }
    let _ = net.rings[0].tx.arm().unwrap();
    net.world.turn();
    let after = net.world.nic.frontend().counters().tx;
    assert_eq!(after.packets - before.packets, 20);
    assert_eq!(after.publishes - before.publishes, 1);
    assert_eq!(after.notifications - before.notifications, 1);
}

#[test]
fn datagrams_have_their_sums() {
    for offer in [ALL, &[("feature-no-csum-offload", "1")]] {
        let mut net = Net::new(config(1), offer);
        let socket = || {
            let buffer =
                || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 8192]);
            udp::Socket::new(buffer(), buffer())
        };
        let (near, far) = (net.guest.sockets.add(socket()), net.far.sockets.add(socket()));
        net.guest.sockets.get_mut::<udp::Socket>(near).bind(5).unwrap();
        net.far.sockets.get_mut::<udp::Socket>(far).bind(6).unwrap();
        for version in [4, 6] {
            for len in [0_usize, 1, 2, 999, 1400] {
                let data: Vec<u8> = (0..len).map(|at| at as u8).collect();
                let socket = net.guest.sockets.get_mut::<udp::Socket>(near);
                socket.send_slice(&data, (address(version, 2), 6)).unwrap();
                // The first waits until addresses are known.
                (0..if len == 0 { 2000 } else { 4 }).for_each(|_| net.turn());
                let socket = net.far.sockets.get_mut::<udp::Socket>(far);
                let (bytes, from) = socket.recv().unwrap();
                assert_eq!(bytes, data);
                socket.send_slice(&data, from.endpoint).unwrap();
                (0..4).for_each(|_| net.turn());
                let socket = net.guest.sockets.get_mut::<udp::Socket>(near);
                assert_eq!(socket.recv().unwrap().0, data);
            }
        }
    }
}

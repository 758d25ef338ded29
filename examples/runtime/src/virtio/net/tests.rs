//! The card under netback's port, over a device in software: registers behind `Transport`, and its end of the queues.

use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::vec::Vec;

use evtchn::Upcalls;
use grant::Mapper;
use hypercall::{Instant, VcpuId};
use netback::datapath::{Arch, Facts, Nic, Policy};
use netback::switch::{Seed, SwitchLimits};
use netback::uplink::{Uplink, UplinkConfig};
use netback::{Backend, Config, Hotplug};
use sim::{DomainConfig, Sim, SimHv};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::{Error, PhysAddr};
use xenbus::client::Client;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::*;
use crate::virtio::software::{Device, Found};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const NOW: Instant = Instant(1_000_000_000);

/// The device's registers.
#[derive(Debug)]
struct Registers {
    offered: NetFeatures,
    accepted: u64,
    status: DeviceStatus,
    /// It takes the features that the driver picks.
    agrees: bool,
    /// It stops when told to.
    stops: bool,
    queues: [Option<([u64; 3], u16)>; 2],
    notified: [u64; 2],
}

#[derive(Clone, Debug)]
struct Software(Rc<RefCell<Registers>>);

impl Software {
    fn new(offered: NetFeatures) -> Self {
        Self(Rc::new(RefCell::new(Registers {
            offered,
            accepted: 0,
            status: DeviceStatus::empty(),
            agrees: true,
            stops: true,
            queues: [None; 2],
            notified: [0; 2],
        })))
    }

    fn notified(&self) -> [u64; 2] {
        self.0.borrow().notified
    }
}

impl Transport for Software {
    fn device_type(&self) -> DeviceType {
        DeviceType::Network
    }

    fn read_device_features(&mut self) -> u64 {
        self.0.borrow().offered.bits()
    }

    fn write_driver_features(&mut self, features: u64) {
        self.0.borrow_mut().accepted = features;
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        if queue < 2 { 1024 } else { 0 }
    }

    fn notify(&mut self, queue: u16) {
        self.0.borrow_mut().notified[usize::from(queue)] += 1;
    }

    fn get_status(&self) -> DeviceStatus {
        self.0.borrow().status
    }

    fn set_status(&mut self, status: DeviceStatus) {
        let mut registers = self.0.borrow_mut();
        if status.is_empty() {
            if !registers.stops {
                return;
            }
            registers.queues = [None; 2];
        }
        registers.status = status;
        if !registers.agrees {
            registers.status.remove(DeviceStatus::FEATURES_OK);
        }
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        table: PhysAddr,
        available: PhysAddr,
        used: PhysAddr,
    ) {
        let size = size.try_into().unwrap();
        self.0.borrow_mut().queues[usize::from(queue)] = Some(([table, available, used], size));
    }

    fn queue_unset(&mut self, queue: u16) {
        self.0.borrow_mut().queues[usize::from(queue)] = None;
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.0.borrow().queues[usize::from(queue)].is_some()
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::all()
    }

    fn read_config_generation(&self) -> u32 {
        0
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        T::read_from_prefix(MAC.get(offset..).unwrap())
            .map(|(value, _)| value)
            .map_err(|_| Error::ConfigSpaceTooSmall)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _: usize,
        _: T,
    ) -> Result<(), Error> {
        Err(Error::Unsupported)
    }
}

fn card(hv: &SimHv, software: &Software) -> Result<Net<SimHv, Software>, &'static str> {
    Net::new(hv, software.clone(), Interrupt, true)
}

struct World {
    software: Software,
    backend: Backend<SimHv>,
    uplink: Uplink<SimHv, Net<SimHv, Software>>,
    receive: Device,
    transmit: Device,
}

impl World {
    fn new() -> Self {
        let sim = Sim::new();
        let hv = sim.create(DomainConfig::dom0());
        let software = Software::new(NetFeatures::all() - NetFeatures::CSUM);
        let net = card(&hv, &software).unwrap();
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        let config = Config {
            max_queues: 1,
            small_buffers: NonZeroUsize::new(512).unwrap(),
            large_buffers: NonZeroUsize::new(4).unwrap(),
            hotplug: Hotplug::Switch,
            max_vifs: 1,
            switch: SwitchLimits::default(),
            seed: Seed(1, 2),
            facts: Facts::probe(&hv, Arch::Arm, false, Some(Nic { coherent: true })),
            policy: Policy::default(),
        };
        let (binder, mapper) = (upcalls.binder(), Mapper::new(&hv));
        let backend = Backend::new(&hv, binder, mapper, &mut Client::new(), config).unwrap();
        let [receive, transmit] = software.0.borrow().queues.map(|queue| {
            let (areas, size) = queue.unwrap();
            Device::new(&sim, &hv, areas, size)
        });
        let uplink = Uplink::new(net, UplinkConfig::default());
        let mut world = Self { software, backend, uplink, receive, transmit };
        world.poll();
        world
    }

    fn poll(&mut self) {
        self.uplink.card_mut().acknowledge();
        while self.uplink.poll(&mut self.backend, NOW) {}
    }

    /// The stack sends to whom nobody knows.
    fn send(&mut self, frame: &[u8]) {
        let mut packet = self.backend.packet(frame.len(), NOW).unwrap();
        packet.bytes_mut().copy_from_slice(frame);
        self.backend.send_local(packet, NOW);
    }

    /// The next frame that the device sends, its header, and the descriptor to give back.
    fn sent(&mut self) -> Option<(u16, Vec<u8>, Vec<u8>)> {
        let Found { head, parts } = self.transmit.take()?;
        assert!(parts.iter().all(|part| !part.writable));
        let mut bytes: Vec<u8> = Vec::new();
        for part in parts {
            bytes.extend(
                (0..part.len).flat_map(|at| self.transmit.read::<1>(part.address + u64::from(at))),
            );
        }
        let frame = bytes.split_off(NetHeader::LEN);
        Some((head, bytes, frame))
    }

    /// A frame comes in; the device says that it is `len` bytes with its header.
    fn arrive(&mut self, frame: &[u8], len: usize) {
        let Found { head, parts } = self.receive.take().unwrap();
        let [header, buffer] = parts[..] else { panic!("{parts:?}") };
        assert!(header.writable && buffer.writable && header.len == 12);
        self.receive.write(header.address, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        self.receive.write(buffer.address, frame);
        self.receive.give(head, len.try_into().unwrap());
    }

    fn received(&mut self) -> Option<Vec<u8>> {
        Some(self.backend.receive_local()?.bytes().to_vec())
    }
}

/// A frame to everybody, from the station with this address.
fn from(station: u8, number: u8, len: usize) -> Vec<u8> {
    let mut frame = std::vec![number; len];
    frame[..6].fill(0xff);
    frame[6..14].copy_from_slice(&[2, 0, 0, 0, 0, station, 0x88, 0xb5]);
    frame
}

/// One of the stack's.
fn frame(number: u8, len: usize) -> Vec<u8> {
    from(1, number, len)
}

/// One of somebody's outside.
fn foreign(number: u8, len: usize) -> Vec<u8> {
    from(2, number, len)
}

#[test]
fn what_a_card_must_have_and_what_is_agreed_on() {
    let sim = Sim::new();
    let hv = sim.create(DomainConfig::dom0());
    let all = NetFeatures::all();
    for (offered, offers) in [
        (all, Some(Offers::CSUM | Offers::RX_CSUM | Offers::TSO4 | Offers::TSO6)),
        // As QEMU's user network has it.
        (all - NetFeatures::CSUM, Some(Offers::RX_CSUM)),
        (NetFeatures::VERSION_1 | NetFeatures::MAC, Some(Offers::empty())),
        (NetFeatures::from_bits_retain(u64::MAX), Some(all.offers())),
        (all - NetFeatures::VERSION_1, None),
        (all - NetFeatures::MAC, None),
    ] {
        let software = Software::new(offered);
        let made = card(&hv, &software);
        assert_eq!(made.as_ref().ok().map(Card::offers), offers, "{offered:?}: {made:?}");
        if let Ok(net) = made {
            assert_eq!(net.mac(), MacAddr(MAC));
            assert_eq!(software.0.borrow().accepted, (offered & all).bits());
            assert!(software.get_status().contains(DeviceStatus::DRIVER_OK));
        }
    }
    for change in [
        (|registers: &mut Registers| registers.agrees = false) as fn(&mut Registers),
        |registers| (registers.stops, registers.status) = (false, DeviceStatus::DRIVER_OK),
    ] {
        let software = Software::new(all);
        change(&mut software.0.borrow_mut());
        assert!(card(&hv, &software).is_err());
    }
}

#[test]
fn frames_go_both_ways_whole() {
    let mut world = World::new();
    for round in 0..200_u8 {
        let len = 60 + usize::from(round) * 7;
        world.send(&frame(round, len));
        world.poll();
        let (head, header, sent) = world.sent().unwrap();
        assert_eq!(sent, frame(round, len));
        assert_eq!(header, [0; NetHeader::LEN]);
        assert_eq!(world.uplink.in_flight(), 1);
        world.transmit.give(head, 0);
        world.arrive(&foreign(round, len), len + NetHeader::LEN);
        world.poll();
        assert_eq!(world.uplink.in_flight(), 0);
        assert_eq!(world.received().unwrap(), foreign(round, len));
        assert_eq!(world.received(), None);
    }
}

#[test]
fn many_are_shown_with_one_notification() {
    let mut world = World::new();
    let [receive, transmit] = world.software.notified();
    assert_eq!((receive, transmit), (1, 0), "all buffers at once");
    for number in 0..50 {
        world.send(&frame(number, 100));
    }
    world.poll();
    assert_eq!(world.software.notified(), [1, 1]);
    let sent: Vec<_> = core::iter::from_fn(|| world.sent()).collect();
    assert_eq!(sent.len(), 50);
    // Three quarters of them go without an interrupt, then one comes.
    for (head, ..) in sent {
        world.transmit.give(head, 0);
    }
    assert_eq!(world.transmit.interrupts, 1);
    world.poll();
    assert_eq!(world.uplink.in_flight(), 0);
}

#[test]
fn a_device_that_makes_no_sense_is_reset_and_goes_on() {
    let lies: [fn(&mut World); 4] = [
        |world| world.transmit.say(999, 0),
        |world| world.receive.set_index(4000),
        |world| world.arrive(&foreign(1, 60), 4096 + 13),
        |world| {
            let (head, ..) = world.sent().unwrap();
            world.transmit.give(head, 1);
        },
    ];
    for lie in lies {
        let mut world = World::new();
        world.send(&frame(1, 60));
        world.poll();
        let posted = world.backend.pools().all().out();
        lie(&mut world);
        world.poll();
        world.poll();
        assert_eq!(world.uplink.counters().hardware.resets, 1);
        assert_eq!(world.uplink.in_flight(), 0);
        assert_eq!(world.backend.pools().all().out(), posted - 1, "buffers are back");
        world.receive = world.receive.renewed();
        world.transmit = world.transmit.renewed();
        world.send(&frame(2, 80));
        world.arrive(&foreign(3, 90), 90 + NetHeader::LEN);
        world.poll();
        assert_eq!(world.sent().unwrap().2, frame(2, 80));
        assert_eq!(world.received().unwrap(), foreign(3, 90));
    }
}

#[test]
fn a_device_that_does_not_stop_keeps_what_it_has() {
    let mut world = World::new();
    world.send(&frame(1, 60));
    world.poll();
    let free = world.backend.pools().all().free;
    world.software.0.borrow_mut().stops = false;
    world.transmit.say(999, 0);
    world.poll();
    world.poll();
    assert_eq!(world.uplink.counters().hardware.stuck, 1);
    let World { backend, uplink, .. } = world;
    assert_eq!(backend.pools().all().free, free);
    // Not even at the end: it may still write there.
    drop(uplink);
    assert_eq!(backend.pools().all().free, free);
}

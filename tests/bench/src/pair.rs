//! What is measured: `netfront` in guests and `netback` in domain 0, set up by a xenstore as everywhere, and from then on each in a
//! thread of its own.

mod set_up;

use std::hint::spin_loop;
use std::time;

use anyhow::{Result, ensure};
use evtchn::Upcalls;
use hypercall::{Instant, PAGE_SIZE};
use netback::Backend;
use netback::datapath::Datapath;
use netfront::{Frontend, Meta};
use netif::mac::MacAddr;
use xenbus::client::Client;

use crate::duel::{Control, Half, Subject};
use crate::xen::{Counts, Hv};

/// Bytes of an Ethernet, an IPv4 and a UDP header.
pub const HEADER: usize = 42;
/// Slots that may be on their way from the backend: fewer than a guest has pages posted, so that none is dropped.
const WINDOW: u64 = 192;
/// Turns between two looks at what nobody gave notice of.
const IDLE_TURNS: u32 = 256;

/// Where packets go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From a guest to the backend's own stack.
    In,
    /// From the backend's own stack to a guest.
    Out,
    /// From guest to guest. One processor runs both guests, in turns, and the other the backend.
    Across,
}

impl Way {
    pub const fn name(self) -> &'static str {
        match self {
            Self::In => "guest to backend",
            Self::Out => "backend to guest",
            Self::Across => "guest to guest",
        }
    }
}

/// What to carry, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Load {
    pub way: Way,
    /// The only datapath that is allowed beside copying; none: netback chooses.
    pub path: Option<Datapath>,
    /// Bytes of a packet.
    pub size: usize,
    /// Packets that are sent before the other end is shown any.
    pub batch: usize,
}

impl Load {
    pub fn path_name(self) -> &'static str {
        self.path.map_or("automatic", Datapath::name)
    }
}

/// A guest.
struct End {
    hv: Hv,
    nic: Frontend<Hv>,
    upcalls: Upcalls<Hv>,
    client: Client,
    mac: MacAddr,
    frame: Vec<u8>,
}

impl End {
    /// Takes its events; answers whether there were some.
    fn look(&mut self) -> bool {
        let Self { nic, upcalls, .. } = self;
        upcalls.scan(64, |port| _ = nic.on_event(port)) > 0
    }
}

/// The guests, and what one thread of theirs has to know.
struct Front {
    load: Load,
    /// The first sends, the second receives.
    guests: [End; 2],
    packet: Vec<u8>,
    arrived: u64,
    clock: Clock,
    idle: u32,
}

/// The backend, likewise.
struct Back {
    load: Load,
    hv: Hv,
    backend: Backend<Hv>,
    upcalls: Upcalls<Hv>,
    client: Client,
    to: MacAddr,
    sent: u64,
    arrived: u64,
    more: bool,
    clock: Clock,
    idle: u32,
}

/// Both, connected and warm.
pub struct Pair {
    front: Front,
    back: Back,
}

/// Nanoseconds in which the pair was at work, and a second: between two samples nothing gets old.
#[derive(Clone, Copy)]
struct Clock {
    since: time::Instant,
    from: u64,
    now: u64,
}

impl Clock {
    fn start(from: u64) -> Self {
        Self { since: time::Instant::now(), from, now: from }
    }

    fn now(&mut self) -> Instant {
        self.now = self.from + self.since.elapsed().as_nanos() as u64;
        Instant(self.now)
    }
}

impl Front {
    /// Sends and receives what can be; answers whether anything was.
    fn turn(&mut self) -> bool {
        let sends = self.load.way != Way::Out && self.send();
        let receives = self.load.way != Way::In && self.receive();
        sends || receives
    }

    fn send(&mut self) -> bool {
        let Self { guests: [guest, _], packet, load, clock, idle, .. } = self;
        let told = guest.look();
        let mut sent = 0;
        while sent < load.batch {
            match guest.nic.send(0, packet, Meta::default()) {
                Ok(()) => sent += 1,
                Err(_) => break,
            }
        }
        *idle = if sent > 0 || told { 0 } else { *idle + 1 };
        if sent > 0 || told || idle.is_multiple_of(IDLE_TURNS) {
            guest.nic.poll(&mut guest.client, clock.now());
        }
        sent > 0
    }

    fn receive(&mut self) -> bool {
        let Self { guests: [_, guest], arrived, clock, idle, .. } = self;
        let told = guest.look();
        let before = *arrived;
        while guest.nic.receive(0, &mut guest.frame).is_some() {
            *arrived += 1;
        }
        let some = *arrived != before;
        if some || told || idle.is_multiple_of(IDLE_TURNS) {
            guest.nic.poll(&mut guest.client, clock.now());
        }
        some
    }
}

impl Back {
    /// Carries what there is; answers whether there was anything. `received` is how many packets the guest has had.
    fn turn(&mut self, received: u64) -> bool {
        let Self { load, backend, upcalls, client, to, sent, arrived, more, clock, idle, .. } =
            self;
        let told = upcalls.scan(64, |port| _ = backend.on_event(port)) > 0;
        let mut some = told || *more;
        if load.way == Way::Out {
            let window = WINDOW / load.size.div_ceil(PAGE_SIZE) as u64;
            let room = window.saturating_sub(*sent - received).min(load.batch as u64);
            let now = clock.now();
            for _ in 0..room {
                let Some(mut packet) = backend.packet(load.size, now) else { break };
                if let Some(place) = packet.bytes_mut().first_chunk_mut() {
                    *place = header(OWN, *to);
                }
                backend.send_local(packet, now);
                *sent += 1;
                some = true;
            }
        }
        *idle = if some { 0 } else { *idle + 1 };
        if !some && !idle.is_multiple_of(IDLE_TURNS) {
            return false;
        }
        *more = backend.poll(client, clock.now(), |_| {});
        while let Some(packet) = backend.receive_local() {
            *arrived += 1;
            // Its pages go back by the next poll.
            *more |= packet.is_lent();
        }
        some
    }
}

/// The backend's own address.
const OWN: MacAddr = MacAddr([0, 0x16, 0x3e, 0, 2, 0]);

/// What a producer writes of each packet.
fn header(from: MacAddr, to: MacAddr) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let ethernet = to.0.into_iter().chain(from.0).chain([0x88, 0xb5]);
    for (place, byte) in header.iter_mut().zip(ethernet) {
        *place = byte;
    }
    header
}

impl Subject for Pair {
    fn halves(&mut self) -> [Half<'_>; 2] {
        let Self { front, back } = self;
        let clock = Clock::start(front.clock.now.max(back.clock.now));
        (front.clock, back.clock) = (clock, clock);
        let way = front.load.way;
        let front = move |control: &Control| {
            while !control.is_over() {
                if !front.turn() {
                    spin_loop();
                }
                if way != Way::In {
                    control.set_done(front.arrived);
                }
            }
        };
        let back = move |control: &Control| {
            while !control.is_over() {
                let received = if way == Way::Out { control.done() } else { 0 };
                if !back.turn(received) {
                    spin_loop();
                }
                if way == Way::In {
                    control.set_done(back.arrived);
                }
            }
        };
        [Box::new(front), Box::new(back)]
    }

    fn begin(&mut self) -> u64 {
        if self.front.load.way == Way::In { self.back.arrived } else { self.front.arrived }
    }

    fn step(&mut self) -> bool {
        self.front.turn();
        let received = self.front.arrived;
        self.back.turn(received);
        true
    }

    /// Nothing may have been dropped on the way, and what was to be carried in one way was.
    fn check(&self) -> Result<()> {
        for vif in self.back.backend.vifs() {
            let drops = (vif.counters.tx_drops, vif.counters.rx_drops);
            ensure!(drops == Default::default(), "packets were dropped: {drops:?}");
        }
        let Load { way, path, size, .. } = self.front.load;
        let Some(path) = path else { return Ok(()) };
        let (mut by_path, mut all) = (0, 0);
        for vif in self.back.backend.vifs() {
            let counters = vif.counters;
            let paths = if way == Way::In { counters.tx_paths } else { counters.rx_paths };
            by_path += paths.of(path).packets;
            all += Datapath::ALL.into_iter().map(|path| paths.of(path).packets).sum::<u64>();
        }
        // But for those of the first turns.
        ensure!(by_path * 10 >= all * 9, "{by_path} of {all} packets of {size} bytes by {path}");
        Ok(())
    }
}

/// What has been counted so far.
#[derive(Clone, Copy, Default)]
pub struct Reading {
    /// What domain 0 asked Xen for.
    pub backend: Counts,
    /// Notifications by the guests.
    pub front_notifications: u64,
    /// Indices shown: requests, and responses.
    pub requests: u64,
    pub responses: u64,
    pub packets: u64,
}

impl Pair {
    /// What was counted so far.
    pub fn read(&mut self) -> Reading {
        let guests = &self.front.guests;
        let fronts = guests.each_ref().map(|guest| guest.nic.counters());
        let notifications = guests.each_ref().map(|guest| guest.hv.counts().notifications);
        let vifs = self
            .back
            .backend
            .vifs()
            .map(|vif| vif.counters.tx.publishes + vif.counters.rx.publishes);
        Reading {
            backend: self.back.hv.counts(),
            front_notifications: notifications.into_iter().sum(),
            requests: fronts.iter().map(|front| front.tx.publishes + front.rx.publishes).sum(),
            responses: vifs.sum(),
            packets: self.begin(),
        }
    }

    /// Has each hypercall take so much longer from now on.
    pub fn set_hypercall_cost(&self, cost: time::Duration) {
        self.back.hv.set_cost(cost);
    }
}

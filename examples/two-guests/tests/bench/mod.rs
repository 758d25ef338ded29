//! Two guests and a backend to which a test gives every turn itself, under the greatest load that their rings let through.

mod nodes;

use std::num::NonZeroUsize;

use evtchn::Upcalls;
use grant::{GrantTable, Mapper};
use hypercall::{DomId, Handle, Hypervisor, Instant, VcpuId};
use netback::datapath::{Datapath, Datapaths, Facts, Policy};
use netback::switch::{Seed, SwitchLimits};
use netback::{Backend, Hotplug, Notice};
use netfront::{Frontend, Meta, SendError};
use netif::mac::MacAddr;
use nodes::nodes;
use sim::{DomainConfig, Sim, SimHv};
use xenbus::client::Client;
use xenbus::server::{ConnId, Quotas, Server};

const UPLINK: MacAddr = MacAddr([0, 0x16, 0x3e, 0, 2, 0]);
/// Nanoseconds between two turns.
const TICK: u64 = 10_000;

/// A guest.
pub struct End<H: Hypervisor> {
    pub hv: SimHv,
    pub nic: Frontend<H>,
    mac: MacAddr,
    frame: Vec<u8>,
    upcalls: Upcalls<H>,
    client: Client,
    conn: ConnId,
}

/// What a bench is for.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// How packets are carried: from guest 0 to guest 1, or to the uplink where that is the way's.
    pub path: Datapath,
    /// Bytes of each.
    pub size: usize,
    /// Where the indices of all rings begin.
    pub first_index: u32,
}

/// The machine. Its domains see Xen as an `H`.
pub struct Bench<H: Hypervisor> {
    pub dom0: SimHv,
    pub backend: Backend<H>,
    pub guests: [End<H>; 2],
    pub sim: Sim,
    /// Packets that arrived, and their bytes.
    pub arrived: (u64, u64),
    /// Calls of `Backend::poll` that had something to carry.
    pub polls: u64,
    packet: Vec<u8>,
    server: Server,
    toolstack: (ConnId, Client),
    upcalls: Upcalls<H>,
    client: Client,
    conn: ConnId,
    now: Instant,
    /// Told before and after the engine is at work.
    watch: fn(bool),
}

fn converse(server: &mut Server, conn: ConnId, client: &mut Client) -> bool {
    let sent = server.receive(conn, client.pending_output()).unwrap();
    client.consume_output(sent);
    let bytes = server.pending_output(conn);
    let heard = bytes.len();
    client.receive(bytes).unwrap();
    server.consume_output(conn, heard);
    sent + heard > 0
}

impl<H: Hypervisor> End<H> {
    fn new(hv: SimHv, wrap: fn(SimHv) -> H, server: &mut Server, load: Load, index: u8) -> Self {
        let own = wrap(hv.clone());
        let upcalls = Upcalls::new(&own, VcpuId(0));
        let mut client = Client::new();
        let config = netfront::Config {
            first_index: load.first_index,
            static_grants: load.path == Datapath::Static,
            ..netfront::Config::new(Handle(0))
        };
        let table = GrantTable::new(&own).unwrap();
        let nic = Frontend::new(table, upcalls.binder(), &mut client, config);
        let conn = server.introduce(hv.id());
        let mac = MacAddr([0, 0x16, 0x3e, 0, 1, index]);
        Self { hv, nic, mac, frame: Vec::with_capacity(1 << 16), upcalls, client, conn }
    }

    /// Takes its events.
    fn look(&mut self) {
        let Self { nic, upcalls, .. } = self;
        upcalls.scan(64, |port| _ = nic.on_event(port));
    }
}

impl<H: Hypervisor> Bench<H> {
    /// A machine that is connected and warm, whose domain 0 is as given, and what the backend finds out about it.
    pub fn new(
        load: Load,
        (domain, facts): (DomainConfig, Facts),
        wrap: fn(SimHv) -> H,
        watch: fn(bool),
    ) -> Self {
        let sim = Sim::new();
        let dom0 = sim.create(domain);
        let mut server = Server::new(Quotas::default());
        let mut toolstack = (server.connect(DomId(0), true), Client::new());
        let own = wrap(dom0.clone());
        let upcalls = Upcalls::new(&own, VcpuId(0));
        let mut client = Client::new();
        let buffers = |count| NonZeroUsize::new(count).unwrap();
        let config = netback::Config {
            max_queues: 1,
            small_buffers: buffers(1024),
            large_buffers: buffers(256),
            hotplug: Hotplug::Script,
            max_vifs: 4,
            switch: SwitchLimits::default(),
            seed: Seed(1, 2),
            facts,
            policy: Policy {
                allowed: Datapaths::COPY | load.path.only(),
                direct_from: 1,
                map_from: 1,
                // As many as the local port may have waiting.
                max_lent: 256,
                ..Policy::default()
            },
        };
        let mapper = Mapper::new(&own);
        let backend = Backend::new(&own, upcalls.binder(), mapper, &mut client, config).unwrap();
        let conn = server.connect(DomId(0), true);
        let guests = [0, 1].map(|index| {
            let hv = sim.create(DomainConfig::guest());
            let guest = End::new(hv, wrap, &mut server, load, index);
            toolstack.1.commit(nodes(guest.hv.id(), guest.mac));
            guest
        });
        let mut bench = Self {
            dom0,
            backend,
            guests,
            sim,
            arrived: (0, 0),
            polls: 0,
            packet: Vec::new(),
            server,
            toolstack,
            upcalls,
            client,
            conn,
            now: Instant(1_000_000_000),
            watch,
        };
        bench.warm_up(load);
        bench
    }

    fn warm_up(&mut self, load: Load) {
        for _ in 0..200 {
            self.idle();
        }
        assert!(self.guests.iter().all(|guest| guest.nic.is_connected()));
        // The switch learns who is where.
        let [first, second] = [self.guests[0].mac, self.guests[1].mac];
        let mut hello = vec![0; 60];
        hello[..6].copy_from_slice(&first.0);
        hello[6..12].copy_from_slice(&second.0);
        self.guests[1].nic.send(0, &hello, Meta::default()).unwrap();
        let mut packet = self.backend.packet(60, self.now).unwrap();
        hello[6..12].copy_from_slice(&UPLINK.0);
        packet.bytes_mut().copy_from_slice(&hello);
        self.backend.send_uplink(packet, self.now);
        self.packet = vec![0x5a; load.size];
        let to = match load.path {
            Datapath::Map | Datapath::MapIdentity => UPLINK,
            Datapath::Copy | Datapath::Direct | Datapath::Static => second,
        };
        self.packet[..6].copy_from_slice(&to.0);
        self.packet[6..12].copy_from_slice(&first.0);
        self.packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        self.idle();
        for _ in 0..2 {
            self.turn();
            // What is agreed about static pages takes many small steps.
            (0..100).for_each(|_| self.idle());
        }
        // What is under way from one turn to the next is as it will be.
        (0..2).for_each(|_| self.turn());
    }

    /// Everybody has a turn, and the store, and nothing is sent.
    fn idle(&mut self) {
        self.now = self.now.after(TICK);
        converse(&mut self.server, self.toolstack.0, &mut self.toolstack.1);
        while self.toolstack.1.poll_event().is_some() {}
        converse(&mut self.server, self.conn, &mut self.client);
        while let Some(event) = self.client.poll_event() {
            self.backend.on_store(&mut self.client, &event, self.now);
        }
        self.serve();
        for notice in self.backend.take_notices() {
            assert!(matches!(notice, Notice::Offered(_) | Notice::Connected { .. }), "{notice:?}");
        }
        converse(&mut self.server, self.conn, &mut self.client);
        for guest in &mut self.guests {
            converse(&mut self.server, guest.conn, &mut guest.client);
            guest.look();
            while let Some(event) = guest.client.poll_event() {
                guest.nic.on_store(&mut guest.client, &event, self.now);
            }
            while guest.nic.receive(0, &mut guest.frame).is_some() {}
            guest.nic.poll(&mut guest.client, self.now);
            converse(&mut self.server, guest.conn, &mut guest.client);
        }
    }

    fn serve(&mut self) {
        let Self { backend, upcalls, client, arrived, .. } = self;
        (self.watch)(true);
        let events = upcalls.scan(64, |port| _ = backend.on_event(port));
        let more = backend.poll(client, self.now, |_| {});
        while let Some(packet) = backend.receive_uplink() {
            arrived.0 += 1;
            arrived.1 += packet.len() as u64;
        }
        (self.watch)(false);
        self.polls += u64::from(more || events > 0);
    }

    /// Everybody has a turn: guest 0 sends for as long as there is room, guest 1 takes all that has come and posts its pages
    /// again.
    pub fn turn(&mut self) {
        self.now = self.now.after(TICK);
        let watch = self.watch;
        let [sender, _] = &mut self.guests;
        watch(true);
        sender.look();
        loop {
            let full = loop {
                if let Err(error) = sender.nic.send(0, &self.packet, Meta::default()) {
                    break error;
                }
            };
            assert_eq!(full, SendError::Full);
            // There may be room by now.
            if !sender.nic.poll(&mut sender.client, self.now) {
                break;
            }
        }
        watch(false);
        self.serve();
        let receiver = &mut self.guests[1];
        watch(true);
        receiver.look();
        while receiver.nic.receive(0, &mut receiver.frame).is_some() {
            self.arrived.0 += 1;
            self.arrived.1 += receiver.frame.len() as u64;
        }
        receiver.nic.poll(&mut receiver.client, self.now);
        watch(false);
    }
}

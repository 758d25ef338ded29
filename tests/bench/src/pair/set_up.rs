//! How a pair is made: a xenstore, a toolstack's nodes, and turns until packets flow.

#[path = "../../../../examples/two-guests/tests/bench/nodes.rs"]
mod nodes;

use std::num::NonZeroUsize;

use anyhow::{Context as _, Result, anyhow, ensure};
use evtchn::Upcalls;
use grant::{GrantTable, Mapper};
use hypercall::{DomId, Handle, VcpuId};
use netback::datapath::{Arch, Datapath, Datapaths, Facts, Policy};
use netback::switch::{Seed, SwitchLimits};
use netback::{Backend, Hotplug};
use netfront::{Frontend, Meta};
use netif::mac::MacAddr;
use nodes::nodes;
use xenbus::client::Client;
use xenbus::server::{ConnId, Quotas, Server};

use super::{Back, Clock, End, Front, HEADER, Load, OWN, Pair, Way, header};
use crate::duel::Subject as _;
use crate::xen::{Hv, machine};

/// Pages of domain 0, and of each guest.
const PAGES: [usize; 3] = [8192, 1024, 1024];
/// Turns in which a pair must have connected.
const TURNS: usize = 2000;

/// The store, and who is connected to it: the toolstack, domain 0, the guests.
struct Store {
    server: Server,
    toolstack: (ConnId, Client),
    back: ConnId,
    guests: [ConnId; 2],
}

fn converse(server: &mut Server, conn: ConnId, client: &mut Client) -> Result<()> {
    let sent = server.receive(conn, client.pending_output());
    client.consume_output(sent.map_err(|error| anyhow!("the store: {error:?}"))?);
    let bytes = server.pending_output(conn);
    let heard = bytes.len();
    client.receive(bytes).map_err(|error| anyhow!("a store client: {error:?}"))?;
    server.consume_output(conn, heard);
    Ok(())
}

impl End {
    fn new(hv: Hv, load: Load, mac: MacAddr) -> Result<Self> {
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        let mut client = Client::new();
        let config = netfront::Config {
            static_grants: matches!(load.path, None | Some(Datapath::Static)),
            ..netfront::Config::new(Handle(0))
        };
        let table = GrantTable::new(&hv)?;
        let nic = Frontend::new(table, upcalls.binder(), &mut client, config);
        Ok(Self { hv, nic, upcalls, client, mac, frame: Vec::with_capacity(1 << 16) })
    }
}

fn policy(load: Load) -> Policy {
    let max_lent = 256;
    match load.path {
        // Netback's own choice, but for how much may be on its way.
        None => Policy { max_lent, ..Policy::default() },
        Some(path) => Policy {
            allowed: Datapaths::COPY | path.only(),
            direct_from: 1,
            map_from: 1,
            max_lent,
            ..Policy::default()
        },
    }
}

fn config(load: Load) -> netback::Config {
    let buffers = |count| NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN);
    netback::Config {
        max_queues: 1,
        small_buffers: buffers(512),
        large_buffers: buffers(192),
        hotplug: Hotplug::Script,
        max_vifs: 4,
        switch: SwitchLimits::default(),
        seed: Seed(1, 2),
        facts: Facts {
            arch: Arch::X86,
            grant_copy: true,
            cache_flush: false,
            iommu_maps: false,
            uplink: None,
        },
        policy: policy(load),
    }
}

impl Pair {
    /// A pair that is connected and warm.
    pub fn new(load: Load) -> Result<Self> {
        ensure!(load.size >= 64, "a packet has 64 bytes at least");
        let [hv, first, second] = machine(PAGES);
        let clock = Clock::start(1_000_000_000);
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        let mut client = Client::new();
        let mapper = Mapper::new(&hv);
        let backend = Backend::new(&hv, upcalls.binder(), mapper, &mut client, config(load))?;
        let mac = |index| MacAddr([0, 0x16, 0x3e, 0, 1, index]);
        let guests = [End::new(first, load, mac(0))?, End::new(second, load, mac(1))?];
        let mut server = Server::new(Quotas::default());
        let mut toolstack = (server.connect(DomId(0), true), Client::new());
        for guest in &guests {
            toolstack.1.commit(nodes(guest.hv.id(), guest.mac));
        }
        let conn = server.connect(DomId(0), true);
        let conns = guests.each_ref().map(|guest| server.introduce(guest.hv.id()));
        let mut store = Store { server, toolstack, back: conn, guests: conns };
        let to = if load.way == Way::In { OWN } else { mac(1) };
        let mut packet = vec![0x5a; load.size];
        packet.splice(..HEADER, header(mac(0), to));
        let (sent, arrived, idle, more) = (0, 0, 0, false);
        let front = Front { load, guests, packet, arrived, clock, idle };
        let back =
            Back { load, hv, backend, upcalls, client, to, sent, arrived, more, clock, idle };
        let mut pair = Self { front, back };
        pair.connect(&mut store)?;
        Ok(pair)
    }

    fn connect(&mut self, store: &mut Store) -> Result<()> {
        for _ in 0..TURNS {
            self.idle(store)?;
        }
        let connected = self.front.guests.iter().all(|guest| guest.nic.is_connected());
        ensure!(connected, "the guests have not connected");
        // The switch learns who is where.
        let Front { guests, clock, .. } = &mut self.front;
        let everybody = MacAddr([0xff; 6]);
        for guest in guests {
            let mut hello = vec![0; 60];
            hello.splice(..HEADER, header(guest.mac, everybody));
            guest.nic.send(0, &hello, Meta::default()).map_err(|error| anyhow!("{error}"))?;
            guest.nic.poll(&mut guest.client, clock.now());
        }
        let mut packet = self.back.backend.packet(60, clock.now()).context("no buffer")?;
        if let Some(place) = packet.bytes_mut().first_chunk_mut() {
            *place = header(OWN, everybody);
        }
        self.back.backend.send_local(packet, clock.now());
        for _ in 0..20 {
            self.idle(store)?;
        }
        (self.front.arrived, self.back.arrived) = (0, 0);
        // What is agreed about static pages takes many small steps, and begins when pages are first used.
        for _ in 0..8 {
            for _ in 0..20 {
                self.step();
            }
            (0..200).try_for_each(|_| self.idle(store))?;
        }
        Ok(())
    }

    /// Everybody has a turn, and the store, and nothing is sent.
    fn idle(&mut self, store: &mut Store) -> Result<()> {
        let Store { server, toolstack, back: back_conn, guests: conns } = store;
        converse(server, toolstack.0, &mut toolstack.1)?;
        while toolstack.1.poll_event().is_some() {}
        let Back { backend, upcalls, client, clock, arrived, .. } = &mut self.back;
        let now = clock.now();
        converse(server, *back_conn, client)?;
        while let Some(event) = client.poll_event() {
            backend.on_store(client, &event, now);
        }
        upcalls.scan(64, |port| _ = backend.on_event(port));
        backend.poll(client, now, |_| {});
        while backend.receive_local().is_some() {
            *arrived += 1;
        }
        converse(server, *back_conn, client)?;
        for (guest, conn) in self.front.guests.iter_mut().zip(conns) {
            converse(server, *conn, &mut guest.client)?;
            guest.look();
            while let Some(event) = guest.client.poll_event() {
                guest.nic.on_store(&mut guest.client, &event, now);
            }
            while guest.nic.receive(0, &mut guest.frame).is_some() {
                self.front.arrived += 1;
            }
            guest.nic.poll(&mut guest.client, now);
            converse(server, *conn, &mut guest.client)?;
        }
        Ok(())
    }
}

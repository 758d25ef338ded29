//! A domain's connection to the store, by the ring that its toolstack set up.

use evtchn::{Binder, Channel, Eoi, Work};
use grant::SharedMemory;
use hypercall::{Errno, Hypervisor, Instant, Port};
use xenbus::client::Client;
use xenbus::ring::{ClientEnd, StoreRing};
use xenbus::wire::interface::FEATURE_RECONNECTION;

/// Nanoseconds between two looks at a ring that is not connected: who connects it need not say so.
const LOOK: u64 = 100_000_000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Bytes flow.
    Connected,
    /// The server has not taken up the ring yet, or is about to reset it.
    Waiting,
    /// It is broken, and the server cannot mend it.
    Lost,
}

/// A client of the store, over a ring in a page of kind `M`.
pub struct Connection<H: Hypervisor, M: SharedMemory> {
    client: Client,
    ring: StoreRing<M, ClientEnd>,
    channel: Channel<H>,
    state: State,
    /// An event came, and its channel is still masked.
    event: bool,
    next_look: Instant,
}

impl<H: Hypervisor, M: SharedMemory> Connection<H, M> {
    /// A connection by the ring in `page`, whose other end is told by `port`; the toolstack has bound that already.
    ///
    /// # Errors
    /// The port cannot be had.
    pub fn new(binder: &Binder<H>, page: M, port: Port) -> Result<Self, Errno> {
        Ok(Self {
            client: Client::new(),
            ring: StoreRing::attach(page),
            channel: binder.adopt(port)?,
            // Found out by the first poll.
            state: State::Waiting,
            event: false,
            next_look: Instant(0),
        })
    }

    /// The client, whose bytes [`poll`](Self::poll) moves.
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// What the client has put up with.
    #[must_use]
    pub fn stats(&self) -> xenbus::client::Stats {
        self.client.stats()
    }

    /// Whether bytes flow.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.state == State::Connected
    }

    /// Takes an event, if it is the ring's.
    pub fn on_event(&mut self, port: Port) -> bool {
        let own = self.channel.port() == port;
        self.event |= own;
        own
    }

    /// Moves what can be moved. To be called after events, and after the client was asked for anything. Says whether
    /// anything moved, so that the client may have events.
    pub fn poll(&mut self, now: Instant) -> bool {
        if self.state == State::Waiting && self.ring.is_connected() {
            self.ring.attach_again();
            self.state = State::Connected;
        }
        let mut moved = false;
        if self.state == State::Connected {
            match self.ring.exchange(&mut self.client) {
                Ok(bytes) => moved = bytes.notify(),
                Err(error) => {
                    log::error!("store: {error}");
                    self.break_off();
                    moved = true;
                }
            }
        }
        if moved && let Err(error) = self.channel.notify() {
            log::error!("store: cannot notify: {error}");
        }
        if core::mem::take(&mut self.event) {
            // The server notifies for bytes that were taken before, too: none of it is spurious.
            let (Eoi::Open | Eoi::Throttled(_)) = self.channel.eoi(Work::Done, now);
        }
        self.next_look = now.after(LOOK);
        moved
    }

    /// When to poll though no event comes.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        (self.state == State::Waiting).then_some(self.next_look)
    }

    /// The ring of the domain's new life, after a suspend that was not cancelled. What was asked is answered by
    /// [`Error::Disconnected`](xenbus::client::Error::Disconnected), and watches fire again.
    ///
    /// # Errors
    /// The port cannot be had; there is no store then.
    pub fn resumed(&mut self, binder: &Binder<H>, page: M, port: Port) -> Result<(), Errno> {
        self.client.reconnect();
        self.channel = binder.adopt(port)?;
        self.ring = StoreRing::attach(page);
        self.state = State::Waiting;
        self.event = false;
        Ok(())
    }

    fn break_off(&mut self) {
        self.client.reconnect();
        if self.ring.server_features() & FEATURE_RECONNECTION != 0 {
            self.ring.request_reset();
            self.state = State::Waiting;
        } else {
            log::error!("store: the connection is lost for good");
            self.state = State::Lost;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::vec::Vec;

    use evtchn::Upcalls;
    use grant::{GrantTable, GrantedPage, MapRequest, Mapper, Mapping};
    use hypercall::{DomId, VcpuId};
    use sim::{DomainConfig, Sim, SimHv};
    use xenbus::client::{Event, Outcome};
    use xenbus::ring::ServerEnd;
    use xenbus::server::{ConnId, Quotas, Server};

    use super::*;

    /// The page of the ring, as the guest sees it.
    #[derive(Clone)]
    struct Page(Arc<GrantedPage<SimHv>>);

    impl SharedMemory for Page {
        fn load_u32(&self, offset: usize, order: core::sync::atomic::Ordering) -> u32 {
            self.0.page().load_u32(offset, order)
        }
        fn store_u32(&self, offset: usize, value: u32, order: core::sync::atomic::Ordering) {
            self.0.page().store_u32(offset, value, order);
        }
        fn fence(&self) {
            self.0.page().fence();
        }
        fn read_bytes(&self, offset: usize, to: &mut [u8]) {
            self.0.page().read_bytes(offset, to);
        }
        fn write_bytes(&self, offset: usize, from: &[u8]) {
            self.0.page().write_bytes(offset, from);
        }
    }

    type Ring = StoreRing<Mapping<SimHv>, ServerEnd>;

    /// A domain, and the store in dom0.
    struct World {
        table: GrantTable<SimHv>,
        upcalls: Upcalls<SimHv>,
        dom0_upcalls: Upcalls<SimHv>,
        mapper: Mapper<SimHv>,
        server: Server,
        conn: ConnId,
        ring: Option<(Ring, Channel<SimHv>)>,
        now: Instant,
    }

    impl World {
        fn new() -> Self {
            let sim = Sim::new();
            let (dom0, guest) =
                (sim.create(DomainConfig::dom0()), sim.create(DomainConfig::guest()));
            let mut server = Server::new(Quotas::default());
            Self {
                table: GrantTable::new(&guest).unwrap(),
                upcalls: Upcalls::new(&guest, VcpuId(0)),
                dom0_upcalls: Upcalls::new(&dom0, VcpuId(0)),
                mapper: Mapper::new(&dom0),
                conn: server.introduce(guest.id()),
                server,
                ring: None,
                now: Instant(0),
            }
        }

        /// A ring as a toolstack makes it: the page, and a port that is bound on our side.
        fn ring(&mut self) -> (Page, Port) {
            let page = Page(Arc::new(self.table.share(DomId(0), false).unwrap()));
            let channel = self.upcalls.binder().alloc_unbound(DomId(0)).unwrap();
            let port = channel.port();
            // Nobody in the guest has it: the toolstack made it.
            core::mem::forget(channel);
            let theirs = self.dom0_upcalls.binder().bind_interdomain(DomId(1), port).unwrap();
            let gref = page.0.gref();
            let request = MapRequest { domain: DomId(1), gref, read_only: false };
            let ring = StoreRing::attach(self.mapper.map(request).unwrap());
            self.ring = Some((ring, theirs));
            (page, port)
        }

        fn connect(&mut self, features: u32) {
            let (ring, channel) = self.ring.as_mut().unwrap();
            ring.reset();
            ring.offer(features);
            channel.notify().unwrap();
        }

        fn serve(&mut self) {
            let Some((ring, channel)) = &mut self.ring else { return };
            if !ring.is_connected() {
                return;
            }
            self.dom0_upcalls.scan(64, |_| ());
            let mut buffer = [0; 1024];
            while let Ok(count @ 1..) = ring.read(&mut buffer) {
                self.server.receive(self.conn, &buffer[..count]).unwrap();
            }
            let written = ring.write(self.server.pending_output(self.conn)).unwrap_or(0);
            self.server.consume_output(self.conn, written);
            channel.notify().unwrap();
            let _ = channel.eoi(Work::Done, self.now);
        }

        fn events(&mut self, connection: &mut Connection<SimHv, Page>) -> Vec<Event> {
            let mut events = Vec::new();
            for _ in 0..20 {
                self.now = self.now.after(1_000_000);
                self.upcalls.scan(64, |port| assert!(connection.on_event(port)));
                connection.poll(self.now);
                self.serve();
                events.extend(core::iter::from_fn(|| connection.client().poll_event()));
            }
            events
        }
    }

    fn is_read(event: &Event) -> bool {
        matches!(event, Event::Done { result: Ok(Outcome::Values(_)), .. })
    }

    #[test]
    fn what_is_asked_before_the_ring_is_connected_is_answered_after() {
        let mut world = World::new();
        let (page, port) = world.ring();
        page.store_u32(2068, 1, core::sync::atomic::Ordering::Relaxed);
        let mut connection = Connection::new(&world.upcalls.binder(), page, port).unwrap();
        connection.client().read_many(["domid"]);
        assert_eq!(world.events(&mut connection), []);
        assert!(!connection.is_connected() && connection.deadline().is_some());
        world.connect(0);
        let events = world.events(&mut connection);
        assert!(matches!(events.as_slice(), [event] if is_read(event)), "{events:?}");
        assert_eq!(connection.deadline(), None);
    }

    #[test]
    fn a_broken_ring_is_reset_where_the_server_can() {
        for (features, mended) in [(FEATURE_RECONNECTION, true), (0, false)] {
            let mut world = World::new();
            let (page, port) = world.ring();
            let mut connection =
                Connection::new(&world.upcalls.binder(), page.clone(), port).unwrap();
            world.connect(features);
            let watch = connection.client().watch("domid");
            assert_eq!(world.events(&mut connection).len(), 1);
            // An index of the server's that cannot be.
            page.store_u32(2060, 0x8000_0000, core::sync::atomic::Ordering::Relaxed);
            connection.poll(world.now);
            assert!(!connection.is_connected());
            let (ring, _) = world.ring.as_ref().unwrap();
            assert_eq!(ring.is_connected(), !mended, "asked for a reset");
            if mended {
                world.server.disconnect(world.conn);
                world.conn = world.server.introduce(DomId(1));
                world.connect(features);
                let events = world.events(&mut connection);
                let path = "domid".into();
                assert_eq!(events, [Event::Watch { watch, path }], "watches fire again");
            } else {
                assert_eq!(connection.deadline(), None);
            }
        }
    }

    #[test]
    fn after_a_resume_all_goes_by_the_new_ring() {
        let mut world = World::new();
        let (page, port) = world.ring();
        let mut connection = Connection::new(&world.upcalls.binder(), page, port).unwrap();
        world.connect(0);
        let watch = connection.client().watch("domid");
        assert_eq!(world.events(&mut connection).len(), 1);
        world.server.disconnect(world.conn);
        world.conn = world.server.introduce(DomId(1));
        let (page, port) = world.ring();
        connection.resumed(&world.upcalls.binder(), page, port).unwrap();
        let events = world.events(&mut connection);
        assert_eq!(events, [Event::Watch { watch, path: "domid".into() }]);
        connection.client().read_many(["domid"]);
        assert!(world.events(&mut connection).iter().all(is_read));
    }
}

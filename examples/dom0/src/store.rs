//! The store that this dom0 serves: its own connection, and a ring for each guest.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use evtchn::{Binder, Channel, Eoi, Work};
use grant::{ForeignPage, MapError, SharedMemory};
use hypercall::abi::hvm_param;
use hypercall::{DomId, Errno, Gfn, Instant, PAGE_SIZE, Port, Toolstack};
use runtime::Hv;
use xenbus::client::Client;
use xenbus::ring::{BadIndex, ServerEnd, StoreRing};
use xenbus::server::{ConnId, Fault, Quotas, Server};
use xenbus::wire::interface;

/// Where Xen's tools put a dom0less guest's store page: `GUEST_MAGIC_BASE` (arch-arm.h) and `XENSTORE_PFN_OFFSET`.
const STORE_FRAME: Gfn = Gfn(0x39001);
/// Rounds of reading and answering in which a single guest is served before the others have their turn.
const ROUNDS: usize = 8;
/// Nanoseconds after which a ring is looked at though no event came. Linux's client (xenbus_comms.c, `xb_write`) moves its
/// index and looks at ours with no barrier between the two, so it may take us for busy when we have just gone to sleep, and
/// then waits for ever.
const LOOK: u64 = 1_000_000_000;

/// Why a guest could not be joined to the store.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    /// It was built without `xen,enhanced`: it has no port to the store.
    #[error("it has no store port: build it with xen,enhanced")]
    NoPort,
    /// A hypercall failed.
    #[error("{what}: {error}")]
    Call {
        /// Which.
        what: &'static str,
        /// How.
        error: Errno,
    },
    /// Its page could not be mapped.
    #[error("mapping its store page: {0}")]
    Map(#[from] MapError),
}

/// A guest's ring, and what it is connected to.
struct Guest {
    ring: StoreRing<ForeignPage<Hv>, ServerEnd>,
    channel: Channel<Hv>,
    conn: ConnId,
    /// Bytes off the ring that the server has not taken yet.
    input: Vec<u8>,
    /// An event came, and its channel is still masked.
    event: bool,
    ready: bool,
    /// When it is looked at, whether an event comes or not.
    look: Instant,
}

/// The store's server and all that is connected to it.
pub(crate) struct Store {
    hv: Hv,
    pub(crate) server: Server,
    pub(crate) client: Client,
    own: ConnId,
    guests: BTreeMap<DomId, Guest>,
    faults: BTreeMap<DomId, u64>,
}

impl Store {
    pub(crate) fn new(hv: Hv) -> Self {
        let mut server = Server::new(Quotas::default());
        let own = server.connect(DomId(0), true);
        let (guests, faults) = (BTreeMap::new(), BTreeMap::new());
        Self { hv, server, client: Client::new(), own, guests, faults }
    }

    /// Connections that were ended because of what their domain wrote into its ring.
    pub(crate) fn faults(&self) -> impl Iterator<Item = (DomId, u64)> {
        self.faults.iter().map(|(domain, count)| (*domain, *count))
    }

    /// The port by which Xen wants a guest's store served.
    pub(crate) fn port_of(hv: &Hv, domain: DomId) -> Result<Port, JoinError> {
        let port = hv
            .hvm_param(domain, hvm_param::STORE_EVTCHN)
            .map_err(|error| JoinError::Call { what: "reading its store port", error })?;
        u32::try_from(port).ok().filter(|port| *port != 0).map(Port).ok_or(JoinError::NoPort)
    }

    /// Gives a guest its ring. What the guest is to find in the store must be there already.
    pub(crate) fn join(
        &mut self,
        domain: DomId,
        binder: &Binder<Hv>,
        now: Instant,
    ) -> Result<(), JoinError> {
        let call = |what| move |error| JoinError::Call { what, error };
        let port = Self::port_of(&self.hv, domain)?;
        self.hv.populate(domain, STORE_FRAME).map_err(call("giving it a store page"))?;
        let page = ForeignPage::map(&self.hv, domain, STORE_FRAME)?;
        page.write_bytes(0, &[0; PAGE_SIZE]);
        let mut ring = StoreRing::attach(page);
        ring.reset();
        self.hv
            .set_hvm_param(domain, hvm_param::STORE_PFN, STORE_FRAME.0)
            .map_err(call("telling it where its store page is"))?;
        let channel =
            binder.bind_interdomain(domain, port).map_err(call("binding its store port"))?;
        let conn = self.server.introduce(domain);
        channel.notify().map_err(call("waking it"))?;
        self.guests.insert(
            domain,
            Guest { ring, channel, conn, input: Vec::new(), event: false, ready: true, look: now },
        );
        Ok(())
    }

    /// Lets go of a guest's ring, and of all that the store held for it.
    pub(crate) fn leave(&mut self, domain: DomId) {
        self.guests.remove(&domain);
        self.server.domain_gone(domain);
    }

    /// Takes an event, if it is one of a store ring's.
    pub(crate) fn on_event(&mut self, port: Port) -> bool {
        let guest = self.guests.values_mut().find(|guest| guest.channel.port() == port);
        guest.map(|guest| (guest.event, guest.ready) = (true, true)).is_some()
    }

    /// Moves bytes between all rings, our own client and the server. Answers whether there is more to do at once.
    pub(crate) fn poll(&mut self, now: Instant) -> bool {
        let mut more = self.poll_own();
        for (domain, guest) in &mut self.guests {
            let waiting = !self.server.pending_output(guest.conn).is_empty();
            if !guest.ready && !waiting && now < guest.look {
                guest.channel.open_if_due(now);
                continue;
            }
            guest.look = now.after(LOOK);
            match guest.serve(&mut self.server) {
                Ok(Served { moved, more: again }) => {
                    more |= again;
                    guest.ready = again;
                    if guest.event && !again {
                        guest.event = false;
                        let work = if moved { Work::Done } else { Work::Spurious };
                        let (Eoi::Open | Eoi::Throttled(_)) = guest.channel.eoi(work, now);
                    }
                }
                Err(fault) => {
                    log::warn!("domain {domain}: {fault}; its store is not served any more");
                    *self.faults.entry(*domain).or_default() += 1;
                    guest.ready = false;
                    guest.ring.report(fault.interface_error());
                    let _ = guest.channel.notify();
                    // Its port stays masked: there is nothing to hear from it.
                    guest.look = Instant(u64::MAX);
                }
            }
        }
        more |= self.poll_own();
        // Nobody but ourselves is privileged, and we join guests by our own doing.
        while self.server.take_action().is_some() {}
        more
    }

    /// When [`poll`](Self::poll) is to be called though no event comes.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let due = |guest: &Guest| guest.channel.throttled_until().into_iter().chain([guest.look]);
        self.guests.values().flat_map(due).min()
    }

    /// Everything our own client has to say and to hear.
    fn poll_own(&mut self) -> bool {
        for _ in 0..ROUNDS {
            let Self { server, client, own, .. } = self;
            let sent = server.receive(*own, client.pending_output()).unwrap_or(0);
            client.consume_output(sent);
            let bytes = server.pending_output(*own);
            let heard = bytes.len();
            // A fault would be the server's own; the client has logged it and is dead.
            let _ = client.receive(bytes);
            server.consume_output(*own, heard);
            if sent == 0 && heard == 0 {
                return false;
            }
        }
        true
    }
}

/// Why a guest's ring is not served any more.
#[derive(Debug, thiserror::Error)]
enum Broken {
    /// Its indices make no sense.
    #[error(transparent)]
    Ring(#[from] BadIndex),
    /// What came by it makes no sense.
    #[error(transparent)]
    Stream(#[from] Fault),
}

impl Broken {
    fn interface_error(&self) -> u32 {
        match self {
            Self::Ring(_) => interface::ERROR_RINGIDX,
            Self::Stream(fault) => fault.interface_error(),
        }
    }
}

struct Served {
    moved: bool,
    more: bool,
}

impl Guest {
    fn serve(&mut self, server: &mut Server) -> Result<Served, Broken> {
        let mut moved = false;
        if !self.ring.is_connected() {
            server.reset(self.conn);
            self.input.clear();
            self.ring.reset();
            moved = true;
        }
        let mut more = true;
        for _ in 0..ROUNDS {
            let mut step = 0;
            let output = server.pending_output(self.conn);
            let written = self.ring.write(output)?;
            server.consume_output(self.conn, written);
            step += written;
            if self.input.is_empty() && server.wants_input(self.conn) {
                let mut bytes = [0; 1024];
                let read = self.ring.read(&mut bytes)?;
                self.input.extend_from_slice(bytes.get(..read).unwrap_or_default());
                step += read;
            }
            // The server stops when too many replies wait; what it leaves is for the next round.
            let taken = server.receive(self.conn, &self.input)?;
            self.input.drain(..taken);
            step += taken;
            if step == 0 {
                more = false;
                break;
            }
            moved = true;
        }
        if moved {
            let _ = self.channel.notify();
        }
        Ok(Served { moved, more })
    }
}

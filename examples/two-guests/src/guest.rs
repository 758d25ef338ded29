//! A guest: a domain with a frontend, and what runs on it.

use std::net::Ipv4Addr;

use evtchn::Upcalls;
use grant::GrantTable;
use hypercall::{DomId, Errno, Handle, Instant, VcpuId};
use netfront::device::{NetDevice, RxToken, TxToken};
use netfront::{Frontend, Meta, Notice};
use netif::keys::Features;
use netif::mac::MacAddr;
use sim::{DomainConfig, SimHv};
use smoltcp::phy::{Device, DeviceCapabilities};
use smoltcp::time;
use xenbus::client::Client;
use xenbus::server::{ConnId, Server};

use crate::host::Host;
use crate::tcp::Tcp;
use crate::wire::Wire;

/// How a guest is made.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Its domain.
    pub domain: DomainConfig,
    /// Its frontend.
    pub frontend: netfront::Config,
    /// The toolstack's limit on what it may send: bytes, comma, microseconds.
    pub rate: Option<String>,
    /// The largest frame that it sends. More than 1,514 bytes needs scatter-gather.
    pub max_frame: usize,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self {
            domain: DomainConfig::guest(),
            frontend: netfront::Config::new(Handle(0)),
            rate: None,
            max_frame: 1514,
        }
    }
}

impl GuestConfig {
    /// A guest that is quickly made, for those who make many: few pages with the backend.
    #[must_use]
    pub fn small() -> Self {
        let frontend = netfront::Config { posted: 64, ..netfront::Config::new(Handle(0)) };
        Self { frontend, ..Self::default() }
    }
}

/// One life of a guest.
pub struct Guest {
    /// Its domain's own view of Xen.
    pub hv: SimHv,
    /// Its grant table.
    pub table: GrantTable<SimHv>,
    /// Its interface.
    pub nic: NetDevice<SimHv>,
    /// What runs in it.
    pub host: Host,
    /// What its interface said.
    pub notices: Vec<Notice>,
    pub(crate) config: GuestConfig,
    pub(crate) mac: MacAddr,
    upcalls: Upcalls<SimHv>,
    client: Client,
    conn: ConnId,
}

/// What moved between a store client and the store.
pub(crate) fn converse(server: &mut Server, conn: ConnId, client: &mut Client) -> bool {
    let sent = match server.receive(conn, client.pending_output()) {
        Ok(sent) => sent,
        // The server has closed a connection that talked nonsense: there is no more to say.
        Err(_) => return false,
    };
    client.consume_output(sent);
    let bytes = server.pending_output(conn);
    let heard = bytes.len();
    let understood = client.receive(bytes);
    server.consume_output(conn, heard);
    debug_assert!(understood.is_ok(), "the store talks nonsense");
    sent + heard > 0
}

/// A guest's interface, with what of its set-up matters to applications.
struct Nic<'a> {
    device: &'a mut NetDevice<SimHv>,
    mac: MacAddr,
    max_frame: usize,
}

impl Device for Nic<'_> {
    type RxToken<'a>
        = RxToken<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = TxToken<'a, SimHv>
    where
        Self: 'a;

    fn receive(&mut self, now: time::Instant) -> Option<(RxToken<'_>, TxToken<'_, SimHv>)> {
        self.device.receive(now)
    }

    fn transmit(&mut self, now: time::Instant) -> Option<TxToken<'_, SimHv>> {
        self.device.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.device.capabilities()
    }
}

impl Wire for Nic<'_> {
    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn max_frame(&self) -> usize {
        self.max_frame
    }

    fn segments(&self) -> bool {
        self.device.frontend().features().contains(Features::SG | Features::GSO_TCPV4)
    }

    fn send(&mut self, flow: u16, frame: &[u8], meta: Meta) -> bool {
        let nic = self.device.frontend_mut();
        let queue = usize::from(flow).checked_rem(nic.queues());
        queue.is_some_and(|queue| nic.send(queue, frame, meta).is_ok())
    }
}

impl Guest {
    pub(crate) fn new(
        hv: SimHv,
        server: &mut Server,
        config: GuestConfig,
        mac: MacAddr,
        host: Host,
    ) -> Result<Self, Errno> {
        let table = GrantTable::new(&hv)?;
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        let mut client = Client::new();
        let nic = Frontend::new(table.clone(), upcalls.binder(), &mut client, config.frontend);
        Ok(Self {
            conn: server.introduce(hv.id()),
            nic: NetDevice::new(nic),
            table,
            upcalls,
            client,
            host,
            notices: Vec::new(),
            config,
            mac,
            hv,
        })
    }

    /// Its domain.
    #[must_use]
    pub fn id(&self) -> DomId {
        self.hv.id()
    }

    /// Gives it TCP.
    pub(crate) fn with_tcp(&mut self, address: Ipv4Addr, now: Instant) -> &mut Tcp {
        let Self { nic: device, mac, config, host, .. } = self;
        host.with_tcp(&mut Nic { device, mac: *mac, max_frame: config.max_frame }, address, now)
    }

    /// Whether both ends agree that packets flow.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.nic.frontend().is_connected()
    }

    /// Ends its connection, and stays so until [`open`](Self::open).
    pub fn close(&mut self, now: Instant) {
        self.nic.frontend_mut().close(&mut self.client, now);
    }

    /// Wants a connection again.
    pub fn open(&mut self) {
        self.nic.frontend_mut().open(&mut self.client);
    }

    pub(crate) fn store(&mut self) -> (ConnId, &mut Client) {
        (self.conn, &mut self.client)
    }

    /// Its virtual CPU runs once. Answers whether it found anything to do.
    pub(crate) fn turn(&mut self, server: &mut Server, now: Instant) -> bool {
        let mut some = converse(server, self.conn, &mut self.client);
        let Self { nic: device, upcalls, client, host, .. } = self;
        let nic = device.frontend_mut();
        some |= upcalls.scan(64, |port| {
            nic.on_event(port);
        }) > 0;
        while let Some(event) = client.poll_event() {
            nic.on_store(client, &event, now);
            some = true;
        }
        if nic.is_connected() {
            let (mac, max_frame) = (self.mac, self.config.max_frame);
            some |= host.turn(&mut Nic { device, mac, max_frame }, now);
        }
        let nic = device.frontend_mut();
        some |= nic.poll(client, now);
        let before = self.notices.len();
        self.notices.extend(nic.take_notices());
        some |= self.notices.len() != before;
        some | converse(server, self.conn, &mut self.client)
    }

    pub(crate) fn deadline(&mut self, now: Instant) -> Option<Instant> {
        let host = self.host.deadline(now);
        self.nic.frontend().deadline().into_iter().chain(host).min()
    }
}

//! The network interface, whichever the toolstack gives us: vifs come and go, and this stays.

use alloc::string::String;
use alloc::vec::Vec;

use evtchn::Binder;
use grant::GrantTable;
use hypercall::{Handle, Hypervisor, Instant, Port};
use netfront::device::{NetDevice, RxToken, TxToken};
use netfront::{Config, Counters, Frontend, Notice};
use netif::mac::MacAddr;
use smoltcp::phy::{Device, DeviceCapabilities};
use smoltcp::time;
use xenbus::client::{Client, Event, JobId, Outcome, WatchId};
use xenbus::device::parse_u32;

/// Where the toolstack puts vifs.
const VIFS: &str = "device/vif";

/// The first vif there is, if there is any.
pub struct Nic<H: Hypervisor> {
    table: GrantTable<H>,
    binder: Binder<H>,
    /// Queues at most.
    queues: u16,
    watch: WatchId,
    listing: Option<JobId>,
    /// Something changed since the last look at the list began.
    dirty: bool,
    vif: Option<Vif<H>>,
    /// Vifs that are left alone.
    others: Vec<u32>,
    /// Of vifs that were taken away.
    ended: Counters,
    /// Times that a connection came about.
    connections: u64,
}

struct Vif<H: Hypervisor> {
    handle: Handle,
    device: NetDevice<H>,
}

impl<H: Hypervisor> Nic<H> {
    /// None so far; vifs are looked for from now on.
    #[must_use]
    pub fn new(table: GrantTable<H>, binder: Binder<H>, client: &mut Client, queues: u16) -> Self {
        Self {
            table,
            binder,
            queues,
            watch: client.watch(VIFS),
            listing: None,
            dirty: false,
            vif: None,
            others: Vec::new(),
            ended: Counters::default(),
            connections: 0,
        }
    }

    /// Takes an event of one of its ports.
    pub fn on_event(&mut self, port: Port) -> bool {
        self.frontend_mut().is_some_and(|frontend| frontend.on_event(port))
    }

    /// Takes an event of the store client, if it is about vifs.
    pub fn on_store(&mut self, client: &mut Client, event: &Event, now: Instant) -> bool {
        let own = match event {
            Event::Watch { watch, path } if *watch == self.watch => {
                // Whatever vifs themselves write there is no news to the list.
                self.dirty |= !is_below_a_vif(path);
                true
            }
            Event::Done { job, result } if self.listing == Some(*job) => {
                self.listing = None;
                match result {
                    Ok(Outcome::Names(names)) => {
                        self.choose(client, names.as_deref().unwrap_or_default());
                    }
                    other => {
                        log::debug!("{VIFS}: {other:?}");
                        self.dirty = true;
                    }
                }
                true
            }
            _ => self.frontend_mut().is_some_and(|frontend| frontend.on_store(client, event, now)),
        };
        self.look(client);
        own
    }

    fn look(&mut self, client: &mut Client) {
        if self.dirty && self.listing.is_none() {
            self.dirty = false;
            self.listing = Some(client.list(VIFS));
        }
    }

    /// Takes the first of the vifs, unless there is one in use.
    fn choose(&mut self, client: &mut Client, names: &[String]) {
        let mut handles: Vec<u32> =
            names.iter().filter_map(|name| parse_u32(name.as_bytes())).collect();
        handles.sort_unstable();
        if self.vif.is_none()
            && let Some(first) = handles.first()
        {
            log::info!("guest: vif {first}");
            let config = Config { queues: self.queues, ..Config::new(Handle(*first)) };
            let frontend = Frontend::new(self.table.clone(), self.binder.clone(), client, config);
            self.vif = Some(Vif { handle: Handle(*first), device: NetDevice::new(frontend) });
        }
        let used = self.vif.as_ref().map(|vif| vif.handle.0);
        handles.retain(|handle| Some(*handle) != used);
        for handle in handles.iter().filter(|handle| !self.others.contains(handle)) {
            log::info!("guest: vif {handle} is one too many, and left alone");
        }
        self.others = handles;
    }

    /// Drives the vif: to be called after events, and after packets were sent or received. Answers whether there is more to
    /// do at once; `tell` hears of what happened.
    pub fn poll(
        &mut self,
        client: &mut Client,
        now: Instant,
        mut tell: impl FnMut(&mut Self, &Notice),
    ) -> bool {
        let Some(frontend) = self.frontend_mut() else { return false };
        let more = frontend.poll(client, now);
        let notices: Vec<Notice> = frontend.take_notices().collect();
        for notice in &notices {
            match notice {
                Notice::Connected { .. } => self.connections += 1,
                Notice::Removed => {
                    self.ended = self.counters();
                    self.vif = None;
                    // Another may be there already.
                    self.dirty = true;
                }
                _ => {}
            }
            tell(self, notice);
        }
        self.look(client);
        more || !notices.is_empty()
    }

    /// When to poll though nothing comes.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.frontend()?.deadline()
    }

    /// The vif in use.
    #[must_use]
    pub fn frontend(&self) -> Option<&Frontend<H>> {
        self.vif.as_ref().map(|vif| vif.device.frontend())
    }

    fn frontend_mut(&mut self) -> Option<&mut Frontend<H>> {
        self.vif.as_mut().map(|vif| vif.device.frontend_mut())
    }

    /// Sends a frame past the stack; without a connection it is lost.
    pub fn send(&mut self, frame: &[u8]) {
        if let Some(frontend) = self.frontend_mut() {
            let queue = frontend.queue_for(frame);
            if let Err(error) = frontend.send(queue, frame, netfront::Meta::default()) {
                log::debug!("guest: frame not sent: {error}");
            }
        }
    }

    /// The address that the toolstack gave the vif.
    #[must_use]
    pub fn mac(&self) -> Option<MacAddr> {
        self.frontend()?.mac()
    }

    /// Whether packets can flow.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.frontend().is_some_and(Frontend::is_connected)
    }

    /// What all vifs have done, one after another.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = self.ended;
        if let Some(frontend) = self.frontend() {
            sum += frontend.counters();
        }
        sum
    }

    /// Times that a connection came about.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections
    }

    /// The domain is about to be suspended.
    pub fn suspended(&mut self) {
        if let Some(frontend) = self.frontend_mut() {
            frontend.suspended();
        }
    }

    /// The domain runs again: see [`Frontend::resumed`].
    pub fn resumed(&mut self, client: &mut Client, cancelled: bool) {
        if let Some(frontend) = self.frontend_mut() {
            frontend.resumed(client, cancelled);
        }
        if !cancelled {
            // What was asked of the old store is not answered any more.
            self.listing = None;
            self.dirty = true;
        }
        self.look(client);
    }
}

/// Whether a path is deeper than `device/vif/N`.
fn is_below_a_vif(path: &str) -> bool {
    let rest = path.split_once(VIFS).map_or("", |(_, rest)| rest);
    rest.matches('/').count() > 1
}

impl<H: Hypervisor> Device for Nic<H> {
    type RxToken<'a>
        = RxToken<'a>
    where
        H: 'a;
    type TxToken<'a>
        = TxToken<'a, H>
    where
        H: 'a;

    fn receive(&mut self, now: time::Instant) -> Option<(RxToken<'_>, TxToken<'_, H>)> {
        self.vif.as_mut()?.device.receive(now)
    }

    // Without a connection there is no room: what the stack would send waits with its socket, and no time is lost on it.
    fn transmit(&mut self, now: time::Instant) -> Option<TxToken<'_, H>> {
        self.vif.as_mut()?.device.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.vif.as_ref().map(|vif| vif.device.capabilities()).unwrap_or_default()
    }
}

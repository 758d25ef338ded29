//! An interface: what its owner does with it. Its life is in `life`.

mod life;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use evtchn::Binder;
use grant::GrantTable;
use hypercall::{DomId, Handle, Hypervisor, Instant, PageOffset, Port};
use netif::keys::{Features, REQUEST_MULTICAST_CONTROL};
use netif::mac::MacAddr;
use netif::slot::ExtraInfo;
use xenbus::client::{Change, Client, JobId, WatchId};
use xenbus::device::State;

use crate::Meta;
use crate::control::Control;
use crate::counters::Counters;
use crate::fault::{BackendFault, JoinError, Refusal, SendError};
use crate::flow::Steering;
use crate::negotiate::MAX_QUEUES;
use crate::queue::Queue;

/// Multicast addresses of an interface at most: what backends take (`XEN_NETBK_MCAST_MAX` of Linux).
pub const MAX_MULTICAST: usize = 64;
/// Nanoseconds between two tries to take back pages that backends had kept; doubled each time to [`MAX_RECLAIM`].
const RECLAIM: u64 = 1_000_000_000;
const MAX_RECLAIM: u64 = 64 * RECLAIM;
/// Parked pages looked at in one try.
const RECLAIM_BATCH: usize = 64;

/// How a frontend is set up. All of it is what the interface can do; what a backend does not offer is not used with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Which interface of this domain.
    pub handle: Handle,
    /// Queues at most, 1 to [`MAX_QUEUES`]; the backend may offer fewer.
    pub queues: u16,
    /// What packets may come in: of several pages, to be segmented, with blank checksums.
    pub features: Features,
    /// An event channel for each ring, where the backend offers it.
    pub split: bool,
    /// Pages of 4 KiB with the backend per queue, 1 to 256: packets of 64 KiB need 17.
    pub posted: u16,
    /// Where the indices of the rings begin. Any will do, as they wrap at 2^32; a test begins just below that.
    pub first_index: u32,
    /// Whether a backend may see what packets to it have left in a page when the page carries another. Every page that is
    /// granted is a packet's alone, in either case. The toolstack's `trusted` node, at 0, has the same effect as `false`.
    pub trusted: bool,
    /// Have the backend keep pages mapped, where it offers that (`XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING`).
    pub static_grants: bool,
    /// Have the backend send only the multicast that was asked for by [`Frontend::join`], where it offers that. IPv6 asks
    /// for neighbours by multicast.
    pub multicast_filter: bool,
    /// Bytes that the backend is to leave free at the start of each page, where it offers that (`xdp-headroom`).
    pub headroom: PageOffset,
}

impl Config {
    /// One queue with everything there is, and a full ring of pages; all multicast, and no headroom.
    #[must_use]
    pub const fn new(handle: Handle) -> Self {
        let features = Features::SG
            .union(Features::GSO_TCPV4)
            .union(Features::GSO_TCPV6)
            .union(Features::IPV4_CSUM)
            .union(Features::IPV6_CSUM);
        Self {
            handle,
            queues: 1,
            features,
            split: true,
            posted: 256,
            first_index: 0,
            trusted: true,
            static_grants: true,
            multicast_filter: false,
            headroom: PageOffset::ZERO,
        }
    }
}

/// What a frontend can take at all.
const KNOWN: Features = Config::new(Handle(0)).features;

/// Something that the owner of an interface may want to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Notice {
    /// Packets can flow.
    Connected {
        /// With how many queues.
        queues: usize,
        /// What packets may go out.
        features: Features,
    },
    /// Packets no longer flow. What was in flight may have arrived or not.
    Disconnected,
    /// The backend still uses so many pages of a connection that has ended. They are kept, and asked for again.
    Parked(usize),
    /// The backend broke the protocol, and is left.
    Faulted(BackendFault),
    /// There can be no connection now.
    Refused(Refusal),
    /// The backend takes packets and has answered none for five seconds. Said once, until it answers again.
    Stalled {
        /// Of which queue.
        queue: usize,
    },
    /// The store says another [`Frontend::mtu`] than before.
    Mtu(Option<u16>),
    /// The backend has no room for a multicast address: it sends all multicast from now on, if it can be asked to.
    MulticastRefused,
    /// The interface was taken away.
    Removed,
}

/// The job that is waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Idle,
    Look(JobId),
    Read(JobId),
    Publish(JobId),
    Write(JobId),
}

/// One network interface of this domain.
pub struct Frontend<H: Hypervisor> {
    config: Config,
    table: GrantTable<H>,
    binder: Binder<H>,
    dir: String,
    own_watch: WatchId,
    watch: Option<WatchId>,
    /// The backend's directory and domain, once known.
    backend: Option<(String, DomId)>,
    mac: Option<MacAddr>,
    mtu: Option<u16>,
    /// The toolstack trusts the backend.
    trusted: bool,
    /// The toolstack had set the interface up; without its nodes it is gone.
    seen: bool,
    /// What we last wrote; `None` before the first look.
    own: Option<State>,
    step: Step,
    /// Something changed since the last look began.
    dirty: bool,
    /// The store may have missed what we wrote.
    unsure: bool,
    /// The last look found that we may not read the backend's directory: it is gone, with the right to know so.
    hidden: bool,
    /// Whether a connection is wanted.
    wanted: bool,
    /// The domain is about to be suspended.
    suspended: bool,
    /// Until when a backend may take to let go of what it keeps mapped, before the connection ends.
    leaving: Option<Instant>,
    steering: Steering,
    queues: Vec<Queue<H>>,
    control: Option<Control<H>>,
    /// Of a connection that has ended, until the backend has let go of them.
    retired: Vec<Queue<H>>,
    retired_control: Option<Control<H>>,
    offered: Features,
    established: bool,
    /// Found while there was no client at hand.
    fault: Option<BackendFault>,
    /// Connections that did not come about or ended in a fault, in a row.
    failures: u32,
    not_before: Option<Instant>,
    /// When parked pages are looked at again, and how long after that.
    reclaim: Option<(Instant, u64)>,
    /// Addresses whose packets are to come, and changes of that which the backend has not been told.
    multicast: Vec<MacAddr>,
    untold: Vec<ExtraInfo>,
    ended: Counters,
    notices: Vec<Notice>,
    gone: bool,
}

impl<H: Hypervisor> Frontend<H> {
    /// The interface that `config` names; it connects when its backend is ready.
    #[must_use]
    pub fn new(
        table: GrantTable<H>,
        binder: Binder<H>,
        client: &mut Client,
        config: Config,
    ) -> Self {
        let dir = format!("device/vif/{}", config.handle);
        let config = Config {
            queues: config.queues.clamp(1, MAX_QUEUES),
            features: config.features & KNOWN,
            posted: config.posted.clamp(1, 256),
            ..config
        };
        Self {
            config,
            table,
            binder,
            own_watch: client.watch(dir.clone()),
            dir,
            watch: None,
            backend: None,
            mac: None,
            mtu: None,
            trusted: true,
            seen: false,
            own: None,
            step: Step::Idle,
            dirty: true,
            unsure: false,
            hidden: false,
            wanted: true,
            suspended: false,
            leaving: None,
            steering: Steering::new(),
            queues: Vec::new(),
            control: None,
            retired: Vec::new(),
            retired_control: None,
            offered: Features::empty(),
            established: false,
            fault: None,
            failures: 0,
            not_before: None,
            reclaim: None,
            multicast: Vec::new(),
            untold: Vec::new(),
            ended: Counters::default(),
            notices: Vec::new(),
            gone: false,
        }
    }

    /// An event came on `port`; says whether the port is one of this interface's.
    pub fn on_event(&mut self, port: Port) -> bool {
        let control = self.control.iter_mut().chain(&mut self.retired_control);
        self.queues.iter_mut().chain(&mut self.retired).any(|queue| queue.on_event(port)) || {
            control
        }
        .any(|control| control.on_event(port))
    }

    /// Takes responses, posts pages again, shows the backend what was sent, and ends events. To be called after events,
    /// and after packets were sent or received. Answers whether there is more to do at once: packets wait to be received,
    /// or there is room again for a sender that was told [`SendError::Full`].
    pub fn poll(&mut self, client: &mut Client, now: Instant) -> bool {
        if self.suspended {
            return false;
        }
        self.keep_time(client, now);
        // Found while packets were received: what that queue thinks of its slots is not to be built on.
        let polled = match self.fault.take() {
            Some(fault) => Err(fault),
            None => self.poll_queues(now),
        };
        match polled {
            Ok((more, multicast_refused)) => {
                if multicast_refused && self.config.multicast_filter {
                    self.drop_filter(client);
                }
                more
            }
            Err(fault) => {
                self.faulted(client, fault, now);
                false
            }
        }
    }

    /// Whether there is more to do at once, and whether the backend has refused a change of its filter.
    fn poll_queues(&mut self, now: Instant) -> Result<(bool, bool), BackendFault> {
        self.tell_multicast();
        let (mut more, mut refused) = (false, false);
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let polled = queue.poll(now)?;
            more |= polled.more;
            refused |= queue.take_multicast_refused();
            if polled.stalled {
                self.notices.push(Notice::Stalled { queue: index });
            }
        }
        if let Some(control) = &mut self.control
            && (self.established || self.leaving.is_some())
        {
            control.poll(&mut self.queues, now)?;
        }
        Ok((more, refused))
    }

    /// When [`poll`](Self::poll) is to be called though no event comes.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        if self.suspended {
            return None;
        }
        let queues = self.queues.iter().filter_map(Queue::deadline);
        let control = self.control.as_ref().and_then(Control::deadline);
        let reclaim = self.reclaim.map(|(at, _)| at);
        queues.chain([control, self.not_before, self.leaving, reclaim].into_iter().flatten()).min()
    }

    /// Puts an Ethernet frame of up to 65,535 bytes, without trailer, on a queue. The backend sees it after the next
    /// [`poll`](Self::poll). Packets of one flow belong on one queue, or their order is lost: [`queue_for`](Self::queue_for)
    /// chooses so.
    ///
    /// # Errors
    /// As [`SendError`] says; nothing of the packet is sent then.
    pub fn send(&mut self, queue: usize, frame: &[u8], meta: Meta) -> Result<(), SendError> {
        if !self.is_open() {
            return Err(SendError::NotConnected);
        }
        self.queues.get_mut(queue).ok_or(SendError::NoQueue)?.send(frame, meta)
    }

    /// Whether packets may be sent this moment.
    fn is_open(&self) -> bool {
        self.established && !self.suspended
    }

    /// The next packet of a queue, into `frame`, whose length becomes the packet's and whose contents are replaced. Without
    /// a packet `frame` is left alone.
    pub fn receive(&mut self, queue: usize, frame: &mut Vec<u8>) -> Option<Meta> {
        if self.fault.is_some() || self.suspended {
            return None;
        }
        match self.queues.get_mut(queue)?.receive(frame) {
            Ok(meta) => meta,
            Err(fault) => {
                self.fault = Some(fault);
                None
            }
        }
    }

    /// The queue that a frame belongs on: always the same for the packets of one flow, so that their order is kept.
    #[must_use]
    pub fn queue_for(&self, frame: &[u8]) -> usize {
        self.steering.queue(frame, self.queues.len())
    }

    /// Whether `packets` of the largest kind would find room on each queue. If not, somebody waits for it from now on.
    #[cfg(feature = "smoltcp")]
    pub(crate) fn has_room(&mut self, packets: usize) -> bool {
        let mut room = self.is_open();
        for queue in &mut self.queues {
            // All are asked: each is to say when it has room again.
            room &= queue.has_room(packets);
        }
        room
    }

    /// Counts a packet whose checksum was wrong.
    #[cfg(feature = "smoltcp")]
    pub(crate) fn count_bad_checksum(&mut self) {
        self.ended.rx.checksum += 1;
    }

    /// Wants packets to a multicast address. It makes a difference with [`Config::multicast_filter`] alone.
    ///
    /// # Errors
    /// It is not a multicast address, or there are [`MAX_MULTICAST`] already.
    pub fn join(&mut self, address: MacAddr) -> Result<(), JoinError> {
        if !address.is_multicast() {
            return Err(JoinError::NotMulticast(address));
        }
        if self.multicast.contains(&address) {
            return Ok(());
        }
        if self.multicast.len() >= MAX_MULTICAST {
            return Err(JoinError::TooMany);
        }
        self.multicast.push(address);
        self.change_multicast(ExtraInfo::McastAdd(address));
        Ok(())
    }

    /// Wants them no longer.
    pub fn leave(&mut self, address: MacAddr) {
        let before = self.multicast.len();
        self.multicast.retain(|joined| *joined != address);
        if self.multicast.len() < before {
            self.change_multicast(ExtraInfo::McastDel(address));
        }
    }

    fn change_multicast(&mut self, change: ExtraInfo) {
        if self.has_filter() && self.established {
            // What was not told and is undone need not be told at all.
            let undone = match change {
                ExtraInfo::McastDel(address) => ExtraInfo::McastAdd(address),
                ExtraInfo::McastAdd(address) => ExtraInfo::McastDel(address),
                other => other,
            };
            let before = self.untold.len();
            self.untold.retain(|untold| *untold != undone);
            if self.untold.len() == before {
                self.untold.push(change);
            }
        }
    }

    /// Whether the backend was asked to filter multicast.
    fn has_filter(&self) -> bool {
        self.config.multicast_filter && self.offered.contains(Features::MULTICAST_CONTROL)
    }

    /// Tells the backend of changes to the multicast filter, as far as there is room.
    fn tell_multicast(&mut self) {
        let Some(queue) = self.queues.first_mut() else { return };
        let told = self.untold.iter().take_while(|change| queue.multicast(**change).is_ok());
        let told = told.count();
        self.untold.drain(..told);
    }

    /// The filter has no room for what is wanted: without it all multicast comes.
    fn drop_filter(&mut self, client: &mut Client) {
        self.config.multicast_filter = false;
        self.untold.clear();
        self.notices.push(Notice::MulticastRefused);
        if self.offered.contains(Features::DYNAMIC_MULTICAST) {
            let path = format!("{}/{}", self.dir, REQUEST_MULTICAST_CONTROL);
            client.commit([Change::Write { path, value: b"0".to_vec() }]);
        }
    }

    /// What has happened since the last call.
    pub fn take_notices(&mut self) -> impl Iterator<Item = Notice> {
        core::mem::take(&mut self.notices).into_iter()
    }

    /// The state we last wrote; unknown before the toolstack has set the interface up, and after it was taken away.
    #[must_use]
    pub fn state(&self) -> State {
        if self.gone { State::Unknown } else { self.own.unwrap_or(State::Unknown) }
    }

    /// Whether packets can flow.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.established
    }

    /// Queues there are while connected.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// What packets may go out, while connected.
    #[must_use]
    pub fn features(&self) -> Features {
        self.offered
    }

    /// The address that the toolstack gave this interface.
    #[must_use]
    pub fn mac(&self) -> Option<MacAddr> {
        self.mac
    }

    /// Bytes of payload per packet, if the toolstack says. It may change: see [`Notice::Mtu`].
    #[must_use]
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// Pages that the backend keeps mapped.
    #[must_use]
    pub fn static_grants(&self) -> usize {
        self.control.as_ref().map_or(0, Control::static_grants)
    }

    /// What this interface has done, over all its connections.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = self.ended;
        for queue in &self.queues {
            sum += queue.counters();
        }
        sum
    }
}

impl<H: Hypervisor> fmt::Debug for Frontend<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frontend({}, {:?}, {} queues)", self.dir, self.state(), self.queues.len())
    }
}

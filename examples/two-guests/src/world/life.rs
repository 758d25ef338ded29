//! Who is there, who goes and who comes, and what they send each other.

use std::net::Ipv4Addr;

use evtchn::Upcalls;
use grant::Mapper;
use hypercall::{DomId, Errno, VcpuId};
use netback::Backend;
use netif::mac::MacAddr;
use xenbus::client::{Change, Client};

use super::{BackendDomain, Place, World};
use crate::frames::{Flow, Frames, Sizes, StationId};
use crate::guest::{Guest, GuestConfig};
use crate::host::Host;
use crate::nodes;
use crate::tcp::{StreamId, Tcp};
use crate::uplink::{Outside, Uplink};

impl World {
    /// Starts the backend, in a new domain if it has one of its own; it takes over all guests.
    pub fn start_backend(&mut self) {
        let hv = if self.config.driver_domain {
            let hv = self.sim.create(self.config.domain);
            self.toolstack.1.commit(nodes::driver_domain(hv.id()));
            hv
        } else {
            self.dom0.clone()
        };
        let conn = match hv.id() {
            DomId(0) => self.server.connect(DomId(0), true),
            id => self.server.introduce(id),
        };
        self.uplink = Uplink::new(&self.sim, hv.clone(), &self.config);
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        let mapper = Mapper::new(&hv);
        let mut client = Client::new();
        let (binder, config) = (upcalls.binder(), self.config.backend);
        let backend = Backend::new(&hv, binder, mapper.clone(), &mut client, config);
        // The simulated Xen says what it offers, unless it was told to fail.
        let Ok(backend) = backend else { return };
        let id = hv.id();
        let notices = Vec::new();
        self.backend = Some(BackendDomain { hv, backend, mapper, notices, upcalls, client, conn });
        for guest in self.guests.iter().flatten() {
            let rate = guest.config.rate.as_deref();
            self.toolstack.1.commit(nodes::other_backend(id, guest.id(), guest.mac, rate));
        }
    }

    /// Destroys the backend's domain, which must be one of its own; answers whether it was.
    pub fn kill_backend(&mut self) -> bool {
        if !self.config.driver_domain {
            return false;
        }
        let Some(domain) = self.backend.take() else { return false };
        let id = domain.hv.id();
        // A card that read on would read what the pages hold next.
        self.uplink.lose();
        self.sim.destroy(id);
        drop(domain);
        self.server.domain_gone(id);
        self.toolstack.1.commit([Change::Rm { path: nodes::home(id) }]);
        for place in self.places() {
            self.renew(place);
        }
        self.idle.clear();
        true
    }

    /// Makes a guest; it connects in its own time. Answers its index.
    ///
    /// # Errors
    /// As Xen answers the guest.
    pub fn add_guest(&mut self, config: GuestConfig) -> Result<usize, Errno> {
        let index = self.guests.len();
        self.guests.push(None);
        self.guest_configs.push(config);
        self.start_guest(index)?;
        Ok(index)
    }

    /// Starts a guest that was killed: a new domain, with the same interface and the same flows.
    ///
    /// # Errors
    /// As Xen answers the guest.
    pub fn start_guest(&mut self, index: usize) -> Result<(), Errno> {
        let Some(config) = self.guest_configs.get(index).cloned() else { return Ok(()) };
        let hv = self.sim.create(config.domain);
        let id = hv.id();
        let mac = self.mac(Place::Guest(index));
        let mut changes = nodes::domain(id);
        if let Some(backend) = &self.backend {
            changes.extend(nodes::vif(backend.hv.id(), id, mac, config.rate.as_deref()));
        }
        self.toolstack.1.commit(changes);
        let station = StationId(self.stations);
        self.stations += 1;
        let host = Host::new(Frames::new(station, self.random.draw()));
        let guest = Guest::new(hv, &mut self.server, config, mac, host)?;
        if let Some(place) = self.guests.get_mut(index) {
            *place = Some(guest);
        }
        self.suspend_flows(Place::Guest(index));
        self.idle.clear();
        Ok(())
    }

    /// The flows of a place begin when both ends are connected, be it for the first time or again.
    pub(crate) fn suspend_flows(&mut self, place: Place) {
        for pending in &self.flows {
            let (from, to, _) = *pending;
            let known = self.pending.iter().any(|(.., flow)| flow.id == pending.2.id);
            if (from == place || to == place) && !known {
                self.pending.push(*pending);
            }
        }
    }

    /// A place's connection is over. What was in flight may have arrived or not; what comes after is counted anew.
    pub(crate) fn renew(&mut self, place: Place) {
        let station = StationId(self.stations);
        let fresh = Frames::new(station, self.random.draw());
        let Some(host) = self.host_mut(place) else { return };
        let old = std::mem::replace(&mut host.frames, fresh);
        self.stations += 1;
        let station = old.station();
        for other in self.hosts_mut() {
            other.frames.end(station);
        }
        self.graves.push(old);
        self.suspend_flows(place);
    }

    pub(crate) fn is_up(&self, place: Place) -> bool {
        match place {
            Place::Outside => self.backend.is_some(),
            Place::Guest(index) => {
                self.guest(index).is_some_and(Guest::is_connected)
                    && self.vif(index).is_some_and(|vif| vif.queues > 0)
            }
        }
    }

    pub(crate) fn places(&self) -> Vec<Place> {
        (0..self.guests.len()).map(Place::Guest).chain([Place::Outside]).collect()
    }

    pub(crate) fn begin_pending(&mut self) {
        let up: Vec<_> = self.places().into_iter().filter(|place| self.is_up(*place)).collect();
        let ready = |(from, to, _): &mut (Place, Place, Flow)| up.contains(from) && up.contains(to);
        let ready: Vec<_> = self.pending.extract_if(.., ready).collect();
        for (from, to, flow) in ready {
            self.begin(from, to, flow);
        }
    }

    /// Destroys a guest's domain, and has the toolstack say so to the backend in domain 0.
    pub fn kill_guest(&mut self, index: usize) {
        let Some(guest) = self.guests.get_mut(index).and_then(Option::take) else { return };
        let id = guest.id();
        self.sim.destroy(id);
        let station = guest.host.frames.station();
        let Guest { host, .. } = guest;
        self.graves.push(host.frames);
        for other in self.hosts_mut() {
            other.frames.end(station);
        }
        let mut changes = vec![Change::Rm { path: nodes::home(id) }];
        if let Some(domain) = &mut self.backend {
            if !self.config.driver_domain {
                domain.backend.domain_gone(&mut domain.client, id, self.now);
            }
            let back = format!("/local/domain/{}/backend/vif/{id}", domain.hv.id());
            changes.push(Change::Rm { path: back });
        }
        self.server.domain_gone(id);
        self.toolstack.1.commit(changes);
        self.idle.clear();
    }

    /// A place's Ethernet address: what a guest has over all its lives.
    #[must_use]
    pub fn mac(&self, place: Place) -> MacAddr {
        match place {
            Place::Guest(index) => MacAddr([0, 0x16, 0x3e, 0, 1, index as u8]),
            Place::Outside => MacAddr([0, 0x16, 0x3e, 0, 2, 0]),
        }
    }

    fn address(place: Place) -> Ipv4Addr {
        match place {
            Place::Guest(index) => Ipv4Addr::new(10, 0, 0, 1 + index as u8),
            Place::Outside => Ipv4Addr::new(10, 0, 0, 254),
        }
    }

    /// Has frames go from one place to another, for as long as both live and over all their lives.
    pub fn flow(&mut self, from: Place, to: Place, sizes: Sizes, window: u64) {
        let id = self.flows.len() as u16;
        let flow = Flow { id, to: StationId(0), mac: self.mac(to), sizes, window };
        self.flows.push((from, to, flow));
        self.pending.push((from, to, flow));
        self.idle.clear();
    }

    fn begin(&mut self, from: Place, to: Place, flow: Flow) {
        let Some(to) = self.host(to).map(|host| host.frames.station()) else { return };
        let now = self.now;
        if let Some(from) = self.host_mut(from) {
            from.frames.begin(Flow { to, ..flow }, now);
        }
    }

    /// Has one place pull a stream by TCP from another. Does not outlive either.
    pub fn stream(&mut self, server: Place, client: Place) {
        let id = StreamId(self.streams);
        self.streams += 1;
        if let Some(tcp) = self.tcp(server) {
            tcp.serve(id);
        }
        if let Some(tcp) = self.tcp(client) {
            tcp.pull(id, Self::address(server));
        }
        self.idle.clear();
    }

    fn tcp(&mut self, place: Place) -> Option<&mut Tcp> {
        let (address, mac, now) = (Self::address(place), self.mac(place), self.now);
        if self.host(place)?.tcp.is_none() {
            match place {
                Place::Guest(index) => {
                    self.guests.get_mut(index)?.as_mut()?.with_tcp(address, now);
                }
                Place::Outside => {
                    let nic = &mut self.uplink;
                    self.outside.with_tcp(&mut Outside { nic, mac }, address, now);
                }
            }
        }
        self.host_mut(place)?.tcp.as_mut()
    }
}

//! The protocols: addresses, and what is served and asked over them.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use hypercall::{Hypervisor, Instant};
use netif::mac::MacAddr;
use services::http::{self, Reply};
use services::jobs::{Job, Jobs, at};
use services::streams::{Count, DISCARD, Digest, ECHO, Echo, SINK, SOURCE, Sink, Source};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::Device as _;
use smoltcp::socket::dhcpv4;
use smoltcp::time::Duration;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

use crate::announce;
use crate::nic::Nic;
use crate::options::Options;
use crate::transfers::Transfers;

/// Where counters are served.
const HTTP: u16 = 80;
/// Requests served at once.
const REQUESTS: usize = 4;
/// Streams of each kind served at once.
const STREAMS: usize = 4;

/// The stack, and all that runs on it.
pub struct Stack {
    /// Made when there is a vif, and made anew when its MTU changes.
    interface: Option<Interface>,
    seed: u64,
    addresses: Vec<IpCidr>,
    gateway: Option<core::net::Ipv4Addr>,
    sockets: SocketSet<'static>,
    dhcp: Option<SocketHandle>,
    http: http::Server,
    discard: Sink<Count>,
    sink: Sink<Digest>,
    source: Source,
    echo: Echo,
    jobs: Jobs,
    transfers: Transfers,
}

impl Stack {
    /// A stack for the addresses of the command line, which does its jobs; `seed` is what nobody outside should guess.
    #[must_use]
    pub fn new(options: &Options, seed: u64) -> Self {
        let mut sockets = SocketSet::new(Vec::new());
        let dhcp = options.asks_dhcp().then(|| {
            let mut socket = dhcpv4::Socket::new();
            // A server that is started after its guests need not be waited for longer than this.
            let mut retry = dhcpv4::RetryConfig::default();
            retry.discover_timeout = Duration::from_secs(2);
            socket.set_retry_config(retry);
            sockets.add(socket)
        });
        let mut jobs = Jobs::new(seed);
        for job in &options.jobs {
            if !jobs.add(*job) {
                log::warn!("guest: too many jobs");
            }
        }
        Self {
            interface: None,
            seed,
            addresses: options.addresses.clone(),
            gateway: options.gateway,
            dhcp,
            http: http::Server::new(&mut sockets, HTTP, REQUESTS),
            discard: Sink::new(&mut sockets, DISCARD, STREAMS),
            sink: Sink::new(&mut sockets, SINK, STREAMS),
            source: Source::new(&mut sockets, SOURCE, STREAMS),
            echo: Echo::new(&mut sockets, ECHO, STREAMS),
            sockets,
            jobs,
            transfers: Transfers::default(),
        }
    }

    /// The addresses in use.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddress> {
        self.addresses.iter().map(IpCidr::address)
    }

    /// The vif has connected: to what may be another network, or another port of the same.
    pub fn connected<H: Hypervisor>(&mut self, nic: &mut Nic<H>, now: Instant) {
        self.follow(nic, now);
        let Some(interface) = &mut self.interface else { return };
        // Whoever was a neighbour may have moved, too: changed or not, addresses that are set make it ask again.
        interface.update_ip_addrs(|_| ());
        if let Some(MacAddr(mac)) = nic.mac() {
            for address in self.addresses.iter().map(IpCidr::address) {
                nic.send(&announce::frame(EthernetAddress(mac), address));
            }
        }
    }

    /// The vif can do other things than before, of which smoltcp's interface asks once.
    pub fn changed(&mut self) {
        self.interface = None;
    }

    /// Has an interface with the vif's address.
    fn follow<H: Hypervisor>(&mut self, nic: &mut Nic<H>, now: Instant) {
        let Some(MacAddr(mac)) = nic.mac() else { return };
        let mac = EthernetAddress(mac);
        match &mut self.interface {
            Some(interface) => {
                if interface.hardware_addr() != mac.into() {
                    interface.set_hardware_addr(mac.into());
                }
            }
            None => {
                let mut config = Config::new(mac.into());
                config.random_seed = self.seed ^ now.0;
                self.interface = Some(Interface::new(config, nic, at(now)));
                self.apply();
            }
        }
    }

    /// Gives the interface its addresses.
    fn apply(&mut self) {
        let Self { interface: Some(interface), addresses, gateway, .. } = self else { return };
        interface.update_ip_addrs(|own| {
            own.clear();
            for address in addresses {
                if own.push(*address).is_err() {
                    log::warn!("guest: {address} is one address too many");
                }
            }
        });
        interface.routes_mut().remove_default_ipv4_route();
        if let Some(gateway) = *gateway
            && interface.routes_mut().add_default_ipv4_route(gateway).is_err()
        {
            log::warn!("guest: no room for a route");
        }
    }

    /// Handles what came and sends what is due; `page` gives the counters, when they are asked for. Answers whether anything
    /// was done, so that there may be more.
    pub fn poll<H: Hypervisor>(
        &mut self,
        nic: &mut Nic<H>,
        now: Instant,
        mut page: impl FnMut(&Nic<H>) -> String,
    ) -> bool {
        self.follow(nic, now);
        let Some(interface) = &mut self.interface else { return false };
        let mut some = false;
        interface.poll(at(now), nic, &mut self.sockets);
        some |= self.lease();
        some |= self.serve(now, || page(nic));
        if some && let Some(interface) = &mut self.interface {
            interface.poll(at(now), nic, &mut self.sockets);
        }
        some
    }

    /// What DHCP says.
    fn lease(&mut self) -> bool {
        let Some(dhcp) = self.dhcp else { return false };
        let four = |address: &IpCidr| matches!(address, IpCidr::Ipv4(_));
        match self.sockets.get_mut::<dhcpv4::Socket<'_>>(dhcp).poll() {
            Some(dhcpv4::Event::Configured(lease)) => {
                let address = IpCidr::Ipv4(lease.address);
                let new = !self.addresses.contains(&address);
                self.addresses.retain(|address| !four(address));
                self.addresses.push(address);
                self.gateway = lease.router;
                if new {
                    log::info!("guest: address {}", address.address());
                }
            }
            Some(dhcpv4::Event::Deconfigured) if self.addresses.iter().any(four) => {
                log::warn!("guest: the lease has ended");
                self.addresses.retain(|address| !four(address));
                self.gateway = None;
            }
            _ => return false,
        }
        self.apply();
        true
    }

    fn serve(&mut self, now: Instant, mut page: impl FnMut() -> String) -> bool {
        let Self { interface, sockets, http, discard, sink, source, echo, jobs, transfers, .. } =
            self;
        let mut some = discard.serve(sockets, now, |count, rate| {
            transfers.add(format!("discard {count} mbit={rate}"));
        });
        some |= sink.serve(sockets, now, |digest, rate| {
            transfers.add(format!("sink {digest} mbit={rate}"));
        });
        some |= source.serve(sockets, now, |digest, rate, whole| {
            let cut = if whole { "" } else { "cut off: " };
            transfers.add(format!("{cut}source {digest} mbit={rate}"));
        });
        some |= echo.serve(sockets, now, |rate| {
            transfers.add(format!("echo bytes={} mbit={rate}", rate.bytes));
        });
        if let Some(interface) = interface
            && !self.addresses.is_empty()
        {
            some |= jobs.poll(interface, sockets, now, |line| transfers.add(line));
        }
        some |= http.serve(sockets, |path| match path.split_once('?').unwrap_or((path, "")) {
            ("/", _) => Some(Reply::Page(PAGES.into())),
            ("/metrics", _) => Some(Reply::Page(page())),
            ("/transfers", _) => Some(Reply::Page(transfers.page())),
            ("/stream", _) => Some(Reply::Stream),
            ("/run", job) => Some(match job.parse::<Job>() {
                Ok(job) if jobs.add(job) => Reply::Page("begun\n".into()),
                Ok(_) => Reply::Bad("too many jobs wait\n".into()),
                Err(error) => Reply::Bad(format!("{error}\n")),
            }),
            _ => None,
        });
        some
    }

    /// When to poll though no packet comes.
    pub fn deadline<H: Hypervisor>(&mut self, nic: &mut Nic<H>, now: Instant) -> Option<Instant> {
        let jobs = self.jobs.deadline();
        let interface = self.interface.as_mut()?;
        // Whatever the stack has to send waits for room, of which the vif tells.
        nic.transmit(at(now))?;
        let delay = interface.poll_delay(at(now), &self.sockets);
        // smoltcp's clock ticks in microseconds: never before its time.
        let stack = delay.map(|delay| now.after(delay.total_micros().max(1) * 1000));
        stack.into_iter().chain(jobs).min()
    }
}

/// What is served.
const PAGES: &str = "/metrics\n/transfers\n/stream\n/run?JOB\n";

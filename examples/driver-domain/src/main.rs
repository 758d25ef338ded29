//! A network driver domain: the backend of other guests' vifs, in a domain that is not dom0.
//!
//! One thread, no interrupt handlers: it looks at what has come, does a bounded piece of everything there is to do, and
//! sleeps in Xen when there is nothing.
#![cfg_attr(target_os = "none", no_std, no_main)]

extern crate alloc;

mod metrics;
mod options;

use core::num::NonZeroUsize;

use evtchn::Upcalls;
use grant::Mapper;
use hypercall::{Errno, Instant, Port, Shutdown, VcpuId};
use netback::datapath::{Arch, Facts, Policy};
use netback::switch::{Seed, SwitchLimits};
use netback::{Backend, Config, Hotplug};
use runtime::{BootInfo, Hv, OwnPage, Sleep};
use services::control::{Control, Order};
use services::http::{self, Reply};
use services::station::Station;
use services::store::Connection;
use services::withdrawal::Key;
use services::{metrics::Sources, notices, vifs};
use xenbus::client::Event;

use crate::metrics::Machine;

runtime::entry!(run);

/// Ports handed out by one look at the event bits.
const PORTS: usize = 64;
/// 4 KiB and 64 KiB packet buffers: 12 MiB.
const SMALL_BUFFERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1535);
const LARGE_BUFFERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(95);
/// Where pages are served, and requests served at once.
const HTTP: (u16, usize) = (80, 4);
/// A domain that has others' pages mapped cannot be saved: it hears no order to suspend.
const ORDERS: &[Order] = &[Order::PowerOff, Order::Reboot];
const ARCH: Arch = if cfg!(target_arch = "aarch64") { Arch::Arm } else { Arch::X86 };

struct DriverDomain {
    upcalls: Upcalls<Hv>,
    sleep: Sleep,
    mapper: Mapper<Hv>,
    store: Connection<Hv, OwnPage>,
    control: Control,
    withdrawn: Key,
    backend: Backend<Hv>,
    station: Station,
    http: http::Server,
}

fn run(hv: Hv, boot: BootInfo) -> ! {
    match DriverDomain::new(hv, &boot) {
        Ok(mut domain) => {
            let how = domain.live();
            log::info!("driver-domain: {how:?}");
            hv.shutdown(how)
        }
        Err(error) => {
            log::error!("driver-domain: cannot start: {error}");
            hv.shutdown(Shutdown::Crash)
        }
    }
}

impl DriverDomain {
    fn new(hv: Hv, boot: &BootInfo) -> Result<Self, Errno> {
        let addresses = options::addresses(boot.bootargs, |word| {
            log::warn!("driver-domain: {} on the command line says nothing", word.escape_debug());
        });
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        let binder = upcalls.binder();
        let sleep = Sleep::new(&binder)?;
        let mapper = Mapper::new(&hv);
        let ring = runtime::store_ring(&hv, &sleep);
        let mut store = Connection::new(&binder, ring.page, ring.port)?;
        let control = Control::new(store.client(), ORDERS);
        let withdrawn = Key::new(store.client(), "driver-domain");
        let now = runtime::now();
        let config = Config {
            max_queues: 4,
            small_buffers: SMALL_BUFFERS,
            large_buffers: LARGE_BUFFERS,
            hotplug: Hotplug::Switch,
            max_vifs: 64,
            switch: SwitchLimits::default(),
            // The counter at start is no secret of the best kind, but guests cannot read it from where they are.
            seed: Seed(now.0.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15, now.0),
            facts: Facts::probe(&hv, ARCH, false, None),
            policy: Policy::default(),
        };
        let mut backend = Backend::new(&hv, binder, mapper.clone(), store.client(), config)?;
        let snapshot = backend.features().snapshot();
        let kib = boot.memory / 1024;
        log::info!("driver-domain: features {snapshot}, {kib} KiB of memory");
        log::info!("driver-domain: events by {:?}", upcalls.delivery());
        let mut station = Station::new(&mut backend, &addresses, now);
        for address in station.addresses() {
            log::info!("driver-domain: http://{address}/metrics");
        }
        let http = http::Server::new(station.sockets(), HTTP.0, HTTP.1);
        log::info!("driver-domain: ready");
        Ok(Self { upcalls, sleep, mapper, store, control, withdrawn, backend, station, http })
    }

    /// Until the toolstack ends it.
    fn live(&mut self) -> Shutdown {
        loop {
            let more = self.turn(runtime::now());
            match self.control.take_order() {
                Some(Order::PowerOff) => return Shutdown::PowerOff,
                Some(Order::Reboot) => return Shutdown::Reboot,
                // One that is not heard.
                Some(Order::Suspend) | None if more => {}
                Some(Order::Suspend) | None => {
                    let deadline = self.deadline(runtime::now());
                    self.sleep.until(Some(deadline));
                }
            }
        }
    }

    /// A bounded piece of everything there is to do; says whether there is more.
    fn turn(&mut self, now: Instant) -> bool {
        let mut ports = [Port(0); PORTS];
        let mut free = ports.iter_mut();
        let found = self.upcalls.scan(PORTS, |port| {
            if let Some(place) = free.next() {
                *place = port;
            }
        });
        for &port in ports.iter().take(found) {
            let _ = self.backend.on_event(port)
                || self.store.on_event(port)
                || self.sleep.on_event(port);
        }
        let mut more = found == PORTS;
        more |= self.store.poll(now);
        while let Some(event) = self.store.client().poll_event() {
            self.on_store(&event, now);
            more = true;
        }
        more |= self.backend.poll(self.store.client(), now, |_packet| {});
        more |= self.serve(now);
        for notice in self.backend.take_notices() {
            notices::tell(&notice);
            more = true;
        }
        // What the store is asked now is not to wait for what it says next.
        more | self.store.poll(now)
    }

    fn on_store(&mut self, event: &Event, now: Instant) {
        let client = self.store.client();
        let _ = self.backend.on_store(client, event, now)
            || self.control.on_store(client, event)
            || self.withdrawn.on_store(client, event, &mut self.backend);
    }

    /// The station's turn; says whether it sent anything.
    fn serve(&mut self, now: Instant) -> bool {
        let Self { upcalls, mapper, store, backend, station, http, .. } = self;
        let store = store.stats();
        station.poll(backend, now, |sockets, backend, lost| {
            http.serve(sockets, |path| match path {
                "/" => Some(Reply::Page("/metrics\n/vifs\n/stream\n".into())),
                "/metrics" => {
                    let sources = Sources { backend, mapper, ports: upcalls.bound(), lost };
                    let machine = Machine { delivery: upcalls.delivery(), store, now };
                    Some(Reply::Page(metrics::page(&sources, &machine)))
                }
                "/vifs" => Some(Reply::Page(vifs::table(backend))),
                "/stream" => Some(Reply::Stream),
                _ => None,
            })
        })
    }

    fn deadline(&mut self, now: Instant) -> Instant {
        [self.store.deadline(), self.station.deadline(now)]
            .into_iter()
            .flatten()
            .fold(self.backend.deadline(now), Instant::min)
    }
}

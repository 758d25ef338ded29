//! A unikernel dom0: the only toolstack, the only store and the only network backend of its machine.
//!
//! One thread, no interrupt handlers: it looks at what has come, does a bounded piece of everything there is to do, and
//! sleeps in Xen when there is nothing.
#![cfg_attr(target_os = "none", no_std, no_main)]

extern crate alloc;

mod capture;
mod console;
mod editor;
mod metrics;
mod options;
mod shell;
mod sink;
mod store;
mod tap;
mod toolstack;
mod uplink;
mod withdrawal;

use core::num::NonZeroUsize;

use evtchn::{Channel, Eoi, Upcalls, Work};
use features::{Features, Snapshot};
use grant::Mapper;
use hypercall::{Errno, Instant, Port, Shutdown, VcpuId, Virq};
use netback::datapath::{Arch, Facts, Policy};
use netback::switch::{Seed, SwitchLimits};
use netback::{Backend, Config, Hotplug};
use runtime::{BootInfo, Hv, Sleep};
use services::http::{self, Reply};
use services::metrics::Sources;
use services::station::Station;
use services::streams::Sink;
use services::withdrawal::Key;
use services::{notices, vifs};
use smoltcp::wire::{IpCidr, Ipv4Address, Ipv6Address};
use xenbus::client::Event;

use crate::capture::Capture;
use crate::console::Console;
use crate::options::Options;
use crate::sink::Tally;
use crate::store::Store;
use crate::toolstack::Toolstack;
use crate::uplink::Uplink;

runtime::entry!(run);

/// Ports handed out by one look at the event bits.
const PORTS: usize = 64;
/// 4 KiB and 64 KiB packet buffers: 12 MiB of the 32 that this dom0 is to run in.
const SMALL_BUFFERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1535);
const LARGE_BUFFERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(95);
/// Where pages are served, and requests served at once.
const HTTP: (u16, usize) = (80, 4);
/// Streams taken at once.
const SINKS: usize = 2;

struct Dom0 {
    hv: Hv,
    upcalls: Upcalls<Hv>,
    sleep: Sleep,
    mapper: Mapper<Hv>,
    store: Store,
    backend: Backend<Hv>,
    uplink: Option<Uplink>,
    toolstack: Toolstack,
    station: Station,
    http: http::Server,
    sink: Sink<Tally>,
    capture: Option<Capture>,
    exceptions: Channel<Hv>,
    console: Console,
    withdrawn: Key,
    /// Those that the log knows of.
    features: Snapshot,
}

fn run(hv: Hv, boot: BootInfo) -> ! {
    match Dom0::new(hv, &boot) {
        Ok(mut dom0) => loop {
            if !dom0.turn(runtime::now()) {
                let deadline = dom0.deadline(runtime::now());
                dom0.sleep.until(Some(deadline));
            }
        },
        Err(error) => {
            log::error!("dom0: cannot start: {error}");
            hv.shutdown(Shutdown::Crash)
        }
    }
}

impl Dom0 {
    fn new(hv: Hv, boot: &BootInfo) -> Result<Self, Errno> {
        let features = Features::read(&hv)?.snapshot();
        log::info!("dom0: {} KiB of memory, features {features}", boot.memory / 1024);
        let options = Options::parse(boot.bootargs, |word| {
            log::info!("dom0: nothing is done about {word} on the command line");
        });
        let now = runtime::now();
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        let binder = upcalls.binder();
        let sleep = Sleep::new(&binder)?;
        let mapper = Mapper::new(&hv);
        let mut store = Store::new(hv);
        let nic = uplink::find(&hv, options.nic);
        let config = Config {
            max_queues: 4,
            small_buffers: SMALL_BUFFERS,
            large_buffers: LARGE_BUFFERS,
            hotplug: Hotplug::Switch,
            max_vifs: 64,
            switch: SwitchLimits::default(),
            // The counter at start is no secret of the best kind, but guests cannot read it from where they are.
            seed: Seed(now.0.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15, now.0),
            facts: Facts::probe(&hv, Arch::Arm, false, nic.as_ref().map(uplink::facts)),
            policy: Policy::default(),
        };
        let mut backend =
            Backend::new(&hv, binder.clone(), mapper.clone(), &mut store.client, config)?;
        let addresses = [
            IpCidr::new(Ipv4Address::new(10, 9, 0, 1).into(), 24),
            IpCidr::new(Ipv6Address::new(0xfd09, 0, 0, 0, 0, 0, 0, 1).into(), 64),
        ];
        let mut station = Station::new(&mut backend, &addresses, now);
        for address in station.addresses() {
            log::info!("dom0: http://{address}/metrics");
        }
        let http = http::Server::new(station.sockets(), HTTP.0, HTTP.1);
        let sink = Sink::new(station.sockets(), sink::PORT, SINKS);
        let exceptions = binder.bind_virq(Virq::DOM_EXC, VcpuId(0))?;
        let console = Console::new(hv, &binder)?;
        withdrawal::create(&mut store.client);
        let withdrawn = Key::new(&mut store.client, "dom0");
        let mut toolstack = Toolstack::new(hv);
        toolstack.start(&mut store, &binder, now);
        let capture = Capture::new(&hv);
        let (capture, tap) = if options.capture_uplink { (None, capture) } else { (capture, None) };
        log::info!("dom0: ready");
        Ok(Self {
            hv,
            upcalls,
            sleep,
            mapper,
            store,
            backend,
            uplink: nic.map(|nic| Uplink::new(nic, tap)),
            toolstack,
            station,
            http,
            sink,
            capture,
            exceptions,
            console,
            withdrawn,
            features,
        })
    }

    /// A bounded piece of everything there is to do; says whether there is more.
    fn turn(&mut self, now: Instant) -> bool {
        let mut ports = [Port(0); PORTS];
        let mut places = ports.iter_mut();
        let found = self.upcalls.scan(PORTS, |port| {
            if let Some(place) = places.next() {
                *place = port;
            }
        });
        for &port in ports.iter().take(found) {
            self.on_event(port, now);
        }
        let mut more = found == PORTS;
        more |= self.store.poll(now);
        while let Some(event) = self.store.client.poll_event() {
            self.on_store(&event, now);
            more = true;
        }
        let capture = &mut self.capture;
        more |= self.backend.poll(&mut self.store.client, now, |packet| {
            if let Some(capture) = capture {
                capture.record(packet.bytes(), packet.len(), now);
            }
        });
        more |= self.uplink.as_mut().is_some_and(|uplink| uplink.poll(&mut self.backend, now));
        more |= self.serve(now);
        more |= self.console.poll(&mut self.store.client, now, || {
            let mut table = vifs::table(&self.backend);
            table.extend(self.uplink.as_ref().map(Uplink::table));
            table
        });
        let features = self.backend.features().snapshot();
        if core::mem::replace(&mut self.features, features) != features {
            log::info!("dom0: features {features}");
        }
        for notice in self.backend.take_notices() {
            notices::tell(&notice);
            more = true;
        }
        more
    }

    fn on_event(&mut self, port: Port, now: Instant) {
        if self.backend.on_event(port)
            || self.store.on_event(port)
            || self.console.on_event(port)
            || self.sleep.on_event(port)
        {
            return;
        }
        if port == self.exceptions.port() {
            self.toolstack.look(&mut self.store, &mut self.backend, now);
            let (Eoi::Open | Eoi::Throttled(_)) = self.exceptions.eoi(Work::Done, now);
        }
    }

    fn on_store(&mut self, event: &Event, now: Instant) {
        let client = &mut self.store.client;
        let _ = self.withdrawn.on_store(client, event, &mut self.backend)
            || self.console.on_store(client, event)
            || self.backend.on_store(client, event, now);
    }

    /// The station's turn; says whether it sent anything.
    fn serve(&mut self, now: Instant) -> bool {
        let Self {
            hv,
            mapper,
            store,
            toolstack,
            station,
            http,
            sink,
            upcalls,
            backend,
            uplink,
            ..
        } = self;
        station.poll(backend, now, |sockets, backend, lost| {
            let sent = http.serve(sockets, |path| match path {
                "/" => Some(Reply::Page("/metrics\n/stream\n".into())),
                "/metrics" => {
                    let sources = Sources { backend, mapper, ports: upcalls.bound(), lost };
                    let uplink = uplink.as_ref();
                    Some(Reply::Page(metrics::page(hv, &sources, uplink, store, toolstack, now)))
                }
                "/stream" => Some(Reply::Stream),
                _ => None,
            });
            sink.serve(sockets, now, |_, _| ()) || sent
        })
    }

    fn deadline(&mut self, now: Instant) -> Instant {
        let uplink = self.uplink.as_ref().and_then(Uplink::deadline);
        [self.store.deadline(), self.station.deadline(now), uplink]
            .into_iter()
            .flatten()
            .fold(self.backend.deadline(now), Instant::min)
    }
}

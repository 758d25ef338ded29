//! The guest on its machine.
//!
//! One thread, no interrupt handlers: it looks at what has come, does a bounded piece of everything there is to do, and
//! sleeps in Xen when there is nothing.
#![cfg_attr(target_os = "none", no_std, no_main)]

extern crate alloc;

use evtchn::Upcalls;
use features::Features;
use grant::GrantTable;
use guest::Guest;
use guest::metrics::Machine;
use guest::options::Options;
use hypercall::{Errno, Instant, Port, Shutdown, VcpuId};
use runtime::{BootInfo, Hv, OwnPage, Sleep, Suspended};
use services::control::{Control, Order};
use services::store::Connection;

runtime::entry!(run);

/// Ports handed out by one look at the event bits.
const PORTS: usize = 64;

/// What the toolstack may order.
const ORDERS: &[Order] =
    if runtime::CAN_SUSPEND { &Order::ALL } else { &[Order::PowerOff, Order::Reboot] };

struct Domain {
    hv: Hv,
    upcalls: Upcalls<Hv>,
    sleep: Sleep,
    features: Features,
    table: GrantTable<Hv>,
    store: Connection<Hv, OwnPage>,
    control: Control,
    guest: Guest<Hv>,
    resumes: u64,
    cancelled: u64,
}

fn run(hv: Hv, boot: BootInfo) -> ! {
    let error = match Domain::new(hv, &boot) {
        // The domain ends as it is: what is lent out need not be asked for.
        Ok(mut domain) => match domain.live() {
            Ok(how) => hv.shutdown(how),
            Err(error) => error,
        },
        Err(error) => error,
    };
    log::error!("guest: cannot go on: {error}");
    hv.shutdown(Shutdown::Crash)
}

impl Domain {
    fn new(hv: Hv, boot: &BootInfo) -> Result<Self, Errno> {
        let features = Features::read(&hv)?;
        let snapshot = features.snapshot();
        log::info!("guest: features {snapshot}, {} KiB of memory", boot.memory / 1024);
        let options = Options::parse(boot.bootargs, |word| {
            log::warn!("guest: {} on the command line says nothing", word.escape_debug());
        });
        let upcalls = Upcalls::new(&hv, VcpuId(0));
        log::info!("guest: events by {:?}", upcalls.delivery());
        let binder = upcalls.binder();
        let sleep = Sleep::new(&binder)?;
        let table = GrantTable::new(&hv)?;
        let ring = runtime::store_ring(&hv, &sleep);
        let mut store = Connection::new(&binder, ring.page, ring.port)?;
        let control = Control::new(store.client(), ORDERS);
        // The counter at start: no secret of the best kind, but neighbours cannot read it from where they are.
        let seed = runtime::now().0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let guest = Guest::new(table.clone(), binder, store.client(), &options, seed);
        Ok(Self {
            hv,
            upcalls,
            sleep,
            features,
            table,
            store,
            control,
            guest,
            resumes: 0,
            cancelled: 0,
        })
    }

    /// Until the toolstack ends it.
    fn live(&mut self) -> Result<Shutdown, Errno> {
        loop {
            let more = self.turn(runtime::now());
            match self.control.take_order() {
                Some(Order::PowerOff) => {
                    log::info!("guest: power off");
                    return Ok(Shutdown::PowerOff);
                }
                Some(Order::Reboot) => {
                    log::info!("guest: reboot");
                    return Ok(Shutdown::Reboot);
                }
                Some(Order::Suspend) => self.suspend()?,
                None if more => {}
                None => {
                    let now = runtime::now();
                    let deadlines = [self.guest.deadline(now), self.store.deadline()];
                    self.sleep.until(deadlines.into_iter().flatten().min());
                }
            }
        }
    }

    /// Does a piece of everything there is to do; says whether there may be more at once.
    fn turn(&mut self, now: Instant) -> bool {
        let mut ports = [Port(0); PORTS];
        let mut free = ports.iter_mut();
        let found = self.upcalls.scan(PORTS, |port| {
            if let Some(place) = free.next() {
                *place = port;
            }
        });
        for &port in ports.iter().take(found) {
            let _ =
                self.guest.on_event(port) || self.store.on_event(port) || self.sleep.on_event(port);
        }
        let mut more = found == PORTS;
        more |= self.store.poll(now);
        while let Some(event) = self.store.client().poll_event() {
            let client = self.store.client();
            let _ =
                self.guest.on_store(client, &event, now) || self.control.on_store(client, &event);
            more = true;
        }
        let stats = self.store.stats();
        let Self { upcalls, features, store, guest, resumes, cancelled, .. } = self;
        more |= guest.poll(store.client(), now, || {
            let heap = runtime::heap_stats();
            Machine {
                features: features.snapshot(),
                delivery: upcalls.delivery(),
                ports: upcalls.bound(),
                store: stats,
                heap_used: heap.used,
                heap_total: heap.total,
                resumes: *resumes,
                cancelled: *cancelled,
            }
        });
        // What the store is asked now is not to wait for what it says next.
        more | store.poll(now)
    }

    /// Lets Xen save this domain. When it goes on, on this machine or another, all that Xen knew of it is forgotten, unless
    /// it was a false alarm.
    fn suspend(&mut self) -> Result<(), Errno> {
        log::info!("guest: suspends");
        self.guest.suspended();
        if runtime::suspend(&self.hv)? == Suspended::Cancelled {
            self.cancelled += 1;
            self.guest.resumed(self.store.client(), true);
            log::info!("guest: goes on, not suspended");
            return Ok(());
        }
        self.resumes += 1;
        self.upcalls.resumed();
        let binder = self.upcalls.binder();
        self.sleep = Sleep::new(&binder)?;
        self.table.resumed()?;
        let ring = runtime::store_ring(&self.hv, &self.sleep);
        self.store.resumed(&binder, ring.page, ring.port)?;
        self.guest.resumed(self.store.client(), false);
        self.control.resumed(self.store.client());
        let features = self.features.refresh(&self.hv)?;
        log::info!("guest: resumed, features {features}");
        Ok(())
    }
}

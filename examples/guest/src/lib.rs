#![no_std]
#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

extern crate alloc;

#[cfg(test)]
extern crate std;

pub mod announce;
pub mod metrics;
pub mod nic;
pub mod options;
pub mod stack;
pub mod transfers;

use alloc::string::String;

use evtchn::Binder;
use grant::GrantTable;
use hypercall::{Hypervisor, Instant, Port};
use netfront::Notice;
use xenbus::client::{Client, Event};

use crate::metrics::Machine;
use crate::nic::Nic;
use crate::options::Options;
use crate::stack::Stack;

/// The guest: everything but the machine that it runs on, whose loop drives it.
pub struct Guest<H: Hypervisor> {
    name: String,
    table: GrantTable<H>,
    nic: Nic<H>,
    stack: Stack,
    /// It was said that all is there.
    ready: bool,
}

impl<H: Hypervisor> Guest<H> {
    /// A guest as the command line wants it; `seed` is what nobody outside should guess.
    #[must_use]
    pub fn new(
        table: GrantTable<H>,
        binder: Binder<H>,
        client: &mut Client,
        options: &Options,
        seed: u64,
    ) -> Self {
        let stack = Stack::new(options, seed);
        for address in stack.addresses() {
            log::info!("guest: address {address}");
        }
        Self {
            name: options.name.clone(),
            nic: Nic::new(table.clone(), binder, client, options.queues),
            table,
            stack,
            ready: false,
        }
    }

    /// Takes an event of one of its ports.
    pub fn on_event(&mut self, port: Port) -> bool {
        self.nic.on_event(port)
    }

    /// Takes an event of the store client, if it is its own.
    pub fn on_store(&mut self, client: &mut Client, event: &Event, now: Instant) -> bool {
        self.nic.on_store(client, event, now)
    }

    /// Does what there is to do; answers whether there is more at once. `machine` is asked when the counters are.
    pub fn poll(
        &mut self,
        client: &mut Client,
        now: Instant,
        machine: impl Fn() -> Machine,
    ) -> bool {
        let Self { name, table, nic, stack, ready } = self;
        let page = |nic: &Nic<H>| metrics::page(name, &machine(), nic, table, now);
        let mut more = stack.poll(nic, now, page);
        more |= nic.poll(client, now, |nic, notice| {
            tell(notice);
            match notice {
                Notice::Connected { .. } => stack.connected(nic, now),
                Notice::Mtu(_) => stack.changed(),
                _ => {}
            }
        });
        if !*ready && nic.is_connected() && stack.addresses().next().is_some() {
            *ready = true;
            log::info!("guest: ready");
        }
        more
    }

    /// When to poll though nothing comes.
    pub fn deadline(&mut self, now: Instant) -> Option<Instant> {
        let stack = self.stack.deadline(&mut self.nic, now);
        stack.into_iter().chain(self.nic.deadline()).min()
    }

    /// The domain is about to be suspended.
    pub fn suspended(&mut self) {
        self.nic.suspended();
    }

    /// The domain runs again; the grant table and the client have started over, unless the suspend was `cancelled`.
    pub fn resumed(&mut self, client: &mut Client, cancelled: bool) {
        self.nic.resumed(client, cancelled);
    }
}

fn tell(notice: &Notice) {
    match notice {
        Notice::Connected { queues, features } => {
            log::info!("guest: connected queues={queues} features={features}");
        }
        Notice::Disconnected => log::info!("guest: disconnected"),
        Notice::Parked(pages) => log::warn!("guest: the backend still uses {pages} pages; kept"),
        Notice::Faulted(fault) => log::error!("guest: the backend is left: {fault}"),
        Notice::Refused(refusal) => log::error!("guest: no connection: {refusal}"),
        Notice::Stalled { queue } => log::warn!("guest: the backend is silent on queue {queue}"),
        Notice::Removed => log::info!("guest: the vif is gone"),
        other => log::info!("guest: {other:?}"),
    }
}

//! The toolstack's part: guests that Xen built from the device tree are introduced to the store, get a vif, and are
//! cleaned up after.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use evtchn::Binder;
use hypercall::{DomId, DomainInfo, Errno, Instant, PAGE_SIZE, Toolstack as _};
use netback::Backend;
use runtime::Hv;
use xenbus::client::Change;
use xenbus::wire::{Access, Perm};

use crate::store::Store;

/// Domains from 1 on that are looked for at start: Xen numbers those of the device tree from there.
const MAX_GUESTS: u16 = 32;

/// What became of the guests.
pub(crate) struct Toolstack {
    hv: Hv,
    guests: BTreeMap<DomId, DomainInfo>,
}

fn node(path: String, value: impl Into<Vec<u8>>) -> Change {
    Change::Write { path, value: value.into() }
}

fn perms(path: String, owner: DomId, reader: DomId) -> Change {
    let perms = [Perm::new(Access::None, owner), Perm::new(Access::Read, reader)];
    Change::SetPerms { path, perms: perms.into() }
}

const DOM0: DomId = DomId(0);

/// The nodes that libxl writes for a new domain (`libxl__domain_make`, init-dom0less.c), as far as a guest's drivers look at
/// them. A guest owns the directories it is to write in, may read the rest of its own, and sees nothing of others'.
fn domain_nodes(info: &DomainInfo) -> Vec<Change> {
    let domain = info.domain;
    let home = format!("/local/domain/{domain}");
    let kib = info.pages * (PAGE_SIZE as u64 / 1024);
    let mut changes =
        Vec::from([Change::Mkdir { path: home.clone() }, perms(home.clone(), DOM0, domain)]);
    for (key, value) in [
        ("name", format!("dom0less-{domain}")),
        ("domid", format!("{domain}")),
        ("vm", format!("/vm/{domain}")),
        ("memory/static-max", format!("{kib}")),
        ("memory/target", format!("{kib}")),
        ("control/platform-feature-multiprocessor-suspend", "1".into()),
        ("control/platform-feature-xs_reset_watches", "1".into()),
    ] {
        changes.push(node(format!("{home}/{key}"), value));
    }
    for vcpu in 0..info.vcpus {
        changes.push(node(format!("{home}/cpu/{vcpu}/availability"), "online"));
    }
    changes.push(Change::Mkdir { path: format!("{home}/device") });
    changes.push(Change::Mkdir { path: format!("{home}/device/vif") });
    for key in [
        "control/shutdown",
        "control/feature-poweroff",
        "control/feature-reboot",
        "control/feature-suspend",
        "control/sysrq",
        "device/suspend/event-channel",
        "data",
        "drivers",
        "feature",
        "attr",
        "error",
    ] {
        changes.push(node(format!("{home}/{key}"), ""));
        changes.push(perms(format!("{home}/{key}"), domain, DOM0));
    }
    changes.push(node(format!("/vm/{domain}/name"), format!("dom0less-{domain}")));
    changes
}

/// The nodes that libxl writes for a vif (libxl_nic.c): each end owns its directory, and the other may read it.
fn vif_nodes(domain: DomId) -> Vec<Change> {
    let back = format!("/local/domain/0/backend/vif/{domain}/0");
    let front = format!("/local/domain/{domain}/device/vif/0");
    let mac = format!("00:16:3e:00:{:02x}:{:02x}", domain.0 >> 8, domain.0 & 0xff);
    let mut changes = Vec::from([
        Change::Mkdir { path: front.clone() },
        perms(front.clone(), domain, DOM0),
        Change::Mkdir { path: back.clone() },
        perms(back.clone(), DOM0, domain),
    ]);
    for (key, value) in [
        ("backend", back.as_str()),
        ("backend-id", "0"),
        ("state", "1"),
        ("handle", "0"),
        ("mac", &mac),
        ("mtu", "1500"),
        ("trusted", "1"),
    ] {
        changes.push(node(format!("{front}/{key}"), value));
    }
    let id = format!("{domain}");
    for (key, value) in [
        ("frontend", front.as_str()),
        ("frontend-id", &id),
        ("online", "1"),
        ("state", "1"),
        ("handle", "0"),
        ("mac", &mac),
        ("bridge", "switch"),
        ("type", "vif"),
        ("script", ""),
        ("hotplug-status", ""),
    ] {
        changes.push(node(format!("{back}/{key}"), value));
    }
    changes
}

impl Toolstack {
    pub(crate) fn new(hv: Hv) -> Self {
        Self { hv, guests: BTreeMap::new() }
    }

    /// The guests that it looks after.
    pub(crate) fn guests(&self) -> impl Iterator<Item = DomId> {
        self.guests.keys().copied()
    }

    /// Takes on every guest that Xen has built.
    pub(crate) fn start(&mut self, store: &mut Store, binder: &Binder<Hv>, now: Instant) {
        for number in 1..=MAX_GUESTS {
            let info = match self.hv.domain_info(DomId(number)) {
                Ok(info) => info,
                Err(Errno::SRCH) => continue,
                Err(error) => {
                    log::error!("domain {number}: cannot be looked at: {error}");
                    continue;
                }
            };
            let domain = info.domain;
            if let Err(error) = Store::port_of(&self.hv, domain) {
                log::warn!("domain {domain}: left alone: {error}");
                continue;
            }
            let mut changes = domain_nodes(&info);
            changes.extend(vif_nodes(domain));
            store.client.commit(changes);
            // The nodes are to be there when the guest begins to look.
            while store.poll(now) {}
            match store.join(domain, binder, now) {
                Ok(()) => {
                    log::info!(
                        "domain {domain}: introduced, {} vCPUs, {} pages",
                        info.vcpus,
                        info.pages
                    );
                    self.guests.insert(domain, info);
                }
                Err(error) => log::error!("domain {domain}: cannot join the store: {error}"),
            }
        }
    }

    /// Some domain has shut down, crashed or died: lets go of all that is held for such.
    pub(crate) fn look(&mut self, store: &mut Store, backend: &mut Backend<Hv>, now: Instant) {
        let ended: Vec<_> = self
            .guests
            .keys()
            .filter_map(|domain| match self.hv.domain_info(*domain) {
                Ok(info) => info
                    .shutdown
                    .map(|reason| (*domain, Some(reason)))
                    .or(info.dying.then_some((*domain, None))),
                Err(_) => Some((*domain, None)),
            })
            .collect();
        for (domain, reason) in ended {
            match reason {
                Some(reason) => log::warn!("domain {domain}: has shut down: {reason}"),
                None => log::warn!("domain {domain}: is dying"),
            }
            backend.domain_gone(&mut store.client, domain, now);
            store.leave(domain);
            store.client.commit([
                Change::Rm { path: format!("/local/domain/{domain}") },
                Change::Rm { path: format!("/local/domain/0/backend/vif/{domain}") },
                Change::Rm { path: format!("/local/domain/0/error/backend/vif/{domain}") },
                Change::Rm { path: format!("/vm/{domain}") },
            ]);
            if let Err(error) = self.hv.destroy_domain(domain) {
                log::error!("domain {domain}: cannot be destroyed: {error}");
            }
            self.guests.remove(&domain);
            log::info!("domain {domain}: released");
        }
    }
}

//! What a toolstack writes to the store for a guest with one interface.

use hypercall::DomId;
use netif::mac::MacAddr;
use xenbus::client::Change;
use xenbus::wire::{Access, Perm};

/// A guest's home.
pub(crate) fn home(guest: DomId) -> String {
    format!("/local/domain/{guest}")
}

/// The frontend's directory.
pub(crate) fn front(guest: DomId) -> String {
    format!("/local/domain/{guest}/device/vif/0")
}

/// The backend's directory.
pub(crate) fn back(backend: DomId, guest: DomId) -> String {
    format!("/local/domain/{backend}/backend/vif/{guest}/0")
}

pub(crate) fn write(path: String, value: &str) -> Change {
    Change::Write { path, value: value.into() }
}

fn owned(path: &str, owner: DomId, reader: DomId) -> [Change; 2] {
    let perms = [Perm::new(Access::None, owner), Perm::new(Access::Read, reader)];
    let perms = Change::SetPerms { path: path.into(), perms: perms.into() };
    [Change::Mkdir { path: path.into() }, perms]
}

/// A domain's home, readable and nothing more for it.
pub(crate) fn domain(id: DomId) -> Vec<Change> {
    let home = home(id);
    let mut changes = Vec::from(owned(&home, DomId(0), id));
    changes.push(write(format!("{home}/domid"), &id.to_string()));
    changes.extend(owned(&format!("{home}/error"), id, DomId(0)));
    changes
}

/// Where a driver domain keeps its vifs.
pub(crate) fn driver_domain(id: DomId) -> Vec<Change> {
    let mut changes = domain(id);
    changes.extend(owned(&format!("{}/backend", home(id)), id, DomId(0)));
    changes.extend(owned(&format!("{}/backend/vif", home(id)), id, DomId(0)));
    changes
}

/// Both ends of a guest's interface.
pub(crate) fn vif(backend: DomId, guest: DomId, mac: MacAddr, rate: Option<&str>) -> Vec<Change> {
    let (front, back) = (front(guest), back(backend, guest));
    let mut changes = Vec::new();
    changes.extend(owned(&front, guest, backend));
    changes.extend(owned(&back, backend, guest));
    let mac = mac.to_string();
    for (key, value) in [
        ("frontend", front.as_str()),
        ("frontend-id", &guest.to_string()),
        ("online", "1"),
        ("state", "1"),
        ("handle", "0"),
        ("mac", &mac),
        ("hotplug-status", ""),
    ] {
        changes.push(write(format!("{back}/{key}"), value));
    }
    changes.extend(rate.map(|rate| write(format!("{back}/rate"), rate)));
    for (key, value) in [
        ("backend", back.as_str()),
        ("backend-id", &backend.to_string()),
        ("state", "1"),
        ("handle", "0"),
        ("mac", &mac),
        ("mtu", "1500"),
    ] {
        changes.push(write(format!("{front}/{key}"), value));
    }
    changes
}

/// Gives a guest's interface another backend: nodes that the new one may read.
pub(crate) fn other_backend(
    backend: DomId,
    guest: DomId,
    mac: MacAddr,
    rate: Option<&str>,
) -> Vec<Change> {
    let mut changes = vec![Change::Rm { path: front(guest) }];
    changes.extend(vif(backend, guest, mac, rate));
    changes
}

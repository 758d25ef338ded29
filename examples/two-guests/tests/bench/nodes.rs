//! What a toolstack writes for a guest whose interface is to connect at once.

use hypercall::DomId;
use netif::mac::MacAddr;
use xenbus::client::Change;
use xenbus::wire::{Access, Perm};

/// A guest's home, and both ends of its interface to domain 0.
pub fn nodes(guest: DomId, mac: MacAddr) -> Vec<Change> {
    let home = format!("/local/domain/{guest}");
    let front = format!("{home}/device/vif/0");
    let back = format!("/local/domain/0/backend/vif/{guest}/0");
    let mut changes = Vec::new();
    for (path, owner, reader) in
        [(&home, DomId(0), guest), (&front, guest, DomId(0)), (&back, DomId(0), guest)]
    {
        let perms = [Perm::new(Access::None, owner), Perm::new(Access::Read, reader)];
        changes.push(Change::Mkdir { path: path.clone() });
        changes.push(Change::SetPerms { path: path.clone(), perms: perms.into() });
    }
    let (id, mac) = (guest.to_string(), mac.to_string());
    for (dir, key, value) in [
        (&back, "frontend", front.as_str()),
        (&back, "frontend-id", &id),
        (&back, "online", "1"),
        (&back, "state", "1"),
        (&back, "mac", &mac),
        (&back, "hotplug-status", "connected"),
        (&front, "backend", &back),
        (&front, "backend-id", "0"),
        (&front, "state", "1"),
        (&front, "mac", &mac),
    ] {
        changes.push(Change::Write { path: format!("{dir}/{key}"), value: value.into() });
    }
    changes
}

//! What a hotplug script and `xl devd` do for a Linux backend, and who does it here.
//!
//! A toolstack writes a vif's directory with `hotplug-status` empty, and Linux's backend does not connect until a script has put its
//! interface onto a bridge and written `connected`. In dom0 the toolstack runs that script, and removes the directory in the
//! end. In a driver domain libxl does neither (libxl_device.c, `device_hotplug`): `xl devd` runs the script there, and once
//! the backend is `Closed` and the toolstack has set `online` to 0, it removes the directory, for which the toolstack waits ten
//! seconds (`LIBXL_DESTROY_TIMEOUT`).

use alloc::format;
use alloc::vec::Vec;

use hypercall::Instant;
use xenbus::client::{Change, Client};
use xenbus::device::State;

use crate::notice::VifId;

/// Nanoseconds that the directory of a vif stays when it is closed for good. The toolstack has to see `Closed` in it first:
/// libxl takes a directory that goes before for a failure (libxl_event.c, `devstate_callback`) and leaves the guest's end in the
/// store.
const LINGER: u64 = 1_000_000_000;

/// The node that says how far a vif is plugged in,
pub(crate) const STATUS: &str = "hotplug-status";
/// and what it says in the end.
pub(crate) const CONNECTED: &str = "connected";

/// Who plugs a vif in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hotplug {
    /// Somebody else: a script, or the embedder. A vif connects when `hotplug-status` reads `connected`, and its directory
    /// is left to the toolstack.
    Script,
    /// The backend, as its switch is all that there is to be plugged into. It writes `hotplug-status` with its offer, and a
    /// second after a vif was closed for good it removes its directory.
    Switch,
}

/// Vifs that are closed for good, and when their directories are to go.
#[derive(Debug, Default)]
pub(crate) struct Closed(Vec<(VifId, Instant)>);

impl Closed {
    /// The directory of `vif` says `Closed`, and that it is not to come back.
    pub(crate) fn found(&mut self, vif: VifId, now: Instant) {
        if self.0.iter().all(|(known, _)| *known != vif) {
            self.0.push((vif, now.after(LINGER)));
        }
    }

    /// Removes what is due below `root`, unless it has been made anew.
    pub(crate) fn remove_due(&mut self, root: &str, client: &mut Client, now: Instant) {
        self.0.retain(|(vif, at)| {
            if *at > now {
                return true;
            }
            let dir = format!("{root}/{}/{}", vif.domain, vif.handle);
            let expect = |key: &str, value: &str| Change::Expect {
                path: format!("{dir}/{key}"),
                value: value.into(),
            };
            let closed = [expect("state", State::Closed.text()), expect("online", "0")];
            client.commit(closed.into_iter().chain([Change::Rm { path: dir.clone() }]));
            false
        });
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.0.iter().map(|(_, at)| *at).min()
    }
}

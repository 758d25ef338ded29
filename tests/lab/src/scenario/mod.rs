//! The scenarios: what is started and what is checked.

pub mod dom0;
mod guest;
mod life;
pub mod linux;
mod store;
pub mod traffic;
pub mod transfer;
mod udp;
mod uplink;
mod withdraw;
pub mod x86;

use anyhow::{Context as _, Result};

use crate::hypervisor::Xen;
use crate::run::Tally;

/// A scenario by name.
pub struct Scenario {
    /// Its name, as given to `cargo lab`.
    pub name: &'static str,
    /// What it is, in one line.
    pub about: &'static str,
    /// The Xen that it runs on unless another is asked for.
    pub xen: Xen,
    /// Whether `cargo lab test` without a name runs it, and on which Xen.
    pub by_default: Option<Xen>,
    /// Runs it and counts its checks.
    pub test: fn(&'static str) -> Result<Tally>,
    /// Starts it with the consoles on the terminal.
    pub boot: fn(&'static str) -> Result<()>,
}

impl Scenario {
    /// Whether it is of those whose Xen can be chosen.
    pub fn is_on_arm(&self) -> bool {
        self.name.ends_with("-aarch64")
    }
}

/// All of them.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "dom0-aarch64",
        about: "this project's dom0 with two unmodified Linux guests",
        xen: Xen::Debian,
        by_default: Some(Xen::Debug),
        test: dom0::test,
        boot: dom0::boot,
    },
    Scenario {
        name: "withdraw-aarch64",
        about: "the same, while an operator takes datapaths away from under traffic and gives them back",
        xen: Xen::Debian,
        by_default: Some(Xen::Debian),
        test: withdraw::test,
        boot: dom0::boot,
    },
    Scenario {
        name: "guest-aarch64",
        about: "two guests of this project and two Linux ones on this project's dom0: Rust at both ends and in the middle",
        xen: Xen::Debian,
        by_default: Some(Xen::Debian),
        test: guest::test,
        boot: guest::boot,
    },
    Scenario {
        name: "uplink-aarch64",
        about: "this project's dom0 with a NIC, by which two Linux guests reach servers outside",
        xen: Xen::Debian,
        by_default: Some(Xen::Debian),
        test: uplink::test,
        boot: uplink::boot,
    },
    Scenario {
        name: "identity-aarch64",
        about: "the same on a Xen with grant_map_identity, which it takes away and gives back in mid-transfer",
        xen: Xen::Debug,
        by_default: Some(Xen::Debug),
        test: uplink::identity::test,
        boot: uplink::identity::boot,
    },
    Scenario {
        name: "linux-dom0-aarch64",
        about: "the same guests with Linux as dom0, for comparison (on demand)",
        xen: Xen::Debian,
        by_default: None,
        test: linux::test,
        boot: linux::boot,
    },
    Scenario {
        name: "linux-uplink-aarch64",
        about: "the same guests and servers with Linux, its bridge and the same NIC as dom0, for comparison (on demand)",
        xen: Xen::Debian,
        by_default: None,
        test: uplink::linux_test,
        boot: uplink::linux_boot,
    },
    Scenario {
        name: "guest-x86_64",
        about: "this project's guest under xl, on Linux's own backend, with a stock Linux guest beside it",
        xen: Xen::Debian,
        by_default: Some(Xen::Debian),
        test: x86::guest::test,
        boot: x86::guest::boot,
    },
    Scenario {
        name: "save-restore-x86_64",
        about: "the same guest is saved and restored three times while data flows",
        xen: Xen::Debian,
        by_default: Some(Xen::Debian),
        test: x86::save::test,
        boot: x86::save::boot,
    },
    Scenario {
        name: "driver-domain-x86_64",
        about: "this project's driver domain serves Linux PV, Linux PVH and this project's guest at once",
        xen: Xen::Debian,
        by_default: Some(Xen::Debian),
        test: x86::driver::test,
        boot: x86::driver::boot,
    },
    Scenario {
        name: "linux-x86_64",
        about: "stock Linux guests, PV and PVH, on Linux's own backend, for comparison (on demand)",
        xen: Xen::Debian,
        by_default: None,
        test: x86::linux::test,
        boot: x86::linux::boot,
    },
];

/// The scenario of a name.
pub fn find(name: &str) -> Result<&'static Scenario> {
    ALL.iter()
        .find(|s| s.name == name)
        .with_context(|| format!("no scenario {name}: `cargo lab list` shows them"))
}

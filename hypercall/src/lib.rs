#![no_std]
#![doc = include_str!("../README.md")]

pub mod abi;
pub mod arch;
mod error;
mod hypervisor;
mod native;
mod types;

pub use error::{Errno, GrantStatus};
pub use hypervisor::{
    DomainInfo, GrantTableSize, Hypervisor, Shutdown, ShutdownReason, Suspended, Toolstack, Window,
};
pub use native::{Platform, Xen};
pub use types::{
    BusAddr, DomId, Gfn, GrantRef, Handle, Instant, MapHandle, PAGE_SHIFT, PAGE_SIZE, PageOffset,
    Port, VcpuId, Virq,
};

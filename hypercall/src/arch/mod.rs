//! All that depends on the processor: the hypercall instruction and the layout of the shared info page.
//!
//! Nothing outside this module may look at the target architecture.

#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod imp;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod imp;

pub use imp::{hypercall5, shared_info};

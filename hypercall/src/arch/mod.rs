//! All that depends on the processor: the hypercall instruction, the layout of the shared info page, and copying what others
//! write meanwhile.
//!
//! Nothing outside this module may look at the target architecture.

#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod imp;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod imp;

pub use imp::{BULK_ALIGN, BULK_BLOCKS, copy_blocks, hypercall5, shared_info};

/// Bytes that [`copy_blocks`] counts in.
pub const BLOCK_SIZE: usize = 64;

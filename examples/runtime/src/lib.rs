#![no_std]
#![doc = include_str!("../README.md")]
// On a host nothing boots, and what boot uses is used by tests alone.
#![cfg_attr(not(target_os = "none"), allow(dead_code))]

#[cfg(feature = "virtio-net")]
extern crate alloc;
#[cfg(test)]
extern crate std;

#[cfg_attr(all(target_os = "none", target_arch = "aarch64"), path = "aarch64/mod.rs")]
#[cfg_attr(all(target_os = "none", target_arch = "x86_64"), path = "x86_64/mod.rs")]
#[cfg_attr(not(target_os = "none"), path = "absent.rs")]
mod arch;
#[cfg(any(target_arch = "aarch64", not(target_os = "none")))]
mod clock;
mod console;
#[cfg(any(target_arch = "x86_64", not(target_os = "none")))]
mod console_ring;
mod heap;
mod machine;
mod pages;
#[cfg(any(target_arch = "x86_64", not(target_os = "none")))]
mod pv_clock;
mod ranges;
mod sleep;
#[cfg(any(target_arch = "x86_64", not(target_os = "none")))]
mod start_info;
mod store;
#[cfg(any(target_arch = "aarch64", not(target_os = "none")))]
mod tree;
#[cfg(feature = "virtio-net")]
pub mod virtio;
mod windows;

pub use arch::{CAN_SUSPEND, now, suspend};
pub use console::{is_line_open, print};
pub use heap::{HeapStats, heap_stats};
pub use hypercall::Suspended;
pub use machine::{Hv, Machine};
pub use sleep::Sleep;
pub use store::{OwnPage, StoreRing, store_ring};
pub use windows::WINDOWS;

/// What the machine said of itself at boot.
#[derive(Clone, Copy, Debug)]
pub struct BootInfo {
    /// The command line; empty if there is none.
    pub bootargs: &'static str,
    /// Bytes of memory that this domain was given, the image included.
    pub memory: u64,
}

/// Names the function that an image runs once memory, clock, interrupts and console are up:
/// `fn(Hv, BootInfo) -> !`. On a host, where the image cannot run, it becomes a program that says so.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[cfg(target_os = "none")]
        #[unsafe(no_mangle)]
        fn runtime_main(hv: $crate::Hv, boot: $crate::BootInfo) -> ! {
            let main: fn($crate::Hv, $crate::BootInfo) -> ! = $main;
            main(hv, boot)
        }

        #[cfg(not(target_os = "none"))]
        fn main() {
            let _: fn($crate::Hv, $crate::BootInfo) -> ! = $main;
            std::eprintln!(
                "an image for bare metal: build it for aarch64-unknown-none or x86_64-unknown-none"
            );
        }
    };
}

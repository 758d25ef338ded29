#![forbid(unsafe_code)]
//! Our numbers and layouts against Xen's own headers, and our ring against Xen's own macros.
//!
//! The tests compile C, so they need a C compiler and libxen-dev; without them they fail and say so. `tests/abi.rs`
//! compares sizes, offsets, constants and encoded slots; `tests/ring.rs` lets each of our ends face one made of the macros
//! in io/ring.h, on one page.

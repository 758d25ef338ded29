//! What a network card with offloads would do for a sender: fill in checksums left blank, and cut a large TCP packet into
//! segments. It is done here for a receiver that did not agree to do without.
//!
//! Everything works on a private, contiguous copy of one Ethernet frame, and believes nothing in it.

pub mod checksum;
pub mod segment;

pub use netif::headers;

#[cfg(test)]
mod tests;

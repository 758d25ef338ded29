//! Machines with Linux as dom0, xl and Linux's own backend.

pub mod linux;

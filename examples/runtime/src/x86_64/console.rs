//! This domain's console: a ring of the toolstack's (io/console.h), and before that and at the end the port whose output
//! Xen prints itself.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use grant::SharedPage;
use hypercall::abi::hvm_param;
use hypercall::{DomId, Gfn, Hypervisor, Port, Toolstack};
use spin::Once;
use x86_64::instructions::port::PortWriteOnly;

use super::{now, show};
use crate::console_ring::ConsoleRing;
use crate::machine::HV;

/// How long a line may wait for room, in nanoseconds. xenconsoled reads a domain that prints much once in 200 ms.
const PATIENCE: u64 = 1_000_000_000;

/// `XEN_HVM_DEBUGCONS_IOPORT` (hvm/hvm_op.h)
const DEBUG_PORT: u16 = 0xe9;

static RING: Once<ConsoleRing<SharedPage>> = Once::new();
/// The port by which the other end is told. Another one after a suspend.
static PORT: AtomicU32 = AtomicU32::new(0);
/// Nobody reads: a line was given up. Until one fits, none waits.
static STUCK: AtomicBool = AtomicBool::new(false);

fn parameter(index: u32) -> Option<u64> {
    HV.hvm_param(DomId::SELF, index).ok().filter(|value| *value != 0 && *value != u64::MAX)
}

/// Looks where the console is: at boot, and after a suspend.
pub fn init() {
    let frame = parameter(hvm_param::CONSOLE_PFN).map(Gfn);
    let port = parameter(hvm_param::CONSOLE_EVTCHN).and_then(|port| port.try_into().ok());
    if let (Some(frame), Some(port)) = (frame, port)
        && let Some(page) = show(frame)
    {
        PORT.store(port, Ordering::Relaxed);
        STUCK.store(false, Ordering::Relaxed);
        // The page stays where it is: a saved domain has it with the rest of its memory.
        // SAFETY: mapped for good, and page-aligned, by `show`; no reference to it is ever made.
        RING.call_once(|| ConsoleRing::new(unsafe { SharedPage::new(page) }));
    }
}

/// Prints on this domain's console.
pub fn write(text: &[u8]) {
    let Some(ring) = RING.get() else { return debug(text) };
    // A terminal wants to be told to go back to the line's start.
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        match line.strip_suffix(b"\n") {
            Some(line) => {
                put(ring, line);
                put(ring, b"\r\n");
            }
            None => put(ring, line),
        }
    }
    notify();
}

/// Prints what is said before the domain ends itself, wherever it may be read, and waits until it was.
pub fn last_words(text: &[u8]) {
    debug(text);
    if let Some(ring) = RING.get() {
        write(text);
        patiently(|| ring.is_drained());
    }
}

fn put(ring: &ConsoleRing<SharedPage>, mut text: &[u8]) {
    patiently(|| {
        text = text.get(ring.put(text)..).unwrap_or_default();
        text.is_empty()
    });
}

/// Tries until it is done or patience is at its end; while nobody reads, once.
fn patiently(mut done: impl FnMut() -> bool) {
    if done() {
        STUCK.store(false, Ordering::Relaxed);
        return;
    }
    if STUCK.load(Ordering::Relaxed) {
        return;
    }
    let start = now();
    notify();
    while !done() {
        if now().since(start) > PATIENCE {
            return STUCK.store(true, Ordering::Relaxed);
        }
        HV.yield_now();
    }
}

fn notify() {
    // Nobody to be told is nobody who reads.
    let _ = HV.notify(Port(PORT.load(Ordering::Relaxed)));
}

/// Has Xen print, line by line, to its own console.
fn debug(text: &[u8]) {
    let mut port = PortWriteOnly::new(DEBUG_PORT);
    for byte in text {
        // SAFETY: to a guest of this kind the port is Xen's, and all that Xen does is to print.
        unsafe { port.write(*byte) };
    }
}

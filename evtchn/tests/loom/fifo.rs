//! Delivery through queues.

use evtchn::Delivery;
use hypercall::abi::{FIFO_LINK_MASK, FIFO_LINKED, FIFO_MASKED, FIFO_PENDING};
use hypercall::{Hypervisor, Port};
use loom::sync::atomic::Ordering::SeqCst;

use crate::handler::{Dispatch, Handler, Size, close, delivery, events};
use crate::machine::Machine;

const SIZE: Size = Size { turns: 2, preemptions: 3 };

fn machine() -> Machine {
    Machine::new(true, false)
}

/// In what order a twin does things, as far as it is not the right one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Twin {
    Right,
    /// Takes the ready bits, then clears the upcall.
    ReadyFirst,
    /// Asks for the head of the queue, then takes the ready bits.
    HeadFirst,
    /// Reads the link, then clears it.
    LinkFirst,
    /// Looks whether the port is pending, then clears its mask.
    LooksFirst,
    /// Clears the mask and leaves it at that.
    NeverLooks,
}

/// A twin's upcall, by hand: all that is in the queue.
fn by_hand(handler: &mut Handler, twin: Twin) {
    let machine = handler.machine.clone();
    let early = (twin == Twin::HeadFirst).then(|| machine.head().load(SeqCst));
    let ready = if twin == Twin::ReadyFirst {
        let ready = machine.ready().swap(0, SeqCst);
        machine.upcall_pending().swap(0, SeqCst);
        ready
    } else {
        machine.upcall_pending().swap(0, SeqCst);
        machine.ready().swap(0, SeqCst)
    };
    if ready == 0 {
        return;
    }
    let mut next = early.unwrap_or_else(|| machine.head().load(SeqCst));
    // As many as there are ports, and once more.
    for _ in 0..3 {
        if next == 0 {
            return;
        }
        let port = Port(next);
        let word = machine.event(port);
        let seen = if twin == Twin::LinkFirst {
            let seen = word.load(SeqCst);
            word.fetch_and(!(FIFO_LINKED | FIFO_LINK_MASK), SeqCst);
            seen
        } else {
            word.fetch_and(!(FIFO_LINKED | FIFO_LINK_MASK), SeqCst)
        };
        next = seen & FIFO_LINK_MASK;
        if seen & (FIFO_PENDING | FIFO_MASKED) != FIFO_PENDING {
            continue;
        }
        word.fetch_or(FIFO_MASKED, SeqCst);
        word.fetch_and(!FIFO_PENDING, SeqCst);
        handler.work_for(port);
        unmask_by_hand(&machine, port, twin);
    }
}

fn unmask_by_hand(machine: &Machine, port: Port, twin: Twin) {
    let word = machine.event(port);
    match twin {
        Twin::NeverLooks => {
            word.fetch_and(!FIFO_MASKED, SeqCst);
        }
        Twin::LooksFirst => {
            if word.load(SeqCst) & FIFO_PENDING != 0 {
                machine.unmask(port).unwrap();
            } else {
                word.fetch_and(!FIFO_MASKED, SeqCst);
            }
        }
        _ => {
            let seen = word.load(SeqCst);
            let quiet = seen & FIFO_PENDING == 0;
            let open = seen & !FIFO_MASKED;
            if !quiet || word.compare_exchange(seen, open, SeqCst, SeqCst).is_err() {
                machine.unmask(port).unwrap();
            }
        }
    }
}

fn twin(twin: Twin, sends: &'static [usize]) {
    events(machine, SIZE, sends, 16, move |handler| by_hand(handler, twin));
}

#[test]
fn a_port_that_is_raised_again_loses_no_event() {
    assert_eq!(delivery(machine), Delivery::Fifo);
    events(machine, SIZE, &[0, 0, 0], 16, Handler::turn);
}

#[test]
fn several_ports_lose_no_event() {
    events(machine, SIZE, &[0, 1, 0], 16, Handler::turn);
}

#[test]
fn a_budget_of_one_loses_no_event() {
    events(machine, SIZE, &[1, 0, 1], 1, Handler::turn);
}

#[test]
fn by_hand_and_in_order_loses_no_event() {
    twin(Twin::Right, &[0, 1, 0]);
}

#[test]
#[should_panic(expected = "lost")]
fn the_ready_bits_before_the_upcall_lose_one() {
    twin(Twin::ReadyFirst, &[0, 0, 0]);
}

#[test]
#[should_panic(expected = "lost")]
fn the_head_before_the_ready_bits_loses_one() {
    twin(Twin::HeadFirst, &[0, 1, 0]);
}

#[test]
#[should_panic(expected = "lost")]
fn the_link_before_it_is_cleared_loses_one() {
    twin(Twin::LinkFirst, &[0, 1, 0]);
}

#[test]
#[should_panic(expected = "lost")]
fn looking_for_more_before_unmasking_loses_one() {
    twin(Twin::LooksFirst, &[0, 0, 0]);
}

#[test]
#[should_panic(expected = "lost")]
fn unmasking_without_a_look_loses_one() {
    twin(Twin::NeverLooks, &[0, 0, 0]);
}

#[test]
#[should_panic(expected = "lost")]
fn a_xen_that_forgets_to_clear_its_tail_loses_one() {
    let forgetful = || Machine::new(true, true);
    events(forgetful, SIZE, &[0, 0, 0], 16, Handler::turn);
}

#[test]
fn closing_under_a_handler_is_safe() {
    close(machine, false, Dispatch::Channel);
}

#[test]
fn a_port_that_is_used_again_under_a_handler_hears() {
    close(machine, true, Dispatch::Channel);
}

#[test]
#[should_panic(expected = "was opened")]
fn opening_by_number_opens_what_is_closed() {
    close(machine, false, Dispatch::Port);
}

#[test]
#[should_panic(expected = "deaf")]
fn ending_only_what_was_there_before_leaves_the_next_deaf() {
    close(machine, true, Dispatch::SameChannel);
}

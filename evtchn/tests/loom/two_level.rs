//! Delivery by bits.

use evtchn::Delivery;
use loom::sync::atomic::Ordering::SeqCst;

use crate::handler::{Dispatch, Handler, Size, close, delivery, events};
use crate::machine::Machine;

const SIZE: Size = Size { turns: 2, preemptions: 5 };

fn machine() -> Machine {
    Machine::new(false, false)
}

/// A twin's upcall on the first port alone, by hand.
fn by_hand(handler: &mut Handler, selector_first: bool, looks_again: bool) {
    let machine = handler.machine.clone();
    let (port, bit) = (machine.ports()[0], 1 << machine.ports()[0].0);
    let selected = if selector_first {
        let selected = machine.pending_sel().swap(0, SeqCst);
        machine.upcall_pending().swap(0, SeqCst);
        selected
    } else {
        machine.upcall_pending().swap(0, SeqCst);
        machine.pending_sel().swap(0, SeqCst)
    };
    let ready = machine.pending(port).load(SeqCst) & !machine.mask(port).load(SeqCst);
    if selected & 1 == 0 || ready & bit == 0 {
        return;
    }
    machine.mask(port).fetch_or(bit, SeqCst);
    machine.pending(port).fetch_and(!bit, SeqCst);
    handler.work_for(port);
    machine.open(port);
    if looks_again && machine.pending(port).load(SeqCst) & bit != 0 {
        machine.pending_sel().fetch_or(1, SeqCst);
        machine.upcall_pending().store(1, SeqCst);
    }
}

#[test]
fn a_port_that_is_raised_again_loses_no_event() {
    assert_eq!(delivery(machine), Delivery::TwoLevel);
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
    events(machine, SIZE, &[0, 0, 0], 16, |handler| by_hand(handler, false, true));
}

#[test]
#[should_panic(expected = "lost")]
fn the_selector_before_the_upcall_loses_one() {
    events(machine, SIZE, &[0, 0, 0], 16, |handler| by_hand(handler, true, true));
}

#[test]
#[should_panic(expected = "lost")]
fn unmasking_without_another_look_loses_one() {
    events(machine, SIZE, &[0, 0, 0], 16, |handler| by_hand(handler, false, false));
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

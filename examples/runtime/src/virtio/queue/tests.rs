//! The queue against a device in software, which reads and writes the same pages by the addresses that it is told: an honest one,
//! and one that says what it likes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::vec::Vec;

use hypercall::PAGE_SIZE;
use sim::{DomainConfig, Sim, SimHv};

use super::*;
use crate::virtio::software::{Device, Found};

fn device_of<T>(sim: &Sim, hv: &SimHv, queue: &Queue<T>) -> Device {
    Device::new(sim, hv, queue.areas(), queue.size())
}

fn fresh<T>(size: u32) -> (Queue<T>, Device) {
    let sim = Sim::new();
    let hv = sim.create(DomainConfig::dom0());
    let queue = Queue::new(&hv, size, true, true).unwrap();
    let device = device_of(&sim, &hv, &queue);
    (queue, device)
}

fn parts(number: u64, count: usize) -> impl Iterator<Item = Part> {
    (0..count as u64).map(move |index| Part {
        address: number << 16 | index,
        len: 100 + index as u32,
        writable: number.is_multiple_of(3),
    })
}

fn push<T>(queue: &mut Queue<T>, parts: impl IntoIterator<Item = Part>, token: T) -> Option<u16> {
    let head = queue.next_head();
    let chain = queue.describe(parts)?;
    queue.queue(chain, token);
    Some(head)
}

#[test]
fn sizes_are_powers_of_two_and_fit() {
    for (asked, size) in [(1, 1), (2, 2), (255, 128), (256, 256), (1024, 256), (u32::MAX, 256)] {
        let (queue, _) = fresh::<()>(asked);
        assert_eq!((queue.size(), queue.room()), (size, size));
        let [table, available, used] = queue.areas();
        assert!(table % 16 == 0 && available % 2 == 0 && used % 4 == 0);
        assert!(available + 6 + 2 * u64::from(size) <= used);
        assert!(used % PAGE_SIZE as u64 + 6 + 8 * u64::from(size) <= PAGE_SIZE as u64);
    }
    let sim = Sim::new();
    assert!(Queue::<()>::new(&sim.create(DomainConfig::dom0()), 0, true, true).is_none());
}

#[test]
fn the_device_finds_what_was_queued_once_it_is_shown() {
    let (mut queue, mut device) = fresh(8);
    let first = push(&mut queue, parts(1, 3), 'a').unwrap();
    let second = push(&mut queue, parts(3, 1), 'b').unwrap();
    assert_eq!(device.take(), None, "not shown yet");
    assert!(queue.show());
    assert!(!queue.show(), "nothing new");
    assert_eq!(device.take(), Some(Found { head: first, parts: parts(1, 3).collect() }));
    assert_eq!(device.take(), Some(Found { head: second, parts: parts(3, 1).collect() }));
    assert_eq!(device.take(), None);
    assert_eq!((queue.room(), queue.under_way()), (4, 2));
    assert_eq!(queue.pop(), Ok(None));
    device.give(second, 60);
    device.give(first, 0);
    assert_eq!(queue.pop(), Ok(Some(Done { token: 'b', head: second, written: 60 })));
    assert_eq!(queue.pop(), Ok(Some(Done { token: 'a', head: first, written: 0 })));
    assert_eq!(queue.pop(), Ok(None));
    assert_eq!((queue.room(), queue.under_way()), (8, 0));
}

#[test]
fn what_does_not_fit_changes_nothing() {
    let (mut queue, mut device) = fresh(8);
    push(&mut queue, parts(1, 5), 1).unwrap();
    assert_eq!(push(&mut queue, parts(2, 4), 2), None);
    assert_eq!(push(&mut queue, [], 3), None);
    assert_eq!(queue.room(), 3);
    push(&mut queue, parts(4, 3), 4).unwrap();
    assert_eq!(push(&mut queue, parts(5, 1), 5), None);
    let _ = queue.show();
    assert_eq!(device.take().unwrap().parts, parts(1, 5).collect::<Vec<_>>());
    assert_eq!(device.take().unwrap().parts, parts(4, 3).collect::<Vec<_>>());
}

/// Numbers that look random and are the same each time.
fn noise(mut state: u64) -> impl FnMut(u64) -> u64 {
    move |below| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

#[test]
fn nothing_is_lost_doubled_or_mixed_up_in_any_order_across_the_wrap() {
    for size in [1, 2, 8, 256] {
        let (mut queue, mut device) = fresh(size);
        let mut random = noise(size.into());
        let (mut next, mut with_device) = (0_u64, Vec::new());
        let mut expected: BTreeMap<u64, usize> = BTreeMap::new();
        let mut given = VecDeque::new();
        // More chains than a 16-bit index counts.
        while next < 70_000 {
            for _ in 0..random(u64::from(size) + 1) {
                let count = 1 + random(u64::from(size).min(5)) as usize;
                let fits = count <= queue.room().into();
                assert_eq!(push(&mut queue, parts(next, count), next).is_some(), fits);
                if fits {
                    expected.insert(next, count);
                    next += 1;
                }
            }
            let _ = queue.show();
            with_device.extend(core::iter::from_fn(|| device.take()));
            for _ in 0..random(u64::from(size) + 1) {
                if with_device.is_empty() {
                    break;
                }
                let found = with_device.swap_remove(random(with_device.len() as u64) as usize);
                let number = found.parts[0].address >> 16;
                let count = expected[&number];
                assert_eq!(found.parts, parts(number, count).collect::<Vec<_>>());
                let written = if number.is_multiple_of(3) { random(100) as u32 } else { 0 };
                device.give(found.head, written);
                given.push_back(Done { token: number, head: found.head, written });
            }
            while let Some(done) = queue.pop().unwrap() {
                assert_eq!(Some(&done), given.front());
                given.pop_front();
                expected.remove(&done.token).unwrap();
            }
            assert!(given.is_empty());
            let held: usize = expected.values().sum();
            assert_eq!(usize::from(queue.room()) + held, size as usize);
            assert_eq!(usize::from(queue.under_way()), expected.len());
        }
    }
}

#[test]
fn the_device_is_notified_when_it_asked_and_not_otherwise() {
    let (mut queue, mut device) = fresh(8);
    // It asked for nothing yet: index 0 is where both begin.
    push(&mut queue, parts(1, 1), ()).unwrap();
    push(&mut queue, parts(1, 1), ()).unwrap();
    assert!(queue.show(), "once for both");
    device.take();
    device.take();
    // It looks by itself: no wish is ahead.
    push(&mut queue, parts(1, 1), ()).unwrap();
    assert!(!queue.show());
    device.take();
    device.wish(1);
    push(&mut queue, parts(1, 1), ()).unwrap();
    assert!(!queue.show(), "it wants two");
    push(&mut queue, parts(1, 1), ()).unwrap();
    assert!(queue.show());
}

#[test]
fn an_interrupt_comes_when_asked_or_there_is_something_already() {
    let (mut queue, mut device) = fresh(8);
    let heads: Vec<_> = (0..6).map(|n| push(&mut queue, parts(1, 1), n).unwrap()).collect();
    let _ = queue.show();
    assert!(!queue.arm(2));
    for head in &heads[..2] {
        device.give(*head, 0);
    }
    assert_eq!(device.interrupts, 0);
    device.give(heads[2], 0);
    assert_eq!(device.interrupts, 1);
    // What was done before it was armed may have gone without an interrupt.
    assert!(queue.arm(0) && queue.arm(2) && !queue.arm(3));
    while queue.pop().unwrap().is_some() {}
    assert!(!queue.arm(0));
    device.give(heads[3], 0);
    assert_eq!(device.interrupts, 2);
}

#[test]
fn without_event_indices_the_flags_decide() {
    let sim = Sim::new();
    let hv = sim.create(DomainConfig::dom0());
    let mut queue = Queue::new(&hv, 8, false, true).unwrap();
    let device = device_of(&sim, &hv, &queue);
    push(&mut queue, parts(1, 1), ()).unwrap();
    assert!(queue.show());
    device.write(queue.areas()[2], &[1, 0]);
    push(&mut queue, parts(1, 1), ()).unwrap();
    assert!(!queue.show());
    assert!(!queue.arm(0));
    assert_eq!(device.read_u16(queue.areas()[1]), 0, "interrupts are wanted");
}

#[test]
fn a_device_that_is_done_with_what_it_was_not_given_is_not_believed() {
    type Lie = fn(&mut Device);
    let lies: [(Lie, Fault); 8] = [
        (|device| device.say(8, 0), Fault::Descriptor(8)),
        (|device| device.say(u32::MAX, 0), Fault::Descriptor(u32::MAX)),
        // The first of the chain that was shown, but for its upper half.
        (|device| device.say(1 << 16, 0), Fault::Descriptor(1 << 16)),
        // In the middle of a chain.
        (|device| device.say(1, 0), Fault::Descriptor(1)),
        // Free.
        (|device| device.say(7, 0), Fault::Descriptor(7)),
        // Queued, but never shown.
        (|device| device.say(3, 0), Fault::Descriptor(3)),
        // More than was shown.
        (|device| device.set_index(2), Fault::Index { used: 2, seen: 0 }),
        // Back.
        (|device| device.set_index(u16::MAX), Fault::Index { used: u16::MAX, seen: 0 }),
    ];
    for (lie, fault) in lies {
        let (mut queue, mut device) = fresh(8);
        let head = push(&mut queue, parts(1, 3), "shown").unwrap();
        let _ = queue.show();
        let hidden = push(&mut queue, parts(1, 2), "hidden").unwrap();
        assert_eq!((head, hidden), (0, 3));
        lie(&mut device);
        assert_eq!(queue.pop(), Err(fault));
        // From here on it is silent, whatever the device does.
        device.set_index(1);
        assert_eq!(queue.pop(), Ok(None));
        assert_eq!(queue.room(), 0);
        assert!(!queue.show() && !queue.arm(0));
        assert_eq!(queue.abandon().collect::<Vec<_>>(), ["shown", "hidden"]);
        queue.clear();
        assert_eq!((queue.room(), queue.under_way()), (8, 0));
        // As new.
        let mut device = device.renewed();
        let head = push(&mut queue, parts(1, 8), "again").unwrap();
        let _ = queue.show();
        assert_eq!(device.take().unwrap().parts.len(), 8);
        device.give(head, 0);
        assert_eq!(queue.pop(), Ok(Some(Done { token: "again", head, written: 0 })));
    }
}

#[test]
fn a_chain_comes_back_once() {
    let (mut queue, mut device) = fresh(8);
    let head = push(&mut queue, parts(1, 1), 1).unwrap();
    push(&mut queue, parts(1, 1), 2).unwrap();
    let _ = queue.show();
    device.give(head, 0);
    device.give(head, 0);
    assert!(matches!(queue.pop(), Ok(Some(Done { token: 1, .. }))));
    assert_eq!(queue.pop(), Err(Fault::Descriptor(head.into())));
}

#[test]
fn more_is_not_written_than_there_was_room_for() {
    for (writable, written, fits) in [(true, 300, true), (true, 301, false), (false, 1, false)] {
        let (mut queue, mut device) = fresh(8);
        let part = Part { address: 0x1000, len: 150, writable };
        let head = push(&mut queue, [part, part], ()).unwrap();
        let _ = queue.show();
        device.give(head, written);
        let said = queue.pop();
        assert_eq!(said.is_ok(), fits, "{said:?}");
    }
}

#[test]
fn whatever_a_device_writes_each_token_comes_back_at_most_once_and_nothing_is_mapped_twice() {
    for seed in 0..200 {
        let (mut queue, mut device) = fresh(16);
        let mut random = noise(seed);
        let (mut next, mut held) = (0_u32, BTreeSet::new());
        for _ in 0..300 {
            match random(8) {
                0 => device.set_index(random(1 << 16) as u16),
                1 => device.say(random(20) as u32, random(400) as u32),
                2 | 3 => {
                    if let Some(found) = device.take() {
                        device.give(found.head, random(200) as u32);
                    }
                }
                4 => {
                    let _ = queue.show();
                }
                5 => {
                    let _ = queue.arm(random(4) as u16);
                }
                _ => {
                    if push(&mut queue, parts(u64::from(next), 1 + random(4) as usize), next)
                        .is_some()
                    {
                        held.insert(next);
                        next += 1;
                    }
                }
            }
            match queue.pop() {
                Ok(Some(done)) => assert!(held.remove(&done.token)),
                Ok(None) => {}
                Err(_) => {
                    let left: BTreeSet<_> = queue.abandon().collect();
                    assert!(left.is_subset(&held));
                    // One may have been dropped with the fault.
                    assert!(held.len() - left.len() <= 1);
                    held.clear();
                    queue.clear();
                    device = device.renewed();
                }
            }
        }
    }
}

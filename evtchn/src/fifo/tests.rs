//! The scan of queues that no right-minded Xen would make, and any order of things that happen to ports.

use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;

use proptest::prelude::*;
use sim::{DomainConfig, Sim, SimHv};

use super::*;
use crate::{Channel, Upcalls, Work};
use hypercall::Instant;

fn queues(hv: &SimHv) -> (EventArray, Queues) {
    let array = EventArray::new();
    let queues = Queues::start(hv, VcpuId(0)).unwrap();
    array.cover(hv, Port(WORDS as u32)).unwrap();
    (array, queues)
}

proptest! {
    /// Whatever is in the words and the control block, a scan ends, and hands out ports that exist.
    #[test]
    fn any_words_are_survived(
        ready: u32,
        heads in prop::array::uniform16(prop_oneof![0_u32..64, any::<u32>()]),
        words in prop::collection::vec((prop_oneof![0_u32..64, any::<u32>()], any::<u8>()), 64),
        budget in 0_usize..100,
    ) {
        let sim = Sim::new();
        let hv = sim.create(DomainConfig::guest());
        let (array, mut queues) = queues(&hv);
        for (port, (link, bits)) in words.iter().enumerate() {
            let word = array.word(Port(port as u32)).unwrap();
            word.store(link & FIFO_LINK_MASK | u32::from(*bits) << 24, Ordering::SeqCst);
        }
        for (queue, head) in heads.iter().enumerate() {
            let offset = core::mem::offset_of!(FifoControlBlock, head) + queue * 4;
            // SAFETY: the control block is a page, and the offset that of a field.
            unsafe { word(queues.control, offset) }.store(*head, Ordering::SeqCst);
        }
        for _ in 0..4 {
            queues.ready().store(ready, Ordering::SeqCst);
            let mut got = Vec::new();
            let (found, _) = queues.scan(&array, budget, |port| got.push(port));
            prop_assert!(found == got.len() && found <= budget);
            prop_assert!(got.iter().all(|port| array.word(*port).is_some()));
        }
    }

    /// Against what each port's state should be: handed out if it was raised, is bound, and its last event is over.
    #[test]
    fn any_order_of_things_loses_nothing(
        steps in prop::collection::vec((0_u8..8, 0_usize..6, 0_usize..4), 1..200),
    ) {
        let sim = Sim::new();
        let (us, peer) = (sim.create(DomainConfig::guest()), sim.create(DomainConfig::guest()));
        let mut upcalls = Upcalls::new(&us, VcpuId(0));
        let mut channels: BTreeMap<Port, (Channel<SimHv>, Port)> = BTreeMap::new();
        let (mut raised, mut busy) = (BTreeSet::new(), BTreeSet::new());
        for (step, at, budget) in steps {
            let port = channels.keys().nth(at).copied();
            match (step, port) {
                (0, _) => {
                    let ours = upcalls.binder().alloc_unbound(peer.id()).unwrap();
                    let theirs = peer.bind_interdomain(us.id(), ours.port()).unwrap();
                    channels.insert(ours.port(), (ours, theirs));
                }
                (1, Some(port)) => {
                    channels.remove(&port);
                    raised.remove(&port);
                    busy.remove(&port);
                }
                (2..=4, Some(port)) => {
                    peer.notify(channels[&port].1).unwrap();
                    raised.insert(port);
                }
                (5, Some(port)) => {
                    let _ = channels.get_mut(&port).unwrap().0.eoi(Work::Done, Instant(0));
                    busy.remove(&port);
                }
                _ => {
                    let mut got = Vec::new();
                    upcalls.scan(budget, |port| got.push(port));
                    let open = raised.difference(&busy).count();
                    prop_assert!(got.len() <= budget && got.len() <= open);
                    prop_assert!(got.len() == budget.min(open) || upcalls.is_pending());
                    for port in got {
                        prop_assert!(raised.remove(&port), "{} was not raised", port);
                        prop_assert!(busy.insert(port), "{} again before its end", port);
                    }
                }
            }
        }
        // In the end all that is open is handed out.
        let mut got = BTreeSet::new();
        while upcalls.scan(3, |port| _ = got.insert(port)) > 0 {}
        let open: BTreeSet<_> = raised.difference(&busy).copied().collect();
        prop_assert_eq!(got, open);
        prop_assert!(!upcalls.is_pending());
    }
}

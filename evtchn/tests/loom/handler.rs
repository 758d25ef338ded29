//! A domain with channels, and what may happen to it.

use std::sync::Arc;

use evtchn::{Channel, Delivery, Eoi, Upcalls, Work};
use hypercall::{DomId, Instant, Port, VcpuId};
use loom::sync::Mutex;
use loom::sync::atomic::AtomicU32;
use loom::sync::atomic::Ordering::SeqCst;

use crate::machine::Machine;

pub const NOW: Instant = Instant(0);

/// A domain with channels, and the work that its events announce.
pub struct Handler {
    pub machine: Machine,
    pub upcalls: Upcalls<Machine>,
    channels: Vec<Channel<Machine>>,
    work: Arc<[AtomicU32; 2]>,
    seen: u32,
    budget: usize,
}

impl Handler {
    fn new(machine: Machine, channels: usize, budget: usize) -> Self {
        let upcalls = Upcalls::new(&machine, VcpuId(0));
        let binder = upcalls.binder();
        let channels = (0..channels).map(|_| binder.alloc_unbound(DomId(1)).unwrap()).collect();
        Self { machine, upcalls, channels, work: Arc::default(), seen: 0, budget }
    }

    pub fn work_for(&mut self, port: Port) {
        let index = self.machine.ports().iter().position(|known| *known == port).unwrap();
        self.seen += self.work[index].swap(0, SeqCst);
    }

    /// One upcall, as it should be.
    pub fn turn(&mut self) {
        let mut ports = Vec::new();
        self.upcalls.scan(self.budget, |port| ports.push(port));
        for port in ports {
            self.work_for(port);
            let channel = self.channels.iter_mut().find(|channel| channel.port() == port);
            assert_eq!(channel.unwrap().eoi(Work::Done, NOW), Eoi::Open);
        }
    }
}

/// A model's size.
#[derive(Clone, Copy)]
pub struct Size {
    pub turns: usize,
    pub preemptions: usize,
}

/// Xen raises a port for each piece of work, while the domain takes some upcalls.
pub fn events(
    machine: fn() -> Machine,
    size: Size,
    sends: &'static [usize],
    budget: usize,
    turn: impl Fn(&mut Handler) + Send + Sync + 'static,
) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(size.preemptions);
    model.check(move || {
        let mut handler = Handler::new(machine(), 2, budget);
        let (machine, work) = (handler.machine.clone(), handler.work.clone());
        let xen = loom::thread::spawn(move || {
            for &index in sends {
                work[index].fetch_add(1, SeqCst);
                machine.raise(machine.ports()[index]);
            }
        });
        for _ in 0..size.turns {
            turn(&mut handler);
        }
        xen.join().unwrap();
        let all = handler.seen == sends.len() as u32;
        assert!(all || handler.upcalls.is_pending(), "lost wake-up");
        // An upcall that is pending leads to what is left.
        for _ in 0..4 {
            turn(&mut handler);
        }
        assert_eq!(handler.seen, sends.len() as u32, "lost event");
    });
}

/// What a handler does with a port that it was handed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Dispatch {
    /// Ends the event through the channel that has the port now, if one has.
    Channel,
    /// Opens the port whoever has it.
    Port,
    /// Ends the event only if the channel is still the one that was there before the upcall.
    SameChannel,
}

/// A channel is closed by another thread, and perhaps another opened, on the same port if that is free, while an event is
/// handled.
pub fn close(machine: fn() -> Machine, reopen: bool, dispatch: Dispatch) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let Handler { machine, mut upcalls, mut channels, .. } = Handler::new(machine(), 1, 16);
        let port = machine.ports()[0];
        // The channel, and which in a row it is.
        let slot = loom::sync::Arc::new(Mutex::new((channels.pop(), 0)));
        let closer = {
            let (slot, binder) = (slot.clone(), upcalls.binder());
            loom::thread::spawn(move || {
                let (channel, number) = &mut *slot.lock().unwrap();
                drop(channel.take());
                if reopen {
                    *channel = binder.alloc_unbound(DomId(1)).ok();
                    *number += 1;
                }
            })
        };
        let xen = {
            let machine = machine.clone();
            loom::thread::spawn(move || machine.send(port))
        };
        let turn = |upcalls: &mut Upcalls<Machine>| {
            let before = if dispatch == Dispatch::SameChannel { slot.lock().unwrap().1 } else { 0 };
            let mut ports = Vec::new();
            upcalls.scan(16, |port| ports.push(port));
            for port in &ports {
                let (channel, number) = &mut *slot.lock().unwrap();
                match (dispatch, channel) {
                    (Dispatch::Port, _) => machine.open(*port),
                    (Dispatch::SameChannel, _) if *number != before => {}
                    (_, Some(channel)) if channel.port() == *port => {
                        _ = channel.eoi(Work::Done, NOW);
                    }
                    _ => {}
                }
            }
            ports.len()
        };
        turn(&mut upcalls);
        closer.join().unwrap();
        xen.join().unwrap();
        turn(&mut upcalls);
        let now = slot.lock().unwrap().0.as_ref().map_or(port, Channel::port);
        if reopen {
            assert!(!machine.is_masked(now), "deaf");
            machine.send(now);
            assert_eq!(turn(&mut upcalls), 1, "deaf");
        } else {
            assert!(machine.is_masked(now), "a port that is closed was opened");
            machine.send(now);
            assert_eq!(turn(&mut upcalls), 0);
        }
        let left = usize::from(reopen);
        assert_eq!(upcalls.bound(), left);
    });
}

/// Whether the models are of what they should be.
pub fn delivery(machine: fn() -> Machine) -> Delivery {
    let seen = Arc::new(std::sync::Mutex::new(None));
    let kept = seen.clone();
    loom::model(move || {
        *kept.lock().unwrap() = Some(Handler::new(machine(), 0, 0).upcalls.delivery());
    });
    seen.lock().unwrap().unwrap()
}

//! Parts of the hot paths by themselves.

use std::hint::black_box;

use evtchn::{Channel, Eoi, Upcalls, Work};
use gungraun::{library_benchmark, library_benchmark_group};
use hypercall::{GrantRef, Hypervisor, Instant, Port, VcpuId};
use instructions::ITEMS;
use netif::slot::{RxFlags, RxId, RxResponse, RxStatus, TxFlags, TxId, TxRequest};
use netif::{rx, tx};
use sim::{DomainConfig, Sim, SimHv};
use xenbus::wire::{Framer, Kind, ReqId, TxId as TransactionId, write_message};

use crate::quiet::Quiet;
use crate::{counted, inside};

/// Ports that have events at a time.
const PORTS: u64 = 64;

/// As many chains of `slots` slots as a case has.
fn requests(slots: u16) -> Vec<TxRequest> {
    let chain = (0..slots).map(move |slot| TxRequest {
        gref: GrantRef(slot.into()),
        offset: 0,
        flags: if slot + 1 < slots { TxFlags::MORE_DATA } else { TxFlags::empty() },
        id: TxId(slot),
        size: if slot == 0 { 3000 * slots } else { 3000 },
    });
    (0..ITEMS).flat_map(|_| chain.clone()).collect()
}

#[library_benchmark(setup = requests)]
#[bench::of_1(1)]
#[bench::of_18(18)]
fn tx_chain(requests: Vec<TxRequest>) -> Vec<TxRequest> {
    let mut rest = requests.iter().copied();
    while let Some(verdict) = tx::assemble(&mut rest).unwrap() {
        assert!(matches!(black_box(&verdict), tx::Verdict::Packet(_)));
    }
    requests
}

fn responses(slots: u16) -> Vec<(u16, RxResponse)> {
    let chain = (0..slots).map(move |slot| {
        let flags = if slot + 1 < slots { RxFlags::MORE_DATA } else { RxFlags::empty() };
        (slot, RxResponse { id: RxId(slot), offset: 0, flags, status: RxStatus(3000) })
    });
    (0..ITEMS).flat_map(|_| chain.clone()).collect()
}

#[library_benchmark(setup = responses)]
#[bench::of_1(1)]
#[bench::of_18(18)]
fn rx_chain(responses: Vec<(u16, RxResponse)>) -> Vec<(u16, RxResponse)> {
    let mut rest = responses.iter().copied();
    while let Some(verdict) = rx::assemble(&mut rest).unwrap() {
        assert!(black_box(&verdict).packet.is_ok());
    }
    responses
}

/// A domain with channels, and the other ends of them.
struct Events {
    upcalls: Upcalls<Quiet>,
    channels: Vec<Channel<Quiet>>,
    peer: SimHv,
    theirs: Vec<Port>,
}

fn events() -> Events {
    let sim = Sim::new();
    let us = Quiet(sim.create(DomainConfig::guest()));
    let peer = sim.create(DomainConfig::guest());
    let upcalls = Upcalls::new(&us, VcpuId(0));
    let binder = upcalls.binder();
    let channels: Vec<_> = (0..PORTS).map(|_| binder.alloc_unbound(peer.id()).unwrap()).collect();
    let join = |ours: &Channel<Quiet>| peer.bind_interdomain(us.0.id(), ours.port()).unwrap();
    let theirs = channels.iter().map(join).collect();
    Events { upcalls, channels, peer, theirs }
}

#[library_benchmark(setup = events)]
#[bench::fifo()]
fn upcall(mut events: Events) -> Events {
    let Events { upcalls, channels, peer, theirs } = &mut events;
    let first = channels[0].port().0;
    counted(|| {
        for _ in 0..ITEMS / PORTS {
            inside(|| theirs.iter().for_each(|port| peer.notify(*port).unwrap()));
            let found = upcalls.scan(64, |port| {
                let eoi = channels[(port.0 - first) as usize].eoi(Work::Done, Instant(0));
                assert_eq!(eoi, Eoi::Open);
            });
            assert_eq!(found as u64, PORTS);
        }
    });
    events
}

fn messages() -> Vec<u8> {
    let mut bytes = Vec::new();
    for index in 0..ITEMS as u32 {
        let payload: [&[u8]; 2] = [b"/local/domain/1/device/vif/0/state\0", b"17\0"];
        let kind = Kind::WatchEvent.raw();
        write_message(&mut bytes, kind, ReqId(index), TransactionId::NONE, &payload).unwrap();
    }
    bytes
}

#[library_benchmark(setup = messages)]
#[bench::parse()]
fn store_message(bytes: Vec<u8>) -> Vec<u8> {
    let (mut framer, mut rest) = (Framer::new(), bytes.as_slice());
    while let Some(message) = framer.next(&mut rest).unwrap() {
        black_box(&message);
    }
    bytes
}

library_benchmark_group!(name = parts, benchmarks = [tx_chain, rx_chain, upcall, store_message]);

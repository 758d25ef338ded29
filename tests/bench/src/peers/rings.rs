//! Our rings and grant copies without the drivers above them: what a driver in C does with ring.h, with the checks that ours
//! make of everything they read.

use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, anyhow};
use grant::{
    BufferSize, CopyOps, CopyRange, Frame, FramePool, GrantTable, GrantedPage, MapRequest, Mapper,
    Mapping, PeerSpan, SharedMemory,
};
use hypercall::{DomId, PageOffset};
use netif::ring::{TxBackRing, TxFrontRing};
use netif::slot::{TxFlags, TxId, TxRequest, TxResponse, TxStatus};
use netif::tx::{self, Verdict};

use crate::duel::{Control, Half, Subject};
use crate::peers::{IDS, MOST, Packets, SPREAD};
use crate::xen::{Hv, machine};

/// The ring's page, at its owner's.
struct RingPage(GrantedPage<Hv>);

impl SharedMemory for RingPage {
    #[inline]
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.0.page().load_u32(offset, order)
    }

    #[inline]
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.0.page().store_u32(offset, value, order);
    }

    #[inline]
    fn fence(&self) {
        self.0.page().fence();
    }

    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        self.0.page().read_bytes(offset, to);
    }

    fn write_bytes(&self, offset: usize, from: &[u8]) {
        self.0.page().write_bytes(offset, from);
    }
}

struct Front {
    ring: TxFrontRing<RingPage>,
    pages: Vec<GrantedPage<Hv>>,
    free: Vec<u16>,
    payload: Vec<u8>,
}

struct Back {
    hv: Hv,
    of: DomId,
    ring: TxBackRing<Mapping<Hv>>,
    frames: Vec<Frame<Hv>>,
    ops: CopyOps,
    chains: Vec<tx::Packet>,
    done: u64,
}

/// Both ends of a TX ring; with `packets`, or descriptors alone.
pub struct Rings {
    packets: Option<Packets>,
    batch: usize,
    front: Front,
    back: Back,
}

impl Rings {
    pub fn packets(packets: Packets) -> Result<Self> {
        Self::new(Some(packets), packets.batch)
    }

    pub fn descriptors(batch: usize) -> Result<Self> {
        Self::new(None, batch)
    }

    fn new(packets: Option<Packets>, batch: usize) -> Result<Self> {
        let [hv, guest] = machine([1024, 1024]);
        let table = GrantTable::new(&guest)?;
        let ring = table.share(hv.id(), false)?;
        let request = MapRequest { domain: guest.id(), gref: ring.gref(), read_only: false };
        let front = TxFrontRing::init(RingPage(ring));
        let mapping = Mapper::new(&hv).map(request)?;
        let back = TxBackRing::attach(mapping).map_err(|(fault, _)| anyhow!("{fault}"))?;
        let pages = (0..IDS).map(|_| table.share(hv.id(), true)).collect::<Result<_, _>>()?;
        let count = NonZeroUsize::new(IDS).context("no buffers")?;
        let pool = FramePool::new(&hv, count, BufferSize::PAGE);
        let frames: Option<_> = (0..IDS).map(|_| pool.take()).collect();
        let size = packets.map_or(0, |packets| packets.written);
        Ok(Self {
            packets,
            batch,
            front: Front {
                ring: front,
                pages,
                free: (0..IDS as u16).rev().collect(),
                payload: vec![0x5a; size],
            },
            back: Back {
                of: guest.id(),
                hv,
                ring: back,
                frames: frames.context("no buffers")?,
                ops: CopyOps::new(MOST),
                chains: Vec::with_capacity(MOST),
                done: 0,
            },
        })
    }
}

impl Front {
    fn turn(&mut self, packets: Option<Packets>, batch: usize) -> Result<()> {
        let Self { ring, pages, free, payload } = self;
        ring.poll()?;
        while let Some((_, response)) = ring.take() {
            free.push(response.id.0);
        }
        if free.len() < batch {
            return Ok(());
        }
        for _ in 0..batch {
            let Some(id) = free.pop() else { break };
            let Some(page) = pages.get(usize::from(id)) else { break };
            let offset = usize::from(id) * SPREAD % 2048;
            page.page().write_bytes(offset, payload);
            let request = TxRequest {
                gref: page.gref(),
                offset: offset as u16,
                flags: TxFlags::empty(),
                id: TxId(id),
                size: packets.map_or(0, |packets| packets.size as u16),
            };
            ring.push(request)?;
        }
        // Nobody sleeps here.
        let _ = ring.publish();
        Ok(())
    }
}

impl Back {
    fn descriptors(&mut self) -> Result<()> {
        let Self { ring, done, .. } = self;
        ring.poll()?;
        let mut count = 0;
        let mut taken = [TxId::default(); MOST];
        for (place, request) in taken.iter_mut().zip(ring.requests()) {
            *place = request.id;
            count += 1;
        }
        for id in taken.into_iter().take(count) {
            ring.push(TxResponse { id, status: TxStatus::OKAY })?;
        }
        let _ = ring.publish();
        *done += count as u64;
        Ok(())
    }

    fn packets(&mut self) -> Result<()> {
        let Self { hv, of, ring, frames, ops, chains, done } = self;
        ring.poll()?;
        while chains.len() < MOST
            && let Some(Verdict::Packet(chain)) = tx::assemble(&mut ring.requests())?
        {
            chains.push(chain);
        }
        if chains.is_empty() {
            return Ok(());
        }
        let (mut copies, mut all) = (ops.begin(), CopyRange::default());
        let first = (*done % IDS as u64) as usize;
        let (last, first) = frames.split_at_mut_checked(first).context("no buffer")?;
        for (index, (chain, frame)) in chains.iter().zip(first.iter_mut().chain(last)).enumerate() {
            let (_, to) = frame.span_mut().split_at(index * SPREAD % 2048);
            let slot = chain.slots.first().context("a packet without bytes")?;
            let offset = PageOffset::new(slot.offset).context("an offset beyond the page")?;
            let from = PeerSpan { domain: *of, gref: slot.gref, offset };
            all = all.with(copies.pull(from, to.split_at(chain.size.into()).0)?);
        }
        copies.submit(hv)?.of(all)?;
        *done += chains.len() as u64;
        for chain in chains.drain(..) {
            ring.answer(chain.answers, TxStatus::OKAY)?;
        }
        let _ = ring.publish();
        Ok(())
    }
}

impl Subject for Rings {
    fn halves(&mut self) -> [Half<'_>; 2] {
        let Self { packets, batch, front, back } = self;
        let (packets, batch) = (*packets, *batch);
        let front = move |control: &Control| {
            while !control.is_over() && front.turn(packets, batch).is_ok() {}
        };
        let back = move |control: &Control| {
            while !control.is_over() {
                let turn = if packets.is_some() { back.packets() } else { back.descriptors() };
                if turn.is_err() {
                    break;
                }
                control.set_done(back.done);
            }
        };
        [Box::new(front), Box::new(back)]
    }

    fn begin(&mut self) -> u64 {
        self.back.done
    }

    fn step(&mut self) -> bool {
        let Self { packets, batch, front, back } = self;
        let sent = front.turn(*packets, *batch);
        let taken = if packets.is_some() { back.packets() } else { back.descriptors() };
        sent.and(taken).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_packet_and_descriptor_arrives() {
        let packets = Packets::headers(1500, 32);
        for mut subject in [Rings::packets(packets).unwrap(), Rings::descriptors(32).unwrap()] {
            for turn in 1..20 {
                assert!(subject.step());
                assert_eq!(subject.begin(), turn * 32);
            }
        }
    }
}

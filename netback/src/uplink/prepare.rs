//! Making a packet fit for the card: where it is, and what is left to be done to it.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use hypercall::{Hypervisor, PAGE_SIZE};
use netif::headers;
use netif::offload::{Checksum, Gso};

use super::card::{Card, Offers};
use super::counters::UplinkCounters;
use super::header::NetHeader;
use super::outgoing::{Heads, Layout, MAX_HEAD_PAGES, Pieces, Source};
use super::translate;
use crate::backend::Backend;
use crate::dma::{self, DmaPiece, Maintenance, OwnRule};
use crate::offload::checksum::{Sum, complete_first};
use crate::offload::segment::{Cut, cut};
use crate::packet::Packet;

/// Frames that one packet may be cut into: 64 KiB into the smallest that IP lets TCP count on, 536 bytes.
const MAX_SEGMENTS: usize = 128;
/// Bytes of payload that are read at a time to be summed up: an even number.
const CHUNK: usize = 512;
/// Sources that are kept for the next packets.
const SPARE: usize = 256;

/// Why a packet does not go to the card now.
pub(super) enum Unready<H: Hypervisor> {
    /// It waits for a buffer.
    Wait(Packet<H>),
    /// It was dropped, and counted.
    Dropped,
}

/// Why a packet is dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Unfit {
    Unreadable,
    NotSegmentable,
    TooBig,
    NoAddress,
    NoBuffer,
}

/// Sources to be used again: what holds a packet is not allocated for each.
pub(super) struct Spares<H: Hypervisor>(Vec<Arc<Source<H>>>);

impl<H: Hypervisor> Spares<H> {
    pub(super) fn new() -> Self {
        Self(Vec::with_capacity(SPARE))
    }

    fn take(&mut self) -> Arc<Source<H>> {
        self.0.pop().unwrap_or_else(|| Arc::new(Source::new()))
    }

    /// Somebody is done with a packet; the last of them lets go of it.
    pub(super) fn release(&mut self, mut source: Arc<Source<H>>) {
        let Some(last) = Arc::get_mut(&mut source) else { return };
        last.clear();
        if self.0.len() < SPARE {
            self.0.push(source);
        }
    }
}

/// What the port has decided that holds for each packet.
pub(super) struct Preparing<'a, H: Hypervisor, C: Card<H>> {
    pub(super) backend: &'a mut Backend<H>,
    pub(super) card: &'a mut C,
    pub(super) offers: Offers,
    pub(super) max_frame: usize,
    pub(super) spares: &'a mut Spares<H>,
    pub(super) counters: &'a mut UplinkCounters,
}

impl<H: Hypervisor, C: Card<H>> Preparing<'_, H, C> {
    /// Decides how a packet goes out.
    pub(super) fn prepare(mut self, packet: Packet<H>) -> Result<Arc<Source<H>>, Unready<H>> {
        let mut shared = self.spares.take();
        let Some(source) = Arc::get_mut(&mut shared) else { return Err(Unready::Dropped) };
        let packet = source.packet.insert(packet);
        let unfit = match self.backend.own_rule() {
            None => Unfit::NoAddress,
            Some(own) => {
                let done = self.locate(packet, &mut source.pieces, own).and_then(|()| {
                    let (header, layout) = self.offload(packet, &mut source.heads, own)?;
                    (source.header, source.layout) = (header, layout);
                    Ok(())
                });
                match done {
                    Ok(()) => return Ok(shared),
                    Err(unfit) => unfit,
                }
            }
        };
        let packet = source.packet.take();
        self.spares.release(shared);
        let drops = &mut self.counters.send_drops;
        match unfit {
            Unfit::NoBuffer => {
                return packet.map_or(Err(Unready::Dropped), |it| Err(Unready::Wait(it)));
            }
            Unfit::Unreadable => drops.unreadable += 1,
            Unfit::NotSegmentable => drops.not_segmentable += 1,
            Unfit::TooBig => drops.too_big += 1,
            Unfit::NoAddress => drops.no_address += 1,
        }
        Err(Unready::Dropped)
    }
}

impl<H: Hypervisor, C: Card<H>> Preparing<'_, H, C> {
    /// Finds out where the card finds a packet. One that is mapped is copied if that is nowhere.
    fn locate(
        &mut self,
        packet: &mut Packet<H>,
        pieces: &mut Pieces,
        own: OwnRule,
    ) -> Result<(), Unfit> {
        pieces.clear();
        extend(pieces, packet.dma_own(own)).ok_or(Unfit::NoAddress)?;
        if packet.is_whole() {
            return Ok(());
        }
        if !packet.is_lent() {
            return Err(Unfit::Unreadable);
        }
        // The rule of this moment: what was advertised when the packet was mapped may be gone.
        let rule = self.backend.dma_rule();
        let located = rule.and_then(|rule| extend(pieces, packet.dma(rule))).is_some();
        if located
            && dma::clean(&self.backend.hv, pieces.iter().copied()).is_ok()
            && self.card.clean_identity(pieces)
        {
            for piece in pieces.iter() {
                let cleaned = &mut self.counters.cleaned;
                match piece.maintenance {
                    Maintenance::Hypercall => cleaned.by_xen += 1,
                    Maintenance::Identity => cleaned.at_machine_address += 1,
                    Maintenance::None | Maintenance::Own => {}
                }
            }
            return Ok(());
        }
        if located {
            // What the rule rests on is not there: it went, or went and came back, without a word.
            let _ = self.backend.refresh_features();
        }
        if !packet.make_whole(self.backend.pools()) {
            return Err(Unfit::NoBuffer);
        }
        let copied = &mut self.counters.copied;
        *if located { &mut copied.not_cleaned } else { &mut copied.no_address } += 1;
        pieces.clear();
        extend(pieces, packet.dma_own(own)).ok_or(Unfit::NoAddress)
    }

    /// Has done what is left to be done to a packet: by the card if it can, else here.
    fn offload(
        &mut self,
        packet: &mut Packet<H>,
        heads: &mut Heads<H>,
        own: OwnRule,
    ) -> Result<(NetHeader, Option<Layout>), Unfit> {
        if let Some(gso) = packet.gso {
            let cut = cut(packet.bytes(), packet.len(), gso.size.get());
            let cut =
                cut.filter(|cut| cut.version() == gso.version).ok_or(Unfit::NotSegmentable)?;
            if cut.max_len() > self.max_frame {
                return Err(Unfit::TooBig);
            }
            return match self.by_card(&cut, gso, packet) {
                Some(header) => {
                    self.counters.offloads.card_segmented += 1;
                    Ok((header, None))
                }
                None => self.segment(packet, &cut, heads, own),
            };
        }
        if packet.len() > self.max_frame {
            return Err(Unfit::TooBig);
        }
        if packet.checksum != Checksum::Blank {
            return Ok((NetHeader::default(), None));
        }
        if self.offers.contains(Offers::CSUM)
            && let Some(header) = NetHeader::checksum(packet.bytes(), packet.len())
        {
            self.counters.offloads.card_checksums += 1;
            return Ok((header, None));
        }
        // One that cannot be found is left as it is, for the receiver to judge.
        if complete(packet).ok_or(Unfit::Unreadable)? {
            packet.checksum = Checksum::Validated;
            self.counters.offloads.checksums += 1;
        }
        Ok((NetHeader::default(), None))
    }

    /// What the card is told of a packet that it can cut; it takes checksums as they are when they were left blank.
    fn by_card(&self, cut: &Cut<'_>, gso: Gso, packet: &Packet<H>) -> Option<NetHeader> {
        let needed = Offers::CSUM | translate::segments(gso.version);
        let can = self.offers.contains(needed) && packet.checksum == Checksum::Blank;
        can.then(|| NetHeader::segmentation(cut, gso, packet.len()))?
    }

    /// Cuts a packet: writes the headers of all its segments, whose payload stays where it is.
    fn segment(
        &mut self,
        packet: &Packet<H>,
        cut: &Cut<'_>,
        heads: &mut Heads<H>,
        own: OwnRule,
    ) -> Result<(NetHeader, Option<Layout>), Unfit> {
        let (head, count) = (cut.start(), cut.count());
        // Whole words, so that no header begins at an odd place.
        let stride = head.next_multiple_of(8);
        let per_page = PAGE_SIZE / stride.max(1);
        if count > MAX_SEGMENTS || count > per_page * MAX_HEAD_PAGES {
            return Err(Unfit::TooBig);
        }
        let by_card = self.offers.contains(Offers::CSUM);
        let header = if by_card { NetHeader::checksums(cut) } else { Some(NetHeader::default()) };
        heads.clear();
        let pools = self.backend.pools();
        for first in (0..count).step_by(per_page) {
            let mut page = pools.packet(PAGE_SIZE, packet.arrived).ok_or(Unfit::NoBuffer)?;
            let places = page.bytes_mut().chunks_exact_mut(stride);
            for (index, place) in (first..count).zip(places) {
                let payload = cut.payload(index).ok_or(Unfit::NotSegmentable)?;
                let sum = match by_card {
                    true => None,
                    false => Some(sum(packet, payload).ok_or(Unfit::Unreadable)?),
                };
                cut.write_head(index, sum, place).ok_or(Unfit::NotSegmentable)?;
            }
            let piece = page.dma_own(own).next().flatten().ok_or(Unfit::NoAddress)?;
            heads.push((page, piece)).map_err(|_| Unfit::TooBig)?;
        }
        let narrow = |number: usize| u16::try_from(number).map_err(|_| Unfit::TooBig);
        let layout = Layout {
            head: narrow(head)?,
            stride: narrow(stride)?,
            per_page: narrow(per_page)?,
            payload: (cut.start(), cut.end()),
            size: cut.max_len() - head,
        };
        self.counters.offloads.segments += count as u64;
        Ok((header.ok_or(Unfit::NotSegmentable)?, Some(layout)))
    }
}

/// Adds pieces; `None` if one of them is nowhere, or there are too many.
fn extend(pieces: &mut Pieces, more: impl Iterator<Item = Option<DmaPiece>>) -> Option<()> {
    for piece in more {
        pieces.push(piece?).ok()?;
    }
    Some(())
}

/// Sums up bytes of a packet, wherever they are.
fn sum<H: Hypervisor>(packet: &Packet<H>, range: Range<usize>) -> Option<Sum> {
    let mut chunk = [0; CHUNK];
    let (mut sum, mut at) = (Sum::default(), range.start);
    while at < range.end {
        let part = chunk.get_mut(..CHUNK.min(range.end - at))?;
        if !packet.read(at, part) {
            return None;
        }
        sum = sum.add(part);
        at += part.len();
    }
    Some(sum)
}

/// Fills in a checksum that was left blank; `false` if there is none to be found, `None` if not all of the packet can be read.
fn complete<H: Hypervisor>(packet: &mut Packet<H>) -> Option<bool> {
    let (private, len) = (packet.bytes().len(), packet.len());
    // What lies beyond what is private begins there: the headers may say that less of it counts.
    let end = headers::parse_first(packet.bytes(), len)
        .and_then(|headers| headers.transport)
        .map_or(private, |transport| transport.end);
    let rest = sum(packet, private..end.max(private))?;
    Some(complete_first(packet.bytes_mut(), len, |_| rest))
}

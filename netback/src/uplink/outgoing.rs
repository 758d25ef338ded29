//! A frame on its way through the card.

use alloc::sync::Arc;
use core::fmt;
use core::ops::Range;

use hypercall::Hypervisor;
use netif::tx::MAX_SLOTS;

use super::flight::Generation;
use super::header::NetHeader;
use crate::dma::DmaPiece;
use crate::packet::Packet;

/// Pieces of one packet at most: what is private of a mapped one and a piece of each slot, or the pages of 64 KiB.
const MAX_PIECES: usize = MAX_SLOTS + 1;
/// Pages full of headers that one packet may need.
pub(super) const MAX_HEAD_PAGES: usize = 8;

/// Where a packet is.
pub(super) type Pieces = heapless::Vec<DmaPiece, MAX_PIECES>;
/// Pages of headers, and where they are.
pub(super) type Heads<H> = heapless::Vec<(Packet<H>, DmaPiece), MAX_HEAD_PAGES>;

/// How a packet is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Bytes of headers of each frame,
    pub(super) head: u16,
    /// how far one frame's are from the next's,
    pub(super) stride: u16,
    /// and how many frames' are in a page.
    pub(super) per_page: u16,
    /// Where in the packet the payload is that is cut.
    pub(super) payload: (usize, usize),
    /// Bytes of payload in a frame.
    pub(super) size: usize,
}

/// What a card needs of one packet, for all frames that are made of it. Nothing of it changes while the card has one.
pub(super) struct Source<H: Hypervisor> {
    /// Kept until no frame of it is under way.
    pub(super) packet: Option<Packet<H>>,
    pub(super) header: NetHeader,
    /// The whole packet.
    pub(super) pieces: Pieces,
    /// The headers of the frames that it is cut into.
    pub(super) heads: Heads<H>,
    /// `None`: it is one frame.
    pub(super) layout: Option<Layout>,
}

impl<H: Hypervisor> Source<H> {
    pub(super) fn new() -> Self {
        Self {
            packet: None,
            header: NetHeader::default(),
            pieces: heapless::Vec::new(),
            heads: heapless::Vec::new(),
            layout: None,
        }
    }

    /// Frames for the card.
    pub(super) fn count(&self) -> usize {
        self.layout.map_or(1, |layout| {
            let (start, end) = layout.payload;
            end.saturating_sub(start).div_ceil(layout.size.max(1))
        })
    }

    /// The headers of frame `index`, if it has any of its own, and where in the packet the rest is.
    fn place(&self, index: usize) -> (Option<DmaPiece>, Range<usize>) {
        let Some(layout) = self.layout else { return (None, 0..usize::MAX) };
        let per_page = usize::from(layout.per_page.max(1));
        let page = self.heads.get(index / per_page);
        let skip = u16::try_from(index % per_page * usize::from(layout.stride));
        let head = page.zip(skip.ok()).and_then(|((_, page), skip)| page.part(skip, layout.head));
        let (first, end) = layout.payload;
        let start = first.saturating_add(index.saturating_mul(layout.size)).min(end);
        (head, start..end.min(start.saturating_add(layout.size)))
    }

    /// Lets go of everything.
    pub(super) fn clear(&mut self) {
        self.packet = None;
        self.heads.clear();
        self.pieces.clear();
        self.layout = None;
    }
}

/// One frame for the wire, or one TCP packet that the card is to cut. While it lives, the card finds its bytes where it was told.
pub struct Outgoing<H: Hypervisor> {
    pub(super) source: Arc<Source<H>>,
    /// Which frame of the packet.
    pub(super) index: usize,
    pub(super) generation: Generation,
}

impl<H: Hypervisor> Outgoing<H> {
    /// What the card is to do to it.
    #[must_use]
    pub fn header(&self) -> NetHeader {
        self.source.header
    }

    /// Its bytes, in order. The headers are in memory of ours; what a guest can still change is payload.
    pub fn pieces(&self) -> impl Iterator<Item = DmaPiece> {
        let (head, range) = self.source.place(self.index);
        let mut end = 0_usize;
        let rest = self.source.pieces.iter().filter_map(move |piece| {
            let start = end;
            end += usize::from(piece.len);
            let skip = range.start.saturating_sub(start);
            let len = range.end.min(end).saturating_sub(start.max(range.start));
            let (skip, len) = (u16::try_from(skip).ok()?, u16::try_from(len).ok()?);
            piece.part(skip, len).filter(|part| part.len > 0)
        });
        head.into_iter().chain(rest)
    }

    /// Its first bytes, as far as they lie in memory of ours: all headers at least.
    #[must_use]
    pub fn first_bytes(&self) -> &[u8] {
        let Source { packet, heads, layout, .. } = &*self.source;
        let Some(layout) = layout else {
            return packet.as_ref().map_or(&[], Packet::bytes);
        };
        let per_page = usize::from(layout.per_page.max(1));
        let page = heads.get(self.index / per_page).map_or(&[][..], |(page, _)| page.bytes());
        let start = self.index % per_page * usize::from(layout.stride);
        page.get(start..start.saturating_add(layout.head.into())).unwrap_or_default()
    }

    /// How many bytes it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pieces().map(|piece| usize::from(piece.len)).sum()
    }

    /// Never: a frame has a header at least.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<H: Hypervisor> fmt::Debug for Outgoing<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Outgoing({:?}, frame {})", self.source.packet, self.index)
    }
}

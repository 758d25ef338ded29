//! A network card that reads and writes memory by itself, and its driver.

use std::collections::VecDeque;

use netback::dma::{DmaPiece, Maintenance};
use netback::uplink::{Buffer, Card, GsoType, HeaderFlags, NetHeader, Offers, Outgoing, Received};
use netif::mac::MacAddr;
use sim::{DmaCounts, DmaDevice, SimHv};

/// Descriptors of each of the card's rings.
const RING: usize = 256;
/// Frames that may wait on the wire.
pub(super) const WIRE: usize = 256;

/// A frame on the wire, to the card.
#[derive(Debug)]
pub(super) struct Inbound {
    pub(super) header: NetHeader,
    pub(super) frame: Vec<u8>,
}

/// A card without a will of its own: it sends and receives when it is told that it has a turn.
#[derive(Debug)]
pub struct SimCard {
    device: DmaDevice,
    hv: SimHv,
    mac: MacAddr,
    offers: Offers,
    /// What it was given to send, with the descriptors that it takes,
    sending: VecDeque<(Outgoing<SimHv>, usize)>,
    /// how many of these it has been told of,
    told: usize,
    /// descriptors in use,
    used: usize,
    /// and what it is done with.
    sent: VecDeque<Outgoing<SimHv>>,
    /// Buffers to receive into,
    posted: VecDeque<Buffer<SimHv>>,
    /// those it has been told of,
    shown: usize,
    /// and those that it has written to.
    received: VecDeque<Received<SimHv>>,
    pub(super) inbound: VecDeque<Inbound>,
    pub(super) spare: Vec<Vec<u8>>,
    /// The frame that it reads at the moment.
    pub(super) buffer: Vec<u8>,
    /// Frames that it still sends in this turn.
    pub(super) budget: usize,
    pub(super) held: bool,
    /// Its driver cleans the caches at machine addresses by the processor's instructions, whatever is mapped there.
    cleans_elsewhere: bool,
    /// Frames and buffers that went from hand to hand.
    pub(super) moves: u64,
}

impl SimCard {
    pub(super) fn new(
        hv: SimHv,
        device: DmaDevice,
        mac: MacAddr,
        offers: Offers,
        cleans_elsewhere: bool,
    ) -> Self {
        Self {
            device,
            hv,
            mac,
            offers,
            sending: VecDeque::new(),
            told: 0,
            used: 0,
            sent: VecDeque::new(),
            posted: VecDeque::new(),
            shown: 0,
            received: VecDeque::new(),
            inbound: VecDeque::new(),
            spare: Vec::new(),
            buffer: Vec::new(),
            budget: 0,
            held: false,
            cleans_elsewhere,
            moves: 0,
        }
    }

    /// What it did by itself.
    #[must_use]
    pub fn dma(&self) -> DmaCounts {
        self.device.counts()
    }

    /// Buffers that it has, be they written to or not.
    #[must_use]
    pub fn posted(&self) -> usize {
        self.posted.len() + self.received.len()
    }

    /// Whether it has a frame that it has not sent.
    pub(super) fn is_busy(&self) -> bool {
        !self.sending.is_empty()
    }

    /// Cleans, or discards, what the processors' caches hold of these bytes, where that is the driver's to do.
    fn maintain(&self, piece: DmaPiece, discard: bool) {
        let own = match piece.maintenance {
            Maintenance::None | Maintenance::Identity => false,
            Maintenance::Hypercall => self.cleans_elsewhere,
            Maintenance::Own => true,
        };
        let (at, len) = (piece.address.bus().0, piece.len.into());
        match (own, discard) {
            (false, _) => {}
            // Where nothing is, the simulated Xen takes note of it.
            (true, false) => _ = self.hv.clean_cache(at, len),
            (true, true) => _ = self.hv.invalidate_cache(at, len),
        }
    }

    /// Sends the next frame: reads all its bytes, and does to them what its header says. Answers the header.
    pub(super) fn transmit(&mut self) -> Option<NetHeader> {
        let budget = self.budget.checked_sub(1).filter(|_| !self.held && self.told > 0)?;
        let (out, cost) = self.sending.pop_front()?;
        self.budget = budget;
        self.told -= 1;
        self.used -= cost;
        self.buffer.clear();
        for piece in out.pieces() {
            let at = self.buffer.len();
            self.buffer.resize(at + usize::from(piece.len), 0);
            if let Some(to) = self.buffer.get_mut(at..) {
                // Where that is a fault, garbage is sent, as by any card.
                self.device.read(piece.address.bus(), to);
            }
        }
        let header = out.header();
        if header.flags.contains(HeaderFlags::NEEDS_CSUM) {
            fill_in(&mut self.buffer, header.csum_start.into(), header.csum_offset.into());
        }
        self.sent.push_back(out);
        Some(header)
    }

    /// Takes frames off the wire, as far as there are buffers for them.
    pub(super) fn receive(&mut self) {
        while let Some(Inbound { frame, .. }) = self.inbound.front() {
            let merges = self.offers.contains(Offers::MERGE);
            let mut sizes = self.posted.iter().take(self.shown).map(size);
            let (mut count, mut room) = (0, 0);
            while room < frame.len() && (merges || count == 0) {
                let Some(size) = sizes.next() else { return };
                (count, room) = (count + 1, room + size);
            }
            drop(sizes);
            let Some(Inbound { mut header, frame }) = self.inbound.pop_front() else { return };
            if room < frame.len() {
                // It finds no room, and a card says nothing of what it drops.
                continue;
            }
            header.num_buffers = count as u16;
            let mut rest = frame.as_slice();
            for buffer in self.posted.drain(..count) {
                let (part, left) = rest.split_at(size(&buffer).min(rest.len()));
                rest = left;
                let mut bytes = part;
                for piece in buffer.pieces() {
                    let (first, more) = bytes.split_at(bytes.len().min(piece.len.into()));
                    bytes = more;
                    self.device.write(piece.address.bus(), first);
                }
                self.received.push_back(Received { header, len: part.len(), buffer });
            }
            self.shown -= count;
            self.spare.push(frame);
        }
    }
}

fn size(buffer: &Buffer<SimHv>) -> usize {
    buffer.pieces().map(|piece| usize::from(piece.len)).sum()
}

/// Fills in a checksum: the sum over all from `start` on, what its field has now included (virtio 1.2, 5.1.6.2).
fn fill_in(frame: &mut [u8], start: usize, offset: usize) {
    let Some(summed) = frame.get_mut(start..) else { return };
    let pairs = summed.chunks(2).map(|pair| match *pair {
        [high, low] => u64::from(u16::from_be_bytes([high, low])),
        [high] => u64::from(high) << 8,
        _ => 0,
    });
    let mut sum: u64 = pairs.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    if let Some(field) = summed.get_mut(offset..offset + 2) {
        field.copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
}

impl Card<SimHv> for SimCard {
    fn offers(&self) -> Offers {
        self.offers
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn room(&self) -> usize {
        RING - self.used
    }

    fn clean_identity(&mut self, pieces: &[DmaPiece]) -> bool {
        let asks = |piece: &&DmaPiece| piece.maintenance == Maintenance::Identity;
        pieces
            .iter()
            .filter(asks)
            .all(|piece| self.hv.clean_cache(piece.address.bus().0, piece.len.into()))
    }

    fn send(&mut self, out: Outgoing<SimHv>) -> Result<(), Outgoing<SimHv>> {
        let header = out.header();
        let gso = match header.gso_type {
            GsoType::NONE => Offers::empty(),
            GsoType::TCPV4 => Offers::TSO4 | Offers::CSUM,
            _ => Offers::TSO6 | Offers::CSUM,
        };
        let sums = header.flags.contains(HeaderFlags::NEEDS_CSUM);
        let needed = gso | if sums { Offers::CSUM } else { Offers::empty() };
        assert!(self.offers.contains(needed), "{header:?} was not agreed on");
        let cost = 1 + out.pieces().count();
        if cost > self.room() {
            return Err(out);
        }
        out.pieces().for_each(|piece| self.maintain(piece, false));
        self.used += cost;
        self.sending.push_back((out, cost));
        self.moves += 1;
        Ok(())
    }

    fn sent(&mut self) -> Option<Outgoing<SimHv>> {
        let out = self.sent.pop_front()?;
        self.moves += 1;
        Some(out)
    }

    fn post(&mut self, buffer: Buffer<SimHv>) -> Result<(), Buffer<SimHv>> {
        if self.posted.len() >= RING {
            return Err(buffer);
        }
        buffer.pieces().for_each(|piece| self.maintain(piece, true));
        self.posted.push_back(buffer);
        self.moves += 1;
        Ok(())
    }

    fn received(&mut self) -> Option<Received<SimHv>> {
        let received = self.received.pop_front()?;
        received.buffer.pieces().for_each(|piece| self.maintain(piece, true));
        self.moves += 1;
        Some(received)
    }

    fn publish(&mut self) {
        (self.told, self.shown) = (self.sending.len(), self.posted.len());
    }

    fn is_broken(&self) -> bool {
        false
    }

    fn reset(&mut self) -> bool {
        self.sending.clear();
        self.sent.clear();
        self.posted.clear();
        self.received.clear();
        (self.told, self.used, self.shown) = (0, 0, 0);
        true
    }
}

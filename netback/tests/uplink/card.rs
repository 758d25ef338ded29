//! A network card that does everything by bus address, and its driver.

use std::collections::VecDeque;

use netback::dma::{DmaPiece, Maintenance};
use netback::uplink::{Buffer, Card, NetHeader, Offers, Outgoing, Received};
use netif::mac::MacAddr;
use sim::{DmaConfig, DmaDevice, Sim, SimHv};

pub const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

pub struct TestCard {
    hv: SimHv,
    pub device: DmaDevice,
    pub offers: Offers,
    /// Descriptors for sending.
    pub capacity: usize,
    used: usize,
    queued: VecDeque<Outgoing<SimHv>>,
    /// How many of those the device knows of.
    published: usize,
    done: VecDeque<Outgoing<SimHv>>,
    forgotten: Vec<Outgoing<SimHv>>,
    posted: VecDeque<Buffer<SimHv>>,
    arrived: VecDeque<Received<SimHv>>,
    /// What went out: what the device was told, and what it read.
    pub wire: Vec<(NetHeader, Vec<u8>)>,
    pub publishes: usize,
    /// The device does nothing.
    pub held: bool,
    pub broken: bool,
    /// It does not let itself be stopped.
    pub unstoppable: bool,
    /// The driver does what pieces ask for.
    pub cleans: bool,
    /// Nothing is where the driver would clean it.
    pub misses: bool,
    /// Frames whose headers are where a guest could change them.
    pub exposed: usize,
    /// Frames come back from the last to the first.
    pub backwards: bool,
}

impl TestCard {
    pub fn new(sim: &Sim, hv: &SimHv, config: DmaConfig, offers: Offers) -> Self {
        Self {
            hv: hv.clone(),
            device: DmaDevice::new(sim, hv.id(), config),
            offers,
            capacity: 256,
            used: 0,
            queued: VecDeque::with_capacity(512),
            published: 0,
            done: VecDeque::with_capacity(512),
            forgotten: Vec::new(),
            posted: VecDeque::with_capacity(512),
            arrived: VecDeque::with_capacity(512),
            wire: Vec::new(),
            publishes: 0,
            held: false,
            broken: false,
            unstoppable: false,
            cleans: true,
            misses: false,
            exposed: 0,
            backwards: false,
        }
    }

    /// Frames that the device has.
    pub fn holds(&self) -> usize {
        self.queued.len()
    }

    pub fn posted(&self) -> usize {
        self.posted.len()
    }

    /// The device sends what it was told of. Answers whether there was anything.
    pub fn run(&mut self) -> bool {
        let some = !self.held && self.published > 0;
        while !self.held && self.published > 0 {
            self.published -= 1;
            let out = self.queued.pop_front().unwrap();
            let mut bytes = Vec::new();
            for piece in out.pieces() {
                let at = bytes.len();
                bytes.resize(at + usize::from(piece.len), 0);
                // Where that is a fault, garbage is sent, as by any card.
                self.device.read(piece.address.bus(), &mut bytes[at..]);
            }
            self.wire.push((out.header(), bytes));
            if self.backwards { self.done.push_front(out) } else { self.done.push_back(out) }
        }
        some
    }

    /// The device never comes back to what it has.
    pub fn forget(&mut self) {
        self.forgotten.extend(self.queued.drain(..));
        self.published = 0;
    }

    /// A frame comes over the wire, into as many buffers as it takes.
    pub fn deliver(&mut self, header: NetHeader, frame: &[u8]) -> bool {
        let size = self.posted.front().map_or(0, room);
        let buffers = frame.len().div_ceil(size.max(1)).max(1);
        if self.posted.len() < buffers || buffers > 1 && !self.offers.contains(Offers::MERGE) {
            return false;
        }
        let header = NetHeader { num_buffers: buffers as u16, ..header };
        for part in frame.chunks(size) {
            self.fill(header, part, part.len());
        }
        true
    }

    /// The device writes to its next buffer, and says what it likes.
    pub fn fill(&mut self, header: NetHeader, bytes: &[u8], len: usize) {
        let buffer = self.posted.pop_front().unwrap();
        let mut rest = bytes;
        for piece in buffer.pieces() {
            let (part, after) = rest.split_at(rest.len().min(piece.len.into()));
            self.device.write(piece.address.bus(), part);
            rest = after;
        }
        self.arrived.push_back(Received { header, len, buffer });
    }

    /// Has the device see what the processor wrote.
    fn clean(&self, piece: DmaPiece) {
        if piece.maintenance == Maintenance::Own {
            assert!(self.hv.clean_cache(piece.address.bus().0, piece.len.into()));
        }
    }

    /// Has the processor see what the device wrote.
    fn invalidate(&self, buffer: &Buffer<SimHv>) {
        for piece in buffer.pieces().filter(|piece| piece.maintenance == Maintenance::Own) {
            assert!(self.hv.invalidate_cache(piece.address.bus().0, piece.len.into()));
        }
    }
}

fn room(buffer: &Buffer<SimHv>) -> usize {
    buffer.pieces().map(|piece| usize::from(piece.len)).sum()
}

fn descriptors(out: &Outgoing<SimHv>) -> usize {
    out.pieces().count() + 1
}

impl Card<SimHv> for TestCard {
    fn offers(&self) -> Offers {
        self.offers
    }

    fn mac(&self) -> MacAddr {
        MAC
    }

    fn room(&self) -> usize {
        self.capacity - self.used
    }

    fn clean_identity(&mut self, pieces: &[DmaPiece]) -> bool {
        let asks = |piece: &&DmaPiece| piece.maintenance == Maintenance::Identity;
        let clean = |piece: &DmaPiece| {
            !self.cleans || self.hv.clean_cache(piece.address.bus().0, piece.len.into())
        };
        pieces.iter().filter(asks).all(|piece| !self.misses && clean(piece))
    }

    fn send(&mut self, out: Outgoing<SimHv>) -> Result<(), Outgoing<SimHv>> {
        if descriptors(&out) > self.room() {
            return Err(out);
        }
        self.used += descriptors(&out);
        let first = out.pieces().next().unwrap();
        self.exposed += usize::from(first.maintenance == Maintenance::Hypercall);
        if self.cleans {
            out.pieces().for_each(|piece| self.clean(piece));
        }
        self.queued.push_back(out);
        Ok(())
    }

    fn sent(&mut self) -> Option<Outgoing<SimHv>> {
        let out = self.done.pop_front()?;
        self.used -= descriptors(&out);
        Some(out)
    }

    fn post(&mut self, buffer: Buffer<SimHv>) -> Result<(), Buffer<SimHv>> {
        self.invalidate(&buffer);
        self.posted.push_back(buffer);
        Ok(())
    }

    fn received(&mut self) -> Option<Received<SimHv>> {
        let received = self.arrived.pop_front()?;
        self.invalidate(&received.buffer);
        Some(received)
    }

    fn publish(&mut self) {
        self.published = self.queued.len();
        self.publishes += 1;
    }

    fn is_broken(&self) -> bool {
        self.broken
    }

    fn reset(&mut self) -> bool {
        if self.unstoppable {
            return false;
        }
        self.queued.clear();
        self.forgotten.clear();
        self.done.clear();
        self.posted.clear();
        self.arrived.clear();
        (self.used, self.published) = (0, 0);
        (self.broken, self.held) = (false, false);
        true
    }
}

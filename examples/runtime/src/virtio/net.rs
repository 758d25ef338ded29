//! A virtio network card (virtio 1.2, 5.1): one queue each way.

use core::fmt;
use core::mem;

use bitflags::bitflags;
use hypercall::Hypervisor;
use netback::dma::{DmaPiece, Maintenance};
use netback::uplink::{Buffer, Card, NetHeader, Offers, Outgoing, Received};
use netif::mac::MacAddr;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceStatus, InterruptStatus, Transport};

use super::memory::DmaPage;
use super::platform::{self, Interrupt};
use super::queue::{Described, Done, Fault, LARGEST, Part, Queue};
use crate::machine::Hv;

/// Numbers of the queues.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Bytes of the page of headers for each descriptor that a chain may begin with.
const HEADER_ROOM: usize = 16;
const HEADER_LEN: u32 = NetHeader::LEN as u32;
/// How often to look whether a device has stopped: it does so at once, or never.
const PATIENCE: usize = 10_000;

bitflags! {
    /// What a network card and its driver can agree on, as far as we know of it (virtio 1.2, 5.1.3 and 6).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct NetFeatures: u64 {
        /// It fills in checksums of what is sent.
        const CSUM = 1;
        /// What is received may lack its checksum.
        const GUEST_CSUM = 1 << 1;
        /// It has an address.
        const MAC = 1 << 5;
        /// It cuts TCP over IPv4.
        const HOST_TSO4 = 1 << 11;
        /// It cuts TCP over IPv6.
        const HOST_TSO6 = 1 << 12;
        /// Each side says by index when it wants to hear of the other.
        const EVENT_IDX = 1 << 29;
        /// It is not a legacy device.
        const VERSION_1 = 1 << 32;
        /// It finds memory by bus address, which need not be what the processor calls it: it is given nothing else.
        const ACCESS_PLATFORM = 1 << 33;
    }
}

impl NetFeatures {
    fn offers(self) -> Offers {
        let mut offers = Offers::empty();
        offers.set(Offers::CSUM, self.contains(Self::CSUM));
        offers.set(Offers::RX_CSUM, self.contains(Self::GUEST_CSUM));
        // Cutting means summing up.
        offers.set(Offers::TSO4, self.contains(Self::HOST_TSO4 | Self::CSUM));
        offers.set(Offers::TSO6, self.contains(Self::HOST_TSO6 | Self::CSUM));
        offers
    }
}

impl fmt::Display for NetFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        bitflags::parser::to_writer(self, f)
    }
}

/// A network card.
///
/// Buffers and frames that the device has are the device's until it gives them back, or has been stopped; one that does not stop
/// keeps them for good.
pub struct Net<H: Hypervisor = Hv, T: Transport = MmioTransport<'static>> {
    transport: T,
    interrupt: Interrupt,
    mac: MacAddr,
    agreed: NetFeatures,
    coherent: bool,
    receive: Ring<Buffer<H>>,
    transmit: Ring<Outgoing<H>>,
    broken: bool,
}

/// A queue, and a header for each of its chains.
struct Ring<T> {
    queue: Queue<T>,
    headers: DmaPage,
}

impl<T> Ring<T> {
    fn new<H: Hypervisor>(hv: &H, size: u32, event_index: bool, coherent: bool) -> Option<Self> {
        let queue = Queue::new(hv, size, event_index, coherent)?;
        Some(Self { queue, headers: DmaPage::new(hv, coherent)? })
    }

    /// Where the header is of the chain that begins with this descriptor.
    fn header(head: u16) -> usize {
        usize::from(head) * HEADER_ROOM
    }

    /// Describes a chain: a header, and these bytes. `None` if there is no room for it.
    fn describe(
        &self,
        pieces: impl Iterator<Item = DmaPiece>,
        writable: bool,
    ) -> Option<Described> {
        let at = Self::header(self.queue.next_head());
        let header = Part { address: self.headers.bus(at), len: HEADER_LEN, writable };
        let parts = pieces.map(|piece| Part {
            address: piece.address.bus().0,
            len: piece.len.into(),
            writable,
        });
        self.queue.describe([header].into_iter().chain(parts))
    }
}

// The page has room for as many headers as there can be.
const _: () = assert!(LARGEST as usize * HEADER_ROOM <= hypercall::PAGE_SIZE);

impl<H: Hypervisor, T: Transport> Net<H, T> {
    /// Starts a card. `interrupt` is the device's and not in use; `coherent` says that the device sees what the processor has in
    /// its caches.
    ///
    /// # Errors
    /// What the card would have to have, and has not.
    pub(super) fn new(
        hv: &H,
        mut transport: T,
        interrupt: Interrupt,
        coherent: bool,
    ) -> Result<Self, &'static str> {
        if !stop(&mut transport) {
            return Err("a device that can be stopped");
        }
        let agreed: NetFeatures = transport.begin_init(NetFeatures::all());
        if !agreed.contains(NetFeatures::VERSION_1) {
            return Err("virtio 1");
        }
        if !transport.get_status().contains(DeviceStatus::FEATURES_OK) {
            return Err("the features that it offers");
        }
        if !agreed.contains(NetFeatures::MAC) {
            return Err("an address");
        }
        let mac = transport.read_consistent(|| transport.read_config_space(0));
        let mac = MacAddr(mac.map_err(|_| "a configuration space")?);
        let event_index = agreed.contains(NetFeatures::EVENT_IDX);
        let sizes = [RECEIVE, TRANSMIT].map(|queue| transport.max_queue_size(queue));
        let [receive, transmit] = sizes;
        let receive = Ring::new(hv, receive, event_index, coherent);
        let transmit = Ring::new(hv, transmit, event_index, coherent);
        let (receive, transmit) = receive.zip(transmit).ok_or("queues, or memory for them")?;
        let broken = false;
        let mut net =
            Self { transport, interrupt, mac, agreed, coherent, receive, transmit, broken };
        net.start();
        Ok(net)
    }

    /// Tells the device, of which the features are agreed on, where its queues are, and has it begin.
    fn start(&mut self) {
        let Self { transport, receive, transmit, .. } = self;
        for (number, size, areas) in [
            (RECEIVE, receive.queue.size(), receive.queue.areas()),
            (TRANSMIT, transmit.queue.size(), transmit.queue.areas()),
        ] {
            let [table, available, used] = areas;
            transport.queue_set(number, size.into(), table, available, used);
        }
        transport.finish_init();
        // From here on the device may be done with something at any time.
        let _ = self.receive.queue.arm(0);
        let _ = self.transmit.queue.arm(0);
    }

    /// What was agreed on.
    #[must_use]
    pub const fn features(&self) -> NetFeatures {
        self.agreed
    }

    /// Whether the device sees what the processor has in its caches.
    #[must_use]
    pub const fn is_coherent(&self) -> bool {
        self.coherent
    }

    /// Takes note of the interrupt, if there was one; to be called before the card is asked what it has. Until then no other
    /// comes, and [`Sleep`](crate::Sleep) does not sleep.
    pub fn acknowledge(&mut self) {
        if !self.interrupt.take() {
            return;
        }
        // Before any look at what was done: what is done after this raises it again.
        let why = self.transport.ack_interrupt();
        if why.contains(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT)
            && self.transport.get_status().contains(DeviceStatus::DEVICE_NEEDS_RESET)
        {
            log::error!("virtio: {}: the device says that it has failed", self.mac);
            self.broken = true;
        }
    }

    /// Something a queue said, unless it makes no sense.
    fn believe<D>(&mut self, said: Result<Option<Done<D>>, Fault>) -> Option<Done<D>> {
        said.unwrap_or_else(|fault| {
            log::error!("virtio: {}: the device makes no sense: {fault}", self.mac);
            self.broken = true;
            None
        })
    }
}

/// Does to the caches of these bytes, where they are ours, what is the processor's business.
fn maintain(pieces: impl IntoIterator<Item = DmaPiece>, own: impl Fn(usize, usize)) {
    for piece in pieces.into_iter().filter(|piece| piece.maintenance == Maintenance::Own) {
        // Memory of ours is mapped at its own address, and that is its bus address.
        own(piece.address.bus().0 as usize, piece.len.into());
    }
}

/// Has a device let go of everything; says whether it did.
fn stop(transport: &mut impl Transport) -> bool {
    transport.set_status(DeviceStatus::empty());
    (0..PATIENCE).any(|_| transport.get_status().is_empty())
}

impl<H: Hypervisor, T: Transport> Card<H> for Net<H, T> {
    fn offers(&self) -> Offers {
        self.agreed.offers()
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn room(&self) -> usize {
        if self.broken { 0 } else { self.transmit.queue.room().into() }
    }

    fn clean_identity(&mut self, pieces: &[DmaPiece]) -> bool {
        let asks = |piece: &&DmaPiece| piece.maintenance == Maintenance::Identity;
        pieces
            .iter()
            .filter(asks)
            .all(|piece| platform::clean_machine(piece.address.bus().0, piece.len.into()))
    }

    fn send(&mut self, out: Outgoing<H>) -> Result<(), Outgoing<H>> {
        let described = self.transmit.describe(out.pieces(), false);
        let Some(chain) = described.filter(|_| !self.broken) else { return Err(out) };
        maintain(out.pieces(), platform::clean_cache);
        let Ring { queue, headers } = &mut self.transmit;
        headers.write(Ring::<Outgoing<H>>::header(queue.next_head()), &out.header().to_bytes());
        queue.queue(chain, out);
        Ok(())
    }

    fn sent(&mut self) -> Option<Outgoing<H>> {
        loop {
            let said = self.transmit.queue.pop();
            if let Some(done) = self.believe(said) {
                return Some(done.token);
            }
            if !self.transmit.queue.arm(later(&self.transmit.queue)) {
                return None;
            }
        }
    }

    fn post(&mut self, buffer: Buffer<H>) -> Result<(), Buffer<H>> {
        let described = self.receive.describe(buffer.pieces(), true);
        let Some(chain) = described.filter(|_| !self.broken) else { return Err(buffer) };
        // Or a line of ours might be written back over what the device writes.
        maintain(buffer.pieces(), platform::clean_cache);
        self.receive.queue.queue(chain, buffer);
        Ok(())
    }

    fn received(&mut self) -> Option<Received<H>> {
        let done = loop {
            let said = self.receive.queue.pop();
            if let Some(done) = self.believe(said) {
                break done;
            }
            if !self.receive.queue.arm(0) {
                return None;
            }
        };
        let mut header = [0; NetHeader::LEN];
        self.receive.headers.read(Ring::<Buffer<H>>::header(done.head), &mut header);
        maintain(done.token.pieces(), platform::discard_cache);
        Some(Received {
            header: NetHeader::from_bytes(header),
            // Less than a header is nothing of a frame.
            len: done.written.saturating_sub(HEADER_LEN) as usize,
            buffer: done.token,
        })
    }

    fn publish(&mut self) {
        if self.broken {
            return;
        }
        // Later than it was: there is an interrupt for each time that it was passed.
        let _ = self.transmit.queue.arm(later(&self.transmit.queue));
        for (number, notify) in
            [(RECEIVE, self.receive.queue.show()), (TRANSMIT, self.transmit.queue.show())]
        {
            if notify {
                self.transport.notify(number);
            }
        }
    }

    fn is_broken(&self) -> bool {
        self.broken
    }

    fn reset(&mut self) -> bool {
        if !stop(&mut self.transport) {
            self.broken = true;
            return false;
        }
        self.receive.queue.clear();
        self.transmit.queue.clear();
        let agreed: NetFeatures = self.transport.begin_init(self.agreed);
        let accepted = self.transport.get_status().contains(DeviceStatus::FEATURES_OK);
        // A device that offers less than it did is not the one that the port knows.
        self.broken = agreed != self.agreed || !accepted;
        if !self.broken {
            self.start();
        }
        true
    }
}

/// How many more frames are to be sent before the device says so: three quarters of what it has, so that there is one
/// interrupt for many, and something left for it to do meanwhile.
fn later<T>(queue: &Queue<T>) -> u16 {
    // Of at most 256.
    queue.under_way() * 3 / 4
}

impl<H: Hypervisor, T: Transport> Drop for Net<H, T> {
    fn drop(&mut self) {
        if !stop(&mut self.transport) {
            log::error!("virtio: {}: it does not stop: what it has stays its own", self.mac);
            self.receive.queue.abandon().for_each(mem::forget);
            self.transmit.queue.abandon().for_each(mem::forget);
        }
    }
}

impl<H: Hypervisor, T: Transport> fmt::Debug for Net<H, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Net({}, {})", self.mac, self.agreed)
    }
}

#[cfg(test)]
mod tests;

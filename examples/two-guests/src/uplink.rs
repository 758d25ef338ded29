//! Domain 0's network card, and the wire behind it.

use std::collections::VecDeque;

use features::XenFeatures;
use hypercall::Instant;
use netback::datapath::{Arch, Facts, Nic};
use netback::dma::{self, DmaPiece, DmaRule, Maintenance};
use netback::{Backend, Packet};
use netfront::Meta;
use netif::mac::MacAddr;
use netif::offload::Checksum;
use sim::{DmaCounts, DmaDevice, SimHv};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::time;

use crate::wire::Wire;

/// Descriptors of each of the card's rings.
const RING: usize = 256;
/// The largest frame on the wire.
const FRAME: usize = 1514;

/// A packet in the card's ring.
#[derive(Debug)]
struct Descriptor {
    /// Its pages stay mapped until this is dropped.
    packet: Packet<SimHv>,
    /// Where the card finds what is not in the driver's own memory.
    pieces: Vec<DmaPiece>,
}

/// A network card and its driver: packets of the switch's uplink go out, what comes in goes to the switch. What guests
/// lent, the card reads by itself, by bus address.
#[derive(Debug)]
pub struct Uplink {
    device: DmaDevice,
    hv: SimHv,
    /// Given to the card, and not sent yet.
    sending: VecDeque<Descriptor>,
    /// Waits for a buffer to be copied into.
    waiting: Option<Packet<SimHv>>,
    received: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    /// The frame that is being received at the far end.
    buffer: Vec<u8>,
    /// Packets that the card still sends in this turn.
    budget: usize,
    /// Packets that the driver could make nothing of.
    dropped: u64,
    driver_held: bool,
    card_held: bool,
    misrule: Option<Misrule>,
}

/// What a driver must not do: ways to be wrong about where a card finds what a guest lent. A run in which it is done on purpose
/// shows that it would be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misrule {
    /// The card is given the guest-physical address at which the page was mapped.
    MappedAddress,
    /// It is given the machine address.
    MachineAddress,
    /// Nobody cleans the caches of what it is to read.
    NoCleaning,
    /// They are cleaned at the guest-physical address that equals the machine address, as if the page were there. So did Linux 3.15.
    CleaningElsewhere,
}

impl Misrule {
    /// The rule that would be right in another domain than one with these bits.
    fn rule(self, bits: XenFeatures) -> Option<DmaRule> {
        let (direct, other) = (XenFeatures::DIRECT_MAPPED, XenFeatures::NOT_DIRECT_MAPPED);
        let bits = match self {
            Self::MappedAddress => (bits - direct) | other,
            Self::MachineAddress => (bits - other) | direct,
            Self::NoCleaning | Self::CleaningElsewhere => bits,
        };
        let arch = match self {
            Self::MappedAddress | Self::MachineAddress => Arch::X86,
            Self::NoCleaning | Self::CleaningElsewhere => Arch::Arm,
        };
        let facts = Facts {
            arch,
            grant_copy: true,
            cache_flush: false,
            iommu_maps: true,
            uplink: Some(Nic { coherent: true }),
        };
        dma::rule(bits, &facts)
    }
}

impl Uplink {
    pub(crate) fn new(hv: SimHv, device: DmaDevice) -> Self {
        Self {
            device,
            hv,
            sending: VecDeque::new(),
            waiting: None,
            received: VecDeque::new(),
            spare: Vec::new(),
            buffer: Vec::new(),
            budget: 0,
            dropped: 0,
            driver_held: false,
            card_held: false,
            misrule: None,
        }
    }

    /// The driver's domain is about to end, and whatever it had with the card ends with it.
    pub(crate) fn lose(&mut self) {
        self.sending.clear();
        self.waiting = None;
        self.received.clear();
    }

    /// What the card did by itself.
    #[must_use]
    pub fn dma(&self) -> DmaCounts {
        self.device.counts()
    }

    /// Packets that the driver could make nothing of.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Has the driver take nothing, or the card send nothing, until told otherwise: what they have not done stays mapped.
    pub fn hold(&mut self, driver: bool, card: bool) {
        (self.driver_held, self.card_held) = (driver, card);
    }

    /// Has the driver go wrong from now on.
    pub fn mislead(&mut self, misrule: Misrule) {
        self.misrule = Some(misrule);
    }

    /// The driver: takes what is to go out, and hands in what came. Answers whether there was anything.
    pub(crate) fn drive(&mut self, backend: &mut Backend<SimHv>, now: Instant) -> bool {
        let mut some = false;
        while !self.driver_held
            && self.sending.len() < RING
            && let Some(packet) = self.waiting.take().or_else(|| backend.receive_uplink())
        {
            match self.describe(packet, backend) {
                Ok(descriptor) => self.sending.push_back(descriptor),
                Err(packet) => {
                    self.waiting = Some(packet);
                    break;
                }
            }
            some = true;
        }
        while let Some(frame) = self.received.pop_front() {
            let Some(mut packet) = backend.packet(frame.len(), now) else {
                self.received.push_front(frame);
                break;
            };
            packet.bytes_mut().copy_from_slice(&frame);
            packet.checksum = Checksum::Unverified;
            backend.send_uplink(packet, now);
            self.spare.push(frame);
            some = true;
        }
        some
    }

    /// Tells the card where a packet is, or copies it if there is no address that is right. Gives it back if there is no
    /// buffer for that now.
    fn describe(
        &mut self,
        mut packet: Packet<SimHv>,
        backend: &Backend<SimHv>,
    ) -> Result<Descriptor, Packet<SimHv>> {
        if packet.is_whole() {
            return Ok(Descriptor { packet, pieces: Vec::new() });
        }
        // The rule of this moment: what was advertised when the packet was mapped may be gone.
        let rule = match self.misrule {
            None => backend.dma_rule(),
            Some(misrule) => misrule.rule(backend.features().snapshot().bits()),
        };
        let pieces: Option<Vec<_>> = rule.and_then(|rule| packet.dma(rule).collect());
        if let Some(pieces) = pieces.filter(|pieces| self.clean(pieces)) {
            return Ok(Descriptor { packet, pieces });
        }
        if packet.make_whole(backend.pools()) {
            return Ok(Descriptor { packet, pieces: Vec::new() });
        }
        if !packet.is_lent() {
            self.dropped += 1;
        }
        Err(packet)
    }

    /// Has the card see what the processors' caches hold of these bytes.
    fn clean(&self, pieces: &[DmaPiece]) -> bool {
        let by_instruction =
            |piece: &DmaPiece| self.hv.clean_cache(piece.address.bus().0, piece.len.into());
        if self.misrule == Some(Misrule::CleaningElsewhere) {
            // Who is wrong about the address does not ask whether it helped.
            pieces.iter().for_each(|piece| {
                by_instruction(piece);
            });
            return true;
        }
        dma::clean(&self.hv, pieces.iter().copied()).is_ok()
            && pieces
                .iter()
                .all(|piece| piece.maintenance != Maintenance::Identity || by_instruction(piece))
    }

    /// The card gets so far and no further in this turn: the rest stays in its hands.
    pub(crate) fn turn(&mut self, budget: usize) {
        self.budget = budget;
    }

    /// Whether there is something that the card has not sent.
    pub(crate) fn is_busy(&self) -> bool {
        !self.sending.is_empty()
    }

    /// The next packet goes out: all its bytes, into the buffer.
    fn transmit(&mut self) -> bool {
        let Some(budget) = self.budget.checked_sub(1).filter(|_| !self.card_held) else {
            return false;
        };
        let Some(Descriptor { packet, pieces }) = self.sending.pop_front() else { return false };
        self.budget = budget;
        self.buffer.clear();
        self.buffer.extend_from_slice(packet.bytes());
        for piece in pieces {
            let at = self.buffer.len();
            self.buffer.resize(at + usize::from(piece.len), 0);
            if let Some(to) = self.buffer.get_mut(at..) {
                // Where that is a fault, garbage is sent, as by any card.
                self.device.read(piece.address.bus(), to);
            }
        }
        true
    }
}

/// The far end of the wire.
pub(crate) struct Outside<'a> {
    pub(crate) nic: &'a mut Uplink,
    pub(crate) mac: MacAddr,
}

/// A frame that came over the wire.
pub(crate) struct Received<'a>(&'a [u8]);

/// Room for a frame on the wire.
pub(crate) struct Sender<'a> {
    received: &'a mut VecDeque<Vec<u8>>,
    spare: &'a mut Vec<Vec<u8>>,
}

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = self.spare.pop().unwrap_or_default();
        frame.clear();
        frame.resize(len, 0);
        let result = f(&mut frame);
        self.received.push_back(frame);
        result
    }
}

impl Device for Outside<'_> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Sender<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: time::Instant) -> Option<(Received<'_>, Sender<'_>)> {
        if self.nic.received.len() >= RING || !self.nic.transmit() {
            return None;
        }
        let Uplink { received, spare, buffer, .. } = &mut *self.nic;
        Some((Received(buffer), Sender { received, spare }))
    }

    fn transmit(&mut self, _: time::Instant) -> Option<Sender<'_>> {
        let Uplink { received, spare, .. } = &mut *self.nic;
        (received.len() < RING).then_some(Sender { received, spare })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        // Sums that guests left blank are the card's to fill in, and packets that they left whole are its to cut. What is
        // behind the wire takes both as they are; the streams have sums of their own.
        capabilities.checksum.tcp = phy::Checksum::Tx;
        capabilities
    }
}

impl Wire for Outside<'_> {
    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn max_frame(&self) -> usize {
        FRAME
    }

    fn segments(&self) -> bool {
        false
    }

    fn send(&mut self, _: u16, frame: &[u8], _: Meta) -> bool {
        let Uplink { received, spare, .. } = &mut *self.nic;
        if received.len() >= RING {
            return false;
        }
        let sender = Sender { received, spare };
        phy::TxToken::consume(sender, frame.len(), |to| to.copy_from_slice(frame));
        true
    }
}

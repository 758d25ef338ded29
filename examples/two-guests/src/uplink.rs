//! The backend's network card at netback's port for it, and the wire behind it.

mod card;
mod outside;

use hypercall::Instant;
use netback::Backend;
use netback::uplink::{self, Offers, UplinkConfig, UplinkCounters};
use netif::mac::MacAddr;
use sim::{DmaCounts, DmaDevice, Sim, SimHv};

use card::SimCard;
use outside::Gathering;

use crate::misrule::Misrule;
use crate::world::Config;

pub(crate) use outside::Outside;

/// The address of the card itself, which nobody uses.
const CARD: MacAddr = MacAddr([0, 0x16, 0x3e, 0, 3, 0]);

/// How a card is made, and its port.
#[derive(Clone, Copy, Debug)]
pub struct CardConfig {
    /// What it offers.
    pub offers: Offers,
    /// Buffers that it is given to receive into.
    pub buffers: u16,
}

impl Default for CardConfig {
    fn default() -> Self {
        let tcp = Offers::CSUM | Offers::TSO4 | Offers::TSO6;
        Self { offers: tcp | Offers::RX_CSUM, buffers: 64 }
    }
}

/// A network card at its port: packets of the switch's uplink go out, what comes in goes to the switch. What guests lent, the card
/// reads by itself, by bus address.
#[derive(Debug)]
pub struct Uplink {
    /// `None`: its domain has ended, and the card with it.
    port: Option<uplink::Uplink<SimHv, SimCard>>,
    gathering: Gathering,
    /// Frames on the wire whose checksums were wrong.
    bad_sums: u64,
    driver_held: bool,
}

impl Uplink {
    pub(crate) fn new(sim: &Sim, hv: SimHv, config: &Config) -> Self {
        let device = DmaDevice::new(sim, hv.id(), config.card);
        let elsewhere = config.misrule == Some(Misrule::CleaningElsewhere);
        let card = SimCard::new(hv, device, CARD, config.nic.offers, elsewhere);
        let buffers = config.nic.buffers;
        // The wire takes frames of any length.
        let config = UplinkConfig { buffers, max_frame: u16::MAX, ..UplinkConfig::default() };
        Self {
            port: Some(uplink::Uplink::new(card, config)),
            gathering: Gathering::default(),
            bad_sums: 0,
            driver_held: false,
        }
    }

    /// The driver's domain is about to end, and whatever it had with the card ends with it.
    pub(crate) fn lose(&mut self) {
        self.port = None;
    }

    /// What the card did by itself.
    #[must_use]
    pub fn dma(&self) -> DmaCounts {
        self.port.as_ref().map_or(DmaCounts::default(), |port| port.card().dma())
    }

    /// What its port did.
    #[must_use]
    pub fn counters(&self) -> UplinkCounters {
        self.port.as_ref().map_or(UplinkCounters::default(), |port| *port.counters())
    }

    /// Buffers of the backend's that the card has to receive into.
    #[must_use]
    pub fn posted(&self) -> usize {
        self.port.as_ref().map_or(0, |port| port.card().posted())
    }

    /// Frames that the card has and has not sent.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.port.as_ref().map_or(0, uplink::Uplink::in_flight)
    }

    /// Frames on the wire whose checksums were wrong.
    #[must_use]
    pub fn bad_sums(&self) -> u64 {
        self.bad_sums
    }

    /// Has the driver do nothing, or the card send nothing, until told otherwise: what they have not done stays mapped.
    pub fn hold(&mut self, driver: bool, card: bool) {
        self.driver_held = driver;
        if let Some(port) = &mut self.port {
            port.card_mut().held = card;
        }
    }

    /// The driver takes what is to go out, and hands in what came. Answers whether there was anything.
    pub(crate) fn drive(&mut self, backend: &mut Backend<SimHv>, now: Instant) -> bool {
        let Some(port) = self.port.as_mut().filter(|_| !self.driver_held) else { return false };
        let before = port.card().moves;
        let more = port.poll(backend, now);
        more || port.card().moves != before
    }

    /// When the driver is to have a turn though nothing comes.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.port.as_ref().filter(|_| !self.driver_held)?.deadline()
    }

    /// The card sends so much and no more in this turn: the rest stays in its hands.
    pub(crate) fn turn(&mut self, budget: usize) {
        if let Some(port) = &mut self.port {
            port.card_mut().budget = budget;
        }
    }

    /// The card takes what there is on the wire.
    pub(crate) fn receive(&mut self) {
        if let Some(port) = &mut self.port {
            port.card_mut().receive();
        }
    }

    /// Whether there is something that the card has not sent.
    pub(crate) fn is_busy(&self) -> bool {
        self.port.as_ref().is_some_and(|port| port.card().is_busy())
    }
}

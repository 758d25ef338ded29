//! The network card, and a record of what goes by it.

use netback::dma::DmaPiece;
use netback::uplink::{Buffer, Card, Offers, Outgoing, Received};
use netif::mac::MacAddr;
use runtime::Hv;
use runtime::virtio::Net;

use crate::capture::Capture;

/// A card that is listened to.
pub(crate) struct Tap {
    pub(crate) net: Net,
    pub(crate) capture: Option<Capture>,
}

impl Card<Hv> for Tap {
    fn offers(&self) -> Offers {
        self.net.offers()
    }

    fn mac(&self) -> MacAddr {
        self.net.mac()
    }

    fn room(&self) -> usize {
        self.net.room()
    }

    fn clean_identity(&mut self, pieces: &[DmaPiece]) -> bool {
        self.net.clean_identity(pieces)
    }

    fn send(&mut self, out: Outgoing<Hv>) -> Result<(), Outgoing<Hv>> {
        // One that the card does not take comes again.
        if let Some(capture) =
            self.capture.as_mut().filter(|_| out.pieces().count() < self.net.room())
        {
            capture.record(out.first_bytes(), out.len(), runtime::now());
        }
        self.net.send(out)
    }

    fn sent(&mut self) -> Option<Outgoing<Hv>> {
        self.net.sent()
    }

    fn post(&mut self, buffer: Buffer<Hv>) -> Result<(), Buffer<Hv>> {
        self.net.post(buffer)
    }

    fn received(&mut self) -> Option<Received<Hv>> {
        let received = self.net.received()?;
        if let Some(capture) = &mut self.capture {
            capture.record(received.bytes(), received.len, runtime::now());
        }
        Some(received)
    }

    fn publish(&mut self) {
        self.net.publish();
    }

    fn is_broken(&self) -> bool {
        self.net.is_broken()
    }

    fn reset(&mut self) -> bool {
        self.net.reset()
    }
}

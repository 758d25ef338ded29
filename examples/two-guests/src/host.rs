//! What runs in a guest, or outside: numbered frames, and TCP beside them on the same wire.

use std::cell::Cell;
use std::net::Ipv4Addr;

use hypercall::Instant;
use netif::mac::MacAddr;
use smoltcp::phy::{self, Device, DeviceCapabilities, PacketMeta};
use smoltcp::time;

use crate::frames::Frames;
use crate::tcp::{self, Tcp};
use crate::wire::{Misdeed, Saboteur, Wire};

/// The applications of one station.
pub struct Host {
    /// Numbered frames.
    pub frames: Frames,
    /// TCP, where there is any.
    pub tcp: Option<Tcp>,
    saboteur: Option<Saboteur>,
}

impl Host {
    /// A host that has frames and no TCP.
    #[must_use]
    pub fn new(frames: Frames) -> Self {
        Self { frames, tcp: None, saboteur: None }
    }

    /// Has somebody between it and its wire do what a network must not do.
    pub fn sabotage(&mut self, misdeed: Misdeed, seed: u64) {
        self.saboteur = Some(Saboteur::new(misdeed, seed));
    }

    /// Gives it an address and TCP.
    pub fn with_tcp(&mut self, wire: &mut impl Wire, address: Ipv4Addr, now: Instant) -> &mut Tcp {
        self.tcp.insert(Tcp::new(wire, wire.mac(), address, now))
    }

    /// Takes what came and sends what may go. Answers whether anything did.
    pub fn turn(&mut self, wire: &mut impl Wire, now: Instant) -> bool {
        let Self { frames, tcp, saboteur } = self;
        let moved = Cell::new(false);
        let own = wire.mac();
        let mut tap = Tap { wire, frames, saboteur, own, now, moved: &moved };
        let some = match tcp {
            Some(tcp) => tcp.poll(&mut tap, now),
            None => {
                while let Some((frame, _)) = tap.receive(tcp::at(now)) {
                    phy::RxToken::consume(frame, |_| {});
                }
                false
            }
        };
        some | moved.get() | frames.send(wire, now)
    }

    /// When [`turn`](Self::turn) is to be called though nothing comes.
    pub fn deadline(&mut self, now: Instant) -> Option<Instant> {
        self.tcp.as_mut()?.deadline(now)
    }

    /// Stops what would go on for ever: what is on its way arrives, and streams end.
    pub fn stop(&mut self) {
        self.frames.stop(true);
        if let Some(tcp) = &mut self.tcp {
            tcp.stop();
        }
    }

    /// Whether what comes to an end has done so.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.tcp.as_ref().is_none_or(Tcp::is_done)
    }
}

/// A wire from which the numbered frames are taken before smoltcp sees them.
struct Tap<'a, W> {
    wire: &'a mut W,
    frames: &'a mut Frames,
    saboteur: &'a mut Option<Saboteur>,
    own: MacAddr,
    now: Instant,
    moved: &'a Cell<bool>,
}

struct Received<'a, T> {
    inner: T,
    frames: &'a mut Frames,
    saboteur: &'a mut Option<Saboteur>,
    own: MacAddr,
    now: Instant,
    moved: &'a Cell<bool>,
}

struct Sender<'a, T> {
    inner: T,
    moved: &'a Cell<bool>,
}

impl<T: phy::RxToken> phy::RxToken for Received<'_, T> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let Self { inner, frames, saboteur, own, now, moved } = self;
        moved.set(true);
        inner.consume(|frame| {
            let mut rest = None;
            let mut sort = |frame: &[u8]| {
                if !frames.take(frame, own, now) {
                    rest = Some(frame.to_vec());
                }
            };
            match saboteur {
                Some(saboteur) => saboteur.pass(frame, sort),
                // The usual way: smoltcp reads what is there.
                None if !Frames::is_frame(frame) => return f(frame),
                None => sort(frame),
            }
            // What has no header is nothing to smoltcp.
            f(&rest.unwrap_or_default())
        })
    }

    fn meta(&self) -> PacketMeta {
        self.inner.meta()
    }
}

impl<T: phy::TxToken> phy::TxToken for Sender<'_, T> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.moved.set(true);
        self.inner.consume(len, f)
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.inner.set_meta(meta);
    }
}

impl<W: Wire> Device for Tap<'_, W> {
    type RxToken<'a>
        = Received<'a, W::RxToken<'a>>
    where
        Self: 'a;
    type TxToken<'a>
        = Sender<'a, W::TxToken<'a>>
    where
        Self: 'a;

    fn receive(&mut self, now: time::Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let Self { wire, frames, saboteur, own, moved, .. } = self;
        let (received, sender) = wire.receive(now)?;
        let (own, now) = (*own, self.now);
        Some((
            Received { inner: received, frames, saboteur, own, now, moved },
            Sender { inner: sender, moved },
        ))
    }

    fn transmit(&mut self, now: time::Instant) -> Option<Self::TxToken<'_>> {
        let inner = self.wire.transmit(now)?;
        Some(Sender { inner, moved: self.moved })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.wire.capabilities()
    }
}

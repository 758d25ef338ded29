//! What an application sends and receives Ethernet frames through.

use netfront::Meta;
use netif::mac::MacAddr;

use crate::random::Random;

/// One end of a wire.
pub trait Wire {
    /// The address of this end.
    fn mac(&self) -> MacAddr;

    /// The largest frame that may be sent, in bytes.
    fn max_frame(&self) -> usize;

    /// Sends a frame of one flow; `false` if there is no room now, and then nothing of it was sent.
    fn send(&mut self, flow: u16, frame: &[u8], meta: Meta) -> bool;

    /// The next frame that came, into `frame`.
    fn receive(&mut self, frame: &mut Vec<u8>) -> Option<Meta>;
}

/// What a network must not do. A run in which somebody does it on purpose shows that it would be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misdeed {
    /// A frame vanishes.
    Drop,
    /// A frame comes twice.
    Duplicate,
    /// A frame overtakes another.
    Reorder,
    /// A bit flips.
    Corrupt,
}

impl Misdeed {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Self); 4] = [
        ("drop", Self::Drop),
        ("duplicate", Self::Duplicate),
        ("reorder", Self::Reorder),
        ("corrupt", Self::Corrupt),
    ];
}

/// Frames between misdeeds, on average.
const RARITY: usize = 100;

/// Does a misdeed to some of the frames that come over a wire.
#[derive(Clone, Debug)]
pub(crate) struct Saboteur {
    misdeed: Misdeed,
    random: Random,
    held: Option<(Vec<u8>, Meta)>,
}

impl Saboteur {
    pub(crate) fn new(misdeed: Misdeed, seed: u64) -> Self {
        Self { misdeed, random: Random::new(seed), held: None }
    }

    /// Receives from the true wire as it sees fit.
    pub(crate) fn receive(
        &mut self,
        frame: &mut Vec<u8>,
        mut wire: impl FnMut(&mut Vec<u8>) -> Option<Meta>,
    ) -> Option<Meta> {
        if self.misdeed != Misdeed::Reorder
            && let Some((held, meta)) = self.held.take()
        {
            *frame = held;
            return Some(meta);
        }
        let Some(meta) = wire(frame) else {
            // Nobody is left to overtake it.
            let (held, meta) = self.held.take()?;
            *frame = held;
            return Some(meta);
        };
        if !self.random.once_in(RARITY) {
            return Some(meta);
        }
        match self.misdeed {
            Misdeed::Drop => return self.receive(frame, wire),
            Misdeed::Duplicate => self.held = Some((frame.clone(), meta)),
            Misdeed::Reorder if self.held.is_none() => {
                self.held = Some((std::mem::take(frame), meta));
                return self.receive(frame, wire);
            }
            Misdeed::Reorder => {}
            Misdeed::Corrupt => {
                let at = self.random.below(frame.len());
                if let Some(byte) = frame.get_mut(at) {
                    *byte ^= 1 << self.random.below(8);
                }
            }
        }
        Some(meta)
    }
}

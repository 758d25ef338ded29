//! What an application sends and receives Ethernet frames through.

use netfront::Meta;
use netif::mac::MacAddr;
use smoltcp::phy;

use crate::frames::Frames;
use crate::random::Random;

/// One end of a wire: smoltcp's device, that also sends frames which are not smoltcp's.
pub trait Wire: phy::Device {
    /// The address of this end.
    fn mac(&self) -> MacAddr;

    /// The largest frame that may be sent, in bytes.
    fn max_frame(&self) -> usize;

    /// Whether packets may be sent that are to be segmented further on.
    fn segments(&self) -> bool;

    /// Sends a frame of one flow; `false` if there is no room now, and then nothing of it was sent.
    fn send(&mut self, flow: u16, frame: &[u8], meta: Meta) -> bool;
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
/// Bytes of Ethernet, IP and TCP headers. A bit that flips there is a packet that gets lost, and TCP sends it again.
const HEADERS: usize = 66;

/// Does a misdeed to some of the frames that come over a wire.
#[derive(Clone, Debug)]
pub(crate) struct Saboteur {
    misdeed: Misdeed,
    random: Random,
    held: Option<Vec<u8>>,
}

impl Saboteur {
    pub(crate) fn new(misdeed: Misdeed, seed: u64) -> Self {
        Self { misdeed, random: Random::new(seed), held: None }
    }

    /// Hands on a frame that came, as it sees fit. Of what is not a numbered frame only bits are its own to flip: TCP puts
    /// everything else right.
    pub(crate) fn pass(&mut self, frame: &[u8], mut to: impl FnMut(&[u8])) {
        let numbered = Frames::is_frame(frame);
        if let Some(held) = self.held.take_if(|_| numbered) {
            to(frame);
            return to(&held);
        }
        if !self.random.once_in(RARITY) {
            return to(frame);
        }
        match self.misdeed {
            Misdeed::Corrupt => {
                let mut bad = frame.to_vec();
                let first = if numbered { HEADERS / 2 } else { HEADERS };
                let at = first + self.random.below(bad.len().saturating_sub(first));
                if let Some(byte) = bad.get_mut(at) {
                    *byte ^= 1 << self.random.below(8);
                }
                to(&bad);
            }
            _ if !numbered => to(frame),
            Misdeed::Drop => {}
            Misdeed::Duplicate => {
                to(frame);
                to(frame);
            }
            Misdeed::Reorder => self.held = Some(frame.to_vec()),
        }
    }
}

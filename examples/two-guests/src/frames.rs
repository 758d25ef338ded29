//! Numbered frames with a checksum, in flows: what a network did to them cannot hide, as it can behind TCP.
//!
//! Each flow has a window, so that no queue on the way has cause to drop anything. The other end says how far it has come in
//! frames that are numbered and checked themselves.

use std::collections::BTreeMap;
use std::num::NonZeroU16;

use hypercall::Instant;
use netback::offload::checksum;
use netfront::Meta;
use netif::mac::MacAddr;
use netif::offload::{Checksum, Gso, IpVersion};

use crate::check::{Sequence, Tally};
use crate::payload;
use crate::random::Random;
use crate::wire::Wire;

/// The first of the two types set aside for local experiments (IEEE 802).
pub const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const MAGIC: u32 = 0x7477_6f67;
/// Ethernet's header and ours.
const HEADER: usize = 62;
/// Nanoseconds without news after which a full window is held to be lost: longer than any queue holds a packet.
const STALL: u64 = 20_000_000_000;
/// Flows that others may have to one station.
const MAX_INCOMING: usize = 1024;

/// One end of flows, for the length of one life of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StationId(pub u32);

/// How long a flow's frames are, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// All the same.
    Fixed(usize),
    /// Anything from the smallest to this, small ones and the largest most often.
    Mixed(usize),
    /// Anything from the smallest to this, of all orders of magnitude, small ones more often.
    Spread(usize),
    /// The same, each within a TCP packet to be segmented, where the sender's wire does that. Who gets them must take them in
    /// one piece.
    Segmented(usize),
}

impl Sizes {
    fn draw(self, random: &mut Random, most: usize) -> usize {
        let len = match self {
            Self::Fixed(len) => len,
            Self::Mixed(max) => match random.below(4) {
                0 => HEADER + random.below(66),
                1 => max,
                _ => HEADER + random.below(max.saturating_sub(HEADER) + 1),
            },
            Self::Spread(max) | Self::Segmented(max) => {
                let scale = (max / HEADER).max(1).ilog2() as usize;
                let order = random.below(scale + 1).min(random.below(scale + 1));
                let least = HEADER << order;
                (least + random.below(least)).min(max)
            }
        };
        len.clamp(HEADER, most.max(HEADER))
    }
}

/// A flow to begin.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Told from the station's other flows by this.
    pub id: u16,
    /// Where to.
    pub to: StationId,
    /// And at which address that is.
    pub mac: MacAddr,
    /// How long the frames are.
    pub sizes: Sizes,
    /// Frames that may be on their way at once.
    pub window: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data,
    Ack,
}

/// The fields of a frame's header.
#[derive(Clone, Copy, Debug)]
struct Header {
    kind: Kind,
    /// Of the data: an acknowledgement has the numbers of the flow that it answers.
    flow: u16,
    from: StationId,
    to: StationId,
    number: u64,
    /// In an acknowledgement: one more than the greatest number that came.
    reached: u64,
}

/// What came of a flow of somebody else's.
#[derive(Debug, Default)]
struct Incoming {
    /// Whom to tell.
    mac: Option<MacAddr>,
    frames: Sequence,
    /// Acknowledgements sent,
    acks: u64,
    /// and what the last one said.
    reported: u64,
}

#[derive(Debug)]
struct Outgoing {
    flow: Flow,
    sent: u64,
    reached: u64,
    acks: Sequence,
    /// When it last came further.
    since: Instant,
    ended: bool,
}

/// What a station counts over all its flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameCounts {
    /// Data frames sent.
    pub sent: u64,
    /// Data frames that came, bad ones and repeated ones too.
    pub came: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Whose sum or fields were wrong.
    pub corrupt: u64,
    /// For an earlier life of this station.
    pub stale: u64,
    /// Times a window was given up.
    pub stalls: u64,
}

/// The flows of one station.
#[derive(Debug)]
pub struct Frames {
    station: StationId,
    random: Random,
    outgoing: Vec<Outgoing>,
    incoming: BTreeMap<(StationId, u16), Incoming>,
    counts: FrameCounts,
    stopped: bool,
    scratch: Vec<u8>,
}

fn put(frame: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = frame.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

fn get<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..)?.first_chunk().copied()
}

/// Where the sum over everything else is.
const SUM: usize = 54;

fn sum(frame: &[u8]) -> Option<u64> {
    let (before, rest) = frame.split_at_checked(SUM)?;
    Some(payload::sum(before).rotate_left(1) ^ payload::sum(rest.get(8..)?))
}

/// Bytes of Ethernet, IPv4 and TCP in front of a frame that is to be segmented.
const SHELL: usize = 54;
/// IPv4, and the port that tells these frames from other TCP: the same number as the type of the others.
const IPV4: [u8; 2] = [0x08, 0x00];
/// Bytes of payload in a segment.
const SEGMENT: NonZeroU16 = NonZeroU16::new(1448).unwrap();

/// Wraps the frame that `packet` has from [`SHELL`] on.
fn wrap(packet: &mut [u8], flow: u16) {
    let (ethernet, ip, tcp) = (0, 14, 34);
    let addresses: [u8; 12] = get(packet, SHELL).unwrap_or_default();
    let len = packet.len() as u16;
    put(packet, ethernet, &addresses);
    put(packet, ethernet + 12, &IPV4);
    put(packet, ip, &[0x45, 0]);
    put(packet, ip + 2, &(len - 14).to_be_bytes());
    put(packet, ip + 4, &[0, 0, 0x40, 0, 64, 6, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2]);
    put(packet, tcp, &flow.to_be_bytes());
    put(packet, tcp + 2, &ETHERTYPE);
    put(packet, tcp + 4, &[0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
    // What is left blank has the pseudo-header's sum.
    let _ = checksum::blank(packet);
}

/// The frame in a packet that [`wrap`] made, if it is one; `None` if its headers have changed.
fn unwrap(packet: &[u8]) -> Option<&[u8]> {
    if get(packet, 12) == Some(ETHERTYPE) {
        return Some(packet);
    }
    let frame = packet.get(SHELL..)?;
    let good = packet.get(..12) == frame.get(..12)
        && u16::from_be_bytes(get(packet, 16)?) as usize == packet.len() - 14;
    good.then_some(frame)
}

impl Header {
    fn write(self, frame: &mut [u8], to: MacAddr, from: MacAddr) {
        put(frame, 0, &to.0);
        put(frame, 6, &from.0);
        put(frame, 12, &ETHERTYPE);
        put(frame, 14, &MAGIC.to_be_bytes());
        put(frame, 18, &self.from.0.to_be_bytes());
        put(frame, 22, &self.to.0.to_be_bytes());
        put(frame, 26, &self.flow.to_be_bytes());
        put(frame, 28, &u16::from(self.kind == Kind::Ack).to_be_bytes());
        put(frame, 30, &(frame.len() as u64).to_be_bytes());
        put(frame, 38, &self.number.to_be_bytes());
        put(frame, 46, &self.reached.to_be_bytes());
        let sum = sum(frame).unwrap_or_default();
        put(frame, SUM, &sum.to_be_bytes());
    }

    /// The header of a frame that is as it was sent.
    fn read(frame: &[u8]) -> Option<Self> {
        let good = u32::from_be_bytes(get(frame, 14)?) == MAGIC
            && u64::from_be_bytes(get(frame, 30)?) == frame.len() as u64
            && u64::from_be_bytes(get(frame, SUM)?) == sum(frame)?;
        let kind = match u16::from_be_bytes(get(frame, 28)?) {
            0 => Kind::Data,
            1 => Kind::Ack,
            _ => return None,
        };
        good.then_some(Self {
            kind,
            flow: u16::from_be_bytes(get(frame, 26)?),
            from: StationId(u32::from_be_bytes(get(frame, 18)?)),
            to: StationId(u32::from_be_bytes(get(frame, 22)?)),
            number: u64::from_be_bytes(get(frame, 38)?),
            reached: u64::from_be_bytes(get(frame, 46)?),
        })
    }
}

impl Frames {
    /// A station without flows.
    #[must_use]
    pub fn new(station: StationId, seed: u64) -> Self {
        Self {
            station,
            random: Random::new(seed),
            outgoing: Vec::new(),
            incoming: BTreeMap::new(),
            counts: FrameCounts::default(),
            stopped: false,
            scratch: Vec::new(),
        }
    }

    /// Which station this is.
    #[must_use]
    pub fn station(&self) -> StationId {
        self.station
    }

    /// What it has counted.
    #[must_use]
    pub fn counts(&self) -> FrameCounts {
        self.counts
    }

    /// Begins a flow.
    pub fn begin(&mut self, flow: Flow, now: Instant) {
        let acks = Sequence::default();
        self.outgoing.push(Outgoing { flow, sent: 0, reached: 0, acks, since: now, ended: false });
    }

    /// Ends the flows to a station that is gone, and answers which they were.
    pub fn end(&mut self, to: StationId) -> Vec<Flow> {
        let open = self.outgoing.iter_mut().filter(|out| out.flow.to == to && !out.ended);
        open.map(|out| {
            out.ended = true;
            out.flow
        })
        .collect()
    }

    /// Sends nothing new any more, or does again.
    pub fn stop(&mut self, stopped: bool) {
        self.stopped = stopped;
    }

    /// Whether a frame, with its header, is one of these, well or not.
    #[must_use]
    pub fn is_frame(frame: &[u8]) -> bool {
        match get(frame, 12) {
            Some(ETHERTYPE) => true,
            Some(IPV4) => get(frame, 23) == Some([6]) && get(frame, 36) == Some(ETHERTYPE),
            _ => false,
        }
    }

    /// Takes a frame that came, if it is one of these; says whether it was.
    pub fn take(&mut self, frame: &[u8], own: MacAddr, now: Instant) -> bool {
        if !Self::is_frame(frame) {
            return false;
        }
        if get(frame, 0) != Some(own.0) {
            // The switch sends what it does not know yet to everybody.
            return true;
        }
        let from = get(frame, 6).map_or(MacAddr::BROADCAST, MacAddr);
        let len = frame.len() as u64;
        let taken = match unwrap(frame).and_then(Header::read) {
            Some(header) if header.to != self.station => {
                self.counts.stale += 1;
                return true;
            }
            Some(header) => match header.kind {
                Kind::Data => self.data(header, from, len),
                Kind::Ack => self.ack(header, now),
            },
            None => None,
        };
        if taken.is_none() {
            self.counts.corrupt += 1;
        }
        true
    }

    fn data(&mut self, header: Header, from: MacAddr, len: u64) -> Option<()> {
        self.counts.came += 1;
        self.counts.bytes += len;
        if self.incoming.len() >= MAX_INCOMING {
            return None;
        }
        let incoming = self.incoming.entry((header.from, header.flow)).or_default();
        incoming.mac = Some(from);
        incoming.frames.came(header.number).ok()
    }

    fn ack(&mut self, header: Header, now: Instant) -> Option<()> {
        let mut outgoing = self.outgoing.iter_mut();
        let Some(out) =
            outgoing.find(|out| (out.flow.to, out.flow.id) == (header.from, header.flow))
        else {
            // Of a flow that was ended.
            return Some(());
        };
        if header.reached > out.sent {
            return None;
        }
        out.acks.came(header.number).ok()?;
        if header.reached > out.reached {
            (out.reached, out.since) = (header.reached, now);
        }
        Some(())
    }

    /// Says how far others have come, and sends what the windows let through. Answers whether anything was sent.
    pub fn send(&mut self, wire: &mut impl Wire, now: Instant) -> bool {
        let Self { station, random, outgoing, incoming, counts, stopped, scratch } = self;
        let (mac, most) = (wire.mac(), wire.max_frame());
        let mut some = false;
        for ((from, flow), incoming) in incoming {
            let reached = incoming.frames.next();
            let Some(to) = incoming.mac.filter(|_| reached != incoming.reported) else { continue };
            scratch.clear();
            scratch.resize(HEADER, 0);
            let (kind, number) = (Kind::Ack, incoming.acks);
            let header = Header { kind, flow: *flow, from: *station, to: *from, number, reached };
            header.write(scratch, to, mac);
            if wire.send(*flow, scratch, Meta::default()) {
                incoming.acks += 1;
                incoming.reported = reached;
                some = true;
            }
        }
        if *stopped {
            return some;
        }
        for out in outgoing.iter_mut().filter(|out| !out.ended) {
            if out.sent - out.reached >= out.flow.window && now.since(out.since) > STALL {
                counts.stalls += 1;
                (out.reached, out.since) = (out.sent, now);
            }
            while out.sent - out.reached < out.flow.window {
                let segmented = matches!(out.flow.sizes, Sizes::Segmented(_)) && wire.segments();
                let shell = if segmented { SHELL } else { 0 };
                let len = out.flow.sizes.draw(random, most - shell);
                scratch.resize(shell + len, 0);
                let (kind, number, reached) = (Kind::Data, out.sent, 0);
                let (flow, to) = (out.flow.id, out.flow.to);
                let Some(frame) = scratch.get_mut(shell..) else { break };
                if let Some(payload) = frame.get_mut(HEADER..) {
                    payload::fill(
                        payload,
                        number ^ u64::from(station.0) << 40 ^ u64::from(flow) << 24,
                    );
                }
                let header = Header { kind, flow, from: *station, to, number, reached };
                header.write(frame, out.flow.mac, mac);
                let mut meta = Meta::default();
                if segmented {
                    wrap(scratch, flow);
                    let gso = Gso { size: SEGMENT, version: IpVersion::V4 };
                    // One segment is no segmentation.
                    let gso = (len >= SEGMENT.get().into()).then_some(gso);
                    meta = Meta { checksum: Checksum::Blank, gso };
                }
                if !wire.send(flow, scratch, meta) {
                    break;
                }
                if out.sent == out.reached {
                    out.since = now;
                }
                out.sent += 1;
                counts.sent += 1;
                some = true;
            }
        }
        some
    }

    /// What became of the flows to `other`, as both ends tell it, once nothing is on its way.
    #[must_use]
    pub fn settle_with(&self, other: &Self) -> Tally {
        let mut sum = Tally::default();
        for out in self.outgoing.iter().filter(|out| out.flow.to == other.station) {
            let came = other.incoming.get(&(self.station, out.flow.id));
            sum += came.map_or(Sequence::default().tally(out.sent), |incoming| {
                incoming.frames.tally(out.sent)
            });
            // The frames that went the other way to say so are frames, too.
            sum += out.acks.tally(came.map_or(0, |incoming| incoming.acks));
        }
        sum
    }
}

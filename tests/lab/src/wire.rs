//! A pcap file as a stranger on the wire would judge it: the length of every frame, and every checksum of IPv4, TCP, UDP and
//! ICMP.

use std::fmt;
use std::io::{ErrorKind, Read};

use anyhow::{Context as _, Result, bail, ensure};

/// In the byte order of the machine that wrote it, and with microseconds.
const MAGIC: u32 = 0xa1b2_c3d4;
const ETHERNET: u32 = 1;
/// A frame of Ethernet without its own checksum.
const LONGEST: usize = 14 + 1500;
/// Faults that are told in words.
const TOLD: usize = 4;

/// What went by.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Frames, and those of them that are
    pub frames: u64,
    /// IPv4,
    pub ipv4: u64,
    /// TCP by IPv4 or IPv6,
    pub tcp: u64,
    /// UDP,
    pub udp: u64,
    /// ICMP.
    pub icmp: u64,
    /// Frames that are not as they should be,
    pub faults: u64,
    /// and what is wrong with the first of them.
    pub told: Vec<String>,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { frames, ipv4, tcp, udp, icmp, .. } = self;
        write!(f, "{frames} frames, {ipv4} of IPv4, {tcp} of TCP, {udp} of UDP, {icmp} of ICMP")
    }
}

/// Reads a pcap file of this machine's byte order to its end.
pub fn judge(mut file: impl Read) -> Result<Seen> {
    let header: [u8; 24] = take(&mut file)?.context("no header")?;
    ensure!(word(&header, 0) == Some(MAGIC), "this is no pcap file");
    ensure!(word(&header, 20) == Some(ETHERNET), "not of Ethernet");
    let (mut seen, mut frame) = (Seen::default(), Vec::new());
    while let Some(record) = take::<16>(&mut file)? {
        let (kept, size) = (word(&record, 8), word(&record, 12));
        ensure!(kept == size, "a frame was cut to {kept:?} of {size:?} bytes");
        frame.resize(usize::try_from(kept.unwrap_or(0))?.min(1 << 18), 0);
        file.read_exact(&mut frame).context("the last frame is not whole")?;
        seen.frames += 1;
        if let Err(fault) = seen.frame(&frame) {
            seen.faults += 1;
            if seen.told.len() < TOLD {
                seen.told.push(format!("frame {}: {fault}", seen.frames));
            }
        }
    }
    Ok(seen)
}

/// So many bytes, or `None` at the end of the file.
fn take<const N: usize>(file: &mut impl Read) -> Result<Option<[u8; N]>> {
    let mut bytes = [0; N];
    match file.read_exact(&mut bytes) {
        Ok(()) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn half(bytes: &[u8], at: usize) -> Result<u16> {
    let pair = bytes.get(at..).and_then(|rest| rest.first_chunk()).context("it is too short")?;
    Ok(u16::from_be_bytes(*pair))
}

/// The sum of RFC 1071 over pieces that but for the last are of an even length; 0xffff over what carries its own checksum.
fn sum(pieces: &[&[u8]]) -> u16 {
    let mut total = 0;
    for piece in pieces {
        let (words, rest) = piece.as_chunks::<4>();
        total += words.iter().map(|w| u64::from(u32::from_be_bytes(*w))).sum::<u64>();
        let mut last = [0; 4];
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        total += u64::from(u32::from_be_bytes(last));
    }
    while total > 0xffff {
        total = (total >> 16) + (total & 0xffff);
    }
    total as u16
}

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;

impl Seen {
    fn frame(&mut self, frame: &[u8]) -> Result<()> {
        ensure!(frame.len() <= LONGEST, "{} bytes", frame.len());
        let packet = frame.get(14..).context("no Ethernet header")?;
        match half(frame, 12)? {
            0x0800 => self.ipv4(packet),
            0x86dd => self.ipv6(packet),
            _ => Ok(()),
        }
    }

    fn ipv4(&mut self, packet: &[u8]) -> Result<()> {
        self.ipv4 += 1;
        let size = usize::from(packet.first().context("no IPv4 header")? & 15) * 4;
        let header = packet.get(..size).filter(|h| h.len() >= 20).context("an odd IPv4 header")?;
        ensure!(sum(&[header]) == 0xffff, "IPv4 header checksum");
        let end = usize::from(half(header, 2)?);
        let payload = packet.get(size..end).context("an odd IPv4 length")?;
        // More to come, or not the first.
        ensure!(half(header, 6)? & 0x3fff == 0, "a fragment, which nobody here has a reason for");
        let protocol = *header.get(9).context("no protocol")?;
        self.transport(protocol, header.get(12..20).unwrap_or_default(), payload)
    }

    fn ipv6(&mut self, packet: &[u8]) -> Result<()> {
        let end = 40 + usize::from(half(packet, 4)?);
        let mut payload = packet.get(40..end).context("an odd IPv6 length")?;
        let mut protocol = *packet.get(6).context("no protocol")?;
        // Hop-by-hop options, as multicast listeners send.
        if protocol == 0 {
            let [next, size] = *payload.first_chunk().context("no options")?;
            protocol = next;
            payload = payload.get((usize::from(size) + 1) * 8..).context("odd options")?;
        }
        self.transport(protocol, packet.get(8..40).unwrap_or_default(), payload)
    }

    /// `addresses` are the two of the packet, of whichever family.
    fn transport(&mut self, protocol: u8, addresses: &[u8], payload: &[u8]) -> Result<()> {
        let (count, name) = match protocol {
            ICMP => {
                self.icmp += 1;
                ensure!(sum(&[payload]) == 0xffff, "ICMP checksum");
                return Ok(());
            }
            ICMP6 => (&mut self.icmp, "ICMPv6"),
            TCP => (&mut self.tcp, "TCP"),
            UDP => (&mut self.udp, "UDP"),
            other => bail!("IP protocol {other}, which nobody here has a reason for"),
        };
        *count += 1;
        // UDP of IPv4 may do without.
        if protocol == UDP && half(payload, 6)? == 0 && addresses.len() == 8 {
            return Ok(());
        }
        let length = u32::try_from(payload.len())?.to_be_bytes();
        let pseudo = [addresses, &length, &[0, 0, 0, protocol], payload];
        ensure!(sum(&pseudo) == 0xffff, "{name} checksum over {} bytes", payload.len());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packet of IPv4 with all its checksums, or of IPv6.
    fn packet(six: bool, protocol: u8, payload: &[u8], checksum: usize) -> Vec<u8> {
        let size = payload.len() as u16;
        let mut header = if six {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
            header[4..6].copy_from_slice(&size.to_be_bytes());
            header.extend(1..=32);
            header
        } else {
            let mut header =
                vec![0x45, 0, 0, 0, 0, 7, 0x40, 0, 64, protocol, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2];
            header[2..4].copy_from_slice(&(size + 20).to_be_bytes());
            let own = !sum(&[&header]);
            header[10..12].copy_from_slice(&own.to_be_bytes());
            header
        };
        let mut payload = payload.to_vec();
        payload[checksum..checksum + 2].fill(0);
        let addresses = if six { &header[8..40] } else { &header[12..20] };
        let length = u32::from(size).to_be_bytes();
        let own = match protocol {
            ICMP => !sum(&[&payload]),
            _ => !sum(&[addresses, &length, &[0, 0, 0, protocol], &payload]),
        };
        payload[checksum..checksum + 2].copy_from_slice(&own.to_be_bytes());
        header.extend(payload);
        header
    }

    fn frame(packet: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend(if packet[0] >> 4 == 6 { [0x86, 0xdd] } else { [8, 0] });
        frame.extend(packet);
        frame
    }

    fn pcap(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut file = Vec::new();
        for value in [MAGIC, 2 | 4 << 16, 0, 0, 65_536, ETHERNET] {
            file.extend(value.to_ne_bytes());
        }
        for frame in frames {
            let size = frame.len() as u32;
            for value in [0, 0, size, size] {
                file.extend(value.to_ne_bytes());
            }
            file.extend(frame);
        }
        file
    }

    /// One of each, with payloads of odd length.
    fn good() -> Vec<Vec<u8>> {
        let payload: Vec<u8> = (0..61).collect();
        let packets = [
            packet(false, TCP, &payload, 16),
            packet(false, UDP, &payload, 6),
            packet(false, ICMP, &payload, 2),
            packet(true, TCP, &payload, 16),
            packet(true, UDP, &payload, 6),
            packet(true, ICMP6, &payload, 2),
        ];
        packets.iter().map(|packet| frame(packet)).collect()
    }

    #[test]
    fn good_frames_are_counted_by_kind() {
        let mut frames = good();
        // Padding is nobody's, ARP has no checksum.
        frames[0].extend([9; 7]);
        frames.push([&[2; 12][..], &[8, 6], &[0; 28]].concat());
        let seen = judge(&*pcap(&frames)).unwrap();
        let expected = Seen { frames: 7, ipv4: 3, tcp: 2, udp: 2, icmp: 2, ..Seen::default() };
        assert_eq!(seen, expected);
    }

    #[test]
    fn any_bit_that_a_checksum_covers_is_missed() {
        for (number, frame) in good().into_iter().enumerate() {
            let from = if number < 3 { 14 } else { 14 + 8 };
            for at in from..frame.len() {
                let mut wrong = frame.clone();
                wrong[at] ^= 0x10;
                let seen = judge(&*pcap(&[frame.clone(), wrong])).unwrap();
                assert_eq!(seen.faults, 1, "byte {at} of frame {number}");
            }
        }
    }

    #[test]
    fn a_frame_longer_than_the_wire_takes_is_a_fault() {
        let frames = [
            frame(&packet(false, TCP, &[0; 1480], 16)),
            frame(&packet(false, TCP, &[0; 1481], 16)),
        ];
        let seen = judge(&*pcap(&frames)).unwrap();
        assert_eq!((seen.tcp, seen.faults), (1, 1));
    }

    #[test]
    fn what_is_no_pcap_or_is_cut_is_an_error() {
        let file = pcap(&good());
        assert!(judge(&file[..20]).is_err());
        assert!(judge(&file[1..]).is_err());
        assert!(judge(&file[..file.len() - 1]).is_err());
        assert_eq!(judge(&file[..24]).unwrap(), Seen::default());
    }

    #[test]
    fn udp_of_ipv4_may_come_without_a_checksum() {
        for (six, faults) in [(false, 0), (true, 1)] {
            let mut packet = packet(six, UDP, &[0; 30], 6);
            let at = packet.len() - 30 + 6;
            packet[at..at + 2].fill(0);
            assert_eq!(judge(&*pcap(&[frame(&packet)])).unwrap().faults, faults);
        }
    }
}

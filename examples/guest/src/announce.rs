//! What tells a network where an address is now, without being asked.

use alloc::vec;
use alloc::vec::Vec;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, Icmpv6Packet, Icmpv6Repr, IpAddress, IpProtocol, Ipv6Address, Ipv6Packet,
    Ipv6Repr, NdiscNeighborFlags, NdiscRepr,
};

/// Bytes of the shortest frame.
const SHORTEST: usize = 60;

/// The frame by which a station with this hardware address announces a protocol address, as Linux's netfront does when its
/// backend has connected: for IPv4 an ARP request for the own address, for IPv6 an advertisement to all that nobody asked
/// for.
#[must_use]
pub fn frame(mac: EthernetAddress, address: IpAddress) -> Vec<u8> {
    match address {
        IpAddress::Ipv4(address) => {
            let arp = ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Request,
                source_hardware_addr: mac,
                source_protocol_addr: address,
                target_hardware_addr: EthernetAddress([0; 6]),
                target_protocol_addr: address,
            };
            let to = (EthernetAddress::BROADCAST, EthernetProtocol::Arp);
            ethernet(mac, to, arp.buffer_len(), |payload| {
                arp.emit(&mut ArpPacket::new_unchecked(payload));
            })
        }
        IpAddress::Ipv6(address) => {
            let all = Ipv6Address::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            let advertisement = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
                flags: NdiscNeighborFlags::OVERRIDE,
                target_addr: address,
                lladdr: Some(mac.into()),
            });
            let ip = Ipv6Repr {
                src_addr: address,
                dst_addr: all,
                next_header: IpProtocol::Icmpv6,
                payload_len: advertisement.buffer_len(),
                hop_limit: 255,
            };
            let to = (EthernetAddress([0x33, 0x33, 0, 0, 0, 1]), EthernetProtocol::Ipv6);
            let len = ip.buffer_len() + ip.payload_len;
            ethernet(mac, to, len, |payload| {
                let mut packet = Ipv6Packet::new_unchecked(payload);
                ip.emit(&mut packet);
                let mut message = Icmpv6Packet::new_unchecked(packet.payload_mut());
                let sums = ChecksumCapabilities::default();
                advertisement.emit(&address, &all, &mut message, &sums);
            })
        }
    }
}

fn ethernet(
    src_addr: EthernetAddress,
    (dst_addr, ethertype): (EthernetAddress, EthernetProtocol),
    len: usize,
    write: impl FnOnce(&mut [u8]),
) -> Vec<u8> {
    let header = EthernetRepr { src_addr, dst_addr, ethertype };
    let mut bytes = vec![0; (header.buffer_len() + len).max(SHORTEST)];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes);
    header.emit(&mut frame);
    // The padding is no part of the message.
    let (payload, _) = frame.payload_mut().split_at_mut(len);
    write(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: EthernetAddress = EthernetAddress([0, 0x16, 0x3e, 1, 2, 3]);

    #[test]
    fn arp_asks_everybody_for_the_own_address() {
        let bytes = frame(MAC, IpAddress::v4(10, 9, 0, 2));
        // As tcpdump shows what Linux sends.
        let mut expected = vec![0; 60];
        let start = [
            255, 255, 255, 255, 255, 255, 0, 0x16, 0x3e, 1, 2, 3, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 0,
            0x16, 0x3e, 1, 2, 3, 10, 9, 0, 2, 0, 0, 0, 0, 0, 0, 10, 9, 0, 2,
        ];
        expected[..start.len()].copy_from_slice(&start);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn an_advertisement_overrides_what_neighbours_know() {
        let own = Ipv6Address::new(0xfd09, 0, 0, 0, 0, 0, 0, 2);
        let bytes = frame(MAC, IpAddress::Ipv6(own));
        let ethernet = EthernetFrame::new_checked(&bytes[..]).unwrap();
        assert_eq!(ethernet.dst_addr(), EthernetAddress([0x33, 0x33, 0, 0, 0, 1]));
        let ip = Ipv6Packet::new_checked(ethernet.payload()).unwrap();
        let repr = Ipv6Repr::parse(&ip).unwrap();
        assert_eq!((repr.src_addr, repr.hop_limit), (own, 255));
        let packet = Icmpv6Packet::new_checked(ip.payload()).unwrap();
        let sums = ChecksumCapabilities::default();
        let message = Icmpv6Repr::parse(&repr.src_addr, &repr.dst_addr, &packet, &sums).unwrap();
        assert_eq!(
            message,
            Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
                flags: NdiscNeighborFlags::OVERRIDE,
                target_addr: own,
                lladdr: Some(MAC.into()),
            })
        );
    }
}

//! What waits at one of the ports that are no vif's, for the backend domain's own stack or its card to take it.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use hypercall::Hypervisor;

use crate::packet::Packet;
use crate::switch::PortId;

/// Packets that may wait at a port.
pub(crate) const PACKETS: usize = 512;

/// A bounded queue, of which a sender gets as much as is free once it has it: one alone gets half, two get a third each, and
/// who comes last still finds room. No sender can so keep another from being heard, however fast it is.
pub(crate) struct Waiting<H: Hypervisor> {
    packets: VecDeque<(PortId, Packet<H>)>,
    /// How many there are of each port.
    shares: Vec<u16>,
    /// How many of them are in buffers of 64 KiB.
    large: usize,
}

impl<H: Hypervisor> Waiting<H> {
    pub(crate) fn new(max_vifs: u16) -> Self {
        let ports = usize::from(PortId::OWN) + usize::from(max_vifs);
        Self { packets: VecDeque::with_capacity(PACKETS), shares: vec![0; ports], large: 0 }
    }

    /// Takes a packet, while so many buffers of its size are free; `false`, and the packet is gone, if it finds no room.
    pub(crate) fn push(&mut self, from: PortId, packet: Packet<H>, free: usize) -> bool {
        let Some(share) = self.shares.get_mut(usize::from(from.0)) else { return false };
        let room = PACKETS.saturating_sub(self.packets.len());
        let large = packet.is_large();
        let alike = if large { self.large } else { self.packets.len() - self.large };
        if usize::from(*share) >= room || alike > free {
            return false;
        }
        *share += 1;
        self.large += usize::from(large);
        self.packets.push_back((from, packet));
        true
    }

    pub(crate) fn pop(&mut self) -> Option<Packet<H>> {
        let (from, packet) = self.packets.pop_front()?;
        Self::leaves(&mut self.shares, from);
        self.large -= usize::from(packet.is_large());
        Some(packet)
    }

    fn leaves(shares: &mut [u16], from: PortId) {
        if let Some(share) = shares.get_mut(usize::from(from.0)) {
            *share = share.saturating_sub(1);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Packet<H>> {
        self.packets.iter().map(|(_, packet)| packet)
    }

    /// Drops those that `keep` does not keep.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&mut Packet<H>) -> bool) {
        let Self { packets, shares, large } = self;
        packets.retain_mut(|(from, packet)| {
            let kept = keep(packet);
            if !kept {
                Self::leaves(shares, *from);
            }
            kept
        });
        *large = packets.iter().filter(|(_, packet)| packet.is_large()).count();
    }
}

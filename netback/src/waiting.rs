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
}

impl<H: Hypervisor> Waiting<H> {
    pub(crate) fn new(max_vifs: u16) -> Self {
        let ports = usize::from(PortId::OWN) + usize::from(max_vifs);
        Self { packets: VecDeque::with_capacity(PACKETS), shares: vec![0; ports] }
    }

    /// Takes a packet; `false`, and the packet is gone, if it finds no room.
    pub(crate) fn push(&mut self, from: PortId, packet: Packet<H>) -> bool {
        let Some(share) = self.shares.get_mut(usize::from(from.0)) else { return false };
        let room = PACKETS.saturating_sub(self.packets.len());
        if usize::from(*share) >= room {
            return false;
        }
        *share += 1;
        self.packets.push_back((from, packet));
        true
    }

    pub(crate) fn pop(&mut self) -> Option<Packet<H>> {
        let (from, packet) = self.packets.pop_front()?;
        Self::leaves(&mut self.shares, from);
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
        let Self { packets, shares } = self;
        packets.retain_mut(|(from, packet)| {
            let kept = keep(packet);
            if !kept {
                Self::leaves(shares, *from);
            }
            kept
        });
    }
}

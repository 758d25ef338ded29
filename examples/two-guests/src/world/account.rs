//! What is taken from the backend, what it did, and what became of all that was sent.

use netback::datapath::Withdrawal;

use super::{BackendDomain, SECOND, World};
use crate::check::Tally;
use crate::host::Host;
use crate::levers::{Lever, Meter};

impl World {
    /// What a guest's vif has carried in this connection and all before it.
    #[must_use]
    pub fn meter(&self, guest: usize) -> Option<Meter> {
        let front = self.guest(guest)?.nic.frontend().counters();
        let front = front.tx.notifications + front.rx.notifications;
        Some(Meter::new(&self.vif(guest)?.counters, front))
    }

    /// Who dropped what, for a run in which something was lost.
    #[must_use]
    pub fn drops(&self) -> String {
        let mut text = String::new();
        if let Some(domain) = &self.backend {
            for vif in domain.backend.vifs() {
                let (from, to) = (vif.counters.tx_drops, vif.counters.rx_drops);
                text += &format!("{}: from the guest {from:?}, to it {to:?}\n", vif.id);
            }
            text += &format!("switch: {:?}\n", domain.backend.switch_counters());
        }
        let hosts = self.guests().map(|guest| &guest.host).chain([&self.outside]);
        for tcp in hosts.filter_map(|host| host.tcp.as_ref()) {
            text += &format!("{tcp:?}\n");
        }
        for guest in self.guests() {
            text += &format!("guest {}: {:?}\n", guest.id(), guest.nic.frontend().counters());
        }
        text + &format!("network card: {:?}, {:?}", self.uplink.counters(), self.uplink.dma())
    }

    /// Takes something away from the backend, under traffic.
    pub fn withdraw(&mut self, lever: Lever) {
        self.set(lever, false);
    }

    /// Gives it back.
    pub fn restore(&mut self, lever: Lever) {
        self.set(lever, true);
    }

    fn set(&mut self, lever: Lever, there: bool) {
        let Some(BackendDomain { backend, hv, .. }) = &mut self.backend else { return };
        match lever {
            Lever::Path(path) => {
                self.withdrawn.set(path.only(), !there);
                let paths = self.withdrawn;
                backend.set_withdrawn(&Withdrawal { paths, ..Withdrawal::default() });
            }
            Lever::Bits(bits) => {
                let now = self.advertised;
                self.advertised = if there { now | bits.bits() } else { now & !bits.bits() };
                self.sim.set_features(hv.id(), self.advertised);
                // Xen does not say. This is the look that the backend takes after a resume.
                let _ = backend.refresh_features();
            }
        }
        self.idle.clear();
    }

    /// Stops what would go on for ever, and lets what is on its way arrive, for up to a minute. Then says what became of all
    /// that was ever sent.
    pub fn finish(&mut self) -> Tally {
        self.hosts_mut().for_each(Host::stop);
        self.idle.clear();
        let _ = self.run_until(60 * SECOND, |world| {
            world.is_idle() && world.is_done() && world.tally().lost == 0
        });
        self.tally()
    }

    fn is_done(&self) -> bool {
        self.guests().all(|guest| guest.host.is_done()) && self.outside.is_done()
    }

    /// What became of all that was sent; what is still on its way counts as lost.
    #[must_use]
    pub fn tally(&self) -> Tally {
        let mut sum = Tally::default();
        let living: Vec<_> =
            self.guests().map(|guest| &guest.host).chain([&self.outside]).collect();
        let frames = || living.iter().map(|host| (&host.frames, false));
        let frames = || frames().chain(self.graves.iter().map(|frames| (frames, true)));
        for (from, dead) in frames() {
            for (to, other_dead) in frames() {
                let mut tally = from.settle_with(to);
                if dead || other_dead {
                    tally.excused += std::mem::take(&mut tally.lost);
                }
                sum += tally;
            }
            sum.corrupt += from.counts().corrupt;
        }
        for from in &living {
            for to in &living {
                if let (Some(from), Some(to)) = (&from.tcp, &to.tcp) {
                    sum += from.settle_with(to);
                }
            }
        }
        sum
    }
}

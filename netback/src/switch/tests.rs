extern crate std;

use std::collections::BTreeMap;
use std::hash::Hasher;

use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;

fn mac(last: u8) -> MacAddr {
    MacAddr([0, 0x16, 0x3e, 0, 0, last])
}

fn at(seconds: u64) -> Instant {
    Instant(seconds * SECOND)
}

fn switch(total: u16, per_port: u16) -> Switch {
    Switch::new(SwitchLimits { total, per_port }, Seed(1, 2))
}

/// The standard library's hasher is SipHash-1-3 with a key of zeros.
#[test]
fn the_hash_is_siphash() {
    for word in [0, 1, 0x0016_3e00_0001, u64::MAX, 0x0123_4567_89ab_cdef] {
        #[allow(deprecated)]
        let mut oracle = std::collections::hash_map::DefaultHasher::new();
        oracle.write(&word.to_le_bytes());
        assert_eq!(Seed(0, 0).hash(word), oracle.finish());
        assert_ne!(Seed(0, 0).hash(word), Seed(0, 1).hash(word));
        assert_ne!(Seed(0, 0).hash(word), Seed(1, 0).hash(word));
    }
}

#[test]
fn a_station_is_found_where_it_was_last_heard() {
    let mut switch = switch(8, 4);
    assert_eq!(switch.lookup(mac(1), at(0)), Destination::Flood);
    assert_eq!(switch.learn(mac(1), PortId(1), at(0)), Learned::New);
    assert_eq!(switch.learn(mac(1), PortId(1), at(1)), Learned::Known);
    assert_eq!(switch.lookup(mac(1), at(1)), Destination::Port(PortId(1)));
    assert_eq!(switch.learn(mac(1), PortId(2), at(2)), Learned::Moved(PortId(1)));
    assert_eq!(switch.lookup(mac(1), at(2)), Destination::Port(PortId(2)));
    switch.forget_port(PortId(1));
    assert_eq!(switch.lookup(mac(1), at(2)), Destination::Port(PortId(2)));
    switch.forget_port(PortId(2));
    assert_eq!(switch.lookup(mac(1), at(2)), Destination::Flood);
    assert!(switch.is_empty());
}

#[test]
fn groups_are_flooded_and_never_learned() {
    let mut switch = switch(8, 4);
    for group in [MacAddr::BROADCAST, MacAddr([1, 0, 0x5e, 0, 0, 1])] {
        assert_eq!(switch.learn(group, PortId(1), at(0)), Learned::Refused);
        assert_eq!(switch.lookup(group, at(0)), Destination::Flood);
    }
    assert_eq!(switch.learn(MacAddr([0; 6]), PortId(1), at(0)), Learned::Refused);
    assert!(switch.is_empty());
}

#[test]
fn neither_a_vif_nor_the_uplink_can_be_the_backend_or_the_local_stack() {
    for other in [PortId::UPLINK, PortId(2)] {
        let mut switch = switch(8, 4);
        assert_eq!(switch.learn(MacAddr::BACKEND, other, at(0)), Learned::Refused);
        assert_eq!(switch.lookup(MacAddr::BACKEND, at(0)), Destination::Flood);
        assert_eq!(switch.learn(MacAddr::BACKEND, PortId::LOCAL, at(0)), Learned::New);
        assert_eq!(switch.learn(MacAddr::BACKEND, other, at(1000)), Learned::Refused);

        assert_eq!(switch.learn(mac(1), PortId::LOCAL, at(0)), Learned::New);
        // However long it is silent.
        for seconds in [0, 300, 100_000] {
            assert_eq!(switch.learn(mac(1), other, at(seconds)), Learned::Refused);
            let local = Destination::Port(PortId::LOCAL);
            assert_eq!(switch.lookup(mac(1), at(seconds)), local);
        }
        assert_eq!(switch.learn(mac(2), other, at(0)), Learned::New);
        assert_eq!(switch.learn(mac(2), PortId::LOCAL, at(0)), Learned::Moved(other));
        assert_eq!(switch.learn(mac(2), other, at(1)), Learned::Refused);
    }
}

#[test]
fn a_station_moves_between_the_uplink_and_a_vif_as_it_is_heard() {
    let mut switch = switch(8, 4);
    let (uplink, vif) = (PortId::UPLINK, PortId(2));
    assert_eq!(switch.learn(mac(1), uplink, at(0)), Learned::New);
    assert_eq!(switch.learn(mac(1), vif, at(1)), Learned::Moved(uplink));
    assert_eq!(switch.lookup(mac(1), at(1)), Destination::Port(vif));
    assert_eq!(switch.learn(mac(1), uplink, at(2)), Learned::Moved(vif));
    assert_eq!(switch.lookup(mac(1), at(2)), Destination::Port(uplink));
}

#[test]
fn what_the_local_port_keeps_does_not_keep_what_is_aged() {
    let mut switch = switch(4, 3);
    for last in 1..=2 {
        assert_eq!(switch.learn(mac(last), PortId::LOCAL, at(0)), Learned::New);
    }
    for last in 3..=4 {
        assert_eq!(switch.learn(mac(last), PortId(2), at(1)), Learned::New);
    }
    // The table is full, and what was heard longest ago is the local port's.
    assert_eq!(switch.learn(mac(5), PortId(3), at(300)), Learned::Full);
    assert_eq!(switch.learn(mac(5), PortId(3), at(400)), Learned::New);
    assert_eq!(switch.lookup(mac(1), at(400)), Destination::Port(PortId::LOCAL));
    switch.expire(at(1000));
    assert_eq!(switch.len(), 2);
}

#[test]
fn an_address_lasts_300_seconds() {
    let mut switch = switch(8, 4);
    assert_eq!(switch.learn(mac(1), PortId(1), at(10)), Learned::New);
    assert_eq!(switch.lookup(mac(1), at(310)), Destination::Port(PortId(1)));
    assert_eq!(switch.lookup(mac(1), Instant(310 * SECOND + 1)), Destination::Flood);
    assert_eq!(switch.lookup(mac(1), at(0)), Destination::Port(PortId(1)));
    switch.expire(at(310));
    assert_eq!(switch.len(), 1);
    switch.expire(at(311));
    assert_eq!(switch.len(), 0);
}

#[test]
fn a_port_that_invents_addresses_forgets_its_own_only() {
    let mut switch = switch(8, 4);
    assert_eq!(switch.learn(mac(1), PortId(1), at(0)), Learned::New);
    for last in 10..=255 {
        assert_eq!(switch.learn(mac(last), PortId(2), at(1)), Learned::New);
    }
    assert_eq!(switch.len(), 5);
    assert_eq!(switch.lookup(mac(1), at(1)), Destination::Port(PortId(1)));
    assert_eq!(switch.lookup(mac(251), at(1)), Destination::Flood);
    assert_eq!(switch.lookup(mac(252), at(1)), Destination::Port(PortId(2)));
}

#[test]
fn a_full_table_gives_up_only_what_is_aged_or_ones_own() {
    let mut switch = switch(4, 3);
    for last in 1..=3 {
        assert_eq!(switch.learn(mac(last), PortId(1), at(u64::from(last))), Learned::New);
    }
    assert_eq!(switch.learn(mac(4), PortId(2), at(4)), Learned::New);
    assert_eq!(switch.learn(mac(5), PortId(3), at(5)), Learned::Full);
    assert_eq!(switch.learn(mac(6), PortId(2), at(6)), Learned::New);
    assert_eq!(switch.lookup(mac(4), at(6)), Destination::Flood);
    assert_eq!(switch.learn(mac(5), PortId(3), at(302)), Learned::New);
    assert_eq!(switch.lookup(mac(1), at(302)), Destination::Flood);
    assert_eq!(switch.len(), 4);
}

#[test]
fn nothing_grows_however_many_addresses_come() {
    let mut switch = switch(64, 32);
    let (table, nodes, unused) =
        (switch.table.capacity(), switch.nodes.capacity(), switch.unused.capacity());
    for number in 0..200_000_u32 {
        let [a, b, c, d] = number.to_be_bytes();
        let port = PortId(u16::from(d) % 3);
        let _ = switch.learn(MacAddr([0, 1, a, b, c, d]), port, at(u64::from(number)));
        // A tombstone takes from the table's capacity until it is cleared.
        assert!(switch.table.capacity() <= table);
        assert_eq!((switch.nodes.capacity(), switch.unused.capacity()), (nodes, unused));
    }
}

/// The same in the plainest way: aged addresses go at once, everything else is a search.
struct Model {
    total: usize,
    per_port: usize,
    known: BTreeMap<MacAddr, (PortId, u64, u64)>,
    clock: u64,
}

impl Model {
    fn expire(&mut self, now: u64) {
        let stays = |port: PortId| port == PortId::LOCAL;
        self.known.retain(|_, (port, heard, _)| stays(*port) || now - *heard <= MAX_AGE);
    }

    fn learn(&mut self, src: MacAddr, port: PortId, now: u64) -> Learned {
        if !src.is_station() || (src == MacAddr::BACKEND && port != PortId::LOCAL) {
            return Learned::Refused;
        }
        self.expire(now);
        let before = self.known.get(&src).map(|known| known.0);
        if before == Some(PortId::LOCAL) && port != PortId::LOCAL {
            return Learned::Refused;
        }
        self.known.remove(&src);
        let own = self.known.values().filter(|known| known.0 == port).count();
        if own >= self.per_port || self.known.len() >= self.total {
            let oldest = self
                .known
                .iter()
                .filter(|(_, known)| known.0 == port)
                .min_by_key(|(_, known)| known.2);
            let Some((oldest, _)) = oldest else { return Learned::Full };
            let oldest = *oldest;
            self.known.remove(&oldest);
        }
        self.clock += 1;
        self.known.insert(src, (port, now, self.clock));
        match before {
            None => Learned::New,
            Some(before) if before == port => Learned::Known,
            Some(before) => Learned::Moved(before),
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Learn(MacAddr, PortId),
    Forget(PortId),
    Wait(u64),
    Expire,
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop_oneof![
        20 => (0_u8..24).prop_map(mac),
        1 => Just(MacAddr::BACKEND),
        1 => Just(MacAddr::BROADCAST),
        1 => Just(MacAddr([0; 6])),
    ];
    prop_oneof![
        20 => (address, (0_u16..5).prop_map(PortId)).prop_map(|(mac, port)| Step::Learn(mac, port)),
        1 => (0_u16..5).prop_map(|port| Step::Forget(PortId(port))),
        5 => (0_u64..120).prop_map(Step::Wait),
        1 => Just(Step::Expire),
    ]
}

proptest! {
    #[test]
    fn behaves_as_the_model(
        total in 1_u16..16,
        per_port in 1_u16..6,
        seed: (u64, u64),
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let mut switch = Switch::new(SwitchLimits { total, per_port }, Seed(seed.0, seed.1));
        let mut model = Model {
            total: usize::from(total), per_port: usize::from(per_port), known: BTreeMap::new(), clock: 0,
        };
        let mut now = 0;
        for step in steps {
            match step {
                Step::Learn(mac, port) => {
                    prop_assert_eq!(switch.learn(mac, port, Instant(now)), model.learn(mac, port, now));
                }
                Step::Forget(port) => {
                    switch.forget_port(port);
                    model.known.retain(|_, known| known.0 != port);
                }
                Step::Wait(seconds) => now += seconds * SECOND,
                Step::Expire => {
                    switch.expire(Instant(now));
                    model.expire(now);
                    prop_assert_eq!(switch.len(), model.known.len());
                }
            }
            model.expire(now);
            prop_assert!(switch.len() <= usize::from(total));
            prop_assert_eq!(switch.table.len(), switch.len());
            for last in 0..24 {
                let expected = model.known.get(&mac(last)).map_or(Destination::Flood, |known| Destination::Port(known.0));
                prop_assert_eq!(switch.lookup(mac(last), Instant(now)), expected);
            }
        }
    }
}

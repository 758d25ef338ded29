use super::*;

/// All bits that a choice can hang on.
const BITS: [XenFeatures; 5] = [
    XenFeatures::AUTO_TRANSLATED_PHYSMAP,
    XenFeatures::DOM0,
    XenFeatures::GRANT_MAP_IDENTITY,
    XenFeatures::NOT_DIRECT_MAPPED,
    XenFeatures::DIRECT_MAPPED,
];

const UPLINKS: [Option<Nic>; 3] =
    [None, Some(Nic { coherent: true }), Some(Nic { coherent: false })];

/// Every combination of bits and facts: 2^5 x 2 x 2 x 2 x 2 x 3.
fn table() -> impl Iterator<Item = (XenFeatures, Facts)> {
    (0_u32..1 << BITS.len()).flat_map(|set| {
        let of_set = BITS.iter().enumerate().filter(move |(at, _)| set >> at & 1 != 0);
        let bits = of_set.fold(XenFeatures::empty(), |bits, (_, bit)| bits | *bit);
        (0_u32..16).flat_map(move |flags| {
            UPLINKS.map(|uplink| {
                let flag = |at: u32| flags >> at & 1 != 0;
                let facts = Facts {
                    arch: if flag(0) { Arch::Arm } else { Arch::X86 },
                    grant_copy: flag(1),
                    cache_flush: flag(2),
                    iommu_maps: flag(3),
                    uplink,
                };
                (bits, facts)
            })
        })
    })
}

#[test]
fn what_is_possible_over_the_whole_table() {
    let mut seen = 0;
    for (bits, facts) in table() {
        seen += 1;
        let Ways { local, uplink } = possible(bits, &facts);
        let has = |bit| bits.contains(bit);
        let translated = has(XenFeatures::AUTO_TRANSLATED_PHYSMAP);
        let arm = facts.arch == Arch::Arm;
        // The sentences of the design, one by one.
        assert!(local.contains(Datapaths::COPY));
        assert_eq!(local.contains(Datapaths::DIRECT), facts.grant_copy);
        assert_eq!(local.contains(Datapaths::STATIC), translated);
        assert_eq!(local.contains(Datapaths::MAP), translated);
        assert!(!local.contains(Datapaths::MAP_IDENTITY), "a processor needs no alias");
        let Some(Nic { coherent }) = facts.uplink else {
            assert!(uplink.is_empty());
            continue;
        };
        assert!(uplink.contains(Datapaths::COPY) && !uplink.contains(Datapaths::DIRECT));
        assert_eq!(uplink.contains(Datapaths::STATIC), translated);
        assert!(
            !uplink.contains(Datapaths::MAP | Datapaths::MAP_IDENTITY),
            "one way to map is enough"
        );
        let maps = uplink.mapping().is_some();
        let neither = !bits.intersects(XenFeatures::DIRECT_MAPPED | XenFeatures::NOT_DIRECT_MAPPED);
        let direct = has(XenFeatures::DIRECT_MAPPED) || (neither && arm && has(XenFeatures::DOM0));
        let addressable = direct || (!arm && facts.iommu_maps);
        let identity = direct && has(XenFeatures::GRANT_MAP_IDENTITY);
        let cached = coherent || !arm;
        assert_eq!(
            maps,
            translated && addressable && (cached || facts.cache_flush || identity),
            "{bits:?} {facts:?}"
        );
        assert_eq!(
            uplink.contains(Datapaths::MAP_IDENTITY),
            maps && !cached && !facts.cache_flush,
            "{bits:?} {facts:?}"
        );
    }
    assert_eq!(seen, 32 * 16 * 3);
}

#[test]
fn the_choice_over_the_whole_table() {
    let policy = Policy { direct_from: 1000, map_from: 2000, ..Policy::default() };
    let bools = [false, true];
    let guests = bools
        .iter()
        .flat_map(|&ready| bools.iter().map(move |&as_is| Target::Guest { ready, as_is }));
    let local = bools.map(|room| Target::Local { room });
    let uplink = bools.map(|room| Target::Uplink { room });
    let targets: Vec<_> = guests.chain(local).chain(uplink).chain([Target::Many]).collect();
    for set in 0..1_u16 << (2 * Datapath::ALL.len()) {
        let [local, uplink] = [set, set >> Datapath::ALL.len()]
            .map(|set| Datapaths::from_bits_truncate(set as u8) | Datapaths::COPY);
        let up = Ways { local, uplink };
        for size in [14, 999, 1000, 1999, 2000, u16::MAX] {
            for &target in &targets {
                let expected = match target {
                    Target::Many if size < 1000 => Ok(Datapath::Copy),
                    Target::Many => Err(Fallback::Many),
                    Target::Guest { .. } if size < 1000 => Ok(Datapath::Copy),
                    Target::Guest { ready, as_is } => {
                        match (local.contains(Datapaths::DIRECT), as_is, ready) {
                            (true, true, true) => Ok(Datapath::Direct),
                            (true, true, false) => Err(Fallback::NotReady),
                            (true, false, _) => Err(Fallback::Changed),
                            (false, ..) => Err(Fallback::Withdrawn),
                        }
                    }
                    Target::Local { .. } | Target::Uplink { .. } if size < 2000 => {
                        Ok(Datapath::Copy)
                    }
                    Target::Local { room } | Target::Uplink { room } => {
                        let up = match target {
                            Target::Local { .. } => local,
                            _ => uplink,
                        };
                        let path = if up.contains(Datapaths::MAP) {
                            Some(Datapath::Map)
                        } else {
                            up.contains(Datapaths::MAP_IDENTITY).then_some(Datapath::MapIdentity)
                        };
                        match (path, room) {
                            (None, _) => Err(Fallback::Withdrawn),
                            (Some(_), false) => Err(Fallback::NoRoom),
                            (Some(path), true) => Ok(path),
                        }
                    }
                };
                assert_eq!(choose(up, &policy, size, target), expected, "{up:?} {size} {target:?}");
                // Whatever is chosen is allowed there.
                if let Ok(path) = choose(up, &policy, size, target) {
                    let of_target = match target {
                        Target::Uplink { .. } => uplink,
                        _ => local,
                    };
                    assert!(of_target.contains(path.only()));
                }
            }
            let up = up.any();
            for all_static in bools {
                let look = first_look(up, &policy, size, all_static);
                let headers_first = up.contains(Datapaths::DIRECT) && size >= 1000
                    || up.mapping().is_some() && size >= 2000;
                let expected = match (all_static && up.contains(Datapaths::STATIC), headers_first) {
                    (true, _) => Datapath::Static,
                    (false, true) => Datapath::Direct,
                    (false, false) => Datapath::Copy,
                };
                assert_eq!(look, expected, "{up} {size} {all_static}");
            }
        }
    }
}

#[test]
fn a_way_goes_at_once_and_comes_back_when_it_has_stayed_for_a_while() {
    let policy = Policy { settle: 100, ..Policy::default() };
    let all = Ways { local: Datapaths::all(), uplink: Datapaths::all() };
    // What goes is one target's way.
    let some = Ways { uplink: Datapaths::all() - Datapaths::MAP, ..all };
    let mut modes = Modes::new(all);
    let at = Instant;
    modes.update(some, &policy, at(10));
    assert_eq!((modes.up(), modes.switches()), (some, 1));
    modes.update(all, &policy, at(20));
    assert_eq!(modes.deadline(&policy), Some(at(120)));
    modes.update(all, &policy, at(119));
    assert_eq!((modes.up(), modes.switches()), (some, 1));
    // It goes again: the wait begins anew.
    modes.update(some, &policy, at(119));
    modes.update(all, &policy, at(130));
    modes.update(all, &policy, at(229));
    assert_eq!(modes.switches(), 1);
    modes.update(all, &policy, at(230));
    assert_eq!((modes.up(), modes.switches(), modes.deadline(&policy)), (all, 2, None));
}

#[test]
fn the_operators_words_are_names_or_numbers_and_what_is_neither_is_said() {
    let (withdrawal, unknown) = Withdrawal::parse(" direct map-identity,12  grant_map_identity 2 ");
    assert_eq!(unknown, [""; 0]);
    assert_eq!(withdrawal.paths, Datapaths::DIRECT | Datapaths::MAP_IDENTITY);
    let bits = XenFeatures::GRANT_MAP_IDENTITY | XenFeatures::AUTO_TRANSLATED_PHYSMAP;
    assert_eq!(withdrawal.bits, bits);
    let (withdrawal, unknown) = Withdrawal::parse("map nonsense 32 DIRECT_MAPPED -1");
    assert_eq!(unknown, ["nonsense", "32", "-1"]);
    assert_eq!(withdrawal.paths, Datapaths::MAP);
    assert_eq!(withdrawal.bits, XenFeatures::DIRECT_MAPPED);
    assert_eq!(Withdrawal::parse(""), (Withdrawal::default(), Vec::new()));
}

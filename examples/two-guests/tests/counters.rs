//! What packets cost in things that can be counted, and that come out the same on every machine.
//!
//! `SNAPSHOTS=write cargo test -p two-guests --test counters` writes the table anew.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod bench;
#[path = "bench/board.rs"]
mod board;

use std::fmt::Write as _;
use std::path::Path;

use bench::{Bench, Load};
use netback::counters::{Counters, Paths};
use netback::datapath::Datapath;
use sim::{Hypercalls, Kind, SimHv};

const SIZES: [usize; 4] = [64, 1500, 9000, 65_535];
/// Packets that are looked at, at least.
const PACKETS: u64 = 5000;
/// Slots that a packet takes of a ring of 256.
const fn slots(size: usize) -> u64 {
    size.div_ceil(4096) as u64
}

/// All that is counted up to one moment.
#[derive(Clone, Copy)]
struct Reading {
    dom0: Hypercalls,
    guests: [Hypercalls; 2],
    vifs: [Counters; 2],
    fronts: [netfront::Counters; 2],
    arrived: (u64, u64),
    polls: u64,
}

impl Reading {
    fn take(bench: &Bench<SimHv>) -> Self {
        let vif = |index: usize| {
            let id = bench.guests[index].hv.id();
            bench.backend.vifs().find(|vif| vif.id.domain == id).unwrap().counters
        };
        Self {
            dom0: bench.dom0.hypercalls(),
            guests: [0, 1].map(|index| bench.guests[index].hv.hypercalls()),
            vifs: [0, 1].map(vif),
            fronts: [0, 1].map(|index| bench.guests[index].nic.counters()),
            arrived: bench.arrived,
            polls: bench.polls,
        }
    }
}

/// What a load came to.
struct Cost {
    load: Load,
    packets: u64,
    bytes: u64,
    polls: u64,
    dom0: Hypercalls,
    carried: Vec<(Datapath, u64)>,
    /// From guest 0, to it, to guest 1, from it.
    notifications: [u64; 4],
    publishes: [u64; 4],
}

fn measure(load: Load) -> Cost {
    let mut bench = Bench::new(load, board::domain(load.path), |hv| hv, |_| {});
    let before = Reading::take(&bench);
    while bench.arrived.0 - before.arrived.0 < PACKETS {
        bench.turn();
    }
    let after = Reading::take(&bench);
    assert_eq!(bench.sim.violations(), Vec::<String>::new());
    let since = |get: &dyn Fn(&Reading) -> u64| get(&after) - get(&before);
    let of = |paths: Paths, path| paths.of(path).packets;
    let to_guest = after.vifs[1].rx.packets > before.vifs[1].rx.packets;
    let carried = Datapath::ALL.into_iter().map(|path| {
        let count = since(&|reading| match to_guest {
            true => of(reading.vifs[1].rx_paths, path),
            false => of(reading.vifs[0].tx_paths, path),
        });
        (path, count)
    });
    let notify = |reading: &Reading, guest: usize| {
        let of = [reading.fronts[guest].tx.notifications, reading.fronts[guest].rx.notifications];
        of.into_iter().sum()
    };
    let drops = after.vifs.map(|vif| (vif.tx_drops, vif.rx_drops));
    assert_eq!(drops, before.vifs.map(|vif| (vif.tx_drops, vif.rx_drops)), "{load:?}");
    // What each says of itself is what Xen saw.
    let notifications = [
        since(&|reading| notify(reading, 0)),
        since(&|reading| reading.vifs[0].tx.notifications + reading.vifs[0].rx.notifications),
        since(&|reading| reading.vifs[1].tx.notifications + reading.vifs[1].rx.notifications),
        since(&|reading| notify(reading, 1)),
    ];
    let seen = |hypercalls: Hypercalls| hypercalls.calls(Kind::Notify);
    let guests = [0, 1].map(|guest| seen(after.guests[guest] - before.guests[guest]));
    let dom0 = after.dom0 - before.dom0;
    assert_eq!([notifications[0], notifications[3]], guests);
    assert_eq!(notifications[1] + notifications[2], seen(dom0));
    for path in [Kind::Copy, Kind::Map, Kind::Unmap] {
        assert_eq!(guests.len(), 2);
        let by_guests =
            [0, 1].map(|guest| (after.guests[guest] - before.guests[guest]).calls(path));
        assert_eq!(by_guests, [0, 0], "frontends make no grant hypercalls");
    }
    Cost {
        load,
        packets: after.arrived.0 - before.arrived.0,
        bytes: after.arrived.1 - before.arrived.1,
        polls: after.polls - before.polls,
        dom0,
        carried: carried.filter(|(_, count)| *count > 0).collect(),
        notifications,
        publishes: [
            since(&|reading| reading.fronts[0].tx.publishes),
            since(&|reading| reading.vifs[0].tx.publishes),
            since(&|reading| reading.vifs[1].rx.publishes),
            since(&|reading| reading.fronts[1].rx.publishes),
        ],
    }
}

impl Cost {
    fn grant_calls(&self) -> u64 {
        [Kind::Copy, Kind::Map, Kind::Unmap].map(|kind| self.dom0.calls(kind)).into_iter().sum()
    }

    /// A count per 1,000 packets, with one decimal.
    fn per_thousand(&self, count: u64) -> String {
        let tenths = (count * 10_000 + self.packets / 2) / self.packets;
        format!("{}.{}", tenths / 10, tenths % 10)
    }

    fn row(&self) -> String {
        let Self { load, dom0, .. } = self;
        let mut row = format!("{:12} {:>6}", load.path.to_string(), load.size);
        let grant = [Kind::Copy, Kind::Map, Kind::Unmap];
        let calls = grant.map(|kind| dom0.calls(kind));
        let ops = grant.map(|kind| dom0.ops(kind));
        for (counts, width) in [(calls, 7), (ops, 8)] {
            row += " |";
            for count in counts {
                write!(row, "{:>width$}", self.per_thousand(count)).unwrap();
            }
        }
        for counts in [self.notifications, self.publishes] {
            row += " |";
            for count in counts {
                write!(row, "{:>6}", self.per_thousand(count)).unwrap();
            }
        }
        let hundredths = (dom0.bytes_copied() * 100 + self.bytes / 2) / self.bytes;
        write!(row, " | {}.{:02} |", hundredths / 100, hundredths % 100).unwrap();
        for (path, count) in &self.carried {
            write!(row, " {path} {}", self.per_thousand(*count)).unwrap();
        }
        row
    }
}

const HEAD: &str = "\
Per 1,000 packets that arrived, under load: the sender keeps its ring full, the receiver its pages posted, 256 slots each, one
queue, split event channels. Copy, direct and static from guest to guest; map and map-identity to the local port. A packet that
is no longer than the headers is copied whole, whatever the way. `>` is towards the backend, `<` from it; TX is the sender's ring,
RX the receiver's. Copied: by Xen, bytes per byte delivered.

                    |   hypercalls          |   grant operations      |     notifications       |       publishes         |
way           bytes |   copy    map  unmap  |    copy     map   unmap |   TX>   TX<   RX<   RX> |   TX>   TX<   RX<   RX> | copied | carried by
";

#[test]
fn the_costs_of_a_packet_are_as_they_were() {
    let mut table = String::from(HEAD);
    for path in Datapath::ALL {
        for size in SIZES {
            let cost = measure(Load { path, size, first_index: 0 });
            check(&cost);
            table += &cost.row();
            table.push('\n');
            let wrapping = Load { path, size, first_index: 0_u32.wrapping_sub(1000) };
            assert_eq!(measure(wrapping).row(), cost.row(), "1,000 short of 2^32");
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/counters.txt");
    if std::env::var("SNAPSHOTS").is_ok_and(|what| what == "write") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &table).unwrap();
    }
    let known = std::fs::read_to_string(&path).unwrap_or_default();
    for (line, (now, before)) in table.lines().zip(known.lines()).enumerate() {
        assert_eq!(now, before, "line {} of {}", line + 1, path.display());
    }
    assert_eq!(table, known, "{}", path.display());
}

/// The bounds that hold whatever the table says.
fn check(cost: &Cost) {
    let Load { path, size, .. } = cost.load;
    let (packets, calls, copies) = (cost.packets, cost.grant_calls(), cost.dom0.calls(Kind::Copy));
    let what = format!("{}\n{}", cost.row(), cost.dom0);
    let most = cost.carried.iter().max_by_key(|(_, count)| *count).unwrap();
    let expected = if size <= 128 && path != Datapath::Static { Datapath::Copy } else { path };
    assert_eq!(*most, (expected, most.1), "{what}");
    match path {
        Datapath::Copy => {
            // A packet of several slots counts as so many: a full ring has no more than 256.
            assert!(calls * 64 <= packets * slots(size), "more than 1 per 64 packets: {what}");
            assert_eq!(calls, copies);
        }
        Datapath::Static => assert_eq!(calls, 0, "{what}"),
        Datapath::Direct => {
            assert_eq!(calls, copies, "{what}");
            // What one batch leaves to be delivered goes with what the next takes. Where a batch is all that a ring holds there
            // is no next one: who sends has no room until these are delivered, and that is a hypercall of its own.
            let most = if slots(size) * 128 <= 128 { 1 } else { 2 };
            assert!(copies <= most * cost.polls, "{} polls: {what}", cost.polls);
        }
        Datapath::Map | Datapath::MapIdentity => {}
    }
}

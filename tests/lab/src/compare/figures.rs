//! What is measured of each side, and by how much this project's is to be better.

use std::collections::BTreeMap;

use super::stats::Spread;

/// Who serves the guests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// This project.
    Ours,
    /// Linux.
    Linux,
}

impl Side {
    /// In the order in which they take turns.
    pub const BOTH: [Self; 2] = [Self::Ours, Self::Linux];

    /// As files and columns are called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Linux => "linux",
        }
    }
}

/// What one turn of a side measured, by the names of figures.
pub type Sample = BTreeMap<String, f64>;

/// What is better.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Better {
    /// More of it.
    More,
    /// Less of it.
    Less,
    /// Neither: it explains the others.
    Neither,
}

/// Something measured.
pub struct Figure {
    /// In samples and in compare.json.
    pub key: &'static str,
    /// For people.
    pub name: &'static str,
    /// Of its values.
    pub unit: &'static str,
    /// What is better.
    pub better: Better,
    /// So many times better is wanted.
    pub target: Option<f64>,
}

const fn more(key: &'static str, name: &'static str, unit: &'static str) -> Figure {
    Figure { key, name, unit, better: Better::More, target: None }
}

const fn less(key: &'static str, name: &'static str, unit: &'static str) -> Figure {
    Figure { key, name, unit, better: Better::Less, target: None }
}

const fn note(key: &'static str, name: &'static str, unit: &'static str) -> Figure {
    Figure { key, name, unit, better: Better::Neither, target: None }
}

impl Figure {
    const fn wanted(mut self, target: f64) -> Self {
        self.target = Some(target);
        self
    }
}

/// All, in the order in which they are shown.
pub const ALL: &[Figure] = &[
    more("tcp_1_to_2_mbit", "TCP, guest 1 to guest 2", "Mbit/s").wanted(1.6),
    more("tcp_2_to_1_mbit", "TCP, guest 2 to guest 1", "Mbit/s").wanted(1.6),
    more("ours_tcp_mbit", "TCP, our guest to our guest", "Mbit/s"),
    more("alike_tcp_mbit", "TCP, ours in all three places or Linux", "Mbit/s").wanted(2.0),
    more("udp_64_pps", "UDP of 64 bytes, delivered", "packets/s").wanted(2.0),
    more("udp_512_pps", "UDP of 512 bytes, delivered", "packets/s"),
    more("udp_1472_pps", "UDP of 1,472 bytes, delivered", "packets/s"),
    more("udp_64_brought_pps", "UDP of 64 bytes, brought to the NIC", "packets/s"),
    more("udp_512_brought_pps", "UDP of 512 bytes, brought to the NIC", "packets/s"),
    more("udp_1472_brought_pps", "UDP of 1,472 bytes, brought to the NIC", "packets/s"),
    less("ping_p50_ms", "ping, half of them within", "ms"),
    less("ping_p90_ms", "ping, 90 % within", "ms"),
    less("ping_p99_ms", "ping, 99 % within", "ms"),
    less("cpu_tcp_s_per_gb", "the backend's CPU per GB of TCP", "s").wanted(6.0),
    less("cpu_ours_tcp_s_per_gb", "the backend's CPU per GB between our guests", "s"),
    less("cpu_udp_64_s_per_million", "the backend's CPU per million of 64 bytes", "s").wanted(8.0),
    less("cpu_udp_512_s_per_million", "the backend's CPU per million of 512 bytes", "s"),
    less("cpu_udp_1472_s_per_million", "the backend's CPU per million of 1,472 bytes", "s"),
    more("front_to_mbit", "64 MiB to the guest, with their SHA-256", "Mbit/s"),
    more("front_from_mbit", "64 MiB from the guest, with their SHA-256", "Mbit/s"),
    less("cpu_front_to_s_per_gb", "the guest's CPU per GB to it", "s"),
    less("cpu_front_from_s_per_gb", "the guest's CPU per GB from it", "s"),
    less("idle_percent", "the backend's CPU while nothing moves", "%"),
    less("start_s", "dom0's start to the first packet forwarded", "s").wanted(20.0),
    less("memory_mib", "dom0's memory", "MiB").wanted(16.0),
    less("memory_used_mib", "of that, in use", "MiB"),
    less("image_mib", "dom0's image", "MiB"),
    more("uplink_to_mbit", "TCP, guest 1 to the world", "Mbit/s"),
    more("uplink_from_mbit", "TCP, the world to guest 1", "Mbit/s"),
    less("cpu_uplink_to_s_per_gb", "the backend's CPU per GB to the world", "s"),
    less("cpu_uplink_from_s_per_gb", "the backend's CPU per GB from the world", "s"),
    note("busy_tcp_backend", "the backend under TCP", "% of a CPU"),
    note("busy_tcp_guest1", "guest 1 under TCP", "% of a CPU"),
    note("busy_tcp_guest2", "guest 2 under TCP", "% of a CPU"),
    note("busy_ours_tcp_backend", "the backend under TCP between our guests", "% of a CPU"),
    note("busy_ours_tcp_guest1", "our guest 1, sending it", "% of a CPU"),
    note("busy_ours_tcp_guest2", "our guest 2, receiving it", "% of a CPU"),
    note("busy_udp_64_backend", "the backend under UDP of 64 bytes", "% of a CPU"),
    note("busy_udp_64_guest1", "guest 1, sending it", "% of a CPU"),
    note("busy_udp_64_guest2", "guest 2, receiving it", "% of a CPU"),
    note("udp_64_sent_pps", "UDP of 64 bytes, sent", "packets/s"),
    note("udp_512_sent_pps", "UDP of 512 bytes, sent", "packets/s"),
    note("udp_1472_sent_pps", "UDP of 1,472 bytes, sent", "packets/s"),
    note("calls_udp_64", "hypercalls of the backend for each of 64 bytes", "at most"),
    note("calls_udp_1472", "hypercalls of the backend for each of 1,472 bytes", "at most"),
    note("cpu_reading_s", "the backend's CPU for being asked for it", "s"),
];

/// A figure of both sides.
pub struct Row {
    /// Which.
    pub figure: &'static Figure,
    /// Of each of our turns, as far as it came about.
    pub ours: Vec<f64>,
    /// Of each turn of Linux.
    pub linux: Vec<f64>,
    /// How many times better ours is: of the medians, and the extremes of the turns' own.
    pub ratio: Option<Spread>,
    /// How many times better it is to be.
    pub wanted: Option<f64>,
}

impl Row {
    fn of(figure: &'static Figure, turns: &[(Side, Sample)], wanted: bool) -> Self {
        let values = |side: Side| -> Vec<f64> {
            let own = turns.iter().filter(|(whose, _)| *whose == side);
            own.filter_map(|(_, sample)| sample.get(figure.key)).copied().collect()
        };
        let (ours, linux) = (values(Side::Ours), values(Side::Linux));
        let ratio = ratio(figure.better, &ours, &linux);
        Self { figure, ours, linux, ratio, wanted: figure.target.filter(|_| wanted) }
    }

    /// Whether it is as much better as is wanted, if anything is.
    pub fn met(&self) -> Option<bool> {
        Some(self.ratio?.median >= self.wanted?)
    }
}

fn ratio(better: Better, ours: &[f64], linux: &[f64]) -> Option<Spread> {
    let over = |ours: f64, linux: f64| {
        let (above, below) = match better {
            Better::More => (ours, linux),
            Better::Less => (linux, ours),
            Better::Neither => return None,
        };
        (below > 0.0).then_some(above / below)
    };
    let median = over(Spread::of(ours)?.median, Spread::of(linux)?.median)?;
    let pairs: Vec<_> =
        ours.iter().zip(linux).filter_map(|(ours, linux)| over(*ours, *linux)).collect();
    Some(Spread { median, ..Spread::of(&pairs)? })
}

/// All figures that any turn has, and whether anything is wanted of them.
pub fn rows(turns: &[(Side, Sample)], wanted: bool) -> Vec<Row> {
    let rows = ALL.iter().map(|figure| Row::of(figure, turns, wanted));
    rows.filter(|row| !(row.ours.is_empty() && row.linux.is_empty())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(key: &str, ours: &[f64], linux: &[f64]) -> Vec<(Side, Sample)> {
        let of = |side, values: &[f64]| -> Vec<(Side, Sample)> {
            values.iter().map(|value| (side, Sample::from([(key.to_owned(), *value)]))).collect()
        };
        [of(Side::Ours, ours), of(Side::Linux, linux)].concat()
    }

    #[test]
    fn more_is_better_of_what_is_carried() {
        let rows =
            rows(&turns("tcp_1_to_2_mbit", &[300.0, 200.0, 340.0], &[100.0, 200.0, 170.0]), true);
        assert_eq!(rows.len(), 1);
        let ratio = rows[0].ratio.unwrap();
        assert_eq!(ratio.median, 300.0 / 170.0);
        assert_eq!((ratio.least, ratio.most), (1.0, 3.0));
        assert_eq!(rows[0].met(), Some(true));
    }

    #[test]
    fn less_is_better_of_what_it_costs() {
        let rows = rows(&turns("start_s", &[2.0], &[20.0]), true);
        assert_eq!((rows[0].ratio.unwrap().median, rows[0].met()), (10.0, Some(false)));
    }

    #[test]
    fn what_one_side_lacks_has_no_ratio() {
        for (ours, linux) in [(&[1.0][..], &[][..]), (&[0.0], &[1.0]), (&[], &[1.0])] {
            let rows = rows(&turns("start_s", ours, linux), true);
            assert!(rows[0].ratio.is_none() && rows[0].met().is_none());
        }
        assert!(rows(&turns("busy_tcp_backend", &[1.0], &[1.0]), true)[0].ratio.is_none());
        assert!(rows(&turns("what nobody knows", &[1.0], &[1.0]), true).is_empty());
    }

    #[test]
    fn every_figure_is_there_once() {
        for figure in ALL {
            assert_eq!(ALL.iter().filter(|other| other.key == figure.key).count(), 1);
        }
    }
}

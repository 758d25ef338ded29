//! What guests sent to dom0's NIC over time, by datapath, with the moments at which Xen took a feature away and gave it back.

use std::fmt::Write as _;

use super::withdraw::{COPY, MAP_IDENTITY, Used};

/// What had been sent by one moment.
#[derive(Clone, Copy)]
struct Sample {
    /// Seconds.
    at: f64,
    /// Bytes by each of [`PATHS`].
    bytes: [f64; 2],
}

/// What is told apart, from the bottom of the picture up: the name, and the colour.
const PATHS: [(&str, &str); 2] = [(MAP_IDENTITY, "#f08c00"), (COPY, "#9aa1ab")];

/// A recording.
#[derive(Default)]
pub struct Timeline {
    samples: Vec<Sample>,
    /// When, and whether it is there from then on.
    changes: Vec<(f64, bool)>,
}

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 96.0;
const HEIGHT: f64 = 200.0;
/// Seconds that one step of the picture is the mean of.
const STEP: f64 = 0.5;

/// Makes one of two, of each path.
fn both([a, b]: [f64; 2], [c, d]: [f64; 2], make: impl Fn(f64, f64) -> f64) -> [f64; 2] {
    [make(a, c), make(b, d)]
}

impl Timeline {
    /// Notes what dom0's table says.
    pub fn sample(&mut self, at: f64, used: &Used) {
        let bytes = PATHS.map(|(path, _)| used.taken(path).bytes);
        self.samples.push(Sample { at, bytes });
    }

    /// Notes that the feature comes or goes.
    pub fn change(&mut self, at: f64, offered: bool) {
        self.changes.push((at, offered));
    }

    /// Bytes sent by a moment, between samples in proportion.
    fn by(&self, at: f64) -> Option<[f64; 2]> {
        let next = self.samples.partition_point(|sample| sample.at < at).max(1);
        let (old, new) = (self.samples.get(next - 1)?, self.samples.get(next)?);
        let share = (at - old.at) / (new.at - old.at).max(1e-9);
        Some(both(old.bytes, new.bytes, |old, new| old + (new - old) * share))
    }

    /// Mbit/s of each path in equal steps from the first sample to the last: when a step begins, and what was sent in it.
    fn rates(&self) -> Vec<(f64, [f64; 2])> {
        let (Some(first), Some(last)) = (self.samples.first(), self.samples.last()) else {
            return Vec::new();
        };
        let count = ((last.at - first.at) / STEP) as usize;
        let moments = (0..=count).map(|step| first.at + STEP * step as f64);
        let sums: Vec<_> = moments.filter_map(|at| Some((at, self.by(at)?))).collect();
        let pairs = sums.windows(2).filter_map(|pair| match pair {
            [(at, old), (_, new)] => {
                Some((*at, both(*old, *new, |old, new| (new - old) * 8.0 / 1e6 / STEP)))
            }
            _ => None,
        });
        pairs.collect()
    }

    /// The picture; `summary` stands below its title.
    pub fn draw(&self, summary: &str) -> String {
        let rates = self.rates();
        let start = rates.first().map_or(0.0, |(at, _)| *at);
        let end = rates.last().map_or(1.0, |(at, _)| at + STEP);
        let most = rates.iter().map(|(_, [low, high])| low + high).fold(1.0, f64::max);
        let top = (most / 20.0).ceil() * 20.0;
        let x = |at: f64| {
            LEFT + (WIDTH - LEFT - RIGHT) * (at.clamp(start, end) - start) / (end - start)
        };
        let y = |rate: f64| TOP + HEIGHT * (1.0 - rate / top);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {:.0}\" font-family=\"system-ui, sans-serif\" \
             font-size=\"11\" fill=\"#343a40\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"20\" y=\"30\" font-size=\"17\" font-weight=\"600\">What two Linux guests send to dom0's NIC while Xen \
             withdraws and restores grant_map_identity</text>\n<text x=\"20\" y=\"50\" fill=\"#868e96\">{summary}</text>\n",
            TOP + HEIGHT + 44.0
        );
        let legend = PATHS.iter().map(|(name, colour)| (*name, *colour));
        let legend = legend.chain([("bit 12 withdrawn", "#ffe3e3")]);
        for ((name, colour), place) in legend.zip([LEFT, LEFT + 130.0, LEFT + 210.0]) {
            let _ = writeln!(
                svg,
                "<rect x=\"{place}\" y=\"66\" width=\"12\" height=\"12\" rx=\"2\" fill=\"{colour}\"/>\
                 <text x=\"{}\" y=\"76\">{name}</text>",
                place + 17.0
            );
        }
        for (index, (at, offered)) in self.changes.iter().enumerate() {
            if *offered || *at > end {
                continue;
            }
            let until = self.changes.get(index + 1).map_or(end, |(at, _)| *at);
            let _ = writeln!(
                svg,
                "<rect x=\"{:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{HEIGHT}\" fill=\"#ffe3e3\"/>",
                x(*at),
                x(until) - x(*at)
            );
        }
        for quarter in 0..=4 {
            let rate = top * f64::from(quarter) / 4.0;
            let _ = writeln!(
                svg,
                "<path d=\"M{LEFT} {0:.1}H{1}\" stroke=\"#dee2e6\"/>\
                 <text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{rate:.0}</text>",
                y(rate),
                WIDTH - RIGHT,
                LEFT - 6.0,
                y(rate) + 4.0
            );
        }
        for (at, values) in &rates {
            let mut below = 0.0;
            for (value, (_, colour)) in values.iter().zip(PATHS) {
                let _ = writeln!(
                    svg,
                    "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                    x(*at),
                    y(below + value),
                    x(at + STEP) - x(*at),
                    y(below) - y(below + value)
                );
                below += value;
            }
        }
        for second in (0..).step_by(10).map(f64::from).take_while(|second| start + second <= end) {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{second:.0} s</text>",
                x(start + second),
                TOP + HEIGHT + 18.0
            );
        }
        let _ = writeln!(svg, "<text x=\"20\" y=\"{}\" fill=\"#868e96\">Mbit/s</text>", TOP - 6.0);
        svg + "</svg>\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded() -> Timeline {
        let sample = |(at, low, high): (f64, f64, f64)| Sample { at, bytes: [low, high] };
        let samples = [(10.0, 0.0, 0.0), (10.5, 1e6, 0.0), (11.25, 1e6, 1.5e6), (12.1, 1e6, 2e6)];
        Timeline {
            samples: samples.map(sample).to_vec(),
            changes: vec![(10.5, false), (11.5, true)],
        }
    }

    #[test]
    fn rates_are_of_what_was_sent_between_samples() {
        let rates = recorded().rates();
        let near = |a: f64, b: f64| (a - b).abs() < 1e-6;
        let [(at, first), (_, second), (_, third), ..] = rates[..] else { panic!("{rates:?}") };
        assert!(near(at, 10.0) && near(first[0], 16.0) && near(first[1], 0.0), "{first:?}");
        assert!(near(second[0], 0.0) && near(second[1], 16.0), "{second:?}");
        assert!(third[1] > 0.0 && third[1] < 16.0, "{third:?}");
    }

    #[test]
    fn the_picture_has_both_ways_and_the_time_without() {
        let svg = recorded().draw("a run");
        for part in ["a run", MAP_IDENTITY, "#f08c00", "#ffe3e3", "</svg>"] {
            assert!(svg.contains(part), "{part}");
        }
        assert!(!svg.contains("NaN"));
    }
}

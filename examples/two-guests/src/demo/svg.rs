//! Throughput over time: a panel for each vif, coloured by datapath, with what was withdrawn and restored when.

use std::fmt::Write as _;

use two_guests::{Datapath, Meter};

use crate::record::{Record, Sample};

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 96.0;
const PANEL: f64 = 190.0;
const GAP: f64 = 46.0;

/// The colour of a datapath.
fn colour(path: Datapath) -> &'static str {
    match path {
        Datapath::Copy => "#9aa1ab",
        Datapath::Direct => "#2f9e44",
        Datapath::Map => "#1c7ed6",
        Datapath::MapIdentity => "#f08c00",
        Datapath::Static => "#ae3ec9",
    }
}

/// A round number that is not less, for the top of an axis, in fourths that are round too.
fn ceiling(most: f64) -> f64 {
    let power = 10_f64.powf(most.max(1.0).log10().floor());
    let steps = [1.0, 2.0, 4.0, 6.0, 8.0, 10.0];
    steps.into_iter().map(|step| step * power).find(|top| *top >= most).unwrap_or(most)
}

fn number(value: f64) -> String {
    if value >= 10_000.0 { format!("{:.0} G", value / 1000.0) } else { format!("{value:.0} M") }
}

/// Lines of labels, so that none is written over another: the first line in which there is room.
fn line_for(ends: &mut Vec<f64>, at: f64, width: f64) -> usize {
    let free = ends.iter().position(|end| *end < at);
    let line = free.unwrap_or(ends.len());
    match ends.get_mut(line) {
        Some(end) => *end = at + width,
        None => ends.push(at + width),
    }
    line
}

/// The whole picture.
pub fn draw(record: &Record, summary: &str) -> String {
    let panels = record.names.len();
    let end = record.samples.last().map_or(1.0, |sample| sample.at);
    let most = |sample: &Sample| {
        sample.vifs.iter().map(|vif| sample.mbits(vif.total())).fold(0.0, f64::max)
    };
    let top = ceiling(record.samples.iter().map(most).fold(0.0, f64::max));
    let x = |at: f64| LEFT + (WIDTH - LEFT - RIGHT) * at / end;
    let mut labels = Vec::new();
    let mut marks = String::new();
    let bottom = TOP + 60.0 + panels as f64 * (PANEL + GAP) - GAP;
    for (at, change) in &record.changes {
        let text = change.to_string();
        let line = line_for(&mut labels, x(*at), 6.2 * text.len() as f64 + 10.0);
        let y = TOP + 12.0 * line.min(3) as f64;
        let dash = if change.restore { "2 4" } else { "6 3" };
        let colour = if change.restore { "#2b8a3e" } else { "#c92a2a" };
        let at = x(*at);
        let _ = writeln!(
            marks,
            "<path d=\"M{at:.1} {y:.1}V{bottom:.1}\" stroke=\"{colour}\" stroke-dasharray=\"{dash}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{text}</text>",
            at + 3.0,
            y + 4.0
        );
    }
    let height = bottom + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"11\" fill=\"#343a40\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"30\" font-size=\"17\" font-weight=\"600\">Throughput of each vif, by \
         datapath</text>\n<text x=\"{LEFT}\" y=\"50\" fill=\"#868e96\">{summary}</text>\n"
    );
    let mut at = LEFT;
    for path in Datapath::ALL {
        let name = path.name();
        let _ = writeln!(
            svg,
            "<rect x=\"{at}\" y=\"62\" width=\"12\" height=\"12\" rx=\"2\" fill=\"{}\"/>\
             <text x=\"{}\" y=\"72\">{name}</text>",
            colour(path),
            at + 17.0
        );
        at += 17.0 + 6.5 * name.len() as f64 + 22.0;
    }
    for (index, name) in record.names.iter().enumerate() {
        let base = TOP + 60.0 + PANEL + index as f64 * (PANEL + GAP);
        panel(&mut svg, record, index, name, base, top, &x);
    }
    svg.push_str("<g stroke-width=\"1\" font-size=\"10\">\n");
    svg.push_str(&marks.replace("<text", "<text stroke=\"none\""));
    svg.push_str("</g>\n</svg>\n");
    svg
}

fn panel(
    svg: &mut String,
    record: &Record,
    index: usize,
    name: &str,
    base: f64,
    top: f64,
    x: &dyn Fn(f64) -> f64,
) {
    let y = |mbits: f64| base - PANEL * mbits / top;
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"{:.1}\" font-weight=\"600\">{name}, bit/s</text>",
        base - PANEL - 8.0
    );
    for step in 0..=4 {
        let value = top * f64::from(step) / 4.0;
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {0:.1}H{1}\" stroke=\"#e9ecef\"/><text x=\"{2}\" y=\"{3:.1}\" \
             text-anchor=\"end\" fill=\"#868e96\">{4}</text>",
            y(value),
            WIDTH - RIGHT,
            LEFT - 8.0,
            y(value) + 4.0,
            number(value)
        );
    }
    let of = |sample: &Sample| sample.vifs.get(index).copied().unwrap_or_default();
    // From the top of the pile down, each over the one before.
    for (level, path) in Datapath::ALL.into_iter().enumerate().rev() {
        let height = |sample: &Sample, meter: Meter| {
            let bytes: u64 = meter.bytes.iter().take(level + 1).sum();
            y(sample.mbits(bytes))
        };
        if record.samples.iter().all(|sample| of(sample).by(path) == 0) {
            continue;
        }
        let mut line = format!("M{LEFT:.1} {base:.1}");
        let mut begin = 0.0;
        for sample in &record.samples {
            let height = height(sample, of(sample));
            let _ = write!(line, "L{:.1} {height:.1}L{:.1} {height:.1}", x(begin), x(sample.at));
            begin = sample.at;
        }
        let _ = writeln!(
            svg,
            "<path d=\"{line}L{:.1} {base:.1}Z\" fill=\"{}\"/>",
            x(begin),
            colour(path)
        );
    }
    let end = record.samples.last().map_or(1.0, |sample| sample.at);
    let step = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0];
    let step = step.into_iter().find(|step| end / step <= 12.0).unwrap_or(600.0);
    for tick in 0..=(end / step) as u32 {
        let at = f64::from(tick) * step;
        let digits = usize::from(step < 1.0);
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#868e96\">{at:.digits$} s</text>",
            x(at),
            base + 16.0
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Change;
    use two_guests::Lever;

    #[test]
    fn the_picture_has_what_was_used_and_what_was_changed() {
        let mut record = Record::new(vec!["vif1.0".into()]);
        let meter = Meter { packets: 100, bytes: [9, 9, 0, 0, 0], ..Meter::default() };
        record.sample(Sample { at: 1.0, length: 1.0, vifs: vec![meter] });
        let lever = Lever::Path(Datapath::Direct);
        record.change(0.5, Change { when: 0.5, lever, restore: false });
        let svg = draw(&record, "a run");
        for part in ["vif1.0", "−direct", "<svg", "</svg>"] {
            assert!(svg.contains(part), "{part}");
        }
        // Once in the legend, and once where it was used.
        assert_eq!(svg.matches(colour(Datapath::Direct)).count(), 2);
        assert_eq!(svg.matches(colour(Datapath::Map)).count(), 1);
    }

    #[test]
    fn axes_end_at_round_numbers() {
        assert_eq!(ceiling(3.0), 4.0);
        assert_eq!(ceiling(1201.0), 2000.0);
        assert_eq!(ceiling(0.0), 1.0);
    }
}

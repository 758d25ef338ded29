//! The figures as bars: of each, this project's dom0 and Linux, whichever has more filling the row.

use std::fmt::Write as _;

use super::figures::{Better, Row, Side};
use super::stats::Spread;
use super::table::{number, verdict};

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 300.0;
/// The longest bar.
const LENGTH: f64 = 420.0;
const TOP: f64 = 92.0;
/// A section's title.
const HEAD: f64 = 28.0;
const ROW: f64 = 40.0;
const BAR: f64 = 14.0;

fn colour(side: Side) -> &'static str {
    match side {
        Side::Ours => "#2f9e44",
        Side::Linux => "#9aa1ab",
    }
}

/// The whole picture: sections with their titles; `conditions` stand below its own.
pub fn draw(sections: &[(&str, Vec<Row>)], conditions: &str) -> String {
    let mut body = String::new();
    let mut y = TOP;
    for (title, rows) in sections {
        let _ = writeln!(
            body,
            "<text x=\"20\" y=\"{:.1}\" font-size=\"13\" font-weight=\"600\">{title}</text>",
            y + 12.0
        );
        y += HEAD;
        for row in rows.iter().filter(|row| row.figure.better != Better::Neither) {
            draw_row(&mut body, row, y);
            y += ROW;
        }
    }
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {:.0}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"11\" fill=\"#343a40\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"20\" y=\"30\" font-size=\"17\" font-weight=\"600\">The same Linux guests, served by this \
         project and by Linux</text>\n<text x=\"20\" y=\"50\" fill=\"#868e96\">{conditions}</text>\n",
        y + 16.0
    );
    for (side, x) in Side::BOTH.into_iter().zip([LEFT, LEFT + 70.0]) {
        let (fill, name) = (colour(side), side.name());
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"64\" width=\"12\" height=\"12\" rx=\"2\" fill=\"{fill}\"/>\
             <text x=\"{}\" y=\"74\">{name}</text>",
            x + 17.0
        );
    }
    svg + &body + "</svg>\n"
}

fn draw_row(svg: &mut String, row: &Row, y: f64) {
    let arrow = if row.figure.better == Better::Less { "less is better" } else { "more is better" };
    let _ = writeln!(
        svg,
        "<text x=\"{0}\" y=\"{1:.1}\" text-anchor=\"end\">{2}</text>\
         <text x=\"{0}\" y=\"{3:.1}\" text-anchor=\"end\" fill=\"#868e96\">{4}, {arrow}</text>",
        LEFT - 10.0,
        y + 11.0,
        row.figure.name,
        y + 25.0,
        row.figure.unit,
    );
    let all = row.ours.iter().chain(&row.linux);
    let most = all.copied().fold(f64::MIN_POSITIVE, f64::max);
    for (side, values, y) in [(Side::Ours, &row.ours, y), (Side::Linux, &row.linux, y + BAR + 1.0)]
    {
        let Some(Spread { median, least, most: top }) = Spread::of(values) else { continue };
        let x = |value: f64| LEFT + LENGTH * value.max(0.0) / most;
        let middle = y + BAR / 2.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{}\"/>\
             <path d=\"M{:.1} {middle:.1}H{:.1}\" stroke=\"#343a40\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            x(median) - LEFT,
            colour(side),
            x(least),
            x(top),
            x(top) + 6.0,
            middle + 4.0,
            number(median),
        );
    }
    if let Some(ratio) = row.ratio {
        let (weight, fill) = match row.met() {
            Some(true) => ("600", "#2b8a3e"),
            Some(false) => ("600", "#c92a2a"),
            None => ("400", "#343a40"),
        };
        let target = match verdict(row) {
            text if text.is_empty() => text,
            text => format!(" (at least {text})"),
        };
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" font-weight=\"{weight}\" fill=\"{fill}\">× {}{target}</text>",
            LEFT + LENGTH + 70.0,
            y + BAR + 4.0,
            number(ratio.median),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::figures::{Sample, rows};

    #[test]
    fn the_picture_has_both_sides_of_what_is_better_or_worse() {
        let sample = |value: f64, busy: f64| {
            Sample::from([("start_s".to_owned(), value), ("busy_tcp_backend".to_owned(), busy)])
        };
        let turns = [(Side::Ours, sample(1.0, 50.0)), (Side::Linux, sample(40.0, 90.0))];
        let svg = draw(&[("here", rows(&turns, true))], "one run");
        for part in [
            "one run",
            "less is better",
            ">1.00<",
            ">40.0<",
            "× 40.0 (at least 20 reached)",
            "</svg>",
        ] {
            assert!(svg.contains(part), "{part}");
        }
        // The longest fills the row, and the other is as much shorter as it is less.
        assert!(svg.contains(&format!("width=\"{LENGTH:.1}\"")));
        assert!(svg.contains(&format!("width=\"{:.1}\"", LENGTH / 40.0)));
        // Once in the legend, once in the row; what is neither better nor worse is not drawn.
        assert_eq!(svg.matches(colour(Side::Ours)).count(), 2);
    }
}

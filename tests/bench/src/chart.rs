//! Bars in panels, as SVG.

use std::fmt::Write as _;

/// Columns of panels.
const COLUMNS: usize = 2;
const WIDTH: f64 = 1100.0;
const MARGIN: f64 = 24.0;
const TOP: f64 = 76.0;
const ROW: f64 = 17.0;
/// Room for the names of the bars, and for the figures behind them.
const NAMES: f64 = 210.0;
const FIGURES: f64 = 60.0;

/// A bar: from nothing to `value`, with a line over the middle half of what was measured.
pub struct Bar {
    pub name: String,
    pub value: f64,
    pub range: Option<(f64, f64)>,
    /// Ours, or somebody else's.
    pub ours: bool,
}

/// Bars with one scale.
pub struct Panel {
    pub title: String,
    pub bars: Vec<Bar>,
}

/// A figure with three digits that mean something.
pub fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        large if large >= 100.0 => format!("{value:.0}"),
        large if large >= 10.0 => format!("{value:.1}"),
        large if large >= 1.0 => format!("{value:.2}"),
        large if large >= 0.01 => format!("{value:.3}"),
        _ => format!("{value:.4}"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The whole picture.
pub fn draw(title: &str, note: &str, panels: &[Panel]) -> String {
    let height = |panel: &Panel| ROW * panel.bars.len() as f64 + 46.0;
    let column = (WIDTH - MARGIN * (COLUMNS as f64 + 1.0)) / COLUMNS as f64;
    let mut body = String::new();
    let mut top = TOP;
    for row in panels.chunks(COLUMNS) {
        for (index, panel) in row.iter().enumerate() {
            let left = MARGIN + index as f64 * (column + MARGIN);
            draw_panel(&mut body, panel, left, top, column);
        }
        top += row.iter().map(height).fold(0.0, f64::max);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {:.0}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"11\" fill=\"#343a40\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{MARGIN}\" y=\"30\" font-size=\"17\" font-weight=\"600\">{}</text>\n\
         <text x=\"{MARGIN}\" y=\"50\" fill=\"#868e96\">{}</text>\n{body}</svg>\n",
        top + MARGIN,
        escape(title),
        escape(note)
    )
}

fn draw_panel(svg: &mut String, panel: &Panel, left: f64, top: f64, width: f64) {
    let most = |bar: &Bar| bar.range.map_or(bar.value, |(_, high)| high.max(bar.value));
    let full = panel.bars.iter().map(most).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let room = width - NAMES - FIGURES;
    let x = |value: f64| left + NAMES + room * value / full;
    let title = escape(&panel.title);
    let _ = writeln!(
        svg,
        "<text x=\"{left:.1}\" y=\"{:.1}\" font-weight=\"600\">{title}</text>",
        top + 12.0
    );
    for (index, bar) in panel.bars.iter().enumerate() {
        let y = top + 22.0 + ROW * index as f64;
        let colour = if bar.ours { "#2f9e44" } else { "#9aa1ab" };
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"12\" fill=\"{colour}\"/>",
            left + NAMES - 8.0,
            y + 10.0,
            escape(&bar.name),
            x(0.0),
            (x(bar.value) - x(0.0)).max(0.5)
        );
        if let Some((low, high)) = bar.range {
            let _ = writeln!(
                svg,
                "<path d=\"M{:.1} {:.1}H{:.1}\" stroke=\"#343a40\"/>",
                x(low),
                y + 6.0,
                x(high)
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#868e96\">{}</text>",
            x(most(bar)) + 6.0,
            y + 10.0,
            figure(bar.value)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_is_there_and_none_is_longer_than_its_panel() {
        let bar = |name: &str, value, ours| Bar {
            name: name.into(),
            value,
            range: Some((value / 2.0, value * 2.0)),
            ours,
        };
        let bars = vec![bar("a < b", 1.0, true), bar("c", 4.0, false)];
        let svg = draw("title", "note", &[Panel { title: "panel".into(), bars }]);
        for part in ["a &lt; b", "title", "note", "panel", "#2f9e44", "#9aa1ab", "</svg>"] {
            assert!(svg.contains(part), "{part}");
        }
        let widths = svg.split("<rect x=").skip(1).map(|rect| {
            let (_, width) = rect.split_once("width=\"").unwrap();
            width.split('"').next().unwrap().parse::<f64>().unwrap()
        });
        assert!(widths.into_iter().all(|width| width < WIDTH / 2.0));
    }

    #[test]
    fn figures_have_three_digits() {
        assert_eq!(figure(0.00781), "0.0078");
        assert_eq!(figure(1.234), "1.23");
        assert_eq!(figure(123.4), "123");
    }
}

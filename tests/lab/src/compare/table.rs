//! The figures as a table for a terminal.

use super::figures::Row;
use super::stats::Spread;

/// Three digits that matter, and no fewer before the point.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 99.95 => 0,
        size if size >= 9.995 => 1,
        size if size >= 0.9995 || size == 0.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

fn range(spread: Spread) -> String {
    let Spread { median, least, most } = spread;
    if least == most {
        return number(median);
    }
    format!("{} ({} to {})", number(median), number(least), number(most))
}

/// What is wanted of a row, and whether it is so.
pub fn verdict(row: &Row) -> String {
    let Some(target) = row.wanted else { return String::new() };
    let word = match row.met() {
        Some(true) => "reached",
        Some(false) => "missed",
        None => "unknown",
    };
    format!("{target} {word}")
}

fn cells(row: &Row) -> [String; 5] {
    let side = |values: &[f64]| Spread::of(values).map_or("-".to_owned(), range);
    [
        format!("{}, {}", row.figure.name, row.figure.unit),
        side(&row.ours),
        side(&row.linux),
        row.ratio.map_or(String::new(), range),
        verdict(row),
    ]
}

const HEAD: [&str; 5] = ["", "ours", "Linux", "times better", "at least"];

/// The same for a page of text, in Markdown.
pub fn markdown(rows: &[Row]) -> String {
    let line = |cells: [String; 5]| format!("| {} |\n", cells.join(" | "));
    let head = line(HEAD.map(str::to_owned)) + &line(["---"; 5].map(str::to_owned));
    head + &rows.iter().map(|row| line(cells(row))).collect::<String>()
}

/// The whole table; medians, with the range of the turns where they differ.
pub fn table(rows: &[Row]) -> String {
    let head = HEAD.map(str::to_owned);
    let lines: Vec<_> = std::iter::once(head).chain(rows.iter().map(cells)).collect();
    let mut widths = [0; 5];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    let text = lines.iter().map(|line| {
        let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    });
    text.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::figures::{Sample, Side, rows};

    #[test]
    fn numbers_keep_three_digits() {
        let all = [0.0, 0.01234, 0.5, 1.234, 9.999, 12.34, 99.96, 1234.5].map(number);
        assert_eq!(all, ["0.00", "0.012", "0.500", "1.23", "10.0", "12.3", "100", "1234"]);
    }

    #[test]
    fn a_row_says_whether_it_reaches_what_is_wanted() {
        let sample = |value| Sample::from([("udp_64_pps".to_owned(), value)]);
        let turns = [
            (Side::Ours, sample(30_000.0)),
            (Side::Linux, sample(10_000.0)),
            (Side::Ours, sample(28_000.0)),
            (Side::Linux, sample(20_000.0)),
        ];
        let text = table(&rows(&turns, true));
        let line = text.lines().nth(1).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        let expected = "UDP of 64 bytes, delivered, packets/s 29000 (28000 to 30000) 15000 (10000 to \
                        20000) 1.93 (1.40 to 3.00) 2 missed";
        assert_eq!(words.join(" "), expected);
        let line = "| UDP of 64 bytes, delivered, packets/s | 29000 (28000 to 30000) | 15000 (10000 to \
                    20000) | 1.93 (1.40 to 3.00) | 2 missed |\n";
        assert!(markdown(&rows(&turns, true)).ends_with(line));
    }
}

//! What came of it, in compare.json, compare.svg and compare.md while it goes on, and as tables in the end.

use std::fs;

use anyhow::Result;
use serde_json::{Value, json};

use super::chart;
use super::figures::{Better, Row, Sample, Side, rows};
use super::stats::Spread;
use super::table::{markdown, table};
use crate::paths;

/// What was compared on one machine.
struct Section {
    title: &'static str,
    /// Whether it is where something is wanted.
    wanted: bool,
    turns: Vec<(Side, Sample)>,
}

impl Section {
    fn rows(&self) -> Vec<Row> {
        rows(&self.turns, self.wanted)
    }
}

/// All of it, and under which conditions.
pub struct Report {
    conditions: String,
    sections: Vec<Section>,
}

impl Report {
    /// Nothing yet.
    pub fn new(conditions: String) -> Self {
        Self { conditions, sections: Vec::new() }
    }

    /// What is added from here on belongs there.
    pub fn section(&mut self, title: &'static str, wanted: bool) {
        self.sections.push(Section { title, wanted, turns: Vec::new() });
    }

    /// Adds what a turn measured. Whoever ends it early has the turns so far.
    pub fn add(&mut self, side: Side, sample: Sample) -> Result<()> {
        if let Some(section) = self.sections.last_mut() {
            section.turns.push((side, sample));
        }
        let dir = paths::lab();
        let text = serde_json::to_string_pretty(&self.json())?;
        fs::write(dir.join("compare.json"), text + "\n")?;
        let sections: Vec<_> = self.sections.iter().map(|one| (one.title, one.rows())).collect();
        fs::write(dir.join("compare.svg"), chart::draw(&sections, &self.conditions))?;
        fs::write(dir.join("compare.md"), self.page())?;
        Ok(())
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let tables = self
            .sections
            .iter()
            .map(|section| format!("\n{}\n{}", section.title, table(&section.rows())));
        format!("\n{}\n{}", self.conditions, tables.collect::<String>())
    }

    fn page(&self) -> String {
        let tables = self
            .sections
            .iter()
            .map(|section| format!("\n{}:\n\n{}", section.title, markdown(&section.rows())));
        format!("{}.\n{}", self.conditions, tables.collect::<String>())
    }

    fn json(&self) -> Value {
        let sections = self.sections.iter().map(|section| {
            let figures: Vec<_> = section.rows().iter().map(of_row).collect();
            json!({ "title": section.title, "figures": figures })
        });
        json!({ "conditions": self.conditions, "compared": sections.collect::<Vec<_>>() })
    }
}

fn of_row(row: &Row) -> Value {
    let side = |values: &[f64]| {
        let spread = Spread::of(values);
        spread.map(|Spread { median, least, most }| {
            json!({ "median": median, "least": least, "most": most, "values": values })
        })
    };
    let better = match row.figure.better {
        Better::More => Some("more"),
        Better::Less => Some("less"),
        Better::Neither => None,
    };
    let ratio = row.ratio.map(
        |Spread { median, least, most }| json!({ "median": median, "least": least, "most": most }),
    );
    json!({
        "figure": row.figure.key,
        "name": row.figure.name,
        "unit": row.figure.unit,
        "better": better,
        "ours": side(&row.ours),
        "linux": side(&row.linux),
        "times_better": ratio,
        "at_least": row.wanted,
        "reached": row.met(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_is_so_where_it_is_wanted() {
        let sample = |value| Sample::from([("udp_64_pps".to_owned(), value)]);
        let mut report = Report::new("one turn".into());
        for (title, wanted) in [("here", true), ("there", false)] {
            let turns = vec![(Side::Ours, sample(9.0)), (Side::Linux, sample(3.0))];
            report.sections.push(Section { title, wanted, turns });
        }
        let value = report.json();
        let figure = |section: usize| &value["compared"][section]["figures"][0];
        assert_eq!(figure(0)["times_better"]["median"], 3.0);
        assert_eq!((&figure(0)["at_least"], &figure(0)["reached"]), (&json!(2.0), &json!(true)));
        assert_eq!((&figure(1)["at_least"], &figure(1)["reached"]), (&Value::Null, &Value::Null));
        assert_eq!(figure(1)["ours"]["values"], json!([9.0]));
        assert_eq!(report.text().matches("reached").count(), 1);
    }
}

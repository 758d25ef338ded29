//! Prometheus' text format, as dom0 serves it.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};

/// Counters at one time.
#[derive(Clone, Default)]
pub struct Metrics {
    values: BTreeMap<String, f64>,
}

impl Metrics {
    /// Reads the lines of an answer; comments are skipped.
    pub fn parse<'a>(lines: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut values = BTreeMap::new();
        for line in lines {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, value) =
                line.rsplit_once(' ').with_context(|| format!("odd metric line \"{line}\""))?;
            let value =
                value.parse().with_context(|| format!("odd value in metric line \"{line}\""))?;
            values.insert(name.to_owned(), value);
        }
        ensure!(!values.is_empty(), "dom0 serves no counters");
        Ok(Self { values })
    }

    /// The sum of all samples of a metric that carry these labels, `None` if there are none.
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let mut sum = None;
        for (key, value) in &self.values {
            let (base, own) = key.split_once('{').unwrap_or((key, ""));
            let has = |(label, wanted): &(&str, &str)| {
                own.trim_end_matches('}').split(',').any(|l| l == format!("{label}=\"{wanted}\""))
            };
            if base == name && labels.iter().all(has) {
                sum = Some(sum.unwrap_or(0.0) + value);
            }
        }
        sum
    }

    /// The same, for a metric that has to be there.
    pub fn need(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        self.get(name, labels).with_context(|| format!("dom0 serves no {name} {labels:?}"))
    }

    /// As text, one sample per line.
    pub fn text(&self) -> String {
        self.values.iter().map(|(name, value)| format!("{name} {value}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_label_and_summed() {
        let text = "# HELP x\nx{vif=\"1.0\",dir=\"tx\",reason=\"a\"} 2\nx{vif=\"1.0\",dir=\"tx\",reason=\"b\"} 3\n\
                    x{vif=\"2.0\",dir=\"tx\",reason=\"a\"} 7\ny 0.25\n";
        let metrics = Metrics::parse(text.lines()).unwrap();
        assert_eq!(metrics.get("x", &[("vif", "1.0"), ("dir", "tx")]), Some(5.0));
        assert_eq!(metrics.get("x", &[]), Some(12.0));
        assert_eq!(metrics.need("y", &[]).unwrap(), 0.25);
        assert_eq!(metrics.get("x", &[("vif", "3.0")]), None);
        assert!(Metrics::parse(["wget: error"]).is_err());
    }
}

//! Counters as text that Prometheus reads (its exposition format, version 0.0.4).

use alloc::string::String;
use core::fmt::{Display, Write as _};

/// A page of counters.
#[derive(Debug, Default)]
pub struct Page(String);

impl Page {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self(String::with_capacity(16 * 1024))
    }

    // Writing to a string cannot fail.

    /// Begins a family of samples: their name, `counter` or `gauge`, and what they are.
    pub fn family(&mut self, name: impl Display, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// A sample of a family, with labels as `name="value",…`.
    pub fn sample(&mut self, name: impl Display, labels: impl Display, value: impl Display) {
        let _ = writeln!(self.0, "{name}{{{labels}}} {value}");
    }

    /// A family of one, which goes up and down.
    pub fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.one(name, "gauge", help, value);
    }

    /// A family of one, which goes up only.
    pub fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.one(name, "counter", help, value);
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        let _ = writeln!(self.0, "{name} {value}");
    }

    /// The text.
    #[must_use]
    pub fn into_text(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_as_prometheus_reads_it() {
        let mut page = Page::new();
        page.gauge("up", "Whether.", 1);
        page.family("packets_total", "counter", "Packets.");
        page.sample("packets_total", "dir=\"tx\"", 7);
        let text = "# HELP up Whether.\n# TYPE up gauge\nup 1\n# HELP packets_total Packets.\n\
                    # TYPE packets_total counter\npackets_total{dir=\"tx\"} 7\n";
        assert_eq!(page.into_text(), text);
    }
}

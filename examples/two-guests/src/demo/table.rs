//! What the person at the terminal sees: a live table, or a line each second where there is no terminal.

use std::collections::VecDeque;
use std::io::IsTerminal as _;

use console::{Style, style};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use two_guests::{Datapath, Meter};

use crate::record::{Record, Sample, per};

/// Columns of the history of throughput.
const HISTORY: usize = 60;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

fn look(path: Datapath) -> Style {
    let style = Style::new();
    match path {
        Datapath::Copy => style.white(),
        Datapath::Direct => style.green(),
        Datapath::Map => style.blue().bright(),
        Datapath::MapIdentity => style.yellow(),
        Datapath::Static => style.magenta(),
    }
}

/// Shares of the datapaths in use, the greatest first: as text of so many characters.
fn shares(meter: &Meter) -> String {
    let total = meter.total();
    let mut used: Vec<_> = Datapath::ALL.into_iter().map(|path| (path, meter.by(path))).collect();
    used.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let shown = used.into_iter().filter(|(_, bytes)| bytes * 100 >= total.max(1)).take(3);
    let parts = shown.map(|(path, bytes)| {
        let percent = (bytes * 100 + total / 2) / total.max(1);
        let text = if percent == 100 {
            path.name().to_owned()
        } else {
            format!("{} {percent} %", path.name())
        };
        look(path).apply_to(text).to_string()
    });
    let text = parts.collect::<Vec<_>>().join(" ");
    let width = console::measure_text_width(&text);
    text + &" ".repeat(34_usize.saturating_sub(width))
}

fn row(name: &str, sample: &Sample, meter: &Meter) -> String {
    format!(
        "{name:<8}{} {:>8.0} {:>10.0} {:>12.3} {:>14.3}",
        shares(meter),
        sample.mbits(meter.total()),
        meter.packets as f64 / sample.length,
        per(meter.hypercalls, meter.packets),
        per(meter.notifications, meter.packets),
    )
}

fn head() -> String {
    let head = format!(
        "{:<8}{:<34} {:>8} {:>10} {:>12} {:>14}",
        "vif", "datapath", "Mbit/s", "packets/s", "hypercalls", "notifications"
    );
    format!("{}\n", style(head).bold())
        + &style(format!("{:>66}{:>26}", "", "per packet      per packet")).dim().to_string()
}

/// The live table.
pub struct Table {
    bars: Vec<ProgressBar>,
    title: ProgressBar,
    history: ProgressBar,
    news: ProgressBar,
    past: VecDeque<(f64, Datapath)>,
    terminal: bool,
    printed: f64,
    seconds: f64,
    seed: u64,
}

impl Table {
    pub fn new(record: &Record, seconds: f64, seed: u64) -> Self {
        let terminal = std::io::stdout().is_terminal();
        let target =
            if terminal { ProgressDrawTarget::stdout() } else { ProgressDrawTarget::hidden() };
        let all = MultiProgress::with_draw_target(target);
        let template = ProgressStyle::with_template("{msg}");
        let plain = template.unwrap_or_else(|_| ProgressStyle::default_spinner());
        let line = || all.add(ProgressBar::new_spinner().with_style(plain.clone()));
        let (title, header) = (line(), line());
        header.set_message(head());
        let bars = record.names.iter().map(|_| line()).collect::<Vec<_>>();
        let (history, news) = (line(), line());
        if !terminal {
            println!("two guests and one backend, {seconds} s, seed {seed}");
            println!("{}", head());
        }
        let bars = [vec![header], bars].concat();
        let past = VecDeque::new();
        Self { bars, title, history, news, past, terminal, printed: 0.0, seconds, seed }
    }

    /// Shows the latest sample.
    pub fn show(&mut self, record: &Record) {
        let Some(sample) = record.samples.last() else { return };
        let rows = record.names.iter().zip(&sample.vifs);
        let rows: Vec<_> = rows.map(|(name, meter)| row(name, sample, meter)).collect();
        if !self.terminal {
            if sample.at - self.printed >= 0.95 {
                self.printed = sample.at;
                for row in rows {
                    println!("{:5.1} s  {row}", sample.at);
                }
            }
            return;
        }
        self.title.set_message(format!(
            "{}  {:4.1} of {} s   seed {}\n",
            style("two guests, one backend").bold(),
            sample.at,
            self.seconds,
            self.seed
        ));
        for (bar, row) in self.bars.iter().skip(1).zip(rows) {
            bar.set_message(row);
        }
        let mut sum = Meter::default();
        for meter in &sample.vifs {
            for (to, from) in sum.bytes.iter_mut().zip(meter.bytes) {
                *to += from;
            }
        }
        self.past.push_back((sample.mbits(sum.total()), sum.main_path().unwrap_or(Datapath::Copy)));
        if self.past.len() > HISTORY {
            self.past.pop_front();
        }
        let most = self.past.iter().map(|(mbits, _)| *mbits).fold(1.0, f64::max);
        let bars = self.past.iter().map(|(mbits, path)| {
            let level = (mbits / most * (BARS.len() - 1) as f64).round() as usize;
            look(*path).apply_to(BARS.get(level).copied().unwrap_or(' ')).to_string()
        });
        let bars: String = bars.collect();
        self.history.set_message(format!("\n{bars}  {:.0} Mbit/s", sample.mbits(sum.total())));
    }

    /// Says what was withdrawn or restored.
    pub fn tell(&mut self, record: &Record) {
        let tell = |(at, change): &(f64, crate::schedule::Change)| {
            let style = if change.restore { Style::new().green() } else { Style::new().red() };
            let word = if change.restore { "restored" } else { "withdrawn" };
            style.apply_to(format!("{at:5.1} s  {} {word}", change.lever)).to_string()
        };
        if self.terminal {
            let last = record.changes.iter().rev().take(4).rev();
            self.news.set_message(format!("\n{}", last.map(tell).collect::<Vec<_>>().join("\n")));
        } else if let Some(last) = record.changes.last() {
            println!("{}", tell(last));
        }
    }

    /// Leaves the table as it is.
    pub fn end(self) {
        for bar in [self.title].iter().chain(&self.bars).chain([&self.history, &self.news]) {
            bar.abandon();
        }
        println!();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_is_in_use_and_what_it_costs() {
        let meter =
            Meter { packets: 200, bytes: [250, 750, 0, 0, 0], hypercalls: 4, notifications: 2 };
        let sample = Sample { at: 1.0, length: 0.001, vifs: vec![meter] };
        let row = console::strip_ansi_codes(&row("vif1.0", &sample, &meter)).into_owned();
        let words: Vec<_> = row.split_whitespace().collect();
        assert_eq!(
            words,
            ["vif1.0", "direct", "75", "%", "copy", "25", "%", "8", "200000", "0.020", "0.010"]
        );
        assert_eq!(
            row.chars().count(),
            head().lines().next().map_or(0, console::measure_text_width)
        );
    }
}

//! What the person at the terminal sees: progress while something is under way, one line when it is done.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Something that takes a while. On a terminal it is a spinner or a bar; elsewhere plain lines.
pub struct Task {
    bar: ProgressBar,
    label: String,
    started: Instant,
    terminal: bool,
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

impl Task {
    /// A task of unknown length.
    pub fn new(label: impl Into<String>) -> Self {
        Self::with(label.into(), None)
    }

    /// A task of so many bytes.
    pub fn bytes(label: impl Into<String>, total: u64) -> Self {
        Self::with(label.into(), Some(total))
    }

    fn with(label: String, total: Option<u64>) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = match (terminal, total) {
            (false, _) => ProgressBar::hidden(),
            (true, None) => ProgressBar::new_spinner()
                .with_style(style("  {spinner} {msg} {elapsed:.dim} {prefix:.dim}")),
            (true, Some(n)) => ProgressBar::new(n)
                .with_style(style("  {spinner} {msg} [{bar:30}] {bytes}/{total_bytes} {eta:.dim}")),
        };
        if terminal {
            bar.enable_steady_tick(Duration::from_millis(120));
        } else {
            eprintln!("  {label} ...");
        }
        bar.set_message(label.clone());
        Self { bar, label, started: Instant::now(), terminal }
    }

    /// How far it is, in bytes.
    pub fn at(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// What it is at just now.
    pub fn detail(&self, text: &str) {
        self.bar.set_prefix(text.to_owned());
    }

    /// Prints something while it goes on.
    pub fn aside(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
    }

    /// It is done: one line stays, with what came of it.
    pub fn done(self, result: &str) {
        let seconds = self.started.elapsed().as_secs_f32();
        self.bar.finish_and_clear();
        if self.terminal || seconds > 2.0 {
            eprintln!("  {}: {result} ({seconds:.1} s)", self.label);
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

//! What has been transferred, for whoever asks.

use alloc::collections::VecDeque;
use alloc::string::String;

/// Lines that are kept.
const LINES: usize = 128;

/// The last transfers, a line each.
#[derive(Debug, Default)]
pub struct Transfers(VecDeque<String>);

impl Transfers {
    /// Adds a line, and says it.
    pub fn add(&mut self, line: String) {
        log::info!("{line}");
        if self.0.len() == LINES {
            self.0.pop_front();
        }
        self.0.push_back(line);
    }

    /// All lines, the oldest first.
    #[must_use]
    pub fn page(&self) -> String {
        self.0.iter().flat_map(|line| [line.as_str(), "\n"]).collect()
    }
}

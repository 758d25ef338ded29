//! Words for whoever reads this domain's console: the backend of `log`, and what is said of a crash.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use log::{LevelFilter, Log, Metadata, Record};

use crate::arch;

/// Nanoseconds in a second.
const NANOS: u64 = 1_000_000_000;

/// Gathers text, so that a line is one write and other domains' output cannot fall into it. It is on the caller's
/// stack: there is no lock to be stuck behind when something goes wrong while printing.
pub struct Line {
    text: [u8; 256],
    length: usize,
    write: fn(&[u8]),
}

impl Line {
    pub const fn new() -> Self {
        Self { text: [0; 256], length: 0, write: arch::write }
    }

    /// For what is said before the domain ends itself: it goes wherever it may be read.
    pub const fn last() -> Self {
        Self { text: [0; 256], length: 0, write: arch::last_words }
    }

    pub fn flush(&mut self) {
        (self.write)(self.text.get(..self.length).unwrap_or_default());
        self.length = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if let Some(place) = self.text.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
            if byte == b'\n' || self.length == self.text.len() {
                self.flush();
            }
        }
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.length != 0 {
            self.flush();
        }
    }
}

/// Whether the console's last line is one of [`print`]'s that has not ended.
static OPEN: AtomicBool = AtomicBool::new(false);

/// Prints bytes as they are: an answer, or a prompt. A line may be left open; the next line of `log` ends it.
pub fn print(text: &[u8]) {
    if let Some(last) = text.last() {
        arch::write(text);
        OPEN.store(*last != b'\n', Ordering::Relaxed);
    }
}

/// Whether what [`print`] left open still is: no line of `log` has ended it.
#[must_use]
pub fn is_line_open() -> bool {
    OPEN.load(Ordering::Relaxed)
}

/// Ends a line that is open. There is one processor and no handler: nobody opens another before the caller prints.
fn end_open_line() {
    if is_line_open() {
        print(b"\n");
    }
}

struct Console;

impl Log for Console {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        end_open_line();
        let now = crate::now().0;
        // Writing to a `Line` never fails, and there is nowhere to report what an argument's `Display` returned.
        let _ = writeln!(
            Line::new(),
            "[{:>5}] {}.{:03} {}",
            record.level(),
            now / NANOS,
            now % NANOS / 1_000_000,
            record.args()
        );
    }

    fn flush(&self) {}
}

/// Directs `log` here. The level is the program's to change.
pub fn init() {
    if log::set_logger(&Console).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    end_open_line();
    let _ = writeln!(Line::last(), "[PANIC] {info}");
    crate::machine::HV.shutdown(hypercall::Shutdown::Crash)
}

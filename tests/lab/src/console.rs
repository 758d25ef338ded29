//! The serial line of the machine: Xen's messages and every domain's console, told apart, kept in files, and typed into.
//!
//! Xen writes what guest N says as `(XEN) DOMN: ...`, its own messages as `(XEN) ...`, and dom0's as they come. Guests of xl
//! have their consoles in dom0, which repeats what they say as `(LAB) DOMN: ...`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

/// Whose line it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Source {
    /// A domain by number.
    Dom(usize),
    /// Xen itself.
    Xen,
}

impl Source {
    /// The name of its log file.
    pub fn log(self) -> String {
        match self {
            Self::Dom(n) => format!("dom{n}.log"),
            Self::Xen => "xen.log".to_owned(),
        }
    }
}

/// How what is typed gets to a guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Xen gives it to one domain at a time; Ctrl-a three times moves it on, and Xen says where to.
    Switched,
    /// dom0 has all of it, and passes `>N TEXT` on to guest N.
    Relayed,
}

impl Input {
    /// So many bytes are taken at once, and then after this time again.
    fn pace(self) -> (usize, Duration) {
        match self {
            // The FIFO of a guest's emulated UART, which its driver has to empty.
            Self::Switched => (28, Duration::from_millis(120)),
            // Half of what Xen keeps for dom0.
            Self::Relayed => (64, Duration::from_millis(40)),
        }
    }
}

/// A line and when it came.
#[derive(Clone)]
pub struct Line {
    /// When its end was read.
    pub at: Instant,
    /// Without its end.
    pub text: String,
}

impl State {
    fn lines(&self, source: Source) -> &[Line] {
        self.lines.get(&source).map_or(&[], Vec::as_slice)
    }
}

#[derive(Default)]
struct State {
    lines: BTreeMap<Source, Vec<Line>>,
    focus: Option<Source>,
    closed: bool,
}

/// A file for each who says something.
struct Logs {
    dir: PathBuf,
    files: BTreeMap<Source, File>,
}

impl Logs {
    /// A full disk shows as short logs; the run itself goes on.
    fn write(&mut self, source: Source, text: &str) {
        if !self.files.contains_key(&source)
            && let Ok(file) = File::create(self.dir.join(source.log()))
        {
            self.files.insert(source, file);
        }
        if let Some(file) = self.files.get_mut(&source) {
            let _ = writeln!(file, "{text}");
        }
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The serial line.
pub struct Console {
    shared: Arc<Shared>,
    input: Mutex<Box<dyn Write + Send>>,
    way: Input,
}

const SWITCH: &[u8] = b"\x01\x01\x01";
/// More than Xen needs to offer its input to every domain.
const TURNS: usize = 16;
const PREFIX: &str = "(XEN) ";
const RELAYED: &str = "(LAB) ";

impl Console {
    /// Starts reading `output`; logs go to `dir`; `echo` repeats everything on standard output.
    pub fn start(
        mut output: impl Read + Send + 'static,
        input: impl Write + Send + 'static,
        way: Input,
        dir: &Path,
        echo: bool,
    ) -> Result<Self> {
        let mut raw = File::create(dir.join("serial.log")).context("cannot write serial.log")?;
        let mut logs = Logs { dir: dir.to_path_buf(), files: BTreeMap::new() };
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let writer = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut splitter = Splitter::default();
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut buffer) {
                let bytes = buffer.get(..n).unwrap_or_default();
                // A full disk shows as short logs; the run itself goes on.
                let _ = raw.write_all(bytes);
                if echo {
                    let mut out = io::stdout();
                    let _ = out.write_all(bytes).and_then(|()| out.flush());
                }
                let lines = splitter.feed(bytes);
                if lines.is_empty() {
                    continue;
                }
                let mut state = writer.lock();
                let at = Instant::now();
                for (source, text) in lines {
                    logs.write(source, &text);
                    if source == Source::Xen
                        && let Some(focus) = focus(&text)
                    {
                        state.focus = Some(focus);
                    }
                    state.lines.entry(source).or_default().push(Line { at, text });
                }
                writer.changed.notify_all();
            }
            writer.lock().closed = true;
            writer.changed.notify_all();
        });
        Ok(Self { shared, input: Mutex::new(Box::new(input)), way })
    }

    /// How many lines have come from there: a place to look from.
    pub fn mark(&self, source: Source) -> usize {
        self.shared.lock().lines(source).len()
    }

    /// The lines from there since a mark.
    pub fn since(&self, source: Source, mark: usize) -> Vec<Line> {
        self.shared.lock().lines(source).get(mark..).unwrap_or_default().to_vec()
    }

    /// Waits for a line from there, at or after `mark`, of which `pick` makes something.
    pub fn wait<T>(
        &self,
        source: Source,
        mark: usize,
        limit: Duration,
        mut pick: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        let mut at = mark;
        let found = self.until(limit, |state| {
            let lines = state.lines(source);
            let found = lines.get(at..).unwrap_or_default().iter().find_map(&mut pick);
            at = lines.len().max(at);
            found
        });
        match found {
            Some(found) => Ok(found),
            None if self.closed() => bail!("QEMU ended"),
            None => bail!("nothing within {} s", limit.as_secs_f32()),
        }
    }

    fn until<T>(&self, limit: Duration, mut look: impl FnMut(&State) -> Option<T>) -> Option<T> {
        let end = Instant::now() + limit;
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = look(&state) {
                return Some(found);
            }
            let left = end.checked_duration_since(Instant::now())?;
            if state.closed {
                return None;
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Whether the serial line has ended.
    pub fn closed(&self) -> bool {
        self.shared.lock().closed
    }

    /// Writes to the serial line as it is.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        input.write_all(bytes).and_then(|()| input.flush()).context("QEMU takes no more input")
    }

    /// Moves the input on until it is there.
    fn turn(&self, to: Source) -> Result<()> {
        for _ in 0..TURNS {
            if self.shared.lock().focus == Some(to) {
                return Ok(());
            }
            let mark = self.mark(Source::Xen);
            self.write(SWITCH)?;
            // Where it says so may be cut by what dom0 writes: then it is moved on once more.
            let said = self.wait(Source::Xen, mark, Duration::from_secs(5), |l| focus(&l.text));
            ensure!(said.is_ok() || !self.closed(), "Xen does not switch its serial input");
        }
        bail!("Xen's serial input cannot be switched to {to:?}")
    }

    /// Types a line to a domain: a long line in pieces, with time to read them.
    pub fn type_line(&self, domain: usize, line: &str) -> Result<()> {
        match self.way {
            Input::Switched => {
                self.turn(Source::Dom(domain))?;
                self.type_slowly(&format!("{line}\n"))?;
                // Xen does not mark the output of the guest that has the input, so that rests at dom0.
                self.turn(Source::Dom(0))
            }
            Input::Relayed if domain == 0 => self.type_slowly(&format!("{line}\n")),
            Input::Relayed => self.type_slowly(&format!(">{domain} {line}\n")),
        }
    }

    /// Presses a key of Xen's own.
    pub fn debug_key(&self, key: char) -> Result<()> {
        ensure!(self.way == Input::Switched, "Xen's own keys are not to be reached here");
        self.turn(Source::Xen)?;
        self.write(key.encode_utf8(&mut [0; 4]).as_bytes())?;
        self.turn(Source::Dom(0))
    }

    fn type_slowly(&self, text: &str) -> Result<()> {
        let (size, pause) = self.way.pace();
        for (i, piece) in text.as_bytes().chunks(size).enumerate() {
            if i > 0 {
                std::thread::sleep(pause);
            }
            self.write(piece)?;
        }
        Ok(())
    }
}

/// Where Xen says its input goes.
fn focus(text: &str) -> Option<Source> {
    let to = text.strip_prefix("*** Serial input to ")?;
    match to.strip_prefix("DOM") {
        // What dom0 writes meanwhile may follow at once.
        Some(number) => {
            let end = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
            Some(Source::Dom(number.get(..end)?.parse().ok()?))
        }
        None => to.starts_with("Xen").then_some(Source::Xen),
    }
}

/// Cuts the byte stream into lines and tells whose they are.
#[derive(Default)]
struct Splitter {
    line: Vec<u8>,
    /// What dom0 had written of a line when Xen wrote one of its own in between.
    started: String,
}

impl Splitter {
    fn feed(&mut self, bytes: &[u8]) -> Vec<(Source, String)> {
        let mut lines = Vec::new();
        for byte in bytes.iter().filter(|b| **b != b'\r') {
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                lines.extend(self.whole(&String::from_utf8_lossy(&line)));
            } else {
                self.line.push(*byte);
            }
        }
        lines
    }

    fn whole(&mut self, line: &str) -> Option<(Source, String)> {
        let Some((before, xen)) = line.split_once(PREFIX) else {
            let text = std::mem::take(&mut self.started) + line;
            return Some(match text.strip_prefix(RELAYED).and_then(guest) {
                Some((source, text)) => (source, text.to_owned()),
                None => (Source::Dom(0), text),
            });
        };
        self.started.push_str(before);
        let (source, text) = guest(xen).unwrap_or((Source::Xen, xen));
        Some((source, text.to_owned()))
    }
}

/// Which guest said it, and what.
fn guest(line: &str) -> Option<(Source, &str)> {
    let (number, text) = line.strip_prefix("DOM")?.split_once(": ")?;
    Some((Source::Dom(number.parse().ok()?), text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_go_to_whom_they_belong() {
        let mut splitter = Splitter::default();
        let text =
            b"hel(XEN) DOM1: one\r\nlo\r\n(XEN) Freed 348kB\n(XEN) DOM12: (XEN) x\n(XEN) DOMx: y\n\
              (LAB) D(XEN) z\nOM3: two\n(LAB) else\n";
        let lines: Vec<_> = text.chunks(5).flat_map(|c| splitter.feed(c)).collect();
        let expected = [
            (Source::Dom(1), "one"),
            (Source::Dom(0), "hello"),
            (Source::Xen, "Freed 348kB"),
            (Source::Dom(12), "(XEN) x"),
            (Source::Xen, "DOMx: y"),
            (Source::Xen, "z"),
            (Source::Dom(3), "two"),
            (Source::Dom(0), "(LAB) else"),
        ];
        assert_eq!(lines, expected.map(|(s, t)| (s, t.to_owned())));
    }

    #[test]
    fn focus_is_read_from_what_xen_says() {
        let says =
            |to| format!("*** Serial input to {to} (type 'CTRL-a' three times to switch input)");
        assert_eq!(focus(&says("DOM2")), Some(Source::Dom(2)));
        assert_eq!(focus(&says("Xen")), Some(Source::Xen));
        assert_eq!(focus("Serial input"), None);
        assert_eq!(focus("*** Serial input to DOM1dom0>  (type"), Some(Source::Dom(1)));
        assert_eq!(focus("*** Serial input to dom0> DOM1 (type"), None);
    }
}

//! The operator's console: commands typed at Xen's console while its input is dom0's, and what they answer.
//!
//! It takes no part in the work: a turn reads one piece of what was typed, or prints one piece of an answer, or nothing.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write as _;

use evtchn::{Binder, Channel, Eoi, Work};
use hypercall::{Errno, Instant, Port, VcpuId, Virq};
use netback::Backend;
use runtime::Hv;
use xenbus::client::{Change, Client, Error, Event, JobId, Outcome};

use crate::editor::Editor;
use crate::vifs;

const PROMPT: &str = "dom0> ";
/// Bytes read at a time, of the 128 that Xen keeps.
const READ: usize = 64;
/// Bytes printed at a time.
const PIECE: usize = 128;
/// Children that `ls` shows.
const CHILDREN: usize = 128;

const HELP: &str = "\
ls [PATH]          the children of a node, with their values
read PATH          the value of a node
write PATH [VALUE] sets it; all after PATH and a blank is the value
rm PATH            removes a node and all below it
vifs               what all interfaces are at, and what they have carried
Paths are absolute, or below /local/domain/0. netback/withdrawn holds what netback is to do without.
";

/// What a command waits for.
enum Pending {
    Value(JobId),
    Children { job: JobId, path: String },
    Values { job: JobId, names: Vec<String>, left: usize },
    Change(JobId),
}

/// The console.
pub(crate) struct Console {
    hv: Hv,
    channel: Channel<Hv>,
    /// An event came, and its channel is still masked.
    event: bool,
    editor: Editor,
    /// Bytes that were read and not looked at, last first.
    typed: Vec<u8>,
    pending: Option<Pending>,
    /// An answer that is being printed, and how much of it is.
    answer: String,
    printed: usize,
}

impl Console {
    pub(crate) fn new(hv: Hv, binder: &Binder<Hv>) -> Result<Self, Errno> {
        Ok(Self {
            hv,
            channel: binder.bind_virq(Virq::CONSOLE, VcpuId(0))?,
            event: false,
            editor: Editor::default(),
            typed: Vec::with_capacity(READ),
            pending: None,
            answer: String::new(),
            printed: 0,
        })
    }

    /// Takes an event, if it is the console's.
    pub(crate) fn on_event(&mut self, port: Port) -> bool {
        let own = port == self.channel.port();
        self.event |= own;
        own
    }

    /// A piece of what there is to do; says whether there is more.
    pub(crate) fn poll(
        &mut self,
        client: &mut Client,
        backend: &Backend<Hv>,
        now: Instant,
    ) -> bool {
        if self.printed < self.answer.len() {
            self.print_piece();
            return true;
        }
        if !runtime::is_line_open() && !self.editor.line().is_empty() {
            self.draw();
        }
        // One command at a time: what is typed meanwhile waits.
        if self.pending.is_some() {
            return false;
        }
        if self.typed.is_empty() {
            if !self.event {
                return false;
            }
            self.read(now);
        }
        let mut echo = String::new();
        while let Some(byte) = self.typed.pop() {
            if let Some(line) = self.editor.take(byte, &mut echo) {
                self.echo(&echo);
                self.execute(line.trim(), client, backend);
                return true;
            }
        }
        self.echo(&echo);
        self.event
    }

    fn read(&mut self, now: Instant) {
        let mut bytes = [0; READ];
        let read = self.hv.console_read(&mut bytes);
        self.typed.extend(bytes.iter().take(read).rev());
        if read < READ {
            // What comes from here on raises the event again.
            self.event = false;
            let (Eoi::Open | Eoi::Throttled(_)) = self.channel.eoi(Work::Done, now);
        }
    }

    /// Shows what a key is answered with. The line is not drawn yet, or not any more, if something else was printed.
    fn echo(&self, echo: &str) {
        if runtime::is_line_open() {
            runtime::print(echo.as_bytes());
        } else if echo.ends_with('\n') {
            runtime::print(format!("{PROMPT}{echo}").as_bytes());
        } else if !echo.is_empty() {
            self.draw();
        }
    }

    fn draw(&self) {
        runtime::print(format!("{PROMPT}{}", self.editor.line()).as_bytes());
    }

    /// Prints some of an answer: a line, or a piece of a long one.
    fn print_piece(&mut self) {
        let rest = self.answer.as_bytes().get(self.printed..).unwrap_or_default();
        let piece = rest.get(..PIECE).unwrap_or(rest);
        let line = piece.split_inclusive(|byte| *byte == b'\n').next().unwrap_or(piece);
        runtime::print(line);
        self.printed += line.len();
        if self.printed == self.answer.len() {
            self.answer = String::new();
            self.printed = 0;
            self.draw();
        }
    }

    fn execute(&mut self, line: &str, client: &mut Client, backend: &Backend<Hv>) {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (path, value) = rest.trim_start().split_once(' ').unwrap_or((rest.trim_start(), ""));
        self.pending = match command {
            "" => return self.draw(),
            "help" => return self.say(HELP),
            "vifs" => return self.say(&vifs::table(backend)),
            "ls" => {
                // An empty path is the domain's own directory to nobody but us.
                let path = if path.is_empty() { "/local/domain/0" } else { path };
                Some(Pending::Children { job: client.list(path), path: path.into() })
            }
            "read" => Some(Pending::Value(client.read_many([path]))),
            "write" => {
                let (path, value) = (path.into(), value.as_bytes().to_vec());
                Some(Pending::Change(client.commit([Change::Write { path, value }])))
            }
            "rm" => Some(Pending::Change(client.commit([Change::Rm { path: path.into() }]))),
            _ => return self.fail("no such command: help shows them"),
        };
    }

    /// Takes a store event, if it is the end of what a command waits for.
    pub(crate) fn on_store(&mut self, client: &mut Client, event: &Event) -> bool {
        let Event::Done { job, result } = event else { return false };
        match self.pending.take_if(|pending| pending.job() == *job) {
            Some(pending) => {
                self.done(client, pending, result);
                true
            }
            None => false,
        }
    }

    fn done(&mut self, client: &mut Client, pending: Pending, result: &Result<Outcome, Error>) {
        match (pending, result) {
            (_, Err(error)) => self.fail(&format!("{error}")),
            (Pending::Value(_), Ok(Outcome::Values(values))) => {
                match values.first().and_then(Option::as_deref) {
                    Some(value) => self.say(&format!("\"{}\"\n", value.escape_ascii())),
                    None => self.fail("no such node"),
                }
            }
            (Pending::Children { path, .. }, Ok(Outcome::Names(Some(names)))) => {
                let left = names.len().saturating_sub(CHILDREN);
                let mut names = names.clone();
                names.truncate(CHILDREN);
                let root = path.trim_end_matches('/');
                let job = client.read_many(names.iter().map(|name| format!("{root}/{name}")));
                self.pending = Some(Pending::Values { job, names, left });
            }
            (Pending::Values { names, left, .. }, Ok(Outcome::Values(values))) => {
                let mut text = String::new();
                for (name, value) in names.iter().zip(values) {
                    let value = value.as_deref().unwrap_or_default();
                    // Writing to a string cannot fail.
                    let _ = writeln!(text, "{name} = \"{}\"", value.escape_ascii());
                }
                if left > 0 {
                    let _ = writeln!(text, "and {left} more");
                }
                self.say(&text);
            }
            (Pending::Change(_), Ok(_)) => self.say(""),
            (_, Ok(_)) => self.fail("no such node"),
        }
    }

    /// Answers a command that went well.
    fn say(&mut self, text: &str) {
        self.answer = format!("{text}ok\n");
    }

    fn fail(&mut self, why: &str) {
        self.answer = format!("error: {why}\n");
    }
}

impl Pending {
    fn job(&self) -> JobId {
        match self {
            Self::Value(job)
            | Self::Children { job, .. }
            | Self::Values { job, .. }
            | Self::Change(job) => *job,
        }
    }
}

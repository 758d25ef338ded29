//! The operator's console: lines typed at Xen's console while its input is dom0's, and what they are answered.
//!
//! It takes little from the packets: a turn reads one piece of what was typed, or prints one piece of an answer, or nothing.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use evtchn::{Binder, Channel, Eoi, Work};
use hypercall::{Errno, Instant, Port, VcpuId, Virq};
use runtime::Hv;
use xenbus::client::{Client, Event};

use crate::editor::Editor;
use crate::shell::Shell;

const PROMPT: &str = "dom0> ";
/// Bytes read at a time, of the 128 that Xen keeps.
const READ: usize = 64;
/// Bytes printed at a time.
const PIECE: usize = 128;

/// The console.
pub(crate) struct Console {
    hv: Hv,
    channel: Channel<Hv>,
    /// An event came, and its channel is still masked.
    event: bool,
    /// Bytes that were read and not looked at, last first.
    typed: Vec<u8>,
    editor: Editor,
    shell: Shell,
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
            typed: Vec::with_capacity(READ),
            editor: Editor::default(),
            shell: Shell::default(),
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

    /// Takes a store event, if it is the end of what a command waits for.
    pub(crate) fn on_store(&mut self, client: &mut Client, event: &Event) -> bool {
        self.shell.on_store(client, event)
    }

    /// A piece of what there is to do; says whether there is more. `vifs` gives the table of vifs, if it is asked for.
    pub(crate) fn poll(
        &mut self,
        client: &mut Client,
        now: Instant,
        vifs: impl FnOnce() -> String,
    ) -> bool {
        if let Some(answer) = self.shell.take_answer() {
            (self.answer, self.printed) = (answer, 0);
        }
        if self.printed < self.answer.len() {
            self.print_piece();
            return true;
        }
        if !runtime::is_line_open() && !self.editor.line().is_empty() {
            self.draw();
        }
        // What is typed while a command is at work waits.
        if self.shell.is_busy() {
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
                self.shell.execute(&line, client, vifs);
                if !self.shell.is_busy() {
                    self.draw();
                }
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

    /// Prints some of an answer: a line, or a piece of a long one. After the last, the next line may be typed.
    fn print_piece(&mut self) {
        let rest = self.answer.as_bytes().get(self.printed..).unwrap_or_default();
        let piece = rest.get(..PIECE).unwrap_or(rest);
        let line = piece.split_inclusive(|byte| *byte == b'\n').next().unwrap_or(piece);
        runtime::print(line);
        self.printed += line.len();
        if self.printed == self.answer.len() {
            (self.answer, self.printed) = (String::new(), 0);
            self.draw();
        }
    }
}

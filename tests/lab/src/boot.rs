//! `cargo lab boot`: a machine with its consoles on the terminal.

use std::io::{IsTerminal as _, Read as _};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Result;

use crate::machine::{Machine, Plan};
use crate::paths;
use crate::run::fresh;

/// Ctrl-].
const LEAVE: u8 = 0x1d;

/// Gives the terminal back as it was.
struct Terminal {
    before: Option<String>,
}

fn stty(arguments: &[&str]) -> Option<String> {
    let out = Command::new("stty").args(arguments).stdin(Stdio::inherit()).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

impl Terminal {
    fn raw() -> Self {
        let before = std::io::stdin().is_terminal().then(|| stty(&["-g"])).flatten();
        if before.is_some() {
            stty(&["raw", "-echo", "opost"]);
        }
        Self { before }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            stty(&[before]);
        }
    }
}

/// Starts the machine and joins its serial line with the terminal until Ctrl-] or the machine's end.
pub fn interactive(name: &str, plan: &dyn Plan) -> Result<()> {
    let dir = fresh(name)?;
    eprintln!("{name}: what it prints is kept in {}", paths::shown(&dir));
    eprintln!("Ctrl-a three times moves the keyboard: dom0, each guest, Xen. Ctrl-] leaves.\n");
    let machine = Machine::start(plan, &dir, true)?;
    let terminal = Terminal::raw();
    let (send, typed) = mpsc::channel();
    // Left behind at the end: a read of the keyboard cannot be taken back.
    std::thread::spawn(move || {
        for byte in std::io::stdin().lock().bytes() {
            let byte = byte.ok().filter(|b| *b != LEAVE);
            if send.send(byte).is_err() || byte.is_none() {
                return;
            }
        }
    });
    let pause = Duration::from_millis(200);
    while !machine.console.closed() {
        match typed.recv_timeout(pause) {
            Ok(Some(byte)) => machine.console.write(&[byte])?,
            Ok(None) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            // No keyboard, as when run from a script: the consoles are shown until the machine ends.
            Err(mpsc::RecvTimeoutError::Disconnected) => std::thread::sleep(pause),
        }
    }
    drop(terminal);
    eprintln!("\n{name}: ended");
    Ok(())
}

//! The machine: QEMU with Xen and its domains.

pub mod aarch64;
pub mod x86_64;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};

use crate::console::{Console, Input};
use crate::paths;
use crate::qmp::Qmp;

/// What to start.
pub trait Plan {
    /// QEMU and all that describes the machine, without a display; its serial line and its monitor are for
    /// [`Machine::start`] to add. Files made for it go to `dir`.
    fn command(&self, dir: &Path) -> Result<Command>;

    /// How what is typed on the serial line gets to a guest.
    fn input(&self) -> Input;
}

/// A running machine; it ends when this is dropped.
pub struct Machine {
    child: Child,
    /// The serial line.
    pub console: Console,
    /// QEMU's monitor.
    pub qmp: Qmp,
    socket: PathBuf,
}

impl Machine {
    /// Starts it; consoles and QEMU's own complaints (qemu.log) go to `dir`.
    pub fn start(plan: &dyn Plan, dir: &Path, echo: bool) -> Result<Self> {
        // A socket's path may not be long, so it is not under target.
        let socket = std::env::temp_dir().join(format!("cargo-lab-{}.qmp", std::process::id()));
        let _ = fs::remove_file(&socket);
        let mut command = plan.command(dir)?;
        command
            .args(["-no-reboot", "-serial", "stdio", "-monitor", "none"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        let log = dir.join("qemu.log");
        let mut child = outliving_nothing(&command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log)?)
            .spawn()
            .context("cannot start QEMU")?;
        let output = child.stdout.take().context("QEMU without standard output")?;
        let input = child.stdin.take().context("QEMU without standard input")?;
        let console = Console::start(output, input, plan.input(), dir, echo);
        let ready = console.and_then(|console| {
            let qmp = Qmp::connect(&socket)
                .with_context(|| format!("QEMU does not come up: see {}", paths::shown(&log)))?;
            Ok((console, qmp))
        });
        match ready {
            Ok((console, qmp)) => Ok(Self { child, console, qmp, socket }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }
}

/// The same command, to be killed by the kernel when this program ends, however it ends.
fn outliving_nothing(command: &Command) -> Command {
    let mut outer = match paths::program("setpriv") {
        Some(setpriv) => {
            let mut outer = Command::new(setpriv);
            outer.args(["--pdeathsig", "KILL"]).arg(command.get_program());
            outer
        }
        None => Command::new(command.get_program()),
    };
    outer.args(command.get_args());
    outer
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

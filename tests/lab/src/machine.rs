//! The machine: QEMU with Xen, dom0 and two guests started from the device tree.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};

use crate::console::Console;
use crate::fdt::{Node, add_to_chosen};
use crate::packages;
use crate::paths;
use crate::qmp::Qmp;

/// What to start.
pub struct Plan<'a> {
    /// Debian's Xen.
    pub xen: &'a Path,
    /// dom0's kernel, an arm64 Image.
    pub dom0: &'a Path,
    /// dom0's initramfs.
    pub dom0_initramfs: Option<&'a Path>,
    /// dom0's memory, as Xen's `dom0_mem` wants it.
    pub dom0_memory: &'a str,
    /// dom0's kernel arguments.
    pub dom0_arguments: &'a str,
    /// The guests' kernel.
    pub guest: &'a Path,
    /// The guests' initramfs.
    pub guest_initramfs: &'a Path,
    /// Added to the guests' kernel arguments.
    pub guest_arguments: &'a str,
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

const MACHINE: &str = "virt,gic-version=3,virtualization=on";
/// Modules go here and above: QEMU keeps its own device tree at 0x4800_0000.
const MODULES: u64 = 0x6000_0000;
const ALIGN: u64 = 2 << 20;
/// A guest's memory in KiB.
const GUEST_MEMORY: u32 = 256 << 10;

fn qemu(program: &Path, machine: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["-M", machine, "-cpu", "cortex-a57", "-smp", "2", "-m", "3072"]).args([
        "-display",
        "none",
        "-nic",
        "none",
        "-no-reboot",
    ]);
    command
}

/// Files placed in the machine's memory.
struct Layout {
    next: u64,
    placed: Vec<(u64, PathBuf)>,
}

impl Layout {
    fn place(&mut self, path: &Path) -> Result<(u64, u64)> {
        let size =
            fs::metadata(path).with_context(|| format!("cannot find {}", path.display()))?.len();
        let at = self.next;
        self.next = (at + size).next_multiple_of(ALIGN);
        self.placed.push((at, path.to_path_buf()));
        Ok((at, size))
    }
}

fn module(place: (u64, u64), kind: &str, arguments: Option<&str>) -> Result<Node> {
    let (at, size) = place;
    let node = Node::new(format!("module@{at:x}"))
        .strings("compatible", &[&format!("multiboot,{kind}"), "multiboot,module"])
        .cells("reg", &[0, u32::try_from(at)?, 0, u32::try_from(size)?]);
    Ok(match arguments {
        Some(text) => node.strings("bootargs", &[text]),
        None => node,
    })
}

impl Machine {
    /// Starts it; consoles and QEMU's own complaints (qemu.log) go to `dir`.
    pub fn start(plan: &Plan<'_>, dir: &Path, echo: bool) -> Result<Self> {
        let program = packages::qemu()?;
        let base = dir.join("qemu.dtb");
        let dump = format!("{MACHINE},dumpdtb={}", base.display());
        packages::run(&mut qemu(&program, &dump))?;

        let mut layout = Layout { next: MODULES, placed: Vec::new() };
        let dom0 = layout.place(plan.dom0)?;
        let guest = layout.place(plan.guest)?;
        let initramfs = layout.place(plan.guest_initramfs)?;
        let xen_arguments = format!(
            "console=dtuart dom0_mem={} dom0_max_vcpus=1 bootscrub=0 loglvl=all guest_loglvl=all noreboot sched=credit",
            plan.dom0_memory
        );
        let mut chosen = Node::new("")
            .cells("#address-cells", &[2])
            .cells("#size-cells", &[2])
            .strings("xen,xen-bootargs", &[&xen_arguments])
            .child(module(dom0, "kernel", Some(plan.dom0_arguments))?);
        if let Some(path) = plan.dom0_initramfs {
            chosen = chosen.child(module(layout.place(path)?, "ramdisk", None)?);
        }
        for number in 1..=2 {
            let arguments = format!(
                "console=ttyAMA0 rdinit=/init labid={number} panic=-1 quiet {}",
                plan.guest_arguments
            );
            chosen = chosen.child(
                Node::new(format!("domU{number}"))
                    .strings("compatible", &["xen,domain"])
                    .cells("#address-cells", &[2])
                    .cells("#size-cells", &[2])
                    .cells("memory", &[0, GUEST_MEMORY])
                    .cells("cpus", &[2])
                    .flag("vpl011")
                    .strings("xen,enhanced", &["enabled"])
                    .child(module(guest, "kernel", Some(&arguments))?)
                    .child(module(initramfs, "ramdisk", None)?),
            );
        }
        let tree = dir.join("machine.dtb");
        fs::write(&tree, add_to_chosen(&fs::read(&base)?, &chosen)?)?;

        // A socket's path may not be long, so it is not under target.
        let socket = std::env::temp_dir().join(format!("cargo-lab-{}.qmp", std::process::id()));
        let _ = fs::remove_file(&socket);
        let mut command = qemu(&program, MACHINE);
        command
            .args(["-serial", "stdio", "-monitor", "none"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-kernel")
            .arg(plan.xen)
            .arg("-dtb")
            .arg(&tree);
        for (at, file) in &layout.placed {
            command
                .arg("-device")
                .arg(format!("loader,file={},addr={at:#x},force-raw=on", file.display()));
        }
        let log = dir.join("qemu.log");
        let mut child = outliving_nothing(&command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log)?)
            .spawn()
            .context("cannot start QEMU")?;
        let output = child.stdout.take().context("QEMU without standard output")?;
        let input = child.stdin.take().context("QEMU without standard input")?;
        let console = Console::start(output, input, dir, echo);
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

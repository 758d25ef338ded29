//! QEMU's `virt` board: Xen starts dom0 and all guests from the device tree ("dom0less").

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::Plan;
use crate::console::Input;
use crate::fdt::{Node, add_to_chosen};
use crate::images::Images;
use crate::packages;

/// dom0 and guests, and what they are made of.
pub struct Board<'a> {
    /// Processors of the machine.
    pub processors: u32,
    /// Xen.
    pub xen: &'a Path,
    /// What it is told beside what all boards have it told.
    pub xen_arguments: &'static str,
    /// dom0. Its memory is given to it one to one.
    pub dom0: Domain<'a>,
    /// The guests: domain 1 and so on. They have the console of an emulated UART.
    pub guests: Vec<Domain<'a>>,
    /// dom0's NIC, in a network in which QEMU is the router and the host. What goes by it is in [`UPLINK`].
    pub uplink: Option<Nic>,
}

impl Board<'_> {
    /// With guests that have two queues when asked to: as many as processors. They are more than the machine has, and everything
    /// takes several times as long then.
    pub fn with_two_queues(mut self) -> Self {
        for guest in &mut self.guests {
            guest.vcpus = 2;
        }
        self
    }
}

/// A virtio NIC.
#[derive(Clone, Copy, Default)]
pub struct Nic {
    /// It does not look at what it is given to send before this time, and keeps it meanwhile.
    pub delay: Option<Duration>,
}

/// The file of the frames that went by dom0's NIC.
pub const UPLINK: &str = "uplink.pcap";
/// QEMU's object that writes it.
pub const DUMP: &str = "dump";

/// A domain.
pub struct Domain<'a> {
    /// Its kernel, an arm64 Image.
    pub kernel: &'a Path,
    /// Its initramfs.
    pub initramfs: Option<&'a Path>,
    /// Its kernel's arguments.
    pub arguments: String,
    /// Its memory in MiB.
    pub memory: u32,
    /// How many processors it has.
    pub vcpus: u32,
}

impl<'a> Domain<'a> {
    /// A guest with Debian's Linux and the lab's steps; `number` is its place among the guests, from 1 on, and the end
    /// of its addresses.
    pub fn linux(images: &'a Images, number: usize, arguments: &str) -> Self {
        Self {
            kernel: &images.linux,
            initramfs: Some(&images.guest),
            arguments: format!(
                "console=ttyAMA0 rdinit=/init labid={number} panic=-1 quiet {arguments}"
            ),
            // Linux's xen-netfront (6.1) loses a MiB whenever it is removed, and 64 MiB are Linux's own for DMA.
            memory: 384,
            vcpus: 1,
        }
    }
}

/// As many as it has unless there is a reason.
pub const PROCESSORS: u32 = 2;

const MACHINE: &str = "virt,gic-version=3,virtualization=on";
/// Modules go here and above: QEMU keeps its own device tree at 0x4800_0000.
const MODULES: u64 = 0x6000_0000;
const ALIGN: u64 = 2 << 20;

fn qemu(program: &Path, machine: &str, processors: u32) -> Command {
    let mut command = Command::new(program);
    command
        .args(["-M", machine, "-cpu", "cortex-a57", "-m", "3072", "-smp"])
        .arg(processors.to_string())
        .args(["-display", "none", "-nic", "none"]);
    command
}

/// Files placed in the machine's memory.
#[derive(Default)]
struct Layout {
    placed: Vec<(u64, u64, PathBuf)>,
}

impl Layout {
    /// Where a file is and its size. Each is there once, however many domains are started from it.
    fn place(&mut self, path: &Path) -> Result<(u64, u64)> {
        if let Some((at, size, _)) = self.placed.iter().find(|(_, _, placed)| placed == path) {
            return Ok((*at, *size));
        }
        let size =
            fs::metadata(path).with_context(|| format!("cannot find {}", path.display()))?.len();
        let end = self.placed.last().map_or(MODULES, |(at, size, _)| at + size);
        let at = end.next_multiple_of(ALIGN);
        self.placed.push((at, size, path.to_path_buf()));
        Ok((at, size))
    }

    /// A domain's boot modules.
    fn modules(&mut self, domain: &Domain<'_>) -> Result<Vec<Node>> {
        let kernel = self.place(domain.kernel)?;
        let mut modules = vec![module(kernel, "kernel")?.strings("bootargs", &[&domain.arguments])];
        if let Some(path) = domain.initramfs {
            modules.push(module(self.place(path)?, "ramdisk")?);
        }
        Ok(modules)
    }
}

fn module((at, size): (u64, u64), kind: &str) -> Result<Node> {
    Ok(Node::new(format!("module@{at:x}"))
        .strings("compatible", &[&format!("multiboot,{kind}"), "multiboot,module"])
        .cells("reg", &[0, u32::try_from(at)?, 0, u32::try_from(size)?]))
}

impl Plan for Board<'_> {
    fn command(&self, dir: &Path) -> Result<Command> {
        let program = packages::qemu_aarch64()?;
        let base = dir.join("qemu.dtb");
        let dump = format!("{MACHINE},dumpdtb={}", base.display());
        packages::run(&mut qemu(&program, &dump, self.processors))?;

        let mut layout = Layout::default();
        let xen_arguments = format!(
            "console=dtuart dom0_mem={}M dom0_max_vcpus={} bootscrub=0 loglvl=all guest_loglvl=all noreboot sched=credit {}",
            self.dom0.memory, self.dom0.vcpus, self.xen_arguments
        );
        let chosen = Node::new("")
            .cells("#address-cells", &[2])
            .cells("#size-cells", &[2])
            .strings("xen,xen-bootargs", &[&xen_arguments]);
        let mut chosen =
            layout.modules(&self.dom0)?.into_iter().fold(chosen, |chosen, node| chosen.child(node));
        for (number, guest) in (1..).zip(&self.guests) {
            let node = Node::new(format!("domU{number}"))
                .strings("compatible", &["xen,domain"])
                .cells("#address-cells", &[2])
                .cells("#size-cells", &[2])
                .cells("memory", &[0, guest.memory << 10])
                .cells("cpus", &[guest.vcpus])
                .flag("vpl011")
                .strings("xen,enhanced", &["enabled"]);
            let node =
                layout.modules(guest)?.into_iter().fold(node, |node, module| node.child(module));
            chosen = chosen.child(node);
        }
        let tree = dir.join("machine.dtb");
        fs::write(&tree, add_to_chosen(&fs::read(&base)?, &chosen)?)?;

        let mut command = qemu(&program, MACHINE, self.processors);
        command.arg("-kernel").arg(self.xen).arg("-dtb").arg(&tree);
        for (at, _, file) in &layout.placed {
            command
                .arg("-device")
                .arg(format!("loader,file={},addr={at:#x},force-raw=on", file.display()));
        }
        if let Some(Nic { delay }) = self.uplink {
            // Router advertisements would come into everything else that is measured.
            command.args(["-netdev", "user,id=uplink,ipv6=off"]);
            command.args(["-global", "virtio-mmio.force-legacy=false"]);
            let delay = delay
                .map(|delay| format!(",tx=timer,x-txtimer={}", delay.as_nanos()))
                .unwrap_or_default();
            command.arg("-device").arg(format!("virtio-net-device,netdev=uplink{delay}"));
            let file = dir.join(UPLINK);
            command
                .arg("-object")
                .arg(format!("filter-dump,id={DUMP},netdev=uplink,file={}", file.display()));
        }
        Ok(command)
    }

    fn input(&self) -> Input {
        Input::Switched
    }
}

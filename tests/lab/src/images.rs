//! Builds the initramfs of the guests and of Linux as dom0 from unpacked packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use crate::cpio::Tree;
use crate::elf;
use crate::hypervisor;
use crate::packages::{self, GUEST, LINUX_DOM0, Packages, XL};
use crate::paths;
use crate::ui::Task;

/// An architecture of Debian.
struct Arch {
    /// As in the names of packages.
    debian: &'static str,
    /// As in the names of directories.
    triple: &'static str,
    /// The dynamic loader.
    loader: &'static str,
}

const ARM64: Arch =
    Arch { debian: "arm64", triple: "aarch64-linux-gnu", loader: "lib/ld-linux-aarch64.so.1" };
const AMD64: Arch =
    Arch { debian: "amd64", triple: "x86_64-linux-gnu", loader: "lib64/ld-linux-x86-64.so.2" };

/// What a boot on aarch64 needs, ready on disk.
pub struct Images {
    /// Xen: [the one that was chosen](hypervisor::chosen).
    pub xen: PathBuf,
    /// Debian's kernel.
    pub linux: PathBuf,
    /// The guests' initramfs.
    pub guest: PathBuf,
    /// Linux dom0's initramfs, if it was asked for.
    pub linux_dom0: Option<PathBuf>,
}

macro_rules! embedded {
    ($dir:literal: $($name:literal)*) => {
        [$(($name, include_str!(concat!("../guest/", $dir, "/", $name)))),*]
    };
}

/// What a boot on x86_64 needs, ready on disk.
pub struct XlImages {
    /// Debian's Xen.
    pub xen: PathBuf,
    /// Debian's kernel.
    pub linux: PathBuf,
    /// The initramfs of Linux as dom0, with xl and what it starts.
    pub dom0: PathBuf,
}

/// The steps a domain can take, by name.
const STEPS: &[(&str, &str)] = &embedded!("steps":
    "abuse" "at" "away" "bg" "bgcut" "bgend" "bgruns" "bgwait" "cnt" "cputime" "crash" "drain" "feat" "fetch" "file" "files" "filesum" "flow"
    "garbage" "get" "iperf" "job" "lease" "met" "net" "pings" "pour" "private" "reach" "reload" "renet" "rtts" "services" "settle" "sha" "sink" "sinks" "source"
    "state" "storetime" "stream" "streamed" "streamstop" "sys" "udone" "untold" "up" "urecv" "usend"
);

/// The steps that only a dom0 with xl can take.
const XL_STEPS: &[(&str, &str)] = &embedded!("xl/steps":
    "attach" "detach" "domain" "netback" "rebridge" "vif"
);

/// Fetches packages and builds images for aarch64, whatever of it is not there yet.
pub fn prepare(with_linux_dom0: bool) -> Result<Images> {
    let source = Source::fetch(&ARM64, if with_linux_dom0 { LINUX_DOM0 } else { &[] })?;
    let guest = store("guest", &source.guest()?)?;
    let linux_dom0 = with_linux_dom0.then(|| store("linux-dom0", &source.dom0()?)).transpose()?;
    Ok(Images {
        xen: hypervisor::chosen().image(source.root.join("boot/xen-4.17-arm64"))?,
        linux: source.linux(),
        guest,
        linux_dom0,
    })
}

/// The same for x86_64. `ours` are this project's images by name: dom0 finds them in `/guest`.
pub fn prepare_xl(ours: &[(&str, &Path)]) -> Result<XlImages> {
    let source = Source::fetch(&AMD64, &[LINUX_DOM0, XL].concat())?;
    let linux = source.vmlinux()?;
    let mut tree = source.xl()?;
    tree.copy("guest/linux", &linux)?;
    for (name, path) in ours {
        tree.copy(&format!("guest/{name}"), path)?;
    }
    // QEMU loads it as it is, so it is unpacked.
    let xen = paths::directory("images")?.join("xen-amd64");
    let packed = source.root.join("boot/xen-4.17-amd64.gz");
    fs::write(&xen, unpacked("gzip", &packed)?)?;
    Ok(XlImages { xen, linux, dom0: store("linux-xl-dom0", &tree)? })
}

/// Writes an archive unless the same is there.
fn store(name: &str, tree: &Tree) -> Result<PathBuf> {
    let path = paths::directory("images")?.join(format!("{name}.cpio"));
    let data = tree.archive()?;
    let is_same = fs::read(&path).is_ok_and(|old| Sha256::digest(old) == Sha256::digest(&data));
    if !is_same {
        let task = Task::new(format!("writing the initramfs of {name}"));
        fs::write(&path, &data)?;
        task.done(&format!("{} MB", data.len() / 1_000_000));
    }
    Ok(path)
}

/// Unpacked packages, from which trees are made.
struct Source {
    arch: &'static Arch,
    root: PathBuf,
    /// The kernel's.
    version: String,
}

impl Source {
    /// Fetches Xen, what guests need, and `more`.
    fn fetch(arch: &'static Arch, more: &[&str]) -> Result<Self> {
        let packages = Packages::new(arch.debian)?;
        let xen = format!("xen-hypervisor-4.17-{}", arch.debian);
        packages.fetch(&[&[xen.as_str()], GUEST, more].concat())?;
        let version = packages.kernel()?;
        Ok(Self { arch, root: packages.root(), version })
    }

    fn linux(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.version))
    }

    /// The kernel within a PC's kernel image. Unpacked here once, as emulated machines take half a minute for it.
    fn vmlinux(&self) -> Result<PathBuf> {
        let path = paths::directory("images")?.join(format!("vmlinux-{}", self.version));
        if !path.exists() {
            let packed = path.with_extension("xz");
            fs::write(&packed, payload(&fs::read(self.linux())?).context("an odd Linux kernel")?)?;
            packages::xz()?;
            fs::write(&path, unpacked("xz", &packed)?)?;
            fs::remove_file(&packed)?;
        }
        Ok(path)
    }

    fn guest(&self) -> Result<Tree> {
        let mut tree = self.common(&["xen-netfront", "xenfs"])?;
        tree.file("init", include_str!("../guest/init"), true);
        Ok(tree)
    }

    /// Linux as dom0 of guests that Xen starts.
    fn dom0(&self) -> Result<Tree> {
        let programs = ["xenstored", "init-dom0less", "xen-init-dom0"];
        let mut tree = self.toolstack(&programs, &["virtio_mmio", "virtio_net"])?;
        let helper = "usr/lib/xen-4.17/bin/init-dom0less";
        let path = self.real(helper).context("no init-dom0less among the packages")?;
        tree.file(helper, repaired(fs::read(path)?)?, true);
        tree.file("init", include_str!("../guest/dom0-init"), true);
        Ok(tree)
    }

    /// Linux as dom0 that starts guests with xl, the Linux guests, and Linux as a driver domain.
    fn xl(&self) -> Result<Tree> {
        let programs = ["xenstored", "xen-init-dom0", "xenconsoled", "xl", "libxl-save-helper"];
        let mut tree = self.toolstack(&programs, &[])?;
        tree.file("init", include_str!("../guest/xl/init"), true);
        tree.file("lab/relay", include_str!("../guest/xl/relay"), true);
        // The C library loads it by name when a thread is to be cancelled.
        self.binary(&mut tree, "lib/x86_64-linux-gnu/libgcc_s.so.1", "lib/libgcc_s.so.1")?;
        tree.file("etc/xen/xl.conf", "autoballoon=\"off\"\n", false);
        tree.file("etc/xen/scripts/vif-bridge", include_str!("../guest/xl/vif-bridge"), true);
        for (name, text) in XL_STEPS {
            tree.file(&format!("lab/{name}"), *text, true);
        }
        tree.file("guest/initramfs", self.guest()?.archive()?, false);
        tree.file("guest/driver", self.driver()?.archive()?, false);
        Ok(tree)
    }

    /// Linux as a driver domain.
    fn driver(&self) -> Result<Tree> {
        let mut tree = self.common(&["xen-netback", "bridge", "xenfs"])?;
        self.program(&mut tree, "usr/bin/xenstore-watch")?;
        tree.file("init", include_str!("../guest/xl/driver"), true);
        tree.file("etc/xen/scripts/vif-bridge", include_str!("../guest/xl/vif-bridge"), true);
        Ok(tree)
    }

    /// What Linux as dom0 has whoever starts its guests; `drivers` are the modules it needs beside Xen's.
    fn toolstack(&self, programs: &[&str], drivers: &[&str]) -> Result<Tree> {
        let modules = [
            "xen-netback",
            "bridge",
            "xenfs",
            "xen-evtchn",
            "xen-gntdev",
            "xen-gntalloc",
            "xen-privcmd",
        ];
        let mut tree = self.common(&[&modules, drivers].concat())?;
        for name in programs {
            self.program(&mut tree, &format!("usr/lib/xen-4.17/bin/{name}"))?;
        }
        tree.link("var/run", "/run");
        tree.link("var/lock", "/run/lock");
        Ok(tree)
    }

    /// What guests and Linux dom0 have in common.
    fn common(&self, modules: &[&str]) -> Result<Tree> {
        let mut tree = Tree::default();
        for name in ["proc", "sys", "dev", "tmp", "run", "sbin", "var/lib/xenstored"] {
            tree.directory(name);
        }
        tree.copy("bin/busybox", &self.root.join("bin/busybox"))?;
        for name in [
            "usr/bin/iperf3",
            "usr/bin/perl",
            "usr/bin/xenstore-read",
            "usr/bin/xenstore-write",
            "usr/bin/xenstore-rm",
            "usr/bin/xenstore-chmod",
            "usr/bin/xenstore-ls",
            "usr/bin/xenstore-list",
            "sbin/ethtool",
            "usr/bin/openssl",
        ] {
            self.program(&mut tree, name)?;
        }
        // Called by its path: busybox's shell prefers its own.
        self.binary(&mut tree, "bin/ping", "usr/bin/ping")?;
        self.directory(&mut tree, &format!("usr/lib/{}/perl-base", self.arch.triple))?;
        tree.file("lab/agent", include_str!("../guest/agent"), true);
        for (name, text) in STEPS {
            tree.file(&format!("lab/{name}"), *text, true);
        }
        tree.file("etc/passwd", "root:x:0:0:root:/:/bin/sh\n", false);
        tree.file(
            "etc/protocols",
            "tcp 6 TCP\nudp 17 UDP\nicmp 1 ICMP\nipv6-icmp 58 IPv6-ICMP\n",
            false,
        );
        self.modules(&mut tree, modules)?;
        Ok(tree)
    }

    /// The file at a path of the unpacked packages, with links followed inside of them.
    fn real(&self, path: &str) -> Option<PathBuf> {
        let mut path = self.root.join(path);
        for _ in 0..8 {
            let Ok(target) = fs::read_link(&path) else { break };
            path = match target.strip_prefix("/") {
                Ok(absolute) => self.root.join(absolute),
                Err(_) => path.parent()?.join(target),
            };
        }
        path.is_file().then_some(path)
    }

    /// Adds a program and the libraries it needs.
    fn program(&self, tree: &mut Tree, path: &str) -> Result<()> {
        let loader = self.arch.loader;
        let real = self.real(loader).context("no dynamic loader among the packages")?;
        tree.copy(loader, &real)?;
        self.binary(tree, path, path)
    }

    fn binary(&self, tree: &mut Tree, from: &str, to: &str) -> Result<()> {
        let real = self.real(from).with_context(|| format!("no {from} among the packages"))?;
        let data = fs::read(&real)?;
        let needed = elf::needed(&data).with_context(|| format!("{from} is no program"))?;
        tree.file(to, data, true);
        for library in needed.iter().filter(|l| !l.starts_with("ld-linux")) {
            // The loader looks here without being told, wherever the package had it.
            let triple = self.arch.triple;
            let to = format!("usr/lib/{triple}/{library}");
            if tree.has(&to) {
                continue;
            }
            let from = ["lib", "usr/lib", "usr/lib/xen-4.17/lib"]
                .iter()
                .map(|d| format!("{d}/{triple}/{library}"))
                .find(|p| self.real(p).is_some())
                .with_context(|| format!("{from} needs {library}, which no package brought"))?;
            self.binary(tree, &from, &to)?;
        }
        Ok(())
    }

    fn directory(&self, tree: &mut Tree, path: &str) -> Result<()> {
        let real = self.root.join(path);
        let list = fs::read_dir(&real).with_context(|| format!("no {path} among the packages"))?;
        for entry in list {
            let entry = entry?;
            let inner = format!("{path}/{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                self.directory(tree, &inner)?;
            } else if let Some(file) = self.real(&inner) {
                tree.copy(&inner, &file)?;
            }
        }
        Ok(())
    }

    /// Adds kernel modules with those they depend on, and the `modules.dep` that modprobe reads.
    fn modules(&self, tree: &mut Tree, wanted: &[&str]) -> Result<()> {
        let base = format!("lib/modules/{}", self.version);
        let mut all = Vec::new();
        find_modules(&self.root.join(&base).join("kernel"), &mut all)?;
        let mut todo: Vec<String> = wanted.iter().map(|w| (*w).to_owned()).collect();
        let mut lines = String::new();
        let mut done = Vec::new();
        while let Some(name) = todo.pop() {
            if done.contains(&name) {
                continue;
            }
            let (path, data, depends) = read_module(&all, &name)?;
            let relative = |p: &Path| -> Result<String> {
                Ok(p.strip_prefix(self.root.join(&base))?.display().to_string())
            };
            lines.push_str(&format!("{}:", relative(&path)?));
            for depend in closure(&all, &depends)? {
                lines.push_str(&format!(" {}", relative(&depend)?));
            }
            lines.push('\n');
            tree.file(&format!("{base}/{}", relative(&path)?), data, false);
            todo.extend(depends);
            done.push(name);
        }
        tree.file(&format!("{base}/modules.dep"), lines, false);
        for name in ["modules.builtin", "modules.order"] {
            let from = self.root.join(&base).join(name);
            if from.exists() {
                tree.copy(&format!("{base}/{name}"), &from)?;
            }
        }
        Ok(())
    }
}

/// The packed kernel in a PC's kernel image, by the header of Linux's boot protocol.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let number = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let sectors = usize::from(*image.get(0x1f1)?);
    let start = (sectors + 1) * 512 + number(0x248)?;
    // The last four bytes are its unpacked size.
    image.get(start..start + number(0x24c)?.checked_sub(4)?)
}

fn unpacked(program: &str, packed: &Path) -> Result<Vec<u8>> {
    Ok(packages::run(Command::new(program).arg("-dc").arg(packed))?.stdout)
}

/// Xen 4.17's init-dom0less fails for guests with two vCPUs: it writes a store node whose name ends in a slash. It would
/// also say that the vCPU is offline, so the node gets a name that nobody reads.
fn repaired(mut program: Vec<u8>) -> Result<Vec<u8>> {
    let name = b"cpu/%u/availability/\0";
    let at = program
        .windows(name.len())
        .position(|w| w == name)
        .context("init-dom0less is not the one of Xen 4.17")?;
    if let Some(slash) = program.get_mut(at + name.len() - 2) {
        *slash = b'-';
    }
    Ok(program)
}

fn find_modules(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("no modules in {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            find_modules(&path, found)?;
        } else if path.extension().is_some_and(|e| e == "ko") {
            found.push(path);
        }
    }
    Ok(())
}

/// A module's path, contents and direct dependencies. Names are the same with `-` and `_`.
fn read_module(all: &[PathBuf], name: &str) -> Result<(PathBuf, Vec<u8>, Vec<String>)> {
    let plain = |n: &str| n.replace('-', "_");
    let path = all
        .iter()
        .find(|p| p.file_stem().is_some_and(|s| plain(&s.to_string_lossy()) == plain(name)))
        .with_context(|| format!("the kernel has no module {name}"))?;
    let data = fs::read(path)?;
    let info = elf::section(&data, ".modinfo")?.context("a module without .modinfo")?;
    let depends = info
        .split(|b| *b == 0)
        .filter_map(|line| std::str::from_utf8(line).ok()?.strip_prefix("depends="))
        .flat_map(|list| list.split(','))
        .filter(|n| !n.is_empty())
        .map(str::to_owned)
        .collect();
    Ok((path.clone(), data, depends))
}

/// All modules that these depend on, nearest first, as modules.dep wants them.
fn closure(all: &[PathBuf], names: &[String]) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = Vec::new();
    for name in names {
        let (path, _, depends) = read_module(all, name)?;
        for path in std::iter::once(path).chain(closure(all, &depends)?) {
            found.retain(|p| *p != path);
            found.push(path);
        }
    }
    Ok(found)
}

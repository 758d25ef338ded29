//! Builds the initramfs of the guests and of Linux as dom0 from unpacked packages.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use crate::cpio::Tree;
use crate::elf;
use crate::packages::{GUEST, LINUX_DOM0, Packages};
use crate::paths;
use crate::ui::Task;

/// What a boot needs, ready on disk.
pub struct Images {
    /// Debian's Xen.
    pub xen: PathBuf,
    /// Debian's kernel.
    pub linux: PathBuf,
    /// The guests' initramfs.
    pub guest: PathBuf,
    /// Linux dom0's initramfs, if it was asked for.
    pub linux_dom0: Option<PathBuf>,
}

macro_rules! embedded {
    ($($name:literal)*) => { [$(($name, include_str!(concat!("../guest/steps/", $name)))),*] };
}

/// The steps a guest can take, by name.
const STEPS: &[(&str, &str)] = &embedded!(
    "abuse" "at" "away" "bg" "bgend" "cnt" "crash" "feat" "file" "files" "filesum" "flow" "garbage" "get" "met" "net"
    "pings" "pour" "private" "reload" "renet" "settle" "sha" "state" "storetime" "stream" "streamed" "streamstop" "tcp"
    "udone" "up" "urecv" "usend"
);

const LIBRARIES: &[&str] = &[
    "lib/aarch64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib/xen-4.17/lib/aarch64-linux-gnu",
];

/// Fetches packages and builds images, whatever of it is not there yet.
pub fn prepare(with_linux_dom0: bool) -> Result<Images> {
    let packages = Packages::new("arm64")?;
    packages.fetch(GUEST)?;
    let version = packages.kernel()?;
    if with_linux_dom0 {
        packages.fetch(LINUX_DOM0)?;
    }
    let root = packages.root();
    let source = Source { root: root.clone(), version: version.clone() };
    let guest = store("guest", &source.guest()?)?;
    let linux_dom0 = with_linux_dom0.then(|| store("linux-dom0", &source.dom0()?)).transpose()?;
    Ok(Images {
        xen: root.join("boot/xen-4.17-arm64"),
        linux: root.join(format!("boot/vmlinuz-{version}")),
        guest,
        linux_dom0,
    })
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

struct Source {
    root: PathBuf,
    version: String,
}

impl Source {
    fn guest(&self) -> Result<Tree> {
        let mut tree = self.common(&["xen-netfront", "xenfs"])?;
        tree.file("init", include_str!("../guest/init"), true);
        Ok(tree)
    }

    fn dom0(&self) -> Result<Tree> {
        let mut tree = self.common(&[
            "xen-netback",
            "bridge",
            "xenfs",
            "xen-evtchn",
            "xen-gntdev",
            "xen-gntalloc",
            "xen-privcmd",
        ])?;
        for name in ["xenstored", "init-dom0less", "xen-init-dom0"] {
            self.program(&mut tree, &format!("usr/lib/xen-4.17/bin/{name}"))?;
        }
        let helper = "usr/lib/xen-4.17/bin/init-dom0less";
        let path = self.real(helper).context("no init-dom0less among the packages")?;
        tree.file(helper, repaired(fs::read(path)?)?, true);
        tree.file("init", include_str!("../guest/dom0-init"), true);
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
        self.directory(&mut tree, "usr/lib/aarch64-linux-gnu/perl-base")?;
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
        let loader = "lib/ld-linux-aarch64.so.1";
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
            let to = format!("usr/lib/aarch64-linux-gnu/{library}");
            if tree.has(&to) {
                continue;
            }
            let from = LIBRARIES
                .iter()
                .map(|d| format!("{d}/{library}"))
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

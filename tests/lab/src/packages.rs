//! Debian packages by name: downloaded and unpacked under `target/lab`, without touching the machine's own packages.
//! Only QEMU, which runs on the machine itself, is installed, and only if it is missing.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::paths;
use crate::ui::Task;

/// The packages of the guests.
pub const GUEST: &[&str] = &[
    "busybox-static",
    "libc6",
    "iperf3",
    "libiperf0",
    "libsctp1",
    "libssl3",
    "openssl",
    "xenstore-utils",
    "libxenstore4",
    "libxentoolcore1",
    "iputils-ping",
    "libcap2",
    "libidn2-0",
    "libunistring2",
    "ethtool",
    "libmnl0",
    "perl-base",
    "libcrypt1",
];

/// What Linux as dom0 needs beside them.
pub const LINUX_DOM0: &[&str] = &[
    "xen-utils-4.17",
    "libxenmisc4.17",
    "libxencall1",
    "libxendevicemodel1",
    "libxenevtchn1",
    "libxenforeignmemory1",
    "libxengnttab1",
    "libxenhypfs1",
    "libxentoollog1",
    "libuuid1",
    "libfdt1",
    "libyajl2",
    "zlib1g",
];

/// What it needs to start guests with xl.
pub const XL: &[&str] = &[
    "libbz2-1.0",
    "libext2fs2",
    "libgcc-s1",
    "libgcrypt20",
    "libgpg-error0",
    "liblzma5",
    "liblzo2-2",
    "libnl-3-200",
    "libnl-route-3-200",
    "libzstd1",
];

/// The Debian that the lab's packages are of.
const RELEASE: &str = "bookworm";

/// A place to unpack packages of one architecture.
pub struct Packages {
    arch: String,
    dir: PathBuf,
    /// The lists have been read by this program.
    updated: Cell<bool>,
}

/// Runs a command to its end; a failure names it and shows the end of what it said.
pub fn run(command: &mut Command) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {name}: is it installed?"))?;
    if !out.status.success() {
        let text = String::from_utf8_lossy(&out.stderr);
        let lines: Vec<_> = text.lines().rev().take(6).collect();
        let tail: Vec<_> = lines.into_iter().rev().collect();
        bail!("{name} failed ({}):\n{}", out.status, tail.join("\n"));
    }
    Ok(out)
}

fn on_debian() -> bool {
    Path::new("/etc/debian_version").exists() && paths::program("apt-get").is_some()
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout.starts_with(b"0\n"))
}

/// QEMU for arm64; installed if it is missing.
pub fn qemu_aarch64() -> Result<PathBuf> {
    qemu("qemu-system-aarch64", "qemu-system-arm")
}

/// QEMU for x86_64; installed if it is missing.
pub fn qemu_x86_64() -> Result<PathBuf> {
    qemu("qemu-system-x86_64", "qemu-system-x86")
}

fn qemu(name: &str, package: &str) -> Result<PathBuf> {
    if paths::program(name).is_none() {
        install(name, package)?;
    }
    paths::program(name).with_context(|| format!("{name} is still missing"))
}

/// What the host tests compare the wire formats with; installed if it is missing.
pub fn headers() -> Result<()> {
    if !Path::new("/usr/include/xen/xen.h").exists() {
        install("/usr/include/xen/xen.h", "libxen-dev")?;
    }
    Ok(())
}

/// What unpacks Debian's kernel; installed if it is missing.
pub fn xz() -> Result<()> {
    if paths::program("xz").is_none() {
        install("xz", "xz-utils")?;
    }
    Ok(())
}

/// What counts instructions; installed if it is missing.
pub fn valgrind() -> Result<()> {
    if paths::program("valgrind").is_none() {
        install("valgrind", "valgrind")?;
    }
    Ok(())
}

/// A C++ compiler, for the fuzzing engine; installed if it is missing.
pub fn cxx() -> Result<()> {
    if paths::program("c++").is_none() {
        install("a C++ compiler", "g++")?;
    }
    Ok(())
}

/// A program that something here is built with; its package is installed if it is missing.
pub fn tool(program: &str, package: &str) -> Result<()> {
    if paths::program(program).is_none() {
        install(program, package)?;
    }
    Ok(())
}

/// Downloads a source package of this machine's Debian into an empty directory, with package lists of its own.
pub fn download_source(name: &str, to: &Path) -> Result<()> {
    ensure!(on_debian(), "Xen's source comes from Debian: run it on Debian 12, or in a container");
    let task = Task::new(format!("downloading the source of {name}"));
    let packages = Packages::new("source")?;
    let lists = packages.dir.join("sources.list");
    fs::write(&lists, deb_src(&index_targets()?))?;
    let apt = || -> Result<Command> {
        let mut command = packages.apt("apt-get")?;
        command.arg("-o").arg(format!("Dir::Etc::SourceList={}", lists.display()));
        command.args(["-o", "Dir::Etc::SourceParts=/dev/null", "-q"]);
        Ok(command)
    };
    run(apt()?.arg("update"))?;
    run(apt()?.current_dir(to).args(["--download-only", "source", name]))?;
    task.done("downloaded");
    Ok(())
}

/// Where this machine's binary packages come from: lines of a place, a release and a component.
fn index_targets() -> Result<String> {
    let format = "$(REPO_URI) $(RELEASE) $(COMPONENT)";
    let out = run(Command::new("apt-get").args([
        "indextargets",
        "--format",
        format,
        "Created-By: Packages",
    ]))?;
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The same places as sources of source packages: of the release itself, as a patch is for one version, and mirrors of what
/// comes between releases often lack the sources.
fn deb_src(targets: &str) -> String {
    let is_release = |line: &&str| line.split(' ').skip(1).eq([RELEASE, "main"]);
    let mut lines: Vec<_> =
        targets.lines().filter(is_release).map(|line| format!("deb-src {line}\n")).collect();
    lines.dedup();
    lines.concat()
}

/// Installs a package of Debian on this machine, if that is possible.
fn install(missing: &str, package: &str) -> Result<()> {
    ensure!(
        on_debian() && is_root(),
        "{missing} is missing: install it (on Debian: apt-get install {package})"
    );
    let task = Task::new(format!("installing {package}"));
    run(Command::new("apt-get").args(["-q", "update"]))?;
    run(Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args([
        "-q",
        "-y",
        "--no-install-recommends",
        "install",
        package,
    ]))?;
    task.done("installed");
    Ok(())
}

impl Packages {
    /// The place for packages of Debian architecture `arch`: `target/lab/packages/ARCH`.
    pub fn new(arch: &str) -> Result<Self> {
        let dir = paths::directory(&format!("packages/{arch}"))?;
        Ok(Self { arch: arch.to_owned(), dir, updated: Cell::new(false) })
    }

    /// The tree they are unpacked into.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    fn stamp(&self, name: &str) -> PathBuf {
        self.dir.join("unpacked").join(name)
    }

    /// An apt command with lists and cache of its own, so that neither root nor a foreign architecture is needed.
    fn apt(&self, tool: &str) -> Result<Command> {
        let conf = self.dir.join("apt.conf");
        let dir = self.dir.join("apt");
        fs::create_dir_all(dir.join("state/lists/partial"))?;
        fs::create_dir_all(dir.join("cache/archives/partial"))?;
        fs::write(dir.join("state/status"), "")?;
        let (arch, dir) = (&self.arch, dir.display());
        fs::write(
            &conf,
            format!(
                "Dir::State \"{dir}/state\";\nDir::State::status \"{dir}/state/status\";\nDir::Cache \"{dir}/cache\";\n\
                 APT::Architecture \"{arch}\";\nAPT::Architectures \"{arch}\";\nAPT::Sandbox::User \"\";\n\
                 Acquire::Languages \"none\";\nAcquire::Retries \"3\";\nAcquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n"
            ),
        )?;
        let mut command = Command::new(tool);
        command.env("APT_CONFIG", &conf);
        Ok(command)
    }

    fn update(&self) -> Result<()> {
        if self.updated.get() {
            return Ok(());
        }
        ensure!(
            on_debian() && paths::program("dpkg-deb").is_some(),
            "the lab's packages come from Debian: run it on Debian 12, or in a Debian 12 container"
        );
        let task = Task::new(format!("reading Debian's package lists for {}", self.arch));
        // A list of some third party that fails does not matter; what matters shows at the download.
        let _ = self.apt("apt-get")?.args(["-q", "update"]).output();
        task.done("read");
        self.updated.set(true);
        Ok(())
    }

    /// Downloads and unpacks these packages, those that are not there yet.
    pub fn fetch(&self, names: &[&str]) -> Result<()> {
        let missing: Vec<_> = names.iter().copied().filter(|n| !self.stamp(n).exists()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.update()?;
        self.download(&missing)?;
        let task = Task::new(format!("unpacking {} packages", missing.len()));
        fs::create_dir_all(self.dir.join("unpacked"))?;
        let debs = files(&self.dir.join("debs"))?;
        for name in missing {
            task.detail(name);
            let start = format!("{name}_");
            let deb = debs
                .iter()
                .filter(|f| f.file_name().is_some_and(|f| f.to_string_lossy().starts_with(&start)))
                .max()
                .with_context(|| format!("apt-get did not download {name}"))?;
            run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(self.root()))?;
            fs::write(self.stamp(name), deb.display().to_string())?;
        }
        task.done("unpacked");
        Ok(())
    }

    /// Downloads with a bar of bytes.
    fn download(&self, names: &[&str]) -> Result<()> {
        let debs = self.dir.join("debs");
        fs::create_dir_all(&debs)?;
        let uris = run(self
            .apt("apt-get")?
            .current_dir(&debs)
            .args(["-qq", "--print-uris", "download"])
            .args(names))
        .context("a package is not in this machine's Debian (the lab needs Debian 12, bookworm)")?;
        let total = String::from_utf8_lossy(&uris.stdout)
            .lines()
            .filter_map(|l| l.split(' ').nth(2)?.parse::<u64>().ok())
            .sum();
        let before = size(&debs)?;
        let task = Task::bytes(format!("downloading {} packages", names.len()), total);
        let mut child = self
            .apt("apt-get")?
            .current_dir(&debs)
            .args(["-qq", "download"])
            .args(names)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        while child.try_wait()?.is_none() {
            std::thread::sleep(Duration::from_millis(200));
            task.at(size(&debs)?.saturating_sub(before));
        }
        let out = child.wait_with_output()?;
        ensure!(
            out.status.success(),
            "downloading packages failed; run the command again.\n{}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
        task.done(&format!("{} MB", total / 1_000_000));
        Ok(())
    }

    /// Downloads Debian's Rust with its source, for machines where rustup cannot install a target.
    pub fn rust(&self) -> Result<()> {
        if self.stamp("rust").exists() {
            return Ok(());
        }
        self.update()?;
        let std = self.depends("libstd-rust-web-dev", "libstd-rust-web-")?;
        let llvm = self.depends(&std, "libllvm")?;
        self.fetch(&["rustc-web", "rust-web-src", "libstd-rust-web-dev", &std, &llvm])?;
        fs::write(self.stamp("rust"), "")?;
        Ok(())
    }

    /// The first dependency of `package` whose name starts with `start`.
    fn depends(&self, package: &str, start: &str) -> Result<String> {
        let out = run(self.apt("apt-cache")?.args(["depends", package]))?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        text.lines()
            .filter_map(|l| l.trim().strip_prefix("Depends: "))
            .find(|n| n.starts_with(start))
            .map(|n| n.split(':').next().unwrap_or(n).to_owned())
            .with_context(|| format!("{package} depends on no {start}... package"))
    }

    /// Downloads the newest kernel of this architecture and returns its version.
    pub fn kernel(&self) -> Result<String> {
        if !self.stamp("linux-image").exists() {
            self.update()?;
            let name = self
                .depends(&format!("linux-image-{}", self.arch), "linux-image-")
                .context("cannot find Debian's kernel package")?;
            self.fetch(&[&name])?;
            fs::write(self.stamp("linux-image"), name)?;
        }
        let name = fs::read_to_string(self.stamp("linux-image"))?;
        Ok(name.trim_start_matches("linux-image-").to_owned())
    }
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    Ok(list.into_iter().map(|e| e.path()).collect())
}

fn size(dir: &Path) -> Result<u64> {
    // A file may be renamed between being listed and being looked at.
    Ok(files(dir)?.iter().filter_map(|f| fs::metadata(f).ok()).map(|m| m.len()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_where_packages_are() {
        let targets = "http://a/debian/ bookworm main\nhttp://a/debian/ bookworm main\nhttp://b/ bookworm-security main\n\
                       http://c/ cloud-sdk-bookworm main\nhttp://d/ bookworm extra\n";
        assert_eq!(deb_src(targets), "deb-src http://a/debian/ bookworm main\n");
    }
}

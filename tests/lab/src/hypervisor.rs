//! Which Xen the scenarios on Arm run on: Debian's, or one that is built here from Debian's source with the project's patch, which
//! puts `XENFEAT_grant_map_identity` back (`tests/lab/xen`).

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use sha2::{Digest as _, Sha256};

use crate::packages::{self, run};
use crate::paths;
use crate::ui::Task;

/// A Xen for Arm.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Xen {
    /// As Debian has it
    Debian,
    /// With grant_map_identity
    Identity,
    /// The same with Xen's own checks: nothing it complains of may be on its console
    Debug,
}

impl fmt::Display for Xen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Debian => "Debian's Xen",
            Self::Identity => "Xen with grant_map_identity",
            Self::Debug => "Xen with grant_map_identity, debug build",
        })
    }
}

/// The one that the scenarios run on now.
static CHOSEN: Mutex<Xen> = Mutex::new(Xen::Debian);

/// From here on the scenarios run on this one.
pub fn choose(xen: Xen) {
    *CHOSEN.lock().unwrap_or_else(PoisonError::into_inner) = xen;
}

/// The one that the scenarios run on.
pub fn chosen() -> Xen {
    *CHOSEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What Xen prints when something is wrong with it.
const COMPLAINTS: &[&str] =
    &["Assertion", "ASSERT", "WARN", "BUG", "Xen call trace", "Panic on CPU", "FATAL"];

/// Whether a line of Xen's is about something being wrong with it.
pub fn complains(line: &str) -> bool {
    COMPLAINTS.iter().any(|complaint| line.contains(complaint))
}

const PATCH: &str = include_str!("../xen/grant-map-identity.patch");
/// What makes and takes apart a source package, and what builds this one, beside the C compiler that built the lab.
const TOOLS: &[(&str, &str)] = &[
    ("dpkg-source", "dpkg-dev"),
    ("patch", "patch"),
    ("make", "make"),
    ("bison", "bison"),
    ("flex", "flex"),
    ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
];

impl Xen {
    /// The hypervisor itself; `debian` is the packaged one.
    pub fn image(self, debian: PathBuf) -> Result<PathBuf> {
        match self {
            Self::Debian => Ok(debian),
            Self::Identity => built("identity", &[]),
            Self::Debug => built("debug", &["CONFIG_DEBUG=y"]),
        }
    }

    /// Whether the first line that Xen prints is of this build: it ends with the settings and the date.
    pub fn is_this(self, banner: &str) -> bool {
        banner.starts_with("Xen version ") && banner.contains(" debug=y ") == (self == Self::Debug)
    }
}

/// A build with Xen's defaults and these settings, if what is there is not the same.
fn built(variant: &str, settings: &[&str]) -> Result<PathBuf> {
    let home = paths::directory("xen")?;
    let description = source(&home)?;
    let package = fs::read(&description)?;
    let source = Stamp::of(&[&package, PATCH.as_bytes()]);
    let tree = home.join("source");
    let out = home.join(variant);
    let stamp = Stamp::of(&[source.0.as_bytes(), settings.join("\n").as_bytes()]);
    let image = out.join("xen");
    if stamp.is_on(&out) && image.exists() {
        return Ok(image);
    }
    for (program, package) in TOOLS {
        packages::tool(program, package)?;
    }
    if !source.is_on(&tree) {
        let task = Task::new("unpacking and patching Xen's source");
        emptied(&tree)?;
        // It wants to make the directory itself.
        run(Command::new("dpkg-source").arg("-x").arg(&description).arg(&tree))?;
        let patch = home.join("patch");
        fs::write(&patch, PATCH)?;
        run(Command::new("patch").arg("-p1").arg("-d").arg(&tree).arg("-i").arg(&patch))
            .context("the patch in tests/lab/xen does not apply to this machine's Xen")?;
        source.put(&tree)?;
        task.done("patched");
    }
    let task = Task::new(format!("building Xen ({variant})"));
    emptied(&out)?;
    fs::create_dir(&out)?;
    make(&tree, &out, "arm64_defconfig")?;
    if !settings.is_empty() {
        let config = out.join(".config");
        let text = fs::read_to_string(&config)? + &settings.join("\n") + "\n";
        fs::write(&config, text)?;
        make(&tree, &out, "olddefconfig")?;
        let text = fs::read_to_string(&config)?;
        let lacks = settings.iter().find(|setting| !text.lines().any(|line| line == **setting));
        ensure!(lacks.is_none(), "Xen cannot be built with {}", lacks.copied().unwrap_or_default());
    }
    make(&tree, &out, "xen")?;
    stamp.put(&out)?;
    task.done(&format!("{} KiB", fs::metadata(&image)?.len() / 1024));
    Ok(image)
}

/// Debian's description of its source package, downloaded with all that it names.
fn source(home: &Path) -> Result<PathBuf> {
    let to = home.join("package");
    let found = || -> Option<PathBuf> {
        let mut files = fs::read_dir(&to).ok()?.flatten().map(|entry| entry.path());
        files.find(|path| path.extension().is_some_and(|end| end == "dsc"))
    };
    if found().is_none() {
        // Its parts come before it is known to be whole.
        let part = home.join("package.part");
        emptied(&part)?;
        fs::create_dir(&part)?;
        packages::download_source("xen", &part)?;
        emptied(&to)?;
        fs::rename(&part, &to)?;
    }
    found().context("apt-get downloaded no source package")
}

fn make(tree: &Path, out: &Path, target: &str) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut command = Command::new("make");
    command.arg("-C").arg(tree.join("xen")).arg(format!("O={}", out.display()));
    command.args(["XEN_TARGET_ARCH=arm64", "CROSS_COMPILE=aarch64-linux-gnu-", "-j"]);
    run(command.arg(jobs.to_string()).arg(target)).context("Xen does not build").map(|_| ())
}

fn emptied(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("cannot empty {}", path.display()))?;
    }
    Ok(())
}

/// What something was made from; kept beside it, to know it by.
struct Stamp(String);

impl Stamp {
    fn of(parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn file(dir: &Path) -> PathBuf {
        dir.join(".made-from")
    }

    fn is_on(&self, dir: &Path) -> bool {
        fs::read_to_string(Self::file(dir)).is_ok_and(|text| text == self.0)
    }

    fn put(&self, dir: &Path) -> Result<()> {
        Ok(fs::write(Self::file(dir), &self.0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_told_from_the_rest() {
        assert!(complains("Assertion 'rc <= 0' failed at common/grant_table.c:3639"));
        assert!(complains("Xen WARN at common/page_alloc.c:412"));
        assert!(complains("Xen BUG at arch/arm/p2m.c:1"));
        assert!(complains("Xen call trace:"));
        assert!(complains("Panic on CPU 1:"));
        assert!(!complains("grant_map_identity: withdrawn"));
    }

    #[test]
    fn the_debug_build_is_told_by_its_first_line() {
        let banner = |debug| format!("Xen version 4.17.5 (Debian ) (gcc 12.2.0) debug={debug} Mon");
        assert!(Xen::Debug.is_this(&banner("y")) && Xen::Debian.is_this(&banner("n")));
        assert!(!Xen::Debug.is_this(&banner("n")) && !Xen::Identity.is_this(&banner("y")));
        assert!(!Xen::Debian.is_this("Xen call trace:"));
    }

    #[test]
    fn a_stamp_is_of_its_parts_and_of_where_they_end() {
        let of = |parts: &[&[u8]]| Stamp::of(parts).0;
        assert_eq!(of(&[b"ab", b"c"]), of(&[b"ab", b"c"]));
        assert_ne!(of(&[b"ab", b"c"]), of(&[b"a", b"bc"]));
    }
}

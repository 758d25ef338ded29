//! Building for bare metal: with the active compiler if it has the target, else with Debian's, which comes with its source.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::elf;
use crate::packages::{Packages, run};
use crate::paths;
use crate::ui::Task;

/// Arm's 64 bits.
pub const AARCH64: &str = "aarch64-unknown-none";
/// The PC's 64 bits.
pub const X86_64: &str = "x86_64-unknown-none";
/// All images: the package and the target.
pub const IMAGES: &[(&str, &str)] =
    &[("dom0", AARCH64), ("driver-domain", X86_64), ("guest", AARCH64), ("guest", X86_64)];
/// No image may be larger.
pub const IMAGE_LIMIT: u64 = 2 << 20;

/// How to build for bare metal on this machine.
pub enum Toolchain {
    /// The active toolchain has the target.
    Active,
    /// Debian's compiler with its source.
    Debian {
        /// A program to be called as rustc.
        rustc: PathBuf,
        /// The linker of the active toolchain.
        linker: PathBuf,
    },
}

/// What rustc says about itself.
fn rustc(argument: &[&str]) -> Result<String> {
    let out = run(Command::new("rustc").current_dir(paths::workspace()).args(argument))?;
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

impl Toolchain {
    /// Finds or fetches what builds for a target.
    pub fn find(target: &str) -> Result<Self> {
        let sysroot = PathBuf::from(rustc(&["--print", "sysroot"])?);
        let libraries = sysroot.join("lib/rustlib");
        if libraries.join(target).join("lib").is_dir() {
            return Ok(Self::Active);
        }
        let may_install = std::env::var("RUSTUP_AUTO_INSTALL").as_deref() != Ok("0");
        if may_install && paths::program("rustup").is_some() {
            let task = Task::new(format!("rustup target add {target}"));
            let added = run(Command::new("rustup")
                .current_dir(paths::workspace())
                .args(["target", "add", target]));
            if added.is_ok() && libraries.join(target).join("lib").is_dir() {
                task.done("added");
                return Ok(Self::Active);
            }
        }
        let verbose = rustc(&["-vV"])?;
        let host = verbose
            .lines()
            .find_map(|l| l.strip_prefix("host: "))
            .context("rustc does not name its host")?;
        let linker = libraries.join(host).join("bin/rust-lld");
        ensure!(
            linker.exists() && Path::new("/etc/debian_version").exists(),
            "the Rust target {target} is missing: rustup target add {target}"
        );
        Ok(Self::Debian { rustc: debian_rustc()?, linker })
    }

    /// A cargo command for a target, with warnings as errors if so wanted.
    pub fn cargo(&self, subcommand: &str, target: &str, deny: bool) -> Command {
        let mut cargo = Command::new("cargo");
        let name = target.to_uppercase().replace('-', "_");
        cargo.current_dir(paths::workspace()).args([subcommand, "--target", target]);
        cargo.env("CARGO_TARGET_DIR", paths::lab().join("cargo"));
        // Joined with what .cargo/config.toml has for the target.
        let flags = format!("CARGO_TARGET_{name}_RUSTFLAGS");
        if deny {
            cargo.env(flags, "-D warnings");
        } else if target == AARCH64 {
            // The target assumes that there may be no MMU, and puts each number that could be unaligned together from bytes. Here
            // the MMU is on before anything else. Not in .cargo/config.toml, as rustc says at each crate that it knows no such name.
            cargo.env(flags, "-C target-feature=-strict-align");
        }
        if let Self::Debian { rustc, linker } = self {
            cargo
                .env("RUSTC", rustc)
                .env("RUSTC_BOOTSTRAP", "1")
                .env(format!("CARGO_TARGET_{name}_LINKER"), linker)
                .args(["-Zbuild-std=core,alloc,compiler_builtins"])
                .args(["-Zbuild-std-features=compiler-builtins-mem"]);
        }
        cargo
    }
}

/// Debian's compiler, unpacked, behind a script that tells it where its things are.
fn debian_rustc() -> Result<PathBuf> {
    let out = run(Command::new("dpkg").arg("--print-architecture"))?;
    let packages = Packages::new(String::from_utf8_lossy(&out.stdout).trim())?;
    packages.rust()?;
    let root = packages.root();
    let libraries = fs::read_dir(root.join("usr/lib"))?
        .filter_map(Result::ok)
        .map(|e| e.path())
        .find(|p| p.is_dir() && p.to_string_lossy().ends_with("-linux-gnu"))
        .context("Debian's Rust has no libraries")?;
    let script = paths::directory("toolchain")?.join("rustc");
    let text = format!(
        "#!/bin/sh\nLD_LIBRARY_PATH={} exec {}/usr/bin/rustc --sysroot {}/usr \"$@\"\n",
        libraries.display(),
        root.display(),
        root.display()
    );
    // Written only if it differs: cargo builds anew when its compiler is newer.
    if fs::read_to_string(&script).unwrap_or_default() != text {
        fs::write(&script, text)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    }
    Ok(script)
}

/// Builds an image and returns where it is.
pub fn image(package: &str, target: &str) -> Result<PathBuf> {
    let toolchain = Toolchain::find(target)?;
    let arch = target.split('-').next().unwrap_or(target);
    let task = Task::new(format!("building {package} for {arch}"));
    let out = toolchain
        .cargo("build", target, false)
        .args(["--profile", "image", "--package", package])
        .stdin(Stdio::null())
        .output()
        .context("cannot run cargo")?;
    if !out.status.success() {
        bail!("{package} does not build:\n{}", String::from_utf8_lossy(&out.stderr));
    }
    let program = paths::lab().join("cargo").join(target).join("image").join(package);
    let program = fs::read(&program)?;
    let image = match target {
        AARCH64 => arm64_image(&program),
        // What xl loads is the program itself.
        _ => elf::loadable(&program),
    };
    let image = image.with_context(|| format!("{package}'s program is odd"))?;
    let path = paths::directory("images")?.join(format!("{package}-{arch}.img"));
    fs::write(&path, &image)?;
    task.done(&format!("{} KiB", image.len() / 1024));
    Ok(path)
}

/// The load segments of a program, which begin with an arm64 Image's header.
fn arm64_image(program: &[u8]) -> Result<Vec<u8>> {
    let image = elf::flat(program)?;
    ensure!(image.get(0x38..0x3c) == Some(b"ARM\x64"), "no arm64 Image header");
    Ok(image)
}

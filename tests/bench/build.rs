//! Compiles the peer in C where there is a C compiler and Xen's headers; `cfg(ring_h)` says so.

use std::path::Path;
use std::process::Command;

const HEADER: &str = "/usr/include/xen/io/netif.h";
const SOURCE: &str = "csrc/ring_h.c";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(ring_h)");
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed={HEADER}");
    let compiler = cc::Build::new().try_get_compiler().map(|found| found.path().to_owned());
    let runs = |path: &Path| Command::new(path).arg("--version").output().is_ok();
    if Path::new(HEADER).exists() && compiler.is_ok_and(|path| runs(&path)) {
        // As Rust code is in a release build, for the same processors.
        let mut build = cc::Build::new();
        build
            .file(SOURCE)
            .opt_level(3)
            .warnings(true)
            .flag("-Werror=implicit-function-declaration");
        if build.try_compile("ring_h").is_ok() {
            println!("cargo::rustc-cfg=ring_h");
        }
    }
}

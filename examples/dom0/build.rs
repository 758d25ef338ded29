//! Tells the linker how an image for bare metal is laid out.

use std::env;
use std::path::Path;

fn main() {
    let of = |name: &str| env::var(name).unwrap_or_default();
    let script = Path::new(&of("CARGO_MANIFEST_DIR"))
        .join(format!("../runtime/link-{}.ld", of("CARGO_CFG_TARGET_ARCH")));
    println!("cargo:rerun-if-changed={}", script.display());
    if of("CARGO_CFG_TARGET_OS") == "none" && script.exists() {
        let script = format!("-T{}", script.display());
        for argument in
            [&*script, "-pie", "--no-dynamic-linker", "-znorelro", "-zmax-page-size=4096"]
        {
            println!("cargo:rustc-link-arg-bins={argument}");
        }
    }
}

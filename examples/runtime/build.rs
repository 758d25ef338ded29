//! Tells the linker where the layouts of images are: which one it takes is in `.cargo/config.toml`.

use std::env;

fn main() {
    let folder = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo:rustc-link-search={folder}");
    for processor in ["aarch64", "x86_64"] {
        println!("cargo:rerun-if-changed={folder}/link-{processor}.ld");
    }
}

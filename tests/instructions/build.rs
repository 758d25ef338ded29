//! Compiles the peer in C where Xen's headers and a C compiler are.

use std::path::Path;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(peer)");
    println!("cargo::rerun-if-changed=benches/peer.c");
    let header = "/usr/include/xen/io/netif.h";
    println!("cargo::rerun-if-changed={header}");
    if !Path::new(header).exists() {
        return;
    }
    let mut peer = cc::Build::new();
    // As good as the C compiler makes it, whatever this crate is built with.
    peer.file("benches/peer.c")
        .std("gnu11")
        .define("__XEN_TOOLS__", None)
        .opt_level(2)
        .debug(true)
        .warnings_into_errors(true);
    if peer.try_compile("peer").is_ok() {
        println!("cargo::rustc-cfg=peer");
    }
}

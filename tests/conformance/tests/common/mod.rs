//! Compiles C against Xen's headers.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Says what is missing, before the includes that need it.
const NEEDS: &str = "\
#if !__has_include(<xen/io/netif.h>) || !__has_include(<xen/domctl.h>)
#error \"no Xen headers: apt-get install libxen-dev\"
#endif
#define xen_mb() __sync_synchronize()
#define xen_rmb() __sync_synchronize()
#define xen_wmb() __sync_synchronize()
";

/// A folder of this test program alone.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("conformance-{}", std::process::id()))
}

pub fn path(name: &str) -> PathBuf {
    std::fs::create_dir_all(folder()).unwrap();
    folder().join(name)
}

/// Compiles a program, or checks it if `output` is none.
pub fn compile(name: &str, source: &str, output: Option<&Path>, flags: &[&str]) {
    let file = path(&format!("{name}.c"));
    std::fs::write(&file, format!("{NEEDS}{source}")).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-Wall", "-Werror", "-O2", "-D__XEN_TOOLS__"]).args(flags).arg(&file);
    if let Some(output) = output {
        cc.arg("-o").arg(output);
    }
    let done = cc.output().expect("no C compiler: apt-get install gcc");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

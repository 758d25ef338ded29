//! All vifs as a table, for people at the console and for scripts that read it there.

use alloc::string::String;
use core::fmt::{self, Write as _};

use netback::Backend;
use runtime::Hv;

/// A line per vif.
pub(crate) fn table(backend: &Backend<Hv>) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(&mut text, backend);
    text
}

fn write_all(text: &mut String, backend: &Backend<Hv>) -> fmt::Result {
    writeln!(text, "vif      state         queues  features")?;
    for vif in backend.vifs() {
        let id = alloc::format!("{}.{}", vif.id.domain, vif.id.handle);
        let state = alloc::format!("{:?}", vif.state);
        writeln!(text, "{id:<8} {state:<13} {:>6}  {}", vif.queues, vif.features)?;
    }
    Ok(())
}

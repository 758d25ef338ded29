//! QEMU's monitor, over a unix socket: one JSON object per line each way.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// A connected monitor.
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects, waiting up to ten seconds for QEMU to open its socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let end = Instant::now() + Duration::from_secs(10);
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(50)),
                Err(error) => return Err(error).context("cannot connect to QEMU's monitor"),
            }
        };
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut qmp = Self { reader: BufReader::new(stream) };
        qmp.line()?;
        qmp.ask(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("QEMU's monitor does not answer")? == 0 {
            bail!("QEMU's monitor is closed");
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn ask(&mut self, request: &Value) -> Result<()> {
        let mut line = request.to_string();
        line.push('\n');
        self.reader.get_mut().write_all(line.as_bytes())?;
        loop {
            let answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused: {error}");
            }
            if answer.get("return").is_some() {
                return Ok(());
            }
        }
    }

    /// Ends an object that QEMU was started with.
    pub fn delete_object(&mut self, id: &str) -> Result<()> {
        self.ask(&json!({ "execute": "object-del", "arguments": { "id": id } }))
    }

    /// Writes a piece of the machine's physical memory to a file.
    pub fn save_memory(&mut self, at: u64, size: u64, file: &Path) -> Result<()> {
        self.ask(&json!({
            "execute": "pmemsave",
            "arguments": { "val": at, "size": size, "filename": file }
        }))
    }
}

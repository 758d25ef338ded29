//! Writes an initramfs: a cpio archive in the "newc" format, which Linux unpacks by itself.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};

enum Entry {
    Directory,
    File { data: Vec<u8>, executable: bool },
    Link(String),
}

/// A file tree being gathered; directories above a file come by themselves.
#[derive(Default)]
pub struct Tree {
    entries: BTreeMap<String, Entry>,
}

impl Tree {
    /// Adds an empty directory and those above it.
    pub fn directory(&mut self, path: &str) {
        let mut at = String::new();
        for part in path.split('/').filter(|p| !p.is_empty()) {
            if !at.is_empty() {
                at.push('/');
            }
            at.push_str(part);
            self.entries.entry(at.clone()).or_insert(Entry::Directory);
        }
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        let path = path.trim_start_matches('/');
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above);
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Adds a file from memory.
    pub fn file(&mut self, path: &str, data: impl Into<Vec<u8>>, executable: bool) {
        self.insert(path, Entry::File { data: data.into(), executable });
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.insert(path, Entry::Link(target.to_owned()));
    }

    /// Adds a file of this machine, with its executable bit; symbolic links are followed.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let executable = fs::metadata(from)?.permissions().mode() & 0o111 != 0;
        self.file(path, data, executable);
        Ok(())
    }

    /// Whether something is at this path already.
    pub fn has(&self, path: &str) -> bool {
        self.entries.contains_key(path.trim_start_matches('/'))
    }

    /// The archive.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        for (number, (path, entry)) in self.entries.iter().enumerate() {
            let (mode, data): (u32, &[u8]) = match entry {
                Entry::Directory => (0o040_755, &[]),
                Entry::File { data, executable: true } => (0o100_755, data),
                Entry::File { data, executable: false } => (0o100_644, data),
                Entry::Link(target) => (0o120_777, target.as_bytes()),
            };
            record(&mut out, number + 1, mode, path, data)?;
        }
        record(&mut out, 0, 0, "TRAILER!!!", &[])?;
        Ok(out)
    }
}

fn record(out: &mut Vec<u8>, inode: usize, mode: u32, name: &str, data: &[u8]) -> Result<()> {
    let (size, name_size) = (data.len(), name.len() + 1);
    // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    write!(
        out,
        "070701{inode:08X}{mode:08X}{0:08X}{0:08X}{1:08X}{0:08X}{size:08X}{0:08X}{0:08X}{0:08X}{0:08X}{name_size:08X}{0:08X}{name}\0",
        0, 1
    )?;
    pad(out);
    out.extend_from_slice(data);
    pad(out);
    Ok(())
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_what_is_in_them() {
        let mut tree = Tree::default();
        tree.file("/a/b/c", "text", true);
        let bytes = tree.archive().unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let places: Vec<_> =
            ["a\0", "a/b\0", "a/b/c\0", "TRAILER!!!"].map(|n| text.find(n).unwrap()).to_vec();
        assert!(places.is_sorted());
        assert_eq!(bytes.len() % 4, 0);
        assert!(text.contains("000081ED"), "mode of an executable file");
    }
}

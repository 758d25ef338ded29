//! As much of ELF (64-bit, little-endian) as the lab needs: load segments, needed libraries, sections.

use anyhow::{Context as _, Result, bail, ensure};

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;

/// Reads a little-endian number of up to eight bytes.
fn number(bytes: &[u8], at: u64, size: usize) -> Result<u64> {
    let at = usize::try_from(at)?;
    let part = bytes.get(at..at + size).context("truncated ELF file")?;
    Ok(part.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
}

fn text(bytes: &[u8], at: u64) -> Result<&str> {
    let rest = bytes.get(usize::try_from(at)?..).context("truncated ELF file")?;
    let end = rest.iter().position(|b| *b == 0).context("unterminated name in an ELF file")?;
    Ok(std::str::from_utf8(rest.get(..end).unwrap_or_default())?)
}

struct Segment {
    kind: u32,
    offset: u64,
    virt: u64,
    phys: u64,
    file_size: u64,
    memory_size: u64,
}

fn segments(elf: &[u8]) -> Result<Vec<Segment>> {
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit little-endian ELF file");
    let (table, size, count) = (number(elf, 32, 8)?, number(elf, 54, 2)?, number(elf, 56, 2)?);
    (0..count)
        .map(|i| {
            let at = table + i * size;
            Ok(Segment {
                kind: u32::try_from(number(elf, at, 4)?)?,
                offset: number(elf, at + 8, 8)?,
                virt: number(elf, at + 16, 8)?,
                phys: number(elf, at + 24, 8)?,
                file_size: number(elf, at + 32, 8)?,
                memory_size: number(elf, at + 40, 8)?,
            })
        })
        .collect()
}

/// The memory image of the load segments, from the lowest physical address to the end of the last byte in the file.
pub fn flat(elf: &[u8]) -> Result<Vec<u8>> {
    let load: Vec<_> =
        segments(elf)?.into_iter().filter(|s| s.kind == PT_LOAD && s.memory_size > 0).collect();
    let Some(base) = load.iter().map(|s| s.phys).min() else { bail!("nothing to load in it") };
    let mut image = Vec::new();
    for s in load.iter().filter(|s| s.file_size > 0) {
        let (from, size) = (usize::try_from(s.offset)?, usize::try_from(s.file_size)?);
        let data = elf.get(from..from + size).context("truncated ELF file")?;
        let at = usize::try_from(s.phys - base)?;
        ensure!(at < 1 << 30, "load segments are more than 1 GiB apart");
        if image.len() < at + size {
            image.resize(at + size, 0);
        }
        if let Some(place) = image.get_mut(at..at + size) {
            place.copy_from_slice(data);
        }
    }
    Ok(image)
}

/// The program as far as it is loaded: without symbols and debug information, which lie behind the segments.
pub fn loadable(elf: &[u8]) -> Result<Vec<u8>> {
    let ends = segments(elf)?.into_iter().map(|s| s.offset.checked_add(s.file_size));
    let end = ends.max().flatten().context("no segments in an ELF file")?;
    let mut kept = elf.get(..usize::try_from(end)?).context("truncated ELF file")?.to_vec();
    // Where the table of sections was, the size of its entries, their number, and which has their names.
    for (at, size) in [(40, 8), (58, 6)] {
        kept.get_mut(at..at + size).context("truncated ELF file")?.fill(0);
    }
    Ok(kept)
}

/// The names of the shared libraries a program or library needs.
pub fn needed(elf: &[u8]) -> Result<Vec<String>> {
    let all = segments(elf)?;
    let Some(dynamic) = all.iter().find(|s| s.kind == PT_DYNAMIC) else { return Ok(Vec::new()) };
    let entries = (0..dynamic.file_size / 16)
        .map(|i| {
            let at = dynamic.offset + i * 16;
            Ok((number(elf, at, 8)?, number(elf, at + 8, 8)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let Some((_, names)) = entries.iter().find(|(tag, _)| *tag == DT_STRTAB) else {
        return Ok(Vec::new());
    };
    let home = all
        .iter()
        .find(|s| s.kind == PT_LOAD && (s.virt..s.virt + s.file_size).contains(names))
        .context("an ELF file's names are outside of it")?;
    let names = names - home.virt + home.offset;
    entries
        .iter()
        .filter(|(tag, _)| *tag == DT_NEEDED)
        .map(|(_, offset)| Ok(text(elf, names + offset)?.to_owned()))
        .collect()
}

/// The contents of a section, if there is one of that name.
pub fn section<'a>(elf: &'a [u8], name: &str) -> Result<Option<&'a [u8]>> {
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit little-endian ELF file");
    let (table, size, count) = (number(elf, 40, 8)?, number(elf, 58, 2)?, number(elf, 60, 2)?);
    let names = number(elf, table + number(elf, 62, 2)? * size + 24, 8)?;
    for at in (0..count).map(|i| table + i * size) {
        if text(elf, names + number(elf, at, 4)?)? == name {
            let from = usize::try_from(number(elf, at + 24, 8)?)?;
            let length = usize::try_from(number(elf, at + 32, 8)?)?;
            return Ok(elf.get(from..from + length));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_needs_the_c_library() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(needed(&own).unwrap().iter().any(|n| n.starts_with("libc.")));
        assert!(section(&own, ".text").unwrap().unwrap().len() > 1000);
        assert!(flat(&own).unwrap().starts_with(b"\x7fELF"));
        assert!(section(&own, ".no-such-section").unwrap().is_none());
        let kept = loadable(&own).unwrap();
        assert!(kept.len() < own.len() && needed(&kept).unwrap() == needed(&own).unwrap());
        assert!(section(&kept, ".text").unwrap().is_none());
    }

    #[test]
    fn a_cut_file_is_an_error() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(flat(&own[..70]).is_err());
        assert!(needed(b"#!/bin/sh\n").is_err());
    }
}

//! What two vifs have in the store, compared key for key.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::run::Run;

/// A key that only one of two has, and why that is right.
pub type Allowed = (&'static str, &'static str);

/// The nodes of a vif's end, `back` or `front`; they are kept as a file.
pub fn of(run: &Run, domain: usize, end: &str, label: &str) -> Result<Vec<String>> {
    let answer = run.good(0, &format!("vif {domain} {end}"), 60)?;
    let file = run.dir().join(format!("store-{label}-{end}.txt"));
    fs::write(&file, answer.lines.join("\n") + "\n").context("cannot keep the store's nodes")?;
    Ok(answer.lines)
}

/// The keys of `KEY = "VALUE"` lines; a line that was folded has its key in its first part.
fn keys(lines: &[String]) -> BTreeSet<&str> {
    lines.iter().filter_map(|line| line.split_once(" = ")).map(|(key, _)| key).collect()
}

/// Compares the keys that ours has with Linux's; `more` and `less` are what ours may have beside and may lack. An allowed
/// difference that is none any more is an error, too.
pub fn compare(
    ours: &[String],
    linux: &[String],
    more: &[Allowed],
    less: &[Allowed],
) -> Result<String> {
    let (ours, linux) = (keys(ours), keys(linux));
    let only = |some: &BTreeSet<&str>, others: &BTreeSet<&str>| -> BTreeSet<String> {
        some.difference(others).map(|key| (*key).to_owned()).collect()
    };
    let (beside, lacking) = (only(&ours, &linux), only(&linux, &ours));
    let allowed = |list: &[Allowed]| -> BTreeSet<String> {
        list.iter().map(|(k, _)| (*k).to_owned()).collect()
    };
    let (more, less) = (allowed(more), allowed(less));
    let text = |keys: &BTreeSet<String>| keys.iter().cloned().collect::<Vec<_>>().join(" ");
    ensure!(ours.len() > 5 && linux.len() > 5, "too few nodes: {ours:?}, {linux:?}");
    for (what, found, allowed) in
        [("only ours has", &beside, &more), ("only Linux's has", &lacking, &less)]
    {
        let odd: BTreeSet<_> = found.difference(allowed).cloned().collect();
        ensure!(odd.is_empty(), "{what} {}", text(&odd));
        let gone: BTreeSet<_> = allowed.difference(found).cloned().collect();
        ensure!(gone.is_empty(), "no longer true that {what} {}", text(&gone));
    }
    let common = ours.intersection(&linux).count();
    Ok(format!(
        "{common} in common; only ours has [{}], only Linux's [{}]",
        text(&beside),
        text(&lacking)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_those_that_are_allowed() {
        let lines = |keys: &[&str]| -> Vec<String> {
            let common = ["a", "b", "c", "d", "e"];
            common.iter().chain(keys).map(|key| format!("{key} = \"1\"")).collect()
        };
        let (ours, linux) = (lines(&["x"]), lines(&["y", "z/1"]));
        let more: &[Allowed] = &[("x", "why")];
        let less: &[Allowed] = &[("y", "why"), ("z/1", "why")];
        assert!(compare(&ours, &linux, more, less).is_ok());
        let error = |more, less| compare(&ours, &linux, more, less).unwrap_err().to_string();
        assert_eq!(error(&[], less), "only ours has x");
        assert_eq!(error(more, &less[..1]), "only Linux's has z/1");
        assert_eq!(error(&[more[0], ("a", "why")], less), "no longer true that only ours has a");
        assert!(compare(&ours, &[], more, less).is_err());
    }
}

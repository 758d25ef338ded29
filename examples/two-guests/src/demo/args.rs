//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;
use two_guests::{Board, Lever, Misdeed};

/// Two guests pull checksummed streams from each other and from outside, through a backend from which Xen's features and its
/// own datapaths are taken under traffic, and to which they are given back. All in this process, on a simulated Xen.
#[derive(Parser, Debug)]
#[command(name = "cargo lab demo", bin_name = "cargo lab demo")]
pub struct Args {
    /// How long it runs
    #[arg(long, default_value = "10", value_name = "SECONDS", value_parser = seconds)]
    pub seconds: f64,
    /// Who has a turn when, and what packets are like
    #[arg(long, default_value = "1")]
    pub seed: u64,
    /// Take something away: a XENFEAT bit by number or name, or a datapath (direct, map, map-identity, static), so many
    /// seconds after the start. Without any of these there is a schedule that goes through them all
    #[arg(long, value_name = "BIT@T")]
    pub withdraw: Vec<At>,
    /// Give it back
    #[arg(long, value_name = "BIT@T")]
    pub restore: Vec<At>,
    /// Write everything that was measured to a file
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// Draw throughput over time
    #[arg(long, value_name = "PATH", default_value = "target/lab/demo/throughput.svg")]
    pub svg: PathBuf,
    /// What it runs on: arm-2014 (bit 12, and no cache flush by Xen), arm (cache flush), or server (x86, an IOMMU)
    #[arg(long, value_name = "BOARD", default_value = "arm-2014", value_parser = board)]
    pub board: Board,
    /// Have somebody in the first guest drop, duplicate, reorder or corrupt frames, to see that it is noticed
    #[arg(long, value_name = "HOW", value_parser = misdeed)]
    pub sabotage: Option<Misdeed>,
}

/// Something, and when.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct At {
    pub lever: Lever,
    /// In seconds.
    pub when: f64,
}

impl FromStr for At {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (what, when) = text.rsplit_once('@').ok_or("there is no @: it is BIT@SECONDS")?;
        let lever = what.parse().map_err(|error| format!("{error}"))?;
        let when = when.parse::<f64>().ok().filter(|when| when.is_finite() && *when >= 0.0);
        Ok(Self { lever, when: when.ok_or("after the @ belongs a time in seconds")? })
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().map_err(|error| error.to_string())?;
    let fit = (0.5..=3600.0).contains(&seconds);
    if fit { Ok(seconds) } else { Err("it is half a second to an hour".into()) }
}

fn named<T: Copy>(all: &[(&str, T)], text: &str) -> Result<T, String> {
    let found = all.iter().find(|(name, _)| *name == text);
    found.map(|(_, thing)| *thing).ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|(name, _)| *name).collect();
        format!("it is one of {}", names.join(", "))
    })
}

fn misdeed(text: &str) -> Result<Misdeed, String> {
    named(&Misdeed::ALL, text)
}

fn board(text: &str) -> Result<Board, String> {
    named(&Board::ALL, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_understood_or_explained() {
        let parse = |flags: &[&str]| Args::try_parse_from(["demo"].iter().chain(flags));
        let args = parse(&["--withdraw", "12@1.5", "--restore", "direct@3", "--seed", "7"]);
        let Ok(args) = args else { panic!("{args:?}") };
        assert_eq!(args.withdraw.first().map(|at| at.when), Some(1.5));
        assert_eq!(args.restore.first().map(|at| at.lever.to_string()), Some("direct".into()));
        for (flags, hint) in [
            (["--withdraw", "12"], "@"),
            (["--withdraw", "mop@1"], "mop"),
            (["--restore", "12@soon"], "seconds"),
            (["--seconds", "0"], "half a second"),
            (["--sabotage", "sing"], "duplicate"),
            (["--board", "toast"], "arm-2014"),
        ] {
            let error = parse(&flags).map_err(|error| error.to_string());
            assert!(error.as_ref().is_err_and(|text| text.contains(hint)), "{flags:?}: {error:?}");
        }
    }
}

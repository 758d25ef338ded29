//! What iperf3 and ping say in a guest.

use anyhow::{Context as _, Result, ensure};

/// What arrived, by the receiver's own word.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Arrived {
    /// How long it took.
    pub seconds: f64,
    /// The payload.
    pub bytes: f64,
    /// Of UDP, what was sent and what was lost of it.
    pub datagrams: Option<Datagrams>,
}

/// Datagrams, as the receiver counted them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Datagrams {
    /// Sent.
    pub sent: f64,
    /// Of these.
    pub lost: f64,
}

impl Arrived {
    /// From the lines that the step `iperf` prints.
    pub fn parse<'a>(lines: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut receivers = lines.into_iter().filter(|line| line.trim_end().ends_with("receiver"));
        let line = receivers.next().context("the receiver says nothing")?;
        ensure!(receivers.next().is_none(), "several receivers");
        Self::of(line).with_context(|| format!("an odd line: {line}"))
    }

    fn of(line: &str) -> Result<Self> {
        let words: Vec<_> = line.split_whitespace().collect();
        let before = |unit: &str| -> Result<&str> {
            let at = words.iter().position(|word| *word == unit);
            let at = at.and_then(|at| at.checked_sub(1)).with_context(|| format!("no {unit}"))?;
            words.get(at).copied().context("nothing before it")
        };
        let (from, to) = before("sec")?.split_once('-').context("no time")?;
        let seconds = to.parse::<f64>()? - from.parse::<f64>()?;
        ensure!(seconds > 0.0, "no time passed");
        let rate: f64 = before("Kbits/sec")?.parse()?;
        ensure!(rate > 0.0, "nothing arrived");
        let datagrams = words.iter().find_map(|word| {
            let (lost, sent) = word.split_once('/')?;
            Some(Datagrams { sent: sent.parse().ok()?, lost: lost.parse().ok()? })
        });
        Ok(Self { seconds, bytes: rate * 1000.0 / 8.0 * seconds, datagrams })
    }
}

/// The times that the step `rtts` prints, in milliseconds: so many, as none may be lost.
pub fn times<'a>(lines: impl IntoIterator<Item = &'a str>, count: usize) -> Result<Vec<f64>> {
    let words = lines.into_iter().flat_map(str::split_whitespace);
    let times = words
        .map(|word| word.parse().with_context(|| format!("{word} is no time")))
        .collect::<Result<Vec<f64>>>()?;
    ensure!(times.len() == count, "{} of {count} pings were answered", times.len());
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receivers_word_counts() {
        let lines = [
            "[  5]   0.00-10.00  sec   265 MBytes  222298 Kbits/sec    3             sender",
            "[  5]   0.00-10.04  sec   261 MBytes  218000 Kbits/sec                  receiver",
        ];
        let arrived = Arrived::parse(lines).unwrap();
        assert_eq!((arrived.seconds, arrived.datagrams), (10.04, None));
        assert!((arrived.bytes - 273_590_000.0).abs() < 1.0, "{}", arrived.bytes);
    }

    #[test]
    fn datagrams_are_counted() {
        let lines = [
            "[  5]   0.00-5.00   sec  6.51 MBytes  10922 Kbits/sec  0.000 ms  0/106660 (0%)  sender",
            "[  5]   0.00-5.03   sec  4.30 MBytes  7155 Kbits/sec  0.034 ms  36235/106660 (34%)  receiver",
        ];
        let arrived = Arrived::parse(lines).unwrap();
        let datagrams = Datagrams { sent: 106_660.0, lost: 36_235.0 };
        assert_eq!((arrived.seconds, arrived.datagrams), (5.03, Some(datagrams)));
    }

    #[test]
    fn what_says_nothing_is_refused() {
        let nothing =
            "[  5]   0.00-5.00   sec  0.00 Bytes  0.00 Kbits/sec                  receiver";
        for lines in [
            vec![],
            vec!["iperf3: error - unable to connect to server: Connection refused"],
            vec!["[  5]   0.00-5.00   sec  1.00 MBytes  1600 Kbits/sec     sender"],
            vec!["[  5]   0.00-5.00   sec  1.00 MBytes  1.60 Mbits/sec     receiver"],
            vec![nothing],
        ] {
            assert!(Arrived::parse(lines.iter().copied()).is_err(), "{lines:?}");
        }
    }

    #[test]
    fn no_ping_may_be_missing() {
        assert_eq!(times(["1.25 0.7", "12"], 3).unwrap(), [1.25, 0.7, 12.0]);
        assert!(times(["1.25 0.7"], 3).is_err());
        assert!(times(["1.25 ms 7"], 3).is_err());
    }
}

//! The command line.

/// What is done with a network card.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Nic {
    /// Nothing.
    Off,
    /// It is used, if there is one.
    On,
    /// It is used as one that does not see what the processor has in its caches, whatever the device tree says.
    Noncoherent,
}

/// What the command line says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Options {
    /// `nic=off`, `nic=on` or `nic=noncoherent`; on if nothing is said.
    pub(crate) nic: Nic,
    /// `capture=uplink`: what goes by the network card is recorded instead of what the switch carries.
    pub(crate) capture_uplink: bool,
}

impl Options {
    /// Reads a command line; words that say nothing are given to `odd`, since whoever wrote it may have had a Linux in mind.
    pub(crate) fn parse(line: &str, odd: impl FnMut(&str)) -> Self {
        let mut options = Self { nic: Nic::On, capture_uplink: false };
        line.split_ascii_whitespace().filter(|word| !options.take(word)).for_each(odd);
        options
    }

    fn take(&mut self, word: &str) -> bool {
        match word {
            "nic=off" => self.nic = Nic::Off,
            "nic=on" => self.nic = Nic::On,
            "nic=noncoherent" => self.nic = Nic::Noncoherent,
            "capture=uplink" => self.capture_uplink = true,
            "capture=switch" => self.capture_uplink = false,
            _ => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::String;
    use alloc::vec::Vec;

    use super::*;

    #[test]
    fn words_are_read_the_last_counts_and_the_rest_is_named() {
        let read = |line| {
            let mut odd: Vec<String> = Vec::new();
            (Options::parse(line, |word| odd.push(word.into())), odd)
        };
        let plain = Options { nic: Nic::On, capture_uplink: false };
        assert_eq!(read(""), (plain, Vec::new()));
        assert_eq!(read("nic=off nic=noncoherent").0, Options { nic: Nic::Noncoherent, ..plain });
        assert_eq!(read(" nic=off ").0, Options { nic: Nic::Off, ..plain });
        assert_eq!(read("capture=uplink").0, Options { capture_uplink: true, ..plain });
        assert_eq!(read("capture=uplink capture=switch").0, plain);
        assert_eq!(read("console=hvc0 nic nic=yes").1, ["console=hvc0", "nic", "nic=yes"]);
    }
}

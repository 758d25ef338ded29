//! The command line.

use alloc::string::String;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr};

use services::jobs::Job;
use smoltcp::wire::IpCidr;

/// What the command line says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// `ip=ADDRESS/PREFIX`, one of each version at most; without any of version 4, DHCP is asked.
    pub addresses: Vec<IpCidr>,
    /// `gateway=ADDRESS`
    pub gateway: Option<Ipv4Addr>,
    /// `queues=N`
    pub queues: u16,
    /// `name=TEXT`
    pub name: String,
    /// `client=JOB`, any number of times.
    pub jobs: Vec<Job>,
}

impl Options {
    /// Reads a command line; words that say nothing are given to `odd`, since the toolstack may have added its own.
    pub fn parse(line: &str, mut odd: impl FnMut(&str)) -> Self {
        let mut options = Self {
            addresses: Vec::new(),
            gateway: None,
            queues: 1,
            name: "guest".into(),
            jobs: Vec::new(),
        };
        for word in line.split_ascii_whitespace() {
            if options.take(word).is_none() {
                odd(word);
            }
        }
        options
    }

    fn take(&mut self, word: &str) -> Option<()> {
        match word.split_once('=')? {
            ("ip", value) => {
                let (address, prefix) = value.split_once('/')?;
                let address: IpAddr = address.parse().ok()?;
                let prefix = prefix.parse().ok()?;
                let room = !self.addresses.iter().any(|own| is_same_version(own, address));
                let fits = prefix <= if address.is_ipv4() { 32 } else { 128 };
                (room && fits).then(|| self.addresses.push(IpCidr::new(address.into(), prefix)))
            }
            ("gateway", value) => value.parse().ok().map(|address| self.gateway = Some(address)),
            ("queues", value) => value.parse().ok().map(|queues| self.queues = queues),
            ("name", value) => {
                // It goes into a label of the counters.
                let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
                value.chars().all(plain).then(|| self.name = value.into())
            }
            ("client", value) => value.parse().ok().map(|job| self.jobs.push(job)),
            _ => None,
        }
    }

    /// Whether DHCP is to be asked.
    #[must_use]
    pub fn asks_dhcp(&self) -> bool {
        !self.addresses.iter().any(|address| matches!(address, IpCidr::Ipv4(_)))
    }
}

fn is_same_version(cidr: &IpCidr, address: IpAddr) -> bool {
    matches!(cidr, IpCidr::Ipv4(_)) == address.is_ipv4()
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::IpAddress;
    use std::vec;

    use super::*;

    #[test]
    fn a_full_command_line_is_read() {
        let line = " ip=10.9.0.2/24 ip=fd09::2/64 gateway=10.9.0.1 queues=4 name=our-1 \
                    client=ping:10.9.0.1:5 client=sink:10.9.0.1:1000 ";
        let options = Options::parse(line, |word| panic!("{word}"));
        let six = IpAddress::v6(0xfd09, 0, 0, 0, 0, 0, 0, 2);
        let addresses = vec![IpCidr::new(IpAddress::v4(10, 9, 0, 2), 24), IpCidr::new(six, 64)];
        assert_eq!(options.addresses, addresses);
        assert_eq!(options.gateway, Some(Ipv4Addr::new(10, 9, 0, 1)));
        assert_eq!((options.queues, options.name.as_str()), (4, "our-1"));
        assert_eq!(options.jobs.len(), 2);
        assert!(!options.asks_dhcp());
    }

    #[test]
    fn what_says_nothing_is_named() {
        let mut odd = vec![];
        let line = "root=/dev/xvda ip=10.9.0.2 ip=10.9.0.2/33 quiet client=dance queues=x \
                    name=a\"b ip=fd09::2/64 ip=fd09::3/64";
        let options = Options::parse(line, |word| odd.push(String::from(word)));
        assert_eq!(odd.len(), 8, "{odd:?}");
        assert!(options.asks_dhcp());
        assert_eq!(options.queues, 1);
    }
}

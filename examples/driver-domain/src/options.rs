//! The command line.

use alloc::vec::Vec;

use smoltcp::wire::IpCidr;

/// Reads a command line: `ip=ADDRESS/PREFIX`, any number of times, is an address of this domain's own on the switch. Words
/// that say nothing are given to `odd`, since the toolstack may have added its own.
pub(crate) fn addresses(line: &str, mut odd: impl FnMut(&str)) -> Vec<IpCidr> {
    let address = |word: &str| word.strip_prefix("ip=")?.parse().ok();
    let words = line.split_ascii_whitespace();
    words.filter_map(|word| address(word).or_else(|| (odd(word), None).1)).collect()
}

#[cfg(test)]
mod tests {
    use alloc::string::String;

    use smoltcp::wire::IpAddress;

    use super::*;

    #[test]
    fn addresses_are_read_and_the_rest_is_named() {
        let mut odd = Vec::new();
        let line = " ip=10.9.0.1/24 root=/dev/xvda ip=fd09::1/64 ip=10.9.0.1 ip=10.9.0.1/33 ip= ";
        let read = addresses(line, |word| odd.push(String::from(word)));
        let six = IpAddress::v6(0xfd09, 0, 0, 0, 0, 0, 0, 1);
        let expected = [IpCidr::new(IpAddress::v4(10, 9, 0, 1), 24), IpCidr::new(six, 64)];
        assert_eq!(read, expected);
        assert_eq!(odd, ["root=/dev/xvda", "ip=10.9.0.1", "ip=10.9.0.1/33", "ip="]);
    }
}

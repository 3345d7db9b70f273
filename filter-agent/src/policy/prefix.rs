//! Prefixes: parsed as the policy and lists spell them, and with exceptions taken out.

use std::{borrow::Cow, net::IpAddr};

use ipnet::{IpNet, Ipv4Net};

/// Parses a prefix as the policy spells it.
///
/// # Errors
/// Names the mistake in the text, and the spelling that was probably meant.
pub fn parse_cidr(text: &str) -> Result<IpNet, String> {
    let malformed = || format!("{text:?} is not a prefix, such as 192.0.2.0/24 or 2001:db8::/32");
    let Some((address, length)) = text.split_once('/') else {
        let address: IpAddr = text.parse().map_err(|_| malformed())?;
        let one = IpNet::from(address.to_canonical());
        // The suggested prefix must be valid: else its own error is returned.
        parse_cidr(&one.to_string())?;
        return Err(format!(
            "{text} has no prefix length: for this one address write {one}"
        ));
    };
    let address: IpAddr = address.parse().map_err(|_| malformed())?;
    // Digits only: `u8::from_str` accepts a sign and leading zeros.
    let canonical = length.parse::<u8>().ok();
    let canonical = canonical.filter(|number| number.to_string() == length);
    let length = canonical.ok_or_else(malformed)?;
    let prefix = IpNet::new(address, length).map_err(|_| {
        let longest = IpNet::from(address).max_prefix_len();
        format!("{text} has a prefix length past {longest}")
    })?;
    if let IpAddr::V6(v6) = address
        && let Some(v4) = v6.to_ipv4_mapped()
        && let Some(Ok(v4)) = length
            .checked_sub(96)
            .map(|length| Ipv4Net::new(v4, length))
    {
        return Err(format!(
            "{text} is IPv4, which arrives as such: write {}",
            v4.trunc()
        ));
    }
    if prefix.trunc() != prefix {
        return Err(format!(
            "{text} has host bits set: the network is {}",
            prefix.trunc()
        ));
    }
    if is_never_a_source(&prefix) {
        return Err(format!(
            "{text} is not a valid source: packets from there are always dropped"
        ));
    }
    Ok(prefix)
}

/// Whether the filter drops every packet from the prefix, so that a rule could never match.
fn is_never_a_source(prefix: &IpNet) -> bool {
    match prefix {
        IpNet::V4(prefix) => {
            let first = prefix.network();
            let within = first.octets()[0] == 0 || first.is_loopback() || first.is_multicast();
            // These ranges are a /8 or a /4; a shorter prefix contains other addresses, too.
            let length = if first.is_multicast() { 4 } else { 8 };
            first.is_broadcast() || within && prefix.prefix_len() >= length
        }
        IpNet::V6(prefix) => {
            let first = prefix.network();
            let single = first.is_unspecified() || first.is_loopback();
            (single && prefix.prefix_len() >= 127)
                || (first.is_multicast() && prefix.prefix_len() >= 8)
        }
    }
}

/// The prefixes that hold what `prefixes` do and `except` does not.
pub fn without<'a>(prefixes: &'a [IpNet], except: &[IpNet]) -> Cow<'a, [IpNet]> {
    if except.is_empty() {
        return prefixes.into();
    }
    let mut rest = prefixes.to_vec();
    for hole in except {
        // Prefixes that the hole does not touch stay in place.
        let mut split = Vec::new();
        rest.retain(|prefix| {
            let is_outer = prefix.contains(hole) && prefix != hole;
            if is_outer {
                split.push(*prefix);
            }
            !is_outer && !hole.contains(prefix)
        });
        for prefix in split {
            rest.extend(around(prefix, hole));
        }
    }
    rest.into()
}

/// The parts of a prefix outside a longer one that it contains: at each length the half without it.
fn around(prefix: IpNet, hole: &IpNet) -> impl Iterator<Item = IpNet> {
    (prefix.prefix_len() + 1..=hole.prefix_len()).filter_map(move |length| {
        let inner = IpNet::new(hole.network(), length).ok()?.trunc();
        let halves = inner.supernet()?.subnets(length).ok()?;
        halves.into_iter().find(|half| *half != inner)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_are_taken_out_and_nothing_else() {
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..2_000 {
            let mut prefix = |shortest| {
                let length = random.u8(shortest..=32);
                let address = 0xc000_0200 | random.u32(..256);
                IpNet::from(Ipv4Net::new_assert(address.into(), length).trunc())
            };
            let prefixes: Vec<IpNet> = (0..3).map(|_| prefix(22)).collect();
            let except: Vec<IpNet> = (0..3).map(|_| prefix(23)).collect();
            let rest = without(&prefixes, &except);
            for address in 0xc000_0000_u32..0xc000_0500 {
                let address = IpAddr::from(std::net::Ipv4Addr::from_bits(address));
                let holds = |prefixes: &[IpNet]| prefixes.iter().any(|p| p.contains(&address));
                let expected = holds(&prefixes) && !holds(&except);
                assert_eq!(
                    holds(&rest),
                    expected,
                    "{address} of {prefixes:?} {except:?}"
                );
            }
        }
        let v6: IpNet = "2001:db8::/32".parse().unwrap();
        let hole: IpNet = "2001:db8::1/128".parse().unwrap();
        assert_eq!(without(&[v6], &[hole]).len(), 96);
        // Of another family.
        assert_eq!(*without(&[v6], &["32.0.0.0/8".parse().unwrap()]), [v6]);
    }
}

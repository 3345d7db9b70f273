//! Parses prefixes as the policy and lists spell them.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

/// Parses a prefix as the policy spells it.
///
/// # Errors
/// What is wrong with the text, and the spelling that was probably meant.
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

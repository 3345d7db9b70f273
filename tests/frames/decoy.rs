//! Ports that only a filter that reads at the wrong place finds.

/// A port that no test protects, where a filter that reads the wrong bytes finds it.
pub const DECOY_PORT: u16 = 9;

/// Bytes that read as ports: from anywhere, to the decoy port.
pub(super) fn decoy() -> Vec<u8> {
    [1234_u16.to_be_bytes(), DECOY_PORT.to_be_bytes()].concat()
}

/// An IPv4 option of unknown kind that ends in a decoy.
pub(super) fn decoy_option(length: usize) -> Vec<u8> {
    let mut option = vec![0x9e, length as u8];
    option.extend(decoy().iter().cycle().take(length - 2));
    option
}

//! Records of the agent's state directory, changed as if another boot or another clock had written them.

use std::{fs, path::Path};

use serde_json::Value;

/// CRC-32 as in Ethernet and zip: the record's checksum.
fn crc32(text: &[u8]) -> u32 {
    let step = |crc: u32| crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
    let byte = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc));
    !text.iter().fold(!0, byte)
}

/// Rewrites a record as the agent would have written it.
pub fn rewrite(path: &Path, change: impl FnOnce(&mut Value)) {
    let text = fs::read_to_string(path).unwrap();
    let begin = text.find("\"kept\":").unwrap() + "\"kept\":".len();
    let inner = &text[begin..text.len() - 1];
    let sealed: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(sealed["crc32"], crc32(inner.as_bytes()));
    let mut kept = sealed["kept"].clone();
    change(&mut kept);
    let kept = kept.to_string();
    let sum = crc32(kept.as_bytes());
    fs::write(path, format!("{{\"crc32\":{sum},\"kept\":{kept}}}")).unwrap();
}

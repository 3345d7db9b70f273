//! Reads what nft prints.

use std::process::Output;

use serde_json::Value;

/// The packets of the one counter that nft prints.
pub(super) fn counter(output: &Output) -> u64 {
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    json["nftables"][1]["counter"]["packets"].as_u64().unwrap()
}

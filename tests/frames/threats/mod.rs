//! Every threat on the list, by hand.

mod fragments;
mod headers;
mod list;

use crate::frames::{addressing::Addressing, plan::Plan};

use list::Threats;

/// Every threat on the list that is for the addresses' family, by hand. The frames of plan `n`
/// carry the id `first_id + n`.
pub fn threats(addressing: &Addressing, first_id: u32) -> Vec<Plan> {
    let mut list = Threats {
        addressing,
        first_id,
        plans: Vec::new(),
    };
    list.vlan();
    list.lengths();
    list.versions();
    list.fragments();
    list.fragment_grid();
    list.authentication();
    if addressing.is_v4() {
        list.ipv4_options();
    } else {
        list.extension_chains();
        list.ipv6_fragments();
    }
    list.plans
}

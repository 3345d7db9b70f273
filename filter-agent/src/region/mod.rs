//! Managed regions: where their prefixes come from, and which of them are in force.

mod dns;
pub mod lists;
pub mod lookup;
pub mod state;

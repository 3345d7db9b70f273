//! Managed regions: where their prefixes come from, and which of them are in force.

pub mod answer;
pub mod dns;
mod encoding;
pub mod files;
mod guards;
pub mod headers;
pub mod http;
pub mod lists;
pub mod lookup;
mod secrets;
pub mod state;
mod tls;
pub mod try_later;

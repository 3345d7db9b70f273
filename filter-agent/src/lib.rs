//! The agent, from a policy file to entries in the kernel. See `docs/ARCHITECTURE.md`.

pub mod answer;
pub mod cli;
pub mod compile;
pub mod confirmed;
mod control;
pub mod daemon;
mod dns;
pub mod driver;
pub mod drops;
pub mod filter;
pub mod format;
pub mod host;
pub mod image;
pub mod interfaces;
pub mod kept;
mod log;
pub mod lookup;
pub mod policy;
pub mod probe;
pub mod protection;
pub mod region;
pub mod report;

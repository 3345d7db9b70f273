//! The agent, from a policy file to entries in the kernel. See `docs/ARCHITECTURE.md`.

pub mod cli;
pub mod compile;
pub mod confirmed;
mod control;
pub mod daemon;
pub mod drops;
pub mod host;
pub mod kept;
pub mod kernel;
mod log;
pub mod policy;
pub mod policy_file;
pub mod protection;
pub mod region;
pub mod report;

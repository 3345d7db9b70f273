//! The agent, from a policy file to entries in the kernel. See `docs/ARCHITECTURE.md`.

pub mod cli;
pub mod compile;
pub mod daemon;
pub mod filter;
pub mod host;
pub mod image;
pub mod policy;
pub mod probe;
pub mod region;
pub mod report;

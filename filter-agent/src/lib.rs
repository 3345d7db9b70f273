//! The agent, from a policy file to entries in the kernel. See `docs/ARCHITECTURE.md`.

pub mod compile;
pub mod filter;
pub mod host;
pub mod image;
pub mod policy;
pub mod region;

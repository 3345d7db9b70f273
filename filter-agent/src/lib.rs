//! The agent, from a policy file to entries in the kernel. See `docs/ARCHITECTURE.md`.

pub mod agent;
pub mod cli;
pub mod clock;
pub mod compile;
mod control;
pub mod daemon;
pub mod drops;
pub mod enforcer;
pub mod event;
pub mod host;
pub mod kernel;
mod log;
mod look_ups;
pub mod policy;
pub mod policy_file;
pub mod protection;
pub mod reconcile;
mod refreshes;
pub mod region;
pub mod report;
mod saves;
mod snapshot;
mod start;
pub mod store;
mod threads;
mod verify;

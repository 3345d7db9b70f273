//! The control socket and the status socket: requests in HTTP, answers in JSON. It reaches the agent by events and snapshots, and the
//! kernel by jobs for the thread that owns the filter.

mod answers;
mod changes;
mod firewall;
mod limits;
mod reads;
mod routes;
mod server;
mod shared;
mod trace;

pub use routes::{Listed, listed};
pub use server::Server;
pub use shared::Shared;

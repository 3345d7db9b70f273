//! Policies that are tried until somebody confirms them, and rollbacks, with the real agent.

mod commands;
mod disk;
mod host;
mod sockets;
mod starts;
mod tried;

//! Region files: reading them, and learning that they changed.

mod read;
mod table;
mod walk;
mod watch;
mod writers;

pub(super) use read::{StillWritten, read};
pub use walk::Walk;
pub use watch::Watcher;

#[cfg(test)]
mod tests;

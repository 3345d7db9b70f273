//! Region files: reading them, and learning that they changed.

mod read;
mod watch;

pub(super) use read::read;
pub use watch::Watcher;

#[cfg(test)]
mod tests;

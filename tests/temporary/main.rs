//! Temporary rules and blocks with the real agent: in force at once, kept, and ended by the kernel.

mod commands;
mod disk;
mod ends;
mod host;
mod opened;
mod random;
mod restarts;
mod room;
mod sessions;

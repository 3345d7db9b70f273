//! The history of changes with the real agent: who made each, in which order, kept over whatever ends the agent.

mod detached;
mod disk;
mod host;
mod kept;
mod secrets;
mod who;

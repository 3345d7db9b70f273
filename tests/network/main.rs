//! The real agent between real clients and servers: who gets in, and who does not.

mod access;
mod changes;
mod interfaces;
mod orders;
mod process;

//! The real agent and real packets, traced: what is printed, and that nothing of it stays.

mod faults;
mod lasting;
mod reader;
mod steps;

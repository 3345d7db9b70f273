//! The kernel's side of the filter: the only user of aya.

mod answer;
pub mod apply;
mod batch;
mod bloom;
pub mod change;
pub mod counters;
pub mod difference;
pub mod fill;
pub mod filter;
pub mod hook;
pub mod image;
mod layout;
pub mod links;
mod maps;
pub mod pins;
pub mod probe;
pub mod program;
mod read;
mod restore;
pub mod samples;
mod sections;
pub mod sorted;
pub mod steps;
pub mod traced;
mod tries;

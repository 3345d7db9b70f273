//! The kernel's side of the filter: the only user of aya.

mod answer;
pub mod filter;
pub mod image;
pub mod probe;

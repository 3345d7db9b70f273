//! Regions against real servers: what their sources answer, and every way in which they fail.

mod dns;
mod https;
mod last_good;
mod orders;

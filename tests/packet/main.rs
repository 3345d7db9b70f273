//! One packet, one verdict: tables for the shipped program. Each is checked against the reference
//! too, so that neither of the two is taken at its word.

mod databases;
mod headers;
mod lengths;
mod other_traffic;
mod rules;
mod threats;
mod verdicts;

//! One packet, one verdict: tables for the shipped program.

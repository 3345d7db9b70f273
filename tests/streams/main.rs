//! Forced TLS against clients that craft their segments: whatever they send, a server reads nothing but the beginning
//! of TLS at the beginning of the stream.

mod containers;
mod cookies;
mod cuts;
mod handshake;
mod laboratory;
mod listeners;
mod mariadb;
mod multipath;
mod openings;
mod overlaps;
mod packets;
mod policies;
mod proxies;
mod refusals;
mod replayed;
mod server;
mod storms;

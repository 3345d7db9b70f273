//! What the tests share.

pub mod bpffs;
pub mod databases;
pub mod frames;
pub mod loaded;
pub mod mounts;
pub mod net;
pub mod reference;
pub mod servers;

//! What the tests share.

pub mod bpffs;
pub mod certificates;
pub mod databases;
pub mod datagrams;
pub mod etcd;
pub mod frames;
pub mod injector;
pub mod laboratory;
pub mod loaded;
pub mod mounts;
pub mod net;
pub mod records;
pub mod reference;
pub mod servers;

//! The fleet, with a real etcd.

mod answers;
mod certificates;
mod commands;
mod etcd;
mod faults;
mod follower;
mod host;
mod members;
mod mute;
mod own_keys;
mod refusals;

//! The fleet, with a real etcd.

mod answers;
mod commands;
mod faults;
mod follower;
mod host;
mod members;
mod mute;
mod own_keys;
mod refusals;
mod rollout;

use filter_tests::{certificates, etcd};

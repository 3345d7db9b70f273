//! Sockets that the service manager passes (`sd_listen_fds(3)`).

use std::{env, os::unix::net::UnixListener};

use anyhow::{Context as _, Result};
use listenfd::ListenFd;
use rustix::io::{FdFlags, fcntl_setfd};

/// The name of the status socket, as its unit has it in `FileDescriptorName=`.
const STATUS: &str = "status";

/// Takes the status socket. To be called before there are threads: it takes what it reads out of the environment.
///
/// # Errors
/// What has the name is no socket that listens.
pub fn status_socket() -> Result<Option<UnixListener>> {
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let place = names.split(':').position(|name| name == STATUS);
    let mut passed = ListenFd::from_env();
    let Some(place) = place else { return Ok(None) };
    let mut take = || {
        let listener = passed.take_unix_listener(place)?;
        if let Some(listener) = &listener {
            // The commands that the agent runs do not get it.
            fcntl_setfd(listener, FdFlags::CLOEXEC)?;
        }
        anyhow::Ok(listener)
    };
    take().context("no status socket: take what the service manager passed")
}

//! Reads that may hang, on threads that are given up.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use tokio::sync::{Semaphore, oneshot};

/// Threads that file systems which hang may hold at a time.
const MAX_READERS: usize = 16;

static READERS: Semaphore = Semaphore::const_new(MAX_READERS);

/// Reads on a thread that is given up after a while: nothing ends a read of a file system that hangs. `what`
/// begins the error, as in `read FILE`.
///
/// # Errors
/// What `read` returns, no answer in time, or too many threads that hang.
pub async fn read_within<T: Send + 'static>(
    timeout: Duration,
    what: &str,
    read: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let permit = READERS
        .try_acquire()
        .map_err(|_| anyhow!("{what}: too many reads of file systems hang"))?;
    let (done, result) = oneshot::channel();
    thread::Builder::new()
        .name("reader".into())
        .spawn(move || {
            let _permit = permit;
            let _ = done.send(read());
        })
        .with_context(|| format!("{what}: start a thread"))?;
    match tokio::time::timeout(timeout, result).await {
        Ok(result) => result.with_context(|| what.to_owned()).flatten(),
        Err(_) => bail!("{what}: no answer within {} s", timeout.as_secs()),
    }
}

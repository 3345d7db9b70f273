//! Work on files, on threads that can be given up: a network file system that does not answer blocks a thread for as
//! long as it likes, and nothing can interrupt it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tokio::sync::{Semaphore, oneshot};

/// Threads for files of a kind: those of one kind that hang hold up no other kind.
pub struct Pool {
    /// Threads at once, those that were given up included.
    threads: Semaphore,
    /// Results that are waited for at once: each takes memory for the file and what is read from it.
    waiting: Semaphore,
}

/// For policies, and for the confirmed policy.
pub static POLICIES: Pool = Pool::new(8, 4);

/// For the files of regions.
pub static REGION_FILES: Pool = Pool::new(32, 8);

/// For the sets that are kept of regions, and what look-ups need: certificates, name servers.
pub static LOOK_UPS: Pool = Pool::new(32, 8);

impl Pool {
    const fn new(threads: usize, waiting: usize) -> Self {
        Self {
            threads: Semaphore::const_new(threads),
            waiting: Semaphore::const_new(waiting),
        }
    }
}

/// Files that a thread works on. One thread a file: retries on a file system that hangs take no further threads.
static BUSY: Mutex<BTreeMap<PathBuf, Arc<tokio::sync::Mutex<()>>>> = Mutex::new(BTreeMap::new());

/// Runs a job that reads a file, after those on the same file. Dropping the future gives the thread up, which goes on
/// until its job ends.
///
/// # Errors
/// Those of the job, a panic in it, or that no thread could be started.
pub async fn run<T: Send + 'static>(
    pool: &'static Pool,
    path: &Path,
    job: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let turn = {
        let mut busy = BUSY.lock().unwrap_or_else(PoisonError::into_inner);
        busy.retain(|_, turn| Arc::strong_count(turn) > 1);
        busy.entry(path.to_owned()).or_default().clone()
    };
    let turn = turn.lock_owned().await;
    let _waiting = pool
        .waiting
        .acquire()
        .await
        .context("wait for other files")?;
    let permit = pool.threads.acquire().await.context("wait for a thread")?;
    let held = (turn, permit);
    let job = move || {
        let result = job();
        drop(held);
        result
    };
    run_on_thread("read-file", job).await?
}

/// Runs a job on a thread of its own. tokio's `spawn_blocking` panics where no thread can be started.
///
/// # Errors
/// No thread, or a panic of the job.
pub async fn run_on_thread<T: Send + 'static>(
    name: &str,
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (send, result) = oneshot::channel();
    thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let _ = send.send(job());
        })
        .context("start a thread")?;
    result.await.context("the thread panicked")
}

/// As `run`, for a bounded time. `what` begins the error, as in `read FILE`.
///
/// # Errors
/// As there, or no result in time.
pub async fn run_within<T: Send + 'static>(
    pool: &'static Pool,
    limit: Duration,
    what: &str,
    path: &Path,
    job: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::time::timeout(limit, run(pool, path, job)).await {
        Ok(result) => result,
        Err(_) => bail!("{what}: no answer within {} s", limit.as_secs()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn thread_that_hangs_holds_up_its_file_only() {
        let hung = Path::new("/hung");
        let (release, wait) = mpsc::channel::<()>();
        let limit = Duration::from_millis(50);
        let job = move || Ok(wait.recv().is_ok());
        assert!(
            tokio::time::timeout(limit, run(&REGION_FILES, hung, job))
                .await
                .is_err()
        );
        for _ in 0..40 {
            let retry = tokio::time::timeout(
                Duration::from_millis(1),
                run(&REGION_FILES, hung, || Ok(())),
            );
            assert!(retry.await.is_err());
        }
        let other = run(&REGION_FILES, Path::new("/other"), || Ok(7))
            .await
            .unwrap();
        assert_eq!(other, 7);
        release.send(()).unwrap();
        run(&REGION_FILES, hung, || Ok(())).await.unwrap();
    }

    /// Files of regions that hang took every thread, and the policy file could not be read either.
    #[tokio::test]
    async fn files_of_regions_that_hang_do_not_hold_up_the_policy() {
        let mut release = Vec::new();
        for n in 0..40 {
            let (end, wait) = mpsc::channel::<()>();
            release.push(end);
            let path = format!("/region/{n}");
            let job = move || Ok(wait.recv().is_ok());
            let limit = Duration::from_millis(5);
            let read = run_within(&REGION_FILES, limit, "read", Path::new(&path), job);
            assert!(read.await.is_err());
        }
        let limit = Duration::from_secs(10);
        let policy = run_within(&POLICIES, limit, "read", Path::new("/policy"), || Ok(7));
        assert_eq!(policy.await.unwrap(), 7);
    }

    #[tokio::test]
    async fn panic_is_an_error() {
        let result: Result<()> = run(&LOOK_UPS, Path::new("/panic"), || panic!("of the job")).await;
        assert_eq!(result.unwrap_err().to_string(), "the thread panicked");
    }
}

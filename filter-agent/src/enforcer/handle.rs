//! The way to the thread that owns the filter: jobs, one after another.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::sync::oneshot;

use crate::enforcer::Enforcer;

/// Time that a job may take before the thread counts as stuck: a million prefixes take a few seconds.
const STUCK_AFTER: Duration = Duration::from_secs(60);

type Job = Box<dyn FnOnce(&mut Enforcer) + Send>;

/// The way to the thread.
#[derive(Clone)]
pub struct Handle {
    jobs: Sender<Job>,
    work: Arc<Work>,
}

/// The jobs of callers, for the thread that does them.
pub struct Jobs {
    received: Receiver<Job>,
    work: Arc<Work>,
}

/// The thread's state, for callers that do not wait for it.
#[derive(Default)]
struct Work {
    /// When the job under way began.
    since: Mutex<Option<Instant>>,
    /// Whether a check waits for its turn, and whether it is to be thorough.
    is_waiting: AtomicBool,
    is_thorough: AtomicBool,
    has_ended: AtomicBool,
}

impl Work {
    fn since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handle {
    /// Makes a way to the thread that will do these jobs. Without one, every call fails.
    pub fn new() -> (Self, Jobs) {
        let (jobs, received) = channel();
        let work = Arc::new(Work::default());
        let handle = Self {
            jobs,
            work: work.clone(),
        };
        (handle, Jobs { received, work })
    }

    /// Opens the filter on a thread of its own.
    ///
    /// # Errors
    /// As `Enforcer::open`.
    pub async fn start(open: impl FnOnce() -> Result<Enforcer> + Send + 'static) -> Result<Self> {
        let (handle, jobs) = Self::new();
        let (opened, opening) = oneshot::channel();
        thread::Builder::new()
            .name("enforcer".into())
            .spawn(move || match open() {
                Ok(enforcer) => {
                    // The receiver waits for it.
                    let _ = opened.send(Ok(()));
                    jobs.serve(enforcer);
                }
                Err(error) => {
                    let _ = opened.send(Err(error));
                }
            })
            .context("start the thread that owns the filter")?;
        opening.await.context("open the filter").flatten()?;
        Ok(handle)
    }

    /// Has a job done, after those that came before it.
    pub fn send(&self, job: impl FnOnce(&mut Enforcer) + Send + 'static) {
        // Fails where the thread has ended, which `has_ended` reports.
        let _ = self.jobs.send(Box::new(job));
    }

    /// Has a job done, and waits for its result.
    ///
    /// # Errors
    /// A thread that has ended.
    pub async fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Enforcer) -> T + Send + 'static,
    ) -> Result<T> {
        let (done, result) = oneshot::channel();
        self.send(move |enforcer| {
            let _ = done.send(job(enforcer));
        });
        result
            .await
            .context("the thread that owns the filter has ended; the filter stays in force")
    }

    /// Has a check made: a thorough one if any that waits for its turn was to be. `check` gets whether it is.
    pub fn check(&self, thorough: bool, check: impl FnOnce(&mut Enforcer, bool) + Send + 'static) {
        if thorough {
            self.work.is_thorough.store(true, Ordering::Release);
        }
        if !self.work.is_waiting.swap(true, Ordering::AcqRel) {
            let work = self.work.clone();
            self.send(move |enforcer| {
                // The next check covers whatever happens from now on.
                work.is_waiting.store(false, Ordering::Release);
                check(enforcer, work.is_thorough.swap(false, Ordering::AcqRel));
            });
        }
    }

    /// Whether a job takes far too long.
    pub fn is_stuck(&self) -> bool {
        let since = *self.work.since();
        since.is_some_and(|since| since.elapsed() > STUCK_AFTER)
    }

    /// Whether the thread has ended, which it does only by a panic.
    pub fn has_ended(&self) -> bool {
        self.work.has_ended.load(Ordering::Acquire)
    }
}

/// Notes the end of the thread, by a panic too.
struct Ended<'a>(&'a Work);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.has_ended.store(true, Ordering::Release);
    }
}

impl Jobs {
    fn serve(self, mut enforcer: Enforcer) {
        let work = self.work;
        let _ended = Ended(&work);
        while let Ok(job) = self.received.recv() {
            *work.since() = Some(Instant::now());
            job(&mut enforcer);
            *work.since() = None;
        }
    }
}

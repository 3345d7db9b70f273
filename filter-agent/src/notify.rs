//! Messages to the service manager, from a thread of its own: one that does not read them stops nothing.

use std::{
    mem,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, Result};
use sd_notify::NotifyState;

use crate::log::Entry;

/// Messages that wait; of several of a kind only the latest is sent.
#[derive(Default)]
struct Waiting {
    is_ready: bool,
    /// One line that says what is enforced.
    status: Option<String>,
    /// The agent is alive.
    is_alive: bool,
    is_stopping: bool,
}

#[derive(Clone, Default)]
pub struct Notifier(Arc<(Mutex<Waiting>, Condvar)>);

impl Notifier {
    /// # Errors
    /// No thread.
    pub fn start() -> Result<Self> {
        let notifier = Self::default();
        let own = notifier.clone();
        thread::Builder::new()
            .name("notify".into())
            .spawn(move || own.send_all())
            .context("start the thread that notifies the service manager")?;
        Ok(notifier)
    }

    pub fn ready(&self) {
        self.add(|waiting| waiting.is_ready = true);
    }

    pub fn status(&self, status: String) {
        self.add(|waiting| waiting.status = Some(status));
    }

    pub fn alive(&self) {
        self.add(|waiting| waiting.is_alive = true);
    }

    pub fn stopping(&self) {
        self.add(|waiting| waiting.is_stopping = true);
    }

    fn add(&self, add: impl FnOnce(&mut Waiting)) {
        let (waiting, added) = &*self.0;
        add(&mut waiting.lock().unwrap_or_else(PoisonError::into_inner));
        added.notify_one();
    }

    fn send_all(&self) {
        let (waiting, added) = &*self.0;
        loop {
            let mut next = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            while !(next.is_ready || next.is_alive || next.is_stopping || next.status.is_some()) {
                next = added.wait(next).unwrap_or_else(PoisonError::into_inner);
            }
            let sent = mem::take(&mut *next);
            // Whoever adds a message must not wait for the one that is sent.
            drop(next);
            let mut states = Vec::new();
            if sent.is_ready {
                states.push(NotifyState::Ready);
            }
            if let Some(status) = &sent.status {
                states.push(NotifyState::Status(status));
            }
            if sent.is_alive {
                states.push(NotifyState::Watchdog);
            }
            if sent.is_stopping {
                states.push(NotifyState::Stopping);
            }
            // Nothing happens where no service manager wants to know.
            if let Err(error) = sd_notify::notify(&states) {
                Entry::warning(format!("notify systemd: {error}")).log();
            }
        }
    }
}

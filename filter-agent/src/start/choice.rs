//! Which policy a start enforces, by the policy file and what the last agent left on disk.

use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
    sync::Arc,
};

use anyhow::Result;

use super::{Options, READ_TIMEOUT};
use crate::{
    clock::{Now, boot_id},
    host,
    kernel::pins,
    log::Entry,
    policy_file::{PolicyFile, hash},
    protection,
    reconcile::describe_unguarded,
    region::state::Set,
    store::{self, Confirmed},
    threads,
    window::{self, Abandoned, Open, Text, describe_abandoned},
};

/// A policy that a start may enforce.
pub(super) struct Candidate {
    pub(super) file: Arc<PolicyFile>,
    /// Why it is not the policy file, where that was not left to the agent before.
    pub(super) instead_of_file: Option<String>,
    /// Whether it is tried, and its window goes on.
    pub(super) is_tried: bool,
}

impl Candidate {
    fn new(file: Arc<PolicyFile>, instead_of_file: Option<String>) -> Self {
        Self {
            file,
            instead_of_file,
            is_tried: false,
        }
    }
}

/// Policies that a start may enforce, and what the last agent left on disk.
pub(super) struct Choice {
    /// The best first.
    pub(super) candidates: VecDeque<Candidate>,
    pub(super) confirmed: Option<Confirmed>,
    /// The confirmed policy.
    pub(super) before: Option<Arc<PolicyFile>>,
    pub(super) kept_window: Option<window::Kept>,
    /// Why it cannot be read.
    pub(super) unknown_window: Option<String>,
    /// A window that was open when the last agent ended, and the policy that was tried. It has not been confirmed.
    pub(super) tried: Option<(Open, Arc<PolicyFile>)>,
    pub(super) abandoned: Abandoned,
    pub(super) is_abandoned: bool,
    /// Why what is kept cannot be read: the file cannot be compared with it.
    pub(super) unreadable: Option<String>,
    /// Whether what is kept is of another machine.
    pub(super) is_foreign: bool,
}

impl Choice {
    /// A policy that is tried, as long as its time lasts. Else the policy file, if it is valid, leaves guarded what the
    /// confirmed policy guards, and is not a text that was fallen or rolled back from; else, and where this host refuses it,
    /// the confirmed policy.
    ///
    /// # Errors
    /// None can be enforced. What is pinned stays as it is.
    pub(super) async fn make(options: &Options, now: Now) -> Result<Self> {
        let file = read_policy(&options.policy).await;
        let directory = options.state_dir.clone();
        let path = store::confirmed_path(&directory);
        let kept = threads::run_within(
            &threads::POLICIES,
            READ_TIMEOUT,
            "read the confirmed policy",
            &path,
            move || {
                let confirmed = store::read_confirmed(&directory)?;
                let text = confirmed.as_ref().map(|confirmed| confirmed.policy.clone());
                let path = store::confirmed_path(&directory);
                let before = text
                    .map(|text| PolicyFile::parse(&path, text))
                    .transpose()?;
                Ok((confirmed, before))
            },
        )
        .await;
        let mut unreadable = None;
        let (confirmed, before) = match kept {
            Ok((confirmed, before)) => (confirmed, before.map(Arc::new)),
            // What it guards may be guarded no longer by the file.
            Err(error) if !pins::left_in_force(&options.bpffs)?.is_empty() => {
                return Err(error.context(format!(
                    "start refused; what is pinned stays in force, without an agent: if the policy file is \
                     right, remove {}",
                    path.display()
                )));
            }
            Err(error) => {
                unreadable = Some(format!(
                    "{error:#}; if the policy file is right, `filter-agent reload`"
                ));
                (None, None)
            }
        };
        let mut choice = Self {
            candidates: VecDeque::new(),
            before,
            confirmed,
            kept_window: None,
            unknown_window: None,
            tried: None,
            abandoned: Abandoned::default(),
            is_abandoned: false,
            unreadable,
            is_foreign: false,
        };
        let name = options.policy.display();
        // Where something is pinned it was in force on this host, whatever its machine-id is now.
        let is_foreign = choice
            .confirmed
            .as_ref()
            .is_some_and(Confirmed::is_of_another_machine)
            && pins::left_in_force(&options.bpffs)?.is_empty();
        if is_foreign && let Ok(file) = file {
            let text = format!(
                "{} was kept on another machine (its machine-id(5) differs): {name} is not compared with it",
                path.display()
            );
            Entry::warning(text).log();
            choice.before = None;
            choice.confirmed = None;
            choice.is_foreign = true;
            choice.candidates.push_back(Candidate::new(file, None));
            return Ok(choice);
        }
        match read_window(options).await {
            Ok(kept) => choice.take_window(kept, now),
            Err(error) => choice.unknown_window = Some(format!("{error:#}")),
        }
        if let (Some((open, tried)), Some(_)) = (&choice.tried, &choice.before)
            && open.lasts(boot_id().as_deref(), now)
        {
            choice.candidates.push_back(Candidate {
                file: tried.clone(),
                instead_of_file: None,
                is_tried: true,
            });
            choice.end_with_confirmed(None);
            return Ok(choice);
        }
        choice.fall_back(now);
        let refusal = match (file, &choice.confirmed, &choice.before) {
            (Ok(file), Some(confirmed), Some(_)) if file.text == confirmed.policy => {
                choice.candidates.push_back(Candidate::new(file, None));
                return Ok(choice);
            }
            (Ok(file), Some(confirmed), Some(before)) => {
                let host = host::interfaces().await?;
                let known = &confirmed.interfaces;
                let ended = protection::ended(&before.policy, &file.policy, known, &host);
                let abandoned = choice.abandoned.find(&file.hash);
                if let Some(text) = abandoned {
                    choice.is_abandoned = true;
                    Some(describe_abandoned(&options.policy, text))
                } else if let Some(error) = &choice.unknown_window {
                    Some(format!(
                        "{name} is not enforced, since it may be a policy that was tried and not confirmed: {error}; if \
                         the file is right, `filter-agent reload`"
                    ))
                } else if !ended.is_empty() {
                    Some(format!(
                        "{name} is not enforced: {}",
                        describe_unguarded(&ended)
                    ))
                } else {
                    choice.candidates.push_back(Candidate::new(file, None));
                    None
                }
            }
            (Ok(file), ..) => {
                choice.candidates.push_back(Candidate::new(file, None));
                return Ok(choice);
            }
            (Err(error), ..) if choice.before.is_none() => {
                return Err(match pins::left_in_force(&options.bpffs) {
                    Ok(interfaces) if !interfaces.is_empty() => error
                        .context("start refused; what is pinned stays in force, without an agent"),
                    _ => error,
                });
            }
            (Err(error), ..) => {
                let error = format!("{error:#}").replace('\n', "; ");
                Some(format!(
                    "{name} is not enforced: {error}; correct it, then `filter-agent reload`"
                ))
            }
        };
        choice.end_with_confirmed(refusal);
        Ok(choice)
    }

    /// Every policy that is known.
    pub(super) fn files(&self) -> impl Iterator<Item = &Arc<PolicyFile>> {
        let candidates = self.candidates.iter().map(|candidate| &candidate.file);
        let tried = self.tried.iter().map(|(_, tried)| tried);
        candidates.chain(&self.before).chain(tried)
    }

    /// Puts another form of each policy in its place.
    pub(super) fn fill(&mut self, fill: impl Fn(&Arc<PolicyFile>) -> Arc<PolicyFile>) {
        let candidates = self
            .candidates
            .iter_mut()
            .map(|candidate| &mut candidate.file);
        let tried = self.tried.iter_mut().map(|(_, tried)| tried);
        for file in candidates.chain(&mut self.before).chain(tried) {
            *file = fill(file);
        }
    }

    fn end_with_confirmed(&mut self, instead_of_file: Option<String>) {
        let before = self.before.clone();
        let confirmed = before.map(|before| Candidate::new(before, instead_of_file));
        self.candidates.extend(confirmed);
    }

    /// Takes what the last agent left of a window.
    fn take_window(&mut self, kept: window::Kept, now: Now) {
        self.abandoned = kept.abandoned.clone();
        self.kept_window = Some(kept.clone());
        let confirmed = self.confirmed.as_ref().map(|confirmed| &confirmed.policy);
        let Some(open) = kept.open else { return };
        // It was confirmed, and the agent ended before the window was removed.
        if confirmed == Some(&open.policy) {
            return;
        }
        match PolicyFile::parse(&open.path, open.policy.clone()) {
            Ok(tried) => self.tried = Some((open, tried.into())),
            // Another version of the agent accepted it.
            Err(_) => self.abandon(&open, now),
        }
    }

    /// Falls back from the policy that was tried, if there is a policy to fall back to.
    pub(super) fn fall_back(&mut self, now: Now) {
        if let Some((open, _)) = &self.tried
            && self.before.is_some()
        {
            let open = open.clone();
            self.abandon(&open, now);
        }
    }

    fn abandon(&mut self, open: &Open, now: Now) {
        let text = Text {
            hash: hash(&open.policy),
            reason: window::Reason::Expired,
            id: Some(open.id),
            at: now.wall,
        };
        let entry = Entry::warning(text.to_string());
        entry.with("REASON", "fell-back").log();
        self.abandoned.add(text);
    }

    /// Sets of regions that are not on disk under their names, for the confirmed policy.
    pub(super) fn displaced(&self, file: &PolicyFile) -> BTreeMap<String, Set> {
        let is_confirmed = self
            .before
            .as_ref()
            .is_some_and(|before| before.text == file.text);
        let open = self.tried.as_ref().map(|(open, _)| open);
        let displaced = open
            .filter(|_| is_confirmed)
            .map(|open| open.regions.clone());
        displaced.unwrap_or_default()
    }
}

/// What was kept of a window and of abandoned texts.
async fn read_window(options: &Options) -> Result<window::Kept> {
    let directory = options.state_dir.clone();
    let path = store::window_path(&directory);
    let what = "read what was kept of policies that were tried";
    let read = move || store::read_window(&directory);
    let kept = threads::run_within(&threads::POLICIES, READ_TIMEOUT, what, &path, read).await;
    Ok(kept?.unwrap_or_default())
}

async fn read_policy(path: &Path) -> Result<Arc<PolicyFile>> {
    let path = path.to_owned();
    let what = format!("read {}", path.display());
    let read = path.clone();
    let read = move || PolicyFile::read_regular(&read);
    let file = threads::run_within(&threads::POLICIES, READ_TIMEOUT, &what, &path, read);
    file.await.map(Arc::new)
}

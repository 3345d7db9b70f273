//! Writing a document, once what speaks against it was seen.

use std::{path::Path, process::ExitCode};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use jiff::Timestamp;

use super::{
    args::{Access, Waiting},
    difference::{Difference, under_way},
    read_document, status, writer,
};
use crate::{
    etcd::client::{Changed, Client, NothingWritten, Overview},
    policy::check_document,
};

/// How often a rule is added anew to what somebody else has written meanwhile.
const MAX_TRIES: usize = 100;

/// How much of what speaks against a change is looked at.
#[derive(Clone, Copy)]
pub(super) enum Care {
    /// All of it.
    Whole { yes: bool },
    /// Only whether hosts would refuse it: the rest was looked at when it was rolled out.
    Refusals { yes: bool },
    /// Less is allowed, or what was before: written first, told then.
    Told,
}

/// A document to be written, and what is known of it.
pub(super) struct Proposal {
    pub(super) difference: Difference,
    /// Hosts that would refuse it, and why.
    refusals: Vec<String>,
    /// Names of databases and hosts that no host has reported.
    unknown: Vec<String>,
    /// Hosts that do not believe etcd.
    held: Option<String>,
    /// Hosts of which a backup's word is all that is known.
    elsewhere: Option<String>,
    /// Hosts that enforce a document which is not there any more.
    lost: Option<String>,
}

impl Proposal {
    /// # Errors
    /// The text is no document.
    pub(super) fn new(
        overview: &Overview,
        database: &str,
        before: Option<&[u8]>,
        text: &str,
    ) -> Result<Self, String> {
        let now = Timestamp::now();
        let before = before.and_then(|text| check_document(text).ok());
        let after = check_document(text.as_bytes())?;
        let on = under_way(&after, now).map(|rollout| &rollout.on);
        Ok(Self {
            difference: Difference::between(before.as_ref(), &after, now),
            refusals: status::refusals(overview, database, text),
            held: status::held(overview, database),
            elsewhere: status::elsewhere(overview, database),
            lost: status::lost(overview, database, before.is_some()),
            unknown: status::unknown(overview, database, on),
        })
    }

    pub(super) fn doubts(&self) -> Vec<String> {
        let all = [&self.unknown, &self.refusals];
        let seen = all
            .into_iter()
            .flatten()
            .chain(&self.held)
            .chain(&self.elsewhere)
            .chain(&self.lost);
        let seen = seen.cloned();
        seen.chain(self.difference.doubts()).collect()
    }

    /// Why hosts would not enforce it, or may not.
    pub(super) fn unenforced(&self) -> Vec<String> {
        let seen = self.refusals.iter().chain(&self.held);
        seen.chain(&self.elsewhere).cloned().collect()
    }

    /// # Errors
    /// Something speaks against it.
    pub(super) fn check(&self, care: Care) -> Result<()> {
        let (doubts, yes) = match care {
            Care::Whole { yes } => (self.doubts(), yes),
            Care::Refusals { yes } => (self.unenforced(), yes),
            Care::Told => return Ok(()),
        };
        ensure!(
            yes || doubts.is_empty(),
            "{}: with --yes it is written all the same; nothing is written",
            doubts.join("; ")
        );
        Ok(())
    }

    fn report(&self, database: &str, revision: i64) {
        if let Some(lost) = &self.lost {
            say!("note: {lost}");
        }
        for line in self.difference.lines() {
            say!("{line}");
        }
        say!("the document of {database} is written, at revision {revision}");
    }
}

pub(super) async fn put(
    client: &mut Client,
    database: &str,
    file: &Path,
    if_revision: Option<i64>,
    yes: bool,
) -> Result<()> {
    let text = read_document(file).context(NothingWritten)?;
    let found = client
        .document(database, None)
        .await
        .context(NothingWritten)?;
    let revision = found.as_ref().map_or(0, |value| value.mod_revision);
    if let Some(wanted) = if_revision.filter(|&wanted| wanted != revision) {
        bail!(
            "the document of {database} {}, not the one of revision {wanted}: nothing is written",
            match revision {
                0 => "is not there".into(),
                revision => format!("is that of revision {revision}"),
            }
        );
    }
    let before = found.as_ref().map(|value| value.text.as_slice());
    if before == Some(text.as_bytes()) {
        say!("no difference: the document of revision {revision} is the same");
        return Ok(());
    }
    let overview = client.overview().await.context(NothingWritten)?;
    let proposal = Proposal::new(&overview, database, before, &text);
    let proposal = proposal.map_err(anyhow::Error::msg)?;
    proposal.check(Care::Whole { yes })?;
    let written = client.put(database, &text, revision).await;
    let written = written.map_err(|error| match error.downcast_ref::<Changed>() {
        Some(changed) => anyhow!(
            "somebody else writes the document of {database}: {changed}; nothing is written: look at it and try again"
        ),
        None => error,
    })?;
    proposal.report(database, written);
    Ok(())
}

/// Changes a document, and again where somebody else has changed it meanwhile.
pub(super) async fn edit(
    database: &str,
    change: impl Fn(Option<&[u8]>) -> Result<String, String>,
    care: Care,
    waiting: Waiting,
    access: &Access,
) -> Result<ExitCode> {
    let mut client = writer(access).await?;
    // A few hosts can report more than can be read: that must not stop a command that takes access away.
    let (overview, unread) = match (client.overview().await, care) {
        (Err(error), Care::Told) => (Overview::default(), Some(error)),
        (overview, _) => (overview.context(NothingWritten)?, None),
    };
    for _ in 0..MAX_TRIES {
        let found = client.document(database, None).await;
        let found = found.context(NothingWritten)?;
        let revision = found.as_ref().map_or(0, |value| value.mod_revision);
        let before = found.as_ref().map(|value| value.text.as_slice());
        let changed = change(before).and_then(|text| {
            let proposal = Proposal::new(&overview, database, before, &text)?;
            Ok((text, proposal))
        });
        let (text, proposal) = changed.map_err(|error| {
            let is_readable = before.is_some_and(|text| check_document(text).is_ok());
            let lost = status::lost(&overview, database, is_readable);
            let lost = lost.map(|lost| format!("; {lost}")).unwrap_or_default();
            anyhow!("the document of {database}: {error}; nothing is written{lost}")
        })?;
        proposal.check(care)?;
        match client.put(database, &text, revision).await {
            Ok(written) => {
                proposal.report(database, written);
                if let Some(error) = unread {
                    return Err(
                        error.context("it is written, but what hosts report cannot be read")
                    );
                }
                let exit = follow(&mut client, database, waiting).await?;
                let unenforced = proposal.unenforced();
                ensure!(
                    unenforced.is_empty() || !matches!(care, Care::Told),
                    "it is written, but {}: what was in force there may go on",
                    unenforced.join("; ")
                );
                return Ok(exit);
            }
            Err(error) if error.is::<Changed>() => {}
            Err(error) => return Err(error),
        }
    }
    bail!("the document of {database} was changed by others {MAX_TRIES} times: nothing is written");
}

/// Waits until the hosts have what was written, if that is asked for.
pub(super) async fn follow(
    client: &mut Client,
    database: &str,
    waiting: Waiting,
) -> Result<ExitCode> {
    match waiting.wait {
        Some(_) => status::status(client, Some(database), waiting.wait, false).await,
        None => Ok(ExitCode::SUCCESS),
    }
}

//! `fleet rollout --soak`: a rollout whose hosts are watched, and which is taken back where one of them is worse off.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use jiff::{SignedDuration, Timestamp};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{
    args::Access,
    difference::under_way,
    in_seconds,
    soak::{Halt, Watch},
    write::{Care, Proposal},
};
use crate::{
    etcd::client::{Changed, Client, NothingWritten},
    policy::{check_document, with_rollout, without_rollout},
    text::list,
};

/// Pause between two looks at the hosts.
const PAUSE: Duration = Duration::from_millis(500);

/// Time beyond the soak for hosts to begin, and for the end to be decided.
const MARGIN: Duration = Duration::from_secs(60);

/// A rollout to make, and how it is watched.
pub(super) struct Soaked<'a> {
    pub(super) database: &'a str,
    /// The document to roll out.
    pub(super) text: &'a str,
    pub(super) on: &'a [String],
    pub(super) lasting: Duration,
    pub(super) soak: Duration,
    pub(super) promotes: bool,
    pub(super) yes: bool,
    pub(super) access: &'a Access,
}

/// A document of ours, and its revision in etcd once it is written.
struct Written {
    text: String,
    revision: i64,
    until: Timestamp,
}

impl Written {
    /// As `Soaked::put`.
    async fn put(
        mut self,
        soaked: &Soaked<'_>,
        client: &mut Client,
        expected: i64,
        limit: Timestamp,
        interrupts: &mut Interrupts,
    ) -> Result<Self> {
        self.revision = soaked
            .put(client, &self.text, expected, limit, interrupts)
            .await?;
        Ok(self)
    }
}

enum End {
    /// Why it was halted.
    Halted(Halt),
    Interrupted,
    /// The time of the rollout is over before its hosts could be judged: etcd was away.
    Over,
}

struct Interrupts([Signal; 2]);

impl Interrupts {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("listen for signals");
        Ok(Self([
            listen(SignalKind::interrupt())?,
            listen(SignalKind::terminate())?,
        ]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
}

impl Soaked<'_> {
    pub(super) async fn perform(&self) -> Result<ExitCode> {
        let lasts = shown(self.soak);
        ensure!(
            self.lasting >= self.soak + MARGIN,
            "a rollout of {} has no room for {lasts} of --soak and {} more: say --for; nothing is written",
            shown(self.lasting),
            shown(MARGIN)
        );
        let mut interrupts = Interrupts::listen()?;
        let mut client = super::writer(self.access).await?;
        let overview = client.overview().await.context(NothingWritten)?;
        let found = client.document(self.database, None).await;
        let found = found.context(NothingWritten)?;
        let before = found.as_ref().map(|value| value.text.as_slice());
        let rules = before.map_or(Ok(Default::default()), check_document);
        let rules = rules.map_err(|error| self.unwritten(&error))?;
        ensure!(
            under_way(&rules, Timestamp::now()).is_none(),
            "a rollout of {} is under way: promote or abort it; nothing is written",
            self.database
        );
        // The rules that are in force, so that the hosts report what they drop without the change.
        let same = before.unwrap_or(b"rules: []");
        let revision = found.as_ref().map_or(0, |value| value.mod_revision);
        let rolled = self.text.as_bytes();
        // Refused now, rather than with the baseline's rollout in force.
        let proposed = self.rolled_out(before, rolled, self.lasting)?.text;
        let care = Care::Whole { yes: self.yes };
        let proposal = Proposal::new(&overview, self.database, before, &proposed);
        let proposal = proposal.map_err(|error| self.unwritten(&error))?;
        proposal.check(care)?;
        let baseline = self.rolled_out(before, same, self.soak + MARGIN)?;
        let until = baseline.until;
        let baseline = baseline.put(
            self,
            &mut client,
            revision,
            Timestamp::now(),
            &mut interrupts,
        );
        let baseline = baseline
            .await
            .map_err(|error| self.unanswered(error, "begin", until))?;
        for line in proposal.difference.lines() {
            say!("{line}");
        }
        say!(
            "first without it, on {}: watched for {lasts}",
            list(self.on.iter())
        );
        let mut watch = Watch::new(self.database, baseline.revision, self.on, Instant::now());
        if let Err(end) = self
            .attend(&mut client, &mut watch, &baseline, &mut interrupts)
            .await
        {
            return self
                .end(end, &mut client, before, &baseline, &mut interrupts)
                .await;
        }
        if let Err(why) = watch.take_baseline() {
            let end = End::Halted(Halt::Host(why));
            return self
                .end(end, &mut client, before, &baseline, &mut interrupts)
                .await;
        }
        let rolled = self.rolled_out(before, rolled, self.lasting)?;
        let until = rolled.until;
        let rolled = rolled.put(
            self,
            &mut client,
            baseline.revision,
            baseline.until,
            &mut interrupts,
        );
        let rolled = rolled
            .await
            .map_err(|error| self.unanswered(error, "roll out", until))?;
        say!(
            "rolled out to {}, at revision {}: watched for {lasts}",
            list(self.on.iter()),
            rolled.revision
        );
        watch.go_on(rolled.revision, Instant::now());
        let watched = self
            .attend(&mut client, &mut watch, &rolled, &mut interrupts)
            .await;
        if let Err(end) = watched {
            return self
                .end(end, &mut client, before, &rolled, &mut interrupts)
                .await;
        }
        if !self.promotes {
            say!(
                "none of them is worse off; in force there until {}; to keep it: filter-agent fleet promote {}",
                rolled.until,
                self.database
            );
            return Ok(ExitCode::SUCCESS);
        }
        let text = without_rollout(rolled.text.as_bytes(), true);
        let text = text.map_err(|error| self.unwritten(&error))?;
        // Also those that are not in the rollout, and whose policies have changed meanwhile.
        let overview = client.overview().await.with_context(|| {
            format!("promote; if nobody does, hosts return at {}", rolled.until)
        })?;
        let rolled_out = Some(rolled.text.as_bytes());
        let proposal = Proposal::new(&overview, self.database, rolled_out, &text);
        let proposal = proposal.map_err(|error| self.unwritten(&error))?;
        let unenforced = proposal.unenforced();
        if !unenforced.is_empty() && !self.yes {
            let end = End::Halted(Halt::Host(unenforced.join("; ")));
            return self
                .end(end, &mut client, before, &rolled, &mut interrupts)
                .await;
        }
        let promoted = self.put(
            &mut client,
            &text,
            rolled.revision,
            rolled.until,
            &mut interrupts,
        );
        let promoted = promoted
            .await
            .map_err(|error| self.unanswered(error, "promote", rolled.until))?;
        say!("none of them is worse off: promoted, at revision {promoted}");
        Ok(ExitCode::SUCCESS)
    }

    /// The document with a rollout of `other`'s rules, yet to be written.
    fn rolled_out(
        &self,
        before: Option<&[u8]>,
        other: &[u8],
        lasting: Duration,
    ) -> Result<Written> {
        let until = Timestamp::now().checked_add(lasting);
        let until = in_seconds(until.context("no date is that far away")?);
        let text = with_rollout(before, self.on, until, other)
            .and_then(|text| check_document(text.as_bytes()).map(|_| text))
            .map_err(|error| self.unwritten(&error))?;
        Ok(Written {
            revision: 0,
            text,
            until,
        })
    }

    /// Writes a document over `expected`, again and again while etcd does not answer, until `limit`. What went without an
    /// answer may have been written: then its own text is found, and is no change of somebody else. An interrupt ends it.
    async fn put(
        &self,
        client: &mut Client,
        text: &str,
        expected: i64,
        limit: Timestamp,
        interrupts: &mut Interrupts,
    ) -> Result<i64> {
        let is_unanswered = |error: &anyhow::Error| !error.is::<NothingWritten>();
        let mut failed: Option<anyhow::Error> = None;
        loop {
            let error = match client.put(self.database, text, expected).await {
                Ok(revision) => return Ok(revision),
                Err(error) => error,
            };
            if error.is::<Changed>() {
                if failed.as_ref().is_some_and(is_unanswered)
                    && let Some(found) = client.document(self.database, None).await?
                    && found.text == text.as_bytes()
                {
                    return Ok(found.mod_revision);
                }
                return Err(error);
            }
            if failed.is_none() {
                eprintln!("filter-agent: {error:#}; it is tried again until {limit}");
            }
            // That this attempt wrote nothing says nothing of one before.
            let error = failed.take().filter(is_unanswered).unwrap_or(error);
            if Timestamp::now() >= limit {
                return Err(error);
            }
            tokio::select! {
                () = interrupts.next() => return Err(error),
                () = tokio::time::sleep(PAUSE) => {}
            }
            failed = Some(error);
            if let Ok(other) = super::client(self.access).await {
                *client = other;
            }
        }
    }

    fn unwritten(&self, error: &str) -> anyhow::Error {
        anyhow!(
            "the document of {}: {error}; nothing is written",
            self.database
        )
    }

    /// The error of a write that did not come to its end: somebody else wrote, or whether it was written is not known.
    fn unanswered(&self, error: anyhow::Error, what: &str, until: Timestamp) -> anyhow::Error {
        match error.downcast_ref::<Changed>() {
            Some(changed) => anyhow!(
                "somebody else writes the document of {}: {changed}; nothing of it is taken back: see `fleet get`",
                self.database
            ),
            None => error.context(format!(
                "{what}: see with `fleet get {}` what is written; a rollout that is in it ends at {until}",
                self.database
            )),
        }
    }

    /// Watches the hosts for the time of the soak, from when all of them have it in force.
    async fn attend(
        &self,
        client: &mut Client,
        watch: &mut Watch,
        written: &Written,
        interrupts: &mut Interrupts,
    ) -> Result<(), End> {
        let mut end = None;
        let mut is_away = false;
        loop {
            match client.overview().await {
                Ok(overview) => {
                    if std::mem::take(&mut is_away) {
                        watch.excuse(Instant::now());
                    }
                    watch.look(&overview, Instant::now()).map_err(End::Halted)?;
                    if watch.has_all() {
                        let now = Instant::now();
                        let end = *end.get_or_insert(now + self.soak);
                        if now >= end && watch.is_judged(now) {
                            return Ok(());
                        }
                    }
                }
                Err(error) => {
                    if !is_away {
                        eprintln!(
                            "filter-agent: {error:#}; it is asked again until {}",
                            written.until
                        );
                    }
                    is_away = true;
                    // Perhaps of another member.
                    if let Ok(other) = super::client(self.access).await {
                        *client = other;
                    }
                }
            }
            if Timestamp::now() >= written.until {
                return Err(End::Over);
            }
            tokio::select! {
                () = interrupts.next() => return Err(End::Interrupted),
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    /// Takes the rollout back, if it is still ours, and says why.
    async fn end(
        &self,
        end: End,
        client: &mut Client,
        before: Option<&[u8]>,
        written: &Written,
        interrupts: &mut Interrupts,
    ) -> Result<ExitCode> {
        let why = match end {
            End::Halted(Halt::Changed) => bail!(
                "somebody else has changed the document of {}: the rollout is not watched any more, and nothing is taken back; where it is still in the document it ends at {}, or with: filter-agent fleet abort {}",
                self.database,
                written.until,
                self.database
            ),
            End::Over => bail!(
                "the rollout ended by itself at {}, before its hosts had been watched for long enough: whether they were worse off is not known; to take it out: filter-agent fleet abort {}",
                written.until,
                self.database
            ),
            End::Halted(Halt::Host(why)) => Some(why),
            End::Interrupted => None,
        };
        if why.is_none() {
            eprintln!(
                "filter-agent: interrupted: the rollout is taken back; once more leaves it as it is"
            );
        }
        let text = match before.map(|before| String::from_utf8(before.to_vec())) {
            Some(Ok(text)) => Ok(text),
            _ => without_rollout(written.text.as_bytes(), false),
        };
        let text = text.map_err(|error| self.unwritten(&error))?;
        let taken = self.put(client, &text, written.revision, written.until, interrupts);
        let taken = taken.await;
        let is_taken = taken.is_ok();
        let taken = match taken {
            Ok(revision) => format!(
                "the rollout is taken back, at revision {revision}; a host that does not follow has it until {}",
                written.until
            ),
            Err(error) if error.is::<Changed>() => {
                "somebody else has changed the document meanwhile: nothing is taken back".into()
            }
            Err(error) => format!(
                "the rollout cannot be taken back ({error:#}): its hosts return by themselves at {}",
                written.until
            ),
        };
        match why {
            Some(why) => bail!("halted: {why}; {taken}"),
            None if is_taken => {
                eprintln!("filter-agent: {taken}");
                Ok(ExitCode::from(130))
            }
            None => bail!("interrupted; {taken}"),
        }
    }
}

fn shown(duration: Duration) -> String {
    SignedDuration::try_from(duration).map_or_else(|_| "ages".into(), |it| format!("{it:#}"))
}

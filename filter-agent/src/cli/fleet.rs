//! `fleet`: documents in etcd, for a person with a certificate and without root.

mod args;
mod rollout;
mod soak;
mod status;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use jiff::Timestamp;

use crate::{
    cli::output::{end_with_the_reader, failure_if},
    etcd::client::{Changed, Client, Overview},
    fleet::{Settings, Value},
    policy::{
        Document, MAX_DOCUMENT, Rule, Source, check_document, check_host, check_label, check_name,
        parse_fleet, with_rollout, with_rule, without_rollout, without_rule,
    },
    temporary::parse_source,
    text::{counted, list, written_out},
};

pub(super) use args::Fleet;
use args::{Access, Waiting};
use rollout::Soaked;

/// How often a rule is added anew to what somebody else has written meanwhile.
const MAX_TRIES: usize = 100;

pub(super) async fn fleet(command: Fleet) -> Result<ExitCode> {
    if let Some(database) = command.database() {
        check_name(database).map_err(|error| anyhow!("database {database:?}: {error}"))?;
    }
    match command {
        Fleet::Get {
            database,
            revision,
            access,
        } => get(&database, revision, &access).await,
        Fleet::Diff {
            database,
            file,
            access,
        } => diff(&database, &file, &access).await,
        Fleet::Status {
            database,
            waiting,
            json,
            access,
        } => {
            let mut client = client(&access).await?;
            status::status(&mut client, database.as_deref(), waiting.wait, json).await
        }
        Fleet::Forget { host, access } => forget(&host, &access).await,
        Fleet::Put {
            database,
            file,
            if_revision,
            yes,
            waiting,
            access,
        } => {
            let mut client = client(&access).await?;
            put(&mut client, &database, &file, if_revision, yes).await?;
            follow(&mut client, &database, waiting).await
        }
        Fleet::Allow {
            database,
            source,
            lasting,
            expires,
            label,
            waiting,
            access,
        } => {
            let after = lasting.map(|lasting| Timestamp::now().checked_add(lasting));
            let after = after.transpose().context("no date is that far away")?;
            let expires = expires.or(after.map(in_seconds));
            if let Some(label) = &label {
                check_label(label).map_err(anyhow::Error::msg)?;
            }
            let rule = Rule {
                source: Source::Cidr(parse_source(&source)?),
                except: Vec::new(),
                label,
                expires,
            };
            let change = |text: Option<&[u8]>| with_rule(text, &rule);
            edit(&database, change, waiting, &access).await
        }
        Fleet::Revoke {
            database,
            source,
            waiting,
            access,
        } => {
            let source = Source::Cidr(parse_source(&source)?);
            let change = |text: Option<&[u8]>| {
                let text = text.ok_or("there is no document")?;
                let before = check_document(text)?;
                let mut sources = before.rules.iter().map(|rule| &rule.source);
                if !sources.any(|other| *other == source) {
                    return Err(format!("it has no rule of {source}"));
                }
                without_rule(text, &source)
            };
            edit(&database, change, waiting, &access).await
        }
        Fleet::Rollout {
            database,
            file,
            on,
            lasting,
            soak,
            promote,
            waiting,
            access,
        } => {
            let text = read_document(&file)?;
            if let Some(soak) = soak {
                let soaked = Soaked {
                    database: &database,
                    text: &text,
                    on: &on,
                    lasting,
                    soak,
                    promotes: promote,
                    access: &access,
                };
                return soaked.perform().await;
            }
            let until = Timestamp::now().checked_add(lasting);
            let until = in_seconds(until.context("no date is that far away")?);
            let change = |before: Option<&[u8]>| with_rollout(before, &on, until, text.as_bytes());
            let exit = edit(&database, change, waiting, &access).await?;
            say!(
                "in force on {} until {until}; to keep it: filter-agent fleet promote {database}",
                list(on.iter())
            );
            Ok(exit)
        }
        Fleet::Promote {
            database,
            waiting,
            access,
        } => {
            let change = |text: Option<&[u8]>| end_rollout(text, true);
            edit(&database, change, waiting, &access).await
        }
        Fleet::Abort {
            database,
            waiting,
            access,
        } => {
            let change = |text: Option<&[u8]>| end_rollout(text, false);
            edit(&database, change, waiting, &access).await
        }
        Fleet::Recover { yes, access } => recover(yes, &access).await,
    }
}

fn end_rollout(text: Option<&[u8]>, promoted: bool) -> Result<String, String> {
    without_rollout(text.ok_or("there is no document")?, promoted)
}

fn in_seconds(at: Timestamp) -> Timestamp {
    at.round(jiff::Unit::Second).unwrap_or(at)
}

async fn client(access: &Access) -> Result<Client> {
    let path = access.fleet.display();
    let text = fs::read_to_string(&access.fleet).with_context(|| format!("read {path}"))?;
    let fleet = parse_fleet(&text).map_err(|problems| {
        let lines = problems.iter().map(|problem| format!("{path}: {problem}"));
        anyhow!(lines.collect::<Vec<_>>().join("\n"))
    })?;
    ensure!(
        !fleet.endpoints.is_empty(),
        "{path}: `fleet` names no endpoints"
    );
    Client::connect(&Settings {
        endpoints: fleet.endpoints,
        ca_file: fleet.ca_file,
        cert_file: fleet.cert_file,
        key_file: fleet.key_file,
        databases: Default::default(),
        own: None,
    })
    .await
}

fn read_document(file: &Path) -> Result<String> {
    let name = match file == Path::new("-") {
        true => "standard input".into(),
        false => file.display().to_string(),
    };
    let read = || -> Result<String> {
        let mut text = Vec::new();
        let most = MAX_DOCUMENT as u64 + 1;
        match file == Path::new("-") {
            true => io::stdin().take(most).read_to_end(&mut text)?,
            false => fs::File::open(file)?.take(most).read_to_end(&mut text)?,
        };
        check_document(&text).map_err(anyhow::Error::msg)?;
        Ok(String::from_utf8(text)?)
    };
    read().with_context(|| format!("read {name}"))
}

async fn get(database: &str, revision: Option<i64>, access: &Access) -> Result<ExitCode> {
    let found = client(access).await?.document(database, revision).await?;
    let at = revision.map(|revision| format!(" at revision {revision}"));
    let value = found.with_context(|| {
        format!(
            "etcd has no document of {database}{}",
            at.unwrap_or_default()
        )
    })?;
    end_with_the_reader()?;
    say!("# revision {}", value.mod_revision);
    for line in String::from_utf8_lossy(&value.text).lines() {
        say!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

async fn diff(database: &str, file: &Path, access: &Access) -> Result<ExitCode> {
    let text = read_document(file)?;
    let mut client = client(access).await?;
    let found = client.document(database, None).await?;
    let lines = differences(found.as_ref(), &text)?.lines;
    let refusals = status::refusals(&client.overview().await?, database, &text);
    end_with_the_reader()?;
    if lines.is_empty() {
        say!("no difference");
    }
    for line in lines.iter().chain(&refusals) {
        say!("{line}");
    }
    Ok(failure_if(!refusals.is_empty()))
}

async fn put(
    client: &mut Client,
    database: &str,
    file: &Path,
    if_revision: Option<i64>,
    yes: bool,
) -> Result<()> {
    let text = read_document(file)?;
    let found = client.document(database, None).await?;
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
    let difference = differences(found.as_ref(), &text)?;
    if found
        .as_ref()
        .is_some_and(|value| value.text == text.as_bytes())
    {
        say!("no difference: the document of revision {revision} is the same");
        return Ok(());
    }
    let overview = client.overview().await?;
    if !yes {
        check_believed(&overview)?;
    }
    let refusals = status::refusals(&overview, database, &text);
    ensure!(
        yes || refusals.is_empty(),
        "{}: with --yes it is written all the same; nothing is written",
        refusals.join("; ")
    );
    ensure!(
        yes || difference.removed * 2 <= difference.before || difference.before == 0,
        "{} of {} would go: look at `filter-agent fleet diff`, then add --yes; nothing is written",
        counted(difference.removed, "rule", "rules"),
        difference.before
    );
    let written = client.put(database, &text, revision).await;
    let written = written.map_err(|error| match error.downcast_ref::<Changed>() {
        Some(changed) => anyhow!(
            "somebody else writes the document of {database}: {changed}; nothing is written: look at it and try again"
        ),
        None => error,
    })?;
    report(database, written, &difference);
    Ok(())
}

/// Changes a document, and again where somebody else has changed it meanwhile.
async fn edit(
    database: &str,
    change: impl Fn(Option<&[u8]>) -> Result<String, String>,
    waiting: Waiting,
    access: &Access,
) -> Result<ExitCode> {
    let mut client = client(access).await?;
    check_believed(&client.overview().await?)?;
    for _ in 0..MAX_TRIES {
        let found = client.document(database, None).await?;
        let revision = found.as_ref().map_or(0, |value| value.mod_revision);
        let text = change(found.as_ref().map(|value| value.text.as_slice()));
        let text = text.and_then(|text| check_document(text.as_bytes()).map(|_| text));
        let text = text
            .map_err(|error| anyhow!("the document of {database}: {error}; nothing is written"))?;
        let difference = differences(found.as_ref(), &text)?;
        match client.put(database, &text, revision).await {
            Ok(written) => {
                report(database, written, &difference);
                return follow(&mut client, database, waiting).await;
            }
            Err(error) if error.is::<Changed>() => {}
            Err(error) => return Err(error),
        }
    }
    bail!("the document of {database} was changed by others {MAX_TRIES} times: nothing is written");
}

/// # Errors
/// A host does not believe etcd: what is written now would not be enforced there.
fn check_believed(overview: &Overview) -> Result<()> {
    let holding = status::Fleet::of(overview, None).holding;
    ensure!(
        holding.is_empty(),
        "{} does not believe etcd, which went back: `filter-agent fleet status` says why, and `fleet recover` has it believed \
         again; nothing is written",
        list(holding.iter())
    );
    Ok(())
}

/// Waits until the hosts have what was written, if that is asked for.
async fn follow(client: &mut Client, database: &str, waiting: Waiting) -> Result<ExitCode> {
    match waiting.wait {
        Some(_) => status::status(client, Some(database), waiting.wait, false).await,
        None => Ok(ExitCode::SUCCESS),
    }
}

async fn forget(host: &str, access: &Access) -> Result<ExitCode> {
    check_host(host).map_err(anyhow::Error::msg)?;
    let mut client = client(access).await?;
    let overview = client.overview().await?;
    ensure!(
        !overview.alive.contains_key(host),
        "{host} is there: it would report itself again"
    );
    let seen = status::last_seen(&overview, host);
    ensure!(client.forget(host).await?, "etcd knows no host {host}");
    let seen = seen.map(|at| format!(", which reported itself last at {at:.0}"));
    say!("{host}{} is forgotten", seen.unwrap_or_default());
    Ok(ExitCode::SUCCESS)
}

fn report(database: &str, revision: i64, difference: &Difference) {
    for line in &difference.lines {
        say!("{line}");
    }
    say!("the document of {database} is written, at revision {revision}");
}

struct Difference {
    /// Rules of the document before, and how many of them are gone.
    before: usize,
    removed: usize,
    lines: Vec<String>,
}

fn differences(found: Option<&Value>, text: &str) -> Result<Difference> {
    // A document that cannot be read has no rules that somebody relies on.
    let before = found.and_then(|value| check_document(&value.text).ok());
    let after = check_document(text.as_bytes()).map_err(anyhow::Error::msg)?;
    let (before, after) = (by_source(before), by_source(Some(after)));
    let mut lines = Vec::new();
    let is_gone = |source: &&Source| !after.contains_key(*source);
    let gone: Vec<&Source> = before.keys().filter(is_gone).collect();
    lines.extend(gone.iter().map(|source| format!("- {source}")));
    for (source, rule) in &after {
        match before.get(source) {
            None => lines.push(format!("+ {source}{}", said(rule))),
            Some(was) if was != rule => {
                lines.push(format!("~ {source}{} -> {}", said(was), said(rule).trim()));
            }
            Some(_) => {}
        }
    }
    Ok(Difference {
        before: before.len(),
        removed: gone.len(),
        lines,
    })
}

fn by_source(document: Option<Document>) -> BTreeMap<Source, Rule> {
    let rules = document.map(|document| document.rules).unwrap_or_default();
    let rules = rules.into_iter();
    rules.map(|rule| (rule.source.clone(), rule)).collect()
}

/// ` "office", except 203.0.113.7/32, until 2026-12-31T18:00:00Z`.
fn said(rule: &Rule) -> String {
    let label = rule.label.as_ref().map(|label| format!("{label:?}"));
    let except = rule.except.iter().map(|hole| format!("except {hole}"));
    let expires = rule.expires.map(|at| format!("until {at}"));
    let parts: Vec<String> = label.into_iter().chain(except).chain(expires).collect();
    match parts.is_empty() {
        true => String::new(),
        false => format!(" {}", parts.join(", ")),
    }
}

async fn recover(yes: bool, access: &Access) -> Result<ExitCode> {
    let mut client = client(access).await?;
    let (era, revision) = client.era().await?;
    // Hosts may have seen a later one than a backup holds: seconds since 1970 are later than any.
    let now = u64::try_from(Timestamp::now().as_second()).unwrap_or_default();
    let next = era.checked_add(1).context("count the eras")?.max(now);
    if !yes {
        if !io::stdin().is_terminal() {
            eprintln!("filter-agent: fleet recover asks on a terminal; elsewhere it needs --yes");
            return Ok(ExitCode::from(2));
        }
        print!(
            "{}",
            written_out(
                "Every host will enforce the documents that etcd has now, also where they allow what was revoked since the \
                 backup. Continue? [y/N] "
            )
        );
        io::stdout().flush()?;
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line)?;
        if !matches!(line.trim(), "y" | "Y" | "yes") {
            say!("nothing is changed");
            return Ok(ExitCode::FAILURE);
        }
    }
    client.raise_era(next, revision).await?;
    say!("era {next}: every host believes what etcd has now");
    Ok(ExitCode::SUCCESS)
}

//! `fleet`: documents in etcd, for a person with a certificate and without root.

mod args;
mod difference;
mod rollout;
mod soak;
mod status;
mod write;

use std::{
    fs,
    io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use jiff::Timestamp;

use crate::{
    cli::output::{end_with_the_reader, failure_if},
    etcd::client::{Changed, Client, NothingWritten},
    fleet::{Settings, host_status::HostStatus},
    policy::{
        MAX_DOCUMENT, Rule, Source, check_document, check_host, check_label, check_name,
        parse_fleet, with_rollout, with_rule, without_rollout, without_rule,
    },
    temporary::parse_source,
    text::{list, written_out},
};

use args::Access;
pub(super) use args::Fleet;
use difference::under_way;
use rollout::Soaked;
use write::{Care, Proposal, edit, follow, put};

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
            let mut client = writer(&access).await?;
            put(&mut client, &database, &file, if_revision, yes).await?;
            follow(&mut client, &database, waiting).await
        }
        Fleet::Allow {
            database,
            source,
            lasting,
            expires,
            label,
            yes,
            waiting,
            access,
        } => {
            let after = lasting.map(|lasting| Timestamp::now().checked_add(lasting));
            let after = after.transpose().context("no date is that far away")?;
            let expires = expires.or(after.map(in_seconds));
            if let Some(past) = expires.filter(|&end| end <= Timestamp::now()) {
                bail!("{past} is over: the rule would never be in force; nothing is written");
            }
            if let Some(label) = &label {
                check_label(label).map_err(anyhow::Error::msg)?;
            }
            let rule = Rule {
                source: Source::Cidr(parse_source(&source).context(NothingWritten)?),
                except: Vec::new(),
                label,
                expires,
            };
            let change = |text: Option<&[u8]>| with_rule(text, &rule);
            let care = Care::Whole { yes };
            edit(&database, change, care, waiting, &access).await
        }
        Fleet::Revoke {
            database,
            source,
            waiting,
            access,
        } => {
            let source = Source::Cidr(parse_source(&source).context(NothingWritten)?);
            let change = |text: Option<&[u8]>| {
                let text = text.ok_or("there is no document")?;
                let before = check_document(text)?;
                let rolled = before.rollout.iter().flat_map(|rollout| &rollout.rules);
                let mut sources = before.rules.iter().chain(rolled).map(|rule| &rule.source);
                if !sources.any(|other| *other == source) {
                    return Err(format!("it has no rule of {source}"));
                }
                without_rule(text, &source)
            };
            edit(&database, change, Care::Told, waiting, &access).await
        }
        Fleet::Rollout {
            database,
            file,
            on,
            lasting,
            soak,
            promote,
            yes,
            waiting,
            access,
        } => {
            let text = read_document(&file).context(NothingWritten)?;
            if let Some(soak) = soak {
                let soaked = Soaked {
                    database: &database,
                    text: &text,
                    on: &on,
                    lasting,
                    soak,
                    promotes: promote,
                    yes,
                    access: &access,
                };
                return soaked.perform().await;
            }
            let until = Timestamp::now().checked_add(lasting);
            let until = in_seconds(until.context("no date is that far away")?);
            let change = |before: Option<&[u8]>| with_rollout(before, &on, until, text.as_bytes());
            let exit = edit(&database, change, Care::Whole { yes }, waiting, &access).await?;
            if exit != ExitCode::SUCCESS {
                return Ok(exit);
            }
            say!(
                "rolled out to {} until {until}; to keep it: filter-agent fleet promote {database}",
                list(on.iter())
            );
            Ok(exit)
        }
        Fleet::Promote {
            database,
            yes,
            waiting,
            access,
        } => {
            let change = |text: Option<&[u8]>| {
                let document = check_document(text.ok_or("there is no document")?)?;
                match (under_way(&document, Timestamp::now()), &document.rollout) {
                    (None, Some(over)) => Err(format!(
                        "its rollout ended at {}: roll it out again, or abort it",
                        over.until
                    )),
                    _ => end_rollout(text, true),
                }
            };
            let care = Care::Refusals { yes };
            edit(&database, change, care, waiting, &access).await
        }
        Fleet::Abort {
            database,
            waiting,
            access,
        } => {
            let change = |text: Option<&[u8]>| end_rollout(text, false);
            edit(&database, change, Care::Told, waiting, &access).await
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

/// A client for a command that writes.
async fn writer(access: &Access) -> Result<Client> {
    client(access).await.context(NothingWritten)
}

async fn client(access: &Access) -> Result<Client> {
    let path = access.fleet.display();
    let text = fs::read_to_string(&access.fleet);
    let text = text.with_context(|| format!("read {path} (--fleet names another file)"))?;
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
    let mut client = client(access).await?;
    let found = match (client.document(database, revision).await, revision) {
        (Err(error), Some(_)) => {
            let latest = client.document(database, None).await?;
            let latest = latest.map(|it| format!("; its latest one is of {}", it.mod_revision));
            let latest = latest.unwrap_or_default();
            bail!("{error:#}{latest}")
        }
        (found, _) => found?,
    };
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
    let before = found.as_ref().map(|value| value.text.as_slice());
    let proposal = Proposal::new(&client.overview().await?, database, before, &text);
    let proposal = proposal.map_err(anyhow::Error::msg)?;
    let (lines, doubts) = (proposal.difference.lines(), proposal.doubts());
    end_with_the_reader()?;
    if lines.is_empty() {
        say!("no difference");
    }
    for line in lines.iter().chain(&doubts) {
        say!("{line}");
    }
    Ok(failure_if(!doubts.is_empty()))
}

async fn forget(host: &str, access: &Access) -> Result<ExitCode> {
    check_host(host).map_err(anyhow::Error::msg)?;
    let mut client = writer(access).await?;
    let (is_there, report) = client.host(host).await?;
    ensure!(
        !is_there,
        "{host} is there, by its key /filter-agent/v1/alive/{host}, and would report itself again; if it is gone, remove the key with etcdctl"
    );
    ensure!(client.forget(host).await?, "etcd knows no host {host}");
    let seen = report.map(|it| format!(", which reported itself last at {:.0}", it.at));
    say!("{host}{} is forgotten", seen.unwrap_or_default());
    Ok(ExitCode::SUCCESS)
}

async fn recover(yes: bool, access: &Access) -> Result<ExitCode> {
    let mut client = writer(access).await?;
    let (era, revision) = client.era().await?;
    // Hosts may have seen a later one than a backup holds: seconds since 1970 are later than any.
    let now = u64::try_from(Timestamp::now().as_second()).unwrap_or_default();
    let next = era.checked_add(1).with_context(|| {
        format!("raise the era: {era} is the highest there is: write {now} to its key with etcdctl, unless hosts have believed it")
    });
    let next = next?.max(now);
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
    let raised = client.raise_era(next, revision).await;
    raised.map_err(|error| match error.downcast_ref::<Changed>() {
        Some(changed) => anyhow!("somebody else writes the era: {changed}; nothing is written"),
        None => error,
    })?;
    say!("era {next}: hosts believe what etcd has now");
    let overview = client.overview().await;
    let overview = overview.context("the era is raised, but what hosts report cannot be read")?;
    let is_later = |status: &HostStatus| status.era.is_some_and(|era| era > next);
    let later = overview.reports().filter(|(_, status)| is_later(status));
    let later: Vec<_> = later.map(|(host, _)| host).collect();
    ensure!(
        later.is_empty(),
        "but {} reported a later era, and does not believe an earlier one: `fleet.era` of `filter-agent status --json` there tells it; \
         write a higher one to /filter-agent/v1/era with etcdctl, if that is so",
        list(later.into_iter())
    );
    Ok(ExitCode::SUCCESS)
}

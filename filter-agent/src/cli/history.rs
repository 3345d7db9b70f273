//! `history`: which changes were made, and by whom.

use std::{collections::BTreeMap, fs, io, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;

use crate::{
    cli::{
        args::{HistoryWanted, Output},
        client::{Agent, encode, is_absent},
        output::{LISTED, failure_if, print_table, table},
    },
    history::{
        DatabaseSummary, Listed, Listing, Origin, Past, PastFleet, PastPolicy, PastTemporary,
        State, Summary, Wanted, What,
    },
    report::{Action, By},
    store::history::read_history,
    text::{counted, is_control, list},
    threads,
};

/// Time allowed for the state directory to be read, where no agent runs.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Names of users by their ids.
type Users = BTreeMap<u32, String>;

pub(super) async fn history(
    wanted: HistoryWanted,
    socket: &Path,
    state_dir: &Path,
    output: &Output,
) -> Result<ExitCode> {
    let HistoryWanted {
        id,
        database,
        since,
        limit,
        text,
    } = wanted;
    let since = since.map(|since| Timestamp::now().checked_sub(since));
    let since = since
        .transpose()
        .context("that long ago there was no clock")?;
    let usual = (!output.json).then_some(LISTED);
    let wanted = Wanted {
        id,
        database,
        since,
        limit: limit.map(|limit| limit.get()).or(usual),
    };
    let asked = Agent::new(socket).get(&request(&wanted, text)).await;
    let (listing, is_whole) = match asked {
        Ok(listing) => (listing, true),
        Err(error) => match error.downcast_ref::<io::Error>() {
            Some(cause) if is_absent(cause) => kept(wanted, text, state_dir).await?,
            _ => return Err(error),
        },
    };
    if let (Some(text), false) = (&listing.text, output.json) {
        say!("{}", text.trim_end_matches('\n'));
        return Ok(failure_if(!is_whole));
    }
    output.print(&listing, |listing| match (id, listing.changes.as_slice()) {
        (Some(_), [past]) => print_change(past),
        _ => print_listing(listing),
    })?;
    Ok(failure_if(!is_whole))
}

fn request(wanted: &Wanted, text: bool) -> String {
    let Wanted {
        id,
        database,
        since,
        limit,
    } = wanted;
    let parameters = [
        id.map(|id| format!("id={id}")),
        database
            .as_ref()
            .map(|name| format!("database={}", encode(name))),
        since.map(|since| format!("since={since}")),
        limit.map(|limit| format!("limit={limit}")),
        text.then(|| "text=true".into()),
    ];
    let parameters: Vec<String> = parameters.into_iter().flatten().collect();
    format!("/v1/history?{}", parameters.join("&"))
}

/// Reads the state directory. Returns whether all of it could be read, too.
///
/// # Errors
/// There is no such directory, or nothing of it may be read.
async fn kept(wanted: Wanted, text: bool, directory: &Path) -> Result<(Listing, bool)> {
    let (place, named) = (directory.to_owned(), directory.display().to_string());
    let read = move || {
        let metadata = fs::metadata(&place);
        let metadata = metadata
            .with_context(|| format!("no agent runs; read what is kept in {}", place.display()))?;
        ensure!(metadata.is_dir(), "{} is not a directory", place.display());
        ensure!(
            nix::unistd::geteuid().is_root(),
            "no agent runs; only root may read what is kept in {}",
            place.display()
        );
        let kept = read_history(&place);
        let mut listing = kept.history.list(&wanted)?;
        if let (Some(id), true) = (wanted.id, text) {
            listing.text = Some(kept.history.shown_text(id)?);
        }
        let errors = kept.unreadable.into_iter();
        let errors: Vec<String> = errors.map(|(_, error)| format!("{error:#}")).collect();
        Ok((listing, errors))
    };
    let what = format!("read {named}");
    let (listing, errors) =
        threads::run_within(&threads::POLICIES, READ_TIMEOUT, &what, directory, read).await?;
    eprintln!("filter-agent: no agent runs: this is what is kept in {named}");
    for error in &errors {
        eprintln!("filter-agent: {error}");
    }
    Ok((listing, errors.is_empty()))
}

/// Login names, of this host's own users only: a directory service that hangs must not hold up the answer.
fn users() -> Users {
    let text = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let user = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        // As everything that is printed and that others may have written.
        Some((uid, name.replace(is_control, "?")))
    };
    // Of several names of one user the first is the one that `getpwuid` gives.
    text.lines().rev().filter_map(user).collect()
}

fn user(uid: u32, users: &Users) -> String {
    users
        .get(&uid)
        .cloned()
        .unwrap_or_else(|| format!("uid {uid}"))
}

/// `kim, filter-agent`.
fn who(past: &Past, users: &Users) -> String {
    let Some(by) = &past.by else {
        return match past.origin {
            Origin::Sighup => "SIGHUP".into(),
            Origin::Start => "the agent's start".into(),
            _ => "-".into(),
        };
    };
    let name = user(by.login_uid.unwrap_or(by.uid), users);
    match &by.command {
        Some(command) => format!("{name}, {command}"),
        None => name,
    }
}

/// `kim (logged in), root, pid 4242, filter-agent`.
fn who_exactly(by: &By, users: &Users) -> String {
    let login = by
        .login_uid
        .map(|uid| format!("{} logged in, now ", user(uid, users)));
    let pid = by.pid.map(|pid| format!(", pid {pid}"));
    let command = by.command.as_ref().map(|command| format!(", {command}"));
    let parts = [login, Some(user(by.uid, users)), pid, command];
    parts.into_iter().flatten().collect()
}

/// In one line.
pub(super) fn what(past: &Past) -> String {
    match &past.what {
        What::Policy(policy) => {
            let state = match policy.state {
                State::Confirmed => "",
                State::Trying => ", being tried",
                State::FellBack => ", fell back",
            };
            format!("policy {}{state}", policy.file.display())
        }
        What::Temporary(temporary) => {
            let PastTemporary {
                action,
                database,
                source,
                label,
                until,
            } = temporary;
            let until = match action {
                Action::Allowed | Action::Blocked => *until,
                Action::Revoked | Action::Ended | Action::Unblocked => None,
            };
            let until = until
                .map(|until| format!(" until {until}"))
                .unwrap_or_default();
            let label = label.as_ref().map(|label| format!(" ({label})"));
            let label = label.unwrap_or_default();
            format!("{database}: {source} {}{until}{label}", action.name())
        }
        What::Fleet(fleet) => {
            let documents = fleet.documents.iter();
            let documents = documents.map(|(database, revision)| match revision {
                Some(revision) => format!("{database} at revision {revision}"),
                None => format!("{database} without a document"),
            });
            format!("fleet: {}", list(documents))
        }
        What::Detached => "detached: nothing was filtered from then on".into(),
    }
}

/// `+3 -1 prefixes, 2 settings`.
fn difference(past: &Past) -> String {
    let difference = match &past.what {
        What::Policy(PastPolicy { difference, .. }) => difference,
        What::Fleet(PastFleet { difference, .. }) => difference,
        What::Temporary(_) | What::Detached => return "-".into(),
    };
    let Summary {
        databases,
        settings,
        attached,
        detached,
    } = difference;
    let sum = |of: fn(&DatabaseSummary) -> usize| databases.values().map(of).sum::<usize>();
    let (added, removed) = (sum(|d| d.added.count), sum(|d| d.removed.count));
    let ports = sum(|d| d.guarded.count + d.unguarded.count);
    let interfaces = attached.len() + detached.len();
    let mut parts = Vec::new();
    match (added, removed) {
        (0, 0) => {}
        (added, 0) => parts.push(format!("+{}", counted(added, "prefix", "prefixes"))),
        (0, removed) => parts.push(format!("-{}", counted(removed, "prefix", "prefixes"))),
        (added, removed) => parts.push(format!("+{added} -{removed} prefixes")),
    }
    for (count, one, many) in [
        (ports, "port", "ports"),
        (settings.count, "setting", "settings"),
        (interfaces, "interface", "interfaces"),
    ] {
        if count > 0 {
            parts.push(counted(count, one, many));
        }
    }
    match parts.is_empty() {
        true => "-".into(),
        false => parts.join(", "),
    }
}

fn print_listing(listing: &Listing) {
    if listing.changes.is_empty() {
        say!("no change is kept");
    }
    let users = users();
    let mut rows = table(["CHANGE", "WHEN", "WHO", "WHAT", "DIFFERENCE"]);
    for past in &listing.changes {
        rows.add_row([
            past.id.to_string(),
            format!("{:.0}", past.at),
            who(past, &users),
            what(past),
            difference(past),
        ]);
    }
    print_table(&rows, listing.changes.len());
    if listing.left_out > 0 {
        say!("and {} earlier ones: --limit", listing.left_out);
    }
}

fn print_change(past: &Past) {
    say!("change {}, {:.0}: {}", past.id, past.at, what(past));
    let users = users();
    match &past.by {
        Some(by) => say!("by {}", who_exactly(by, &users)),
        None => say!("by {}", who(past, &users)),
    }
    say!("origin: {}", past.origin.name());
    let difference = match &past.what {
        What::Policy(policy) => {
            let kept = match policy.text_kept {
                true => "kept",
                false => "not kept any more",
            };
            say!("text: {kept}, SHA-256 {}", policy.hash);
            &policy.difference
        }
        What::Fleet(fleet) => &fleet.difference,
        What::Temporary(_) | What::Detached => return,
    };
    let Summary {
        databases,
        settings,
        attached,
        detached,
    } = difference;
    for name in attached {
        say!("+ interface {name}");
    }
    for name in detached {
        say!("- interface {name}");
    }
    for (name, database) in databases {
        say!("database {name}");
        print_listed("  + protect ", &database.guarded);
        print_listed("  - protect ", &database.unguarded);
        print_listed("  + ", &database.added);
        print_listed("  - ", &database.removed);
        print_listed("  + block ", &database.blocked);
        print_listed("  - block ", &database.unblocked);
    }
    print_listed("", settings);
}

fn print_listed<T: std::fmt::Display>(sign: &str, listed: &Listed<T>) {
    for item in &listed.first {
        say!("{sign}{item}");
    }
    if let Some(more) = listed
        .count
        .checked_sub(listed.first.len())
        .filter(|&more| more > 0)
    {
        say!("{sign}and {more} more");
    }
}

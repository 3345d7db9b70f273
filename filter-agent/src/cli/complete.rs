//! Completion of what only the agent knows, for shells. Where it does not answer at once nothing is completed: an error
//! must not disturb the line that is being typed.

use std::{
    cmp::Reverse,
    env,
    ffi::{OsStr, OsString},
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap_complete::{
    CompletionCandidate,
    env::{Bash, EnvCompleter, Fish, Shells, Zsh},
};
use ipnet::IpNet;
use serde::de::DeserializeOwned;

use crate::{
    cli::{
        client::{Agent, SOCKET, STATUS_SOCKET},
        history,
    },
    history::{Listing, Past, What},
    report::{self, Drops, Origin, Regions, Rules, Status},
    text::is_control,
};

/// Time for everything that one completion asks for.
const TIMEOUT: Duration = Duration::from_millis(300);

/// Values that are offered: of sources that were refused the latest.
const MAX_OFFERS: usize = 200;

/// A value that is offered, and what a shell may show beside it.
struct Offer {
    value: String,
    note: String,
    /// `None`: whatever database the line names.
    database: Option<String>,
}

pub(super) fn databases(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, async |line| {
        let status: Status = line.get("/v1/status").await?;
        let databases = status.databases.into_iter();
        let offers = databases.map(|database| Offer {
            note: database.ports.join(", "),
            value: database.name,
            database: None,
        });
        Ok(offers.collect())
    })
}

pub(super) fn regions(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, async |line| {
        let answer: Regions = line.get("/v1/regions").await?;
        let used = answer.regions.into_iter().filter(|region| region.used);
        let offers = used.map(|region| Offer {
            value: region.name,
            note: region.source,
            database: None,
        });
        Ok(offers.collect())
    })
}

/// Changes of the history.
pub(super) fn changes(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, async |line| line.changes(|_| true).await)
}

/// Those whose policy can be enforced again.
pub(super) fn policies(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, async |line| {
        line.changes(|past| matches!(&past.what, What::Policy(policy) if policy.text_kept))
            .await
    })
}

/// The change that is tried.
pub(super) fn tried(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, async |line| {
        let status: Status = line.get("/v1/status").await?;
        let offer = |window: report::Window| Offer {
            value: window.id.to_string(),
            note: format!("tried until {}", window.until),
            database: None,
        };
        Ok(status.window.map(offer).into_iter().collect())
    })
}

/// Sources whose packets were dropped lately.
pub(super) fn refused(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, async |line| line.refused().await)
}

/// The same, and the prefixes of rules.
pub(super) fn refused_or_allowed(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, async |line| {
        let mut offers = line.refused().await?;
        offers.extend(line.rules(|origin| origin != Origin::Block).await?);
        Ok(offers)
    })
}

/// Sources of temporary rules and of blocks.
pub(super) fn temporary(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, async |line| {
        line.rules(|origin| matches!(origin, Origin::Temporary | Origin::Block))
            .await
    })
}

/// The shells that may ask.
pub(super) const SHELLS: Shells = Shells(&[&Quoting, &Fish, &Zsh]);

/// Bash, which puts an answer into the line as it is: a file named `$(...)` would be a command there.
struct Quoting;

impl EnvCompleter for Quoting {
    fn name(&self) -> &'static str {
        Bash.name()
    }

    fn is(&self, name: &str) -> bool {
        Bash.is(name)
    }

    fn write_registration(
        &self,
        var: &str,
        name: &str,
        bin: &str,
        completer: &str,
        buf: &mut dyn Write,
    ) -> io::Result<()> {
        Bash.write_registration(var, name, bin, completer, buf)
    }

    fn write_complete(
        &self,
        command: &mut clap::Command,
        line: Vec<OsString>,
        current_dir: Option<&Path>,
        buf: &mut dyn Write,
    ) -> io::Result<()> {
        let mut answers = Vec::new();
        Bash.write_complete(command, line, current_dir, &mut answers)?;
        // As the script asks for, and `clap_complete` without one.
        let separator = env::var("_CLAP_IFS").unwrap_or_else(|_| "\n".into());
        let answers = String::from_utf8_lossy(&answers);
        let answers = answers.split(&separator);
        let answers = answers.filter(|answer| !answer.contains(is_control));
        let quoted: Vec<String> = answers.map(quoted).collect();
        buf.write_all(quoted.join(&separator).as_bytes())
    }
}

/// With a backslash before whatever bash may give a meaning.
fn quoted(answer: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "_./:=@%+,-".contains(c);
    let quoted = answer.chars().flat_map(|c| {
        let backslash = (!is_plain(c)).then_some('\\');
        backslash.into_iter().chain([c])
    });
    quoted.collect()
}

/// The line that is being completed.
struct Line {
    words: Vec<String>,
    socket: PathBuf,
}

impl Line {
    /// Reads it from this process's arguments, as the scripts of `clap_complete` pass it: after `--`.
    fn read() -> Self {
        let words = env::args_os().map(|word| word.to_string_lossy().into_owned());
        Self::of(words.skip_while(|word| word != "--").skip(1).collect())
    }

    fn of(words: Vec<String>) -> Self {
        let mut socket = SOCKET;
        let mut rest = words.iter();
        while let Some(word) = rest.next() {
            if let Some(path) = word.strip_prefix("--socket=") {
                socket = path;
            } else if word == "--socket" {
                // Bash makes `=` a word of its own.
                let path = rest.by_ref().find(|word| *word != "=");
                socket = path.map_or(socket, |path| path);
            }
        }
        let socket = socket.into();
        Self { words, socket }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let agent = Agent {
            timeout: TIMEOUT,
            status_socket: Some(Path::new(STATUS_SOCKET)),
            ..Agent::new(&self.socket)
        };
        agent.get(path).await
    }

    async fn refused(&self) -> Result<Vec<Offer>> {
        let mut drops: Drops = self.get("/v1/drops?hints=false").await?;
        drops
            .sources
            .sort_by_key(|dropped| Reverse(dropped.last_seen));
        let offers = drops.sources.into_iter().filter_map(|dropped| {
            let database = dropped.database.as_deref().unwrap_or("any database");
            Some(Offer {
                value: dropped.source?.to_string(),
                note: format!("refused by {database}: {}", dropped.reason),
                database: dropped.database,
            })
        });
        Ok(offers.collect())
    }

    async fn changes(&self, is_meant: impl Fn(&Past) -> bool) -> Result<Vec<Offer>> {
        let listing: Listing = self.get(&format!("/v1/history?limit={MAX_OFFERS}")).await?;
        let meant = listing.changes.iter().filter(|past| is_meant(past));
        let offers = meant.map(|past| Offer {
            value: past.id.to_string(),
            note: format!("{}, {:.0}", history::what(past), past.at),
            database: None,
        });
        Ok(offers.collect())
    }

    async fn rules(&self, is_meant: impl Fn(Origin) -> bool) -> Result<Vec<Offer>> {
        let answer: Rules = self.get("/v1/rules").await?;
        let rules = answer.rules.into_iter().filter(|rule| {
            // Others are regions and what the policy calls by a name.
            is_meant(rule.origin) && rule.source.parse::<IpNet>().is_ok()
        });
        let offers = rules.map(|rule| {
            let what = match rule.origin {
                Origin::File => "rule of",
                Origin::Fleet => "fleet's rule of",
                Origin::Temporary => "allowed for a time at",
                Origin::Block => "blocked at",
            };
            let label = rule.label.map(|label| format!(": {label}"));
            let database = &rule.database;
            Offer {
                value: rule.source,
                note: format!("{what} {database}{}", label.unwrap_or_default()),
                database: Some(rule.database),
            }
        });
        Ok(offers.collect())
    }

    /// Offers that the word under the cursor begins, each once; only of a database that the line names.
    fn choose(&self, offers: Vec<Offer>, current: &str) -> Vec<Offer> {
        let is_named = |offer: &Offer| {
            let database = offer.database.as_ref();
            database.is_some_and(|database| self.words.contains(database))
        };
        let names_one = offers.iter().any(is_named);
        let mut chosen: Vec<Offer> = Vec::new();
        for offer in offers {
            let is_wanted = offer.value.starts_with(current) && (!names_one || is_named(&offer));
            if is_wanted && chosen.iter().all(|other| other.value != offer.value) {
                chosen.push(offer);
            }
            if chosen.len() == MAX_OFFERS {
                break;
            }
        }
        chosen
    }
}

fn offered(
    current: &OsStr,
    ask: impl AsyncFn(&Line) -> Result<Vec<Offer>>,
) -> Vec<CompletionCandidate> {
    let line = Line::read();
    let offers = asked(&line, ask).unwrap_or_default();
    let chosen = line.choose(offers, &current.to_string_lossy()).into_iter();
    let candidate = |offer: Offer| {
        let note = (!offer.note.is_empty()).then(|| offer.note.into());
        CompletionCandidate::new(offer.value).help(note)
    };
    chosen.map(candidate).collect()
}

fn asked(line: &Line, ask: impl AsyncFn(&Line) -> Result<Vec<Offer>>) -> Result<Vec<Offer>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the async runtime")?;
    runtime.block_on(async { tokio::time::timeout(TIMEOUT, ask(line)).await? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(words: &[&str]) -> Line {
        Line::of(words.iter().map(|&word| word.to_owned()).collect())
    }

    #[test]
    fn socket_on_the_line_is_asked() {
        let socket = |words: &[&str]| line(words).socket.to_string_lossy().into_owned();
        assert_eq!(socket(&["filter-agent", "rules"]), SOCKET);
        let rules = ["filter-agent", "rules", "--socket", "/a", "--database", ""];
        assert_eq!(socket(&rules), "/a");
        assert_eq!(socket(&["filter-agent", "--socket=/a"]), "/a");
        assert_eq!(socket(&["filter-agent", "--socket", "=", "/a"]), "/a");
        assert_eq!(socket(&["filter-agent", "--socket"]), SOCKET);
    }

    #[test]
    fn sources_are_those_of_the_database_that_the_line_names() {
        let offers = || {
            let offer = |value: &str, database: &str| Offer {
                value: value.into(),
                note: String::new(),
                database: Some(database.into()),
            };
            vec![
                offer("192.0.2.1", "orders"),
                offer("192.0.2.2", "stock"),
                offer("192.0.2.1", "orders"),
                offer("198.51.100.1", "orders"),
            ]
        };
        let chosen = |words: &[&str], current: &str| -> Vec<String> {
            let chosen = line(words).choose(offers(), current);
            chosen.into_iter().map(|offer| offer.value).collect()
        };
        let allow = ["filter-agent", "allow", "orders", ""];
        assert_eq!(chosen(&allow, ""), ["192.0.2.1", "198.51.100.1"]);
        assert_eq!(chosen(&allow, "192"), ["192.0.2.1"]);
        let explain = ["filter-agent", "explain", ""];
        assert_eq!(
            chosen(&explain, ""),
            ["192.0.2.1", "192.0.2.2", "198.51.100.1"]
        );
    }
}

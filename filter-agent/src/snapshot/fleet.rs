//! The fleet's part of the status.

use jiff::{SignedDuration, Timestamp};

use super::Snapshot;
use crate::{
    fleet::{
        Unwritten, is_followed,
        state::{Since, Standing},
    },
    policy::{FromFleet, Policy, spelled},
    report::{self, FleetDocument, FleetRollout, FleetState},
};

impl Snapshot {
    /// The fleet as this host knows it. `None`: the host is of none.
    pub fn fleet(&self) -> Option<report::Fleet> {
        let policy = &self.file.policy;
        let fleet = policy.fleet.as_ref()?;
        let state = &self.fleet;
        let since = |since: &Since| report::Error {
            at: self.now.on_host(since.since),
            text: since.why.clone(),
        };
        let marks = state.marks();
        let host = self.this_host.name(policy);
        let documents = policy.databases.iter().filter_map(|database| {
            let of_fleet = database.fleet.as_ref()?;
            Some(self.document(&database.name, of_fleet, &host))
        });
        Some(report::Fleet {
            endpoints: fleet.endpoints.clone(),
            frozen: fleet.frozen,
            cluster: marks.map(|marks| format!("{:x}", marks.cluster)),
            era: marks.map(|marks| marks.era),
            revision: marks.map(|marks| marks.revision),
            answered: state.contact().map(|at| self.now.on_host(at)),
            lost: state.lost_since().map(since),
            held: state.held().map(since),
            healed: self.this_host.healed,
            status_written: self.this_host.written.map(|at| self.now.on_host(at)),
            status_unwritten: self.status_unwritten(policy, &host),
            documents: documents.collect(),
            host,
        })
    }

    fn document(&self, database: &str, of_fleet: &FromFleet, host: &str) -> FleetDocument {
        let good = self.fleet.documents().get(database);
        let standing = self.fleet.standing(database);
        let missing_since = match standing {
            Standing::Missing { since } => Some(self.now.on_host(since)),
            _ => None,
        };
        let (state, mut error) = describe_standing(standing);
        if let Some(since) = missing_since {
            error = Some(format!(
                "there is no document since {since:.0}; {HOW_TO_REMOVE}"
            ));
        }
        let rollout = good.and_then(|good| {
            let rollout = good.document.rollout.as_ref()?;
            Some(FleetRollout {
                on: rollout.on.clone(),
                until: rollout.until,
                in_force: !good.rollout_over && rollout.on.contains(host),
            })
        });
        FleetDocument {
            database: database.to_owned(),
            state,
            error,
            revision: good.map(|good| good.mod_revision),
            sha256: good.map(|good| good.sha256.clone()),
            since: good.map(|good| self.now.on_host(good.since)),
            rules: of_fleet.rules.len(),
            rollout,
        }
    }

    fn status_unwritten(&self, policy: &Policy, host: &str) -> Option<report::Error> {
        if !is_followed(policy) {
            return None;
        }
        if let Err(why) = self.this_host.keys(policy) {
            let unwritten = Unwritten::Failed(why);
            return Some(unwritten.reported(host, self.started));
        }
        let (since, why) = self.this_host.unwritten.as_ref()?;
        Some(why.reported(host, self.now.on_host(*since)))
    }

    /// Whether nobody but an operator of this host can have its status written.
    fn is_name_unusable(&self) -> bool {
        let unwritten = self.this_host.unwritten.as_ref();
        unwritten.is_some_and(|(_, why)| *why == Unwritten::NameTaken)
            || self.this_host.keys(&self.file.policy).is_err()
    }

    /// Answers that are held, and documents that are refused.
    pub(super) fn fleet_errors(&self) -> Vec<String> {
        let Some(fleet) = self.fleet() else {
            return Vec::new();
        };
        let mut errors = Vec::new();
        if let Some(unwritten) = &fleet.status_unwritten
            && self.is_name_unusable()
        {
            errors.push(format!("fleet: {}", unwritten.text));
        }
        if let Some(held) = &fleet.held {
            errors.push(format!(
                "fleet: {}: nothing that it says is in force, and the last good documents stay (see `filter-agent fleet \
                 recover`)",
                held.text
            ));
        }
        let refused = fleet.documents.iter();
        let refused = refused.filter(|document| document.state == FleetState::Refused);
        errors.extend(refused.map(|document| {
            let error = document.error.as_deref().unwrap_or_default();
            format!(
                "database {}: {error}; {}",
                document.database,
                stays(document)
            )
        }));
        errors
    }

    pub(super) fn fleet_warnings(&self, now: Timestamp) -> Vec<String> {
        let Some(fleet) = self.fleet() else {
            return Vec::new();
        };
        let mut warnings = Vec::new();
        if self.fleet.is_silent(now) && !fleet.frozen {
            let why = fleet
                .lost
                .as_ref()
                .map_or("no answer yet", |lost| &lost.text);
            let answered = self.fleet.contact();
            let ago = answered.map(|at| now.duration_since(at).max(SignedDuration::ZERO));
            let ago = ago.and_then(|ago| std::time::Duration::try_from(ago).ok());
            let since = match ago {
                Some(ago) => format!(
                    "has not answered for {}",
                    spelled(std::time::Duration::from_secs(ago.as_secs()))
                ),
                None => "has never answered".into(),
            };
            warnings.push(format!(
                "fleet: etcd {since}: {why}; what was in force stays so"
            ));
        }
        if let Some(unwritten) = &fleet.status_unwritten
            && !self.is_name_unusable()
        {
            warnings.push(format!("fleet: {}", unwritten.text));
        }
        for document in &fleet.documents {
            let error = match document.state {
                FleetState::Missing | FleetState::Unreadable => document.error.as_deref(),
                _ => None,
            };
            if let Some(error) = error {
                let name = &document.database;
                warnings.push(format!("database {name}: {error}; {}", stays(document)));
            }
        }
        warnings
    }
}

const HOW_TO_REMOVE: &str = "`rules: []` is how rules are removed";

/// How a database stands, and what is wrong with it. The same at any time.
pub fn describe_standing(standing: Standing) -> (FleetState, Option<String>) {
    match standing {
        Standing::Active => (FleetState::Active, None),
        Standing::Refused { why, mod_revision } => {
            let why = format!("the document of revision {mod_revision} is refused: {why}");
            (FleetState::Refused, Some(why))
        }
        Standing::Held(why) => (FleetState::Held, Some(why)),
        Standing::Missing { .. } => {
            let why = format!("there is no document; {HOW_TO_REMOVE}");
            (FleetState::Missing, Some(why))
        }
        Standing::Unreadable(since) => (FleetState::Unreadable, Some(since.why)),
        Standing::Unknown => (FleetState::Unknown, None),
    }
}

fn stays(document: &FleetDocument) -> String {
    match document.revision {
        Some(revision) => format!("that of revision {revision} stays in force"),
        None => "only the policy's own rules are in force".into(),
    }
}

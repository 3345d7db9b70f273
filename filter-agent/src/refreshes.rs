//! Requests to look regions up, until each of their regions is done. Pure.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail, ensure};

use crate::{
    event::Reply,
    refusal::Refusal,
    region::state::{Change, Regions, State},
    report,
    text::list,
};

#[derive(Debug)]
struct Refresh {
    waiting: BTreeSet<String>,
    done: BTreeMap<String, report::Refreshed>,
    reply: Reply<Vec<report::Refreshed>>,
}

/// By number.
#[derive(Debug, Default)]
pub struct Refreshes(BTreeMap<u64, Refresh>);

impl Refreshes {
    pub fn begin(&mut self, number: u64, names: &[String], reply: Reply<Vec<report::Refreshed>>) {
        let refresh = Refresh {
            waiting: names.iter().cloned().collect(),
            done: BTreeMap::new(),
            reply,
        };
        self.0.insert(number, refresh);
    }

    /// Notes for those that wait what a region's look-up came to, and replies where it was the last. `state`:
    /// `None` for a region that no rule names any more.
    pub fn done(&mut self, name: &str, state: Option<&State>, change: &Change, waiters: &[u64]) {
        for number in waiters {
            let Some(refresh) = self.0.get_mut(number) else {
                continue;
            };
            if !refresh.waiting.remove(name) {
                continue;
            }
            let error = match state {
                Some(state) if state.failing => state.error.as_ref().map(|e| e.text.clone()),
                Some(_) => None,
                None => Some("no rule names it any more".into()),
            };
            let set = state.and_then(|state| state.set.as_ref());
            let refreshed = report::Refreshed {
                region: name.into(),
                prefixes: set.map_or(0, |set| set.prefixes.len()),
                added: change.added.clone(),
                left: change.left.clone(),
                removed: change.removed.clone(),
                error,
                partial: state.is_some_and(|state| state.partial),
            };
            refresh.done.insert(name.into(), refreshed);
            if refresh.waiting.is_empty()
                && let Some(refresh) = self.0.remove(number)
            {
                refresh.reply.send(Ok(refresh.done.into_values().collect()));
            }
        }
    }
}

/// The regions that a request means. Constant ones are not looked up: their prefixes stand in the policy.
///
/// # Errors
/// A region that no rule names, or a constant one.
pub fn to_refresh(regions: &Regions, region: Option<String>) -> Result<Vec<String>> {
    let Some(name) = region else {
        let states = regions.iter();
        let changing = states.filter(|(_, state)| !state.region.is_constant());
        return Ok(changing.map(|(name, _)| name.clone()).collect());
    };
    match regions.get(&name) {
        None if regions.is_empty() => {
            bail!(Refusal::NotFound(format!(
                "no rule names region {name}, nor any other"
            )))
        }
        None => {
            let known = list(regions.keys());
            bail!(Refusal::NotFound(format!(
                "no rule names region {name}; the rules name {known}"
            )))
        }
        Some(state) => ensure!(
            !state.region.is_constant(),
            Refusal::Unprocessable(format!(
                "the prefixes of region {name} stand in the policy: there is nothing to look up"
            ))
        ),
    }
    Ok(vec![name])
}

//! `rules`: the rules with their hits, and those that are not used.

use std::time::Duration;

use anyhow::Result;
use jiff::{SignedDuration, Timestamp};

use crate::{
    cli::{
        args::Output,
        output::{print_table, table},
        print::by,
    },
    policy::spelled,
    report::{Origin, Rule, Rules},
    text::counted,
};

pub(super) fn print_rules(rules: &[Rule]) {
    let header = [
        "DATABASE", "RULE", "SOURCE", "PREFIXES", "PACKETS", "LAST HIT", "EXPIRES", "LABEL",
    ];
    let mut table = table(header);
    for rule in rules {
        let expires = rule.expires.map(|expires| expires.to_string());
        let expires = match (expires, rule.expired) {
            (Some(expires), true) => format!("{expires} (expired)"),
            (Some(expires), false) => match rule.left {
                _ if rule.suspended => {
                    format!("{expires} (suspended: no room beside the policy's)")
                }
                Some(left) => format!("{expires} ({} left)", time_left(left)),
                None => expires,
            },
            (None, _) => "-".into(),
        };
        let number = match (rule.origin, rule.number) {
            (Origin::Temporary | Origin::Block | Origin::Fleet, _) => rule.origin.name().into(),
            (Origin::File, Some(number)) => number.to_string(),
            (Origin::File, None) => "-".into(),
        };
        let label = rule.label.clone();
        let except = (!rule.except.is_empty()).then(|| {
            let except: Vec<String> = rule.except.iter().map(ToString::to_string).collect();
            format!("except {}", except.join(", "))
        });
        let by = rule.by.as_ref().map(by);
        let covered = (!rule.covered_by.is_empty())
            .then(|| format!("covered by {}", rule.covered_by.join(", ")));
        let notes = label.into_iter().chain(except).chain(covered).chain(by);
        let notes: Vec<String> = notes.collect();
        table.add_row([
            rule.database.clone(),
            number,
            rule.source.clone(),
            rule.prefixes.to_string(),
            rule.hits.to_string(),
            last_hit(rule),
            expires,
            notes.join("; "),
        ]);
    }
    if rules.is_empty() {
        say!("no rules: nobody may reach a database");
    }
    print_table(&table, rules.len());
}

/// `12s ago`, or for how long there was none.
fn last_hit(rule: &Rule) -> String {
    match (rule.last_hit, rule.counted_since) {
        (Some(last), _) => format!("{} ago", coarse_age(last)),
        (None, Some(since)) => format!("none in {}", coarse_age(since)),
        (None, None) => "-".into(),
    }
}

/// In days and hours from two days on: no one reads 632707h.
fn time_left(seconds: u64) -> String {
    const HOUR: u64 = 3600;
    const DAY: u64 = 24 * HOUR;
    if seconds < 2 * DAY {
        return spelled(Duration::from_secs(seconds));
    }
    format!("{}d {}h", seconds / DAY, seconds % DAY / HOUR)
}

/// How long ago that was.
fn coarse_age(since: Timestamp) -> String {
    coarse(Timestamp::now().duration_since(since))
}

/// A time in the largest unit of which it has two, rounded down.
fn coarse(time: SignedDuration) -> String {
    let seconds = time.as_secs().max(0);
    let units = [(24 * 3600, "d"), (3600, "h"), (60, "m"), (1, "s")];
    let (unit, name) = units
        .into_iter()
        .find(|(unit, _)| seconds >= 2 * unit)
        .unwrap_or((1, "s"));
    format!("{}{name}", seconds / unit)
}

/// Prints the rules that are not used, and how many are left out since nothing can be said of them.
pub(super) fn print_unused(rules: Rules, unused: Duration, output: &Output) -> Result<()> {
    let unused = SignedDuration::try_from(unused).unwrap_or(SignedDuration::MAX);
    let (rules, left_out) = split(rules.rules, Timestamp::now(), unused);
    output.print(&Rules { rules }, |Rules { rules }| {
        let lasting = coarse(unused);
        match rules.as_slice() {
            [] => say!("no rule is without a hit for {lasting}"),
            rules => print_rules(rules),
        }
    })?;
    // Also beside JSON.
    for line in left_out.lines(unused) {
        eprintln!("{line}");
    }
    Ok(())
}

/// Rules of which it is not known whether they are used.
#[derive(Debug, Default, PartialEq)]
struct LeftOut {
    /// Without a hit, and counted for too short a time; the longest.
    young: usize,
    longest: Option<SignedDuration>,
    /// Not in force: ended, or suspended.
    ended: usize,
}

impl LeftOut {
    fn lines(&self, unused: SignedDuration) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(longest) = self.longest {
            lines.push(format!(
                "{} without a hit left out: counted for less than {}, at most for {}",
                counted(self.young, "rule", "rules"),
                coarse(unused),
                coarse(longest)
            ));
        }
        if self.ended > 0 {
            let rules = counted(self.ended, "rule", "rules");
            lines.push(format!("{rules} left out: not in force, and not counted"));
        }
        lines
    }
}

/// The rules without a hit for so long that are counted for as long, and what is left out.
fn split(rules: Vec<Rule>, now: Timestamp, unused: SignedDuration) -> (Vec<Rule>, LeftOut) {
    let mut left_out = LeftOut::default();
    let is_long = |since: Timestamp| now.duration_since(since) >= unused;
    let rules = rules.into_iter().filter(|rule| {
        let Some(since) = rule.counted_since else {
            left_out.ended += 1;
            return false;
        };
        match rule.last_hit {
            Some(last) => is_long(last),
            None if is_long(since) => true,
            None => {
                left_out.young += 1;
                left_out.longest = left_out.longest.max(Some(now.duration_since(since)));
                false
            }
        }
    });
    (rules.collect(), left_out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rule(source: &str, last_hit: Option<i64>, counted_since: Option<i64>) -> Rule {
        let date = |days: i64| Timestamp::from_second(days * 24 * 3600).unwrap();
        serde_json::from_value(json!({
            "database": "orders", "number": 1, "source": source, "label": null, "expires": null,
            "expired": false, "prefixes": 1, "hits": 0,
            "last_hit": last_hit.map(date), "counted_since": counted_since.map(date),
        }))
        .unwrap()
    }

    #[test]
    fn time_left_is_told_in_days_where_there_are_many() {
        assert_eq!(time_left(47 * 3600 + 60), "47h 1m");
        assert_eq!(time_left(632_707 * 3600), "26362d 19h");
    }

    #[test]
    fn young_rule_is_not_called_unused() {
        let now = Timestamp::from_second(100 * 24 * 3600).unwrap();
        let rules = vec![
            rule("hit lately", Some(99), Some(1)),
            rule("hit long ago", Some(70), Some(1)),
            rule("never hit", None, Some(70)),
            rule("young", None, Some(71)),
            rule("younger", None, Some(99)),
            rule("ended", None, None),
        ];
        let (unused, left_out) = split(rules, now, SignedDuration::from_hours(30 * 24));
        let unused: Vec<&str> = unused.iter().map(|rule| rule.source.as_str()).collect();
        assert_eq!(unused, ["hit long ago", "never hit"]);
        let lines = left_out.lines(SignedDuration::from_hours(30 * 24));
        assert_eq!(
            lines,
            [
                "2 rules without a hit left out: counted for less than 30d, at most for 29d",
                "1 rule left out: not in force, and not counted"
            ]
        );
    }
}

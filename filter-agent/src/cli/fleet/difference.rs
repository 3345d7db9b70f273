//! The difference between two documents, for every host that it concerns. Pure.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::{
    policy::{Document, Rollout, Rule, Source},
    text::{counted, list},
};

/// The difference for hosts that have the same rules before and after.
struct Part {
    /// Which hosts, if not all of them.
    hosts: Option<String>,
    /// Rules before that had not ended, and how many of them are gone or have ended.
    before: usize,
    removed: usize,
    lines: Vec<String>,
}

pub(super) struct Difference {
    parts: Vec<Part>,
    /// The rollout that is under way, if it ends for a host or another takes its place.
    ended: Option<String>,
}

impl Difference {
    /// A rollout whose time is over counts as not written. `before`: `None` also where it cannot be read: nobody relies on it.
    pub(super) fn between(before: Option<&Document>, after: &Document, now: Timestamp) -> Self {
        let old = before.and_then(|document| under_way(document, now));
        let new = under_way(after, now);
        let rules = before.map_or(&[][..], |document| &document.rules);
        let mut parts = vec![Part::of(None, rules, &after.rules, now)];
        let of = |rollout: Option<&Rollout>| match rollout {
            Some(rollout) => (rollout.on.clone(), rollout.rules.clone()),
            None => Default::default(),
        };
        let ((old_on, old_rules), (new_on, new_rules)) = (of(old), of(new));
        let until = new.map(|new| format!(" until {}", new.until));
        let until = until.unwrap_or_default();
        for (hosts, before, after, how) in [
            (
                &old_on & &new_on,
                &old_rules[..],
                &new_rules,
                until.as_str(),
            ),
            (&new_on - &old_on, rules, &new_rules, &until),
            (
                &old_on - &new_on,
                &old_rules,
                &after.rules,
                ", whose rollout ends",
            ),
        ] {
            if old != new && !hosts.is_empty() {
                let hosts = format!("on {}{how}", list(hosts.iter()));
                parts.push(Part::of(Some(hosts), before, after, now));
            }
        }
        // One with the same end is the same, with a rule more (`allow`).
        let goes_on = |old: &Rollout| {
            let has_all = |new: &Rollout| {
                let sources: Vec<_> = new.rules.iter().map(|rule| &rule.source).collect();
                old.rules.iter().all(|rule| sources.contains(&&rule.source))
            };
            let is_same = |new: &Rollout| {
                new.until >= old.until && new.rules == old.rules
                    || new.until == old.until && has_all(new)
            };
            new.is_some_and(|new| is_same(new) && new.on.is_superset(&old.on))
        };
        let ended = old.filter(|old| !goes_on(old)).map(|old| {
            let on = list(old.on.iter());
            format!("the rollout on {on} until {} would end", old.until)
        });
        Self { parts, ended }
    }

    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for part in self.parts.iter().filter(|part| !part.lines.is_empty()) {
            let indent = if part.hosts.is_some() { "  " } else { "" };
            lines.extend(part.hosts.iter().map(|hosts| format!("{hosts}:")));
            lines.extend(part.lines.iter().map(|line| format!("{indent}{line}")));
        }
        lines
    }

    /// Reasons to look before it is written: most rules would go, or a rollout would end.
    pub(super) fn doubts(&self) -> impl Iterator<Item = String> {
        let is_much = |part: &&Part| part.removed * 2 > part.before;
        let removed = self.parts.iter().filter(is_much).map(|part| {
            let hosts = part.hosts.as_ref().map(|hosts| format!("{hosts}, "));
            let removed = counted(part.removed, "rule", "rules");
            format!(
                "{}{removed} of {} would go",
                hosts.unwrap_or_default(),
                part.before
            )
        });
        removed.chain(self.ended.clone())
    }
}

impl Part {
    fn of(hosts: Option<String>, before: &[Rule], after: &[Rule], now: Timestamp) -> Self {
        // A rule that has ended allows nobody.
        let lasting = |rules: &[Rule]| -> BTreeSet<Source> {
            let lasting = rules
                .iter()
                .filter(|rule| rule.expires.is_none_or(|end| end > now));
            lasting.map(|rule| rule.source.clone()).collect()
        };
        let (lasted, lasting) = (lasting(before), lasting(after));
        let (before, after) = (by_source(before), by_source(after));
        let is_gone = |source: &&&Source| !after.contains_key(**source);
        let gone: Vec<&&Source> = before.keys().filter(is_gone).collect();
        let mut lines: Vec<_> = gone.iter().map(|source| format!("- {source}")).collect();
        for (source, rule) in &after {
            match before.get(source) {
                None => lines.push(format!("+ {source}{}", said(rule, now))),
                Some(was) if was != rule => {
                    let now_said = match said(rule, now) {
                        empty if empty.is_empty() => " without label and end".into(),
                        said => said,
                    };
                    lines.push(format!("~ {source}{} ->{now_said}", said(was, now)));
                }
                Some(_) => {}
            }
        }
        Self {
            hosts,
            before: lasted.len(),
            removed: lasted.difference(&lasting).count(),
            lines,
        }
    }
}

/// The rollout of a document, unless its time is over.
pub(super) fn under_way(document: &Document, now: Timestamp) -> Option<&Rollout> {
    let rollout = document.rollout.as_ref();
    rollout.filter(|rollout| rollout.until > now)
}

fn by_source(rules: &[Rule]) -> BTreeMap<&Source, &Rule> {
    rules.iter().map(|rule| (&rule.source, rule)).collect()
}

/// ` "office", except 203.0.113.7/32, until 2026-12-31T18:00:00Z`.
fn said(rule: &Rule, now: Timestamp) -> String {
    let label = rule.label.as_ref().map(|label| format!("{label:?}"));
    let except = rule.except.iter().map(|hole| format!("except {hole}"));
    let expires = rule.expires.map(|at| match at <= now {
        true => format!("until {at}, which is over"),
        false => format!("until {at}"),
    });
    let parts: Vec<String> = label.into_iter().chain(except).chain(expires).collect();
    match parts.is_empty() {
        true => String::new(),
        false => format!(" {}", parts.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::check_document;

    const NOW: &str = "2027-01-01T00:00:00Z";

    fn difference(before: Option<&str>, after: &str) -> (Vec<String>, Vec<String>) {
        let document = |text: &str| check_document(text.as_bytes()).unwrap();
        let before = before.map(document);
        let difference =
            Difference::between(before.as_ref(), &document(after), NOW.parse().unwrap());
        (difference.lines(), difference.doubts().collect())
    }

    fn rollout(on: &str, until: u8, rules: &str) -> String {
        format!(
            "rules: [{{cidr: 192.0.2.0/24}}]\n\
             rollout: {{on: [{on}], until: 2027-01-0{until}T00:00:00Z, rules: [{rules}]}}"
        )
    }

    #[test]
    fn rules_and_doubts_are_told_for_each_group_of_hosts() {
        let base = "rules: [{cidr: 192.0.2.0/24}]";
        let office = "{cidr: 198.51.100.0/24}";
        let on_db7 = rollout("db7", 2, office);
        let (lines, doubts) = difference(Some(base), &on_db7);
        assert_eq!(
            lines,
            [
                "on db7 until 2027-01-02T00:00:00Z:",
                "  - 192.0.2.0/24",
                "  + 198.51.100.0/24"
            ]
        );
        assert_eq!(
            doubts,
            ["on db7 until 2027-01-02T00:00:00Z, 1 rule of 1 would go"]
        );
        // It ends, by a document that says nothing of it.
        let (lines, doubts) = difference(Some(&on_db7), base);
        assert_eq!(
            lines,
            [
                "on db7, whose rollout ends:",
                "  - 198.51.100.0/24",
                "  + 192.0.2.0/24"
            ]
        );
        assert!(
            doubts.contains(&"the rollout on db7 until 2027-01-02T00:00:00Z would end".into()),
            "{doubts:?}"
        );
        // Another takes its place: on a host that has it, on one that has not.
        let both = format!("{{cidr: 192.0.2.0/24}}, {office}");
        let (lines, doubts) = difference(Some(&on_db7), &rollout("db7, db8", 3, &both));
        assert_eq!(
            lines,
            [
                "on db7 until 2027-01-03T00:00:00Z:",
                "  + 192.0.2.0/24",
                "on db8 until 2027-01-03T00:00:00Z:",
                "  + 198.51.100.0/24"
            ]
        );
        assert_eq!(
            doubts,
            ["the rollout on db7 until 2027-01-02T00:00:00Z would end"]
        );
        assert_eq!(difference(Some(&on_db7), &on_db7), (vec![], vec![]));
        // The same end: with a rule more it goes on, with another one it does not.
        let (_, doubts) = difference(Some(&on_db7), &rollout("db7", 2, &both));
        assert_eq!(doubts, Vec::<String>::new());
        let (_, doubts) = difference(Some(&on_db7), &rollout("db7", 2, "{cidr: 192.0.2.0/24}"));
        assert!(
            doubts.contains(&"the rollout on db7 until 2027-01-02T00:00:00Z would end".into()),
            "{doubts:?}"
        );
        // Less time ends it sooner.
        let (_, doubts) = difference(Some(&rollout("db7", 3, office)), &on_db7);
        assert_eq!(
            doubts,
            ["the rollout on db7 until 2027-01-03T00:00:00Z would end"]
        );
        // An end that is over takes a rule away.
        let ended = "rules: [{cidr: 192.0.2.0/24, expires: 2026-01-01T00:00:00Z}]";
        let (_, doubts) = difference(Some(base), ended);
        assert_eq!(doubts, ["1 rule of 1 would go"]);
        let (lines, _) = difference(Some(ended), base);
        let until = "until 2026-01-01T00:00:00Z, which is over";
        assert_eq!(
            lines,
            [format!("~ 192.0.2.0/24 {until} -> without label and end")]
        );
        // More hosts, and more time.
        let (_, doubts) = difference(Some(&on_db7), &rollout("db7, db8", 3, office));
        assert_eq!(
            doubts,
            ["on db8 until 2027-01-03T00:00:00Z, 1 rule of 1 would go"]
        );
        // One that was over takes nothing away, and one that is gives nothing.
        let late = on_db7.replace("2027", "2026");
        assert_eq!(difference(Some(&late), base), (vec![], vec![]));
        assert_eq!(difference(Some(base), &late), (vec![], vec![]));
        assert_eq!(
            difference(None, base),
            (vec!["+ 192.0.2.0/24".into()], vec![])
        );
    }
}

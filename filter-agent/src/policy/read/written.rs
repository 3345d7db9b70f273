//! The fleet for whoever writes its documents: where they are, a check without a host's bounds, and changes of single rules.

use jiff::Timestamp;
use serde_yaml::{Mapping, Value};

use super::{
    bounded, check_characters,
    document::{MAX_VALUE, parse_within},
    reader::{MAX_PROBLEMS, Problem, Reader, structural},
};
use crate::policy::{
    checked::{Rule, Source},
    fleet::{Bounds, Document, Fleet},
    prefix::parse_cidr,
    region::{Guards, Region, RegionSource},
};

/// Reads where the fleet's documents are, from a policy file or from one that has nothing but `fleet`.
///
/// # Errors
/// There is no `fleet`, or everything that is wrong with it.
pub fn parse_fleet(text: &str) -> Result<Fleet, Vec<Problem>> {
    let problem = |message: &str| Problem {
        line: None,
        region: None,
        database: None,
        rule: None,
        message: message.into(),
    };
    check_characters(text).map_err(|problem| vec![problem])?;
    let file: Mapping = serde_yaml::from_str(text).map_err(|error| vec![structural(&error)])?;
    let value = file.get("fleet").cloned();
    let value = value.ok_or_else(|| vec![problem("it has no `fleet`")])?;
    let mut reader = Reader::new(text, MAX_PROBLEMS);
    match reader.fleet(value) {
        Some(fleet) if reader.problems.is_empty() => Ok(fleet),
        _ => Err(reader.problems),
    }
}

/// Checks a document as far as no host's policy is needed: it may name any region, and any network.
///
/// # Errors
/// As `parse_document`.
pub fn check_document(text: &[u8]) -> Result<Document, String> {
    let bounds = Bounds {
        widest: [0, 0],
        ..Bounds::default()
    };
    check_within(text, bounds, 0)
}

/// Checks a document as a host would that lets the fleet go so far. `floor`: the number of its policy's own rules.
///
/// # Errors
/// As `parse_document`.
pub fn check_within(text: &[u8], bounds: Bounds, floor: usize) -> Result<Document, String> {
    let names = match &bounds.regions {
        Some(names) => names.clone(),
        None => regions(text).into_iter().collect(),
    };
    let region = |name: String| {
        let source = RegionSource::Prefixes(Vec::new());
        let guards = Guards::default_for(&source);
        (name, Region { source, guards })
    };
    let regions = names.into_iter().map(region).collect();
    parse_within(text, &bounds, floor, &regions)
}

/// The regions that a text names, where a document may.
fn regions(text: &[u8]) -> Vec<String> {
    let text = std::str::from_utf8(text).unwrap_or_default();
    let Ok(value) = bounded::value(text, MAX_VALUE) else {
        return Vec::new();
    };
    let lists = [Some(&value), value.get("rollout")].into_iter().flatten();
    let rules = lists.filter_map(|of| of.get("rules")?.as_sequence());
    let named = rules
        .flatten()
        .filter_map(|rule| rule.get("region")?.as_str());
    named.map(str::to_owned).collect()
}

/// The text of a document with one more rule, also in its rollout. A rule of the same source is replaced, but its exceptions
/// are kept. Comments are lost. `text`: `None` if there is no document yet.
///
/// # Errors
/// The text is no document.
pub fn with_rule(text: Option<&[u8]>, rule: &Rule) -> Result<String, String> {
    let mut written = Mapping::new();
    let mut field = |name: &str, value: String| {
        written.insert(name.into(), value.into());
    };
    match &rule.source {
        Source::Cidr(prefix) => field("cidr", prefix.to_string()),
        Source::Region(name) => field("region", name.clone()),
    }
    if let Some(label) = &rule.label {
        field("label", label.clone());
    }
    if let Some(expires) = rule.expires {
        field("expires", expires.to_string());
    }
    edited(text, |rules| {
        let mut written = written.clone();
        let before = rules.iter().find(|other| is_of(other, &rule.source));
        if let Some(except) = before.and_then(|before| before.get("except")) {
            written.insert("except".into(), except.clone());
        }
        rules.retain(|other| !is_of(other, &rule.source));
        rules.push(written.into());
    })
}

/// The text of a document without the rules of a source, in its rollout neither. Comments are lost.
///
/// # Errors
/// The text is no document.
pub fn without_rule(text: &[u8], source: &Source) -> Result<String, String> {
    edited(Some(text), |rules| {
        rules.retain(|rule| !is_of(rule, source));
    })
}

/// The text of a document whose rules some hosts enforce instead until a date: those of another document.
///
/// # Errors
/// One of the texts is no document, or the other has a rollout itself.
pub fn with_rollout(
    text: Option<&[u8]>,
    on: &[String],
    until: Timestamp,
    other: &[u8],
) -> Result<String, String> {
    if check_document(other)?.rollout.is_some() {
        return Err("the document to roll out has a rollout itself".into());
    }
    let rules = mapping(other)?.remove("rules").unwrap_or_default();
    let mut rollout = Mapping::new();
    let on = on.iter().map(|host| Value::from(host.as_str()));
    rollout.insert("on".into(), Value::Sequence(on.collect()));
    rollout.insert("until".into(), until.to_string().into());
    rollout.insert("rules".into(), rules);
    let mut document = match text {
        Some(text) => mapping(text)?,
        None => Mapping::from_iter([("rules".into(), Value::Sequence(Vec::new()))]),
    };
    document.insert("rollout".into(), rollout.into());
    text_of(&document)
}

/// The text of a document without its rollout, whose rules every host enforces from then on where they are `promoted`.
///
/// # Errors
/// The text is no document, or has no rollout.
pub fn without_rollout(text: &[u8], promoted: bool) -> Result<String, String> {
    let mut document = mapping(text)?;
    let rollout = document.remove("rollout");
    let mut rollout = rollout.ok_or("it has no rollout")?;
    let rules = rollout.get_mut("rules").cloned();
    if let (true, Some(rules)) = (promoted, rules) {
        document.insert("rules".into(), rules);
    }
    text_of(&document)
}

fn text_of(document: &Mapping) -> Result<String, String> {
    serde_yaml::to_string(document).map_err(|error| error.to_string())
}

fn mapping(text: &[u8]) -> Result<Mapping, String> {
    check_document(text)?;
    let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
    let value = bounded::value(text, MAX_VALUE).map_err(|error| structural(&error).to_string())?;
    match value {
        Value::Mapping(document) => Ok(document),
        _ => Err("it is not a mapping".into()),
    }
}

/// However the source is spelled there.
fn is_of(rule: &Value, source: &Source) -> bool {
    let text = |field| rule.get(field).and_then(Value::as_str);
    match source {
        Source::Cidr(prefix) => text("cidr").is_some_and(|cidr| parse_cidr(cidr) == Ok(*prefix)),
        Source::Region(name) => text("region") == Some(name),
    }
}

fn edited(text: Option<&[u8]>, edit: impl Fn(&mut Vec<Value>)) -> Result<String, String> {
    fn rules_of(document: &mut Mapping) -> &mut Value {
        let rules = document.entry("rules".into()).or_insert(Value::Null);
        if !rules.is_sequence() {
            *rules = Value::Sequence(Vec::new());
        }
        rules
    }
    let mut document = text.map(mapping).transpose()?.unwrap_or_default();
    if let Value::Sequence(rules) = rules_of(&mut document) {
        edit(rules);
    }
    if let Some(Value::Mapping(rollout)) = document.get_mut("rollout")
        && let Value::Sequence(rules) = rules_of(rollout)
    {
        edit(rules);
    }
    text_of(&document)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(cidr: &str, label: &str) -> Rule {
        Rule {
            source: Source::Cidr(cidr.parse().unwrap()),
            except: Vec::new(),
            label: Some(label.into()),
            expires: None,
        }
    }

    #[test]
    fn document_is_checked_without_bounds() {
        let good = b"rules: [{cidr: 0.0.0.0/0}, {region: wherever}]\nrollout: {on: [db7], until: 2027-01-01T00:00:00Z, rules: \
                     [{region: elsewhere}]}";
        assert_eq!(check_document(good).unwrap().rules.len(), 2);
        for (bad, expected) in [
            ("rules: [{cidr: 192.0.2.1/24}]", "host bits"),
            (
                "rules: [{cidr: 192.0.2.0/24}, {cidr: 192.0.2.0/24}]",
                "rule 1 already",
            ),
            ("rules: [{region: 7}]", "line 1"),
            ("", "empty"),
        ] {
            let error = check_document(bad.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{bad}: {error}");
        }
    }

    #[test]
    fn rule_is_added_replaced_and_taken_out_and_the_rest_stays() {
        let text = "# ours\nrules:\n- cidr: 192.0.2.0/24\n  except: [192.0.2.7/32]\n- region: office\nrollout:\n  on: [db7]\n  \
                    until: 2027-01-01T00:00:00Z\n  rules: []\n";
        let before = check_document(text.as_bytes()).unwrap();
        let more = with_rule(Some(text.as_bytes()), &rule("203.0.113.0/24", "kim")).unwrap();
        let after = check_document(more.as_bytes()).unwrap();
        assert_eq!(after.rules[..2], before.rules);
        assert_eq!(after.rules[2], rule("203.0.113.0/24", "kim"));
        assert_eq!(after.rollout.unwrap().rules, after.rules[2..]);
        let again = with_rule(Some(more.as_bytes()), &rule("203.0.113.0/24", "lee")).unwrap();
        let again = check_document(again.as_bytes()).unwrap();
        assert_eq!(again.rules[2..], [rule("203.0.113.0/24", "lee")]);
        let source = Source::Region("office".into());
        let less = without_rule(more.as_bytes(), &source).unwrap();
        let less = check_document(less.as_bytes()).unwrap();
        assert_eq!(
            less.rules,
            [before.rules[0].clone(), rule("203.0.113.0/24", "kim")]
        );
        // Its exceptions are not the command's to take away.
        let longer = with_rule(Some(text.as_bytes()), &rule("192.0.2.0/24", "kim")).unwrap();
        let longer = check_document(longer.as_bytes()).unwrap();
        assert_eq!(longer.rules[1].except, before.rules[0].except);
        let spelled = b"rules: [{cidr: '2001:DB8:0::/48'}]\nrollout: {on: [db7], until: 2027-01-01T00:00:00Z, rules: [{cidr: \
                        '2001:db8:0:0::/48'}]}";
        let source = Source::Cidr("2001:db8::/48".parse().unwrap());
        let gone = check_document(without_rule(spelled, &source).unwrap().as_bytes()).unwrap();
        assert!(gone.rules.is_empty() && gone.rollout.unwrap().rules.is_empty());
        let first = with_rule(None, &rule("203.0.113.0/24", "kim")).unwrap();
        assert_eq!(check_document(first.as_bytes()).unwrap().rules.len(), 1);
    }

    #[test]
    fn rollout_is_written_promoted_and_aborted() {
        let text = b"rules: [{cidr: 192.0.2.0/24}]";
        let until: Timestamp = "2027-01-01T00:00:00Z".parse().unwrap();
        let other = b"rules: [{cidr: 203.0.113.0/24}]";
        let rolled = with_rollout(Some(text), &["db7".into()], until, other).unwrap();
        let document = check_document(rolled.as_bytes()).unwrap();
        let [before, after] = [&text[..], other].map(|text| check_document(text).unwrap());
        let rollout = document.rollout.unwrap();
        assert_eq!(
            (&document.rules, &rollout.rules),
            (&before.rules, &after.rules)
        );
        assert_eq!(rollout.until, until);
        let ended = |promoted| {
            let text = without_rollout(rolled.as_bytes(), promoted).unwrap();
            check_document(text.as_bytes()).unwrap()
        };
        assert_eq!((ended(true), ended(false)), (after, before));
        assert!(with_rollout(Some(text), &["db7".into()], until, rolled.as_bytes()).is_err());
        assert!(
            without_rollout(text, true)
                .unwrap_err()
                .contains("no rollout")
        );
    }

    #[test]
    fn place_of_the_documents_is_read_from_a_file_of_it_alone() {
        let text = "fleet:\n  endpoints: ['http://127.0.0.1:2379']\n  insecure: true\n";
        assert_eq!(parse_fleet(text).unwrap().endpoints.len(), 1);
        assert!(
            parse_fleet("interfaces: [eth0]\n").unwrap_err()[0]
                .message
                .contains("no `fleet`")
        );
        let problems = parse_fleet("fleet:\n  endpoints: ['http://127.0.0.1:2379']\n").unwrap_err();
        assert_eq!(problems[0].line, Some(2));
    }
}

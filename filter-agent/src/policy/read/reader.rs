//! Reads parts of a policy file, and collects problems with their line numbers.

use std::{fmt, path::Path};

use filter_common::MAX_NAME;
use ipnet::IpNet;
use serde::{Serialize, de::DeserializeOwned};
use serde_yaml::Value;

use crate::policy::{
    prefix::parse_cidr,
    read::locate::{Step, locate},
    secret_url::redacted,
};

/// An error or a warning about a policy file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Counted from 1.
    pub line: Option<usize>,
    pub region: Option<String>,
    pub database: Option<String>,
    /// Place in the database's `rules`, counted from 1.
    pub rule: Option<usize>,
    pub message: String,
}

/// `line 12: database orders, rule 3: host bits are set`.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if let Some(region) = &self.region {
            write!(f, "region {region}: ")?;
        }
        match (&self.database, self.rule) {
            (Some(database), Some(rule)) => write!(f, "database {database}, rule {rule}: ")?,
            (Some(database), None) => write!(f, "database {database}: ")?,
            (None, Some(rule)) => write!(f, "rule {rule}: ")?,
            (None, None) => {}
        }
        f.write_str(&self.message)
    }
}

/// Problems reported of one file. Each takes another pass over the text, for its line number.
pub(super) const MAX_PROBLEMS: usize = 50;

/// Converts an error of serde_yaml: the text is not YAML, or not of this shape.
pub(super) fn structural(error: &serde_yaml::Error) -> Problem {
    let line = error.location().map(|location| location.line());
    let mut message = error.to_string();
    // Cut off serde_yaml's "at line 3 column 5" and what follows it.
    if let Some(place) = message.find(" at line ") {
        message.truncate(place);
    }
    Problem {
        line,
        region: None,
        database: None,
        rule: None,
        message: redacted(&plain(&message)),
    }
}

/// Replaces names of Rust types in a message of serde.
pub(super) fn plain(message: &str) -> String {
    let shapes = [
        "File", "Region", "Database", "Rule", "Metrics", "Fleet", "Bounds", "Document", "Rollout",
    ];
    let shapes = shapes.map(|name| format!("struct Raw{name}"));
    let mut message = message
        .replace("a sequence", "a list")
        .replace("internally tagged enum Select", "a mapping")
        .replace("i64", "a number");
    for shape in shapes {
        message = message.replace(&shape, "a mapping");
    }
    message
}

/// A node of the file, and the region, database or rule that it belongs to.
#[derive(Clone, Debug)]
pub(super) struct At {
    pub(super) path: Vec<Step>,
    pub(super) region: Option<String>,
    pub(super) database: Option<String>,
    pub(super) rule: Option<usize>,
}

impl At {
    /// The whole file.
    pub(super) fn root() -> Self {
        Self {
            path: Vec::new(),
            region: None,
            database: None,
            rule: None,
        }
    }

    pub(super) fn top(key: &str) -> Self {
        Self::root().key(key)
    }

    pub(super) fn key(&self, key: &str) -> Self {
        let mut at = self.clone();
        at.path.push(Step::Key(key.into()));
        at
    }

    pub(super) fn index(&self, index: usize) -> Self {
        let mut at = self.clone();
        at.path.push(Step::Index(index));
        at
    }
}

pub(super) struct Reader<'a> {
    pub(super) text: &'a str,
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<Problem>,
    /// Most problems to list, and the number of those beyond.
    most: usize,
    pub(super) unlisted: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(text: &'a str, most: usize) -> Self {
        Self {
            text,
            problems: Vec::new(),
            warnings: Vec::new(),
            most,
            unlisted: 0,
        }
    }

    pub(super) fn problem(&mut self, at: &At, message: impl Into<String>) {
        self.problem_at(&at.path, false, at, message.into());
    }

    /// Adds a problem at a node, or at the key that leads to it. `whose`: the node that the message names.
    pub(super) fn problem_at(&mut self, path: &[Step], of_key: bool, whose: &At, message: String) {
        if self.problems.len() < self.most {
            let line = locate(self.text, path, of_key);
            self.problems.push(describe(line, whose, message));
        } else {
            self.unlisted += 1;
        }
    }

    pub(super) fn warn(&mut self, at: &At, message: impl Into<String>) {
        let line = locate(self.text, &at.path, false);
        self.warnings.push(describe(line, at, message.into()));
    }

    /// Deserializes a part of the file. `whose` is the beginning of messages about it.
    pub(super) fn shape<T: DeserializeOwned>(
        &mut self,
        at: &At,
        whose: &str,
        value: Value,
    ) -> Option<T> {
        let error = match serde_path_to_error::deserialize(value) {
            Ok(shape) => return Some(shape),
            Err(error) => error,
        };
        let mut path = at.path.clone();
        for segment in error.path() {
            match segment {
                serde_path_to_error::Segment::Map { key } => path.push(Step::Key(key.clone())),
                serde_path_to_error::Segment::Seq { index } => path.push(Step::Index(*index)),
                _ => {}
            }
        }
        let field = match path.last() {
            Some(Step::Key(key)) if path.len() > at.path.len() => format!("{key}: "),
            _ => String::new(),
        };
        let mut message = plain(&error.inner().to_string());
        let unknown = message.strip_prefix("unknown field `");
        let unknown = unknown.and_then(|rest| rest.split('`').next().map(str::to_owned));
        let of_key = unknown.is_some();
        match unknown {
            Some(unknown) => {
                path.truncate(at.path.len());
                path.push(Step::Key(unknown));
            }
            None => message.insert_str(0, &field),
        }
        self.problem_at(&path, of_key, at, format!("{whose}{message}"));
        None
    }

    pub(super) fn absolute(&mut self, at: &At, field: &str, path: &Path) {
        if path.is_absolute() {
            return;
        }
        // In its place there may be what belongs into the file: a header with a token, a key.
        let is_name = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
        let text = path.to_string_lossy();
        let message = match field {
            "headers_file" => {
                "headers_file is not an absolute path: it names a file that holds the headers"
                    .into()
            }
            _ if text.chars().all(is_name) => format!("{field}: {text} is not an absolute path"),
            _ => format!("{field} is not an absolute path"),
        };
        self.problem(&at.key(field), message);
    }

    pub(super) fn prefixes(&mut self, at: &At, texts: Option<&[String]>) -> Vec<IpNet> {
        let mut prefixes = Vec::new();
        for (index, text) in texts.unwrap_or_default().iter().enumerate() {
            match parse_cidr(text) {
                Ok(prefix) => prefixes.push(prefix),
                Err(message) => self.problem(&at.index(index), message),
            }
        }
        prefixes
    }
}

/// Makes a problem. Messages and names quote what stands in the file: a URL in the wrong place may hold secrets.
pub(super) fn describe(line: Option<usize>, at: &At, message: String) -> Problem {
    let name = |name: &Option<String>| name.as_deref().map(redacted);
    Problem {
        line,
        region: name(&at.region),
        database: name(&at.database),
        rule: at.rule,
        message: redacted(&message),
    }
}

/// Checks a name, which becomes part of paths, keys in etcd, metrics and output.
///
/// # Errors
/// The name is too long, or has other characters.
pub fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty()
        || name.len() > MAX_NAME
        || name.starts_with('-')
        || !name.chars().all(allowed)
    {
        return Err(format!(
            "a name has 1 to {MAX_NAME} characters of a to z, 0 to 9 and hyphen, and begins with no \
             hyphen"
        ));
    }
    Ok(())
}

//! A region to its prefixes, now.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result, anyhow, bail};
use ipnet::IpNet;
use jiff::Timestamp;

use crate::policy::{Model, Policy, Region, Source, parse_cidr};

/// Regions that rules name, by name.
pub type Regions = BTreeMap<String, Resolved>;

#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// Sorted, no two alike.
    pub prefixes: Vec<IpNet>,
    pub at: Timestamp,
}

/// Resolves every region that a rule names.
///
/// # Errors
/// The first region that cannot be resolved, by name, with what is wrong with its source.
pub fn resolve(policy: &Policy) -> Result<Regions> {
    let mut regions = Regions::new();
    for database in &policy.databases {
        let Model::Dedicated { rules } = &database.model else {
            continue;
        };
        for rule in rules {
            if let Source::Region(name) = &rule.source
                && !regions.contains_key(name)
            {
                let region = policy
                    .regions
                    .get(name)
                    .with_context(|| format!("find region {name}"))?;
                let mut prefixes =
                    prefixes(region).with_context(|| format!("resolve region {name}"))?;
                prefixes.sort_unstable();
                prefixes.dedup();
                let at = Timestamp::now();
                regions.insert(name.clone(), Resolved { prefixes, at });
            }
        }
    }
    Ok(regions)
}

fn prefixes(region: &Region) -> Result<Vec<IpNet>> {
    match region {
        Region::Prefixes(prefixes) => Ok(prefixes.clone()),
        Region::File(path) => read(path),
        Region::Dns(_) => bail!("this version cannot resolve DNS names yet"),
        Region::Url { .. } => bail!("this version cannot fetch URLs yet"),
    }
}

/// One prefix a line; `#` begins a comment.
fn read(path: &Path) -> Result<Vec<IpNet>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let mut prefixes = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let entry = line.split('#').next().unwrap_or_default().trim();
        if !entry.is_empty() {
            let prefix = parse_cidr(entry)
                .map_err(|problem| anyhow!("{}, line {number}: {problem}", path.display()))?;
            prefixes.push(prefix);
        }
    }
    // An empty file is more likely a failed download than an empty office.
    if prefixes.is_empty() {
        bail!("{} holds no prefix", path.display());
    }
    Ok(prefixes)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn file_holds_prefixes_comments_and_blank_lines() {
        let file = file("# office\n192.0.2.0/24 # first floor\n\n2001:db8::/32\r\n");
        let expected: Vec<IpNet> = vec![
            "192.0.2.0/24".parse().unwrap(),
            "2001:db8::/32".parse().unwrap(),
        ];
        assert_eq!(read(file.path()).unwrap(), expected);
    }

    #[test]
    fn malformed_line_is_named_by_file_and_number() {
        let file = file("192.0.2.0/24\n<html>\n");
        let error = read(file.path()).unwrap_err().to_string();
        assert!(
            error.contains("line 2") && error.contains("<html>"),
            "{error}"
        );
    }

    #[test]
    fn file_without_a_prefix_is_refused() {
        let file = file("# nothing yet\n");
        assert!(
            read(file.path())
                .unwrap_err()
                .to_string()
                .contains("holds no prefix")
        );
    }

    #[test]
    fn missing_file_is_named() {
        let error = read(Path::new("/nonexistent/office.txt")).unwrap_err();
        assert_eq!(error.to_string(), "read /nonexistent/office.txt");
    }
}

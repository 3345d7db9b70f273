//! A region to its prefixes, now.

use std::{
    collections::BTreeMap,
    fs::{self, Metadata},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail};
use ipnet::IpNet;
use jiff::Timestamp;

use crate::policy::{Model, Policy, Region, Source, parse_cidr};

/// Regions that rules name, by name.
pub type Regions = BTreeMap<String, Resolved>;

#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// Sorted, no two alike.
    pub prefixes: Arc<[IpNet]>,
    pub at: Timestamp,
    /// The file they are from, if it may be taken for unchanged.
    file: Option<Stamp>,
}

/// What tells one content of a file from another without reading it.
#[derive(Clone, Debug, PartialEq)]
struct Stamp {
    path: PathBuf,
    device: u64,
    inode: u64,
    length: u64,
    modified: SystemTime,
}

impl Stamp {
    /// `None` for a file so new that another change may leave the same time: file systems keep it no
    /// finer than the kernel's tick.
    fn of(path: &Path, metadata: &Metadata) -> Option<Self> {
        let modified = metadata.modified().ok()?;
        let age = SystemTime::now().duration_since(modified).ok()?;
        (age > Duration::from_secs(1)).then(|| Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified,
        })
    }
}

impl Resolved {
    /// The prefixes as of now, sorted.
    pub fn new(mut prefixes: Vec<IpNet>) -> Self {
        prefixes.sort_unstable();
        prefixes.dedup();
        Self {
            prefixes: prefixes.into(),
            at: Timestamp::now(),
            file: None,
        }
    }
}

/// Resolves every region that a rule names; a file that has not changed since `before` is not read
/// again.
///
/// # Errors
/// The first region that cannot be resolved, by name, with what is wrong with its source.
pub fn resolve(policy: &Policy, before: &Regions) -> Result<Regions> {
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
                let resolved = match region {
                    Region::Prefixes(prefixes) => Ok(Resolved::new(prefixes.clone())),
                    Region::File(path) => read(path, before.get(name)),
                    Region::Dns(_) => Err(anyhow!("this version cannot resolve DNS names yet")),
                    Region::Url { .. } => Err(anyhow!("this version cannot fetch URLs yet")),
                };
                let resolved = resolved.with_context(|| format!("resolve region {name}"))?;
                regions.insert(name.clone(), resolved);
            }
        }
    }
    Ok(regions)
}

fn read(path: &Path, before: Option<&Resolved>) -> Result<Resolved> {
    let metadata = fs::metadata(path).with_context(|| format!("read {}", path.display()))?;
    let stamp = Stamp::of(path, &metadata);
    if let Some(before) = before
        && stamp.is_some()
        && before.file == stamp
    {
        return Ok(before.clone());
    }
    let mut resolved = Resolved::new(parse(path)?);
    // From before it was read: a change in between is seen next time.
    resolved.file = stamp;
    Ok(resolved)
}

/// One prefix a line; `#` begins a comment.
fn parse(path: &Path) -> Result<Vec<IpNet>> {
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
        assert_eq!(parse(file.path()).unwrap(), expected);
    }

    #[test]
    fn malformed_line_is_named_by_file_and_number() {
        let file = file("192.0.2.0/24\n<html>\n");
        let error = parse(file.path()).unwrap_err().to_string();
        assert!(
            error.contains("line 2") && error.contains("<html>"),
            "{error}"
        );
    }

    #[test]
    fn file_without_a_prefix_is_refused() {
        let file = file("# nothing yet\n");
        assert!(
            parse(file.path())
                .unwrap_err()
                .to_string()
                .contains("holds no prefix")
        );
    }

    #[test]
    fn missing_file_is_named() {
        let error = parse(Path::new("/nonexistent/office.txt")).unwrap_err();
        assert_eq!(error.to_string(), "read /nonexistent/office.txt");
    }

    #[test]
    fn file_is_read_again_only_after_a_change() {
        let file = file("192.0.2.0/24\n");
        let old = SystemTime::now() - Duration::from_secs(60);
        file.as_file().set_modified(old).unwrap();
        let first = read(file.path(), None).unwrap();
        let again = read(file.path(), Some(&first)).unwrap();
        assert!(Arc::ptr_eq(&first.prefixes, &again.prefixes));
        // Of the same length, and too new to be told from a change that is still to come.
        fs::write(file.path(), "198.51.0.0/16\n").unwrap();
        let second = read(file.path(), Some(&first)).unwrap();
        assert_eq!(second.prefixes[0].to_string(), "198.51.0.0/16");
        fs::write(file.path(), "203.0.0.0/16\n#").unwrap();
        let third = read(file.path(), Some(&second)).unwrap();
        assert_eq!(third.prefixes[0].to_string(), "203.0.0.0/16");
    }
}

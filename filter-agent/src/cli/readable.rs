//! Whether the service can read a file. Its unit leaves root no CAP_DAC_OVERRIDE and hides the home directories and
//! `/tmp`: what root reads on the command line, it may not.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use crate::{
    policy::{Policy, RegionSource},
    region::{files::Walk, headers},
    whole_file,
};

/// Directories that the unit hides (`ProtectHome`, `PrivateTmp`).
const HIDDEN: [&str; 5] = ["/home", "/root", "/run/user", "/tmp", "/var/tmp"];

const READ: u32 = 0o4;
const SEARCH: u32 = 0o1;

/// Warnings of files that the service could not read: the policy file, by its permissions alone, since it may be a
/// draft elsewhere, and the files that it names. Also of secrets that others could read.
pub(super) fn warnings(file: &Path, policy: &Policy) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut warn = |file: &Path, hidden: bool| {
        let refused = refused(file).or_else(|| hidden.then(|| hidden_by_unit(file)).flatten());
        if let Some(why) = refused {
            let file = file.display();
            warnings.push(format!("the service could not read {file}: {why}"));
        }
    };
    // A pipe is read here.
    let metadata = fs::metadata(file).ok().filter(fs::Metadata::is_file);
    if metadata.is_some()
        && let Ok(file) = std::path::absolute(file)
    {
        warn(&file, false);
    }
    let is_public = metadata.is_some_and(|metadata| metadata.permissions().mode() & 0o004 != 0);
    let named: Vec<&PathBuf> = policy
        .regions
        .values()
        .flat_map(|region| match &region.source {
            RegionSource::File(file) => vec![file],
            RegionSource::Dns(dns) => dns.ca_file.iter().chain(&dns.trust_anchor).collect(),
            RegionSource::Url(url) => url.ca_file.iter().chain(&url.headers_file).collect(),
            RegionSource::Prefixes(_) => Vec::new(),
        })
        .collect();
    for file in named {
        warn(file, true);
    }
    // The others are read by `check` itself, or examined below.
    let of_look_ups = policy.regions.iter().flat_map(|(name, region)| {
        let files: Vec<(&str, &PathBuf)> = match &region.source {
            RegionSource::Dns(dns) => {
                let anchor = dns.trust_anchor.iter().map(|file| ("trust_anchor", file));
                let ca_file = dns.ca_file.iter().map(|file| ("ca_file", file));
                anchor.chain(ca_file).collect()
            }
            RegionSource::Url(url) => url.ca_file.iter().map(|file| ("ca_file", file)).collect(),
            RegionSource::File(_) | RegionSource::Prefixes(_) => Vec::new(),
        };
        files
            .into_iter()
            .map(move |(field, file)| (name, field, file))
    });
    for (name, field, file) in of_look_ups {
        if let Err(error) = whole_file::open(file) {
            let file = file.display();
            warnings.push(format!(
                "region {name}: {field} {file} cannot be read: {error:#}"
            ));
        }
    }
    for (name, region) in &policy.regions {
        let RegionSource::Url(list) = &region.source else {
            continue;
        };
        if is_public && list.url.checksum().is_some() {
            warnings.push(format!(
                "region {name}: others can read what may be a secret in its URL: chmod 600 the policy file, or use \
                 `headers_file`"
            ));
        }
        if let Some(headers) = &list.headers_file {
            let metadata = fs::metadata(headers).map_err(Into::into);
            if let Err(error) = metadata.and_then(|metadata| headers::check_access(&metadata)) {
                let headers = headers.display();
                warnings.push(format!("the service could not use {headers}: {error:#}"));
            }
        }
    }
    warnings
}

/// Why root without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH may not read the file. `None` where it may, and where the
/// file cannot be examined, which is another error.
fn refused(file: &Path) -> Option<String> {
    let mut walk = Walk::new(file);
    while let Some(name) = walk.next_name() {
        let directory = fs::metadata(&name.directory).ok()?;
        if !may(&directory, SEARCH) {
            let directory_name = name.directory.display();
            return Some(format!(
                "it may not search {directory_name} ({})",
                described(&directory)
            ));
        }
        walk.follow(&name).ok()?;
    }
    let metadata = fs::metadata(file).ok()?;
    (!may(&metadata, READ)).then(|| described(&metadata))
}

fn hidden_by_unit(file: &Path) -> Option<String> {
    let file = fs::canonicalize(file).ok()?;
    let hidden = HIDDEN.iter().find(|hidden| file.starts_with(hidden))?;
    Some(format!("its unit hides {hidden}"))
}

/// Whether the mode lets user 0 of group 0 do this. Access control lists are not considered.
fn may(metadata: &fs::Metadata, access: u32) -> bool {
    let mode = metadata.permissions().mode();
    let shift = match (metadata.uid(), metadata.gid()) {
        (0, _) => 6,
        (_, 0) => 3,
        _ => 0,
    };
    mode >> shift & access == access
}

fn described(metadata: &fs::Metadata) -> String {
    let mode = metadata.permissions().mode() & 0o7777;
    let (user, group) = (metadata.uid(), metadata.gid());
    format!("owner {user}, group {group}, mode {mode:04o}")
}

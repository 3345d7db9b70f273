//! Parses lists of prefixes, as files and publishers write them. Pure.

mod json;
mod presets;

use std::net::IpAddr;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use ipnet::IpNet;
use serde_json::Value;

use crate::policy::{Select, parse_cidr};

/// Characters of a list that an error quotes.
const QUOTED: usize = 60;

/// Longest line of a geofeed, in bytes: each comma takes eight times its memory.
const MAX_LINE: usize = 64 << 10;

/// The selected part of a list.
#[derive(Debug, PartialEq)]
pub struct List {
    pub prefixes: Vec<IpNet>,
    /// The publisher's version number of the list, which only grows.
    pub serial: Option<u64>,
}

/// Parses a published list. One entry that is not a prefix refuses the whole list: a damaged list must not be enforced in
/// part.
///
/// # Errors
/// The place that violates the format, or nothing was selected.
pub fn read(body: &[u8], select: &Select) -> Result<List> {
    let body = without_mark(body)?;
    let list = match select {
        Select::Text { unterminated } => List {
            prefixes: lines(body, *unterminated, published)?,
            serial: None,
        },
        Select::Json { path } => {
            let value = json::parse(body)?;
            from_json(&path.query(&value).all(), None)?
        }
        Select::Aws { region, service } => {
            let value = json::parse(body)?;
            let wanted = [("region", Some(region)), ("service", service.as_ref())];
            let serial = presets::serial(&value, "syncToken")?;
            from_json(&presets::aws(&value, &wanted)?, serial)?
        }
        Select::Gcp { scope, service } => {
            let value = json::parse(body)?;
            let wanted = [("scope", Some(scope)), ("service", service.as_ref())];
            let serial = presets::serial(&value, "syncToken")?;
            from_json(&presets::gcp(&value, &wanted)?, serial)?
        }
        Select::Azure { tag } => {
            let value = json::parse(body)?;
            let serial = presets::serial(&value, "changeNumber")?;
            from_json(&presets::azure(&value, tag)?, serial)?
        }
        Select::Cloudflare {} => {
            let value = json::parse(body)?;
            from_json(&presets::cloudflare(&value)?, None)?
        }
        Select::Github { key } => {
            let value = json::parse(body)?;
            from_json(&presets::github(&value, key)?, None)?
        }
        Select::Oracle { region, tag } => {
            let value = json::parse(body)?;
            from_json(&presets::oracle(&value, region, tag.as_ref())?, None)?
        }
        Select::Digitalocean {
            country,
            region,
            city,
            unterminated,
        } => List {
            prefixes: geofeed(body, *unterminated, [country, region, city])?,
            serial: None,
        },
    };
    if list.prefixes.is_empty() {
        bail!("it holds no prefix that is selected");
    }
    Ok(list)
}

/// Parses a region's file: one prefix a line, spelled as in the policy.
///
/// # Errors
/// The place that violates the format.
pub fn read_file(body: &[u8]) -> Result<Vec<IpNet>> {
    lines(without_mark(body)?, false, parse_cidr)
}

/// Parses a prefix of a publisher. A bare address is the prefix of that address.
fn published(text: &str) -> Result<IpNet, String> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.into()),
        Err(_) => parse_cidr(text),
    }
}

/// The body without the byte order mark that Windows editors put in front.
fn without_mark(body: &[u8]) -> Result<&[u8]> {
    if body.starts_with(b"\xff\xfe") || body.starts_with(b"\xfe\xff") {
        bail!("it is UTF-16 text: UTF-8 is needed");
    }
    Ok(body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body))
}

/// The lines with their numbers. Where all but the last have an end, the list was cut off: within a prefix, perhaps, of
/// which another is left.
fn whole_lines(body: &[u8], unterminated: bool) -> impl Iterator<Item = Result<(usize, &[u8])>> {
    let ends = body.iter().filter(|&&byte| byte == b'\n').count();
    let is_cut = ends > 0 && !body.ends_with(b"\n") && !unterminated;
    let lines = (1..).zip(body.split(|&byte| byte == b'\n'));
    lines.map(move |(number, line)| {
        if is_cut && number > ends {
            bail!("line {number} has no end as the others have: it was cut off");
        }
        Ok((number, line))
    })
}

fn lines(
    body: &[u8],
    unterminated: bool,
    prefix: impl Fn(&str) -> Result<IpNet, String>,
) -> Result<Vec<IpNet>> {
    let mut prefixes = Vec::new();
    for line in whole_lines(body, unterminated) {
        let (number, line) = line?;
        let entry = line.split(|byte| b"#;".contains(byte)).next();
        let entry = entry.unwrap_or_default().trim_ascii();
        if !entry.is_empty() {
            let text = std::str::from_utf8(entry)
                .map_err(|_| anyhow!("line {number}: {} is not UTF-8 text", quoted(entry)))?;
            prefixes.push(parsed(text, &prefix).with_context(|| format!("line {number}"))?);
        }
    }
    Ok(prefixes)
}

/// Parses a prefix. Bounds the length of the error.
fn parsed(text: &str, prefix: impl Fn(&str) -> Result<IpNet, String>) -> Result<IpNet> {
    if text.len() > QUOTED {
        bail!("{} is not a prefix", quoted(text.as_bytes()));
    }
    prefix(text).map_err(|problem| anyhow!(problem))
}

fn quoted(bytes: &[u8]) -> String {
    let shown = bytes.get(..QUOTED).unwrap_or(bytes);
    let more = if shown.len() < bytes.len() { "..." } else { "" };
    format!("\"{}{more}\"", shown.escape_ascii())
}

/// RFC 8805: `prefix,country,region,city,postal`, and lines that begin with `#`. What is wrong in lines that are not
/// selected does not matter (section 2.1): a header, a place in another encoding.
fn geofeed(body: &[u8], unterminated: bool, wanted: [&Option<String>; 3]) -> Result<Vec<IpNet>> {
    for line in whole_lines(body, unterminated) {
        let (number, line) = line?;
        // CSV takes a lone CR for a line's end, too.
        for part in line.split(|&byte| byte == b'\r') {
            ensure!(
                part.len() <= MAX_LINE,
                "line {number} is longer than {MAX_LINE} bytes"
            );
            // An open quote would make the rest of the list one field.
            let quotes = part.iter().filter(|&&byte| byte == b'"').count();
            ensure!(
                quotes.is_multiple_of(2),
                "line {number}: a quote is not closed"
            );
        }
    }
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .comment(Some(b'#'))
        .trim(csv::Trim::All)
        .from_reader(body);
    let mut prefixes = Vec::new();
    for record in reader.byte_records() {
        let record = record.context("read CSV")?;
        let is_selected = wanted.iter().zip(1..).all(|(wanted, field)| {
            let found = record.get(field).unwrap_or_default();
            let wanted = wanted.as_ref().map(String::as_bytes);
            wanted.is_none_or(|wanted| found.eq_ignore_ascii_case(wanted))
        });
        if is_selected {
            let line = record.position().map_or(0, csv::Position::line);
            let prefix = String::from_utf8_lossy(record.get(0).unwrap_or_default());
            prefixes.push(parsed(&prefix, published).with_context(|| format!("line {line}"))?);
        }
    }
    Ok(prefixes)
}

/// Parses the selected values.
fn from_json(selected: &[&Value], serial: Option<u64>) -> Result<List> {
    let prefixes = selected.iter().map(|value| match value {
        Value::String(text) => parsed(text, published),
        other => {
            let other = other.to_string();
            bail!(
                "{} is selected, and is not a prefix",
                quoted(other.as_bytes())
            )
        }
    });
    let prefixes = prefixes.collect::<Result<_>>()?;
    Ok(List { prefixes, serial })
}

//! Parses lists of prefixes, as files and publishers write them. Pure.

use std::net::IpAddr;

use anyhow::{Context as _, Result, anyhow, bail};
use ipnet::IpNet;
use serde_json::Value;
use serde_json_path::JsonPath;

use crate::policy::{Select, parse_cidr};

/// Characters of a list that an error quotes.
const QUOTED: usize = 60;

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
    let list = match select {
        Select::Text {} => List {
            prefixes: lines(body, published)?,
            serial: None,
        },
        Select::Json { path } => json(body, path, None)?,
        Select::Aws { region, service } => {
            let wanted = equal(&[("region", Some(region)), ("service", service.as_ref())]);
            let query =
                format!("$['prefixes','ipv6_prefixes'][?{wanted}]['ip_prefix','ipv6_prefix']");
            preset(body, &query, Some("syncToken"))?
        }
        Select::Gcp { scope, service } => {
            let wanted = equal(&[("scope", Some(scope)), ("service", service.as_ref())]);
            let query = format!("$.prefixes[?{wanted}]['ipv4Prefix','ipv6Prefix']");
            preset(body, &query, Some("syncToken"))?
        }
        Select::Azure { tag } => {
            let wanted = equal(&[("name", Some(tag))]);
            let query = format!("$.values[?{wanted}].properties.addressPrefixes[*]");
            preset(body, &query, Some("changeNumber"))?
        }
        Select::Cloudflare {} => preset(body, "$.result['ipv4_cidrs','ipv6_cidrs'][*]", None)?,
        Select::Github { key } => preset(body, &format!("$[{}][*]", literal(key)), None)?,
        Select::Oracle { region, tag } => {
            let wanted = equal(&[("region", Some(region))]);
            let tagged = tag
                .as_ref()
                .map(|tag| format!("?@.tags[?@=={}]", literal(tag)));
            let tagged = tagged.unwrap_or_else(|| "*".into());
            let query = format!("$.regions[?{wanted}].cidrs[{tagged}].cidr");
            preset(body, &query, None)?
        }
        Select::Digitalocean {
            country,
            region,
            city,
        } => List {
            prefixes: geofeed(body, [country, region, city])?,
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
/// As `read`.
pub fn read_file(body: &[u8]) -> Result<Vec<IpNet>> {
    let prefixes = lines(body, parse_cidr)?;
    // An empty file is more likely a failed download than a region without addresses.
    if prefixes.is_empty() {
        bail!("it holds no prefix");
    }
    Ok(prefixes)
}

/// Parses a prefix of a publisher. A bare address is the prefix of that address.
fn published(text: &str) -> Result<IpNet, String> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.into()),
        Err(_) => parse_cidr(text),
    }
}

fn lines(body: &[u8], prefix: impl Fn(&str) -> Result<IpNet, String>) -> Result<Vec<IpNet>> {
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    let mut prefixes = Vec::new();
    for (number, line) in (1..).zip(body.split(|&byte| byte == b'\n')) {
        let entry = line.split(|&byte| byte == b'#').next().unwrap_or_default();
        let entry = entry.trim_ascii();
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

/// RFC 8805: `prefix,country,region,city,postal`, and lines that begin with `#`.
fn geofeed(body: &[u8], wanted: [&Option<String>; 3]) -> Result<Vec<IpNet>> {
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .comment(Some(b'#'))
        .trim(csv::Trim::All)
        .from_reader(body);
    let mut prefixes = Vec::new();
    for record in reader.records() {
        let record = record.context("read CSV")?;
        let line = record.position().map_or(0, csv::Position::line);
        let prefix = record.get(0).unwrap_or_default();
        // In lines that are not selected, too: else a page that is not a geofeed looks like an empty one.
        let prefix = parsed(prefix, published).with_context(|| format!("line {line}"))?;
        let mut fields = wanted.iter().zip(1..);
        if fields.all(|(wanted, field)| {
            let wanted = wanted.as_deref();
            wanted.is_none_or(|wanted| record.get(field) == Some(wanted))
        }) {
            prefixes.push(prefix);
        }
    }
    Ok(prefixes)
}

/// Parses a publisher's list. `query` selects its prefixes; `serial` is the field of its version number.
fn preset(body: &[u8], query: &str, serial: Option<&str>) -> Result<List> {
    let path = JsonPath::parse(query).with_context(|| format!("parse {query}"))?;
    json(body, &path, serial)
}

/// Returns a JSONPath filter that compares these fields with these values.
fn equal(fields: &[(&str, Option<&String>)]) -> String {
    let tests = fields.iter().filter_map(|(field, value)| {
        let value = literal(value.as_ref()?);
        Some(format!("@.{field}=={value}"))
    });
    tests.collect::<Vec<_>>().join(" && ")
}

/// Quotes a string for JSONPath, which writes strings as JSON does (RFC 9535 section 2.3.1.1).
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

fn json(body: &[u8], path: &JsonPath, serial: Option<&str>) -> Result<List> {
    let value: Value = serde_json::from_slice(body).with_context(|| {
        let begins = quoted(body.trim_ascii_start());
        format!("read JSON (it begins with {begins})")
    })?;
    let mut prefixes = Vec::new();
    for node in path.query(&value) {
        let Value::String(text) = node else {
            let node = node.to_string();
            bail!(
                "{} is selected, and is not a prefix",
                quoted(node.as_bytes())
            );
        };
        prefixes.push(parsed(text, published)?);
    }
    let serial = serial.and_then(|field| match value.get(field)? {
        Value::String(text) => text.parse().ok(),
        number => number.as_u64(),
    });
    Ok(List { prefixes, serial })
}

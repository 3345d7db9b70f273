//! Parses lists of prefixes, as files and publishers write them. Pure.

use std::{fmt, net::IpAddr};

use anyhow::{Context as _, Result, anyhow, bail};
use ipnet::IpNet;
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
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
    let body = without_mark(body)?;
    let list = match select {
        Select::Text { unterminated } => List {
            prefixes: lines(body, *unterminated, published)?,
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
        // An open quote would make the rest of the list one field. CSV takes a lone CR for a line's end, too.
        let is_open = |part: &[u8]| part.iter().filter(|&&byte| byte == b'"').count() % 2 != 0;
        if line.split(|&byte| byte == b'\r').any(is_open) {
            bail!("line {number}: a quote is not closed");
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
    let Unique(value) = serde_json::from_slice(body).with_context(|| {
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

/// A value whose objects have each key once: of two the parser would keep the last, and lose what the first has.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Self)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Unique(value)) = elements.next_element()? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = serde_json::Map::new();
        while let Some((key, Unique(value))) = entries.next_entry::<String, Unique>()? {
            if object.contains_key(&key) {
                let key = quoted(key.as_bytes());
                return Err(de::Error::custom(format!(
                    "the key {key} stands twice in an object"
                )));
            }
            object.insert(key, value);
        }
        Ok(object.into())
    }
}

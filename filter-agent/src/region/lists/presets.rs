//! Selects the prefixes of lists in their publishers' own formats. What is selected must be there, in the shape that its
//! publisher gives it: a JSONPath query would pass over the rest. Pure.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

/// Fields of an entry, and the values that select it. `None`: any.
type Wanted<'a> = [(&'a str, Option<&'a String>)];

/// <https://docs.aws.amazon.com/vpc/latest/userguide/aws-ip-syntax.html>
pub(super) fn aws<'a>(list: &'a Value, wanted: &Wanted) -> Result<Vec<&'a Value>> {
    let fields = ["ip_prefix", "ipv6_prefix"];
    let mut prefixes = of_entries(list, "prefixes", wanted, fields)?;
    prefixes.extend(of_entries(list, "ipv6_prefixes", wanted, fields)?);
    Ok(prefixes)
}

/// <https://support.google.com/a/answer/10026322>
pub(super) fn gcp<'a>(list: &'a Value, wanted: &Wanted) -> Result<Vec<&'a Value>> {
    of_entries(list, "prefixes", wanted, ["ipv4Prefix", "ipv6Prefix"])
}

/// <https://learn.microsoft.com/azure/virtual-network/service-tags-overview>
pub(super) fn azure<'a>(list: &'a Value, tag: &String) -> Result<Vec<&'a Value>> {
    let mut prefixes = Vec::new();
    for (place, entry) in selected(list, "values", &[("name", Some(tag))])? {
        let properties = entry.get("properties").unwrap_or(&Value::Null);
        prefixes.extend(array(properties, "addressPrefixes").context(place)?);
    }
    Ok(prefixes)
}

/// <https://developers.cloudflare.com/api/resources/ips/>
pub(super) fn cloudflare(list: &Value) -> Result<Vec<&Value>> {
    ensure!(
        list.get("success").is_none_or(|value| *value == true),
        "the server reports an error: `success` is not true"
    );
    let result = list.get("result").unwrap_or(&Value::Null);
    let mut prefixes = Vec::new();
    for key in ["ipv4_cidrs", "ipv6_cidrs"] {
        prefixes.extend(array(result, key).context("`result`")?);
    }
    Ok(prefixes)
}

/// <https://docs.github.com/rest/meta/meta>
pub(super) fn github<'a>(list: &'a Value, key: &str) -> Result<Vec<&'a Value>> {
    Ok(array(list, key)?.iter().collect())
}

/// <https://docs.oracle.com/iaas/Content/General/Concepts/addressranges.htm>
pub(super) fn oracle<'a>(
    list: &'a Value,
    region: &String,
    tag: Option<&String>,
) -> Result<Vec<&'a Value>> {
    let mut prefixes = Vec::new();
    for (place, entry) in selected(list, "regions", &[("region", Some(region))])? {
        for (index, range) in array(entry, "cidrs")
            .context(place.clone())?
            .iter()
            .enumerate()
        {
            let place = || format!("{place}: `cidrs`, entry {}", index + 1);
            if let Some(tag) = tag {
                let tags = array(range, "tags").with_context(place)?;
                if !tags.iter().any(|found| found == tag) {
                    continue;
                }
            }
            let prefix = range.get("cidr").context("it has no `cidr`");
            prefixes.push(prefix.with_context(place)?);
        }
    }
    Ok(prefixes)
}

/// The publisher's version number of a list. `None`: it has none.
///
/// # Errors
/// It is not a number that can be compared.
pub(super) fn serial(list: &Value, field: &str) -> Result<Option<u64>> {
    let number = match list.get(field) {
        None => return Ok(None),
        Some(Value::String(text)) => text.parse().ok(),
        Some(number) => number.as_u64(),
    };
    let number = number.with_context(|| format!("its `{field}` is not a whole number"));
    number.map(Some)
}

fn of_entries<'a>(
    list: &'a Value,
    key: &str,
    wanted: &Wanted,
    fields: [&str; 2],
) -> Result<Vec<&'a Value>> {
    let mut prefixes = Vec::new();
    for (place, entry) in selected(list, key, wanted)? {
        let before = prefixes.len();
        prefixes.extend(fields.iter().filter_map(|field| entry.get(field)));
        if prefixes.len() == before {
            let [v4, v6] = fields;
            bail!("{place}: it has neither `{v4}` nor `{v6}`");
        }
    }
    Ok(prefixes)
}

/// The entries of a list within the list that are wanted, each with its place.
fn selected<'a>(list: &'a Value, key: &str, wanted: &Wanted) -> Result<Vec<(String, &'a Value)>> {
    let mut selected = Vec::new();
    for (index, entry) in array(list, key)?.iter().enumerate() {
        let place = || format!("`{key}`, entry {}", index + 1);
        ensure!(entry.is_object(), "{}: it is not an object", place());
        let is_equal = |&(field, value): &(&str, Option<&String>)| {
            value.is_none_or(|value| entry.get(field).is_some_and(|found| found == value))
        };
        if wanted.iter().all(is_equal) {
            selected.push((place(), entry));
        }
    }
    Ok(selected)
}

fn array<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    let found = value.get(key).and_then(Value::as_array);
    found.with_context(|| format!("it has no list `{key}`"))
}

//! docs/openapi.json against the router and the answers.

use std::{collections::BTreeSet, fs};

use filter_agent::control;
use filter_tests::net::{Connection, DB4, DENIED4, Net, dedicated, policy};
use serde_json::{Value, json};

use crate::http::{Answer, ask};

fn read(path: &str) -> String {
    fs::read_to_string(format!("{}/../docs/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn document() -> Value {
    serde_json::from_str(&read("openapi.json")).unwrap()
}

#[test]
fn every_route_is_described_and_no_other() {
    let document = document();
    let mut described = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let is_for_group = operation["x-status-socket"] == true;
            described.insert((method.to_uppercase(), path.clone(), is_for_group));
        }
    }
    let served = control::listed().into_iter();
    let served: BTreeSet<_> = served
        .map(|route| {
            (
                route.method.to_string(),
                route.path.to_owned(),
                route.is_for_group,
            )
        })
        .collect();
    assert_eq!(described, served);
    let page = read("api.md");
    for (method, path, _) in served {
        let is_named = page.contains(&format!("`{method} {path}`"))
            || page.contains(&format!("`{method} {path}?"));
        assert!(is_named, "docs/api.md lacks {method} {path}");
    }
}

/// How a value differs from a schema; `None`: it does not. Fields that the schema does not name are differences too.
fn difference(document: &Value, schema: &Value, value: &Value, place: &str) -> Option<String> {
    if let Some(name) = schema["$ref"].as_str() {
        let schema = document.pointer(name.strip_prefix('#').unwrap());
        return difference(document, schema.expect(name), value, place);
    }
    if let Some(any) = schema["anyOf"].as_array() {
        let found: Option<Vec<_>> = any
            .iter()
            .map(|schema| difference(document, schema, value, place))
            .collect();
        return found.map(|found| found.join(" and "));
    }
    let types = match &schema["type"] {
        Value::Array(types) => types.clone(),
        one => vec![one.clone()],
    };
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let is_of_type = types
        .iter()
        .any(|wanted| wanted == kind || kind == "integer" && wanted == "number");
    if !is_of_type {
        return Some(format!("{place} is {value}, not {types:?}"));
    }
    if let Some(values) = schema["enum"].as_array()
        && !values.contains(value)
    {
        return Some(format!("{place} is {value}, not one of {values:?}"));
    }
    match value {
        Value::Array(values) => values
            .iter()
            .find_map(|value| difference(document, &schema["items"], value, &format!("{place}[]"))),
        Value::Object(fields) => {
            let required = schema["required"].as_array().cloned().unwrap_or_default();
            let missing = required
                .iter()
                .find(|name| !fields.contains_key(name.as_str().unwrap()));
            if let Some(name) = missing {
                return Some(format!("{place} lacks {name}"));
            }
            fields.iter().find_map(|(name, value)| {
                let place = format!("{place}.{name}");
                let of_field = &schema["properties"][name];
                match (of_field, &schema["additionalProperties"]) {
                    (Value::Null, Value::Object(_)) => {
                        difference(document, &schema["additionalProperties"], value, &place)
                    }
                    (Value::Null, _) => Some(format!("{place} is not described")),
                    (schema, _) => difference(document, schema, value, &place),
                }
            })
        }
        _ => None,
    }
}

/// Compares an answer with what the document says of the operation: status, content type, headers and every field.
#[track_caller]
fn check(document: &Value, method: &str, path: &str, answer: &Answer) {
    let operation = &document["paths"][path][method.to_lowercase()];
    let mut response = &operation["responses"][answer.status.to_string()];
    if let Some(name) = response["$ref"].as_str() {
        response = document.pointer(name.strip_prefix('#').unwrap()).unwrap();
    }
    assert!(response.is_object(), "{method} {path}: {answer:?}");
    let headers = response["headers"].as_object();
    for name in headers.iter().flat_map(|headers| headers.keys()) {
        let name = name.to_lowercase();
        assert!(
            answer.headers.contains_key(&name),
            "{method} {path}: no {name}: {answer:?}"
        );
    }
    let Some(content) = response["content"].as_object() else {
        assert_eq!(answer.body, "", "{method} {path}");
        return;
    };
    let (kind, content) = content.iter().next().unwrap();
    let given = answer.headers["content-type"].split(';').next().unwrap();
    assert_eq!(given, kind, "{method} {path}");
    if kind == "application/json" {
        let found = difference(document, &content["schema"], &answer.json(), "answer");
        assert_eq!(found, None, "{method} {path}: {}", answer.body);
    }
}

#[test]
fn every_answer_is_as_described_in_all_its_fields() {
    let document = document();
    let mut net = Net::new("api-document");
    let file = net.dir().join("office.txt");
    fs::write(&file, "192.0.2.0/24\n198.51.100.0/24\n").unwrap();
    let orders = dedicated("orders", 5432, &["203.0.113.10/32"], "");
    let orders = orders.replace("rules: [", "rules: [{region: office}, ");
    let text = format!(
        "regions: {{office: {{file: {}}}}}\n{}",
        file.display(),
        policy("eth0", "native", &[orders])
    );
    net.write_policy(&text);
    net.watch(&[]);
    net.start();
    fs::write(&file, "192.0.2.0/24\n").unwrap();
    net.wait_for_line("region office: 1 removed");
    net.remove_tripwire();
    let refused = net.connect(DENIED4.into(), (DB4, 5432).into());
    assert_eq!(refused, Connection::Silence);
    let rules = "/v1/databases/{database}/firewall_rules";
    let rule = "/v1/databases/{database}/firewall_rules/{id}";
    let made = json!({"cidr": "192.0.2.9/32", "label": "a", "seconds": 600}).to_string();
    let blocked =
        json!({"block": {"database": "orders", "source": "192.0.2.8", "seconds": 60}}).to_string();
    let wider = text.replace("203.0.113.10/32", "203.0.113.0/24");
    // Each with an answer in which much is filled in; then one that is refused.
    let requests: Vec<(&str, &str, &str, &str)> = vec![
        ("GET", "/metrics", "", ""),
        ("GET", "/v1/metrics", "", ""),
        ("GET", "/v1/status", "?verify=true", ""),
        ("POST", "/v1/temporary", "", &blocked),
        ("POST", "/v1/temporary", "", "{}"),
        ("POST", rules, "", &made),
        ("POST", rules, "", &made),
        ("POST", rules, "", "{}"),
        ("GET", rules, "", ""),
        ("GET", rule, "", ""),
        ("PATCH", rule, "", "{\"label\": \"b\"}"),
        ("PATCH", rule, "", "1"),
        ("PUT", rule, "", ""),
        ("GET", "/v1/rules", "?database=orders", ""),
        ("GET", "/v1/rules", "?database=other", ""),
        ("GET", "/v1/regions", "", ""),
        ("GET", "/v1/explain", "?source=192.0.2.8", ""),
        ("GET", "/v1/drops", "", ""),
        ("GET", "/v1/events", "", ""),
        ("GET", "/v1/plan", "?caller=192.0.2.9", ""),
        ("POST", "/v1/plan", "?file=x", &wider),
        ("POST", "/v1/plan", "?file=x", "databases: 1"),
        ("POST", "/v1/reload", "", ""),
        ("POST", "/v1/reload", "?if=0", ""),
        ("POST", "/v1/reload", "?confirm=600", ""),
        ("GET", "/v1/status", "", ""),
        ("POST", "/v1/reload", "", ""),
        ("POST", "/v1/confirm", "", ""),
        ("POST", "/v1/confirm", "", ""),
        ("POST", "/v1/rollback", "?to=99", ""),
        ("GET", "/v1/history", "", ""),
        ("GET", "/v1/history", "?id=1&text=true", ""),
        ("GET", "/v1/history", "?id=99", ""),
        ("POST", "/v1/refresh", "", ""),
        ("POST", "/v1/trace", "?source=nonsense", ""),
        ("GET", "/v1/firewall/managed_ranges", "", ""),
        ("DELETE", rule, "", ""),
        ("DELETE", rule, "", ""),
    ];
    for (method, path, query, body) in requests {
        let place = path
            .replace("{database}", "orders")
            .replace("{id}", "temporary-192.0.2.9_32");
        let answer = ask(&net, &format!("{method} {place}{query}"), body);
        let described = if method == "PUT" { "PATCH" } else { method };
        check(&document, described, path, &answer);
    }
    let detached = ask(&net, "POST /v1/detach", "");
    check(&document, "POST", "/v1/detach", &detached);
    assert_eq!(detached.json(), json!({"interfaces": ["eth0"]}));
    net.wait_for_exit();
}

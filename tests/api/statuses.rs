//! HTTP's statuses, as they are documented.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use filter_tests::net::{Net, PATIENCE, dedicated, policy};

use crate::http::{Answer, ask, send};

fn start(name: &str) -> Net {
    let orders = dedicated("orders", 5432, &["203.0.113.0/24"], "");
    let shop = "{name: shop, port: 3306, model: shared}".to_owned();
    Net::enforcing(name, &[], &policy("eth0", "native", &[orders, shop]))
}

const RULES: &str = "/v1/databases/orders/firewall_rules";

#[test]
fn refusals_have_the_status_of_their_kind_and_say_why_in_json() {
    let net = start("api-statuses");
    let temporary = |change: &str| ("POST /v1/temporary".to_owned(), change.to_owned());
    let plain = |request: &str| (request.to_owned(), String::new());
    let make = |body: &str| (format!("POST {RULES}"), body.to_owned());
    let cases: Vec<((String, String), u16, &str)> = vec![
        (plain("GET /"), 404, "docs/api.md"),
        (plain("GET /status"), 404, "/status"),
        (plain("GET /v1/status/"), 404, "/v1/status/"),
        (
            plain("GET /v1/status?verfy=true"),
            400,
            "unknown field `verfy`",
        ),
        (plain("GET /v1/status?verify=maybe"), 400, "verify"),
        (
            plain("GET /v1/status?verify=true&verify=true"),
            400,
            "duplicate",
        ),
        (
            plain("GET /v1/regions?name=office"),
            400,
            "unknown field `name`",
        ),
        (plain("GET /metrics?name=x"), 400, "unknown field `name`"),
        (
            plain("GET /v1/rules?database=other"),
            404,
            "which has orders, shop",
        ),
        (plain("GET /v1/explain"), 400, "source"),
        (plain("GET /v1/explain?source=nonsense"), 400, "source"),
        (
            plain("GET /v1/explain?source=192.0.2.1&database=other"),
            404,
            "no database other",
        ),
        (plain("GET /v1/drops?source=nonsense"), 400, "nonsense"),
        (plain("GET /v1/drops?limit=-1"), 400, "limit"),
        (
            plain("POST /v1/refresh?region=other"),
            404,
            "no rule names region other",
        ),
        (plain("POST /v1/reload?keep=1"), 400, "keep"),
        (plain("POST /v1/trace?source=nonsense"), 400, "nonsense"),
        (
            plain("POST /v1/trace?source=192.0.2.1&seconds=0"),
            400,
            "a trace lasts",
        ),
        (
            plain("POST /v1/trace?source=192.0.2.1&database=other"),
            404,
            "no database other",
        ),
        (plain("POST /v1/status"), 405, "POST"),
        (plain("DELETE /v1/rules"), 405, "DELETE"),
        (plain("GET /v1/reload"), 405, "GET"),
        (plain(&format!("PUT {RULES}")), 405, "PUT"),
        (
            plain(&format!("PUT {RULES}/file-203.0.113.0_24")),
            405,
            "PUT",
        ),
        (
            ("POST /v1/plan".into(), "databases: []".into()),
            400,
            "file",
        ),
        (
            ("POST /v1/plan?file=x".into(), "databases: 1".into()),
            422,
            "x:",
        ),
        (("POST /v1/plan?file=x".into(), "\u{0}".into()), 422, "x:"),
        (temporary(""), 400, "read the change"),
        (temporary("[]"), 400, "read the change"),
        (temporary("{"), 400, "read the change"),
        (temporary(r#"{"open": {}}"#), 400, "unknown variant `open`"),
        (
            temporary(r#"{"create": {}}"#),
            400,
            "unknown variant `create`",
        ),
        (
            temporary(
                r#"{"allow": {"database": "orders", "source": "192.0.2.1", "seconds": 9, "x": 1}}"#,
            ),
            400,
            "unknown field `x`",
        ),
        (
            temporary(r#"{"allow": {"database": "other", "source": "192.0.2.1", "seconds": 9}}"#),
            404,
            "no database other",
        ),
        (
            temporary(r#"{"allow": {"database": "shop", "source": "192.0.2.1", "seconds": 9}}"#),
            422,
            "is shared",
        ),
        (
            temporary(
                r#"{"allow": {"database": "orders", "source": "192.0.2.1/24", "seconds": 9}}"#,
            ),
            422,
            "192.0.2.0/24",
        ),
        (
            temporary(r#"{"allow": {"database": "orders", "source": "192.0.2.1", "seconds": 0}}"#),
            422,
            "a temporary rule lasts",
        ),
        (
            temporary(r#"{"revoke": {"database": "orders", "source": "203.0.113.0/24"}}"#),
            409,
            "is a rule of the policy file",
        ),
        (
            temporary(r#"{"revoke": {"database": "orders", "source": "192.0.2.1"}}"#),
            404,
            "no temporary rule",
        ),
        (make("{"), 400, "read the rule"),
        (
            make(r#"{"cidr": "192.0.2.0/24", "seconds": 9, "port": 1}"#),
            400,
            "unknown field `port`",
        ),
        (make(r#"{"cidr": "192.0.2.0/24"}"#), 422, "needs an end"),
        (
            make(r#"{"cidr": "192.0.2.0/24", "seconds": 9, "expires": "2100-01-01T00:00:00Z"}"#),
            422,
            "not both",
        ),
        (
            make(r#"{"cidr": "192.0.2.0/24", "expires": "2020-01-01T00:00:00Z"}"#),
            422,
            "is not such a time",
        ),
        (
            make(r#"{"cidr": "192.0.2.0/24", "expires": "2100-01-01T00:00:00Z"}"#),
            422,
            "366 days",
        ),
        (
            make(r#"{"cidr": "192.0.2.1/24", "seconds": 9}"#),
            422,
            "192.0.2.0/24",
        ),
        (make(r#"{"seconds": 9}"#), 422, "cidr"),
        (
            make(r#"{"type": "managed_range", "range_id": "x", "seconds": 9}"#),
            422,
            "policy file",
        ),
        (
            make("{\"cidr\": \"192.0.2.0/24\", \"seconds\": 9, \"label\": \"a\\u0007\"}"),
            422,
            "label",
        ),
        (
            (
                "POST /v1/databases/shop/firewall_rules".into(),
                r#"{"cidr": "192.0.2.0/24", "seconds": 9}"#.into(),
            ),
            422,
            "is shared",
        ),
        (
            plain("GET /v1/databases/other/firewall_rules"),
            404,
            "no database other",
        ),
        (plain("GET /v1/databases/%ff/firewall_rules"), 400, "path"),
        (
            plain(&format!("GET {RULES}?page=2")),
            400,
            "unknown field `page`",
        ),
        (
            plain(&format!("GET {RULES}/temporary-192.0.2.1_32")),
            404,
            "has no rule temporary-192.0.2.1_32",
        ),
        (
            plain(&format!("DELETE {RULES}/temporary-192.0.2.1_32")),
            404,
            "has no rule",
        ),
        (
            plain(&format!("DELETE {RULES}/file-203.0.113.0_24")),
            409,
            "is a rule of the policy file",
        ),
        (
            (format!("PATCH {RULES}/file-203.0.113.0_24"), "{}".into()),
            409,
            "policy.yaml",
        ),
    ];
    for ((request, body), status, words) in cases {
        let answer = ask(&net, &request, &body);
        assert_eq!(answer.status, status, "{request} {body}: {answer:?}");
        let error = answer.error();
        assert!(error.contains(words), "{request} {body}: {error}");
        let allow = answer.headers.get("allow");
        assert_eq!(allow.is_some(), status == 405, "{request}: {allow:?}");
    }
    assert_eq!(
        ask(&net, &format!("PUT {RULES}"), "").headers["allow"],
        "GET,HEAD,POST"
    );
    // Nothing of it was done.
    let rules = ask(&net, &format!("GET {RULES}"), "").json();
    assert_eq!(rules["rules"].as_array().unwrap().len(), 1, "{rules}");
}

#[test]
fn reload_that_unguards_is_a_conflict_and_one_with_mistakes_cannot_be() {
    let net = start("api-reload");
    let refused = |text: &str, request: &str| -> Answer {
        net.write_policy(text);
        ask(&net, request, "")
    };
    let orders = dedicated("orders", 5432, &["203.0.113.0/24"], "");
    let unguarded = policy("eth0", "native", &[orders]);
    let answer = refused(&unguarded, "POST /v1/reload");
    assert_eq!(answer.status, 409);
    assert!(answer.error().contains("shop"), "{answer:?}");
    let answer = refused("databases: 1", "POST /v1/reload");
    assert_eq!(answer.status, 422);
    assert!(
        answer
            .error()
            .starts_with("reload refused, nothing is changed: "),
        "{answer:?}"
    );
    fs::remove_file(net.policy_path()).unwrap();
    assert_eq!(ask(&net, "POST /v1/reload", "").status, 409);
    assert_eq!(ask(&net, "GET /v1/plan", "").status, 409);
}

#[test]
fn bodies_that_are_too_long_or_do_not_arrive_are_given_up_with_a_status() {
    let net = start("api-bodies");
    let long = format!("{{\"allow\": \"{}\"}}", "a".repeat(9 << 10));
    let answer = ask(&net, "POST /v1/temporary", &long);
    assert_eq!(answer.status, 413, "{answer:?}");
    assert!(answer.error().contains("longer than 8192 bytes"));
    // A length that is promised is not waited for.
    let promised =
        "POST /v1/plan?file=x HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\na";
    let answer = send(&net.socket(), promised.as_bytes());
    assert!(
        answer.starts_with("HTTP/1.1 413 ") || answer.starts_with("HTTP/1.1 408 "),
        "{answer}"
    );
    let mut slow = UnixStream::connect(net.socket()).unwrap();
    slow.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = "POST /v1/temporary HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{";
    slow.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("did not arrive within 10s"), "{answer}");
}

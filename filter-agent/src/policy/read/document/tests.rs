use super::*;
use crate::policy::parse;

const POLICY: &str = "interfaces: [eth0]
regions: {office: {prefixes: [192.0.2.0/24]}, cloud: {prefixes: [192.0.2.0/24]}}
fleet: {endpoints: ['http://127.0.0.1:2379'], insecure: true}
databases:
  - name: orders
    port: 5432
    model: dedicated
    force_tls: false
    fleet:
      widest: [/16, /48]
      within: [203.0.0.0/8, 198.51.100.0/24, '2001:db8::/32']
      regions: [office]
    rules:
      - cidr: 203.0.113.10/32
      - cidr: 203.0.113.11/32
  - name: shop
    port: 3306
    model: dedicated
    force_tls: false
";

fn read(text: impl AsRef<[u8]>) -> Result<Document, String> {
    let (policy, _) = parse(POLICY).unwrap();
    parse_document(text.as_ref(), &policy.databases[0], &policy)
}

fn rules(count: u8) -> String {
    let rules = (0..count).map(|n| format!("- cidr: 198.51.100.{n}/32\n"));
    format!("rules:\n{}", rules.collect::<String>())
}

#[test]
fn every_field_of_a_document_arrives() {
    let text = "\u{feff}# of Monday
rules:
  - cidr: 203.0.0.0/16
    except: [203.0.113.66/32]
    label: office
    expires: 2027-01-31T19:00:00+01:00
  - region: office
  - cidr: 2001:db8::/48
rollout:
  on: [db7, db8.example.net]
  until: 2026-11-25T23:00:00Z
  rules:
    - cidr: 203.0.113.10/32
";
    let document = read(text).unwrap();
    let [first, region, v6] = document.rules.as_slice() else {
        panic!("{:?}", document.rules);
    };
    assert_eq!(first.source, Source::Cidr("203.0.0.0/16".parse().unwrap()));
    assert_eq!(first.except, ["203.0.113.66/32".parse().unwrap()]);
    assert_eq!(first.label.as_deref(), Some("office"));
    assert_eq!(first.expires, "2027-01-31T18:00:00Z".parse().ok());
    assert_eq!(region.source, Source::Region("office".into()));
    assert_eq!(v6.source, Source::Cidr("2001:db8::/48".parse().unwrap()));
    let rollout = document.rollout.unwrap();
    let hosts = ["db7", "db8.example.net"].map(str::to_owned);
    assert_eq!(rollout.on, hosts.into());
    assert_eq!(rollout.until, "2026-11-25T23:00:00Z".parse().unwrap());
    // A source of the file's own rules is no fault.
    assert_eq!(rollout.rules.len(), 1);
    assert_eq!(read("rules: []").unwrap(), Document::default());
    assert_eq!(read(rules(28)).unwrap().rules.len(), 28);
}

#[test]
fn bad_documents_are_refused_with_line_rule_and_bound() {
    let rollout = |rest: &str| format!("rules: []\nrollout:\n  {rest}\n");
    let on = "on: [db7]\n  until: 2026-11-25T23:00:00Z";
    let missing = "`rules` is needed; `rules: []` is how all rules of the fleet end";
    let cases = [
        (String::new(), format!("it is empty: {missing}")),
        ("\n# nothing\n".into(), format!("it is empty: {missing}")),
        ("null".into(), format!("line 1: it is not a mapping: {missing}")),
        ("[]".into(), format!("line 1: it is not a mapping: {missing}")),
        ("{}".into(), format!("line 1: {missing}")),
        ("rules:".into(), format!("line 1: {missing}")),
        ("rules: null".into(), format!("line 1: {missing}")),
        (
            "rules: 203.0.113.0/24".into(),
            "line 1: rules: invalid type: string \"203.0.113.0/24\", expected a list".into(),
        ),
        (
            "rules: []\nmodel: shared".into(),
            "line 2: unknown field `model`, expected `rules` or `rollout`".into(),
        ),
        (
            "rules:\n- cidr: 203.0.113.0/24\n- cidr: 203.0.0.0/8".into(),
            "line 3: rule 2: 203.0.0.0/8 is wider than /16, the widest that this host lets the fleet open (`widest`)"
                .into(),
        ),
        (
            "rules:\n- cidr: ::/0".into(),
            "line 2: rule 1: ::/0 is wider than /48, the widest that this host lets the fleet open (`widest`)".into(),
        ),
        (
            "rules:\n- cidr: 192.0.2.0/24".into(),
            "line 2: rule 1: 192.0.2.0/24 is not inside 203.0.0.0/8, 198.51.100.0/24, 2001:db8::/32, to which this host \
             limits the fleet (`within`)"
                .into(),
        ),
        (
            "rules:\n- cidr: 198.51.0.0/16".into(),
            "line 2: rule 1: 198.51.0.0/16 is not inside 203.0.0.0/8, 198.51.100.0/24, 2001:db8::/32, to which this host \
             limits the fleet (`within`)"
                .into(),
        ),
        (
            "rules:\n- region: cloud".into(),
            "line 2: rule 1: region cloud is not among those that this host lets the fleet name (`regions`): office"
                .into(),
        ),
        (
            "rules:\n- region: moon".into(),
            "line 2: rule 1: no region \"moon\" is defined; there are cloud, office, osc-fr1, osc-secnum-fr1".into(),
        ),
        (
            "rules:\n- cidr: 203.0.113.1/24".into(),
            "line 2: rule 1: 203.0.113.1/24 has host bits set: the network is 203.0.113.0/24".into(),
        ),
        (
            "rules:\n- cidr: 203.0.113.1".into(),
            "line 2: rule 1: 203.0.113.1 has no prefix length: for this one address write 203.0.113.1/32".into(),
        ),
        (
            "rules:\n- cidr: '::ffff:203.0.113.0/120'".into(),
            "line 2: rule 1: ::ffff:203.0.113.0/120 is IPv4, which arrives as such: write 203.0.113.0/24".into(),
        ),
        (
            "rules:\n- {cidr: 203.0.113.0/24, except: [203.0.113.0/24]}".into(),
            "line 2: rule 1: nothing is left of 203.0.113.0/24".into(),
        ),
        // To look at thousands takes minutes.
        (
            format!("rules:\n- {{cidr: 203.0.113.0/24, except: [{}]}}", "wrong, ".repeat(200)),
            "line 2: rule 1: 200 exceptions; at most 30".into(),
        ),
        (
            "rules:\n- {cidr: 203.0.113.0/24}\n- {cidr: 203.0.113.0/24}".into(),
            "line 3: rule 2: 203.0.113.0/24 is allowed by rule 1 already".into(),
        ),
        (
            "rules:\n- {cidr: 203.0.113.0/24, ports: [1]}".into(),
            "line 2: rule 1: unknown field `ports`, expected one of `cidr`, `region`, `except`, `label`, `expires`".into(),
        ),
        (
            "rules:\n- {cidr: 203.0.113.0/24, expires: tomorrow}\n- {cidr: 203.0.113.0/33}".into(),
            "line 2: rule 1: expires: \"tomorrow\" is not a valid time, such as 2026-12-31T18:00:00Z (and 1 more)".into(),
        ),
        (
            rules(29),
            "line 2: 29 rules, and 2 of this host's policy; together at most 30".into(),
        ),
        ("rules: []\n---\nrules: []\n".into(), "deserializing from YAML containing more than one document is not supported".into()),
        ("rules: []\nrules: []\n".into(), "line 2: duplicate field `rules`".into()),
        ("rules: []\n1: []\n".into(), "line 2: unknown field `1`, expected `rules` or `rollout`".into()),
        ("rules: !fast []\n".into(), "line 1: rules: tags are not allowed".into()),
        (rollout("on: [db7]"), "line 3: rollout: missing field `until`".into()),
        (
            rollout("on: []\n  until: 2026-11-25T23:00:00Z\n  rules: []"),
            "line 3: rollout: no hosts in `on`".into(),
        ),
        (
            rollout("on: [db7]\n  until: soon\n  rules: []"),
            "line 4: rollout: until: \"soon\" is not a valid time, such as 2026-12-31T18:00:00Z".into(),
        ),
        (rollout(on), format!("line 3: rollout: {missing}")),
        (
            rollout(&format!("{on}\n  rules:\n  - cidr: 0.0.0.0/0")),
            "line 6: rule 1: 0.0.0.0/0 is wider than /16, the widest that this host lets the fleet open (`widest`)".into(),
        ),
        (
            rollout(&format!("{on}\n  {}", rules(29).replace('\n', "\n  "))),
            "line 6: 29 rules, and 2 of this host's policy; together at most 30".into(),
        ),
        (
            rollout("on: [a/b]\n  until: 2026-11-25T23:00:00Z\n  rules: []"),
            "line 3: rollout: \"a/b\" is not a valid name of a host in the fleet: 1 to 63 letters, digits, dots, hyphens \
             and underscores, of which the first is a letter or a digit"
                .into(),
        ),
        (
            format!("rules: {}", "[".repeat(2_000)),
            "line 1: more than 1000 brackets are open".into(),
        ),
        ("rules: []\0".into(), "line 1: the character U+0000 is not allowed".into()),
        (
            format!("rules: []\n#{}", "x".repeat(MAX_DOCUMENT)),
            "it has 65547 bytes; at most 65536".into(),
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(read(&text), Err(expected), "{text}");
    }
    assert_eq!(
        read(b"rules: []\n# caf\xe9\n").unwrap_err(),
        "line 2: it is not UTF-8"
    );
    let (policy, _) = parse(POLICY).unwrap();
    assert_eq!(
        parse_document(b"rules: []", &policy.databases[1], &policy).unwrap_err(),
        "the database is not one of the fleet's"
    );
}

#[test]
fn errors_are_one_short_line_that_no_terminal_obeys() {
    let keys = ["\\e[2J\\n", "\\u202e", &"x".repeat(1_000), "://u:secret@h/"];
    for key in keys {
        let error = read(format!("\"{key}\": 1")).unwrap_err();
        assert!(error.contains("unknown field"), "{error}");
        assert!(!error.contains(is_control), "{error:?}");
        assert!(!error.contains("secret"), "{error}");
        assert!(error.chars().count() <= MAX_ERROR + 20);
    }
}

/// Aliases of a text, and of lists of aliases: 64 KiB that stand for gigabytes.
#[test]
fn aliases_stand_for_no_more_than_a_document_may_hold() {
    let most = "its aliases stand for more than a document may hold";
    let many = format!(
        "rules: [&a {}, {}*a]",
        "x".repeat(30_000),
        "*a, ".repeat(8_000)
    );
    let mut laughs = "rules: []\na0: &a0 [xxxxxxxxx, xxxxxxxxx]\n".to_owned();
    for i in 1..1_000 {
        laughs.push_str(&format!(
            "a{i}: &a{i} [{}]\n",
            vec![format!("*a{}", i - 1); 7].join(", ")
        ));
    }
    laughs.truncate(MAX_DOCUMENT);
    for text in [many, laughs] {
        assert!(
            (60_000..=MAX_DOCUMENT).contains(&text.len()),
            "{}",
            text.len()
        );
        let error = read(text).unwrap_err();
        assert!(error.contains(most), "{error}");
    }
    // Those of a usual size are fine.
    let text = "rules: [{cidr: 203.0.113.0/24, label: &a 'the office in Lyon'}, {region: office, label: *a}]";
    assert_eq!(
        read(text).unwrap().rules[1].label.as_deref(),
        Some("the office in Lyon")
    );
}

/// As many nodes, levels and escapes as fit.
#[test]
fn longest_documents_are_read_or_refused_for_what_they_say() {
    let fill = |text: &str, part: &str, end: &str| {
        let count = (MAX_DOCUMENT - text.len() - end.len()) / part.len();
        format!("{text}{}{end}", part.repeat(count))
    };
    let cases = [
        (
            fill("rules: [", "1,", "]"),
            "32763 rules, and 2 of this host's policy",
        ),
        (fill("rules:\n", "- ", ""), "recursion limit"),
        (fill("", "? ", ""), "expected the name of a field"),
        (fill("rules: [{label: \"", "\\L", "\"}]"), "rule 1: "),
        (fill("rules: []\n", "#\n", ""), ""),
        (fill("rules: []\n", "&a ", ""), "line "),
        (fill("rules: []\n", "%", ""), "line "),
    ];
    for (text, expected) in cases {
        let error = read(&text).err().unwrap_or_default();
        assert!(error.contains(expected), "{}...: {error}", &text[..20]);
    }
}

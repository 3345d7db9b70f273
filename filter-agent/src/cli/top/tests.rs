//! The view on screens that are no terminal.

use std::time::{Duration, Instant};

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use jiff::Timestamp;
use ratatui::{Terminal, backend::TestBackend};
use serde_json::{Value, json};

use super::{
    draw::draw,
    keys::Action,
    state::{Look, Mode, Pane, State, Wanted},
    text,
};

const NOW: &str = "2026-11-26T20:14:07Z";
const SECOND: Duration = Duration::from_secs(1);

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

fn ago(seconds: i64) -> Timestamp {
    now() - jiff::SignedDuration::from_secs(seconds)
}

fn database(name: &str, passed: u64, dropped: u64) -> Value {
    json!({
        "name": name, "ports": ["tcp/5432"], "addresses": [], "model": "dedicated", "monitor": false,
        "rules": 3, "temporary": 1, "blocks": 0, "suspended": 0, "prefixes": 12, "passed": passed,
        "dropped": {"not-allowed": dropped}, "would_drop": {}, "force_tls": false, "monitor_tls": false,
        "connections": {}, "monitored_connections": {},
    })
}

fn region(name: &str, error: Option<&str>) -> Value {
    json!({
        "name": name, "source": "dns egress.test", "used": true, "prefixes": ["192.0.2.0/24"], "retiring": [],
        "confirmed": ago(180), "next": ago(-49), "failing": error.is_some(),
        "error": error.map(|text| json!({"at": ago(20), "text": text})), "change": null,
    })
}

fn status(passed: u64, dropped: u64) -> Value {
    json!({
        "version": "0.1.0", "pid": 1796, "started": ago(3 * 3600),
        "policy": {"file": "/etc/filter-agent/policy.yaml", "accepted": ago(60), "compiled_ms": 1.0,
            "enforced_ms": 2.0, "next_expiry": null},
        "interfaces": [{"name": "eth0", "mode": "native", "program_id": 7}], "repairs": 0,
        "databases": [database("orders", passed, dropped), database("stock", 7, 0)],
        "unattributed": {}, "unattributed_would_drop": {},
        "regions": [region("osc-fr1", None), region("office", Some("look up office.test: no addresses"))],
        "verified": {"at": ago(12), "probes": 4, "errors": []},
        "warnings": [], "not_enforced": [], "errors": [],
    })
}

fn rule(database: &str, source: &str, hits: u64) -> Value {
    json!({
        "database": database, "number": 1, "source": source, "label": "office gateway", "expires": null,
        "expired": false, "prefixes": 1, "hits": hits, "origin": "file",
    })
}

fn drop_of(database: &str, source: &str, packets: u64, seen: i64) -> Value {
    json!({
        "database": database, "source": source, "reason": "not-allowed", "monitor": false,
        "packets": packets, "last_seen": ago(seen),
    })
}

fn look(status: Value, rules: Vec<Value>, sources: Vec<Value>) -> Look {
    let drops = json!({"since": ago(3 * 3600), "sources": sources, "unsampled": []});
    Look {
        status: serde_json::from_value(status).unwrap(),
        rules: serde_json::from_value(rules.into()).unwrap(),
        drops: serde_json::from_value(drops).unwrap(),
    }
}

fn events(since: i64, events: &[(u64, &str)]) -> crate::report::Events {
    let events = events.iter().map(|(number, text)| {
        json!({"number": number, "at": ago(30), "level": "warning", "text": text, "fields": {}})
    });
    let events: Vec<Value> = events.collect();
    serde_json::from_value(json!({"since": ago(since), "events": events})).unwrap()
}

struct View {
    state: State,
    start: Instant,
}

impl View {
    /// Two looks, two seconds apart.
    fn new() -> Self {
        let start = Instant::now();
        let mut state = State::new(SECOND, start);
        let rules = |hits| {
            vec![
                rule("orders", "203.0.113.10/32", hits),
                rule("orders", "region osc-fr1", 90),
                rule("stock", "192.0.2.0/24", 7),
            ]
        };
        let sources = || {
            vec![
                drop_of("orders", "203.0.113.99", 900, 3600),
                drop_of("orders", "198.51.100.7", 4, 2),
                drop_of("stock", "198.51.100.8", 6, 5),
            ]
        };
        state.take_look(Ok(look(status(1000, 10), rules(80), sources())), start);
        let later = start + 2 * SECOND;
        state.take_look(Ok(look(status(1250, 11), rules(330), sources())), later);
        state.take_events(Ok(events(
            100,
            &[(1, "attached to eth0"), (2, "enforcing")],
        )));
        Self { state, start }
    }

    fn press(&mut self, key: KeyCode) -> Option<Action> {
        self.state
            .press(KeyEvent::new(key, KeyModifiers::NONE), now())
    }

    fn screen(&self, columns: u16, lines: u16) -> Vec<String> {
        self.screen_after(2 * SECOND, columns, lines)
    }

    fn screen_after(&self, after: Duration, columns: u16, lines: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
        let instant = self.start + after;
        terminal
            .draw(|frame| draw(frame, &self.state, true, now(), instant))
            .unwrap();
        let buffer = terminal.backend().buffer();
        buffer
            .content
            .chunks(columns.into())
            .map(|line| line.iter().map(|cell| cell.symbol()).collect())
            .collect()
    }
}

fn line<'a>(screen: &'a [String], words: &str) -> &'a str {
    let found = screen.iter().find(|line| line.contains(words));
    found.unwrap_or_else(|| panic!("no {words} in:\n{}", screen.join("\n")))
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn policy_that_is_tried_is_said_above_everything() {
    let mut view = View::new();
    let mut tried = status(1250, 11);
    tried["window"] = json!({
        "id": 7, "opened": ago(30), "until": ago(-90), "left": 90, "by": null,
    });
    view.state.take_look(
        Ok(look(tried, Vec::new(), Vec::new())),
        view.start + 3 * SECOND,
    );
    let screen = view.screen(80, 24);
    assert!(
        screen[1].starts_with("change 7 is tried until "),
        "{screen:?}"
    );
    assert!(screen[1].contains("1m 30s left"), "{screen:?}");
    assert!(screen[2].starts_with("enforced on "), "{screen:?}");
}

#[test]
fn all_panes_are_on_80_columns_and_24_lines() {
    let view = View::new();
    let screen = view.screen(80, 24);
    assert_eq!(
        screen[0].trim_end(),
        "filter-agent 0.1.0, pid 1796, up 3h                     all databases  20:14:07Z"
    );
    assert_eq!(
        screen[1].trim_end(),
        "enforced on eth0 native; verified by probe packets 12s ago"
    );
    assert_eq!(
        words(line(&screen, "DROPPED/S")),
        [
            "DATABASE",
            "PORTS",
            "RULES",
            "PASSED/S",
            "DROPPED/S",
            "PASSED",
            "DROPPED",
            "NOTE"
        ]
    );
    assert_eq!(
        words(line(&screen, "> orders")),
        [
            ">",
            "orders",
            "tcp/5432",
            "3",
            "125",
            "0.5",
            "1250",
            "11",
            "1",
            "temporary"
        ]
    );
    let stock = words(line(&screen, "  stock "));
    assert_eq!(stock[..5], ["stock", "tcp/5432", "3", "0", "0"]);
    // Of the last minute those with most packets, then the others.
    let refused = ["198.51.100.8", "198.51.100.7", "203.0.113.99"];
    let places = refused.map(|source| screen.iter().position(|line| line.contains(source)));
    assert!(places.is_sorted(), "{places:?}");
    assert_eq!(
        words(line(&screen, "198.51.100.7")),
        ["198.51.100.7", "orders", "not-allowed", "4", "2s"]
    );
    assert_eq!(
        words(line(&screen, "203.0.113.10/32")),
        [
            "203.0.113.10/32",
            "orders",
            "125",
            "330",
            "office",
            "gateway"
        ]
    );
    assert_eq!(
        words(line(&screen, "good")),
        ["osc-fr1", "1", "3m", "49s", "good"]
    );
    assert!(line(&screen, "FAILED").contains("look up office.test: no addresses"));
    assert_eq!(
        words(line(&screen, "enforcing")),
        ["20:13:37Z", "warning", "enforcing"]
    );
    assert!(line(&screen, "dedicated, 3 rules").starts_with("orders: tcp/5432, "));
    assert_eq!(screen[22].trim_end(), "not-allowed 11");
    assert!(screen[23].starts_with("q quit  ? help"));
}

#[test]
fn more_rows_are_on_120_columns_and_40_lines() {
    let mut view = View::new();
    let sources = (1..=30).map(|n| drop_of("orders", &format!("198.51.100.{n}"), n, 1));
    let drops = sources.collect();
    let later = view.start + 2 * SECOND;
    view.state
        .take_look(Ok(look(status(1, 1), vec![], drops)), later);
    let rows = |screen: &[String]| {
        let rows = screen.iter().filter(|line| line.contains("198.51.100."));
        rows.count()
    };
    let small = view.screen(80, 24);
    assert!(
        line(&small, "REFUSED SOURCE").ends_with(" 1-7 of 30"),
        "{}",
        small.join("\n")
    );
    assert_eq!(rows(&small), 7);
    let large = view.screen(120, 40);
    assert_eq!(rows(&large), 23);
    assert!(large.iter().all(|line| text::width(line) == 120));
    assert!(line(&large, "rule").contains("no rule"));
}

#[test]
fn errors_and_warnings_stand_above_all() {
    let mut view = View::new();
    let mut wrong = status(1, 1);
    wrong["errors"] = json!(["interface eth1 is missing on this host"]);
    wrong["warnings"] = json!(["one", "two", "three"]);
    let later = view.start + 2 * SECOND;
    view.state.take_look(Ok(look(wrong, vec![], vec![])), later);
    let screen = view.screen(80, 24);
    assert_eq!(
        screen[1].trim_end(),
        "error: interface eth1 is missing on this host"
    );
    assert_eq!(screen[2].trim_end(), "warning: one");
    assert_eq!(screen[3].trim_end(), ".. the rest: `filter-agent status`");
}

#[test]
fn nothing_is_known_before_the_first_answer() {
    let state = State::new(SECOND, Instant::now());
    let start = Instant::now();
    let mut view = View { state, start };
    let screen = view.screen_after(SECOND, 80, 24);
    assert_eq!(screen[1].trim_end(), "waiting for the agent");
    assert_eq!(
        screen
            .iter()
            .filter(|l| l.contains("not known yet"))
            .count(),
        5
    );
    let error = Err("no agent answers".to_owned());
    view.state.take_look(error, start + SECOND);
    let screen = view.screen_after(SECOND, 80, 24);
    assert_eq!(screen[1].trim_end(), "no answer yet: no agent answers");
}

#[test]
fn agent_that_goes_away_is_shown_with_what_was_known() {
    let mut view = View::new();
    let later = |seconds| view.start + 2 * SECOND + seconds * SECOND;
    // It hangs: no error yet.
    let screen = view.screen_after(14 * SECOND, 80, 24);
    assert_eq!(screen[1].trim_end(), "no answer since 12s");
    assert!(line(&screen, "> orders").contains("125"));
    let times = [later(12), later(20)];
    view.state
        .take_look(Err("no answer within 5s".into()), times[0]);
    let screen = view.screen_after(14 * SECOND, 80, 24);
    assert_eq!(
        screen[1].trim_end(),
        "no answer since 12s: no answer within 5s"
    );
    view.state
        .take_look(Ok(look(status(1350, 11), vec![], vec![])), times[1]);
    let screen = view.screen_after(22 * SECOND, 80, 24);
    assert!(screen[1].starts_with("enforced on eth0"), "{}", screen[1]);
    assert!(line(&screen, "> orders").contains("5.0"));
}

#[test]
fn lines_of_another_agent_take_the_place_of_the_first_ones() {
    let mut view = View::new();
    let texts = |view: &View| -> Vec<String> {
        view.state
            .events
            .iter()
            .map(|event| event.text.clone())
            .collect()
    };
    view.state.take_events(Ok(events(100, &[(3, "three")])));
    assert_eq!(texts(&view), ["attached to eth0", "enforcing", "three"]);
    view.state.take_events(Ok(events(50, &[(1, "again")])));
    assert_eq!(texts(&view), ["again"]);
    for number in 2..500 {
        view.state.take_events(Ok(events(50, &[(number, "more")])));
    }
    assert_eq!(view.state.events.len(), 200);
    view.state.take_events(Err("not found".into()));
    assert_eq!(view.state.events.len(), 200);
}

#[test]
fn chosen_source_is_asked_about_whatever_comes_meanwhile() {
    let mut view = View::new();
    assert_eq!(view.press(KeyCode::Char('a')), None);
    assert_eq!(view.state.focused, Pane::Refused);
    assert_eq!(view.state.mode, Mode::Normal);
    view.press(KeyCode::Down);
    assert!(line(&view.screen(80, 24), ">").contains("198.51.100.7 "));
    let sources = vec![
        drop_of("orders", "198.51.100.1", 99, 0),
        drop_of("orders", "198.51.100.2", 98, 0),
        drop_of("orders", "198.51.100.7", 5, 1),
    ];
    let later = view.start + 3 * SECOND;
    view.state
        .take_look(Ok(look(status(1, 1), vec![], sources)), later);
    assert!(line(&view.screen(80, 24), ">").contains("198.51.100.7 "));
    assert_eq!(view.press(KeyCode::Char('a')), None);
    let screen = view.screen(80, 24);
    line(&screen, "allow 198.51.100.7 to orders for 1 hour? [y/N]");
    let wanted = Wanted {
        database: "orders".into(),
        source: "198.51.100.7".parse().unwrap(),
    };
    view.state
        .take_look(Ok(look(status(1, 1), vec![], vec![])), later + SECOND);
    assert_eq!(
        view.press(KeyCode::Char('y')),
        Some(Action::Allow(wanted.clone()))
    );
    line(&view.screen(80, 24), "allowing 198.51.100.7 to orders ...");
    for other in [
        KeyCode::Enter,
        KeyCode::Char('n'),
        KeyCode::Char('q'),
        KeyCode::Esc,
    ] {
        view.state.mode = Mode::Question(wanted.clone());
        assert_eq!(view.press(other), None);
        assert_eq!(view.state.mode, Mode::Normal);
        line(&view.screen(80, 24), "198.51.100.7 was not allowed");
    }
    view.state.mode = Mode::Question(wanted);
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(view.state.press(control_c, now()), Some(Action::Quit));
}

#[test]
fn sources_that_a_rule_would_not_let_in_are_not_asked_about() {
    let mut view = View::new();
    view.state.focused = Pane::Refused;
    for (reason, why) in [
        ("blocked", "198.51.100.7 is blocked from orders"),
        (
            "bad-source",
            "dropped as bad-source, whatever the rules say",
        ),
    ] {
        let mut one = drop_of("orders", "198.51.100.7", 1, 1);
        one["reason"] = reason.into();
        let later = view.start + 3 * SECOND;
        view.state
            .take_look(Ok(look(status(1, 1), vec![], vec![one])), later);
        view.press(KeyCode::Char('a'));
        assert_eq!(view.state.mode, Mode::Normal);
        line(&view.screen(80, 24), why);
    }
    let mut unknown = drop_of("orders", "198.51.100.7", 1, 1);
    unknown["database"] = Value::Null;
    let later = view.start + 3 * SECOND;
    view.state
        .take_look(Ok(look(status(1, 1), vec![], vec![unknown])), later);
    view.press(KeyCode::Char('a'));
    line(
        &view.screen(80, 24),
        "which database 198.51.100.7 wanted is not known",
    );
}

#[test]
fn temporary_rule_for_a_refused_source_is_shown_beside_it() {
    let mut view = View::new();
    let mut temporary = rule("orders", "198.51.100.7/32", 0);
    temporary["origin"] = "temporary".into();
    temporary["left"] = 3599.into();
    let later = view.start + 3 * SECOND;
    let mut see = |rules: Vec<Value>| {
        let source = drop_of("orders", "198.51.100.7", 4, 2);
        view.state
            .take_look(Ok(look(status(1, 1), rules, vec![source])), later);
        let screen = view.screen(80, 24);
        line(&screen, "198.51.100.7  ").contains("allowed for 59m")
    };
    assert!(see(vec![temporary.clone()]));
    let mut block = temporary.clone();
    block["origin"] = "block".into();
    assert!(!see(vec![temporary.clone(), block]));
    let mut ended = temporary.clone();
    ended["expired"] = true.into();
    assert!(!see(vec![ended]));
    temporary["database"] = "stock".into();
    assert!(!see(vec![temporary]));
}

#[test]
fn one_database_can_be_shown_alone() {
    let mut view = View::new();
    let all = [
        "198.51.100.7 ",
        "198.51.100.8 ",
        "192.0.2.0/24",
        "osc-fr1  ",
    ];
    let shown = |view: &View| {
        let screen = view.screen(80, 24);
        all.map(|words| screen.iter().any(|line| line.contains(words)))
    };
    assert_eq!(shown(&view), [true; 4]);
    view.press(KeyCode::Char('d'));
    assert!(view.screen(80, 24)[0].contains("only orders"));
    assert_eq!(shown(&view), [true, false, false, true]);
    view.press(KeyCode::Char('d'));
    assert_eq!(shown(&view), [false, true, true, false]);
    view.press(KeyCode::Char('d'));
    assert_eq!(shown(&view), [true; 4]);
    view.press(KeyCode::Char('D'));
    assert!(view.screen(80, 24)[0].contains("only stock"));
    view.press(KeyCode::Esc);
    assert_eq!(shown(&view), [true; 4]);
    view.press(KeyCode::Down);
    view.press(KeyCode::Enter);
    assert!(view.screen(80, 24)[0].contains("only stock"));
    view.press(KeyCode::Enter);
    assert!(view.screen(80, 24)[0].contains("all databases"));
}

#[test]
fn panes_are_chosen_in_turn_and_help_lists_the_keys() {
    let mut view = View::new();
    for pane in [
        Pane::Refused,
        Pane::Rules,
        Pane::Regions,
        Pane::Events,
        Pane::Databases,
    ] {
        view.press(KeyCode::Tab);
        assert_eq!(view.state.focused, pane);
        assert_eq!(
            view.screen(80, 24)
                .iter()
                .filter(|l| l.starts_with('>'))
                .count(),
            1
        );
    }
    view.press(KeyCode::BackTab);
    assert_eq!(view.state.focused, Pane::Events);
    view.press(KeyCode::Char('?'));
    let screen = view.screen(80, 24);
    for key in ["q, Ctrl-C", "tab, arrows", "d, D", "a   ", "any other key"] {
        line(&screen, key);
    }
    assert!(!screen.concat().contains(".."), "{}", screen.join("\n"));
    assert_eq!(view.press(KeyCode::Char('x')), None);
    line(&view.screen(80, 24), "DROPPED/S");
    assert_eq!(view.press(KeyCode::Char('q')), Some(Action::Quit));
}

/// Control characters in every text of every report.
fn poisoned(value: &mut Value) {
    match value {
        // Values that are no free text.
        Value::String(text)
            if text.parse::<Timestamp>().is_err()
                && text.parse::<ipnet::IpNet>().is_err()
                && text.parse::<std::net::IpAddr>().is_err()
                && !["file", "temporary", "block"].contains(&&**text) =>
        {
            *text = format!("\u{1b}[2J\u{1b}]0;evil\u{7}\u{9b}31m\r\n\t\u{202e}東京\u{301}{text}");
        }
        Value::Array(values) => values.iter_mut().for_each(poisoned),
        Value::Object(fields) => fields.values_mut().for_each(poisoned),
        _ => {}
    }
}

#[test]
fn no_text_of_a_report_reaches_the_terminal_as_an_escape_sequence() {
    let mut all = json!({
        "status": status(1, 1),
        "rules": [rule("orders", "region osc-fr1", 1)],
        "sources": [drop_of("orders", "198.51.100.7", 1, 1)],
    });
    all["status"]["errors"] = json!(["error"]);
    poisoned(&mut all);
    let list = |name: &str| all[name].as_array().unwrap().clone();
    let start = Instant::now();
    let mut view = View {
        state: State::new(SECOND, start),
        start,
    };
    let look = look(all["status"].clone(), list("rules"), list("sources"));
    view.state.take_look(Ok(look), start + 2 * SECOND);
    let mut lines = events(100, &[(1, "\u{1b}[31mevil\u{7}"), (2, "\u{1b}c")]);
    lines.events[0].level = "\u{1b}[1m".into();
    view.state.take_events(Ok(lines));
    let wanted = Wanted {
        database: "\u{1b}[2J".into(),
        source: "198.51.100.7".parse().unwrap(),
    };
    let mut seen = false;
    for columns in [60, 80, 120] {
        for focus in 0..5 {
            let mut check = |view: &View| {
                for line in view.screen(columns, 24) {
                    assert!(!line.contains(char::is_control), "{line:?}");
                    assert!(!line.contains(['\u{202e}', '\u{301}']), "{line:?}");
                    seen |= line.contains(r"\u{1b}]0;evil");
                }
            };
            check(&view);
            view.state.message = vec!["error: \u{1b}[31m".into()];
            check(&view);
            view.state.message.clear();
            view.state.mode = Mode::Question(wanted.clone());
            check(&view);
            view.state.mode = Mode::Normal;
            view.state.database = Some("\u{1b}[2J".into());
            check(&view);
            view.state.database = None;
            let error = Err("\u{1b}[31mevil".to_owned());
            view.state.take_events(error);
            view.press(KeyCode::Tab);
            assert_eq!(view.state.focused as usize, (focus + 1) % 5);
        }
    }
    assert!(seen, "nothing of it was on the screen");
    view.state
        .take_look(Err("\u{1b}[31mevil".into()), start + SECOND);
    let screen = view.screen(80, 24);
    assert!(screen[1].contains(r": \u{1b}[31mevil"), "{}", screen[1]);
}

#[test]
fn question_is_shown_whole_on_the_smallest_screen() {
    let mut view = View::new();
    view.state.mode = Mode::Question(Wanted {
        database: "a-database-whose-name-is-as-long-as-names-of-databases-may-be".into(),
        source: "2001:db8:1111:2222:3333:4444:5555:6666".parse().unwrap(),
    });
    let screen = view.screen(60, 16);
    let text: Vec<&str> = screen.iter().flat_map(|line| words(line)).collect();
    let text = text.join(" ");
    let question = "allow 2001:db8:1111:2222:3333:4444:5555:6666 to \
                    a-database-whose-name-is-as-long-as-names-of-databases-may-be for 1 hour? [y/N]";
    assert!(
        text.replace(' ', "").contains(&question.replace(' ', "")),
        "{text}"
    );
}

#[test]
fn every_size_is_drawn() {
    let mut view = View::new();
    for columns in [1, 2, 5, 20, 59, 60, 61, 79, 80, 81, 200, 500] {
        for lines in [1, 2, 5, 15, 16, 17, 24, 25, 100] {
            for mode in [Mode::Normal, Mode::Help] {
                view.state.mode = mode;
                view.state.message = vec!["long ".repeat(lines.into()); 20];
                assert_eq!(view.screen(columns, lines).len(), usize::from(lines));
            }
        }
    }
    let screen = view.screen(80, 24);
    assert!(screen[22].trim_end().ends_with(" .."), "{}", screen[22]);
    view.state.mode = Mode::Normal;
    let screen = view.screen(59, 20);
    assert!(screen[0].starts_with("at least 60x16 characters are needed"));
}

use std::collections::BTreeMap;

use super::*;
use crate::{clock::Clock, compile::compile};

fn file(interfaces: &str, databases: &str) -> Arc<PolicyFile> {
    let text = format!("interfaces: [{interfaces}]\ndatabases: [{databases}]\n");
    Arc::new(PolicyFile::parse("/etc/policy.yaml".as_ref(), text).unwrap())
}

const ORDERS: &str = "{name: orders, port: 5432, model: dedicated, force_tls: false, rules: []}";

fn desired(file: &Arc<PolicyFile>) -> Desired {
    let timed = Timed::of(&file.policy, Clock::start().now());
    let compiled = compile(&file.policy, &BTreeMap::new(), &timed);
    Desired {
        accepted: file.accepted,
        file: file.clone(),
        timed: Arc::new(timed),
        compiled: Arc::new(compiled),
        compiled_ms: 0.0,
    }
}

fn interface(index: u32, name: &str) -> Interface {
    Interface {
        index,
        name: name.into(),
        hardware_address: Some(format!("02:00:00:00:00:{index:02x}")),
        ethernet: true,
        up: true,
        ..Interface::default()
    }
}

fn pinned(index: u32) -> Pinned {
    Pinned {
        interface: index,
        program_id: 1,
    }
}

/// Prepares a change where the interfaces named in `bad` cannot be filtered.
fn prepare_with(
    new: &Arc<PolicyFile>,
    occasion: &Occasion,
    facts: &Facts<'_>,
    bad: &[&str],
) -> Result<Plan> {
    prepare(
        desired(new),
        occasion,
        facts,
        |interface, _| {
            ensure!(
                !bad.contains(&interface.name.as_str()),
                "another program runs"
            );
            Ok(())
        },
        |_| Ok(Planned::default()),
    )
}

const RELOAD: Occasion = Occasion::Reload {
    allow_unprotect: false,
    max_cut: None,
    caller: None,
    is_tried: false,
};

#[test]
fn reload_that_lists_what_never_was_there_is_refused_and_a_start_is_not() {
    let (old, new) = (file("eth0", ORDERS), file("eth0, eth9", ORDERS));
    let remembered = Remembered::default();
    let host = [interface(2, "eth0")];
    let facts = Facts {
        before: Some(&old.policy),
        remembered: &remembered,
        host: &host,
        settings: Settings::read,
        pinned: &[pinned(2)],
        program_id: 1,
    };
    let refused = prepare_with(&new, &RELOAD, &facts, &[]).unwrap_err();
    let expected = "interface eth9 is missing on this host, which has eth0";
    assert_eq!(refused.to_string(), expected);
    // One that was listed before may be away.
    let both = Facts {
        before: Some(&new.policy),
        ..facts
    };
    prepare_with(&new, &RELOAD, &both, &[]).unwrap();
    let start = Occasion::Start { before: None };
    let facts = Facts {
        before: None,
        remembered: &remembered,
        host: &host,
        settings: Settings::read,
        pinned: &[],
        program_id: 1,
    };
    let plan = prepare_with(&new, &start, &facts, &[]).unwrap();
    assert_eq!(plan.report.attached, ["eth0"]);
    let missing = "interface eth9 is missing; it is filtered as soon as it is there";
    assert!(plan.report.warnings.iter().any(|w| w == missing));
}

#[test]
fn nothing_is_detached_while_an_entry_has_no_interface() {
    let old = file("eth0, eth1", ORDERS);
    let remembered = Remembered::default();
    let host = [interface(2, "eth0"), interface(3, "eth1")];
    let facts = Facts {
        before: Some(&old.policy),
        remembered: &remembered,
        host: &host,
        settings: Settings::read,
        pinned: &[pinned(2), pinned(3)],
        program_id: 1,
    };
    let allow = Occasion::Reload {
        allow_unprotect: true,
        max_cut: None,
        caller: None,
        is_tried: false,
    };
    let plan = prepare_with(&file("eth0", ORDERS), &allow, &facts, &[]).unwrap();
    assert_eq!(plan.report.detached, ["eth1"]);
    assert_eq!(plan.unguarded, ["interface eth1"]);
    let refused = prepare_with(&file("eth0", ORDERS), &RELOAD, &facts, &[]);
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("--allow-unprotect")
    );
    let start = Occasion::Start {
        before: Some(old.policy.clone()),
    };
    let plan = prepare_with(&file("eth0, default", ORDERS), &start, &facts, &[]).unwrap();
    assert_eq!(plan.report.detached, [""; 0]);
    assert!(
        plan.report
            .warnings
            .iter()
            .any(|w| w.contains("eth1 stays filtered"))
    );
}

#[test]
fn listed_interface_that_cannot_be_filtered_refuses_the_change() {
    let file = file("eth0, eth1", ORDERS);
    let remembered = Remembered::default();
    let host = [interface(2, "eth0"), interface(3, "eth1")];
    let facts = Facts {
        before: None,
        remembered: &remembered,
        host: &host,
        settings: Settings::read,
        pinned: &[],
        program_id: 1,
    };
    let start = Occasion::Start { before: None };
    let refused = prepare_with(&file, &start, &facts, &["eth1"]).unwrap_err();
    assert_eq!(refused.to_string(), "another program runs");
}

#[test]
fn interface_that_only_memory_lists_refuses_nothing() {
    let listed = file("default", ORDERS);
    let mut remembered = Remembered::default();
    let mut host = [interface(2, "eth0"), interface(3, "eth1")];
    host[0].default_route = true;
    remembered.update(&listed.policy, &host, |_| true);
    // The route moves, and somebody else's program runs where it was.
    host[0].default_route = false;
    host[1].default_route = true;
    let facts = Facts {
        before: Some(&listed.policy),
        remembered: &remembered,
        host: &host,
        settings: Settings::read,
        pinned: &[pinned(2)],
        program_id: 1,
    };
    let plan = prepare_with(&listed, &RELOAD, &facts, &["eth0"]).unwrap();
    let warning = "eth0 is not filtered: another program runs";
    assert!(plan.report.warnings.iter().any(|w| w == warning));
    assert_eq!(plan.report.attached, ["eth1"]);
    assert_eq!(plan.report.detached, [""; 0]);
}

#[test]
fn change_of_regions_looks_at_no_interface() {
    let file = file("eth0", ORDERS);
    let remembered = Remembered::default();
    let facts = Facts {
        before: Some(&file.policy),
        remembered: &remembered,
        host: &[],
        settings: Settings::read,
        pinned: &[],
        program_id: 1,
    };
    let plan = prepare_with(&file, &Occasion::Change { caller: None }, &facts, &[]).unwrap();
    assert!(plan.attach.is_empty() && plan.detach.is_empty());
    assert_eq!(plan.report.warnings, [""; 0]);
}

#[test]
fn refusal_says_that_nothing_is_changed_only_where_that_is_so() {
    let refused = |error: anyhow::Error| format!("{:#}", Refused::from(error).describe("reload"));
    let error = || anyhow::anyhow!("no memory");
    assert_eq!(
        refused(error()),
        "reload refused, nothing is changed: no memory"
    );
    let mixed = refused(error().context(NotTakenBack).context("attach"));
    assert!(
        mixed.starts_with("reload failed half way, and the agent tries to take back the rest: "),
        "{mixed}"
    );
    let unknown = refused(error().context(Unknown));
    assert!(
        unknown.starts_with("reload failed half way, and the agent ends; the next one goes on"),
        "{unknown}"
    );
}

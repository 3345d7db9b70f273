//! Policies that are tried until somebody confirms them, and rollbacks.

use super::*;
use crate::{
    event::ReloadOptions,
    history,
    temporary::{Change, Wanted as Temporary},
    window,
};

type Decided = oneshot::Receiver<Result<report::Decided>>;

const TWO_MINUTES: ReloadOptions = ReloadOptions {
    confirm: Some(Duration::from_secs(120)),
    if_hash: None,
    existing: false,
    allow_unprotect: false,
    max_cut: None,
    caller: None,
    by: None,
};

impl World {
    fn text_number(&mut self, number: u8) -> String {
        self.text = policy(number, "");
        self.text.clone()
    }

    /// Tries the policy of a number for two minutes. Returns the id of the change.
    fn try_policy(&mut self, number: u8) -> u64 {
        self.text_number(number);
        let mut answer = self.reload_with(TWO_MINUTES);
        self.settle(OFFICE);
        let reloaded = answer.try_recv().unwrap().unwrap();
        let window = reloaded.window.unwrap();
        assert_eq!((window.id, window.left), (reloaded.id, 120));
        assert_eq!(self.kernel.0, self.text);
        reloaded.id
    }

    fn confirm(&mut self, id: Option<u64>, fall_back: bool) -> Decided {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Request(Request::Confirm {
            id,
            fall_back,
            by: None,
            reply: Reply(reply),
        }));
        answer
    }

    fn roll_back(&mut self, to: Option<u64>) -> oneshot::Receiver<Result<report::Reloaded>> {
        let (reply, answer) = oneshot::channel();
        let (reply, options) = (Reply(reply), ReloadOptions::default());
        self.send(Event::Request(Request::Rollback { to, options, reply }));
        answer
    }

    fn allow(&mut self, source: &str) {
        let (reply, mut answer) = oneshot::channel();
        let change = Change::Allow(Temporary {
            database: "orders".into(),
            source: source.into(),
            seconds: 3600,
            label: None,
        });
        self.send(Event::Request(Request::Temporary {
            change,
            condition: None,
            caller: None,
            by: None,
            reply: Reply(reply),
        }));
        self.settle(OFFICE);
        answer.try_recv().unwrap().unwrap();
    }

    fn temporary(&self) -> Vec<String> {
        let rules = self.agent.timed.temporary.iter();
        rules.map(|rule| rule.source.to_string()).collect()
    }

    fn confirmed_on_disk(&self) -> String {
        match self.disk.get(&Record::Confirmed) {
            Some(Write::Confirmed(Some(confirmed))) => confirmed.policy.clone(),
            other => panic!("{other:?}"),
        }
    }

    fn window_on_disk(&self) -> window::Kept {
        match self.disk.get(&Record::Window) {
            Some(Write::Window(kept)) => (**kept).clone(),
            None => window::Kept::default(),
            other => panic!("{other:?}"),
        }
    }

    fn has_abandoned(&self, text: &str) -> bool {
        let hash = crate::policy_file::hash(text);
        self.window_on_disk().abandoned.find(&hash).is_some()
    }

    fn errors(&self) -> Vec<String> {
        self.agent.snapshot().errors
    }

    fn state(&self, id: u64) -> Option<history::State> {
        self.agent.history.state(id)
    }

    /// Carries out one effect of a kind.
    fn perform_the(&mut self, is_meant: impl Fn(&Effect) -> bool, fail: bool) {
        let place = self.find(is_meant).expect("there is such an effect");
        self.perform(place, OFFICE, fail, false);
    }
}

fn is_window(effect: &Effect) -> bool {
    matches!(effect, Effect::Save(write) if write.record() == Record::Window)
}

fn is_confirmed(effect: &Effect) -> bool {
    matches!(effect, Effect::Save(write) if write.record() == Record::Confirmed)
}

#[test]
fn window_is_on_disk_before_the_policy_is_enforced_and_the_confirmed_policy_stays_there() {
    let mut world = settled();
    let before = world.text.clone();
    let tried = world.text_number(2);
    let mut answer = world.reload_with(TWO_MINUTES);
    let mut saved = false;
    while let Some(place) = world.find(|_| true) {
        if is_window(&world.effects[place]) {
            assert_eq!(world.kernel.0, before);
            saved = true;
        }
        assert!(saved || !is_commit(&world.effects[place]));
        world.perform(place, OFFICE, false, false);
    }
    assert!(answer.try_recv().unwrap().is_ok());
    assert_eq!(world.kernel.0, tried);
    assert_eq!(world.window_on_disk().open.unwrap().policy, tried);
    assert_eq!(world.confirmed_on_disk(), before);
    // Checks do not confirm it.
    world.send(Event::Checked(checked()));
    world.settle(OFFICE);
    assert_eq!(world.confirmed_on_disk(), before);
}

#[test]
fn disk_that_does_not_take_a_window_refuses_the_reload() {
    let mut world = settled();
    let before = world.text.clone();
    world.text_number(2);
    let mut answer = world.reload_with(TWO_MINUTES);
    while let Some(place) = world.find(|effect| !is_window(effect)) {
        world.perform(place, OFFICE, false, false);
    }
    world.perform_the(is_window, true);
    world.settle(OFFICE);
    let text = error(&mut answer);
    assert!(
        text.contains("nothing is changed") && text.contains("full"),
        "{text}"
    );
    assert_eq!(world.kernel.0, before);
    assert_eq!(world.window_on_disk(), window::Kept::default());
    // One that hangs.
    let mut answer = world.reload_with(TWO_MINUTES);
    while let Some(place) = world.find(|effect| !is_window(effect)) {
        world.perform(place, OFFICE, false, false);
    }
    world.pass(4);
    assert!(answer.try_recv().is_err());
    // Others are not held up.
    assert!(world.agent.under_way.is_none());
    world.pass(1);
    let text = error(&mut answer);
    assert!(text.contains("the disk takes too long"), "{text}");
    world.settle(OFFICE);
    assert_eq!(world.kernel.0, before);
    assert_eq!(world.window_on_disk(), window::Kept::default());
    world.try_policy(2);
}

#[test]
fn refused_reload_leaves_no_window() {
    let mut world = settled();
    world.text_number(2);
    let mut answer = world.reload_with(TWO_MINUTES);
    while let Some(place) = world.find(|effect| !is_commit(effect)) {
        world.perform(place, OFFICE, false, false);
    }
    assert!(world.window_on_disk().open.is_some());
    world.perform_the(is_commit, true);
    world.settle(OFFICE);
    assert!(error(&mut answer).contains("nothing is changed"));
    assert_eq!(world.window_on_disk(), window::Kept::default());
    assert!(world.errors().is_empty());
}

#[test]
fn policy_that_nobody_confirms_falls_back_at_its_end_whatever_the_clock_says() {
    for clock in [-86_400, 0, 86_400] {
        let mut world = settled();
        let before = world.text.clone();
        let id = world.try_policy(2);
        let tried = world.text.clone();
        assert_eq!(world.state(id), Some(history::State::Trying));
        world.now.wall += jiff::SignedDuration::from_secs(clock);
        world.pass(119);
        world.settle(OFFICE);
        assert_eq!(world.kernel.0, tried);
        assert!(world.agent.until_tick(world.now) <= Duration::from_secs(1));
        world.pass(1);
        world.settle(OFFICE);
        assert_eq!(world.kernel.0, before);
        assert_eq!(world.confirmed_on_disk(), before);
        assert!(world.window_on_disk().open.is_none());
        assert!(world.has_abandoned(&tried));
        assert_eq!(world.state(id), Some(history::State::FellBack));
        assert_eq!(world.resets, 0);
        assert!(world.errors()[0].contains("nobody confirmed it in time"));
        let text = error(&mut world.confirm(Some(id), false));
        assert!(
            text.contains(&format!("change {id} fell back at")),
            "{text}"
        );
        let text = error(&mut world.confirm(None, false));
        assert!(
            text.contains(&format!("change {id} fell back at")),
            "{text}"
        );
    }
}

#[test]
fn confirmed_policy_is_on_disk_before_anything_is_reset() {
    let mut world = settled();
    let before = world.text.clone();
    let id = world.try_policy(2);
    let mut answer = world.confirm(None, false);
    assert_eq!(world.resets, 0);
    assert!(answer.try_recv().is_err());
    // A full disk: it is still tried.
    world.perform_the(is_confirmed, true);
    let text = error(&mut answer);
    assert!(
        text.contains("not confirmed") && text.contains("full"),
        "{text}"
    );
    world.settle(OFFICE);
    assert_eq!(world.confirmed_on_disk(), before);
    assert_eq!(world.agent.window().unwrap().id, id);
    let mut answer = world.confirm(Some(id), false);
    let text = error(&mut world.confirm(Some(id), false));
    assert!(text.contains("being confirmed already"), "{text}");
    world.settle(OFFICE);
    let decided = answer.try_recv().unwrap().unwrap();
    assert!(decided.confirmed && decided.id == id);
    assert_eq!(world.resets, 1);
    assert_eq!(world.confirmed_on_disk(), world.text);
    assert!(world.window_on_disk().is_empty());
    assert_eq!(world.state(id), Some(history::State::Confirmed));
    world.pass(600);
    world.settle(OFFICE);
    assert_eq!(world.kernel.0, world.text);
    assert!(world.errors().is_empty());
    let text = error(&mut world.confirm(Some(id), false));
    assert!(text.contains("needs no `confirm`"), "{text}");
}

#[test]
fn confirmation_that_the_disk_does_not_take_until_the_end_falls_back() {
    let mut world = settled();
    let before = world.text.clone();
    world.try_policy(2);
    let mut answer = world.confirm(None, false);
    world.pass(120);
    let text = error(&mut answer);
    assert!(text.contains("the agent falls back"), "{text}");
    world.settle(OFFICE);
    assert_eq!(world.kernel.0, before);
    assert_eq!(world.confirmed_on_disk(), before);
}

#[test]
fn while_a_policy_is_tried_reloads_wait_for_its_end_and_other_changes_go_on() {
    let mut world = settled();
    let before = world.text.clone();
    world.allow("203.0.113.1");
    let id = world.try_policy(2);
    let tried = world.text_number(2);
    world.text_number(3);
    for mut answer in [
        world.reload(),
        world.reload_with(TWO_MINUTES),
        world.roll_back(None),
    ] {
        let text = error(&mut answer);
        let expected = [
            format!("change {id} is tried until"),
            "left".into(),
            format!("`filter-agent confirm {id}`"),
        ];
        assert!(expected.iter().all(|part| text.contains(part)), "{text}");
    }
    world.send(Event::Hangup);
    world.settle(OFFICE);
    assert_eq!(world.kernel.0, tried);
    let text = error(&mut world.confirm(Some(id + 1), false));
    assert!(
        text.contains(&format!("change {} is not tried", id + 1)),
        "{text}"
    );
    world.allow("203.0.113.2");
    world.send(Event::FileChanged("/etc/office.txt".into()));
    world.settle("192.0.2.99/32");
    assert_eq!(world.allowed("office"), ["192.0.2.99/32"]);
    let mut answer = world.confirm(Some(id), true);
    world.settle("192.0.2.99/32");
    let decided = answer.try_recv().unwrap().unwrap();
    assert!(!decided.confirmed);
    assert_eq!(world.kernel.0, before);
    assert_eq!(world.allowed("office"), ["192.0.2.99/32"]);
    assert_eq!(world.temporary(), ["203.0.113.1/32", "203.0.113.2/32"]);
    let text = error(&mut world.confirm(Some(id), false));
    assert!(text.contains("was taken back"), "{text}");
}

#[test]
fn falling_back_that_the_kernel_refuses_is_tried_again() {
    let mut world = settled();
    let before = world.text.clone();
    world.try_policy(2);
    let tried = world.text.clone();
    world.pass(120);
    world.perform_the(is_commit, true);
    assert_eq!(world.kernel.0, tried);
    assert!(world.errors()[0].contains("fall back from change"));
    assert!(world.window_on_disk().open.is_some());
    let text = error(&mut world.confirm(None, false));
    assert!(text.contains("is over"), "{text}");
    world.pass(9);
    world.settle(OFFICE);
    assert_eq!(world.kernel.0, tried);
    world.pass(1);
    world.settle(OFFICE);
    assert_eq!(world.kernel.0, before);
    assert!(world.has_abandoned(&tried));

    // Another policy is a way out.
    world.try_policy(3);
    world.pass(120);
    world.perform_the(is_commit, true);
    world.text_number(4);
    let mut answer = world.reload();
    world.settle(OFFICE);
    assert!(answer.try_recv().unwrap().is_ok());
    assert_eq!(world.kernel.0, world.text);
    assert_eq!(world.confirmed_on_disk(), world.text);
    assert!(world.has_abandoned(&policy(3, "")));
    assert!(world.errors().is_empty());
}

#[test]
fn regions_of_the_confirmed_policy_stay_on_disk_and_come_back_with_it() {
    let mut world = settled();
    assert_eq!(world.allowed("cloud"), ["198.51.100.7/32"]);
    let names = |world: &World| match world.disk.get(&Record::Regions) {
        Some(Write::Regions(names)) => names.clone(),
        other => panic!("{other:?}"),
    };
    // Without the region, then with another source of it.
    let without = policy(2, "").replace(", {region: cloud}", "");
    let other = policy(2, "").replace("egress.example.net", "other.example.net");
    for text in [without, other] {
        world.text = text;
        let mut answer = world.reload_with(TWO_MINUTES);
        world.settle(OFFICE);
        assert!(answer.try_recv().unwrap().is_ok());
        assert!(names(&world).contains("cloud"));
        let open = world.window_on_disk().open.unwrap();
        let is_displaced = world.text.contains("other.example.net");
        assert_eq!(open.regions.contains_key("cloud"), is_displaced);
        world.pass(120);
        world.perform_the(is_commit, false);
        // Before anything is looked up.
        assert_eq!(world.allowed("cloud"), ["198.51.100.7/32"]);
        assert!(names(&world).contains("cloud"));
        world.settle(OFFICE);
    }
}

#[test]
fn abandoned_text_is_an_error_until_the_file_is_changed_or_reloaded() {
    let mut world = settled();
    world.try_policy(2);
    let tried = world.text.clone();
    let mut answer = world.confirm(None, true);
    world.settle(OFFICE);
    assert!(answer.try_recv().unwrap().is_ok());
    world.pass(60);
    world.settle(OFFICE);
    assert!(world.errors()[0].contains("is not enforced"));
    assert_eq!(
        world
            .log
            .iter()
            .filter(|line| line.contains("is not enforced"))
            .count(),
        1
    );
    world.text_number(3);
    world.pass(5);
    world.settle(OFFICE);
    assert!(world.errors().is_empty());
    assert!(world.has_abandoned(&tried));
    // The very text is what the operator wants after all.
    world.text = tried.clone();
    let mut answer = world.reload();
    world.settle(OFFICE);
    assert!(answer.try_recv().unwrap().is_ok());
    assert!(!world.has_abandoned(&tried));
    assert!(world.errors().is_empty());
}

#[test]
fn rollback_enforces_the_policy_confirmed_before_and_abandons_the_one_in_force() {
    let mut world = settled();
    let first = world.text.clone();
    let text = error(&mut world.roll_back(None));
    assert!(text.contains("no policy before the one in force"), "{text}");
    let second = world.text_number(2);
    let mut answer = world.reload();
    world.settle(OFFICE);
    let id = answer.try_recv().unwrap().unwrap().id;
    // Not what was only tried.
    world.try_policy(3);
    world.pass(120);
    world.settle(OFFICE);
    world.text = second.clone();
    let mut answer = world.roll_back(None);
    world.settle(OFFICE);
    let rolled_back = answer.try_recv().unwrap().unwrap();
    assert!(rolled_back.window.is_none());
    assert_eq!(world.kernel.0, first);
    assert_eq!(world.confirmed_on_disk(), first);
    assert!(world.has_abandoned(&second));
    assert!(world.errors()[0].contains("was rolled back"));
    let text = error(&mut world.roll_back(Some(rolled_back.id)));
    assert!(text.contains("is the one in force"), "{text}");
    let text = error(&mut world.roll_back(Some(99)));
    assert!(text.contains("99"), "{text}");
    // By its number.
    let mut answer = world.roll_back(Some(id));
    world.settle(OFFICE);
    assert!(answer.try_recv().unwrap().is_ok());
    assert_eq!(world.kernel.0, second);
    assert!(!world.has_abandoned(&second) && world.has_abandoned(&first));
    assert!(world.errors().is_empty());
}

#[test]
fn reload_of_another_text_than_was_meant_is_refused() {
    let mut world = settled();
    let before = world.text.clone();
    let text = world.text_number(2);
    let meant = |hash: String| ReloadOptions {
        if_hash: Some(hash),
        ..ReloadOptions::default()
    };
    let mut answer = world.reload_with(meant("0".repeat(64)));
    world.settle(OFFICE);
    let refused = answer.try_recv().unwrap().unwrap_err();
    let refusal = refused.downcast_ref::<crate::refusal::Refusal>();
    assert!(matches!(
        refusal,
        Some(crate::refusal::Refusal::PreconditionFailed(_))
    ));
    assert_eq!(world.kernel.0, before);
    let mut answer = world.reload_with(meant(crate::policy_file::hash(&text).to_uppercase()));
    world.settle(OFFICE);
    assert!(answer.try_recv().unwrap().is_ok());
    assert_eq!(world.kernel.0, text);
}

#[test]
fn detach_forgets_the_window_and_the_abandoned_texts() {
    let mut world = settled();
    world.try_policy(2);
    let mut answer = world.confirm(None, true);
    world.settle(OFFICE);
    assert!(answer.try_recv().unwrap().is_ok());
    world.try_policy(3);
    let (reply, mut answer) = oneshot::channel();
    let (by, reply) = (None, Reply(reply));
    world.send(Event::Request(Request::Detach { by, reply }));
    while let Some(place) = world.find(|_| true) {
        world.perform(place, OFFICE, false, false);
    }
    assert!(answer.try_recv().unwrap().is_ok());
    assert!(world.window_on_disk().is_empty());
    assert!(world.agent.window().is_none());
    world.pass(120);
    assert!(world.effects.is_empty());
}

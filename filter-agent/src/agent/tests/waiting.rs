//! Replies that wait for the disk, for look-ups and for the end; and what must not pile up meanwhile.

use super::*;

fn detach(world: &mut World) -> oneshot::Receiver<Result<Vec<String>>> {
    let (reply, answer) = oneshot::channel();
    let reply = Reply(reply);
    world.send(Event::Request(Request::Detach { by: None, reply }));
    answer
}

impl World {
    /// Carries out everything but writes to disk, which hangs.
    fn settle_but_disk(&mut self) {
        let is_history = |write: &Write| {
            !matches!(
                write.record(),
                Record::Confirmed | Record::Temporary | Record::Region(_) | Record::Regions
            )
        };
        let is_done = |effect: &Effect| match effect {
            Effect::Save(write) => is_history(write),
            _ => true,
        };
        while let Some(place) = self.find(is_done) {
            self.perform(place, OFFICE, false, false);
        }
    }

    /// The disk takes what it was given of the history.
    fn write_history(&mut self) {
        let is_meant = |effect: &Effect| matches!(effect, Effect::Save(write) if write.record() != Record::Confirmed);
        while let Some(place) = self.find(is_meant) {
            self.perform(place, OFFICE, false, false);
        }
    }

    /// The disk takes the earliest version of the confirmed policy that it was given.
    fn write_confirmed(&mut self) {
        let place = self.find(
            |effect| matches!(effect, Effect::Save(write) if write.record() == Record::Confirmed),
        );
        self.perform(place.unwrap(), OFFICE, false, false);
    }

    fn has_stopped(&self) -> bool {
        self.find(|effect| matches!(effect, Effect::Stop)).is_some()
    }
}

/// The agent ends with a detach: what it could not remove then stayed for good, and nobody was told.
#[test]
fn detach_that_cannot_remove_a_file_says_so() {
    let mut world = settled();
    let mut detached = detach(&mut world);
    while !world.has_stopped() {
        let fails = matches!(&world.effects[0], Effect::Save(Write::LastHits(_)));
        world.perform(0, OFFICE, fails, false);
    }
    let said = error(&mut detached);
    assert!(
        said.starts_with("detached: nothing is filtered, but a file is left"),
        "{said}"
    );
}

/// A write that was overtaken let a reload, and a detach, be called done that were not on disk.
#[test]
fn reply_waits_for_the_write_that_it_is_about_and_not_for_an_earlier_one() {
    let mut world = settled();
    let mut reloads = Vec::new();
    for number in [2, 3] {
        world.text = policy(number, "");
        reloads.push(world.reload());
        world.settle_but_disk();
    }
    world.write_confirmed();
    assert!(reloads[1].try_recv().is_err());
    let mut detached = detach(&mut world);
    let place = world.find(|effect| matches!(effect, Effect::Detach));
    world.perform(place.unwrap(), OFFICE, false, false);
    world.write_history();
    world.write_confirmed();
    assert!(detached.try_recv().is_err());
    assert!(!world.has_stopped());
    world.write_confirmed();
    assert!(detached.try_recv().unwrap().is_ok());
    assert!(world.has_stopped());
    for mut reload in reloads {
        assert!(reload.try_recv().unwrap().is_ok());
    }
}

/// A reload whose policy was not on disk yet was called done without a word about it.
#[test]
fn reload_that_the_disk_does_not_take_in_time_says_so() {
    let mut world = settled();
    for _ in 0..2 {
        world.text = policy(2, "");
        let mut answer = world.reload();
        world.settle_but_disk();
        world.pass(1);
        let warnings = answer.try_recv().unwrap().unwrap().plan.warnings;
        assert!(warnings[0].contains("not kept for the next start yet"));
    }
    world.settle(OFFICE);
    let mut answer = world.reload();
    world.settle(OFFICE);
    assert!(answer.try_recv().unwrap().unwrap().plan.warnings.is_empty());
}

/// A reload that ended one look-up of a request called the request's other look-ups done.
#[test]
fn refresh_waits_for_the_look_ups_that_a_reload_does_not_end() {
    let mut world = settled();
    let (reply, mut answer) = oneshot::channel();
    world.send(Event::Request(Request::Refresh {
        region: None,
        accept: false,
        reply: Reply(reply),
    }));
    let looking: Vec<Effect> = world.effects.extract_if(.., |e| is_look_up(e)).collect();
    assert_eq!(looking.len(), 2);
    world.text = policy(2, "");
    world.reload();
    world.settle(OFFICE);
    assert_eq!(world.kernel.0, policy(2, ""));
    assert!(answer.try_recv().is_err());
    world.effects.extend(looking);
    world.settle(OFFICE);
    let refreshed = answer.try_recv().unwrap().unwrap();
    assert_eq!(refreshed.len(), 2);
}

/// SIGTERM in the middle of a change or a detach left its client without a reply, and the log said that the filter
/// stays in force whatever the detach did.
#[test]
fn agent_that_is_told_to_end_waits_for_the_change_under_way_and_begins_no_other() {
    let mut world = settled();
    world.text = policy(2, "");
    let mut answer = world.reload();
    while world.find(is_commit).is_none() {
        world.perform(0, OFFICE, false, false);
    }
    let mut deferred = world.reload();
    world.send(Event::Terminate);
    assert!(!world.has_stopped());
    let middle = world.agent.describe_stop();
    assert!(middle.contains("in the middle of a change"), "{middle}");
    let mut late = world.reload();
    for dropped in [&mut deferred, &mut late] {
        let closed = oneshot::error::TryRecvError::Closed;
        assert_eq!(dropped.try_recv().unwrap_err(), closed);
    }
    world.pass(1000);
    world.settle_but_disk();
    assert!(answer.try_recv().is_err());
    world.write_confirmed();
    assert!(answer.try_recv().unwrap().is_ok());
    assert!(world.has_stopped());
    assert_eq!(world.commits, 3);
    assert!(world.agent.describe_stop().starts_with("stopping; "));

    let mut world = settled();
    let mut answer = detach(&mut world);
    world.send(Event::Terminate);
    assert!(!world.has_stopped());
    assert!(world.agent.describe_stop().contains("may be gone"));
    while !world.has_stopped() {
        world.perform(0, OFFICE, false, false);
    }
    assert!(answer.try_recv().unwrap().is_ok());
    assert_eq!(world.disk[&Record::Confirmed], Write::Confirmed(None));
    assert!(world.agent.describe_stop().starts_with("detached"));

    let mut world = settled();
    world.send(Event::Terminate);
    assert!(world.has_stopped());
}

/// Each SIGHUP while one reload was under way made one more, without end.
#[test]
fn hangups_during_a_reload_do_not_pile_up() {
    let mut world = settled();
    let before = world.commits;
    world.send(Event::Hangup);
    while world.find(is_commit).is_none() {
        world.send(Event::Hangup);
        world.perform(0, OFFICE, false, false);
    }
    for _ in 0..100 {
        world.send(Event::Hangup);
    }
    assert!(world.agent.deferred.len() <= 1);
    world.settle(OFFICE);
    // The one under way, the one after it, and one that came during the change.
    assert!(world.commits - before <= 3);
}

/// The file of a region of a policy that was only planned, or refused, was watched for good.
#[test]
fn files_of_policies_that_are_not_in_force_are_not_watched() {
    let mut world = settled();
    let other = policy(2, "").replace("office.txt", "other.txt");
    let watched = |world: &mut World, fail: bool| {
        let mut watched = None;
        while !world.effects.is_empty() {
            if let Effect::Watch(files) = &world.effects[0] {
                watched = Some(files.clone());
            }
            let fail = fail && is_commit(&world.effects[0]);
            world.perform(0, OFFICE, fail, false);
        }
        let office = PathBuf::from("/etc/office.txt");
        assert_eq!(watched, Some(BTreeSet::from([office])));
    };
    let (reply, _) = oneshot::channel();
    let (text, path, caller) = (Some(other.clone()), None, None);
    let reply = Reply(reply);
    world.send(Event::Request(Request::Plan {
        text,
        path,
        caller,
        reply,
    }));
    watched(&mut world, false);
    world.text = other;
    world.reload();
    watched(&mut world, true);
}

/// The same for what is to be removed: the warning stayed in `status` until a reload.
#[test]
fn sets_that_could_not_be_removed_are_removed_later() {
    let mut world = settled();
    world.text = policy(2, "");
    world.reload();
    let is_removal = |effect: &Effect| matches!(effect, Effect::Save(Write::Regions(_)));
    while !world.effects.is_empty() {
        let fail = is_removal(&world.effects[0]);
        world.perform(0, OFFICE, fail, false);
    }
    assert_eq!(world.agent.snapshot().unsaved.len(), 1);
    world.send(Event::Checked(checked()));
    world.settle(OFFICE);
    assert!(world.agent.snapshot().unsaved.is_empty());
}

/// A set that a full disk refused was not written again until it changed.
#[test]
fn set_that_could_not_be_written_is_written_again() {
    let mut world = settled();
    // Changes within a minute wait.
    world.now.steady += Duration::from_secs(60);
    world.send(Event::FileChanged("/etc/office.txt".into()));
    let is_set = |effect: &Effect| matches!(effect, Effect::Save(Write::Region { .. }));
    while !world.effects.is_empty() {
        let fail = is_set(&world.effects[0]);
        world.perform(0, "203.0.113.2/32", fail, false);
    }
    assert_eq!(world.agent.snapshot().unsaved.len(), 1);
    world.send(Event::Checked(checked()));
    assert!(world.find(is_set).is_none());
    world.now.steady += Duration::from_secs(60);
    world.send(Event::Checked(checked()));
    world.settle("203.0.113.2/32");
    assert!(world.agent.snapshot().unsaved.is_empty());
}

/// A change within a minute of another waits, and was not on disk after a stop.
#[test]
fn set_that_waits_is_written_at_the_end() {
    let mut world = settled();
    let is_set = |effect: &Effect| matches!(effect, Effect::Save(Write::Region { .. }));
    for prefix in ["203.0.113.2/32", "203.0.113.3/32"] {
        world.send(Event::FileChanged("/etc/office.txt".into()));
        while !world.effects.is_empty() {
            world.perform(0, prefix, false, false);
        }
    }
    world.send(Event::Terminate);
    assert!(world.find(is_set).is_some());
}

/// Whoever was answered must find the change under its number after a crash.
#[test]
fn reply_waits_for_the_history_and_the_id_is_given_to_the_disk_first() {
    let mut world = settled();
    world.text = policy(2, "");
    let mut answer = world.reload();
    while world.find(is_commit).is_some() || world.find(|e| !matches!(e, Effect::Save(_))).is_some()
    {
        let place = world.find(|effect| !matches!(effect, Effect::Save(_)));
        world.perform(place.unwrap(), OFFICE, false, false);
    }
    let records = world.effects.iter().map(|effect| match effect {
        Effect::Save(write) => write.record(),
        effect => panic!("{effect:?}"),
    });
    assert_eq!(records.clone().next(), Some(Record::ChangeId));
    assert!(records.collect::<Vec<_>>().contains(&Record::Policies));
    world.write_confirmed();
    assert!(answer.try_recv().is_err());
    world.write_history();
    let reloaded = answer.try_recv().unwrap().unwrap();
    assert_eq!(reloaded.id, 2);
    assert_eq!(world.disk[&Record::ChangeId], Write::ChangeId(2));
}

/// A disk that takes nothing delays no change, and takes all when it has room.
#[test]
fn history_that_could_not_be_written_is_said_once_and_written_later() {
    let mut world = settled();
    let fail = |world: &mut World| {
        while !world.effects.is_empty() {
            let is_save = matches!(world.effects[0], Effect::Save(_));
            world.perform(0, OFFICE, is_save, false);
        }
    };
    world.text = policy(2, "");
    let mut answer = world.reload();
    fail(&mut world);
    let warnings = answer.try_recv().unwrap().unwrap().plan.warnings;
    let said = warnings
        .iter()
        .filter(|line| line.contains("history of policies is not kept"));
    assert_eq!(said.count(), 1, "{warnings:?}");
    for _ in 0..30 {
        world.pass(1);
        world.send(Event::Checked(checked()));
        fail(&mut world);
    }
    let lines = world.log.iter();
    let lines =
        lines.filter(|line| line.starts_with("warning: the history of policies is not kept"));
    assert_eq!(lines.count(), 1, "{:#?}", world.log);
    assert!(!world.agent.snapshot().unsaved.is_empty());
    world.pass(10);
    world.send(Event::Checked(checked()));
    world.settle(OFFICE);
    assert_eq!(world.agent.snapshot().unsaved, Vec::<String>::new());
    let Write::Policies(policies) = &world.disk[&Record::Policies] else {
        unreachable!();
    };
    let ids = policies.iter().map(|past| past.id);
    assert_eq!(ids.collect::<Vec<_>>(), [1, 2]);
    assert_eq!(world.disk[&Record::ChangeId], Write::ChangeId(2));
}
